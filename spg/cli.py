"""The command line of the scripts: shared options, and errors in one line."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import equinox as eqx
import jax
import jax.random as jr
import numpy as np
import tyro
from jaxtyping import PRNGKeyArray

from spg import controllers, gamp, graphs, records, training
from spg.kernels.finite import random_controller
from spg.kernels.kernel import Kernel
from spg.models import Problem
from spg.rollout import watch
from spg.types import Environment


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
    """how many checkpoints, each with an evaluation, a run writes (at most one an update)"""
    eval_episodes: int = 16
    """fresh episodes of each evaluation, sampled and noise-free, per seed"""


@dataclass(frozen=True)
class EnvConfig:
    """What every script that opens an environment offers."""

    env: str = "CartPole-v1"
    """a Gymnax environment, brax/<name>, or one of ours: TMaze-memory, RepeatFirst-memory,
    RecallCards-memory, and the finite worlds, as heavenhell-pomdp and ringworld-pomdp, in episodes
    of max_steps_in_episode"""
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


@dataclass(frozen=True)
class ProblemConfig:
    """What every script offers that trains a finite-state controller in a finite world."""

    problem: str = "loadunload"
    """tiger, loadunload, heavenhell, pentagon, factory, ringworld, one of the traps of k-step
    gradients (twostate, chain, matching, aggregated, cartpole), or a file in the .POMDP format"""
    num_z: int = 4
    """|G|, the number of I-states"""
    out_degree: int = 3
    """k, the random successors of each I-state and observation; num_z: all"""
    start_std: float = 0.0
    """standard deviation of the logits at the start"""


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
        **arguments(config.env_params),
    )


def arguments(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters as typed on the command line, whole numbers as integers."""
    return {k: int(v) if float(v).is_integer() else v for k, v in params.items()}


def open_problem(config: ProblemConfig) -> Problem:
    """The world that `config` names. Raises ValueError or OSError for what cannot be opened."""
    from spg.envs import WORLDS, pomdp_file  # here, as in `make_env`

    check_positive(config, "num_z", "out_degree")
    check_range(config, 0.0, float("inf"), "start_std")
    if config.out_degree > config.num_z:
        raise ValueError(f"out_degree {config.out_degree} is more than num_z {config.num_z}")
    if config.problem in WORLDS:
        return WORLDS[config.problem]()
    if Path(config.problem).suffix.lower() == ".pomdp" or Path(config.problem).is_file():
        return pomdp_file.read_pomdp(config.problem)
    known = ", ".join(WORLDS)
    raise ValueError(f"unknown problem {config.problem!r}; choose from {known}, or a .POMDP file")


def make_controller(config: ProblemConfig, problem: Problem, *, key: PRNGKeyArray) -> Kernel:
    """The controller that a training starts from."""
    return random_controller(
        config.num_z, problem.pomdp.num_obs, problem.pomdp.num_actions,
        out_degree=config.out_degree, std=config.start_std, key=key,
    )  # fmt: skip


def save_controller(kernels: Kernel, problem: Problem, out: Path) -> None:
    """Save the best of several controllers, `controller.npz`, and draw it where it is small.

    The best by the average reward of the controller that draws I-states, from the model.
    """
    solve = eqx.filter_jit(lambda kernel: gamp.solve(kernel, problem.pomdp))
    num = kernels.z0.shape[0]
    each = [jax.tree.map(lambda x: x[i], kernels) for i in range(num)]  # noqa: B023
    solutions = [solve(kernel) for kernel in each]
    rewards = [float(s.average_reward) if s.converged else -np.inf for s in solutions]
    best = int(np.argmax(rewards))
    controllers.save(out / "controller.npz", each[best], problem, solutions[best].law)
    title = f"{problem.name}, average reward of this controller"
    title = f"{title} {solutions[best].average_reward:.4g}"
    graphs.draw(out / "controller.png", each[best], problem, solutions[best].law, title)


def film(kernel: Kernel, env: Environment, env_params: Any, *, num_steps: int = 300) -> str | None:
    """A page that plays the noise-free policy in Brax; None for other environments."""
    from spg import envs

    if not isinstance(env, envs.Adapter) or not isinstance(env.inner, envs.Brax):
        return None
    play = jax.jit(lambda kernel, key: watch(kernel, env, env_params, num_steps=num_steps, key=key))
    return envs.render(env.inner, play(kernel, jr.key(0)).env)


def save_film(kernels: Kernel, env: Environment, env_params: Any, out: Path) -> None:
    """Write `rollout.html` for the first of the kernels, where `film` has a page."""
    page = film(jax.tree.map(lambda x: x[0], kernels), env, env_params)
    if page is not None:
        records.write(out / "rollout.html", page)


C = TypeVar("C", bound=RunConfig)


def main(
    config_type: type[C], make: Callable[[C], training.Algorithm], *, cores: bool = True
) -> None:
    """Parse the command line, train, and print the table of the final returns.

    With `cores` each core of a CPU becomes a device, see `use_cores`.

    Ends with status 2 and one line where the user erred, with 130 when interrupted.
    """
    config = tyro.cli(config_type)
    try:
        check_positive(config, "num_seeds", "checkpoints", "eval_episodes")
        if cores:
            use_cores(config.num_seeds)
        algorithm = make(config)
        directory = records.open_run(config, algorithm.name)
    except (ValueError, OSError, records.RunError) as error:
        fail(error)
    again = f"--out {directory} --resume goes on from the last checkpoint"
    print(f"{algorithm.title}; run directory {directory}", file=sys.stderr)
    try:
        print(records.table(directory, training.run(config, algorithm, directory)))
    except (records.RunError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(f"interrupted; the same command with {again}", file=sys.stderr)
        raise SystemExit(130) from None


def train(make: Callable[[C], training.Algorithm], config: C, out: Path) -> dict[str, Any]:
    """The summary of a run; of the same configuration, if its directory is there already."""
    config = replace(config, out=str(out), resume=(out / "config.json").exists())
    algorithm = make(config)
    records.open_run(config, algorithm.name)
    if (out / "summary.json").exists():
        return json.loads((out / "summary.json").read_text())
    print(f"{algorithm.title}, {out.name}", file=sys.stderr)
    return training.run(config, algorithm, out)


def use_cores(num_seeds: int) -> None:
    """Make the cores of a CPU devices, over which the seeds are sharded; call before JAX starts.

    A core for each seed is faster than all cores on each small operation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        jax.config.update("jax_num_cpu_devices", training.largest_divisor(num_seeds, cores))


def fail(error: Exception) -> NoReturn:
    """End the process with one line and status 2."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def check_range(config: Any, low: float, high: float, *names: str) -> None:
    """Raise ValueError for the first of these fields that is out of the limits, or not finite."""
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and np.isfinite(value)):
            raise ValueError(f"{name} is {value}; it has to be from {low:g} to {high:g}")


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError for the first of these fields that is not at least 1."""
    for name in names:
        if (value := getattr(config, name)) < 1:
            raise ValueError(f"{name} is {value}; it has to be at least 1")
