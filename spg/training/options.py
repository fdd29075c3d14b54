"""What a command line says: the options that scripts share, and what they open.

Ranges stand beside the fields; `spg.limits.check` walks them.
"""

import dataclasses
import math
import sys
import textwrap
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.random as jr
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from spg import limits
from spg.kernels.factory import make_kernel
from spg.limits import Count, Needs, NonNegative, Range, Seed
from spg.training.devices import Shard
from spg.types import Env, Spec
from spg.worlds import WORLDS, read_pomdp
from spg.worlds.models import Problem


@dataclass(frozen=True)
class ProcessConfig:
    """One training in several processes, each started with the same command line"""

    distributed: bool = False
    """join the other processes, which Slurm, Open MPI, Kubernetes and Cloud TPU tell of; JAX's
    jax.distributed.initialize"""
    coordinator_address: str | None = None
    """of the first process, with a port that is free there, as 10.0.0.1:1234"""
    num_processes: Annotated[int | None, Range(1, 2**20, whole=True)] = None
    """how many there are"""
    process_id: Annotated[int | None, Range(0, 2**20, whole=True)] = None
    """of this one; 0 is the first, which writes the run directory"""


@dataclass(frozen=True)
class RunConfig(ProcessConfig):
    """The run, e.g. --num-seeds 8 --out runs/first, and later the same with --resume."""

    seed: Seed = 0
    """of the first training; the others take the next integers"""
    num_seeds: Count = 4
    """independent trainings, vmapped into one program"""
    shard: Shard = "auto"
    """what the devices share: seeds, and where some are left the environments of each; seeds alone;
    or environments alone, on a CPU also the cores"""
    out: str | None = None
    """directory of the run; by default a new one under runs/"""
    resume: bool = False
    """go on from the last checkpoint in --out, to the same bits, with the options of that run"""
    checkpoints: Count = 20
    """how many checkpoints, each with an evaluation, a run writes (at most one an update)"""
    eval_episodes: Count = 16
    """fresh episodes of each evaluation, sampled and noise-free, per seed"""


@dataclass(frozen=True)
class EnvConfig:
    """The environment, e.g. --env TMaze-memory --observe all --env-params length 50 noise 0.1"""

    env: str = "CartPole-v1"
    """a Gymnax environment, brax/<name>, package.module:Class of your own, or one of ours:
    TMaze-memory, RepeatFirst-memory, RepeatVector-memory, RecallCards-memory, PointMass-memory,
    Doors-memory, POPGym's tasks, as popgym/CountRecallEasy with --observe all, and the finite
    worlds, as heavenhell-pomdp and ringworld-pomdp, in episodes of max_steps_in_episode"""
    observe: Literal["all", "positions", "velocities", "state", "nothing"] = "positions"
    """what the policy sees"""
    previous_action: bool = False
    """append the previous action to the observation"""
    privileged: bool = False
    """show the critic the full state"""
    backend: Annotated[
        Literal["generalized", "spring", "positional", "mjx"] | None, Needs(env="brax/*")
    ] = None
    """physics of Brax; by default spring, the fastest on a CPU"""
    env_params: dict[str, Annotated[float, Range()]] = field(default_factory=dict)
    """parameters of the environment to change, e.g. --env-params length 50; bodies of Brax also
    take mass_range, payload, wind and smallest (the least of four sizes): drawn in every episode,
    shown to an oracle and to a privileged critic"""


@dataclass(frozen=True)
class ProblemConfig:
    """The problem and its controller, e.g. --problem heavenhell --num-z 20 --out-degree 2"""

    problem: str = "loadunload"
    """tiger, loadunload, heavenhell, pentagon, factory, ringworld, rooms, one of the traps of
    k-step gradients (twostate, chain, matching, aggregated, cartpole), or a .POMDP file"""
    num_z: Count = 4
    """|G|, the number of I-states"""
    out_degree: Count = 3
    """k, the random successors of each I-state and observation; num_z: all"""
    start_std: NonNegative = 0.0
    """standard deviation of the logits at the start"""
    start_hold: NonNegative = 0.0
    """above 0 every I-state is among its own successors, with this much on the logit at the start:
    I-states then hold what they were told, and memory has a gradient that samples can see"""


