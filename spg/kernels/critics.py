"""V(o, z) and Q(o, a, z'): values of what the critic observes with the internal state."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from spg.kernels.networks import FIXED, MLP, Flat, Identity, Normalizer
from spg.types import critic_view


class Critic(eqx.Module):
    """V(o, z) = scale · MLP(o, z), with `scale` the running root mean square of the returns.

    The scale makes one learning rate serve rewards of any size. It is constant to gradients, as the
    statistics of observations are. A new scale leaves V as it was. New statistics do not, so they
    move by `spg.estimators.observe_critic`.
    """

    mlp: MLP
    normalizer: Normalizer
    mean_square: Float[Array, ""] = eqx.field(metadata=FIXED)
    count: Float[Array, ""] = eqx.field(metadata=FIXED)
    feature: Callable[[PyTree], Array]  # of z, which the network sees in place of z

    def __init__(
        self,
        obs_size: int,
        feature_size: int,
        hidden: list[int],
        *,
        feature: Callable[[PyTree], Array] | None = None,
        key: PRNGKeyArray,
    ):
        self.feature = Flat() if feature is None else feature
        self.mlp = MLP([obs_size + feature_size, *hidden, 1], gain=1.0, key=key)
        self.normalizer = Normalizer(obs_size)
        self.mean_square = jnp.ones(())
        self.count = jnp.zeros(())

    @property
    def scale(self) -> Float[Array, ""]:
        return lax.stop_gradient(jnp.sqrt(self.mean_square + 1e-8))

    def __call__(self, obs: PyTree, z: PyTree) -> Float[Array, ""]:
        obs = self.normalizer(critic_view(obs))
        return self.scale * self.mlp(jnp.concatenate([obs, self.feature(z)]))[0]

    def rescale(self, returns: Float[Array, "*batch"]) -> "Critic":
        """The same V at a scale that knows these returns, van Hasselt et al. (2016), eq. 7."""
        count = self.count + returns.size
        change = (jnp.mean(returns**2) - self.mean_square) * returns.size / count
        where = lambda c: (c.mean_square, c.count)
        new = eqx.tree_at(where, self, (self.mean_square + change, count))
        last = lambda c: (c.mlp.layers[-1].weight, c.mlp.layers[-1].bias)
        return eqx.tree_at(last, new, tuple(x * self.scale / new.scale for x in last(self)))


class QCritic(eqx.Module):
    """Q_i(o, a, z') of an ensemble: what follows when (a, z') is chosen where the critic sees o.

    Al-Hafez et al. (2024) have Q(s, z, a, z'). If o is the full state (a privileged critic), Q does
    not depend on z: it is r(s, a) + γ E V(s', z'). So z is left out.
    """

    mlps: MLP  # the ensemble's, stacked
    normalizer: Normalizer | Identity
    feature: Callable[[PyTree], Array]  # of z', which the networks see in place of z'

    def __init__(
        self,
        obs_size: int,
        num_actions: int,
        feature_size: int,
        hidden: list[int],
        *,
        num_critics: int = 2,
        layer_norm: bool = True,
        normalize: bool = True,
        feature: Callable[[PyTree], Array] | None = None,
        key: PRNGKeyArray,
    ):
        """`feature_size` is that of feature(z'). With `normalize` o is standardised."""
        sizes = [obs_size + num_actions + feature_size, *hidden, 1]
        make = lambda key: MLP(
            sizes, gain=1.0, activation=jax.nn.relu, layer_norm=layer_norm, key=key
        )
        self.mlps = jax.vmap(make)(jr.split(key, num_critics))
        self.normalizer = Normalizer(obs_size) if normalize else Identity()
        self.feature = Flat() if feature is None else feature

    def __call__(
        self, obs: PyTree, action: Float[Array, " a"], z_next: PyTree
    ) -> Float[Array, " n"]:
        seen = self.normalizer(critic_view(obs)), action, self.feature(z_next)
        x = jnp.concatenate(seen)
        return jax.vmap(lambda mlp: mlp(x)[0])(self.mlps)
