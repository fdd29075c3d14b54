"""The S2PG gradient as the noise on z' goes to 0, against the gradient of the noise-free policy.

A random world of two states, observations and actions, T = 3 steps, and the policy

    z' ~ N(tanh(W o + u z + b), σ²),    a ~ softmax of a small network of (o, z')

with one internal number z. The mean of `score_estimate`, and its variance, are sums over all
trajectories of the world and Gauss-Hermite quadrature over the noise of every step. The gradient
of the noise-free policy, z' = tanh(W o + u z + b), is exact: enumeration and automatic
differentiation through time, theorem 2.3 of Al-Hafez et al. (2024) where z' is concerned.
"""

from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray

from spg.estimators.score import score_estimate
from spg.exact.enumeration import enumerate_return, trajectories
from spg.kernels.cells import Computed, Drawn, Location, NormalAround
from spg.kernels.heads import CategoricalHead
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity
from spg.types import Scalar, Transition
from spg.worlds.models import DensePOMDP

GAMMA = 0.9
STDS = tuple(float(f"{x:.2g}") for x in np.logspace(-3, 0, 10))
SMALL = 0.1  # the slope is fitted up to here


class Row(NamedTuple):
    world: int  # seed of the world and of the policy
    state_std: float  # σ
    error: float  # ‖E ĝ_σ - ∇J_0‖ / ‖∇J_0‖
    variance: float  # trace of the covariance of one trajectory's ĝ_σ
    gradient: float  # ‖∇J_0‖


class Tanh(Location):
    """z' = tanh(W o + u z + b)."""

    inputs: eqx.nn.Linear
    memory: Float[Array, " 1"]

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " 1"]) -> Float[Array, " 1"]:
        return jnp.tanh(self.inputs(obs) + self.memory * z)


def make_world(key: PRNGKeyArray) -> DensePOMDP:
    """Two states, observations and actions; nothing is symmetric."""
    keys = jr.split(key, 4)
    draws = [jr.exponential(k, s) for k, s in zip(keys, ((2, 2, 2), (2, 2), (2,)), strict=False)]
    transition, observation, start = (x / x.sum(-1, keepdims=True) for x in draws)
    return DensePOMDP(transition, observation, jr.normal(keys[3], (2, 2)), start)


def make_kernel(key: PRNGKeyArray) -> Kernel:
    """The noise-free policy, at a random place."""
    inputs_key, head_key = jr.split(key)
    location = Tanh(eqx.nn.Linear(2, 1, key=inputs_key), jnp.ones(1))
    head = CategoricalHead([3, 4, 2], gain=1.0, key=head_key)
    return Kernel(Computed(location), head, Identity(), jnp.zeros(1))


def drawn(kernel: Kernel, state_std: Scalar) -> Kernel:
    """The same policy with noise on z'."""
    computed: Any = kernel.cell
    around = NormalAround(computed.location, jnp.log(state_std) * jnp.ones(1))
    return eqx.tree_at(lambda k: k.cell, kernel, Drawn(around))


def exact_gradient(kernel: Kernel, world: DensePOMDP, *, num_steps: int) -> Float[Array, " p"]:
    """∇J of the noise-free policy, through time, with respect to location and head."""
    total = lambda k: enumerate_return(k, world, gamma=GAMMA, num_steps=num_steps)
    return _flat(eqx.filter_grad(total)(kernel))


