"""Variance of one trajectory's gradient estimate: BPTT, and S2PG by score and by path.

Al-Hafez et al. (2024), theorems 3.4 and 3.5, measured on a policy for which every constant of the
bounds is known: affine Gaussian maps in one dimension,

    z' = Z z + w o + b,    a ~ N(K z' + c, σ_a²),    θ = (w, b, c) = (1, 0, 0),

with z' computed (BPTT), or drawn with standard deviation σ (S2PG). Observations are uniform on
[-1, 1] and the reward (1 + sin a) / 2 is bounded by 1, so no environment is needed, and Q(a, z')
has a closed form. An estimate is of one whole episode, by one of

    BPTT, S2PG       J(τ) Σ_t ∇ log π               as in the theorems
    S2PG, baseline   Σ_t γ^t (G_t - V_t) ∇ log π    G_t the return from t on, V exact
    S2PG, mixed      the same with δ_t by path      `mixed_surrogate`, V exact and λ = 1
    S2PG, exact A    Σ_t γ^t (Q_t - V_t) ∇ log π    theorem 2.2, with a baseline
    S2PG, path       Σ_t γ^t ∇ Q_t(a, z')           a and z' reparameterised, given o_t and z_t
"""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spg.distributions import Normal
from spg.estimators.bounds import Constants, bptt_variance_bound, s2pg_variance_bound
from spg.estimators.mixed import mixed_surrogate, mixed_terms
from spg.estimators.returns import returns_to_go
from spg.estimators.score import score_estimate
from spg.kernels.cells import Computed, Drawn, Location, NormalAround
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity
from spg.types import Scalar, Transition

