"""Distributions of one action or one internal state; callers `vmap`.

`sample_and_log_prob` is reparameterised: its gradients run through the sample to the parameters,
and the log-probability comes from the noise itself, not from a sample that was rounded.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import core, lax
from jax.scipy import stats
from jaxtyping import Array, Float, Inexact, Int, PRNGKeyArray, PyTree

from spg.types import Scalar

LOG_STD_RANGE = (-20.0, 2.0)  # standard deviations from 2.1e-9 to 7.4

_LOG_2PI = math.log(2 * math.pi)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


@runtime_checkable
class Distribution(Protocol):
    """The distribution of a value x, which is an array, or for some internal states a pytree."""

    def sample(self, *, key: PRNGKeyArray) -> Any: ...
    def sample_and_log_prob(self, *, key: PRNGKeyArray) -> tuple[Any, Array]: ...
    def mode(self) -> Any: ...
    def log_prob(self, x: Any) -> Array: ...
    def entropy(self) -> Array: ...


@runtime_checkable
class Reparameterised(Protocol):
    """A distribution whose draws are made from standard normal noise."""

    def at(self, noise: Any) -> Any: ...


@runtime_checkable
class Comparable(Protocol):
    """A distribution that tells KL(self ‖ new), `new` of the same class, in nats."""

    def kl(self, new: Any) -> Array: ...


class Delta(eqx.Module):
    """The distribution of a computed value: all of its mass is at `loc`."""

    loc: PyTree

    def sample(self, *, key: PRNGKeyArray) -> PyTree:
        return self.loc

    def sample_and_log_prob(self, *, key: PRNGKeyArray) -> tuple[PyTree, Float[Array, ""]]:
        return self.loc, jnp.zeros(())

    def mode(self) -> PyTree:
        return self.loc

    def log_prob(self, x: PyTree) -> Float[Array, ""]:
        """Zero: a computed value is no choice of the policy and carries no score."""
        return jnp.zeros(())

    def entropy(self) -> Float[Array, ""]:
        return jnp.zeros(())

    def kl(self, new: "Delta") -> Float[Array, ""]:
        """Zero, as `log_prob` is."""
        return jnp.zeros(())


class Normal(eqx.Module):
    """Diagonal Gaussian N(loc, diag(std²)); log_prob and entropy are summed over components.

    With a complex `loc`, `std` is that of the real part and of the imaginary part each, and both
    count: log p(x) = Σ -½ |x - loc|²/std² - 2 (log std + ½ log 2π).
    """

    loc: Inexact[Array, " n"]
    std: Float[Array, " n"]

    def at(self, noise: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        """The draw that standard normal `noise` makes."""
        return self.loc + self.std * noise

    def sample(self, *, key: PRNGKeyArray) -> Inexact[Array, " n"]:
        return self.at(self._noise(key))

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Inexact[Array, " n"], Float[Array, ""]]:
        noise = self._noise(key)
        return self.at(noise), self._log_density(noise)

    def mode(self) -> Inexact[Array, " n"]:
        return self.loc

    def log_prob(self, x: Inexact[Array, " n"]) -> Float[Array, ""]:
        return self._log_density(self.noise(x))

    def noise(self, x: Inexact[Array, " n"]) -> Inexact[Array, " n"]:
        """The standard normal noise of which x is the draw."""
        return (x - self.loc) / self.std

    def near(self, *, share: Scalar, limit: Scalar, key: PRNGKeyArray) -> Inexact[Array, " n"]:
        """loc + std · clip(share · ε, ±limit) with ε standard normal."""
        return self.at(self._noise(key, lambda x: jnp.clip(share * x, -limit, limit)))

    def entropy(self) -> Float[Array, ""]:
        return self._parts * jnp.sum(jnp.log(self.std) + 0.5 * (_LOG_2PI + 1))

    def kl(self, new: "Normal") -> Float[Array, ""]:
        shift = (self.loc - new.loc) / new.std
        square = jnp.real(shift * jnp.conj(shift))
        log_ratio = jnp.log(self.std) - jnp.log(new.std)
        return 0.5 * jnp.sum(square + self._parts * ((self.std / new.std) ** 2 - 1 - 2 * log_ratio))

    @property
    def _parts(self) -> int:
        return 2 if jnp.iscomplexobj(self.loc) else 1

    def _noise(
        self, key: PRNGKeyArray, change: Callable[[Array], Array] = lambda x: x
    ) -> Inexact[Array, " n"]:
        noise = change(jr.normal(key, (self._parts, *self.loc.shape), self.std.dtype))
        return lax.complex(*noise) if self._parts == 2 else noise[0]

    def _log_density(self, residual: Inexact[Array, " n"]) -> Float[Array, ""]:
        square = jnp.real(residual * jnp.conj(residual))
        return -0.5 * jnp.sum(square) - self._parts * jnp.sum(jnp.log(self.std) + 0.5 * _LOG_2PI)


class TanhNormal(eqx.Module):
    """The distribution of tanh(u), u ~ N(loc, diag(std²)), on (-1, 1)^n; its `mode` is tanh(loc).

    log p(x) = log N(u; loc, std²) - Σ log(1 - tanh² u), Haarnoja et al. (2018), eq. 21, with
    log(1 - tanh² u) = 2 (log 2 - |u| - softplus(-2|u|)), which does not overflow.

    A rounded x tells u up to |u| = 9.0 in single precision and 19.1 in double; beyond, x is ±1.
    `sample_and_log_prob` takes both from the same u and is exact everywhere. `log_prob` of x = ±1
    is the logarithm of the mean density over the numbers that round to x, so that its score is the
    mean score of the u that may have been drawn. Numbers outside [-1, 1] count as ±1.
    """

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    def at(self, noise: Float[Array, " n"]) -> Float[Array, " n"]:
        """The draw that standard normal `noise` makes."""
        return _tanh(Normal(self.loc, self.std).at(noise))

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return _tanh(Normal(self.loc, self.std).sample(key=key))

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        u, log_prob = Normal(self.loc, self.std).sample_and_log_prob(key=key)
        return _tanh(u), log_prob - jnp.sum(_log_tanh_slope(u))

    def mode(self) -> Float[Array, " n"]:
        return _tanh(self.loc)

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        inside = jnp.abs(x) < 1
        u = jnp.arctanh(jnp.where(inside, x, 0.0))
        density = stats.norm.logpdf(u, self.loc, self.std) - _log_tanh_slope(u)
        width = float(jnp.finfo(x.dtype).eps) / 4  # what is nearer to 1 than to the number below it
        edge = 0.5 * math.log(2 / width)  # artanh(1 - width)
        mass = stats.norm.logsf(edge, jnp.sign(x) * self.loc, self.std)
        return jnp.sum(jnp.where(inside, density, mass - math.log(width)))

    def entropy(self) -> Float[Array, ""]:
        """H(u) + E Σ log(1 - tanh² u); the mean by Gauss-Hermite quadrature with 32 nodes."""
        u = self.loc + self.std * jnp.asarray(_NODES, self.loc.dtype)[:, None]
        weights = jnp.asarray(_WEIGHTS / _WEIGHTS.sum(), self.loc.dtype)
        return Normal(self.loc, self.std).entropy() + jnp.sum(weights @ _log_tanh_slope(u))

    def kl(self, new: "TanhNormal") -> Float[Array, ""]:
        """That of u: tanh is invertible."""
        return Normal(self.loc, self.std).kl(Normal(new.loc, new.std))


class Categorical(eqx.Module):
    """The distribution of an integer with unnormalised log-probabilities `logits`.

    The integers are 0..n-1, or those of `support` where given, each of which occurs once in it.
    """

    logits: Float[Array, " n"]
    support: Int[Array, " n"] | None = None

    def sample(self, *, key: PRNGKeyArray) -> Int[Array, ""]:
        return self._value(jr.categorical(key, self.logits))

    def sample_and_log_prob(self, *, key: PRNGKeyArray) -> tuple[Int[Array, ""], Float[Array, ""]]:
        i = jr.categorical(key, self.logits)
        return self._value(i), jax.nn.log_softmax(self.logits)[i]

    def mode(self) -> Int[Array, ""]:
        return self._value(jnp.argmax(self.logits))

    def log_prob(self, x: Int[Array, ""]) -> Float[Array, ""]:
        log_p = jax.nn.log_softmax(self.logits)
        if self.support is None:
            return log_p[x]
        return jnp.max(jnp.where(self.support == x, log_p, -jnp.inf))

    def entropy(self) -> Float[Array, ""]:
        log_p = jax.nn.log_softmax(self.logits)
        p = jnp.exp(log_p)
        return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0))  # 0 log 0 := 0, its gradient too

    def kl(self, new: "Categorical") -> Float[Array, ""]:
        """With the same `support`."""
        log_p, log_q = jax.nn.log_softmax(self.logits), jax.nn.log_softmax(new.logits)
        p = jnp.exp(log_p)
        return jnp.sum(p * jnp.where(p > 0, log_p - log_q, 0.0))

    def _value(self, i: Int[Array, ""]) -> Int[Array, ""]:
        return i if self.support is None else self.support[i]


def std_from_log(log_std: Float[Array, "..."]) -> Float[Array, "..."]:
    """exp(log_std), with `log_std` clipped to `LOG_STD_RANGE`, and the gradient as if it were not.

    A parameter that a step has thrown out of the range comes back by its own gradient,
    d std / d log_std = std.
    """
    return jnp.exp(_clip_log_std(log_std))


def log_from_std(std: Scalar, name: str = "std") -> Float[Array, ""]:
    """log(std), for `std_from_log` to invert.

    Raises ValueError, which calls the number `name`, if `std` is out of range and not traced.
    """
    low, high = map(math.exp, LOG_STD_RANGE)
    if not isinstance(std, core.Tracer) and not low <= std <= high:
        raise ValueError(f"{name} is {std}; it has to be from {low:.2g} to {high:.2g}")
    return jnp.log(std)


@jax.custom_jvp
def _clip_log_std(log_std: Array) -> Array:
    return jnp.clip(log_std, *LOG_STD_RANGE)


@_clip_log_std.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _clip_log_std(*primals), tangents[0]


def _tanh(u: Array) -> Array:
    """tanh(u), exact to its last digits: XLA's own is 1 from u = 8 on in single precision."""
    growth = jnp.expm1(-2 * jnp.clip(u, -20.0, 20.0))
    return -growth / (2 + growth)


def _log_tanh_slope(u: Array) -> Array:
    u = jnp.abs(u)
    return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
