"""Finite-state controllers: the internal state is an integer, the I-state g → h."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from spg.distributions import Categorical
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Normalizer


class TableCell(eqx.Module):
    """ω(h | g, o) ∝ exp(logits[g, o, h]).

    Observations are one-hot. The position of the largest entry is the same after a running
    normaliser: where o occurs in the data, its entry is positive and every other is not.
    """

    logits: Float[Array, "G O G"]

    def __call__(self, obs: Float[Array, " O"], z: Int[Array, ""]) -> Categorical:
        return Categorical(self.logits[z, jnp.argmax(obs)])

    def replay(
        self,
        obs: Float[Array, "L O"],
        z: Int[Array, " L"],
        z_next: Int[Array, " L"],
        first: Bool[Array, " L"],
        z0: Int[Array, ""],
    ) -> tuple[Float[Array, " L"], Int[Array, " L"]]:
        return jax.vmap(lambda o, z, z_next: self(o, z).log_prob(z_next))(obs, z, z_next), z_next


class TableHead(eqx.Module):
    """μ(a | h, o) ∝ exp(logits[h, o, a]), observations one-hot."""

    logits: Float[Array, "G O A"]

    def __call__(self, obs: Float[Array, " O"], z_next: Int[Array, ""]) -> Categorical:
        return Categorical(self.logits[z_next, jnp.argmax(obs)])


def finite_kernel(cell_logits: Float[Array, "G O G"], head_logits: Float[Array, "G O A"]) -> Kernel:
    """The finite-state controller with these tables, which opens every episode in I-state 0."""
    normalizer = Normalizer(cell_logits.shape[1])
    return Kernel(TableCell(cell_logits), TableHead(head_logits), normalizer, jnp.zeros((), int))
