"""Gradients through a learned Q(o, a, z'): soft and deterministic, with their targets.

Losses are of single steps and point downhill; callers average them. Q is any function
(obs, action, z') -> [n] of an ensemble. Where the policy draws z', gradients run through Q by both
a and z'. Where the policy computes z', they run by a alone, and back in time through z'.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from spg.distributions import Normal
from spg.kernels.cells import Key
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.scans import over_steps
from spg.types import Scalar, Transition, policy_view

Q = Callable[[PyTree, Array, PyTree], Float[Array, " n"]]


class Choice(NamedTuple):
    """What a policy would do at the recorded steps, and what Q makes of it."""

    q_value: Float[Array, "L n"]
    action: Array  # [L, ...]
    z_next: PyTree  # [L, ...]
    log_prob_action: Float[Array, " L"]  # log μ(a | o, z'); 0 without noise
    log_prob_z: Float[Array, " L"]  # log ω(z' | o, z); 0 without noise, and where z' is computed


def choose(kernel: Kernel, q: Q, segment: Transition, *, last: bool = False, key: Key) -> Choice:
    """Run a recorded segment again, with fresh noise or (key None) without, and ask Q.

    The gradient of Σ γ^t Q without noise is that of J, when the steps are those of the policy
    itself: theorem 2.3 of Al-Hafez et al. (2024), the deterministic policy gradient for (a, z').
    With noise it is that of their theorem 2.2, by a path in place of the score. `last` chooses at
    the segment's last step alone.
    """
    state_key, action_key = (None, None) if key is None else jr.split(key)
    roll = kernel.roll(segment, key=state_key)
    if last:
        segment, roll = jax.tree.map(lambda x: x[-1:], (segment, roll))
    action, log_prob = kernel.act(segment, roll.z_next, key=action_key)
    q_value = over_steps(q)(segment.obs, action, roll.chosen)
    return Choice(q_value, action, roll.z_next, log_prob, roll.log_prob)


def soft_loss(
    choice: Choice, *, temperature: Scalar, state_temperature: Scalar
) -> Float[Array, " L"]:
    """Loss of the soft policy, algorithm 2 of Al-Hafez et al. (2024), SAC-RS.

    τ_a log μ(a | o, z') + τ_z log ω(z' | o, z) - min_i Q_i(o, a, z')
    """
    entropy = temperature * choice.log_prob_action + state_temperature * choice.log_prob_z
    return entropy - choice.q_value.min(-1)


def q_target(
    reward: Float[Array, ""],
    terminated: Bool[Array, ""],
    q_next: Float[Array, " n"],
    bonus: Scalar = 0.0,
    *,
    gamma: Scalar,
) -> Float[Array, ""]:
    """What Q regresses on, r + γ (1 - terminated) (min_i Q_i(o', a', z'') + bonus).

    The smaller of two, Fujimoto et al. (2018). The bonus of SAC is -τ_a log μ(a' | o', z'').
    """
    return reward + gamma * ~terminated * (q_next.min() + bonus)


def temperature_loss(
    log_temperature: Float[Array, ""], log_prob: Float[Array, "..."], target_entropy: Scalar
) -> Float[Array, "..."]:
    """-τ (log π + H), Haarnoja et al. (2018), eq. 18: τ falls while the entropy is above H."""
    return -jnp.exp(log_temperature) * (jax.lax.stop_gradient(log_prob) + target_entropy)


class Smoothing(NamedTuple):
    """The clipped noise on the choices of the target policy, Fujimoto et al. (2018), eq. 14.

    As in algorithm 1 of Al-Hafez et al. (2024), TD3-RS: in units of the action's range, and for z'
    in units of the deviation with which z' is drawn.
    """

    std: Scalar = 0.2
    clip: Scalar = 0.5
    state_std: Scalar = 0.5
    state_clip: Scalar = 1.25


def smoothed_choice(
    kernel: Kernel, obs: PyTree, z: PyTree, smoothing: Smoothing, *, key: PRNGKeyArray
) -> tuple[Float[Array, " a"], PyTree]:
    """(a', z'') of the noise-free policy with `smoothing`: one step, actions within [-1, 1]."""
    state_key, action_key = jr.split(key)
    seen = kernel.normalizer(policy_view(obs))
    drawn = kernel.cell(seen, z)
    z_next: Any = drawn.mode()
    if isinstance(drawn, Normal):
        limits = {"share": smoothing.state_std, "limit": smoothing.state_clip}
        z_next = drawn.near(**limits, key=state_key)
    best = kernel.head(seen, z_next).mode()
    around = Normal(best, jnp.ones_like(best))
    action = around.near(share=smoothing.std, limit=smoothing.clip, key=action_key)
    return jnp.clip(action, -1.0, 1.0), z_next


T = TypeVar("T")


def polyak(slow: T, fast: T, rate: Scalar) -> T:
    """(1 - rate) slow + rate fast for what is trained; statistics of observations as in `fast`."""
    move = lambda trained, s, f: s + rate * (f - s) if trained else f
    return jax.tree.map(move, trainable(fast), slow, fast)