C = TypeVar("C")
GROUPS = {
    "EnvConfig": "environment",
    "ProblemConfig": "problem",
    "PolicyConfig": "policy",
    "ImitationConfig": "demonstrations",
    "Grid": "grid",
    "Config": "training",
    "RunConfig": "run",
    "ProcessConfig": "processes",
}
"""The headings of a help page, by the class that declares the options."""
CACHE = """
Compiled programs are kept in ~/.cache/spg/jax, where the next start of the same program finds them.
JAX_COMPILATION_CACHE_DIR names another directory; JAX_ENABLE_COMPILATION_CACHE=false keeps none.
"""
"""The end of a help page's description."""


def parse(
    config_type: type[C], args: Sequence[str] | None = None, *, default: C | None = None
) -> C:
    """The configuration that a command line asks for; what it leaves out is as in `default`.

    The help page has a group for what each base class brings, under its docstring. Whole numbers
    may be written 1e6.
    """
    values = {} if default is None else vars(default)
    owners: dict[str, list[str]] = {}  # by heading
    for f in dataclasses.fields(config_type):  # type: ignore[arg-type]
        title = GROUPS.get(_owner(config_type, f.name).__name__, "training")
        owners.setdefault(title, []).append(f.name)
    groups = {title: owners[title] for title in GROUPS.values() if title in owners}
    parts = {title: _part(config_type, names, values) for title, names in groups.items()}
    page: Any = dataclasses.make_dataclass(config_type.__name__, parts.items())
    omit = (tyro.conf.OmitArgPrefixes,)
    if len(parts) == 1:
        (page,), omit = parts.values(), ()
    text = _wrapped((sys.modules[config_type.__module__].__doc__ or "") + CACHE)
    parsed = tyro.cli(page, args=args, registry=NUMBERS, description=text, config=omit)
    said: dict[str, Any] = {}
    for title, names in groups.items():
        part = vars(parsed)[title] if omit else parsed
        said |= {name: vars(part)[name] for name in names}
    unsaid = {k: v for k, v in values.items() if _repeated(v) and not said[k]}
    return config_type(**said | unsaid)


