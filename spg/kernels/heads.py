"""Distributions of the action given (o, z')."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from spg.distributions import (
    Categorical,
    Distribution,
    Normal,
    TanhNormal,
    log_from_std,
    std_from_log,
)
from spg.kernels.networks import FIXED, MLP, Flat
from spg.types import Scalar


@runtime_checkable
class Head(Protocol):
    """The distribution μ( . | o, z') of the action."""

    def __call__(self, obs: Array, z_next: PyTree) -> Distribution: ...


class CategoricalHead(eqx.Module):
    """Discrete actions: logits = MLP(o, z')."""

    mlp: MLP

    def __init__(self, sizes: list[int], *, gain: float = 0.01, key: PRNGKeyArray):
        self.mlp = MLP(sizes, gain=gain, key=key)

    def __call__(self, obs: Float[Array, " o"], z_next: PyTree) -> Categorical:
        return Categorical(self.mlp(jnp.concatenate([obs, Flat()(z_next)])))


class TeamHead(eqx.Module):
    """Discrete actions of I agents, independent given z': logits_i = MLP(what i sees, z').

    The joint action is Σ_i A^{I-1-i} a_i. An observation has an entry for each slot, and agent i
    sees those of its own; the agents share the network.
    """

    mlp: MLP
    sees: Bool[Array, "I o"]  # agent i sees the entry

    def __init__(
        self,
        slots: Int[np.ndarray, "O I"],
        sizes: list[int],
        *,
        gain: float = 0.01,
        key: PRNGKeyArray,
    ):
        """`sizes` end with the number of actions of one agent."""
        self.mlp = MLP(sizes, gain=gain, key=key)
        self.sees = jnp.array([np.isin(np.arange(slots.max() + 1), s) for s in slots.T])

    def __call__(self, obs: Float[Array, " o"], z_next: PyTree) -> Categorical:
        z_next = Flat()(z_next)
        own = jnp.where(self.sees, obs, 0.0)
        logits = jax.vmap(lambda o: self.mlp(jnp.concatenate([o, z_next])))(own)
        joint = jnp.zeros(1)
        for one in jax.nn.log_softmax(logits):
            joint = (joint[:, None] + one).reshape(-1)
        return Categorical(joint)


class NormalHead(eqx.Module):
    """Continuous actions: mean = MLP(o, z'), and a learned standard deviation that is constant.

    `std` is where it starts. Raises ValueError if that is out of the range of `std_from_log`.
    """

    mlp: MLP
    log_std: Float[Array, " a"]

    def __init__(self, sizes: list[int], *, std: Scalar, gain: float = 0.01, key: PRNGKeyArray):
        self.mlp = MLP(sizes, gain=gain, key=key)
        self.log_std = jnp.full(sizes[-1], log_from_std(std))

    def __call__(self, obs: Float[Array, " o"], z_next: PyTree) -> Normal:
        mean = self.mlp(jnp.concatenate([obs, Flat()(z_next)]))
        return Normal(mean, std_from_log(self.log_std))


class TanhNormalHead(eqx.Module):
    """Continuous actions in [-1, 1]: tanh(u), u ~ N(mean, std²), both by an MLP(o, z').

    The policy of SAC, Haarnoja et al. (2018), appendix C. `std` is where the deviation of u starts,
    but for what the MLP adds to its logarithm. With a gain of 1 the first policy acts differently
    in different places, which explores.
    """

    mlp: MLP
    log_std: Float[Array, " a"]

    def __init__(self, sizes: list[int], *, std: Scalar, gain: float = 1.0, key: PRNGKeyArray):
        wide = [*sizes[:-1], 2 * sizes[-1]]
        self.mlp = MLP(wide, gain=gain, activation=jax.nn.relu, key=key)
        self.log_std = jnp.full(sizes[-1], log_from_std(std))

    def __call__(self, obs: Float[Array, " o"], z_next: PyTree) -> TanhNormal:
        mean, change = jnp.split(self.mlp(jnp.concatenate([obs, Flat()(z_next)])), 2)
        return TanhNormal(mean, std_from_log(self.log_std + change))


class DeterministicHead(eqx.Module):
    """Continuous actions in [-1, 1]: f(o, z') = tanh MLP(o, z'), explored by N(f, std²).

    The policy of DDPG and TD3, Fujimoto et al. (2018). `std` is constant.
    """

    mlp: MLP
    log_std: Float[Array, " a"] = eqx.field(metadata=FIXED)

    def __init__(self, sizes: list[int], *, std: Scalar, gain: float = 1.0, key: PRNGKeyArray):
        self.mlp = MLP(sizes, gain=gain, activation=jax.nn.relu, key=key)
        self.log_std = jnp.full(sizes[-1], log_from_std(std))

    def __call__(self, obs: Float[Array, " o"], z_next: PyTree) -> Normal:
        mean = jnp.tanh(self.mlp(jnp.concatenate([obs, Flat()(z_next)])))
        return Normal(mean, std_from_log(self.log_std))


class FeatureHead(eqx.Module):
    """A head that sees a feature of z' in place of z'."""

    head: Head
    feature: Callable[[PyTree], Float[Array, " f"]]

    def __call__(self, obs: Array, z_next: PyTree) -> Distribution:
        return self.head(obs, self.feature(z_next))
