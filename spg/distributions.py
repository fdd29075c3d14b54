"""Distributions of one action or one internal state; callers `vmap`."""

import math
from typing import Any, Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Inexact, Int, PRNGKeyArray, PyTree

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


class Normal(eqx.Module):
    """Diagonal Gaussian N(loc, diag(std²)); log_prob and entropy are summed over components."""

    loc: Inexact[Array, " n"]
    std: Float[Array, " n"]

    def sample(self, *, key: PRNGKeyArray) -> Inexact[Array, " n"]:
        noise = jr.normal(key, (self._parts, *self.loc.shape), self.std.dtype)
        noise = lax.complex(*noise) if self._parts == 2 else noise[0]
        return self.loc + self.std * noise

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Inexact[Array, " n"], Float[Array, ""]]:
        x = self.sample(key=key)
        return x, self.log_prob(x)

    def mode(self) -> Inexact[Array, " n"]:
        return self.loc

    def log_prob(self, x: Inexact[Array, " n"]) -> Float[Array, ""]:
        residual = (x - self.loc) / self.std
        square = residual.real**2 + residual.imag**2 if self._parts == 2 else residual**2
        volume = self._parts * jnp.sum(jnp.log(self.std) + 0.5 * _LOG_2PI)
        return -0.5 * jnp.sum(square) - volume

    def entropy(self) -> Float[Array, ""]:
        return self._parts * jnp.sum(jnp.log(self.std) + 0.5 * (_LOG_2PI + 1))

    @property
    def _parts(self) -> int:
        return 2 if jnp.iscomplexobj(self.loc) else 1


def std_from_log(log_std: Float[Array, " n"]) -> Float[Array, " n"]:
    return jnp.exp(log_std + lax.stop_gradient(jnp.clip(log_std, -20.0, 2.0) - log_std))


class TanhNormal(eqx.Module):
    """Law of tanh(u), u ~ N(loc, diag(std²)), on (-1, 1)^n; the mode reported is tanh(loc).

    log p(x) = log N(u; loc, std²) - Σ log(1 - tanh² u), Haarnoja et al. (2018), eq. 21, with
    log(1 - tanh² u) = 2 (log 2 - u - softplus(-2u)), which does not overflow.
    """

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return jnp.tanh(Normal(self.loc, self.std).sample(key=key))

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        u, log_prob = Normal(self.loc, self.std).sample_and_log_prob(key=key)
        return jnp.tanh(u), log_prob - jnp.sum(_log_tanh_slope(u))

    def mode(self) -> Float[Array, " n"]:
        return jnp.tanh(self.loc)

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        limit = 1 - jnp.finfo(x.dtype).eps
        u = jnp.arctanh(jnp.clip(x, -limit, limit))
        return Normal(self.loc, self.std).log_prob(u) - jnp.sum(_log_tanh_slope(u))

    def entropy(self) -> Float[Array, ""]:
        """H(u) + E Σ log(1 - tanh² u); the mean by Gauss-Hermite quadrature with 32 nodes."""
        u = self.loc + self.std * jnp.asarray(_NODES, self.loc.dtype)[:, None]
        weights = jnp.asarray(_WEIGHTS / _WEIGHTS.sum(), self.loc.dtype)
        return Normal(self.loc, self.std).entropy() + jnp.sum(weights @ _log_tanh_slope(u))


class Categorical(eqx.Module):
    """Law of an integer with unnormalised log-probabilities `logits`.

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

    def _value(self, i: Int[Array, ""]) -> Int[Array, ""]:
        return i if self.support is None else self.support[i]


def _log_tanh_slope(u: Array) -> Array:
    return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
