"""The devices of a training: one mesh, seeds over one axis, environments over the other.

A program is written as for one device. XLA's partitioner splits what environments bring, by its
shardings, and inserts the sums; `vmap_envs` and `take` tell it where, and do nothing elsewhere.
"""

import sys
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from spg.rollout import Carry
from spg.types import Transition

SPLIT, ENVS, WHOLE = PartitionSpec("seed"), PartitionSpec("env"), PartitionSpec()
Shard = Literal["auto", "seeds", "envs"]


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to `limit`."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


def layout(shard: Shard, num_seeds: int, num_envs: int, *, alone: bool = False) -> Mesh:
    """The mesh to train on, see `sizes`; of one device if `alone`.

    Raises ValueError where `sizes` does, and if a process would have nothing to do.
    """
    found = jax.devices()[:1] if alone else jax.devices()
    seeds, envs = sizes(shard, num_seeds, num_envs, len(found))
    own = [[d for d in found if d.process_index == i] for i in range(jax.process_count())]
    if seeds * envs % len(own) == 0:  # as many of each process
        found = [d for devices in own for d in devices[: seeds * envs // len(own)]]
    mesh = Mesh(np.array(found[: seeds * envs]).reshape(seeds, envs), ("seed", "env"))
    working = len({device.process_index for device in mesh.devices.flat})
    if working < jax.process_count():
        raise ValueError(
            f"there is work for {working} of {jax.process_count()} processes: "
            f"{num_seeds} seeds, {num_envs} environments each, run on {mesh.size} of "
            f"{jax.device_count()} devices; fewer processes, or more seeds, would do"
        )
    return mesh


def tell_idle(mesh: Mesh, num_seeds: int, points: int = 1) -> None:
    """Say where devices stay idle. The seeds are those of all `points` of a grid."""
    count, used = len(jax.devices()), mesh.size
    if used == count:
        return
    if points > 1:
        seeds, advice = f"{points} points x {num_seeds // points} seeds", ""
    else:
        fits = [n for n in (num_seeds // count * count, -(-num_seeds // count) * count) if n]
        seeds = f"{num_seeds} seeds"
        advice = f"; --num-seeds {' or '.join(map(str, fits))} would use all"
    print(
        f"{seeds} run on {used} of {count} devices, each of which has as much to do{advice}",
        file=sys.stderr,
    )


def sizes(shard: Shard, num_seeds: int, num_envs: int, count: int) -> tuple[int, int]:
    """How many of `count` devices share the seeds, and how many the environments of each.

    Seeds come first; `seeds` leaves environments together, `envs` seeds. Each device has equally
    many, so that some may stay idle. Raises ValueError where `envs` cannot be as asked.
    """
    seeds = 1 if shard == "envs" else largest_divisor(num_seeds, count)
    envs = 1 if shard == "seeds" else largest_divisor(num_envs, count // seeds)
    if shard == "envs" and num_envs == 1:
        raise ValueError(
            "--shard envs: this training has no environments to share out; --shard seeds would do"
        )
    if shard == "envs" and envs < count:
        raise ValueError(
            f"--shard envs: {num_envs} environments cannot be shared out evenly to {count} "
            f"devices; --num-envs {-(-num_envs // count) * count} could"
        )
    return seeds, envs


def program(mesh: Mesh, f: Callable, in_specs: Any = SPLIT, **options: Any) -> Any:
    """`f`, whose arguments are stacked over seeds where `in_specs` says so, on these devices."""
    if mesh.size > 1:
        axes = {"seed"} if mesh.shape["env"] > 1 else {"seed", "env"}
        f = jax.shard_map(
            f, mesh=mesh, in_specs=in_specs, out_specs=SPLIT, axis_names=axes, check_vma=False
        )
    return jax.jit(f, **options)


def shardings(mesh: Mesh, tree: PyTree) -> PyTree:
    """Of what is stacked over seeds: that axis, and in a world also that of environments.

    Steps that no environment of the training took, as demonstrations [seed, N], have none.
    """

    def of(x: Any) -> PyTree:
        spec = ("seed", "env") if isinstance(x, Carry) else ("seed",)
        if isinstance(x, Transition) and x.reward.ndim == 3:  # [seed, T, env]
            spec = ("seed", None, "env")
        return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec(*spec)), x)

    if mesh.size == 1:
        return None
    return jax.tree.map(of, tree, is_leaf=lambda x: isinstance(x, Carry | Transition))


def vmap_envs(f: Callable, in_axes: tuple[int | None, ...]) -> Callable:
    """`jax.vmap` over environments, each of which stays on the device where its data are.

    `in_axes` are 0 and None, and `f` must not close over what is traced. What one environment does
    does not wait for those of other devices, as a loop that all of them share would.
    """

    def mapped(*args: Any) -> Any:
        each = jax.vmap(f, in_axes)
        return (_on_each(each, in_axes, ENVS) if _is_split() else each)(*args)

    return mapped


def reduce_envs(
    reduce: Callable[[PyTree, str], PyTree], f: Callable, in_axes: tuple[int | None, ...]
) -> Callable:
    """`f`, a mean (`lax.pmean`) or a sum (`lax.psum`) over environments, first on each device.

    For what the partitioner would send whole, as scatters, whose rows it does not add up apart.
    `in_axes` are 0, of environments, and None; `f` must not close over what is traced.
    """

    def reduced(*args: Any) -> Any:
        if not _is_split():
            return f(*args)
        share = lambda *args: reduce(f(*args), "env")
        return _on_each(share, in_axes, WHOLE)(*args)

    return reduced


def _on_each(f: Callable, in_axes: tuple[int | None, ...], out: PartitionSpec) -> Callable:
    """`f` of a device's own share of the environments."""
    specs = tuple(WHOLE if axis is None else ENVS for axis in in_axes)
    return jax.shard_map(f, in_specs=specs, out_specs=out, axis_names={"env"}, check_vma=False)


def take(tree: PyTree, index: PyTree) -> PyTree:
    """x[index] of each leaf: rows that devices hold apart, shared out to them evenly."""
    # by one sum of what each device has of the rows; else XLA may send all that there is
    return _constrained(everywhere(jax.tree.map(lambda x: x[index], tree)), ENVS)


def everywhere(tree: PyTree) -> PyTree:
    """Arrays of which each device has all from here."""
    return _constrained(tree, WHOLE)


def _constrained(tree: PyTree, spec: PartitionSpec) -> PyTree:
    return jax.lax.with_sharding_constraint(tree, spec) if _is_split() else tree


def _is_split() -> bool:
    """Whether a program is being traced in which devices share environments."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(zip(mesh.axis_names, mesh.axis_types, strict=True)).get("env") == AxisType.Auto