GAIN, ACTION_STD, THETA = 1.0, 0.5, (1.0, 0.0, 0.0)  # K, σ_a, θ
METHODS = {
    "BPTT": "C1", "S2PG": "C0", "S2PG, baseline": "C4", "S2PG, mixed": "C5",
    "S2PG, exact A": "C2", "S2PG, path": "C3",
}  # fmt: skip
LENGTHS, STDS = (2, 4, 8, 16, 32, 64), (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
LENGTH, STD = 16, 0.5  # of the sweep over the other


class Row(NamedTuple):
    sweep: str  # "length" or "noise"
    method: str
    decay: float  # Z = |dz'/dz|
    num_steps: int  # T
    state_std: float  # σ; BPTT has none
    variance: float  # trace of the covariance of one trajectory's estimate, mean over the seeds
    std_error: float  # of this mean
    gradient: float  # ‖∇J‖, exact
    bound: float  # of theorem 3.4 or 3.5; nan where neither speaks of the estimate


class Affine(Location):
    """z' = Z z + w o + b."""

    decay: Float[Array, ""]
    weight: Float[Array, " 1"]
    bias: Float[Array, " 1"]

    def __call__(self, obs: Float[Array, " 1"], z: Float[Array, " 1"]) -> Float[Array, " 1"]:
        return self.decay * z + self.weight * obs + self.bias


class AffineHead(eqx.Module):
    """a ~ N(K z' + c, σ_a²)."""

    bias: Float[Array, " 1"]

    def __call__(self, obs: Float[Array, " 1"], z_next: Float[Array, " 1"]) -> Normal:
        return Normal(GAIN * z_next + self.bias, jnp.full(1, ACTION_STD))


def value(
    theta: Float[Array, " 3"],
    decay: Scalar,
    state_std: Scalar,
    z: Float[Array, ""],
    left: int | Int[Array, ""],
    *,
    num_steps: int,
    gamma: float = 1.0,
) -> Float[Array, ""]:
    """V(z) = E Σ_{1≤j≤left} γ^{j-1} (1 + sin a_j) / 2, exact; V(0) with `num_steps` left is J.

    E exp(i a_j) = exp(i (k_j z + c) - σ_a²/2) F_j,    k_j = K Z^j
    F_j = Π_{i<j} exp(i k_i b - k_i² σ²/2) sin(k_i w) / (k_i w)
    """
    w, b, c = theta
    k = GAIN * decay ** jnp.arange(num_steps + 1.0)
    forgotten = jnp.cumprod(jnp.exp(1j * k * b - (k * state_std) ** 2 / 2) * _sinc(k * w))
    wave = jnp.exp(1j * (k[1:] * z + c) - ACTION_STD**2 / 2) * forgotten[:-1]
    ahead = jnp.arange(num_steps)
    return jnp.sum(jnp.where(ahead < left, gamma**ahead * (1 + wave.imag) / 2, 0.0))


def estimate(
    method: str,
    num_steps: int,
    decay: Float[Array, ""],
    state_std: Float[Array, ""],
    key: PRNGKeyArray,
    *,
    gamma: float = 1.0,
) -> Float[Array, " 3"]:
    """The gradient with respect to (w, b, c) that one trajectory gives."""
    location = Affine(decay, jnp.ones(1), jnp.zeros(1))
    drawn = Drawn(NormalAround(location, jnp.full(1, jnp.log(state_std))))
    cell = Computed(location) if method == "BPTT" else drawn
    kernel = Kernel(cell, AffineHead(jnp.zeros(1)), Identity(), jnp.zeros(1))
    obs_key, key = jr.split(key)
    obs = jr.uniform(obs_key, (num_steps, 1), minval=-1, maxval=1)
    keys, discount = jr.split(key, num_steps), gamma ** jnp.arange(num_steps)

    def step(z, inputs):
        action, z_next = kernel.sample(inputs[0], z, key=inputs[1])
        return z_next, (z, action, z_next)

    z, action, z_next = lax.scan(step, kernel.z0, (obs, keys))[1]
    reward = (1 + jnp.sin(action[:, 0])) / 2

    exact = partial(value, jnp.array(THETA), decay, state_std, num_steps=num_steps, gamma=gamma)
    t = jnp.arange(num_steps)

    def q_value(t, action, z_next):
        return (1 + jnp.sin(action[0])) / 2 + gamma * exact(z_next[0], num_steps - 1 - t)

    def by_path(kernel):
        draw = jax.vmap(lambda obs, z, key: kernel.sample_and_log_prob(obs, z, key=key)[:2])
        return discount @ jax.vmap(q_value)(t, *draw(obs, z, keys))

    first, last = (jnp.zeros(num_steps, bool).at[t].set(True) for t in (0, -1))
    traj = Transition(obs, z, action, z_next, reward, first, last, jnp.zeros_like(last), obs)
    baseline = jax.vmap(exact)(z[:, 0], num_steps - t)
    to_go = returns_to_go(reward, jnp.zeros(num_steps), last, traj.truncated, gamma=gamma)
    advantage = jax.vmap(q_value)(t, action, z_next) - baseline

    def mixed(moved):
        ahead = lambda t, z: discount[t] * exact(z[0], num_steps - 1 - t)
        parts = discount * advantage, discount * (to_go - baseline - advantage)
        old = mixed_terms(kernel, ahead, traj._replace(final_obs=t), *parts, gamma=gamma)
        state: Any = moved.state_distribution(traj)
        new = moved.log_prob(traj, state)
        return mixed_surrogate(traj, new, state, old, clip=0.2).objective.sum()

    if method in ("S2PG, path", "S2PG, mixed"):
        g = eqx.filter_grad(mixed if method == "S2PG, mixed" else by_path)(kernel)
    else:
        weight = {
            "S2PG, exact A": discount * advantage,
            "S2PG, baseline": discount * (to_go - baseline),
        }.get(method, jnp.full(num_steps, reward @ discount))
        segment_length = num_steps if method == "BPTT" else 1
        g = score_estimate(kernel, traj, weight, segment_length=segment_length)
    parts: Any = g
    at = parts.cell.location if method == "BPTT" else parts.cell.distribution.location
    return jnp.concatenate([at.weight, at.bias, parts.head.bias])


def exact_gradient(
    method: str, num_steps: int, decay: Scalar, state_std: Scalar, *, gamma: float = 1.0
) -> Float[Array, " 3"]:
    """∇J with respect to (w, b, c); of the noise-free memory for BPTT."""
    std = jnp.zeros(()) if method == "BPTT" else state_std
    total = partial(value, num_steps=num_steps, gamma=gamma)
    return jax.grad(total)(jnp.array(THETA), decay, std, jnp.zeros(()), num_steps)


def bound(method: str, decay: float, num_steps: int, state_std: float) -> float:
    """Theorem 3.4 or 3.5 with the constants of this policy; |o| ≤ 1 gives H = ‖(o, 1)‖ ≤ √2.

    The theorems let a depend on z, here it depends on z'. With z' drawn the action's score is
    that of c alone. With z' computed the map is a = K (Z z + w o + b) + c.
    """
    if method not in ("BPTT", "S2PG"):
        return float("nan")
    drawn, h = method == "S2PG", 2**0.5
    constants = Constants(
        reward=1.0,
        action_by_params=1.0 if drawn else (1 + (GAIN * h) ** 2) ** 0.5,
        z_by_params=h,
        action_by_z=GAIN * decay,
        z_by_z=decay,
        action_precision=ACTION_STD**-2,
        z_precision=state_std**-2,
    )
    theorem = s2pg_variance_bound if drawn else bptt_variance_bound
    return theorem(constants, gamma=1.0, num_steps=num_steps)


def measure(
    seeds: range,
    *,
    decays: tuple[float, ...] = (0.5, 0.9, 1.1),
    lengths: tuple[int, ...] = LENGTHS,
    stds: tuple[float, ...] = STDS,
    num_trajectories: int = 2048,
) -> list[Row]:
    """Both sweeps, each point once for each seed."""
    keys = jax.vmap(jr.key)(jnp.asarray(seeds))
    points = [("length", n, STD) for n in lengths] + [("noise", LENGTH, s) for s in stds]
    rows = []
    for method in METHODS:
        sample = jax.jit(partial(_variances, method, num_trajectories), static_argnums=0)
        slope = jax.jit(partial(exact_gradient, method), static_argnums=0)
        for (sweep, num_steps, std), decay in product(points, decays):
            at = num_steps, jnp.float32(decay), jnp.float32(std)
            found = np.asarray(sample(*at, keys), float)
            error = found.std(ddof=1) / len(found) ** 0.5 if len(found) > 1 else np.nan
            norm, limit = jnp.linalg.norm(slope(*at)), bound(method, decay, num_steps, std)
            numbers = map(float, (found.mean(), error, norm, limit))
            rows.append(Row._make((sweep, method, decay, num_steps, std, *numbers)))
    return rows


def _variances(
    method: str, count: int, num_steps: int, decay: Array, std: Array, keys: PRNGKeyArray
) -> Float[Array, " seeds"]:
    def one(key):
        g = jax.vmap(partial(estimate, method, num_steps, decay, std))(jr.split(key, count))
        return g.var(0, ddof=1).sum()

    return lax.map(one, keys)


def _sinc(x: Array) -> Array:
    """sin(x) / x, with a gradient near 0 too."""
    near = jnp.abs(x) < 1e-2
    far = jnp.where(near, 1.0, x)
    return jnp.where(near, 1 - x**2 / 6, jnp.sin(far) / far)


def draw(rows: list[Row], path: Path) -> None:
    decays = sorted({row.decay for row in rows})
    size = (3.4 * len(decays), 6.4)
    figure, axes = plt.subplots(2, len(decays), figsize=size, sharey="row", squeeze=False)
    for (i, sweep), (j, decay) in product(enumerate(("length", "noise")), enumerate(decays)):
        ax, name = axes[i, j], ("num_steps", "state_std")[i]
        for method, colour in METHODS.items():
            points = [r for r in rows if (r.sweep, r.method, r.decay) == (sweep, method, decay)]
            x = [getattr(r, name) for r in points]
            y = [r.variance for r in points]
            ax.loglog(x, y, "o-", color=colour, markersize=3.5, label=method)
            if method in ("BPTT", "S2PG"):
                bounds = [r.bound for r in points]
                ax.loglog(x, bounds, "--", color=colour, label=f"bound of {method}")
        ax.set_xticks(x, [f"{value:g}" for value in x])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.set_xlabel(("episode length T", "noise σ on z'")[i])
        if i == 0:
            ax.set_title(f"|∂z'/∂z| = {decay:g}")
    for i, text in enumerate((f"σ = {STD:g}", f"T = {LENGTH}")):
        axes[i, 0].set_ylabel(f"variance of an estimate, {text}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=3, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)
