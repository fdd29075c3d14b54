"""The distribution ω( . | o, z) of the next internal state: where z' lies, computed or drawn.

A *location* maps (o, z) to a point z': `GRU`, `Window`, `Empty`, the units of `linear.py` and
`stack.py`, or any other subclass of `Location`. A *cell* makes z' of a location: `Computed` takes
the point itself (BPTT, window, memoryless), `Drawn` draws z' from a distribution (for S2PG
`NormalAround` a location). z is an array or any pytree of arrays.
"""

from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Inexact, PRNGKeyArray, PyTree

from spg.distributions import Delta, Distribution, Normal, std_from_log
from spg.limits import Range
from spg.scans import over_steps

INSIDE = Range(0, 1, open="both")  # where decays are
Key = PRNGKeyArray | None  # None: modes in place of draws


class Roll(NamedTuple):
    """The internal states of a recorded segment under another policy than the one that drew it."""

    z: PyTree  # [L, ...] before each step
    z_next: PyTree  # [L, ...] after it, for the head: gradients run as far back as the cell's do
    chosen: PyTree  # [L, ...] the same, for Q: no gradient runs through a z' that is computed
    log_prob: Float[Array, " L"]  # log ω(z' | o, z)


@runtime_checkable
class Cell(Protocol):
    """The distribution ω( . | o, z) of the next internal state."""

    def __call__(self, obs: Array, z: PyTree) -> Distribution: ...

    def log_prob(
        self, obs: Array, z: PyTree, z_next: PyTree, first: Bool[Array, " L"], z0: PyTree
    ) -> tuple[Float[Array, " L"], PyTree]:
        """log ω(z' | o, z) of each recorded step, and the z' that the actions depend on.

        obs, z and z_next are of the L steps of one segment, time first; an episode opens where
        `first`, with the internal state `z0`.
        """
        ...

    def roll(
        self, obs: Array, z: PyTree, first: Bool[Array, " L"], z0: PyTree, *, key: Key
    ) -> Roll:
        """Run a segment again from its first z on, with fresh noise, or without any (key None).

        `z` is of that first step alone.
        """
        ...


class Location(eqx.Module):
    """A point z' for each (o, z).

    A subclass defines `__call__`, perhaps a faster `unroll`, and `write` where entries of z differ.
    """

    @abstractmethod
    def __call__(self, obs: Array, z: PyTree) -> PyTree:
        """z' = location(o, z)."""

    @property
    def write(self) -> Float[Array, "..."]:
        """The weight with which a new input enters each entry of z', before any gate has opened.

        The noise of S2PG starts in proportion, so that slow units remember their inputs as clearly
        as fast ones.
        """
        return jnp.ones(())

    def unroll(self, obs: Array, z: PyTree, first: Bool[Array, " L"], z0: PyTree) -> PyTree:
        """z'_t = location(o_t, z_t) from the first z on, z_{t+1} = z'_t, or z0 where `first`."""

        def step(z, inputs):
            obs, first = inputs
            z = self(obs, jax.tree.map(lambda a, b: jnp.where(first, a, b), z0, z))
            return z, z

        return lax.scan(step, z, (obs, first))[1]


class GRU(Location):
    """Gated recurrent unit of Cho et al. (2014) on (o, z), with z' = k ⊙ z + (1 - k) ⊙ candidate.

    The bias of the gate k spreads the time constants of the units at the start, after Tallec &
    Ollivier (2018); their logarithms are uniform here, as those of `Linear`. Matrices are [in, out]
    and multiply from the right: on a CPU their gradients take up to a ninth of the time, where o is
    short, of those of `eqx.nn.GRUCell`, which computes the same.
    """

    inputs: Float[Array, "o 3n"]  # reset gate, k, candidate
    recurrent: Float[Array, "n 3n"]
    bias: Float[Array, " 3n"]
    recurrent_bias: Float[Array, " n"]  # of what the reset gate lets through

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        *,
        min_decay: float = 0.4,
        max_decay: float = 0.999,
        key: PRNGKeyArray,
    ):
        """k starts log-uniform in its time constant -1/log k between the two given decays."""
        *keys, decay_key = jr.split(key, 5)
        n, bound = z_size, z_size**-0.5
        shapes = (obs_size, 3 * n), (n, 3 * n), (3 * n,), (n,)
        self.inputs, self.recurrent, bias, self.recurrent_bias = (
            jr.uniform(k, shape, minval=-bound, maxval=bound)
            for k, shape in zip(keys, shapes, strict=True)
        )
        log_decay = -jnp.exp(log_rates(n, min_decay, max_decay, key=decay_key))
        gate = log_decay - jnp.log(-jnp.expm1(log_decay))  # the logit of k
        self.bias = bias.at[n : 2 * n].set(gate)

    @property
    def write(self) -> Float[Array, " n"]:
        _, gate, _ = jnp.split(self.bias, 3)
        return jax.nn.sigmoid(-gate)

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        reset, k, candidate = jnp.split(obs @ self.inputs + self.bias, 3)
        of_reset, of_k, of_candidate = jnp.split(z @ self.recurrent, 3)
        share = jax.nn.sigmoid(reset + of_reset)
        new = jnp.tanh(candidate + share * (of_candidate + self.recurrent_bias))
        return new + jax.nn.sigmoid(k + of_k) * (z - new)


