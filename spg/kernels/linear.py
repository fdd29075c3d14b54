"""Linear recurrent units as locations of z': a segment is computed by one scan.

Each unit is z' = A(o) ⊙ z + u(o) with a diagonal A: linear in z, and perhaps nonlinear in o. The
head, which sees (o, z'), reads the unit out.
"""

import math
from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Bool, Float, Num, PRNGKeyArray

from spg.kernels.cells import INSIDE, Location, log_rates
from spg.scans import Method, linear_scan, over_steps


def write_scale(log_decay: Float[Array, " n"]) -> Float[Array, " n"]:
    """√(1 - a²) of log a <= 0, also where a is near 1; its slope is finite where log a is 0."""
    return jnp.sqrt(-jnp.expm1(2 * jnp.minimum(log_decay, -1e-30)))


class LinearUnit(Location):
    """z' = A(o) ⊙ z + u(o), with z real or complex.

    `unroll` is one `linear_scan` by `method`, with A = 0 where an episode opens.
    """

    method: eqx.AbstractVar[Method]

    @abstractmethod
    def affine(self, obs: Float[Array, " o"]) -> tuple[Num[Array, " m"], Num[Array, " m"]]:
        """A(o) and u(o), real or complex."""

    def __call__(self, obs: Float[Array, " o"], z: Num[Array, " m"]) -> Num[Array, " m"]:
        decay, u = self.affine(obs)
        return decay * z + u

    def unroll(
        self,
        obs: Float[Array, "L o"],
        z: Num[Array, " m"],
        first: Bool[Array, " L"],
        z0: Num[Array, " m"],
    ) -> Num[Array, "L m"]:
        decay, u = over_steps(self.affine)(obs)
        u = jnp.where(first[:, None], u + decay * z0, u)
        decay = jnp.where(first[:, None], 0.0, decay)
        return linear_scan(decay, u, z, method=self.method)


class Linear(LinearUnit):
    """Diagonal linear recurrent unit z' = λ ⊙ z + √(1 - λ²) ⊙ (B o + c), 0 < λ < 1.

    λ = exp(-exp(ν)), Orvieto et al. (2023), eq. 7, real.
    """

    nu: Float[Array, " n"]
    inputs: eqx.nn.Linear
    method: Method = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        *,
        min_decay: float = 0.4,
        max_decay: float = 0.999,
        method: Method = "auto",
        key: PRNGKeyArray,
    ):
        """λ starts log-uniform in its time constant -1/log λ between the two given decays."""
        input_key, decay_key = jr.split(key)
        self.nu = log_rates(z_size, min_decay, max_decay, key=decay_key)
        self.inputs = _inputs(obs_size, z_size, key=input_key)
        self.method = method

    @property
    def decay(self) -> Float[Array, " n"]:
        return jnp.exp(-jnp.exp(self.nu))

    @property
    def write(self) -> Float[Array, " n"]:
        return write_scale(-jnp.exp(self.nu))

    def affine(self, obs: Float[Array, " o"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        return self.decay, self.write * self.inputs(obs)


class LRU(LinearUnit):
    """Linear recurrent unit of Orvieto et al. (2023), sections 3.3 and 3.4.

        z' = λ ⊙ z + exp(γ) ⊙ (B o + c),   λ = exp(-exp(ν) + iθ)

    with complex z, λ and B, stable since |λ| < 1; γ, learned, starts at log √(1 - |λ|²).
    """

    nu: Float[Array, " m"]
    theta: Float[Array, " m"]
    gamma: Float[Array, " m"]
    inputs: eqx.nn.Linear
    method: Method = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        *,
        min_decay: float = 0.4,
        max_decay: float = 0.99,
        max_phase: float = 0.1 * math.pi,
        method: Method = "auto",
        key: PRNGKeyArray,
    ):
        """λ starts uniform in the ring of these radii, θ up to `max_phase` (theirs for Path-X)."""
        INSIDE.check("min_decay", min_decay)
        INSIDE.check("max_decay", max_decay)
        size = _half(z_size)
        input_key, decay_key, phase_key = jr.split(key, 3)
        square = jr.uniform(decay_key, (size,), minval=min_decay**2, maxval=max_decay**2)
        self.nu = jnp.log(-0.5 * jnp.log(square))
        self.theta = jr.uniform(phase_key, (size,), maxval=max_phase)
        self.gamma = 0.5 * jnp.log1p(-square)
        self.inputs = _inputs(obs_size, z_size, key=input_key)
        self.method = method

    @property
    def write(self) -> Float[Array, " m"]:
        return jnp.exp(self.gamma)

    def affine(self, obs: Float[Array, " o"]) -> tuple[Num[Array, " m"], Num[Array, " m"]]:
        u = jnp.tile(self.write, 2) * self.inputs(obs)
        return _polar(jnp.exp(-jnp.exp(self.nu)), self.theta), _to_complex(u)


class Gated(LinearUnit):
    """Real-gated linear recurrent unit, De et al. (2024, Griffin), eqs 1 to 4.

        r = σ(W_r o + b_r),   i = σ(W_i o + b_i),   a = exp(-8 softplus(Λ) r)
        z' = a ⊙ z + √(1 - a²) ⊙ i ⊙ (B o + c)

    The decay depends on the input, not on z, so that z' is still linear in z.
    """

    rate: Float[Array, " n"]  # Λ
    inputs: eqx.nn.Linear  # W_r, W_i and B
    method: Method = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        *,
        min_decay: float = 0.4,
        max_decay: float = 0.999,
        method: Method = "auto",
        key: PRNGKeyArray,
    ):
        """Half open, r = 1/2, the decays start as those of `Linear`."""
        input_key, decay_key = jr.split(key)
        rates = jnp.exp(log_rates(z_size, min_decay, max_decay, key=decay_key)) / 4
        self.rate = jnp.log(jnp.expm1(rates))
        self.inputs = _inputs(obs_size, 3 * z_size, key=input_key)
        self.method = method

    @property
    def write(self) -> Float[Array, " n"]:
        return write_scale(-4 * jax.nn.softplus(self.rate))  # at r = ½

    def affine(self, obs: Float[Array, " o"]) -> tuple[Float[Array, " n"], Float[Array, " n"]]:
        forget, keep, value = jnp.split(self.inputs(obs), 3)
        log_decay = -8 * jax.nn.softplus(self.rate) * jax.nn.sigmoid(forget)
        scale = write_scale(log_decay) * jax.nn.sigmoid(keep)
        return jnp.exp(log_decay), scale * value


