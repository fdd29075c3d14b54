"""S2PG with two gradients for z': the slope of V for the next step, the score for what follows."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm
from jaxtyping import Array, Float, PyTree

from spg.distributions import Distribution, Normal
from spg.estimators.surrogate import Surrogate, divergence, pessimistic
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Flat
from spg.types import LogProb, Scalar, Transition


class Recorded(NamedTuple):
    """What an update knows of recorded steps: how they were drawn, and what came of them.

    `memory` and `slope` are for `mixed_surrogate`, None without it.
    """

    log_prob: LogProb  # [T]
    memory: Distribution | None  # [T, n] ω( . | o, z)
    delta: Float[Array, "*T"]  # δ_t of `mixed_surrogate`
    rest: Float[Array, "*T"]  # A_t - δ_t
    slope: Float[Array, "*T m"] | None  # γ ∂V(o', z')/∂z', as `value_slope` has it


def value_slope(
    critic: Callable[[PyTree, PyTree], Float[Array, ""]], steps: Transition, *, gamma: Scalar
) -> Float[Array, "T m"]:
    """γ ∂V(o'_t, z'_t)/∂z', or 0 where the episode terminated; real parts, then imaginary parts."""
    slope = jax.grad(lambda z, obs: critic(obs, z))
    value = jax.vmap(lambda z, obs: Flat()(jnp.conj(slope(z, obs))))(steps.z_next, steps.final_obs)
    return gamma * ~steps.terminated[:, None] * value


def mixed_surrogate(
    kernel: Kernel, steps: Transition, new: LogProb, old: Recorded, *, clip: Scalar
) -> Surrogate:
    """A surrogate of S2PG in which V tells where z' should have gone (ours, L = 1).

    The advantage of a step is what V sees of it at once and a rest, in GAE γλ A_{t+1}:

        A_t = δ_t + (A_t - δ_t),    δ_t = r_t + γ V(o'_t, z'_t) - V(o_t, z_t)

    z' reaches δ_t only through the action and through V, so there a path takes the place of its
    score. With z'(ε) = loc + std ε for the recorded noise ε, the gradient at the first minibatch is

        δ_t ∇log μ(a_t | o_t, z'(ε)) + γ ∇V(o'_t, z'(ε)) + (A_t - δ_t) ∇log π(a_t, z'_t | o_t, z_t)

    with V held. Its expectation is that of `ppo_surrogate`, whatever V is: for given (o_t, z_t) the
    score and the path of z' agree in the mean, and r_t and V(o_t, z_t) do not depend on z'.

    Later minibatches: each factor of π, the action and every entry of z', has a clipped ratio of
    its own (Han & Sung, 2019, for actions), and an entry of z'(ε) counts within ± clip · old std.

    Raises TypeError unless ω is `Normal`.
    """
    memory = kernel.memory(steps)
    if not isinstance(memory, Normal) or not isinstance(old.memory, Normal) or old.slope is None:
        raise TypeError(f"only a Normal z' can follow V; the cell draws {type(memory).__name__}")
    z = jax.vmap(Normal.follow)(memory, steps.z_next, old.memory)
    moved = jax.vmap(lambda a, b: Flat()(a - b))(z, steps.z_next)
    real, real_old = (jax.vmap(lambda m: m.real)(m) for m in (memory, old.memory))
    bound = clip * real_old.std
    path = jnp.minimum(old.slope * moved, old.slope * jnp.clip(moved, -bound, bound)).sum(-1)
    at_once = kernel.log_prob_action(steps, z) - old.log_prob.action

    recorded = jax.vmap(Flat())(steps.z_next)
    log_density = lambda m: norm.logpdf(recorded, m.loc, m.std)
    entries = log_density(real) - log_density(real_old)
    factors = jnp.concatenate([(new.action - old.log_prob.action)[:, None], entries], 1)
    score, clipped = pessimistic(factors, old.rest[:, None], clip=clip)
    objective = pessimistic(at_once, old.delta, clip=clip)[0] + path + score.sum(-1)
    return Surrogate(objective, clipped.mean(-1), *divergence(new, old.log_prob))
