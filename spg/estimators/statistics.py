"""Statistics of observations that move no further than an update moved what is learned.

New statistics change a policy, and what it keeps in mind, without any gradient: they can undo the
care that an update took to stay near the policy that drew the data.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from spg.estimators.surrogate import divergence
from spg.kernels.critics import Critic
from spg.kernels.kernel import Kernel
from spg.types import Transition, critic_view, policy_view

SHARE = 0.5  # of an update's own change; the rest is room for the error of a mean over few steps
FEW = 512  # steps on which changes are measured


def joint_kl(kernel: Kernel, before: Kernel, segments: Transition) -> Float[Array, ""]:
    """KL(π_before ‖ π) of action and internal state, the mean over steps recorded near π_before.

    The estimate of `divergence`; `segments` are `[N, L, ...]`.
    """
    score = lambda kernel: jax.vmap(kernel.log_prob)(segments)
    return divergence(score(kernel), score(before)).kl.mean()


def observe(kernel: Kernel, before: Kernel, segments: Transition) -> Kernel:
    """The kernel with its statistics moved towards the observations of the segments `[N, L, ...]`.

    The move is cut until it changes the policy by at most half of `joint_kl` from `before`, the
    kernel that recorded the segments, to `kernel`, which an update made of it.
    """
    few = _few(segments)
    return _advance(
        kernel,
        policy_view(segments.obs),
        lambda moved: joint_kl(moved, kernel, few),
        joint_kl(kernel, before, few),
    )


def observe_critic(critic: Critic, before: Critic, segments: Transition) -> Critic:
    """As `observe`; a change is the mean square of that in V(o, z)."""
    few = _few(segments)
    value = lambda critic: jax.vmap(jax.vmap(critic))(few.obs, few.z)
    change = lambda new, old: jnp.mean((value(new) - value(old)) ** 2)
    return _advance(
        critic,
        critic_view(segments.obs),
        lambda moved: change(moved, critic),
        change(critic, before),
    )


def start_statistics(module: Any, obs: Array) -> Any:
    """The kernel or critic with the statistics of the first observations, before any update."""
    return _with(module, module.normalizer.update(obs))


def _advance(module: Any, obs: Array, change: Any, limit: Float[Array, ""]) -> Any:
    changed = lambda normalizer: change(_with(module, normalizer))
    return _with(module, module.normalizer.advance(obs, change=changed, limit=SHARE * limit))


def _with(module: Any, normalizer: Any) -> Any:
    return eqx.tree_at(lambda m: m.normalizer, module, normalizer)


def _few(segments: Transition) -> Transition:
    """Every n-th segment, about `FEW` steps in all."""
    stride = max(1, segments.reward.size // FEW)
    return jax.tree.map(lambda x: x[::stride], segments)
