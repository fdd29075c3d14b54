"""The one loop: seeds, devices, checkpoints, resumption, metrics, progress.

An algorithm is `init(key) -> state` and `step(state) -> (state, metrics)`, pure, with all its
randomness in the state. `run` vmaps it over seeds, shards these over devices, compiles a chunk of
updates once, and keeps a run directory: `config.json`, `metrics.csv`, `summary.json`,
`curve.png`, `checkpoints/`, TensorBoard events, and what else the algorithm exports.
"""

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree
from tensorboardX import SummaryWriter
from tqdm import tqdm

from spg.training import records
from spg.training.checkpoints import Checkpoints
from spg.training.records import RunError

if TYPE_CHECKING:
    from spg.training.cli import RunConfig

SLICES = 5  # reports of progress between two checkpoints
EPISODE_METRICS = ("return", "episode_length")  # nan in an update in which no episode ended


class Algorithm(NamedTuple):
    """What `run` trains."""

    name: str  # of the script
    title: str  # of the learning curve
    init: Callable[[PRNGKeyArray], PyTree]
    step: Callable[[PyTree], tuple[PyTree, dict[str, jax.Array]]]
    params: Callable[[PyTree], PyTree]  # what has to stay finite
    evaluate: Callable[[PyTree, PRNGKeyArray], dict[str, jax.Array]]
    num_updates: int
    steps_per_update: int  # environment steps; 0 for exact gradients
    export: Callable[[PyTree, Path], None]  # writes what else the final states (of all seeds) tell
    sharded: bool = True  # over the devices by seed; GMRES of lineax 0.1.1 does not run so


def run(config: "RunConfig", algorithm: Algorithm, out: Path) -> dict[str, Any]:
    """Train all seeds in the directory that `records.open_run` opened; what `summary.json` holds.

    Raises RunError when a loss or a parameter stops being finite, and, on resumption, if the
    checkpoint does not fit.
    """
    seeds = np.arange(config.seed, config.seed + config.num_seeds)
    limit = jax.device_count() if algorithm.sharded else 1
    num_devices = largest_divisor(config.num_seeds, limit)
    mesh = Mesh(np.array(jax.devices()[:num_devices]), ("seed",))
    sharding = NamedSharding(mesh, PartitionSpec("seed"))
    over_seeds = partial(jax.shard_map, mesh=mesh, out_specs=PartitionSpec("seed"), check_vma=False)
    if num_devices == 1:
        over_seeds = lambda f, in_specs: f
    marks = _marks(algorithm.num_updates, config.checkpoints * SLICES)
    at_checkpoints = set(_marks(algorithm.num_updates, config.checkpoints))
    size = max(b - a for a, b in pairwise(marks))
    work = (algorithm.steps_per_update or 1) * config.num_seeds  # of an update
    bar = tqdm(
        total=algorithm.num_updates * work,
        unit="step" if algorithm.steps_per_update else "update", unit_scale=True,
        desc=f"{algorithm.name}: compiling", smoothing=0.1,
    )  # fmt: skip

    began = time.perf_counter()
    roots = jax.vmap(lambda seed: jr.split(jr.key(seed)))(jnp.asarray(seeds))
    keys, eval_roots = (jax.device_put(roots[:, i], sharding) for i in range(2))
    # on one device: batches of QR, in orthogonal weights, on two at once block both (jaxlib 0.10)
    state = jax.jit(jax.vmap(algorithm.init))(roots[:, 0])
    state = jax.jit(over_seeds(lambda x: x, in_specs=PartitionSpec("seed")))(state)
    specs = (PartitionSpec("seed"), PartitionSpec())
    train = jax.jit(
        over_seeds(partial(_updates, algorithm, size), in_specs=specs), donate_argnums=0
    )
    evaluate = jax.jit(over_seeds(jax.vmap(algorithm.evaluate), in_specs=PartitionSpec("seed")))
    metric_shapes = jax.eval_shape(train, state, jnp.int32(0))[1]
    score_shapes = jax.eval_shape(evaluate, state, keys)
    measure = records.measure(metric_shapes)
    train = train.lower(state, jnp.int32(0)).compile()
    evaluate = evaluate.lower(state, keys).compile()
    compile_seconds = time.perf_counter() - began

    checkpoints = Checkpoints(out / "checkpoints")
    update, clock = 0, {"train_seconds": 0.0, "evaluate_seconds": 0.0}
    if config.resume:
        update, state, clock = checkpoints.restore(state, clock)
    table = records.Table(
        out / "metrics.csv",
        seeds=seeds,
        metrics=[k for k in metric_shapes if k != "finite"],
        scores=list(score_shapes),
        steps_per_update=algorithm.steps_per_update,
        keep=update,
    )
    events = SummaryWriter(str(out), purge_step=update + 1)
    bar.set_description(algorithm.name)
    bar.reset()
    bar.update(update * work)
    try:
        for start, stop in pairwise(m for m in marks if m >= update):
            began = time.perf_counter()
            state, metrics = train(state, jnp.int32(stop - start))
            metrics = {k: np.asarray(v)[:, : stop - start] for k, v in metrics.items()}
            clock["train_seconds"] += time.perf_counter() - began
            finite = metrics.pop("finite")
            scores = {}
            if stop in at_checkpoints and finite.all():
                began = time.perf_counter()
                eval_keys = jax.vmap(partial(jr.fold_in, data=stop))(eval_roots)
                scores = {k: np.asarray(v) for k, v in evaluate(state, eval_keys).items()}
                clock["evaluate_seconds"] += time.perf_counter() - began
            table.append(stop, metrics, scores)
            records.write_events(events, stop, metrics, scores)
            _check_finite(finite, start, seeds, out)
            if stop in at_checkpoints:
                checkpoints.save(stop, state, clock)
            bar.update((stop - start) * work)
            if not np.isnan(metrics[measure]).all():
                bar.set_postfix_str(f"{measure} {np.nanmean(metrics[measure]):.4g}")
    finally:
        bar.close()
        events.close()
        checkpoints.close()
    algorithm.export(state, out)
    return records.summarise(
        out,
        title=algorithm.title,
        seeds=seeds,
        clock={"compile_seconds": compile_seconds, **clock},
        env_steps=algorithm.num_updates * algorithm.steps_per_update,
    )


def largest_divisor(n: int, limit: int) -> int:
    """The largest divisor of n up to `limit`."""
    return max(i for i in range(1, limit + 1) if n % i == 0)


def _marks(num_updates: int, count: int) -> list[int]:
    """0, `num_updates`, and marks between that divide it evenly in at most `count` parts."""
    return sorted({num_updates * i // count for i in range(count + 1)})


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
