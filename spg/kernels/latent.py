"""A latent state of the world, inferred step by step from what a policy sees: Lee et al. (2020).

The latent y = (y1, y2) has two layers, the second of which is the memory:

    p(y1_0) = N(0, I)             p(y2_0 | y1_0)
    p(y1_t | y2_{t-1}, a_{t-1})   p(y2_t | y1_t, y2_{t-1}, a_{t-1})
    p(x_t | y_t)                  p(r_t | y_t, a_t, y_{t+1})
    q(y1_0 | x_0)                 q(y1_t | x_t, y2_{t-1}, a_{t-1})

and y2 is inferred as it is predicted, q = p. (The paper calls y z, here the internal state.) The
distributions of the first step are those of the others with zeros for y2 and a: they share weights.
"""

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from spg.distributions import Normal
from spg.kernels.networks import FIXED, MLP
from spg.types import Scalar


class NormalMLP(eqx.Module):
    """N(m, s²) given any vectors, m and s by one MLP of all of them; s starts near `std`."""

    mlp: MLP
    start: float = eqx.field(static=True)  # what softplus makes s of, where the MLP gives 0

    def __init__(
        self, size: int, output_size: int, hidden: list[int], *, std: float, key: PRNGKeyArray
    ):
        sizes = [size, *hidden, 2 * output_size]
        self.mlp = MLP(sizes, gain=1.0, activation=jax.nn.leaky_relu, key=key)
        self.start = math.log(math.expm1(std))

    def __call__(self, *given: Float[Array, " _"]) -> Normal:
        mean, spread = jnp.split(self.mlp(jnp.concatenate(given)), 2)
        return Normal(mean, jax.nn.softplus(spread + self.start) + 1e-5)


class Inferred(NamedTuple):
    """A draw of the latents of a sequence, and what the first layer was drawn from."""

    latent: Float[Array, "T y"]  # (y1_t, y2_t) ~ q
    posterior: Normal  # q(y1_t | x_t, y2_{t-1}, a_{t-1}), [T, y1]
    prior: Normal  # p(y1_t | y2_{t-1}, a_{t-1})


class LatentModel(eqx.Module):
    """p and q of the module's first lines, of vectors; each distribution is an MLP of its own."""

    posterior: NormalMLP  # q(y1)
    prior: NormalMLP  # p(y1)
    memory: NormalMLP  # p(y2)
    decoder: MLP
    decoder_std: Float[Array, ""] = eqx.field(metadata=FIXED)
    reward: NormalMLP
    obs_size: int = eqx.field(static=True)
    sizes: tuple[int, int] = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        num_actions: int,
        sizes: tuple[int, int],
        hidden: list[int],
        *,
        decoder_std: Scalar,
        key: PRNGKeyArray,
    ):
        """`sizes` are those of y1 and y2.

        Their deviations start at a tenth of what the prior of y1_0 has: where they start as large,
        nothing that is seen reaches the decoder, and the bound rises slowly.
        """
        keys = iter(jr.split(key, 5))
        (first, second), a = sizes, num_actions
        self.obs_size, self.sizes = obs_size, sizes
        make = lambda size, output_size, std=0.1: NormalMLP(
            size, output_size, hidden, std=std, key=next(keys)
        )
        self.posterior = make(obs_size + second + a, first)
        self.prior = make(second + a, first)
        self.memory = make(first + second + a, second)
        self.reward = make(2 * (first + second) + a, 1, std=1.0)
        decoder = [first + second, *hidden, obs_size]
        self.decoder = MLP(decoder, gain=1.0, activation=jax.nn.leaky_relu, key=next(keys))
        self.decoder_std = jnp.asarray(decoder_std)

    def infer(
        self,
        x: Float[Array, "T x"],
        action: Float[Array, "T a"],
        first: Bool[Array, " T"],
        *,
        key: PRNGKeyArray,
    ) -> Inferred:
        """Draw the latents of a sequence from q, reparameterised.

        `action` is the one before each x. The latent begins anew where an episode does, `first`, so
        that nothing is told across its end; x_0 counts as `first`.
        """
        size, memory_size = self.sizes
        noise = jr.normal(key, (len(x), size + memory_size), x.dtype)
        standard = Normal(jnp.zeros(size, x.dtype), jnp.ones(size, x.dtype))

        def step(y2, inputs):
            x, a, first, noise = inputs
            y2, a = (jnp.where(first, 0.0, v) for v in (y2, a))
            prior = jax.tree.map(partial(jnp.where, first), standard, self.prior(y2, a))
            posterior = self.posterior(x, y2, a)
            y1 = posterior.at(noise[:size])
            y2 = self.memory(y1, y2, a).at(noise[size:])
            return y2, Inferred(jnp.concatenate([y1, y2]), posterior, prior)

        first = first.at[0].set(True)
        return lax.scan(step, jnp.zeros(memory_size, x.dtype), (x, action, first, noise))[1]
