"""The policies that the questions compare: other noise on z', a learned z0, frozen parts.

Each of `with_law`, `learned_start` and `frozen` makes kernels from a configuration as
`spg.kernels.factory.make_kernel` does.
"""

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from spg.distributions import Distribution, Normal, TanhNormal, std_from_log
from spg.kernels.cells import Cell, Drawn, Location
from spg.kernels.factory import PolicyConfig, make_kernel
from spg.kernels.heads import FeatureHead, Head
from spg.kernels.kernel import Kernel
from spg.kernels.networks import FIXED
from spg.types import Spec

HEAD_GAIN = 4.0  # a frozen head has to tell internal states apart; that of PPO starts at 0.01


class Laplace(eqx.Module):
    """Independent Laplace distributions of mean `loc` and standard deviation `std` = √2 b."""

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return self.loc + self.std / math.sqrt(2) * jr.laplace(key, self.loc.shape)

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        x = self.sample(key=key)
        return x, self.log_prob(x)

    def mode(self) -> Float[Array, " n"]:
        return self.loc

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        b = self.std / math.sqrt(2)
        return -jnp.sum(jnp.abs(x - self.loc) / b + jnp.log(2 * b))

    def entropy(self) -> Float[Array, ""]:
        return jnp.sum(1 + jnp.log(math.sqrt(2) * self.std))


class Signs(eqx.Module):
    """Bernoulli on {-1, 1}^n: the signs of `loc` plus logistic noise of standard deviation `std`.

    Pr(1) = σ(π loc / (√3 std)).
    """

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    @property
    def _logits(self) -> Float[Array, " n"]:
        return math.pi / math.sqrt(3) * self.loc / self.std

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return jnp.where(jr.bernoulli(key, jax.nn.sigmoid(self._logits)), 1.0, -1.0)

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        x = self.sample(key=key)
        return x, self.log_prob(x)

    def mode(self) -> Float[Array, " n"]:
        return jnp.where(self.loc > 0, 1.0, -1.0)

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return jnp.sum(jax.nn.log_sigmoid(x * self._logits))

    def entropy(self) -> Float[Array, ""]:
        p, logits = jax.nn.sigmoid(self._logits), self._logits
        return -jnp.sum(p * jax.nn.log_sigmoid(logits) + (1 - p) * jax.nn.log_sigmoid(-logits))


class OneHot(eqx.Module):
    """Categorical on the unit vectors: the largest of `loc` plus Gumbel noise.

    Pr(e_i) ∝ exp(π loc_i / (√6 s)), where s, the root mean square of `std`, is the standard
    deviation of the noise.
    """

    loc: Float[Array, " n"]
    std: Float[Array, " n"]

    @property
    def _log_p(self) -> Float[Array, " n"]:
        spread = jnp.sqrt(jnp.mean(self.std**2))
        return jax.nn.log_softmax(math.pi / math.sqrt(6) * self.loc / spread)

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return jax.nn.one_hot(jr.categorical(key, self._log_p), self.loc.size)

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        x = self.sample(key=key)
        return x, self.log_prob(x)

    def mode(self) -> Float[Array, " n"]:
        return jax.nn.one_hot(jnp.argmax(self.loc), self.loc.size)

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return x @ self._log_p

    def entropy(self) -> Float[Array, ""]:
        return -jnp.exp(self._log_p) @ self._log_p


LAWS: dict[str, Callable[[Array, Array], Distribution]] = {
    "Normal": Normal,
    "bounded Normal": TanhNormal,
    "Laplace": Laplace,
    "Bernoulli": Signs,
    "Categorical": OneHot,
}


class Around(eqx.Module):
    """z' ~ law(location(o, z), σ), σ learned: `NormalAround` for any distribution of a real z'."""

    location: Location
    log_std: Float[Array, " n"]
    law: Callable[[Array, Array], Distribution] = eqx.field(static=True)

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Distribution:
        return self.law(self.location(obs, z), std_from_log(self.log_std))