class Window(Location):
    """The last N observations, oldest first: z' = (z without its oldest, o). No parameters."""

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        return jnp.concatenate([z, obs])[obs.size :]


class Empty(Location):
    """No memory: z is, and stays, a vector of size 0."""

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " 0"]) -> Float[Array, " 0"]:
        return z

    def unroll(
        self, obs: Array, z: Float[Array, " 0"], first: Bool[Array, " L"], z0: Float[Array, " 0"]
    ) -> Float[Array, "L 0"]:
        return jnp.zeros((obs.shape[0], 0), z.dtype)


class Computed(eqx.Module):
    """z' = location(o, z): a recorded segment is computed again, and gradients flow through it."""

    location: Location

    def __call__(self, obs: Array, z: PyTree) -> Delta:
        return Delta(self.location(obs, z))

    def log_prob(
        self, obs: Array, z: PyTree, z_next: PyTree, first: Bool[Array, " L"], z0: PyTree
    ) -> tuple[Float[Array, " L"], PyTree]:
        start = jax.tree.map(lambda x: x[0], z)
        return jnp.zeros(first.shape[0]), self.location.unroll(obs, start, first, z0)

    def roll(
        self, obs: Array, z: PyTree, first: Bool[Array, " L"], z0: PyTree, *, key: Key
    ) -> Roll:
        z_next = self.location.unroll(obs, z, first, z0)
        before = jax.tree.map(lambda z, x: jnp.concatenate([z[None], x[:-1]]), z, z_next)
        held = lax.stop_gradient(z_next)
        return Roll(_opened(first, before, z0), z_next, held, jnp.zeros(first.shape[0]))


class Drawn(eqx.Module):
    """z' ~ distribution(o, z): each recorded step stands alone.

    No gradient runs from step to step, so a segment is scored in parallel and its length does not
    matter (Al-Hafez et al., 2024, lemma 2.1).
    """

    distribution: Callable[[Array, PyTree], Distribution]

    def __call__(self, obs: Array, z: PyTree) -> Distribution:
        return self.distribution(obs, z)

    def log_prob(
        self, obs: Array, z: PyTree, z_next: PyTree, first: Bool[Array, " L"], z0: PyTree
    ) -> tuple[Float[Array, " L"], PyTree]:
        one = lambda obs, z, z_next: self.distribution(obs, z).log_prob(z_next)
        return over_steps(one)(obs, z, z_next), z_next

    def roll(
        self, obs: Array, z: PyTree, first: Bool[Array, " L"], z0: PyTree, *, key: Key
    ) -> Roll:
        """The gradients are those of single steps, as everywhere where z' is drawn."""
        keys = None if key is None else jr.split(key, first.shape[0])
        here = lax.stop_gradient(self)

        def step(z, inputs):
            obs, first, key = inputs
            z = jax.tree.map(lambda a, b: jnp.where(first, a, b), z0, z)
            return draw(here(obs, z), key)[0], z

        if first.shape[0] == 1:  # a loop of one step costs more than the step
            z = _opened(first, jax.tree.map(lambda x: x[None], z), z0)
        else:
            z = lax.scan(step, z, (obs, first, keys))[1]
        z_next, log_prob = over_steps(lambda o, z, k: draw(self(o, z), k))(obs, z, keys)
        return Roll(z, z_next, z_next, log_prob)


def draw(distribution: Distribution, key: Key) -> tuple[Any, Float[Array, ""]]:
    """A reparameterised draw and its log-probability; or, without a key, the mode and 0."""
    if key is None:
        return distribution.mode(), jnp.zeros(())
    return distribution.sample_and_log_prob(key=key)


def _opened(first: Bool[Array, " L"], z: PyTree, z0: PyTree) -> PyTree:
    """z `[L, ...]`, with z0 where an episode opens."""
    return jax.vmap(lambda f, z: jax.tree.map(partial(jnp.where, f), z0, z))(first, z)


def log_rates(
    size: int, min_decay: float, max_decay: float, *, key: PRNGKeyArray
) -> Float[Array, " {size}"]:
    """log(-log λ), uniform between those of the two given decays.

    The time constants -1/log λ are log-uniform then. Raises ValueError for decays outside (0, 1).
    """
    INSIDE.check("min_decay", min_decay)
    INSIDE.check("max_decay", max_decay)
    low, high = jnp.log(-jnp.log(max_decay)), jnp.log(-jnp.log(min_decay))
    return jr.uniform(key, (size,), minval=low, maxval=high)


class NormalAround(eqx.Module):
    """z' ~ N(location(o, z), diag(σ²)) with σ learned, the distribution of S2PG.

    z is real or complex; σ is the standard deviation of the real and of the imaginary part each. It
    should start in proportion to `location.write`.
    """

    location: Location
    log_std: Float[Array, " n"]

    def __call__(self, obs: Float[Array, " o"], z: Inexact[Array, " n"]) -> Normal:
        return Normal(self.location(obs, z), std_from_log(self.log_std))
