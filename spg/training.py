"""The one loop: seeds, devices, checkpoints, resumption, metrics, progress.

An algorithm is `init(key) -> state` and `step(state) -> (state, metrics)`, pure, with all its
randomness in the state. `run` vmaps it over seeds, shards these over devices, compiles a chunk of
updates once, and keeps a run directory: `config.json`, `metrics.csv`, `summary.json`,
`curve.png`, `checkpoints/` and TensorBoard events.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import orbax.checkpoint as ocp
import tyro
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree
from tensorboardX import SummaryWriter
from tqdm import tqdm

from spg import records
from spg.records import RunError
from spg.types import Environment

SLICES = 5  # reports of progress between two checkpoints
EPISODE_METRICS = ("return", "episode_length")  # nan in an update in which no episode ended


@dataclass(frozen=True)
class RunConfig:
    """What every script offers."""

    seed: int = 0
    """of the first run; the others take the next integers"""
    num_seeds: int = 4
    """independent trainings, vmapped into one program"""
    out: str | None = None
    """directory of the run; by default a new one under runs/"""
    resume: bool = False
    """go on from the last checkpoint in --out, to the same bits"""
    checkpoints: int = 20
    """how many checkpoints, each with an evaluation, a run writes"""
    eval_episodes: int = 32
    """fresh episodes of each evaluation, sampled and noise-free, per seed"""


@dataclass(frozen=True)
class EnvConfig:
    """What every script that opens an environment offers."""

    env: str = "CartPole-v1"
    """a Gymnax environment, brax/<name>, or one of ours: TMaze-memory, RepeatFirst-memory"""
    observe: Literal["all", "positions", "velocities", "state"] = "positions"
    """what the policy sees"""
    previous_action: bool = False
    """append the previous action to the observation"""
    privileged: bool = False
    """show the critic the full state"""
    backend: Literal["generalized", "spring", "positional", "mjx"] | None = None
    """physics of Brax; by default spring, the fastest on a CPU"""
    env_params: dict[str, float] = field(default_factory=dict)
    """parameters of the environment to change, e.g. --env-params length 50"""


def describe(config: EnvConfig, *, oracle: bool = False) -> str:
    """What is observed of which environment, for titles."""
    return f"{config.env}, observing {'state' if oracle else config.observe}"


def make_env(config: EnvConfig, *, oracle: bool = False) -> tuple[Environment, Any]:
    """The environment that `config` names, and its parameters; an oracle sees the full state."""
    from spg import envs  # here: importing gymnax starts JAX's backend, and `cli` sets its devices

    return envs.make(
        config.env,
        observe="state" if oracle else config.observe,
        previous_action=config.previous_action,
        privileged=config.privileged,
        backend=config.backend,
        **{k: int(v) if v == int(v) else v for k, v in config.env_params.items()},
    )


class Algorithm(NamedTuple):
    """What `run` trains."""

    name: str  # of the script
    title: str  # of the learning curve
    init: Callable[[PRNGKeyArray], PyTree]
    step: Callable[[PyTree], tuple[PyTree, dict[str, jax.Array]]]
    params: Callable[[PyTree], PyTree]  # what has to stay finite
    evaluate: Callable[[PyTree, PRNGKeyArray], dict[str, jax.Array]]
    num_updates: int
    steps_per_update: int  # environment steps


C = TypeVar("C", bound=RunConfig)


def cli(config_type: type[C], make: Callable[[C], Algorithm]) -> None:
    """Parse the command line, train, and end with status 2 and one line where the user erred."""
    config = tyro.cli(config_type)
    use_cores(config.num_seeds)
    try:
        algorithm = make(config)
    except ValueError as error:
        fail(error)
    try:
        run(config, algorithm)
    except RunError as error:
        fail(error)


def use_cores(num_seeds: int) -> None:
    """Make the cores of a CPU devices, over which the seeds are sharded; call before JAX starts.

    A core for each seed is faster than all cores on each small operation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", _divisor(num_seeds, os.cpu_count() or 1))


