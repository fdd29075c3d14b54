"""Small networks of arrays alone, statistics of what they read, and what of them is trained."""

import dataclasses
from collections.abc import Callable
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

FIXED = {"fixed": True}  # `x: Array = eqx.field(metadata=FIXED)`: no optimiser moves x


def trainable(tree: PyTree) -> PyTree[bool]:
    """What an optimiser may move: a tree of booleans like `tree`, for `eqx.partition`.

    True at every array of floats that is not below a field of a module which the module's class
    declares as `FIXED`: statistics, z0, a known model.
    """
    fields = dataclasses.fields(tree) if isinstance(tree, eqx.Module) else ()
    fixed = {field.name for field in fields if "fixed" in field.metadata}

    def mark(path, child):
        if not path:
            return eqx.is_inexact_array(child)
        if isinstance(path[0], jax.tree_util.GetAttrKey) and path[0].name in fixed:
            return jax.tree.map(lambda _: False, child)
        return trainable(child)

    return jax.tree_util.tree_map_with_path(mark, tree, is_leaf=lambda x: x is not tree)


class MLP(eqx.Module):
    """Perceptron with tanh or relu between its layers, orthogonal weights and zero biases.

    `sizes` lists the widths, input and output included; `gain` scales the last layer, which a
    policy wants small (near-uniform actions at the start) and a critic wants at 1. With
    `layer_norm` what enters tanh or relu has mean 0 and variance 1 over the layer (Ba et al., 2016,
    without gains).
    """

    layers: list[eqx.nn.Linear]
    activation: Callable[[Array], Array] = eqx.field(static=True)
    layer_norm: bool = eqx.field(static=True)

    def __init__(
        self,
        sizes: list[int],
        *,
        gain: float,
        activation: Callable[[Array], Array] = jnp.tanh,
        layer_norm: bool = False,
        key: PRNGKeyArray,
    ):
        self.activation, self.layer_norm = activation, layer_norm
        gains = [2.0**0.5] * (len(sizes) - 2) + [gain]
        keys = jr.split(key, len(gains))
        self.layers = [
            _orthogonal(n, m, gain=g, key=k)
            for n, m, g, k in zip(sizes[:-1], sizes[1:], gains, keys, strict=True)
        ]

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " m"]:
        affine = lambda layer, x: x @ layer.weight.T + layer.bias  # W x + b, but faster under vmap
        for layer in self.layers[:-1]:
            x = affine(layer, x)
            if self.layer_norm:
                x = (x - x.mean()) * lax.rsqrt(x.var() + 1e-5)
            x = self.activation(x)
        return affine(self.layers[-1], x)


class Normalizer(eqx.Module):
    """Standardise by the running mean and variance of all data given to `update`.

    Constant to gradients. The statistics move between, never inside, policy updates: otherwise the
    first ratio of a surrogate would differ from 1. Before any data this is the identity.
    """

    mean: Float[Array, " n"] = eqx.field(metadata=FIXED)
    var: Float[Array, " n"] = eqx.field(metadata=FIXED)
    count: Float[Array, ""] = eqx.field(metadata=FIXED)

    def __init__(self, size: int):
        self.mean = jnp.zeros(size)
        self.var = jnp.ones(size)
        self.count = jnp.zeros(())

    def __call__(self, x: Float[Array, " n"]) -> Float[Array, " n"]:
        """(x - mean) / std, clipped at ±10."""
        mean, var = lax.stop_gradient((self.mean, self.var))
        return jnp.clip((x - mean) * lax.rsqrt(jnp.maximum(var, 1e-8)), -10.0, 10.0)

    def update(self, data: Float[Array, "*batch n"]) -> "Normalizer":
        """Merge the moments of `data` into these, Chan et al. (1979), eq. 2.1."""
        data = data.reshape(-1, data.shape[-1])
        size = data.shape[0]
        count = self.count + size
        delta = data.mean(0) - self.mean
        mean = self.mean + delta * size / count
        m2 = self.var * self.count + data.var(0) * size + delta**2 * self.count * size / count
        where = lambda n: (n.mean, n.var, n.count)
        return eqx.tree_at(where, self, (mean, m2 / count, count))

    def advance(
        self,
        data: Float[Array, "*batch n"],
        *,
        change: Callable[["Normalizer"], Float[Array, ""]],
        limit: Float[Array, ""],
    ) -> "Normalizer":
        """The way to `update(data)`, or the first of ½, ¼, ... of it whose `change` is in `limit`.

        None of it, if 1/1024 is still too much. The count goes the same way, so that data of which
        little was taken do not weigh against those to come.
        """
        goal = self.update(data)
        towards = lambda share: jax.tree.map(lambda a, b: a + share * (b - a), self, goal)

        def halve(state):
            share = state[0] / 2
            return share, change(towards(share))

        too_far = lambda state: (state[0] > 1e-3) & ~(state[1] <= limit)
        start = jnp.ones_like(self.count), change(goal)
        share, changed = lax.while_loop(too_far, halve, start)
        return towards(jnp.where(changed <= limit, share, 0.0))


class Flat(eqx.Module):
    """The leaves of an internal state as one real vector; real parts, then imaginary parts."""

    def __call__(self, z: PyTree) -> Float[Array, " f"]:
        parts = [
            part
            for x in jax.tree.leaves(z)
            for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))
        ]
        return jnp.concatenate([jnp.ravel(x) for x in parts])


class Unseen(eqx.Module):
    """Shows nothing of an internal state."""

    def __call__(self, z: PyTree) -> Float[Array, "0"]:
        return jnp.zeros(0)


class Identity(eqx.Module):
    """Leaves observations as they are, where they are integers or one-hot."""

    def __call__(self, x: Array) -> Array:
        return x

    def update(self, data: Array) -> "Identity":
        return self

    def advance(self, data: Array, *, change: Callable, limit: Array) -> "Identity":
        return self


def _orthogonal(n: int, m: int, *, gain: float, key: PRNGKeyArray) -> eqx.nn.Linear:
    weight_key, layer_key = jr.split(key)
    layer = eqx.nn.Linear(n, m, key=layer_key)
    weight = gain * orthogonal(m, n, key=weight_key)
    return eqx.tree_at(lambda l: (l.weight, l.bias), layer, (weight, jnp.zeros(m)))


@partial(jax.jit, static_argnums=(0, 1))  # else the loop is compiled in every call
def orthogonal(m: int, n: int, *, key: PRNGKeyArray) -> Float[Array, "{m} {n}"]:
    """A random matrix with orthonormal rows or, if m > n, columns, uniform among these.

    The polar factor of a normal matrix, by the iteration x <- (3 x - x xᵀ x) / 2 of Newton and
    Schulz: products alone. QR of LAPACK, two at once, can block for ever on a CPU (jaxlib 0.10).
    """
    x = jr.normal(key, (m, n))
    x = x / (1.2 * (m**0.5 + n**0.5))  # largest singular values are near √m + √n
    short = m <= n

    def step(_, x):
        return 1.5 * x - 0.5 * (x @ x.T @ x if short else x @ (x.T @ x))

    return lax.fori_loop(0, 60, step, x)
