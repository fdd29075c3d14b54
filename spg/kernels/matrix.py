"""Linear memories whose state is a matrix: values are written under keys and read by queries.

z holds H matrices S of d_k x d_v, one after the other and each row by row. A unit is
S' = A(o) S + U(o), linear in S. The head sees what queries of the observation read, Sᵀ q(o).
"""

import math
from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from spg.distributions import Distribution
from spg.kernels.cells import INSIDE, Location
from spg.kernels.heads import Head
from spg.kernels.linear import Linear, LinearUnit, write_scale
from spg.scans import Method, linear_scan, of_backend, over_steps

Shape = tuple[int, int, int]  # H, d_k, d_v
WIDE = 8  # entries that fill the registers of a CPU; fewer are 3 times as fast by products


class MatrixUnit(Location):
    """S' = A(o) S + U(o) for each head, with a decay a in A, and a key k and a value v in U.

    The decay is a scalar, a = exp(-softplus(w o + b)), as in Mamba-2, Dao & Gu (2024). Keys longer
    than 1 are cut to 1: A never expands, and U grows no faster than the observation.
    """

    inputs: eqx.nn.Linear  # o to decays, other gates, keys and values
    shape: Shape = eqx.field(static=True)
    method: Method = eqx.field(static=True)
    num_gates: ClassVar[int] = 1  # of a head, that of the decay first

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        *,
        num_heads: int = 4,
        key_size: int = 4,
        min_decay: float = 0.4,
        max_decay: float = 0.999,
        method: Method = "auto",
        key: PRNGKeyArray,
    ):
        """`z_size` is H d_k d_v. The heads' time constants -1/log a at o = 0 start log-evenly
        spread between those of the two given decays, the slowest first.

        Raises ValueError for decays outside (0, 1), and unless H d_k divides `z_size`.
        """
        INSIDE.check("min_decay", min_decay)
        INSIDE.check("max_decay", max_decay)
        self.shape, self.method = matrix_shape(z_size, num_heads, key_size), method
        size = num_heads * (self.num_gates + key_size + self.shape[2])
        bias, start = jnp.zeros(size), _softplus_rates(num_heads, min_decay, max_decay)
        if self.num_gates:
            bias = bias.at[:num_heads].set(start)
        linear = eqx.nn.Linear(obs_size, size, key=key)
        self.inputs = eqx.tree_at(lambda linear: linear.bias, linear, bias)

    @abstractmethod
    def affine(self, obs: Float[Array, " o"]) -> tuple[Array, Float[Array, "H K V"]]:
        """A, a scalar `[H]` or a matrix `[H, d_k, d_k]` for each head, and U."""

    def parts(self, obs: Float[Array, " o"]) -> tuple[Array, Array, Array, Array]:
        """log a `[H]`, logits of further gates, keys `[H, d_k]` and values `[H, d_v]`."""
        heads, size, values = self.shape
        widths = heads, heads * (self.num_gates - 1), heads * size
        decay, gate, k, v = jnp.split(self.inputs(obs), np.cumsum(widths))
        return -jax.nn.softplus(decay), gate, cut(k.reshape(heads, size)), v.reshape(heads, values)

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        decay, u = self.affine(obs)
        return (_times(decay, z.reshape(self.shape)) + u).reshape(-1)

    def unroll(
        self,
        obs: Float[Array, "L o"],
        z: Float[Array, " n"],
        first: Bool[Array, " L"],
        z0: Float[Array, " n"],
    ) -> Float[Array, "L n"]:
        decay, u = over_steps(self.affine)(obs)
        opens = lambda x: first.reshape(-1, *(1,) * (x.ndim - 1))
        u = jnp.where(opens(u), u + _times(decay, z0.reshape(self.shape)), u)
        decay = jnp.where(opens(decay), 0.0, decay)
        scan = partial(linear_scan, method=self.method)
        if decay.ndim == u.ndim:  # matrices: each column of S is a recurrence of its own
            scan = jax.vmap(jax.vmap(scan, (None, -1, -1), -1), (1, 1, 0), 1)
        return scan(decay, u, z.reshape(self.shape)).reshape(len(first), -1)


