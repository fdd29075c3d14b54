"""What a command line says: the options that scripts share, their checks, and what they open."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from spg.types import Env
from spg.worlds import WORLDS, read_pomdp
from spg.worlds.models import Problem


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


def make_env(config: EnvConfig, *, oracle: bool = False) -> Env:
    """The environment that `config` names; an oracle sees the full state."""
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

    check_positive(config, "num_z", "out_degree")
    check_range(config, 0.0, float("inf"), "start_std")
    if config.out_degree > config.num_z:
        raise ValueError(f"out_degree {config.out_degree} is more than num_z {config.num_z}")
    if config.problem in WORLDS:
        return WORLDS[config.problem]()
    if Path(config.problem).suffix.lower() == ".pomdp" or Path(config.problem).is_file():
        return read_pomdp(config.problem)
    known = ", ".join(WORLDS)
    raise ValueError(f"unknown problem {config.problem!r}; choose from {known}, or a .POMDP file")


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
