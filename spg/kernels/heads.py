"""Laws of the action given (o, z'), and the value of (o, z)."""

from typing import Protocol, runtime_checkable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from spg.distributions import Categorical, Law, Normal
from spg.kernels.networks import MLP
from spg.types import Scalar


@runtime_checkable
class Head(Protocol):
    """The law μ( . | o, z') of the action."""

    def __call__(self, obs: Array, z_next: Array) -> Law: ...


class CategoricalHead(eqx.Module):
    """Discrete actions: logits = MLP(o, z')."""

    mlp: MLP

    def __init__(self, sizes: list[int], *, key: PRNGKeyArray):
        self.mlp = MLP(sizes, gain=0.01, key=key)

    def __call__(self, obs: Float[Array, " o"], z_next: Float[Array, " n"]) -> Categorical:
        return Categorical(self.mlp(jnp.concatenate([obs, z_next])))


class NormalHead(eqx.Module):
    """Continuous actions: mean = MLP(o, z'), a learned std that depends on neither."""

    mlp: MLP
    log_std: Float[Array, " a"]

    def __init__(self, sizes: list[int], *, std: Scalar, key: PRNGKeyArray):
        self.mlp = MLP(sizes, gain=0.01, key=key)
        self.log_std = jnp.full(sizes[-1], jnp.log(std))

    def __call__(self, obs: Float[Array, " o"], z_next: Float[Array, " n"]) -> Normal:
        mean = self.mlp(jnp.concatenate([obs, z_next]))
        return Normal(mean, jnp.exp(jnp.clip(self.log_std, -20.0, 2.0)))
