"""Environments: Gymnax, Brax, our own and yours, behind one `make`."""

import dataclasses
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from gymnax.environments.environment import Environment
from jaxtyping import Array, ArrayLike

from spg.envs import brax
from spg.envs.adapters import (
    Adapter,
    AdapterState,
    ShowsState,
    View,
    entries,
    flat,
    own,
    own_and_state,
)
from spg.envs.brax import Brax, capsules, render
from spg.envs.cards import RecallCards
from spg.envs.hidden_bodies import HiddenBodies
from spg.envs.memory import RepeatFirst, TMaze
from spg.envs.point_mass import Doors, PointMass
from spg.envs.popgym import TASKS
from spg.envs.repeat_vector import RepeatVector
from spg.envs.tabular import Tabular, tabular_params
from spg.limits import Range
from spg.types import Env
from spg.worlds import WORLDS
from spg.worlds.markov import ringworld
from spg.worlds.models import Problem

__all__ = [
    "Adapter",
    "AdapterState",
    "Brax",
    "Doors",
    "HiddenBodies",
    "PointMass",
    "RecallCards",
    "RepeatFirst",
    "RepeatVector",
    "ShowsState",
    "TMaze",
    "Tabular",
    "capsules",
    "make",
    "render",
    "shows_state",
    "tabular_params",
]

OBSERVABLE = ("all", "positions", "velocities", "state", "nothing")


def _episodes(make: Callable[..., Problem]) -> Callable[..., Environment]:
    """A finite world in episodes: 100 steps of RingWorld, 200 of any other."""
    num_steps = 100 if make is ringworld else 200

    def episodes(**keywords: Any) -> Environment:
        return Tabular(make(**keywords), max_steps_in_episode=num_steps)

    setattr(episodes, "__signature__", inspect.signature(make))  # noqa: B010
    return episodes


_OWN: dict[str, Callable[..., Environment]] = {
    "TMaze-memory": TMaze,
    "RepeatFirst-memory": RepeatFirst,
    "RepeatVector-memory": RepeatVector,
    "RecallCards-memory": RecallCards,
    "PointMass-memory": PointMass,
    "Doors-memory": Doors,
    **{f"{name}-pomdp": _episodes(make) for name, make in WORLDS.items()},
    **TASKS,
}
# Gymnax's physics, and the fields of their states that are velocities. The environment itself is
# asked where velocities appear in the observation.
_VELOCITY_FIELDS = {
    "CartPole-v1": ("x_dot", "theta_dot"),
    "Pendulum-v1": ("theta_dot",),
    "Acrobot-v1": ("velocity_1", "velocity_2"),
    "MountainCar-v0": ("velocity",),
    "MountainCarContinuous-v0": ("velocity",),
    "Reacher-misc": ("angle_vels",),
    "Swimmer-misc": ("xy_vel",),
}


def make(
    env: str | Environment,
    *,
    observe: str = "all",
    previous_action: bool = False,
    privileged: bool = False,
    backend: str | None = None,
    **params: Any,
) -> Env:
    """Open an environment, with its parameters.

    `env` is a name: of Gymnax, `brax/<name>`, `popgym/<name>`, or one of our own;
    `package.module:Class` for a Gymnax environment of yours that can be imported from there or from
    the working directory; or such an environment itself.

    | `observe` | the policy sees |
    | --- | --- |
    | "all" | the environment's own observation |
    | "positions", "velocities" | those entries of the own observation alone |
    | "state" | enough to make the process Markov (but for the clock that truncates) |
    | "nothing" | its own previous action, which has to be on |

    The "state" of Gymnax's and Brax's physics is the own observation, and behind it what
    `HiddenBodies` draws. An environment with `see_state` says itself what its "state" is. For all
    others every leaf of the hidden state follows the own observation. `privileged` gives the critic
    the "state" apart. `backend` is for Brax alone. The remaining keywords are fields of the
    environment's parameters or of its constructor. Raises ValueError for what cannot be opened.
    """
    _check("field to observe", observe, OBSERVABLE)
    for word, value in params.items():
        if word == "max_steps_in_episode":
            Range(1, 2**31 - 1, whole=True).check(word, value)
        elif isinstance(value, float):
            Range().check(word, value)
    opened, env_params = _open(env, backend, params)
    if observe in ("positions", "velocities"):
        velocity = _velocity_entries(opened, env_params)
        if velocity is None or not velocity.any():
            raise ValueError(
                f"{opened.name!r} shows no velocities to hide; observe all or state instead"
            )
        view = partial(entries, np.flatnonzero(velocity == (observe == "velocities")))
    elif observe == "nothing":
        if not previous_action:
            raise ValueError(
                "observe 'nothing' shows the previous action alone: previous_action on"
            )
        view = partial(entries, np.zeros(0, int))
    else:
        view = own if observe == "all" else _state_view(opened)
    critic = _state_view(opened) if privileged else None
    try:
        adapter = Adapter(
            opened, env_params, policy=view, critic=critic, previous_action=previous_action
        )
    except TypeError as error:  # brax/swimmer of Brax 0.14 on JAX 0.10, for one
        raise ValueError(
            f"{opened.name!r} does not run with the installed versions of JAX and its own package: "
            f"{error}"
        ) from error
    return Env(adapter, env_params)


