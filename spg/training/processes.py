"""Several processes that train together, each with devices of its own, by JAX's own runtime.

Every process runs the same program, on its share of the mesh. The first one alone has the run
directory: it is given what the others hold, and tells them what it reads.
"""

import itertools
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from spg.training.records import PROCESSES

if TYPE_CHECKING:
    from spg.training.options import RunConfig

HEARTBEAT = 30  # seconds without a sign of life after which a process counts as dead
PATIENCE = 3600  # seconds to wait for one that compiles, or reads, or draws the pictures
ARRIVAL = 300  # seconds to wait for all to start
MEETINGS = itertools.count()  # each has a name of its own
ENDED = "spg ended"  # where a process tells the others why it ends
LOOK = 0.5  # seconds between two looks whether one has ended
_over = threading.Event()  # this process has done its part


def join(config: "RunConfig") -> None:
    """Become one of the processes that `config` tells of; call before JAX starts.

    Raises ValueError for what is not told. If the others do not come in `ARRIVAL` seconds, the
    process ends with status 2 and one line; JAX would abort it with a long message.
    """
    names = PROCESSES[1:]
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
    address, count, own = told.values()
    if address is not None and not re.search(r".:\d+$", address):
        raise ValueError(
            f"coordinator_address is {address}; it has to end in a port, as 10.0.0.1:1234"
        )
    if None not in (count, own) and own >= count:
        raise ValueError(f"process_id is {own}; it has to be below num_processes {count}")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # else SIGTERM does not end a process
    patience = threading.Timer(ARRIVAL, _alone, [told])
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **told, initialization_timeout=2 * ARRIVAL, heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=PATIENCE,
        )  # fmt: skip
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"processes cannot join: {_line(error)}; {', '.join(flags.values())} tell what is not "
            "found"
        ) from error
    finally:
        patience.cancel()
    threading.Thread(target=_look, daemon=True).start()


def _look() -> None:
    """End this process as soon as another one tells that it ends."""
    client: Any = distributed.global_state.client
    while not _over.wait(LOOK):
        try:
            line = client.key_value_try_get(ENDED)
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # nobody is there to be asked
        if not _over.is_set():
            time.sleep(6 * LOOK if leads() else 0)  # JAX aborts those whom the first one leaves
            print(f"error: {line}", file=sys.stderr, flush=True)
            os._exit(2)


def _tell(error: BaseException) -> None:
    """Tell the other processes why this one ends, and give them time to read it."""
    _over.set()
    why = error.__cause__ if isinstance(error, SystemExit) and error.__cause__ else error
    line = f"process {jax.process_index()} has ended: {_line(why) or type(why).__name__}"
    client: Any = distributed.global_state.client

    def put() -> None:
        with suppress(jax.errors.JaxRuntimeError):  # another one was first, or nobody is there
            client.key_value_set(ENDED, line)

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    thread.join(4 * LOOK)
    time.sleep(4 * LOOK)


def _alone(told: dict[str, Any]) -> None:
    """End a process that waits for others."""
    found = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
    print(
        f"error: not all processes have come in {ARRIVAL} s ({found or 'found by JAX'}); each has "
        "to be started, and to reach the address of the first",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def leads() -> bool:
    """Whether this process has the run directory."""
    return jax.process_index() == 0


def meet() -> None:
    """Wait for the other processes, since sums by gloo wait for 30 seconds only."""
    if client := distributed.global_state.client:
        client.wait_at_barrier(f"spg {next(MEETINGS)}", 1000 * PATIENCE)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
    """What every process has alike, on devices: each takes its own part of it."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x: Any, sharding: jax.sharding.Sharding) -> Any:
        if _is_key(x):
            return jr.wrap_key_data(put(jr.key_data(x), sharding))
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return jax.tree.map(put, tree, shardings)


def whole(tree: PyTree) -> PyTree:
    """What the devices of all processes hold, on each as NumPy's arrays and as keys; a collective.

    Untouched where there is one process.
    """
    meet()

    def gather(x: Any) -> Any:
        if _is_key(x):
            return jr.wrap_key_data(gather(jr.key_data(x)))
        return multihost_utils.process_allgather(x, tiled=True)

    return tree if jax.process_count() == 1 else jax.tree.map(gather, tree)


def agreed(tree: PyTree, like: PyTree) -> PyTree:
    """What the first process has, on all; `like` gives shapes and dtypes; a collective.

    As bytes, since sums of zeros and floats are not always those floats. Untouched where there is
    one process.
    """
    if jax.process_count() == 1:
        return tree
    meet()
    shapes, structure = jax.tree.flatten(like)
    bare = [jax.eval_shape(jr.key_data, x) if _is_key(x) else x for x in shapes]
    buffer = np.zeros(sum(x.size * x.dtype.itemsize for x in bare), np.uint8)
    if leads():
        leaves = [jr.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(tree)]
        parts = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in leaves]
        buffer = np.concatenate(parts)
    buffer, end, found = np.asarray(multihost_utils.broadcast_one_to_all(buffer)), 0, []
    for x, kind in zip(bare, shapes, strict=True):
        begin, end = end, end + x.size * x.dtype.itemsize
        value = buffer[begin:end].view(x.dtype).reshape(x.shape)
        found.append(jr.wrap_key_data(jnp.asarray(value)) if _is_key(kind) else value)
    return jax.tree.unflatten(structure, found)


@contextmanager
def together() -> Iterator[None]:
    """An error ends this process at once, and so the others too, which would wait for it."""
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        status = error.code if isinstance(error, SystemExit) else 1
        if isinstance(error, jax.errors.JaxRuntimeError):
            status = 2
            print(
                f"error: process {jax.process_index()} of {jax.process_count()} cannot go on, "
                f"another one may have ended: {_line(error)}; started again, all of them, --resume "
                "goes on from the last checkpoint",
                file=sys.stderr,
            )
        elif not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        _tell(error)
        os._exit(status if isinstance(status, int) else 1)
    _over.set()
    jax.distributed.shutdown()


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
