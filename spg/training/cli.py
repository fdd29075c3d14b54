"""The command line of the scripts: shared options, and errors in one line."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from jaxtyping import PRNGKeyArray

from spg import limits
from spg.rollout import evaluation
from spg.training import devices, loop, options, processes, records, terminal
from spg.training.metrics import AVERAGE_REWARD
from spg.training.options import RunConfig
from spg.types import Env
from spg.worlds.models import Problem


def in_episodes(
    config: Any,
    env: Env,
    method: str,
    *,
    init: Callable[[Any, Env, PRNGKeyArray], loop.State],
    step: Callable[[Any, Env, loop.State], tuple[loop.State, loop.Report]],
    **sizes: Any,
) -> loop.Algorithm:
    """An algorithm that trains a policy, `learned.kernel`, in an environment with episodes.

    `config` has the fields of `EnvConfig`, `PolicyConfig` and `RunConfig`, and `sizes` is what else
    an `Algorithm` holds. Raises ValueError where `make_kernel` does, for a world without a clock,
    and for a rollout that does not fit into memory.
    """
    from spg.training import films  # here and below: matplotlib takes a second to load

    options.longest_episode(env)
    options.check_rollout(config, env.spec, sizes["steps_per_update"])
    kernel = lambda state: state.learned.kernel
    seen = options.describe(config, oracle=config.memory == "oracle")
    return loop.Algorithm(
        title=f"{method}, {config.memory}: {seen}",
        init=with_floats(init, config, env),
        step=with_floats(step, config, env),
        floats=floats(config, sizes["num_updates"], sizes["steps_per_update"]),
        kernel=kernel,
        evaluate=lambda state, key: evaluation(
            kernel(state), env, num_episodes=config.eval_episodes, key=key
        ),
        export=lambda learned, out: films.save_page(learned.kernel, env, out),
        **sizes,
    )


def floats(config: Any, num_updates: int, steps_per_update: int) -> loop.Floats:
    """The options whose values a program is not compiled for: floats, and the length of a run."""
    found: loop.Floats = limits.floats(config)
    if "total_steps" in vars(config):
        # half an update more: in single precision too it is as many updates
        found["total_steps"] = (num_updates + 0.5) * steps_per_update
    if "num_updates" in vars(config):
        found["num_updates"] = float(num_updates)
    return found


def with_floats(
    f: Callable[..., Any], config: Any, *fixed: Any
) -> Callable[[loop.Floats, Any], Any]:
    """`f(config, *fixed, x)` as a function of x and of options that are put into `config`."""
    return lambda floats, x: f(replace(config, **floats), *fixed, x)


def of_controllers(problem: Problem, method: str, **parts: Any) -> loop.Algorithm:
    """An algorithm that trains a finite-state controller, `learned.kernel`, in a finite world."""
    from spg.training import graphs

    shared: dict[str, Any] = {
        "title": f"{method}: {problem.name}",
        "kernel": lambda state: state.learned.kernel,
        "export": lambda learned, out: graphs.save_best(learned.kernel, problem, out),
        "measure": AVERAGE_REWARD,
    }
    return loop.Algorithm(**shared | parts)


C = TypeVar("C", bound=RunConfig)
T = TypeVar("T")


def main(config_type: type[C], make: Callable[[C], loop.Algorithm], *, cores: bool = True) -> None:
    """Parse the command line, train, and print the table of the final returns.

    With `cores` each core of a CPU becomes a device, see `use_cores`.

    Ends with status 2 and one line where the user erred, with 130 when interrupted.
    """
    with terminal.interruptible() as interruption, processes.together():
        try:
            config = parse(config_type)
            limits.check(config)
            options.warn(config)
            keep_programs()
            if cores:
                use_cores(sys.maxsize if config.shard == "envs" else config.num_seeds)
            processes.join(config)
            algorithm = make(config)
            alone = not algorithm.sharded
            devices.layout(config.shard, config.num_seeds, algorithm.num_envs, alone=alone)
            directory = Path(config.out or "")
            if processes.leads():
                directory = records.open_run(config, algorithm.name)
        except (ValueError, OSError, records.RunError) as error:
            fail(error)
        again = f"--out {directory} --resume goes on from the last checkpoint"
        interruption.line = f"interrupted; {again}" if processes.leads() else "interrupted"
        if processes.leads():
            print(f"{algorithm.title}; run directory {directory}", file=sys.stderr)
        from spg.training import summaries

        try:
            summary = loop.run(config, algorithm, directory)
            if processes.leads():
                print(summaries.table(directory, summary))
        except (records.RunError, OSError) as error:
            fail(error)


def parse(config_type: type[C], arguments: Sequence[str] | None = None) -> C:
    """What the command line says; on resumption, what it does not say is as it was.

    Raises RunError if there is nothing to resume.
    """
    config = options.parse(config_type, arguments)
    if not config.resume or config.out is None:
        return config
    then = records.read_config(Path(config.out), config_type)
    return options.parse(config_type, arguments, default=replace(then, out=config.out, resume=True))


def train(make: Callable[[C], loop.Algorithm], config: C, out: Path) -> dict[str, Any]:
    """The summary of a run; of the same configuration, if its directory is there already."""
    config = replace(config, out=str(out), resume=(out / "config.json").exists())
    algorithm = make(config)
    records.open_run(config, algorithm.name)
    if (out / "summary.json").exists():
        from spg.training import summaries

        return summaries.read_summary(out)
    print(f"{algorithm.title}, {out.name}", file=sys.stderr)
    return loop.run(config, algorithm, out)


def keep_programs() -> None:
    """Keep compiled programs on disk, as `options.CACHE` tells; if it cannot be, warn and go on.

    What the user has told JAX about its compilation cache holds.
    """
    if not jax.config.jax_enable_compilation_cache:  # type: ignore[attr-defined]
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = jax.config.jax_compilation_cache_dir or f"{home}/spg/jax"  # type: ignore[attr-defined]
    if "://" not in path:
        try:
            os.makedirs(path, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            print(f"warning: no compiled programs are kept: {error}", file=sys.stderr)
            jax.config.update("jax_enable_compilation_cache", False)
            return
    jax.config.update("jax_compilation_cache_dir", path)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # JAX's default is a second
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def use_cores(most: int) -> None:
    """Make cores of a CPU devices, `most` of them at most; call before JAX starts.

    A core for each seed is faster than all cores on each small operation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", min(most, cores))


def once(
    config_type: type[T], main: Callable[[T], Any], *, seeds: Callable[[T], int] | None = None
) -> None:
    """Parse the command line and call `main`, of a script that is no training of its own.

    With `seeds`, the number of trainings that a configuration shards, see `use_cores`.

    Ends with status 2 and one line where the user erred, with 130 when interrupted.
    """
    with terminal.interruptible():
        try:
            config = options.parse(config_type)
            options.warn(config)
            keep_programs()
            if seeds:
                use_cores(seeds(config))
            main(config)
        except (ValueError, OSError, records.RunError, subprocess.CalledProcessError) as error:
            fail(error)


def fail(error: Exception) -> NoReturn:
    """End the process with one line and status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2) from error
