"""The one policy: π(a, z' | o, z) = ω(z' | o, z) μ(a | o, z')."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from spg.distributions import Distribution
from spg.kernels.cells import Cell, Key, Roll, draw
from spg.kernels.heads import Head
from spg.kernels.networks import FIXED, Flat, Identity, Normalizer
from spg.scans import over_steps
from spg.types import LogProb, Transition, policy_view


class Kernel(eqx.Module):
    """π(a, z' | o, z): `cell(obs, z)` is the distribution ω of z', `head(obs, z')` that μ of a.

    `z0` opens every episode and is not learned. Observations pass through `normalizer` first.
    `feature(z)` is the real vector that a critic sees in place of z.
    """

    cell: Cell
    head: Head
    normalizer: Normalizer | Identity
    z0: PyTree = eqx.field(metadata=FIXED)
    feature: Callable[[PyTree], Float[Array, " f"]] = Flat()

    def reset(self, first: Bool[Array, ""], z: PyTree) -> PyTree:
        """The internal state to consume o with: `z0` where an episode opens."""
        return jax.tree.map(lambda a, b: jnp.where(first, a, b), lax.stop_gradient(self.z0), z)

    def sample(self, obs: PyTree, z: PyTree, *, key: PRNGKeyArray) -> tuple[Array, PyTree]:
        """Draw (a, z') ~ π( . | o, z)."""
        z_key, action_key = jr.split(key)
        actions, z_next = self.actions(obs, z, key=z_key)
        return actions.sample(key=action_key), z_next

    def actions(self, obs: PyTree, z: PyTree, *, key: PRNGKeyArray) -> tuple[Distribution, PyTree]:
        """Draw z' ~ ω( . | o, z); the distribution μ( . | o, z') of a, and z'."""
        obs = self.normalizer(policy_view(obs))
        z_next = self.cell(obs, z).sample(key=key)
        return self.head(obs, z_next), z_next

    def sample_and_log_prob(
        self, obs: PyTree, z: PyTree, *, key: PRNGKeyArray
    ) -> tuple[Array, PyTree, LogProb]:
        """The draw of `sample` for the same key, with log ω, log μ and the entropy of μ.

        Reparameterised: gradients run through z' and a where their distributions are continuous.
        """
        z_key, action_key = jr.split(key)
        obs = self.normalizer(policy_view(obs))
        z_next, log_prob_z = self.cell(obs, z).sample_and_log_prob(key=z_key)
        actions = self.head(obs, z_next)
        action, log_prob_action = actions.sample_and_log_prob(key=action_key)
        return action, z_next, LogProb(log_prob_z, log_prob_action, actions.entropy())

    def mode(self, obs: PyTree, z: PyTree) -> tuple[Array, PyTree]:
        """The noise-free policy: mode of z', then mode of the action given it."""
        obs = self.normalizer(policy_view(obs))
        z_next = self.cell(obs, z).mode()
        return self.head(obs, z_next).mode(), z_next

    def log_prob(self, segment: Transition, state: Distribution | None = None) -> LogProb:
        """log π of each recorded step of one segment, time first.

        z' is as recorded where the cell draws z'; where the cell computes z', it is computed again
        from the segment's first z. Gradients follow the same paths. `state` is that of
        `state_distribution`, for whoever has it already.
        """
        obs = self._seen(segment)
        if state is None:
            log_prob_z, z_next = self._score_z(segment)
        else:
            z_next = segment.z_next
            log_prob_z = over_steps(lambda state, z: state.log_prob(z))(state, z_next)

        def one(obs, z_next, action):
            actions = self.head(obs, z_next)
            return actions.log_prob(action), actions.entropy()

        log_prob_action, entropy = over_steps(one)(obs, z_next, segment.action)
        return LogProb(log_prob_z, log_prob_action, entropy)

    def roll(self, segment: Transition, *, key: Key) -> Roll:
        """The internal states of a recorded segment, had this policy run it from its first z on.

        The noise is fresh; with None for a key there is none.
        """
        start = jax.tree.map(lambda x: x[0], segment.z)
        z0 = lax.stop_gradient(self.z0)
        return self.cell.roll(self._seen(segment), start, segment.first, z0, key=key)

    def act(
        self, segment: Transition, z_next: PyTree, *, key: Key
    ) -> tuple[Array, Float[Array, " T"]]:
        """Actions of the recorded steps, had z' been `z_next` (time first), and log μ(a | o, z').

        Drawn anew and reparameterised, as by `sample_and_log_prob`; or, with None for a key, modes.
        """
        keys = None if key is None else jr.split(key, segment.first.shape[0])

        def one(obs, z_next, key):
            return draw(self.head(obs, z_next), key)

        return over_steps(one)(self._seen(segment), z_next, keys)

    def distributions(self, segment: Transition) -> tuple[Distribution, Distribution]:
        """ω( . | o, z) and μ( . | o, z') of each recorded step, with the z' of `log_prob`."""
        z_next = self._score_z(segment)[1]
        return self.state_distribution(segment), over_steps(self.head)(self._seen(segment), z_next)

    def state_distribution(self, segment: Transition) -> Distribution:
        """ω( . | o, z) of each recorded step, time first."""
        return over_steps(self.cell)(self._seen(segment), segment.z)

    def log_prob_action(self, segment: Transition, z_next: PyTree) -> Float[Array, " T"]:
        """log μ(a | o, z') of each recorded action, had z' been `z_next` (time first)."""
        one = lambda obs, z_next, action: self.head(obs, z_next).log_prob(action)
        return over_steps(one)(self._seen(segment), z_next, segment.action)

    def _score_z(self, segment: Transition) -> tuple[Float[Array, " L"], PyTree]:
        """log ω of each recorded step, and the z' that the actions depend on."""
        z0 = lax.stop_gradient(self.z0)
        obs, first = self._seen(segment), segment.first
        return self.cell.log_prob(obs, segment.z, segment.z_next, first, z0)

    def _seen(self, segment: Transition) -> Array:
        return over_steps(self.normalizer)(policy_view(segment.obs))
