"""Several processes that train together, each with devices of its own, by JAX's own runtime.

Every process runs the same program, on its share of the mesh. The first one alone has the run
directory: it is given what the others hold, and tells them what it reads.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import jax.random as jr
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

if TYPE_CHECKING:
    from spg.training.options import RunConfig

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
PATIENCE = 3600  # seconds that the others wait for the first one, which draws the pictures


def join(config: "RunConfig") -> None:
    """Become one of the processes that `config` tells of; call before JAX starts.

    Raises ValueError for what is not told, and if the others do not come.
    """
    names = "coordinator_address", "num_processes", "process_id"
    told = {name: getattr(config, name) for name in names}
    said = [name for name in names if told[name] is not None]
    if not (config.distributed or said):
        return
    flags = {name: f"--{name.replace('_', '-')}" for name in names}
    if said and not config.distributed and len(said) < len(names):
        lack = " and ".join(flags[name] for name in names if name not in said)
        raise ValueError(
            f"{flags[said[0]]} needs {lack} too; or --distributed, which finds what is not told "
            "on Slurm, Open MPI, Kubernetes and Cloud TPU"
        )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **told, heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=PATIENCE
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"--distributed: {_line(error)}; {', '.join(flags.values())} tell what is not found"
        ) from error


def leads() -> bool:
    """Whether this process has the run directory."""
    return jax.process_index() == 0


def check(mesh: jax.sharding.Mesh) -> None:
    """Raise ValueError if a process has no device on the mesh."""
    working = {device.process_index for device in mesh.devices.flat}
    if len(working) < jax.process_count():
        raise ValueError(
            f"{jax.process_count()} processes have {jax.device_count()} devices, and the seeds "
            f"and environments are shared out to {mesh.size} of them, of {len(working)} processes; "
            "fewer processes, or more --num-seeds or --num-envs, would do"
        )


def gathered(tree: PyTree) -> PyTree:
    """What the devices of all processes hold, as arrays of NumPy and as keys; None but on the first.

    One after another: a machine has to hold the largest array beside its own share.
    """

    def gather(x: Any) -> Any:
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            data = gather(jr.key_data(x))
            return jr.wrap_key_data(data) if leads() else None
        whole = multihost_utils.process_allgather(x, tiled=True)
        return whole if leads() else None
    return tree if jax.process_count() == 1 else jax.tree.map(gather, tree)


def agreed(tree: PyTree) -> PyTree:
    """What the first process has, on all; elsewhere only its shapes count."""
    if jax.process_count() == 1:
        return tree
    ...


@contextmanager
def together() -> Iterator[None]:
    """An error ends this process at once, and with it the others, which would wait for it."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status = 1
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
        elif isinstance(error, jax.errors.JaxRuntimeError):
            print(f"error: process {jax.process_index()} ends, since another one has, or "  , file=sys.stderr)
            status = 2
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