def fail(error: Exception) -> NoReturn:
    """End the process with one line and status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def run(config: RunConfig, algorithm: Algorithm) -> dict[str, Any]:
    """Train all seeds and return what `summary.json` holds.

    Raises RunError if `config.out` holds a run already (without `resume`), if it holds none or
    one of another configuration (with it), or when a loss or a parameter stops being finite.
    """
    out = records.open_run(config, algorithm.name)
    checkpoints = ocp.CheckpointManager(
        (out / "checkpoints").absolute(),
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    seeds = np.arange(config.seed, config.seed + config.num_seeds)
    num_devices = _divisor(config.num_seeds, jax.device_count())
    mesh = jax.make_mesh((num_devices,), ("seed",), devices=jax.devices()[:num_devices])
    sharding = NamedSharding(mesh, PartitionSpec("seed"))
    over_seeds = partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec("seed"), check_vma=False)

    plural = f"{config.num_seeds} seeds on {num_devices} devices"
    print(f"{algorithm.title}: compiling for {plural}", file=sys.stderr, flush=True)
    per_slice = max(1, math.ceil(algorithm.num_updates / (config.checkpoints * SLICES)))
    began = time.perf_counter()
    roots = jax.vmap(lambda seed: jr.split(jr.key(seed)))(jnp.asarray(seeds))
    keys, eval_roots = (jax.device_put(roots[:, i], sharding) for i in range(2))
    init = over_seeds(jax.vmap(algorithm.init), in_specs=PartitionSpec("seed"))
    state = jax.jit(init)(keys)
    train = over_seeds(
        partial(_updates, algorithm, per_slice),
        in_specs=(PartitionSpec("seed"), PartitionSpec()),
    )
    train = jax.jit(train, donate_argnums=0)
    evaluate = jax.jit(over_seeds(jax.vmap(algorithm.evaluate), in_specs=PartitionSpec("seed")))
    shapes = jax.eval_shape(train, state, jnp.int32(0))[1], jax.eval_shape(evaluate, state, keys)
    train = train.lower(state, jnp.int32(0)).compile()
    evaluate = evaluate.lower(state, keys).compile()
    clock = {"compile_seconds": time.perf_counter() - began, "train_seconds": 0.0}

    update = 0
    if config.resume:
        update, state, clock["train_seconds"] = _restore(checkpoints, state)
    table = records.Table(
        out / "metrics.csv",
        seeds=seeds,
        metrics=[k for k in shapes[0] if k != "finite"],
        scores=list(shapes[1]),
        steps_per_update=algorithm.steps_per_update,
        keep=update,
    )
    events = SummaryWriter(str(out), purge_step=update + 1)
    bar = tqdm(
        total=algorithm.num_updates * algorithm.steps_per_update * config.num_seeds,
        initial=update * algorithm.steps_per_update * config.num_seeds,
        unit="step", unit_scale=True, desc=algorithm.name, smoothing=0.1,
    )  # fmt: skip
    with bar:
        while update < algorithm.num_updates:
            began = time.perf_counter()
            count = min(per_slice, algorithm.num_updates - update)
            state, metrics = train(state, jnp.int32(count))
            metrics = {k: np.asarray(v)[:, :count] for k, v in metrics.items()}
            _check_finite(metrics.pop("finite"), update, seeds, out)
            update += count
            clock["train_seconds"] += time.perf_counter() - began
            at_checkpoint = update % (per_slice * SLICES) == 0 or update == algorithm.num_updates
            scores = {}
            if at_checkpoint:
                eval_keys = jax.vmap(partial(jr.fold_in, data=update))(eval_roots)
                scores = {k: np.asarray(v) for k, v in evaluate(state, eval_keys).items()}
            table.append(update, metrics, scores)
            records.write_events(events, update, metrics, scores)
            if at_checkpoint:
                _save(checkpoints, update, state, clock["train_seconds"])
            bar.update(count * algorithm.steps_per_update * config.num_seeds)
            if not np.isnan(metrics["return"]).all():
                bar.set_postfix_str(f"return {np.nanmean(metrics['return']):.4g}")
    events.close()
    return records.summarise(
        out,
        title=algorithm.title,
        seeds=seeds,
        clock=clock,
        env_steps=update * algorithm.steps_per_update,
    )


def _updates(
    algorithm: Algorithm, size: int, states: PyTree, count: jax.Array
) -> tuple[PyTree, dict[str, jax.Array]]:
    """`count` <= `size` updates of every seed, and their metrics `[seeds, size]`."""

    def step(state):
        state, metrics = algorithm.step(state)
        leaves = jax.tree.leaves(algorithm.params(state))
        leaves += [v for k, v in metrics.items() if k not in EPISODE_METRICS]
        return state, metrics | {"finite": jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()}

    def body(i, carry):
        states, buffer = carry
        states, metrics = jax.vmap(step)(states)
        return states, jax.tree.map(lambda b, m: b.at[:, i].set(m), buffer, metrics)

    shapes = jax.eval_shape(jax.vmap(step), states)[1]
    buffer = jax.tree.map(lambda s: jnp.zeros((s.shape[0], size), s.dtype), shapes)
    return lax.fori_loop(0, count, body, (states, buffer))


def _check_finite(finite: np.ndarray, update: int, seeds: np.ndarray, out: Path) -> None:
    if finite.all():
        return
    bad_update, bad_seed = np.argwhere(~finite.T)[0]
    raise RunError(
        f"seed {seeds[bad_seed]}, update {update + bad_update + 1}: a loss or parameter is not "
        f"finite; the last good checkpoint is kept in {out / 'checkpoints'}; "
        "a smaller --learning-rate would be the first thing to try"
    )


def _save(checkpoints: ocp.CheckpointManager, update: int, state: PyTree, seconds: float) -> None:
    tree = _named_leaves(state) | {"seconds": np.float64(seconds)}
    checkpoints.save(update, args=ocp.args.StandardSave(tree))


def _restore(checkpoints: ocp.CheckpointManager, state: PyTree) -> tuple[int, PyTree, float]:
    """The last checkpoint: update, state, seconds trained; `state` gives structure and sharding."""
    update = checkpoints.latest_step()
    if update is None:
        return 0, state, 0.0
    like = _named_leaves(state) | {"seconds": np.float64(0)}
    saved = checkpoints.restore(update, args=ocp.args.StandardRestore(like))

    def restore(i, leaf):
        value = saved.get(f"{i:04d}", leaf)
        if _is_key(leaf):
            value = jr.wrap_key_data(value, impl=jr.key_impl(leaf))
        return jax.device_put(value, leaf.sharding)

    leaves, structure = jax.tree.flatten(state)
    leaves = [restore(i, leaf) for i, leaf in enumerate(leaves)]
    return update, jax.tree.unflatten(structure, leaves), float(saved["seconds"])


def _named_leaves(state: PyTree) -> dict[str, np.ndarray]:
    """What Orbax can write and any number of devices can read: no empty arrays, no typed keys."""
    leaves = [jr.key_data(x) if _is_key(x) else x for x in jax.tree.leaves(state)]
    return {f"{i:04d}": np.asarray(x) for i, x in enumerate(leaves) if x.size}


def _is_key(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to `limit`."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields that is not at least 1."""
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1")
