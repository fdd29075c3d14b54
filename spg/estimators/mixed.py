"""S2PG with two gradients for z': the slope of V for the next step, the score for what follows."""

from collections.abc import Callable
from typing import NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Inexact, PyTree

from spg.distributions import Distribution, Normal
from spg.estimators.surrogate import Surrogate, pessimistic, ppo_surrogate
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Flat
from spg.scans import over_steps
from spg.types import LogProb, Scalar, Transition


class MixedTerms(NamedTuple):
    """What `mixed_surrogate` keeps of the policy that drew the steps, and of what came of them."""

    log_prob: LogProb  # [T]
    state: Normal  # what z' was drawn from, [T]
    delta: Float[Array, "*T"]  # δ_t of `mixed_surrogate`
    rest: Float[Array, "*T"]  # A_t - δ_t
    slope: Inexact[Array, "*T n"]  # ∂/∂z' of δ_t log μ(a | o, z') + γ V(o', z')


def mixed_terms(
    kernel: Kernel,
    critic: Callable[[PyTree, PyTree], Float[Array, ""]],
    steps: Transition,
    delta: Float[Array, " T"],
    rest: Float[Array, " T"],
    *,
    gamma: Scalar,
) -> MixedTerms:
    """The terms of steps that `kernel` drew; V(o', z') is `critic`, 0 where the episode terminated.

    For a complex z' = x + iy the slope is ∂/∂x + i ∂/∂y. Raises TypeError unless ω is `Normal`.
    """
    state = kernel.state_distribution(steps)
    if not follows(state):
        raise TypeError(f"only a Normal z' can follow V; the cell draws {type(state).__name__}")

    def brought(z_next):
        value = jax.vmap(critic)(steps.final_obs, z_next)
        action = kernel.log_prob_action(steps, z_next)
        return (delta * action + gamma * ~steps.terminated * value).sum()

    slope = jnp.conj(jax.grad(brought)(steps.z_next))
    return MixedTerms(kernel.log_prob(steps, state), state, delta, rest, slope)


def follows(state: Distribution) -> TypeGuard[Normal]:
    """Whether z' of this distribution can follow the slope of V, see `mixed_surrogate`."""
    return isinstance(state, Normal)


def mixed_surrogate(
    steps: Transition,
    new: LogProb,
    state: Normal,
    old: MixedTerms,
    *,
    clip: Scalar,
    kl_coef: Scalar = 0.0,
) -> Surrogate:
    """A surrogate of S2PG in which V tells where z' should have gone (ours, L = 1).

    The advantage of a step is what V sees of it at once and a rest, in GAE γλ A_{t+1}:

        A_t = δ_t + (A_t - δ_t),    δ_t = r_t + γ V(o'_t, z'_t) - V(o_t, z_t)

    z' reaches δ_t only through the action and through V, so there a path takes the place of its
    score. With z'(ε) = loc + std ε for the recorded noise ε, the gradient at the first minibatch is

        δ_t ∇log μ(a_t | o_t, z'(ε)) + γ ∇V(o'_t, z'(ε)) + (A_t - δ_t) ∇log π(a_t, z'_t | o_t, z_t)

    with V held: the value gradient of Heess et al. (2015), made unbiased as in Gu et al. (2017).
    The expectation of this gradient is that of `ppo_surrogate`, whatever V is: for given (o_t, z_t)
    the score and the path of z' agree in the mean, and r_t and V(o_t, z_t) do not depend on z'
    once the action is given. That V stands for later gradients is the idea of synthetic gradients
    (Jaderberg et al., 2017).

    Later minibatches: the ratio of μ for δ_t and the joint ratio for the rest are clipped as in
    `ppo_surrogate`, both with z' as recorded, and δ_t log μ + γ V is a straight line along which an
    entry of z' moves by at most `clip` of its old standard deviation. Where an update has moved z'
    far from what drew it, the joint ratio is near 0 and its surrogate flat, whatever A is: it does
    not bring z' back. `kl_coef` KL(ω_old ‖ ω) of each step is taken off to do so (Schulman et al.,
    2017, eq. 8, take off that of the policy); its gradient at the first minibatch is 0.
    """
    flat = over_steps(Flat())
    slope = flat(old.slope)
    noise = over_steps(Normal.noise)(old.state, steps.z_next)
    moved = flat(over_steps(Normal.at)(state, noise) - steps.z_next)
    # the lesser of the line where z' is and where it is at most `clip` away
    path = jnp.minimum(slope * moved, clip * jnp.abs(flat(old.slope * old.state.std))).sum(-1)
    path -= kl_coef * over_steps(Normal.kl)(old.state, state)
    at_once = new.action - old.log_prob.action
    score = ppo_surrogate(new, old.log_prob, old.rest, clip=clip)
    return score._replace(
        objective=score.objective + pessimistic(at_once, old.delta, clip=clip) + path
    )