class LeakyFilter(LinearUnit):
    """Leaky belief filter with learned parts (Deep ALF), after Zhao et al. (2026), section 6.2.

        z' = (1 - δ) exp(iφ(a)) ⊙ z + δ U log E'y,   δ = σ(leak),   E = softmax(logits)

    where o = (y, a): a one-hot observation of the world, then the one-hot action taken before it.
    With the eigenvectors U⁻¹ and eigenvalues exp(iφ(a)) of permutations Π(a), z is U times the
    leaky filter w_k = (1 - δ) Π(a_k) w_{k-1} + δ log E'y_k. The paper does not print its
    parametrisation. U starts as the Fourier transform, which diagonalises cyclic shifts.
    """

    logits: Float[Array, "y m"]  # of P(y | s), normalised over y
    phases: Float[Array, "a m"]
    leak: Float[Array, ""]
    basis: Float[Array, "2 m m"]  # U, real and imaginary
    method: Method = eqx.field(static=True)

    def __init__(
        self,
        obs_size: int,
        z_size: int,
        num_actions: int,
        *,
        leak: float = 0.1,
        method: Method = "auto",
        key: PRNGKeyArray,
    ):
        """Phases start uniform in the circle, emission logits standard normal, δ at `leak`."""
        INSIDE.check("leak", leak)
        size = _half(z_size)
        emission_key, phase_key = jr.split(key)
        self.logits = jr.normal(emission_key, (obs_size - num_actions, size))
        self.phases = jr.uniform(phase_key, (num_actions, size), maxval=2 * math.pi)
        self.leak = jnp.log(jnp.asarray(leak) / (1 - leak))
        transform = jnp.fft.fft(jnp.eye(size)) / size**0.5
        self.basis = jnp.stack([transform.real, transform.imag])
        self.method = method

    @property
    def write(self) -> Float[Array, " m"]:
        return jnp.broadcast_to(jax.nn.sigmoid(self.leak), self.phases.shape[1:])

    def affine(self, obs: Float[Array, " o"]) -> tuple[Num[Array, " m"], Num[Array, " m"]]:
        seen, action = jnp.split(obs, [len(self.logits)])
        leak = jax.nn.sigmoid(self.leak)
        evidence = seen @ jax.nn.log_softmax(self.logits, axis=0)
        real, imaginary = (leak * evidence @ part.T for part in self.basis)
        return _polar(1 - leak, action @ self.phases), lax.complex(real, imaginary)


def _inputs(obs_size: int, size: int, *, key: PRNGKeyArray) -> eqx.nn.Linear:
    """B o + c with c = 0 at the start.

    A constant would add up in slow units, to √((1 + λ)/(1 - λ)) c in `Linear`, far beyond what any
    one input leaves there.
    """
    linear = eqx.nn.Linear(obs_size, size, key=key)
    return eqx.tree_at(lambda linear: linear.bias, linear, jnp.zeros(size))


def _half(z_size: int) -> int:
    if z_size % 2:
        raise ValueError(
            f"z_size {z_size} is odd; a complex unit needs an even one, two reals a number"
        )
    return z_size // 2


def _polar(modulus: Array, angle: Array) -> Array:
    return lax.complex(modulus * jnp.cos(angle), modulus * jnp.sin(angle))


def _to_complex(z: Array) -> Array:
    return lax.complex(*jnp.split(z, 2, axis=-1))