class LinearAttention(MatrixUnit):
    """S' = a S + √(1 - a²) k vᵀ: linear attention, Katharopoulos et al. (2020), with decays.

    Theirs, eq. 18, has a = 1. A decay a head and no normaliser are those of RetNet, Sun et al.
    (2023); √(1 - a²) is that of `Linear`.
    """

    @property
    def write(self) -> Float[Array, " n"]:
        _, size, values = self.shape
        log_decay = self.parts(jnp.zeros(self.inputs.in_features))[0]
        return jnp.repeat(write_scale(log_decay) / math.sqrt(size), size * values)

    def affine(self, obs: Float[Array, " o"]) -> tuple[Float[Array, " H"], Float[Array, "H K V"]]:
        log_decay, _, k, v = self.parts(obs)
        return jnp.exp(log_decay), outer(write_scale(log_decay)[:, None] * k, v)


class Retention(LinearAttention):
    """Linear attention whose decays are learned and the same for all inputs, Sun et al. (2023).

    Where a decay depends on an observation that is rare, and large for that when standardised, a
    step of the optimiser there moves a slow matrix by many times the noise on it.
    """

    rate: Float[Array, " H"]  # its softplus is -log a
    num_gates: ClassVar[int] = 0

    def __init__(
        self,
        *args: Any,
        num_heads: int = 4,
        min_decay: float = 0.4,
        max_decay: float = 0.999,
        **kwargs: Any,
    ):
        """As `MatrixUnit`."""
        decays: Any = {"min_decay": min_decay, "max_decay": max_decay}
        MatrixUnit.__init__(self, *args, num_heads=num_heads, **decays, **kwargs)
        self.rate = _softplus_rates(num_heads, min_decay, max_decay)

    def parts(self, obs: Float[Array, " o"]) -> tuple[Array, Array, Array, Array]:
        heads, size, values = self.shape
        k, v = jnp.split(self.inputs(obs), [heads * size])
        log_decay = -jax.nn.softplus(self.rate)
        return log_decay, jnp.zeros(0), cut(k.reshape(heads, size)), v.reshape(heads, values)


class DeltaRule(MatrixUnit):
    """S' = a (I - β k kᵀ) S + β k vᵀ, β = σ(w o + b): the gated delta rule, Yang et al. (2024).

    What the key reads, kᵀ S, moves to v by a share β: all the way if β = |k| = 1. With a = 1 that
    is Schlag et al. (2021).
    """

    num_gates: ClassVar[int] = 2

    @property
    def write(self) -> Float[Array, " n"]:
        beta = jax.nn.sigmoid(jnp.asarray(self.inputs.bias)[self.shape[0] : 2 * self.shape[0]])
        return jnp.repeat(beta / self.shape[1] ** 0.5, self.shape[1] * self.shape[2])

    def affine(self, obs: Float[Array, " o"]) -> tuple[Array, Float[Array, "H K V"]]:
        log_decay, gate, k, v = self.parts(obs)
        write = jax.nn.sigmoid(gate)[:, None] * k
        erase = jnp.eye(k.shape[1]) - outer(write, k)
        return jnp.exp(log_decay)[:, None, None] * erase, outer(write, v)

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        log_decay, gate, k, v = self.parts(obs)
        state = jnp.exp(log_decay)[:, None, None] * z.reshape(self.shape)
        error = v - read(state, k)
        return (state + outer(jax.nn.sigmoid(gate)[:, None] * k, error)).reshape(-1)

    def unroll(
        self,
        obs: Float[Array, "L o"],
        z: Float[Array, " n"],
        first: Bool[Array, " L"],
        z0: Float[Array, " n"],
    ) -> Float[Array, "L n"]:
        """In sequence step by step, without matrices A, on a CPU 10 times faster than with them."""
        if of_backend(self.method) == "sequential":
            return Location.unroll(self, obs, z, first, z0)
        return super().unroll(obs, z, first, z0)