def flag(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def words(config: Any, *, said: Collection[str] = ()) -> list[str]:
    """The command line that `parse` reads as `config`; defaults are left out, but for `said`."""
    found: list[str] = []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if value == default and f.name not in said:
            continue
        if isinstance(value, bool):
            found.append(flag(f.name if value else f"no_{f.name}"))
        elif isinstance(value, dict):
            found += [flag(f.name), *(str(x) for pair in value.items() for x in pair)]
        else:
            found += [flag(f.name), *map(str, value if isinstance(value, tuple) else (value,))]
    return found


def warn(config: Any) -> None:
    """Print a line on stderr for each option that was set in vain."""
    for line in limits.without_effect(config):
        print(f"warning: {line}", file=sys.stderr)


def _repeated(value: Any) -> bool:
    """Whether an option is a dictionary, or may be given several times."""
    tuples = isinstance(value, tuple) and any(isinstance(x, tuple) for x in value)
    return tuples or isinstance(value, dict)


def _owner(config_type: type, name: str) -> type:
    """The class that declares a field first."""
    return [c for c in config_type.__mro__ if name in vars(c).get("__annotations__", {})][-1]


def _part(config_type: type, names: list[str], values: dict[str, Any]) -> type:
    """`config_type` with these options alone, and `values` for defaults."""
    changed: list[Any] = []
    for f in dataclasses.fields(config_type):
        if f.name not in names:
            changed.append((f.name, f.type, field(init=False, default=None)))
        elif _repeated(value := values.get(f.name)):  # tyro would make options of it, or add to it
            changed.append((f.name, f.type, field(default_factory=type(value))))
        elif f.name in values:
            changed.append((f.name, f.type, field(default=value)))
    words = {"__doc__": _owner(config_type, names[0]).__doc__}
    return dataclasses.make_dataclass(
        config_type.__name__, changed, bases=(config_type,), frozen=True, namespace=words
    )


def _wrapped(text: str) -> str:
    """Paragraphs of 80 columns, examples as they are; tyro joins lines that are not indented."""
    paragraphs = [p if p.startswith(" ") else " ".join(p.split()) for p in text.split("\n\n")]
    indent = {"width": 79, "initial_indent": " ", "subsequent_indent": " "}
    return "\n\n".join(p if p.startswith(" ") else textwrap.fill(p, **indent) for p in paragraphs)


NUMBERS = ConstructorRegistry()
"""How tyro reads numbers: see `parse`."""


def integer(word: str) -> int | float:
    """A number as typed on the command line: whole ones as integers, also if written 1e6."""
    try:
        return int(word)
    except ValueError:
        value = float(word)
        return int(value) if value.is_integer() else value


@NUMBERS.primitive_rule
def _whole(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """An integer, also as 1e6; another number is passed on, for its range refuses it by name."""
    if info.type is not int:
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="INT", instance_from_str=lambda words: integer(words[0]),
        is_instance=lambda x: isinstance(x, int), str_from_instance=lambda x: [str(x)],
    )  # fmt: skip


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
    if config.out_degree > config.num_z:
        raise ValueError(f"out_degree {config.out_degree} is more than num_z {config.num_z}")
    if config.problem in WORLDS:
        return WORLDS[config.problem]()
    if Path(config.problem).suffix.lower() == ".pomdp" or Path(config.problem).is_file():
        return read_pomdp(config.problem)
    known = ", ".join(WORLDS)
    raise ValueError(f"unknown problem {config.problem!r}; choose from {known}, or a .POMDP file")


def check_updates(config: Any, num_updates: int, each: str) -> None:
    """Raise ValueError for fewer updates than one, or more than their metrics have room for."""
    if num_updates < 1:
        raise ValueError(
            f"total_steps {config.total_steps} is less than one update of {each}; fewer or "
            "shorter ones, or more steps, would do"
        )
    rows = num_updates / min(num_updates, config.checkpoints) * config.num_seeds
    limits.fits(
        8 * rows, f"the metrics of {num_updates:,} updates between {config.checkpoints} checkpoints"
    )


def longest_episode(env: Env) -> int:
    """Steps after which an episode is cut. Raises ValueError for a world that has no clock."""
    steps = getattr(env.params, "max_steps_in_episode", None)
    if steps is None:
        raise ValueError(
            "this world goes on for ever, and training needs episodes: its parameters need "
            "max_steps_in_episode, a number of steps"
        )
    return int(steps)


def check_rollout(config: Any, spec: Spec, num_steps: int) -> None:
    """Raise ValueError unless a kernel can be made, and it and a rollout fit into memory.

    `num_steps` are those of all environments of a seed.
    """
    kernel = jax.eval_shape(lambda key: make_kernel(config, spec, key=key), jr.key(0))
    leaves = [x for x in jax.tree.leaves(kernel) if hasattr(x, "shape")]
    weights = sum(math.prod(x.shape) for x in leaves)
    z_size = sum(math.prod(x.shape) for x in jax.tree.leaves(kernel.z0))
    numbers = 2 * (spec.obs_size + (spec.critic_size if config.privileged else 0) + z_size) + 3
    fits = partial(limits.fits, on_device=True)
    fits(16 * config.num_seeds * weights, f"a policy of {weights:,} numbers, with Adam,")
    size = 4 * config.num_seeds * num_steps * numbers
    fits(size, f"a rollout of {config.num_seeds} seeds x {num_steps:,} steps x {numbers} numbers")
    lanes = 2 * config.eval_episodes * (spec.obs_size + z_size)
    fits(4 * config.num_seeds * lanes, f"the evaluation in {config.eval_episodes:,} episodes")


def check_controller(config: ProblemConfig, problem: Problem, *, basis: int = 1) -> None:
    """Raise ValueError unless the tables, and `basis` functions of (s, g), fit into memory.

    Also for I-states that hold and have no other successor.
    """
    if config.start_hold > 0 and config.out_degree == 1 < config.num_z:
        raise ValueError("start_hold with out_degree 1 leaves no way to another I-state; take 2")
    size, num_obs, num_actions = (
        len(problem.states),
        problem.pomdp.num_obs,
        problem.pomdp.num_actions,
    )
    successors = num_obs * (config.num_z if config.out_degree < config.num_z else 0)
    tables = config.num_z * (successors + num_obs * (config.out_degree + num_actions))
    num_seeds = max(1, getattr(config, "num_seeds", 1))
    numbers = num_seeds * (tables + basis * size * config.num_z)
    limits.fits(
        4 * numbers, f"controllers of {config.num_z:,} I-states in {problem.name}", on_device=True
    )
