"""The chain K of a world and a controller on (s, g), applied and never formed.

A product costs as many multiplications as the world and the controller have non-zeros. It takes a
block of states at a time, so that what it makes of them stays in the cache, and takes no memory.
Devices may share the states; each then holds its rows of the world and of every vector, and sends
its part of a vector to the others once a product.
"""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PyTree

from spg.exact.solvers import Vector
from spg.kernels.finite import Tables, transitions
from spg.worlds.models import POMDP, SparsePOMDP

BLOCK = 1024  # states
ROWS = PartitionSpec("state")
Devices = Sequence[jax.Device]


def share_states(pomdp: SparsePOMDP, devices: Devices) -> SparsePOMDP:
    """The same world, its states shared out evenly to devices, for `long_run`.

    States that nothing reaches fill up the last device's share. For a world that is too large for
    one accelerator, make it under `jax.default_device(jax.devices("cpu")[0])`.
    """
    missing = -len(pomdp.start) % len(devices)
    pad = lambda x: np.concatenate([x, np.repeat(x[-1:], missing, axis=0)])
    padded = jax.tree.map(lambda x: pad(np.asarray(x)), pomdp)
    start = np.pad(np.asarray(pomdp.start), (0, missing))
    padded = eqx.tree_at(lambda pomdp: pomdp.start, padded, start)
    return jax.device_put(padded, NamedSharding(_mesh(devices), ROWS))


def evaluate(table: Tables, pomdp: POMDP, x: Vector, devices: Devices | None = None) -> Vector:
    """r + Kx, one step of policy evaluation.

    Q(s,h,a) = Σ P [r + x],  V(s,h,o) = Σ_a μ Q,  (r + Kx)(s,g) = Σ_o O(o|s) Σ_h ω(h|g,o) V(s,h,o)
    """
    if devices is None:
        return _evaluate(table, pomdp, x)
    own = lambda table, pomdp, x: _evaluate(table, pomdp, lax.all_gather(x, "state", tiled=True))
    return _shared(devices, own)(table, pomdp, x)


def push(table: Tables, pomdp: POMDP, d: Vector, devices: Devices | None = None) -> Vector:
    """dK.

    W(s,o,h) = O(o|s) Σ_g d ω(h|g,o),   (dK)(s',h) = Σ_{s,a} [Σ_o W μ(a|h,o)] P(s'|s,a)
    """
    if devices is None:
        return _push(table, pomdp, d, jnp.zeros_like(d))

    def own(table: Tables, pomdp: POMDP, d: Vector) -> Vector:
        nothing = jnp.zeros((len(d) * len(devices), d.shape[1]), d.dtype)
        return lax.psum_scatter(_push(table, pomdp, d, nothing), "state", tiled=True)

    return _shared(devices, own)(table, pomdp, d)


def _shared(devices: Devices, own: Callable) -> Callable:
    """What each device does with a table, its rows of a world, and those of a vector."""
    specs = PartitionSpec(), ROWS, ROWS
    return jax.shard_map(own, mesh=_mesh(devices), in_specs=specs, out_specs=ROWS, check_vma=False)


def _mesh(devices: Devices) -> Mesh:
    return Mesh(np.array(devices), ("state",))


def _evaluate(table: Tables, pomdp: POMDP, x: Float[Array, "S G"]) -> Float[Array, "R G"]:
    """`evaluate` at the states that `pomdp` has rows of; x is of all."""

    def of(some: POMDP) -> Float[Array, "B G"]:
        obs, emission = some.emissions()
        q = some.mean_reward()[:, :, None] + some.expect(x)
        v = jnp.einsum("smga,sag->smg", table.mu[obs], q)
        omega, successors = table.omega[obs], table.successors[obs]  # [S, M, G, K]
        v = jnp.take_along_axis(v[:, :, None], successors, -1)
        return jnp.einsum("sm,smgk,smgk->sg", emission, omega, v)

    size = len(pomdp.start)
    if size <= BLOCK:
        return of(pomdp)
    firsts, block = _blocks(pomdp)
    found = lax.map(jax.checkpoint(lambda first: of(block(first))), firsts)
    whole, last = found[:-1].reshape(-1, x.shape[1]), found[-1]
    return jnp.concatenate([whole, last[len(whole) - size :]])


def _push(
    table: Tables, pomdp: POMDP, d: Float[Array, "R G"], onto: Float[Array, "S G"]
) -> Float[Array, "S G"]:
    """`push` of the mass at the states that `pomdp` has rows of, added to what all have."""

    def add(onto: Vector, some: POMDP, d: Float[Array, "B G"]) -> Vector:
        obs, emission = some.emissions()
        w = emission[..., None] * jnp.einsum("sg,smgh->smh", d, transitions(table)[obs])
        return some.push(jnp.einsum("smh,smha->sah", w, table.mu[obs]), onto)

    if len(d) <= BLOCK:
        return add(onto, pomdp, d)
    firsts, block = _blocks((pomdp, d))

    def step(onto, i):
        some, mass = block(firsts[i])
        new = firsts[i] + jnp.arange(BLOCK) >= i * BLOCK  # not in the block before
        return add(onto, some, jnp.where(new[:, None], mass, 0)), None

    return lax.scan(step, onto, jnp.arange(len(firsts)))[0]


def _blocks(rows: PyTree) -> tuple[Int[Array, " B"], Callable[[Array], PyTree]]:
    """Where blocks of `BLOCK` rows begin, and the block that begins at a row.

    The last one begins early enough to be whole.
    """
    size = len(jax.tree.leaves(rows)[0])
    take = lambda first: lambda x: lax.dynamic_slice_in_dim(x, first, BLOCK)
    firsts = jnp.minimum(jnp.arange(0, size, BLOCK), size - BLOCK)
    return firsts, lambda first: jax.tree.map(take(first), rows)
