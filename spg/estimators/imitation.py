"""Learning from an expert's steps: discriminators, rewards that are implicit in Q, cloned actions.

Losses are of single steps and point downhill. Callers average them over as many steps of the expert
as of the policy. No reward of the environment enters.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from spg.estimators.returns import returns_to_go
from spg.kernels.kernel import Kernel
from spg.types import LogProb, Scalar, Transition

# GAIL: a discriminator D(s, a) is a logit, above 0 where it takes a step for the expert's


def logistic_loss(
    logit: Float[Array, "*B"], label: Float[Array, "*B"], *, entropy_coef: Scalar = 0.0
) -> Float[Array, "*B"]:
    """-l log σ(D) - (1 - l) log(1 - σ(D)) - c_H H(σ(D)), Ho & Ermon (2016), algorithm 1.

    The label l is 1 for the expert's steps and 0 for the policy's, or what `soft_labels` draws. H
    is the entropy in nats, (1 - σ(D)) D - log σ(D). Without it the optimum is log d_E / d_π.
    """
    entropy = jax.nn.sigmoid(-logit) * logit + jax.nn.softplus(-logit)
    return jax.nn.softplus(logit) - label * logit - entropy_coef * entropy


def soft_labels(label: Float[Array, "*B"], *, key: PRNGKeyArray) -> Float[Array, "*B"]:
    """Labels drawn from U(.8, .99) in place of 1, and from U(.01, .1) in place of 0."""
    share = jr.uniform(key, label.shape, label.dtype)
    return jnp.where(label > 0.5, 0.8 + 0.19 * share, 0.01 + 0.09 * share)


def logistic_reward(logit: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """-log(1 - σ(D)) = softplus(D), never negative: where episodes terminate it pays to survive."""
    return jax.nn.softplus(logit)


def least_squares_loss(logit: Float[Array, "*B"], label: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """(D - 1)² for the expert's steps, label 1, and (D + 1)² for the policy's, label 0.

    Mao et al. (2017), as Peng et al. (2021) have it. The optimum is (d_E - d_π) / (d_E + d_π).
    """
    return (logit - (2 * label - 1)) ** 2


def least_squares_reward(logit: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """max(0, 1 - (D - 1)² / 4), Peng et al. (2021)."""
    return jnp.maximum(0.0, 1 - 0.25 * (logit - 1) ** 2)


def squared_slope(
    discriminator: Callable[..., Scalar], *inputs: Float[Array, "..."]
) -> Float[Array, ""]:
    """|∇D|² in all its inputs, the penalty R1 and R2 of Mescheder et al. (2018).

    Without it D and the policy go round each other, and where the expert never is D is steep.
    """
    slope = jax.grad(lambda x: discriminator(*x))(inputs)
    return jnp.sum(jnp.stack([jnp.sum(x**2) for x in slope]))


# LS-IQ: Q itself tells the reward, r_Q = Q(s, a, z') - γ V(s', z')


def q_bound(*, c: Scalar, gamma: Scalar) -> Scalar:
    """1 / (c (1 - γ)): as rewards are within ±1/c, values are within ± this."""
    return 1 / (c * (1 - gamma))


def implicit_reward(
    q_value: Float[Array, "*B"],
    v_next: Float[Array, "*B"],
    terminated: Bool[Array, "*B"],
    *,
    gamma: Scalar,
) -> Float[Array, "*B"]:
    """r_Q = Q - γ (1 - terminated) V(s', z'), the reward for which Q solves the Bellman equation.

    The inverse soft Bellman operator of Garg et al. (2021). V(s', z') is of one draw, Q(s', a',
    z'') - τ_a log μ(a' | o', z'').
    """
    return q_value - gamma * ~terminated * v_next


def regularised_loss(
    reward: Float[Array, "*B"], label: Float[Array, "*B"], *, c: Scalar
) -> Float[Array, "*B"]:
    """(c/2) (r_Q - 1/c)² for the expert's steps, label 1, (c/2) (r_Q + 1/c)² for the policy's.

    Al-Hafez et al. (2023), LS-IQ. The sum of both means is 1/c less the objective of Q,

        E_E[r_Q] - E_π[r_Q] - (c/2) (E_E[r_Q²] + E_π[r_Q²]),

    which regularises r_Q on the mixture of both. The optimum is (d_E - d_π) / (c (d_E + d_π)).
    """
    return c / 2 * (reward - (2 * label - 1) / c) ** 2


def lsiq_target(
    v_next: Float[Array, "*B"],
    terminated: Bool[Array, "*B"],
    label: Float[Array, "*B"],
    *,
    c: Scalar,
    gamma: Scalar,
    fixed: bool = True,
) -> Float[Array, "*B"]:
    """What Q regresses on, with v_next = V(s', z') of the target networks, Al-Hafez et al. (2023).

        policy, label 0:  -1/c + γ clip(v_next, ±b),   -b where terminated,   b = 1 / (c (1 - γ))
        expert, label 1:  b if `fixed`, otherwise  1/c + γ clip(v_next, ±b),   b where terminated

    A terminal state counts as one that is never left and pays ±1/c in every step.
    """
    bound, sign = q_bound(c=c, gamma=gamma), 2 * label - 1
    reward = sign * jnp.where(terminated, bound, 1 / c)
    target = reward + gamma * ~terminated * jnp.clip(v_next, -bound, bound)
    return jnp.where((label > 0.5) & fixed, bound, target)


def iq_learn_loss(
    expert_reward: Float[Array, " n"],
    baseline: Float[Array, " m"],
    reward: Float[Array, " k"],
    terminated: Bool[Array, " k"],
    *,
    c: Scalar,
    gamma: Scalar,
) -> Float[Array, ""]:
    """-E_E[r_Q] + E[baseline] + c E[w r_Q²], Garg et al. (2021), with a χ² penalty.

    The baseline stands for E_π[r_Q]. It is r_Q of the policy's steps; or V(s, z) - γ (1 -
    terminated) V(s', z') of any steps that a policy leaves; or (1 - γ) V(s_0, z_0) of first steps:
    where the steps are weighted by γ^t, their means are the same. The penalty is on `reward`, r_Q
    of the expert's steps or of both; w is 1, and 1 - γ where `terminated`.
    """
    weight = jnp.where(terminated, 1 - gamma, 1.0)
    return baseline.mean() - expert_reward.mean() + c * jnp.mean(weight * reward**2)


# behaviour cloning


def clone_surrogate(
    kernel: Kernel, segment: Transition, *, num_draws: int, gamma: Scalar = 1.0, key: PRNGKeyArray
) -> tuple[Float[Array, " L"], Float[Array, " L"]]:
    """What has the gradient of E Σ_t log μ(a_t | o_t, z'_t), z'_t ~ ω along recorded steps; log μ.

    The gradient is that of the first one's sum; the second is the mean over draws.

    Where z' is drawn that is a lower bound of the likelihood, log Π_t p(a_t | a_{<t}, o_{<=t}), by
    Jensen's inequality, and equal to it where z' is certain. Each of the draws k gives

        log μ(a_t | o_t, z'_t) + (G_t - b_t) log ω(z'_t | o_t, z_t),   G_t = Σ_{i>=t} log μ_i

    (lemma 2.1 of Al-Hafez et al., 2024, with log μ for a reward), b_t the mean of G_t over the
    other draws: no gradient runs in time. Where z' is computed the likelihood is exact, and its
    gradient runs through time (BPTT). γ < 1 discounts what is later in G_t, which is biased and
    varies less. `segment` starts with the z to start from; its recorded z' is not read.
    """
    log_prob = _along(kernel, segment, num_draws, key)
    ends, none = (segment.terminated, segment.truncated), jnp.zeros_like(log_prob.z[0])
    later = jax.vmap(lambda r: returns_to_go(r, none, *ends, gamma=gamma))(
        lax.stop_gradient(log_prob.action)
    )
    others = (later.sum(0) - later) / max(1, num_draws - 1)
    surrogate = log_prob.action + (later - others) * log_prob.z
    return surrogate.mean(0), log_prob.action.mean(0)


def clone_log_likelihood(
    kernel: Kernel, segment: Transition, *, num_draws: int, key: PRNGKeyArray
) -> Float[Array, ""]:
    """log 1/K Σ_k Π_t μ(a_t | o_t, z'_t), z' ~ ω in each of K draws along the recorded steps.

    Its mean is a lower bound of the log-likelihood that tightens with K (Burda et al., 2016).
    """
    log_prob = _along(kernel, segment, num_draws, key)
    return jax.nn.logsumexp(log_prob.action.sum(1)) - jnp.log(num_draws)


def _along(kernel: Kernel, segment: Transition, num_draws: int, key: PRNGKeyArray) -> LogProb:
    """log π `[K, L]` of the recorded actions with K fresh draws of z' along the segment."""
    here = lax.stop_gradient(kernel)

    def one(key):
        roll = here.roll(segment, key=key)
        return kernel.log_prob(segment._replace(z=roll.z, z_next=roll.z_next))

    return jax.vmap(one)(jr.split(key, num_draws))
