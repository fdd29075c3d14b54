"""Finite-state controllers: the start of a training, a file, the behaviour in the long run."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spg.kernels.finite import Tables, finite_kernel, random_controller, tables
from spg.kernels.kernel import Kernel
from spg.training.options import ProblemConfig
from spg.training.records import write_arrays
from spg.worlds.models import POMDP, Problem

Stationary = Float[Array, "S G"] | Float[np.ndarray, "S G"]  # d(s, g), stationary


class Edge(NamedTuple):
    """All that leads from I-state g to h, with the observations by falling probability."""

    source: int
    target: int
    probability: float  # Pr(g, h) in the long run
    obs: Int[np.ndarray, " N"]
    flow: Float[np.ndarray, " N"]  # Pr(g, o, h)
    omega: Float[np.ndarray, " N"]  # ω(h | g, o)
    mu: Float[np.ndarray, "N A"]  # μ(a | h, o)


def make(config: ProblemConfig, problem: Problem, *, key: PRNGKeyArray) -> Kernel:
    """The controller that a training starts from."""
    return random_controller(
        config.num_z, problem.pomdp.num_obs, problem.pomdp.num_actions,
        out_degree=config.out_degree, std=config.start_std, hold=config.start_hold, key=key,
    )  # fmt: skip


def save(path: Path, kernel: Kernel, problem: Problem, stationary: Stationary) -> None:
    """Write a controller, `controller.npz`: its `Tables`, `visits`, z0 and the problem's names."""
    arrays = {
        "visits": visits(problem.pomdp, stationary),
        "z0": np.asarray(kernel.z0),
        "problem": np.array(problem.name, str),
        "actions": np.array(problem.actions, str),
        "observations": np.array(problem.observations, str),
    }
    write_arrays(path, tables(kernel, jnp.arange(problem.pomdp.num_obs))._asdict() | arrays)


def load(path: Path) -> Kernel:
    """The controller that `save` wrote, as a table kernel of the same distributions.

    A probability of 0 becomes a logit of -745: the exponential vanishes, gradients stay finite.
    Raises ValueError if the file holds something else.
    """
    try:
        with np.load(path) as file:
            omega, successors, mu, z0 = (file[k] for k in (*Tables._fields, "z0"))
        distributions = all(
            np.allclose(x.sum(2), 1, atol=1e-4) and np.all(x >= 0) for x in (omega, mu)
        )
        known = all(np.all((x >= 0) & (x < omega.shape[1])) for x in (successors, z0))
        shapes = omega.shape, omega.shape[:2], ()
        if not distributions or not known or (successors.shape, mu.shape[:2], z0.shape) != shapes:
            raise ValueError("not the tables of a controller")
    except (zipfile.BadZipFile, EOFError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold a finite-state controller") from error
    swap = lambda x: jnp.asarray(np.swapaxes(x, 0, 1))
    logits = lambda p: swap(np.log(p, out=np.full_like(p, -745), where=p > 0))
    kernel = finite_kernel(logits(omega), logits(mu), swap(successors))
    return eqx.tree_at(lambda kernel: kernel.z0, kernel, jnp.asarray(z0, int))


def visits(pomdp: POMDP, stationary: Stationary) -> Float[np.ndarray, "O G"]:
    """Pr(o, g) = Σ_s d(s, g) O(o | s), how often o is seen in I-state g in the long run."""
    obs, emission = (np.asarray(x) for x in pomdp.emissions())
    d = np.asarray(stationary)
    out = np.zeros((pomdp.num_obs, d.shape[1]), d.dtype)
    np.add.at(out, obs, emission[..., None] * d[:, None])
    return out


def edges(table: Tables, visits: Float[np.ndarray, "O G"], *, least: float = 0.0) -> list[Edge]:
    """The edges g → h in use, by falling Pr(g, h) = Σ_o Pr(o, g) ω(h | g, o).

    Left out are edges that carry no more than `least` of the visits to g, and of an edge the
    observations that carry no more than `least` of what the most probable one carries.
    """
    omega, successors, mu = (np.asarray(x) for x in table)
    num_obs, num_z = visits.shape
    o, g, k = np.nonzero(visits[..., None] * omega)
    code, index = np.unique((g * num_z + successors[o, g, k]) * num_obs + o, return_inverse=True)
    omega = np.bincount(index, omega[o, g, k])  # a successor may be listed twice
    pair, o = np.divmod(code, num_obs)
    flow = visits[o, pair // num_z] * omega
    found = []
    for i in np.split(np.arange(len(pair)), 1 + np.flatnonzero(np.diff(pair))):
        g, h = (int(x) for x in np.divmod(pair[i[0]], num_z))
        total = float(flow[i].sum())
        i = i[np.argsort(-flow[i], kind="stable")]
        if total > least * visits[:, g].sum():
            i = i[flow[i] > least * flow[i[0]]]
            found.append(Edge(g, h, total, o[i], flow[i], omega[i], mu[o[i], h]))
    return sorted(found, key=lambda edge: -edge.probability)