def shows_state(env: Env) -> bool:
    """Whether what the policy sees in an environment of `make` is its "state"."""
    adapter = env.environment
    return isinstance(adapter, Adapter) and adapter.policy == _state_view(adapter.inner)


def _state_view(env: Environment) -> View:
    """What makes the process Markov. Gymnax's physics show positions and velocities."""
    if isinstance(env, Brax) and env.bodies is None:
        return own
    if isinstance(env, ShowsState):
        return env.see_state
    return own if env.name in _VELOCITY_FIELDS else own_and_state


def _velocity_entries(env: Environment, params: Any) -> np.ndarray | None:
    """Entries of the observation that change with the velocities: [D] bool, or None if unknown."""
    if isinstance(env, Brax):
        return brax.velocity_entries(env)
    if env.name not in _VELOCITY_FIELDS:
        return None
    key = jr.key(0)

    @jax.jit
    def observe(speed: ArrayLike) -> Array:
        state = env.reset_env(key, params)[1]
        fields = _VELOCITY_FIELDS[env.name]
        moving = {f: jnp.full_like(vars(state)[f], speed) for f in fields}
        return flat(env.observe(key, state.replace(**moving), None, params))

    return np.asarray(observe(0.01) != observe(0.02))


def _open(
    named: str | Environment, backend: str | None, keywords: dict[str, Any]
) -> tuple[Environment, Any]:
    """Construct, then set: a keyword is a field of the parameters or else of the constructor."""
    if backend is not None:
        _check("backend", backend, brax.BACKENDS)
    name = named if isinstance(named, str) else named.name
    factory, arguments = _factory(named, backend)
    try:
        env: Any = factory()
    except (OSError, EOFError) as error:  # MNISTBandit alone reads a file, which it downloads
        raise ValueError(
            f"{name!r} needs data that Gymnax downloads, and they did not come: {error}"
        ) from error
    except TypeError as error:
        raise ValueError(f"{name!r} cannot be made without arguments: {error}") from error
    if arguments is None:
        arguments = list(inspect.signature(type(env)).parameters)
    fields = {f.name for f in dataclasses.fields(env.default_params)}
    for keyword in keywords:
        _check(f"parameter of {name}", keyword, sorted(fields.union(arguments)))
    if not fields.issuperset(keywords):
        env = factory(**{k: v for k, v in keywords.items() if k not in fields})
    return env, env.default_params.replace(**{k: v for k, v in keywords.items() if k in fields})


def _factory(
    named: str | Environment, backend: str | None
) -> tuple[Callable[..., Environment], list[str] | None]:
    """What makes the environment, and its keywords; None for those of the environment's class."""
    if isinstance(named, Environment):
        return lambda: named, []
    if named in _OWN:
        return _OWN[named], list(inspect.signature(_OWN[named]).parameters)
    if named in gymnax.registered_envs:
        return lambda **keywords: gymnax.make(named, **keywords)[0], None
    if ":" in named:
        return _imported(named), None
    _check(
        "environment", named, [*_OWN, *gymnax.registered_envs, *(f"brax/{n}" for n in brax.names())]
    )
    short = named.removeprefix("brax/")
    return partial(brax.load, short, backend), brax.arguments(short)


def _imported(place: str) -> type[Environment]:
    """The class at `package.module:Class`."""
    module, _, name = place.partition(":")
    here = os.getcwd()
    known = here in sys.path
    try:
        sys.path += [] if known else [here]
        found = vars(importlib.import_module(module)).get(name)
    except ImportError as error:
        raise ValueError(f"{place!r} cannot be imported: {error}") from error
    finally:
        if not known:
            sys.path.remove(here)
    if not (inspect.isclass(found) and issubclass(found, Environment)):
        raise ValueError(
            f"{place!r} is not a Gymnax environment, a class that derives from "
            "gymnax.environments.environment.Environment"
        )
    return found


def _check(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ValueError that names the near matches unless `value` is one of `choices`."""
    if value in choices:
        return
    lower = {choice.lower(): choice for choice in choices}
    near = [lower[c] for c in difflib.get_close_matches(value.lower(), lower, cutoff=0.5)]
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
    if not near:
        hint = f"choose from {', '.join(choices)}"
    raise ValueError(f"unknown {what} {value!r}; {hint}")
