"""The one policy: π(a, z' | o, z) = ω(z' | o, z) μ(a | o, z')."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree

from spg.kernels.cells import Cell
from spg.kernels.heads import Head
from spg.kernels.networks import Identity, Normalizer
from spg.types import Replay, Transition, policy_view


class Kernel(eqx.Module):
    """π(a, z' | o, z): `cell(obs, z)` is the law ω of z', `head(obs, z')` the law μ of a.

    `z0` opens every episode and is not learned. Observations pass through `normalizer` first.
    """

    cell: Cell
    head: Head
    normalizer: Normalizer | Identity
    z0: Array

    @property
    def feature(self) -> Callable[[Array], Array] | None:
        """What the head sees of z', and a critic may see of z, where it is not all of it."""
        return getattr(self.head, "feature", None)

    def reset(self, first: Bool[Array, ""], z: Array) -> Array:
        """The internal state to consume o with: `z0` where an episode opens."""
        return jnp.where(first, lax.stop_gradient(self.z0), z)

    def sample(self, obs: PyTree, z: Array, *, key: PRNGKeyArray) -> tuple[Array, Array]:
        """Draw (a, z') ~ π( . | o, z)."""
        z_key, action_key = jr.split(key)
        obs = self.normalizer(policy_view(obs))
        z_next = self.cell(obs, z).sample(key=z_key)
        return self.head(obs, z_next).sample(key=action_key), z_next

    def mode(self, obs: PyTree, z: Array) -> tuple[Array, Array]:
        """The noise-free policy: mode of z', then mode of the action given it."""
        obs = self.normalizer(policy_view(obs))
        z_next = self.cell(obs, z).mode()
        return self.head(obs, z_next).mode(), z_next

    def replay(self, segment: Transition) -> Replay:
        """log π of each recorded step of one segment, time first.

        The internal state is carried from the segment's start, recomputed where the cell
        computes it and as recorded where the cell draws it; gradients follow the same paths.
        """
        obs = jax.vmap(self.normalizer)(policy_view(segment.obs))
        log_prob_z, z_next = self.cell.replay(
            obs, segment.z, segment.z_next, segment.first, lax.stop_gradient(self.z0)
        )
        law = jax.vmap(self.head)(obs, z_next)
        log_prob_action = jax.vmap(lambda law, a: law.log_prob(a))(law, segment.action)
        return Replay(log_prob_z, log_prob_action, jax.vmap(lambda law: law.entropy())(law))
