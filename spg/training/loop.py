"""The one loop: seeds, devices, checkpoints, resumption, metrics, progress.

An algorithm is `init(floats, key) -> State` and `step(floats, state) -> (State, Report)`, pure,
with all its randomness in the state; `floats` are options that are arguments of the program. `run`
shards seeds over devices, vmaps it over those of a device (on a CPU it takes them in turn),
compiles a chunk of updates once, and keeps a run directory: `config.json`, `metrics.csv`,
`summary.json`, `curve.png`, `checkpoints/`, `kernels.npz`, TensorBoard events, and what else the
algorithm exports.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Key, PRNGKeyArray, PyTree

from spg.kernels.kernel import Kernel
from spg.rollout import Evaluation
from spg.scans import over_steps
from spg.training import records
from spg.training.devices import SPLIT, WHOLE, layout, program, shardings, tell_idle
from spg.training.metrics import EMPTY, RETURN, Measure
from spg.training.processes import agreed, leads, meet, place, whole
from spg.training.records import RunError
from spg.training.terminal import Progress

if TYPE_CHECKING:
    from spg.training.options import RunConfig

CLOCKS = ("compile_seconds", "train_seconds", "evaluate_seconds")  # of all processes together
ROWS = 64  # of metrics that a program has room for, or a power of two, whatever --total-steps
SLICES = 5  # reports of progress between two checkpoints
# for a program that runs once: compiling takes a third of the time
ONCE = {"xla_backend_optimization_level": 0}
ADVICE = "a smaller --learning-rate, in another --out, would be the first thing to try"


Floats = dict[str, Any]
"""Options of a training by their names."""


class Diverged(RunError):
    """No seed is left."""


class State(NamedTuple):
    """All that one training hands from update to update."""

    learned: Any  # parameters, the optimiser's state, statistics: it has to stay finite
    world: Any  # what the data come from: environments under way, baselines, a buffer
    key: PRNGKeyArray


class Report(NamedTuple):
    """What one update tells."""

    score: Array  # what it is judged by: the mean return of the episodes that ended, or a reward
    weight: Array  # of the score: how many episodes ended, or 1; without weight it may be nan
    metrics: dict[str, Array]  # to watch; they have to stay finite
    of_episodes: dict[str, Array] = {}  # noqa: RUF012  means over those episodes, as the score


class Algorithm(NamedTuple):
    """What `run` trains."""

    name: str  # of the script
    title: str  # of the learning curve
    init: Callable[[Floats, PRNGKeyArray], State]
    step: Callable[[Floats, State], tuple[State, Report]]
    kernel: Callable[[State], Kernel]  # the policy that acts
    evaluate: Callable[[State, PRNGKeyArray], Evaluation]
    export: Callable[[PyTree, Path], None]  # writes what else the seeds' `learned`, stacked, tell
    num_updates: int
    steps_per_update: int  # environment steps; 0 for exact gradients
    first_steps: int = 0  # environment steps of `init`
    measure: Measure = RETURN  # what the score is
    floats: Floats = {}  # noqa: RUF012  options whose values no program is compiled for
    sharded: bool = True  # over the devices by seed; GMRES of lineax 0.1.1 does not run so
    num_envs: int = 1  # of each seed, side by side, which `vmap_envs` may share out to devices


class Seeds(NamedTuple):
    """The trainings of all seeds, stacked."""

    state: State
    diverged: Array  # [seeds] the update in which something was not finite; 0: none so far


def run(config: "RunConfig", algorithm: Algorithm, out: Path) -> dict[str, Any]:
    """Train all seeds in the directory that `records.open_run` opened; what `summary.json` holds.

    A seed of which a loss or a parameter stops being finite ends alone: `learned` stays as it was
    before that update, its cells in `metrics.csv` are empty from there on, and the summary, which
    is of the others, names it.

    Raises RunError when no seed is left (Diverged), when another process trains in the directory,
    when it cannot be written, and, on resumption, if what it holds is damaged or does not fit.
    """
    found = run_all(config, algorithm, {out: algorithm.floats})
    return {} if not found or found[0] is None else found[0]


def run_all(
    config: "RunConfig", algorithm: Algorithm, points: dict[Path, Floats]
) -> list[dict[str, Any] | None]:
    """`run` in several directories, with other values of `algorithm.floats` in each: one program.

    Each directory becomes what `run` would make of it, and tells an equal share of the times. Where
    every seed diverges there is no summary, None; raises Diverged if that is so everywhere.
    """
    with ExitStack() as locks:
        for out in points if leads() else ():
            locks.enter_context(records.locked(out))
        return _run(config, algorithm, points)


def _run(
    config: "RunConfig", algorithm: Algorithm, points: dict[Path, Floats]
) -> list[dict[str, Any] | None]:
    # here: Orbax, TensorBoard and matplotlib take seconds to load, which --help should not
    from spg.training.directory import Directory, means
    from spg.training.resume import Snapshot, resume

    numbers = np.arange(config.seed, config.seed + config.num_seeds)
    lanes = np.array(
        [f"{out.name}: " * (len(points) > 1) + f"seed {n}" for out in points for n in numbers]
    )
    values = {k: [point[k] for point in points.values()] for k in algorithm.floats}
    floats = {k: jnp.asarray(np.repeat(v, len(numbers))) for k, v in values.items()}
    marks = _marks(algorithm.num_updates, config.checkpoints * SLICES)
    at_checkpoints = set(_marks(algorithm.num_updates, config.checkpoints))
    work = (algorithm.steps_per_update or 1) * len(lanes)  # of an update
    split = jax.vmap(lambda seed: jr.split(jr.key(seed)))
    roots = split(jnp.asarray(np.tile(numbers, len(points))))
    # jitted, they are traced once for all programs that call them
    algorithm = algorithm._replace(init=jax.jit(algorithm.init), step=jax.jit(algorithm.step))

    @partial(jax.jit, compiler_options=ONCE)
    def start(floats, keys):
        return Seeds(jax.vmap(algorithm.init)(floats, keys), jnp.zeros(len(keys), jnp.int32))

    mesh = layout(config.shard, len(lanes), algorithm.num_envs, alone=not algorithm.sharded)
    every = jax.eval_shape(start, floats, roots[:, 0])
    look = program(mesh, lambda *x: jax.vmap(algorithm.step)(*x)[1])
    names = _names(algorithm.measure, jax.eval_shape(look, floats, every.state))
    outs = points if leads() else ()  # the other processes write nothing
    directories = [Directory(out, algorithm, numbers, names) for out in outs]
    update, seeds = 0, None
    clock: dict[str, float] = dict.fromkeys(CLOCKS, 0.0)
    if config.resume:
        if leads():
            stores, tables = [x.store for x in directories], [x.table for x in directories]
            like = jax.eval_shape(start, *_part((floats, roots[:, 0]), 0, len(points)))
            update, found, clock = resume(stores, tables, Snapshot.of(like, clock, EMPTY))
            for directory, own in zip(directories, found, strict=True) if update else ():
                directory.save_kernels(own)  # which may have failed after the checkpoint
            seeds = jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x), *found)
        update = int(agreed(np.int32(update), np.int32(0)))
        if update:
            seeds = agreed(seeds, every)
    else:
        for directory in directories:
            directory.table.start()

    if leads() and algorithm.sharded:
        tell_idle(mesh, len(lanes), len(points))
    unit = "step" if algorithm.steps_per_update else "update"
    total = algorithm.num_updates * work
    progress = Progress(algorithm.name, total=total, unit=unit, shown=leads())
    for directory in directories:
        directory.open_events(update + 1, progress.say)
    try:
        began = time.perf_counter()
        # `start` on one device: it runs once, and is compiled once
        stacked = seeds or start(floats, roots[:, 0]), floats, roots[:, 1]
        seeds, floats, eval_roots = place(stacked, shardings(mesh, stacked))
        ahead = [*pairwise(m for m in marks if m >= update)]
        if ahead:
            longest = max(end - begin for begin, end in pairwise(marks))
            size = max(ROWS, 1 << (longest - 1).bit_length())
            train, evaluate = _compile(algorithm, mesh, size, names, seeds, floats, eval_roots)
        clock["compile_seconds"] += time.perf_counter() - began

        diverged = np.asarray(whole(seeds.diverged))
        progress.start(update * work)
        for begin, end in ahead:
            meet()
            began = time.perf_counter()
            seeds, metrics = train(seeds, floats, np.int32(begin), np.int32(end - begin))
            metrics = {k: np.asarray(x)[:, : end - begin] for k, x in whole(metrics).items()}
            clock["train_seconds"] += time.perf_counter() - began
            before, diverged = diverged, np.asarray(whole(seeds.diverged))
            scores = ()
            if end in at_checkpoints and not diverged.all():
                began = time.perf_counter()
                scores = tuple(
                    np.where(diverged == 0, np.asarray(x), np.nan)
                    for x in whole(evaluate(seeds.state, eval_roots, np.int32(end)))
                )
                clock["evaluate_seconds"] += time.perf_counter() - began
            for i, directory in enumerate(directories):
                own = slice(i * len(numbers), (i + 1) * len(numbers))
                rows = {k: x[own] for k, x in metrics.items()}
                directory.append(end, rows, tuple(x[own] for x in scores))
            if diverged.all():
                raise Diverged(f"every seed diverged: {_named(lanes, diverged)}; {ADVICE}")
            if (new := diverged != before).any():
                progress.say(f"diverged: {_named(lanes[new], diverged[new])}; {ADVICE}")
            if end in at_checkpoints:
                held = whole(seeds)
                for i, directory in enumerate(directories):
                    directory.save(end, _part(held, i, len(points)), clock)
            score = means(metrics).get(algorithm.measure.name)
            note = "" if score is None else f"{algorithm.measure.label} {score:.4g}"
            progress.advance((end - begin) * work, note)
    finally:
        progress.close()
        for directory in directories:
            directory.close()
    each = {k: x / len(points) for k, x in clock.items()}
    facts = {"devices": [d.device_kind for d in mesh.devices.flat], "jax": jax.__version__}
    learned, ends = whole(seeds.state.learned), diverged.reshape(len(points), -1)
    return [
        directory.summarise(_part(learned, i, len(points)), ends[i], each, facts)
        for i, directory in enumerate(directories)
    ]


def _compile(
    algorithm: Algorithm,
    mesh: Mesh,
    size: int,
    names: list[str],
    seeds: Seeds,
    floats: Floats,
    roots: Key[Array, " seeds"],
) -> tuple[Callable, Callable]:
    """`_updates` in chunks of up to `size`, and evaluations by keys of `roots`, on the mesh."""

    def score(state, root, update):
        return algorithm.evaluate(state, jr.fold_in(root, update))

    chunk, number = partial(_updates, algorithm, size, names), np.int32(0)
    out = shardings(mesh, seeds), None
    specs = SPLIT, SPLIT, WHOLE, WHOLE
    train = program(mesh, chunk, specs, donate_argnums=0, out_shardings=out)
    evaluate = program(mesh, jax.vmap(score, (0, 0, None)), (SPLIT, SPLIT, WHOLE))
    train = train.lower(seeds, floats, number, number).compile()
    return train, evaluate.lower(seeds.state, roots, number).compile()


def _marks(num_updates: int, count: int) -> list[int]:
    """0, `num_updates`, and marks between that divide it evenly in at most `count` parts."""
    count = min(count, num_updates)
    return sorted({num_updates * i // count for i in range(count + 1)})


def _updates(
    algorithm: Algorithm,
    size: int,
    names: list[str],
    seeds: Seeds,
    floats: Floats,
    begin: Array,
    count: Array,
) -> tuple[Seeds, dict[str, Array]]:
    """`count` <= `size` updates of every seed after the first `begin`, and their columns."""

    def step(number, seed, floats):
        state, report = algorithm.step(floats, seed.state)
        columns = _columns(algorithm.measure, report)
        facts = [*jax.tree.leaves((state.learned, report.metrics)), report.weight]
        facts += [jnp.where(report.weight > 0, report.score, 0.0)]
        finite = jnp.stack([jnp.isfinite(x).all() for x in facts if _is_number(x)]).all()
        diverged = jnp.where((seed.diverged == 0) & ~finite, number, seed.diverged)
        healthy = diverged == 0
        learned = jax.tree.map(partial(jnp.where, healthy), state.learned, seed.state.learned)
        columns = {k: jnp.where(healthy, v, jnp.nan) for k, v in columns.items()}
        return Seeds(state._replace(learned=learned), diverged), columns

    def train(seed, floats):
        def body(i, carry):
            seed, rows = carry
            seed, columns = step(begin + i + 1, seed, floats)
            return seed, {k: rows[k].at[i].set(columns[k]) for k in names}

        rows = {k: jnp.zeros(size) for k in names}
        return lax.fori_loop(0, count, body, (seed, rows))

    if jax.default_backend() != "cpu":
        return over_steps(train)(seeds, floats)

    # a core is not faster with several seeds at once, whose products are slower side by side
    def turn(i, carry):
        own = jax.tree.map(lambda x: x[i], (carry[0], floats))
        put = lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, 0)
        return jax.tree.map(put, carry, train(*own))

    rows = {k: jnp.zeros((len(seeds.diverged), size)) for k in names}
    return lax.fori_loop(0, len(seeds.diverged), turn, (seeds, rows))


def _names(measure: Measure, report: Report) -> list[str]:
    """The columns of an update's cells."""
    weight = [] if measure.weight is None else [measure.weight]
    return [measure.name, *weight, *report.of_episodes, *report.metrics]


def _columns(measure: Measure, report: Report) -> dict[str, Array]:
    """An update's cells by the names of their columns; nan where no episode has ended."""
    ended = {measure.name: report.score, **report.of_episodes}
    columns = {k: jnp.where(report.weight > 0, v, jnp.nan) for k, v in ended.items()}
    if measure.weight is not None:
        columns[measure.weight] = report.weight
    return columns | report.metrics


def _is_number(x: Array) -> bool:
    """Not a key or an integer."""
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _named(lanes: np.ndarray, diverged: np.ndarray) -> str:
    """Seeds, and the updates in which something of theirs was not finite."""
    return ", ".join(f"{n} at update {u}" for n, u in zip(lanes, diverged, strict=True))


@partial(jax.jit, static_argnums=2)
def _slice(tree: PyTree, index: int | Array, count: int) -> PyTree:
    """One of `count` equal parts of a tree's leaves."""
    size = lambda x: len(x) // count
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, index * size(x), size(x)), tree)


def _part(tree: PyTree, index: int, count: int) -> PyTree:
    """The same; all of it, untouched, where that is the only one."""
    return tree if count == 1 else _slice(tree, index, count)