class Hybrid(LinearUnit):
    """Linear units beside retention: z = (z_1, S), a half of the entries for each.

    Sums tell how things have changed, matrices what belongs together. Dong et al. (2024) set heads
    of a state space model and of attention beside each other in this way.
    """

    linear: Linear
    attention: Retention
    method: Method = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        *,
        num_heads: int = 4,
        key_size: int = 4,
        method: Method = "auto",
        key: PRNGKeyArray,
    ):
        """Raises ValueError unless 2 H d_k divides `z_size`."""
        shape = matrix_shape(z_size, num_heads, key_size, share=2)
        linear_key, attention_key = jr.split(key)
        size = math.prod(shape)
        self.linear = Linear(obs_size, size, key=linear_key)
        make: Any = Retention  # pyright takes its __init__ for that of a dataclass
        self.attention = make(
            obs_size, size, num_heads=num_heads, key_size=key_size, key=attention_key
        )
        self.method = method

    @property
    def write(self) -> Float[Array, " n"]:
        return jnp.concatenate([self.linear.write, self.attention.write])

    def affine(self, obs: Float[Array, " o"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        (decay, u), (of_heads, update) = self.linear.affine(obs), self.attention.affine(obs)
        decay = jnp.concatenate([decay, jnp.repeat(of_heads, update[0].size)])
        return decay, jnp.concatenate([u, update.ravel()])


class QueryHead(eqx.Module):
    """A head that sees what queries of the observation read of z', Sᵀ q(o) of each head of S.

    Entries of z' before those of S it sees as they are.
    """

    head: Head
    queries: eqx.nn.Linear
    shape: Shape = eqx.field(static=True)

    def __init__(self, head: Head, obs_size: int, shape: Shape, *, key: PRNGKeyArray):
        self.head, self.shape = head, shape
        self.queries = eqx.nn.Linear(obs_size, shape[0] * shape[1], key=key)

    def __call__(self, obs: Float[Array, " o"], z_next: Float[Array, " n"]) -> Distribution:
        q = cut(self.queries(obs).reshape(self.shape[:2]))
        plain, state = jnp.split(z_next, [z_next.size - math.prod(self.shape)])
        return self.head(obs, jnp.concatenate([plain, read(state.reshape(self.shape), q).ravel()]))


def _softplus_rates(num_heads: int, min_decay: float, max_decay: float) -> Float[Array, " H"]:
    """Numbers whose softplus is -log a, for decays with time constants log-evenly spread."""
    low, high = (math.log(-math.log(x)) for x in (max_decay, min_decay))
    return jnp.log(jnp.expm1(jnp.exp(jnp.linspace(low, high, num_heads))))


def matrix_shape(z_size: int, num_heads: int, key_size: int, *, share: int = 1) -> Shape:
    """(H, d_k, d_v) with share H d_k d_v = z_size. Raises ValueError where no whole d_v does it."""
    rows = share * num_heads * key_size
    if z_size % rows:
        twice = f"{share} x " if share > 1 else ""
        raise ValueError(
            f"z_size {z_size} is not {twice}num_heads {num_heads} x key_size {key_size} x the size "
            f"of a value; a multiple of {rows} would do"
        )
    return num_heads, key_size, z_size // rows


def cut(x: Float[Array, "H K"]) -> Float[Array, "H K"]:
    """x / max(1, |x|) of each row."""
    heads, size = x.shape
    if size >= WIDE:
        square = jnp.sum(x**2, -1, keepdims=True)
    else:
        same = np.kron(np.eye(heads), np.ones((size, size)))
        square = _dot((x**2).ravel(), same).reshape(x.shape)
    return x * lax.rsqrt(jnp.maximum(1.0, square))


def read(state: Float[Array, "H K V"], key: Float[Array, "H K"]) -> Float[Array, "H V"]:
    """Sᵀ k of each head."""
    heads, size, values = state.shape
    if values >= WIDE:
        return jnp.sum(key[..., None] * state, -2)
    of_key, of_value = _copies(size, values)
    return _dot(_dot(key, of_key) * state.reshape(heads, -1), of_value.T)


def outer(k: Float[Array, "H K"], v: Float[Array, "H V"]) -> Float[Array, "H K V"]:
    """k vᵀ of each head."""
    (heads, size), values = k.shape, v.shape[1]
    if values >= WIDE:
        return k[:, :, None] * v[:, None]
    of_key, of_value = _copies(size, values)
    return (_dot(k, of_key) * _dot(v, of_value)).reshape(heads, size, values)


def _copies(size: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """[K, K V] and [V, K V] of zeros and ones, which copy a key and a value to the entries of S."""
    of_key = np.kron(np.eye(size), np.ones((1, values)))
    return of_key, np.kron(np.ones((1, size)), np.eye(values))


def _dot(x: Array, choice: np.ndarray) -> Array:
    """x @ choice without rounding what is chosen."""
    return jnp.matmul(x, jnp.asarray(choice, x.dtype), precision="highest")


def _times(decay: Array, state: Array) -> Array:
    """A S, for scalars and for matrices A."""
    return decay[..., None, None] * state if decay.ndim < 3 else decay @ state
