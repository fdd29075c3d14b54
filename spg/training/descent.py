"""Steps of Adam for policies and critics that learn from a buffer."""

from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from spg.estimators.actor_critic import polyak
from spg.kernels.critics import QCritic
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.types import Scalar, Transition

M = TypeVar("M")


def descend(
    rate: Scalar, loss: Callable[[M], tuple[Array, Any]], module: M, opt_state: optax.OptState
) -> tuple[M, optax.OptState, Array, Any]:
    """A step of Adam: module, state of the optimiser, loss, and what else the loss returned."""
    params, fixed = eqx.partition(module, trainable(module))
    of_params = lambda params: loss(eqx.combine(params, fixed))
    (value, aux), gradient = eqx.filter_value_and_grad(of_params, has_aux=True)(params)
    updates, opt_state = optax.adam(rate).update(gradient, opt_state)
    return eqx.apply_updates(module, updates), opt_state, value, aux


def improve(
    rate: Scalar,
    state_rate: Scalar,
    loss: Callable[[Kernel], tuple[Array, Any]],
    kernel: Kernel,
    opt_state: optax.OptState,
) -> tuple[Kernel, optax.OptState, Array, Any]:
    """A step of the policy, as `descend` makes it, with a rate of its own for the cell."""
    moved, opt_state, value, aux = descend(rate, loss, kernel, opt_state)
    # a step of Adam is proportional to its rate
    cell = polyak(kernel.cell, moved.cell, state_rate / rate)
    return eqx.tree_at(lambda kernel: kernel.cell, moved, cell), opt_state, value, aux


def regress(
    rate: Scalar,
    critic: QCritic,
    opt_state: optax.OptState,
    steps: Transition,
    z_next: PyTree,
    goal: Float[Array, " B"],
) -> tuple[QCritic, optax.OptState, dict[str, Array]]:
    """A step of the critics towards their targets, by squares; and metrics.

    `z_next` takes the place of the recorded z', which never touched the world.
    """

    def loss(critic):
        q_value = jax.vmap(critic)(steps.obs, steps.action, z_next)
        return jnp.mean((q_value - goal[:, None]) ** 2), q_value.mean()

    critic, opt_state, critic_loss, q_value = descend(rate, loss, critic, opt_state)
    return critic, opt_state, {"critic_loss": critic_loss, "q_value": q_value}


def adam(module: PyTree) -> optax.OptState:
    """The state of `descend`'s optimiser at the start."""
    return optax.adam(0.0).init(eqx.filter(module, trainable(module)))
