"""V(o, z): the value of what the critic observes together with the internal state."""

import equinox as eqx
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from spg.kernels.networks import MLP, Normalizer
from spg.types import critic_view


class Critic(eqx.Module):
    """V(o, z) = scale · MLP(o, z), with `scale` the running root mean square of the returns.

    The scale, like the observation statistics, is frozen while an update runs. It makes one
    learning rate serve rewards of any size.
    """

    mlp: MLP
    normalizer: Normalizer
    mean_square: Float[Array, ""]
    count: Float[Array, ""]

    def __init__(self, obs_size: int, z_size: int, hidden: list[int], *, key: PRNGKeyArray):
        self.mlp = MLP([obs_size + z_size, *hidden, 1], gain=1.0, key=key)
        self.normalizer = Normalizer(obs_size)
        self.mean_square = jnp.ones(())
        self.count = jnp.zeros(())

    @property
    def scale(self) -> Float[Array, ""]:
        return lax.stop_gradient(jnp.sqrt(self.mean_square + 1e-8))

    def __call__(self, obs: PyTree, z: Float[Array, " n"]) -> Float[Array, ""]:
        obs = self.normalizer(critic_view(obs))
        return self.scale * self.mlp(jnp.concatenate([obs, z]))[0]

    def update(self, obs: Float[Array, "*batch o"], returns: Float[Array, "*batch"]) -> "Critic":
        """Bring both statistics up to date with what was observed and the returns aimed at."""
        count = self.count + returns.size
        mean_square = self.mean_square + (jnp.mean(returns**2) - self.mean_square) * (
            returns.size / count
        )
        where = lambda c: (c.normalizer, c.mean_square, c.count)
        return eqx.tree_at(where, self, (self.normalizer.update(obs), mean_square, count))
