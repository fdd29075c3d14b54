"""Checkpoints of a training state, whole or not there at all, for any number of devices."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from spg.training.records import RunError


class Checkpoints:
    """The last two checkpoints under a directory, written by Orbax: renamed when complete."""

    def __init__(self, directory: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def save(self, update: int, state: PyTree, clock: dict[str, float]) -> None:
        tree = _named_leaves(state) | {k: np.float64(v) for k, v in clock.items()}
        self._manager.save(update, args=ocp.args.StandardSave(tree))

    def restore(
        self, state: PyTree, clock: dict[str, float]
    ) -> tuple[int, PyTree, dict[str, float]]:
        """The last checkpoint: update, state, clock; as given, at update 0, if there is none.

        `state` gives the structure, the dtypes and the sharding. Raises RunError if the
        checkpoint has others.
        """
        update = self._manager.latest_step()
        if update is None:
            return 0, state, clock
        like = _named_leaves(state) | {k: np.float64(0) for k in clock}
        try:
            saved = self._manager.restore(update, args=ocp.args.StandardRestore(like))
        except (KeyError, ValueError) as error:
            raise RunError(f"checkpoint {update} is of another version of the code") from error

        def restore(i: int, leaf: jax.Array) -> jax.Array:
            value = saved.get(f"{i:04d}", leaf)
            if _is_key(leaf):
                value = jr.wrap_key_data(value, impl=jr.key_impl(leaf))
            return jax.device_put(value, leaf.sharding)

        leaves, structure = jax.tree.flatten(state)
        leaves = [restore(i, leaf) for i, leaf in enumerate(leaves)]
        return update, jax.tree.unflatten(structure, leaves), {k: float(saved[k]) for k in clock}

    def close(self) -> None:
        self._manager.close()


def _named_leaves(state: PyTree) -> dict[str, Any]:
    """What Orbax can write and any number of devices can read: no empty arrays, no typed keys."""
    leaves = [jr.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]
    return {f"{i:04d}": np.asarray(x) for i, x in enumerate(leaves) if x.size}


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
