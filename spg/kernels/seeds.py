"""Networks that share a random seed, which is drawn once and then held for k steps."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.distributions import Categorical


class SeedState(NamedTuple):
    """The internal state of `Seed`."""

    step: Int[Array, ""]  # of the window; 0 where a new seed is drawn
    seed: Int[Array, ""]


class SeedDistribution(eqx.Module):
    """The distribution of z': a new seed where a window opens, else the seed that is held."""

    logits: Float[Array, " n"]
    z: SeedState
    k: int = eqx.field(static=True)

    def sample(self, *, key: PRNGKeyArray) -> SeedState:
        return self._hold(jr.categorical(key, self.logits))

    def sample_and_log_prob(self, *, key: PRNGKeyArray) -> tuple[SeedState, Float[Array, ""]]:
        z_next = self.sample(key=key)
        return z_next, self.log_prob(z_next)

    def mode(self) -> SeedState:
        return self._hold(jnp.argmax(self.logits))

    def log_prob(self, x: SeedState) -> Float[Array, ""]:
        """log w_c where a window opens, else 0."""
        return self._opens() * jax.nn.log_softmax(self.logits)[x.seed]

    def entropy(self) -> Float[Array, ""]:
        return self._opens() * Categorical(self.logits).entropy()

    def kl(self, new: "SeedDistribution") -> Float[Array, ""]:
        return self._opens() * Categorical(self.logits).kl(Categorical(new.logits))

    def _opens(self) -> Bool[Array, ""]:
        return self.z.step == 0

    def _hold(self, drawn: Int[Array, ""]) -> SeedState:
        seed = jnp.where(self._opens(), drawn, self.z.seed)
        return SeedState((self.z.step + 1) % self.k, seed.astype(self.z.seed.dtype))


class Seed(eqx.Module):
    """ω( . | o, z): one of n seeds is drawn for k steps, c ~ softmax(logits), for all agents.

    The head sees the seed through `SeedFeature`, and so is a mixture of n policies that share one
    network; a critic sees the step of the window too, through `SeedFeature` with k.
    """

    logits: Float[Array, " n"]
    k: int = eqx.field(static=True)

    def __call__(self, obs: Array, z: SeedState) -> SeedDistribution:
        return SeedDistribution(self.logits, z, self.k)


class SeedFeature(eqx.Module):
    """The seed as a one-hot vector; with `k` the step of the window over k stands before it."""

    num_seeds: int = eqx.field(static=True)
    k: int | None = eqx.field(static=True, default=None)

    def __call__(self, z: SeedState) -> Float[Array, " n"]:
        seed = jax.nn.one_hot(z.seed, self.num_seeds, dtype=float)
        if self.k is None:
            return seed
        return jnp.concatenate([(z.step / self.k)[None].astype(seed.dtype), seed])


def seed_start() -> SeedState:
    """The internal state that opens an episode."""
    return SeedState(jnp.zeros((), int), jnp.zeros((), int))