def grid(num_steps: int, num_nodes: int) -> tuple[Float[Array, "N T"], Float[Array, " N"]]:
    """Gauss-Hermite nodes and weights of N(0, 1) in `num_steps` dimensions."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    index = np.indices((num_nodes,) * num_steps).reshape(num_steps, -1).T
    return jnp.asarray(nodes[index]), jnp.asarray((weights / weights.sum())[index].prod(1))


@eqx.filter_jit
def moments(
    kernel: Kernel,
    traj: Transition,
    prob: Float[Array, " M"],
    noise: tuple[Float[Array, "N T"], Float[Array, " N"]],
) -> tuple[Float[Array, " p"], Float[Array, ""]]:
    """Mean and variance of `score_estimate` with weights γ^t G_t, for a kernel that draws z'.

    `traj` and `prob` are those of `trajectories`, `noise` is a `grid`.
    """

    def estimate(noise, traj):
        def step(z, inputs):
            obs, x = inputs
            around: Any = kernel.cell(obs, z)
            z_next = around.loc + around.std * x
            return z_next, (z, z_next)

        z, z_next = lax.scan(step, kernel.z0, (traj.obs, noise))[1]
        traj = traj._replace(z=z, z_next=z_next)
        reward = GAMMA ** jnp.arange(len(noise)) * traj.reward
        to_go = jnp.cumsum(reward[::-1])[::-1]
        g = score_estimate(kernel, traj, to_go, segment_length=1)
        return jnp.exp(kernel.log_prob(traj).action.sum()), _flat(g)

    def average(noise):
        chosen, g = jax.vmap(estimate, (None, 0))(noise, traj)
        weight = prob * chosen
        return weight @ g, weight @ jnp.sum(g**2, 1)

    nodes, weights = noise
    means, squares = lax.map(average, nodes)
    mean = weights @ means
    return mean, weights @ squares - mean @ mean


def measure(
    seeds: range,
    *,
    stds: tuple[float, ...] = STDS,
    num_steps: int = 3,
    num_nodes: int = 6,
) -> list[Row]:
    """A world and a policy for each seed; in double precision, for the score grows as 1 / σ."""
    rows = []
    with jax.enable_x64(True):
        noise = grid(num_steps, num_nodes)
        for seed in seeds:
            world_key, kernel_key = jr.split(jr.key(seed))
            world, kernel = make_world(world_key), make_kernel(kernel_key)
            exact = exact_gradient(kernel, world, num_steps=num_steps)
            norm = jnp.linalg.norm(exact)
            traj, prob = trajectories(kernel, world, num_steps=num_steps)
            for std in stds:
                mean, variance = moments(drawn(kernel, std), traj, prob, noise)
                error = jnp.linalg.norm(mean - exact) / norm
                rows.append(Row(seed, std, float(error), float(variance), float(norm)))
    return rows


def slope(rows: list[Row], name: str, *, largest: float = SMALL) -> float:
    """d log(column) / d log σ up to `largest`, the least-squares line through all worlds."""
    some = [row for row in rows if row.state_std <= largest]
    x = np.log([row.state_std for row in some])
    return float(np.polyfit(x, np.log([getattr(row, name) for row in some]), 1)[0])


def draw(rows: list[Row], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.7))
    texts = {
        "error": "relative error of the mean estimate",
        "variance": "variance of one trajectory's estimate",
    }
    for ax, (name, text) in zip(axes, texts.items(), strict=True):
        stds = sorted({row.state_std for row in rows})
        for world in {row.world for row in rows}:
            points = sorted((r.state_std, getattr(r, name)) for r in rows if r.world == world)
            ax.loglog(*zip(*points, strict=True), color="C0", alpha=0.3, linewidth=1)
        middle = [np.median([getattr(r, name) for r in rows if r.state_std == s]) for s in stds]
        label = f"median of the worlds; slope {slope(rows, name):.3g} up to σ = {SMALL:g}"
        ax.loglog(stds, middle, "o-", color="C0", markersize=4, label=label)
        ax.set_xlabel("noise σ on z'")
        ax.set_ylabel(text)
        ax.grid(alpha=0.3)
        ax.legend(frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _flat(gradient: Any) -> Float[Array, " p"]:
    """Of the location and of the head, without that of σ."""
    cell = gradient.cell
    location = cell.location if isinstance(cell, Computed) else cell.distribution.location
    return ravel_pytree(eqx.filter((location, gradient.head), eqx.is_inexact_array))[0]
