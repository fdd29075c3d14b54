"""Policy gradients for stateful policies in partially observable environments.

`spg.envs` is apart, because importing Gymnax starts JAX's backend.
"""

from spg.distributions import Categorical, Delta, Normal, TanhNormal
from spg.estimators.returns import gae, returns_to_go
from spg.estimators.score import episodic_gpomdp, reinforce, score_estimate
from spg.estimators.surrogate import Surrogate, ppo_surrogate
from spg.kernels.cells import GRU, Computed, Drawn, Empty, Location, NormalAround, Window
from spg.kernels.critics import Critic
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.finite import expected_kernel, finite_kernel, random_controller
from spg.kernels.heads import CategoricalHead, NormalHead
from spg.kernels.kernel import Kernel
from spg.kernels.linear import LRU, Gated, LeakyFilter, Linear, LinearUnit
from spg.kernels.networks import MLP, Normalizer
from spg.kernels.stack import Stack
from spg.rollout import Carry, Episodes, evaluate, evaluation, reset, rollout
from spg.scans import linear_scan, split_segments
from spg.types import Env, LogProb, Observation, Spec, Transition
from spg.worlds.models import DensePOMDP, Problem, SparsePOMDP, dense, sparse

__all__ = [
    "GRU",
    "LRU",
    "MLP",
    "Carry",
    "Categorical",
    "CategoricalHead",
    "Computed",
    "Critic",
    "Delta",
    "DensePOMDP",
    "Drawn",
    "Empty",
    "Env",
    "Episodes",
    "Gated",
    "Kernel",
    "LeakyFilter",
    "Linear",
    "LinearUnit",
    "Location",
    "LogProb",
    "Normal",
    "NormalAround",
    "NormalHead",
    "Normalizer",
    "Observation",
    "PolicyConfig",
    "Problem",
    "SparsePOMDP",
    "Spec",
    "Stack",
    "Surrogate",
    "TanhNormal",
    "Transition",
    "Window",
    "dense",
    "episodic_gpomdp",
    "evaluate",
    "evaluation",
    "expected_kernel",
    "finite_kernel",
    "gae",
    "linear_scan",
    "make_kernel",
    "ppo_surrogate",
    "random_controller",
    "reinforce",
    "reset",
    "returns_to_go",
    "rollout",
    "score_estimate",
    "sparse",
    "split_segments",
]