def with_law(name: str, config: PolicyConfig, spec: Spec, *, key: PRNGKeyArray) -> Kernel:
    """S2PG whose z' is drawn from `LAWS[name]` around the location, and with the σ, of `config`."""
    kernel = make_kernel(config, spec, key=key)
    drawn: Any = kernel.cell
    around = drawn.distribution
    return eqx.tree_at(
        lambda k: k.cell, kernel, Drawn(Around(around.location, around.log_std, LAWS[name]))
    )


class Started(eqx.Module):
    """A distribution of z', behind a 1 that tells that an episode is under way."""

    z: Distribution

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " n"]:
        return _behind_one(self.z.sample(key=key))

    def sample_and_log_prob(
        self, *, key: PRNGKeyArray
    ) -> tuple[Float[Array, " n"], Float[Array, ""]]:
        z, log_prob = self.z.sample_and_log_prob(key=key)
        return _behind_one(z), log_prob

    def mode(self) -> Float[Array, " n"]:
        return _behind_one(self.z.mode())

    def log_prob(self, x: Float[Array, " n"]) -> Float[Array, ""]:
        return self.z.log_prob(x[1:])

    def entropy(self) -> Float[Array, ""]:
        return self.z.entropy()


class LearnedStart(eqx.Module):
    """z0 as a parameter of the cell: it stands in for z where z's first entry is 0."""

    distribution: Callable[[Array, PyTree], Distribution]
    z0: Float[Array, " n"]

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n1"]) -> Started:
        return Started(self.distribution(obs, jnp.where(z[0] > 0, z[1:], self.z0)))


class WithoutFirst(eqx.Module):
    """All entries but the first."""

    def __call__(self, z: Float[Array, " n1"]) -> Float[Array, " n"]:
        return z[1:]


def learned_start(config: PolicyConfig, spec: Spec, *, key: PRNGKeyArray) -> Kernel:
    """S2PG with a learned z0, which starts at zero."""
    kernel = make_kernel(config, spec, key=key)
    drawn: Any = kernel.cell
    cell = Drawn(LearnedStart(drawn.distribution, jnp.zeros_like(kernel.z0)))
    head = FeatureHead(kernel.head, WithoutFirst())
    return Kernel(cell, head, kernel.normalizer, jnp.zeros(kernel.z0.size + 1))


class FrozenCell(eqx.Module):
    """A cell that no optimiser moves."""

    cell: Cell = eqx.field(metadata=FIXED)

    def __call__(self, obs: Array, z: PyTree) -> Distribution:
        return self.cell(obs, z)

    def log_prob(
        self, obs: Array, z: PyTree, z_next: PyTree, first: Bool[Array, " L"], z0: PyTree
    ) -> tuple[Float[Array, " L"], PyTree]:
        return self.cell.log_prob(obs, z, z_next, first, z0)


class FrozenHead(eqx.Module):
    """A head that no optimiser moves."""

    head: Head = eqx.field(metadata=FIXED)

    def __call__(self, obs: Array, z_next: PyTree) -> Distribution:
        return self.head(obs, z_next)


def frozen(part: str, config: PolicyConfig, spec: Spec, *, key: PRNGKeyArray) -> Kernel:
    """The kernel of `config` with a head of gain 4, and its "cell", "head" or "nothing" frozen."""
    kernel = make_kernel(config, spec, key=key)
    last = lambda k: k.head.mlp.layers[-1].weight
    kernel = eqx.tree_at(last, kernel, HEAD_GAIN / 0.01 * last(kernel))
    if part == "cell":
        return eqx.tree_at(lambda k: k.cell, kernel, FrozenCell(kernel.cell))
    if part == "head":
        return eqx.tree_at(lambda k: k.head, kernel, FrozenHead(kernel.head))
    return kernel


def _behind_one(z: Float[Array, " n"]) -> Float[Array, " n1"]:
    return jnp.concatenate([jnp.ones(1, z.dtype), z])
