"""From recorded steps to gradients and losses; an estimator never sees an environment.

`gpomdp` is the module of the average reward, with its `step`, `segment` and `gradient`; the
likelihoods that they take (`istate`, `exp_istate`, `responsibilities`) are importable from here.
"""

from spg.estimators import gpomdp
from spg.estimators.actor_critic import (
    Choice,
    Smoothing,
    choose,
    polyak,
    q_target,
    smoothed_choice,
    soft_loss,
    temperature_loss,
)
from spg.estimators.bounds import Constants, bptt_variance_bound, s2pg_variance_bound
from spg.estimators.gpomdp import exp_istate, exp_istate_by_observations, istate
from spg.estimators.held import (
    direct_estimate,
    discounted_returns,
    hold,
    responsibilities,
    window_returns,
)
from spg.estimators.imitation import (
    clone_log_likelihood,
    clone_surrogate,
    implicit_reward,
    iq_learn_loss,
    least_squares_loss,
    least_squares_reward,
    logistic_loss,
    logistic_reward,
    lsiq_target,
    q_bound,
    regularised_loss,
    soft_labels,
    squared_slope,
)
from spg.estimators.latent import Elbo, Sequence, elbo, sequence
from spg.estimators.mixed import MixedTerms, mixed_surrogate, mixed_terms
from spg.estimators.returns import gae, returns_to_go
from spg.estimators.score import episodic_gpomdp, reinforce, score_estimate
from spg.estimators.statistics import joint_kl, observe, observe_critic, start_statistics
from spg.estimators.surrogate import Divergence, Surrogate, divergence, ppo_surrogate
from spg.estimators.trust_region import (
    Trial,
    factor_kl,
    fisher_product,
    natural_gradient,
    trust_region_step,
)

__all__ = [
    "Choice",
    "Constants",
    "Divergence",
    "Elbo",
    "MixedTerms",
    "Sequence",
    "Smoothing",
    "Surrogate",
    "Trial",
    "bptt_variance_bound",
    "choose",
    "clone_log_likelihood",
    "clone_surrogate",
    "direct_estimate",
    "discounted_returns",
    "divergence",
    "elbo",
    "episodic_gpomdp",
    "exp_istate",
    "exp_istate_by_observations",
    "factor_kl",
    "fisher_product",
    "gae",
    "gpomdp",
    "hold",
    "implicit_reward",
    "iq_learn_loss",
    "istate",
    "joint_kl",
    "least_squares_loss",
    "least_squares_reward",
    "logistic_loss",
    "logistic_reward",
    "lsiq_target",
    "mixed_surrogate",
    "mixed_terms",
    "natural_gradient",
    "observe",
    "observe_critic",
    "polyak",
    "ppo_surrogate",
    "q_bound",
    "q_target",
    "regularised_loss",
    "reinforce",
    "responsibilities",
    "returns_to_go",
    "s2pg_variance_bound",
    "score_estimate",
    "sequence",
    "smoothed_choice",
    "soft_labels",
    "soft_loss",
    "squared_slope",
    "start_statistics",
    "temperature_loss",
    "trust_region_step",
    "window_returns",
]
