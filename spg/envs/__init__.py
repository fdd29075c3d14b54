"""Environments: Gymnax, Brax and our own memory tasks behind one `make`."""

import dataclasses
import difflib
import inspect
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
from spg.envs.adapters import Adapter, AdapterState, View, entries, flat, own, own_and_state
from spg.envs.brax import Brax, render
from spg.envs.cards import RecallCards
from spg.envs.memory import RepeatFirst, TMaze
from spg.envs.tabular import Tabular, tabular_params
from spg.types import Env
from spg.worlds import WORLDS
from spg.worlds.markov import ringworld
from spg.worlds.models import Problem

__all__ = [
    "Adapter",
    "AdapterState",
    "Brax",
    "RecallCards",
    "RepeatFirst",
    "TMaze",
    "Tabular",
    "make",
    "render",
    "tabular_params",
]

OBSERVABLE = ("all", "positions", "velocities", "state")


def _episodes(make: Callable[..., Problem]) -> Callable[..., Environment]:
    """A finite world in episodes: 100 steps of RingWorld, 200 of any other."""
    num_steps = 100 if make is ringworld else 200

    def episodes(**keywords: Any) -> Environment:
        problem = make(**keywords)
        return Tabular(problem.pomdp, max_steps_in_episode=num_steps, slots=problem.slots)

    setattr(episodes, "__signature__", inspect.signature(make))  # noqa: B010
    return episodes


_OWN: dict[str, Callable[..., Environment]] = {
    "TMaze-memory": TMaze,
    "RepeatFirst-memory": RepeatFirst,
    "RecallCards-memory": RecallCards,
    **{f"{name}-pomdp": _episodes(make) for name, make in WORLDS.items()},
}
# The fields of Gymnax states that are velocities; where they appear in the observation is found
# out from the environment itself.
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
    name: str,
    *,
    observe: str = "all",
    previous_action: bool = False,
    privileged: bool = False,
    backend: str | None = None,
    **params: Any,
) -> Env:
    """Open an environment, with its parameters: Gymnax, `brax/<name>`, or one of our own.

    `observe` is what the policy sees: "all" of the environment's own observation; its entries that
    are "positions" or "velocities" alone; or the full "state", which is the own observation where
    that holds the velocities too, and elsewhere is followed by every leaf of the hidden state.
    `privileged` gives the critic the full state apart. `backend` is for Brax alone. The remaining
    keywords are fields of the environment's parameters or of its constructor.
    """
    _check("field to observe", observe, OBSERVABLE)
    env, env_params = _open(name, backend, params)
    if observe in ("positions", "velocities"):
        velocity = _velocity_entries(env, env_params)
        if velocity is None or not velocity.any():
            raise ValueError(f"{name!r} shows no velocities to hide; observe all or state instead")
        view = partial(entries, np.flatnonzero(velocity == (observe == "velocities")))
    else:
        view = own if observe == "all" else _full_view(env)
    critic = _full_view(env) if privileged else None
    try:
        env = Adapter(env, env_params, policy=view, critic=critic, previous_action=previous_action)
    except TypeError as error:  # brax/swimmer of Brax 0.14 on JAX 0.10, for one
        raise ValueError(
            f"{name!r} does not run with the installed versions of JAX and its own package: {error}"
        ) from error
    return Env(env, env_params)


def _full_view(env: Environment) -> View:
    has_velocities = env.name in _VELOCITY_FIELDS or isinstance(env, Brax)
    return own if has_velocities else own_and_state


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


def _open(name: str, backend: str | None, keywords: dict[str, Any]) -> tuple[Environment, Any]:
    """Construct, then set: a keyword is a field of the parameters or else of the constructor."""
    if backend is not None:
        _check("backend", backend, brax.BACKENDS)
    if name in _OWN:
        factory, arguments = _OWN[name], list(inspect.signature(_OWN[name]).parameters)
    elif name in gymnax.registered_envs:
        factory = lambda **kw: gymnax.make(name, **kw)[0]
        arguments = None
    else:
        brax_names = [f"brax/{n}" for n in brax.names()]
        _check("environment", name, [*_OWN, *gymnax.registered_envs, *brax_names])
        short = name.removeprefix("brax/")
        factory, arguments = partial(brax.load, short, backend), brax.arguments(short)
    env: Any = factory()
    if arguments is None:
        arguments = list(inspect.signature(type(env)).parameters)
    fields = {f.name for f in dataclasses.fields(env.default_params)}
    for keyword in keywords:
        _check(f"parameter of {name}", keyword, sorted(fields.union(arguments)))
    if not fields.issuperset(keywords):
        env = factory(**{k: v for k, v in keywords.items() if k not in fields})
    return env, env.default_params.replace(**{k: v for k, v in keywords.items() if k in fields})


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
