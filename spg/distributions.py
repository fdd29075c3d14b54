"""Laws of one action or one internal state: sample, mode, log_prob, entropy, replay.

`replay(x)` is what makes one code path serve every method: a law with noise returns the recorded
`x`, a computed value returns its own location, so that gradients run back through time exactly as
far as the law lets them. Every law is of one value; callers `vmap`.
"""

import math
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

_LOG_2PI = math.log(2 * math.pi)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(32)


@runtime_checkable
class Distribution(Protocol):
    def sample(self, *, key: PRNGKeyArray) -> Array: ...
    def mode(self) -> Array: ...
    def log_prob(self, x: Array) -> Array: ...
    def entropy(self) -> Array: ...
    def replay(self, x: Array) -> Array: ...


class Delta(eqx.Module):
    """Law of a computed value. Replaying it recomputes the value, so gradients flow through."""

    loc: Num[Array, "..."]

    def sample(self, *, key: PRNGKeyArray) -> Num[Array, "..."]:
        return self.loc

    def mode(self) -> Num[Array, "..."]:
        return self.loc

    def log_prob(self, x: Num[Array, "..."]) -> Float[Array, ""]:
        """Zero: a computed value is no choice of the policy and carries no score."""
        return jnp.zeros(())

    def entropy(self) -> Float[Array, ""]:
        return jnp.zeros(())

    def replay(self, x: Num[Array, "..."]) -> Num[Array, "..."]:
        return self.loc


class Normal(eqx.Module):
    """Diagonal Gaussian N(loc, diag(std²)); log_prob and entropy are summed over components."""

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return self.loc + self.std * jr.normal(key, self.loc.shape, self.loc.dtype)

    def mode(self) -> Float[Array, " n"]:
        return self.loc

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        residual = (x - self.loc) / self.std
        return -0.5 * jnp.sum(residual**2) - jnp.sum(jnp.log(self.std) + 0.5 * _LOG_2PI)

    def entropy(self) -> Float[Array, ""]:
        return jnp.sum(jnp.log(self.std) + 0.5 * (_LOG_2PI + 1))

    def replay(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        return x


class TanhNormal(eqx.Module):
    """Law of tanh(u), u ~ N(loc, diag(std²)), on (-1, 1)^n; the mode reported is tanh(loc).

    log p(x) = log N(u; loc, std²) - Σ log(1 - tanh² u), Haarnoja et al. (2018), eq. 21, with
    log(1 - tanh² u) = 2 (log 2 - u - softplus(-2u)), which does not overflow.
    """

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return jnp.tanh(Normal(self.loc, self.std).sample(key=key))

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

    def replay(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        return x


class Categorical(eqx.Module):
    """Law of an integer with unnormalised log-probabilities `logits`.

    The integers are 0..n-1, or those of `support` where given, each of which occurs once in it.
    """

    logits: Float[Array, " n"]
    support: Int[Array, " n"] | None = None

    def sample(self, *, key: PRNGKeyArray) -> Int[Array, ""]:
        return self._value(jr.categorical(key, self.logits))

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

    def replay(self, x: Int[Array, ""]) -> Int[Array, ""]:
        return x

    def _value(self, i: Int[Array, ""]) -> Int[Array, ""]:
        return i if self.support is None else self.support[i]


def _log_tanh_slope(u: Array) -> Array:
    return 2 * (math.log(2) - u - jax.nn.softplus(-2 * u))
