"""Brax behind the Gymnax contract.

Each episode starts from a reset of its own: every step draws one, used where an episode ended.
Measured on a 2-core CPU with 64 environments on the spring backend (scans of 32 random steps,
interleaved, medians of 9): 27 500 steps/s without any reset, 25 800 with this one (7 % more time)
and 27 900 with one start per slot refreshed every 32 steps, for ant; 17 600, 16 500 (7 %) and
18 100 for halfcheetah. The refreshed start costs nothing, but repeats starts within
its 32 steps and needs a hook outside `step`; so the fresh reset stays.
"""

import contextlib
import importlib
import inspect
import io
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from spg.envs.hidden_bodies import FIELDS, Hidden, HiddenBodies

BACKENDS = ("generalized", "spring", "positional", "mjx")


class BraxState(NamedTuple):
    brax: Any
    time: Int[Array, ""]
    hidden: Hidden | None = None


@struct.dataclass
class BraxParams:
    max_steps_in_episode: Any = 1000


class Brax(Environment):
    """A Brax environment: its `done` terminates, the clock of `params` truncates.

    Actions are in [-1, 1], as everywhere in Brax; keys may be typed or legacy. With `bodies` every
    episode draws masses, a payload, a wind or a size, which only the state shows.
    """

    def __init__(self, env: Any, name: str, bodies: HiddenBodies | None = None):
        self.brax, self.bodies = env, bodies
        self._name = name

    @property
    def default_params(self) -> BraxParams:
        return BraxParams()

    def reset_env(self, key: PRNGKeyArray, params: BraxParams) -> tuple[Any, BraxState]:
        hidden = None
        if self.bodies is not None:
            key, hidden_key = jr.split(key)
            hidden = self.bodies.draw(self.brax, key=hidden_key)
        state = BraxState(self._embodied(hidden).reset(key), jnp.int32(0), hidden)
        return state.brax.obs, state

    def step_env(
        self, key: PRNGKeyArray, state: BraxState, action: Array, params: BraxParams
    ) -> tuple[Any, BraxState, Array, Array, dict]:
        before = jax.tree.map(lambda x: x, state.brax)  # Brax writes into the state's dictionaries
        after = self._embodied(state.hidden).step(before, action)
        info = {"discount": 1.0 - after.done, "metrics": after.metrics}
        reward, terminated = jnp.asarray(after.reward), jnp.asarray(after.done, bool)
        state = BraxState(after, state.time + 1, state.hidden)
        return after.obs, state, reward, terminated, info

    def observe(self, key: PRNGKeyArray, state: BraxState, action: Any, params: BraxParams) -> Any:
        return state.brax.obs

    def is_terminated(self, state: BraxState, params: BraxParams) -> Bool[Array, ""]:
        return jnp.asarray(state.brax.done, bool)

    def see_state(self, obs: Array, state: BraxState) -> Array:
        """The own observation, which shows positions and velocities, and the hidden draws.

        (The joints of the spring and positional backends give way a little, which no observation of
        joints shows.)
        """
        return jnp.concatenate([obs, *map(jnp.ravel, jax.tree.leaves(state.hidden))])

    def _embodied(self, hidden: Hidden | None) -> Any:
        """The Brax environment of an episode."""
        if self.bodies is None or hidden is None:
            return self.brax
        return self.bodies.embody(self.brax, hidden)

    @property
    def name(self) -> str:
        return self._name

    @property
    def num_actions(self) -> int:
        return self.brax.action_size

    def action_space(self, params: BraxParams | None = None) -> spaces.Box:
        return spaces.Box(-1.0, 1.0, (self.brax.action_size,), jnp.float32)

    def observation_space(self, params: BraxParams | None = None) -> spaces.Box:
        shape = jax.eval_shape(self.brax.reset, jr.key(0)).obs.shape
        return spaces.Box(-jnp.inf, jnp.inf, shape, jnp.float32)


def names() -> list[str]:
    with _quiet():
        from brax import envs
    return list(envs._envs)  # Brax has no public list


def arguments(name: str) -> list[str]:
    """The keywords of `load`: those of a Brax environment's constructor, and `HiddenBodies`'."""
    with _quiet():
        from brax import envs
    keywords = inspect.signature(envs._envs[name]).parameters.values()
    own = [p.name for p in keywords if p.kind is not p.VAR_KEYWORD and p.name != "backend"]
    return [*own, "n_frames", *FIELDS]


def load(name: str, backend: str | None, **keywords: Any) -> Brax:
    """Open `name`. The default backend is spring, the fastest on a CPU, where Brax has it."""
    bodies = HiddenBodies(**{k: keywords.pop(k) for k in FIELDS if k in keywords})
    drawn = bodies != HiddenBodies()
    if drawn and name == "fast":
        raise ValueError(f"'brax/fast' has no bodies to change; leave out {', '.join(FIELDS)}")
    with _quiet():
        from brax import envs

        if backend is None:
            backend = "generalized" if name == "swimmer" else "spring"
        env = envs.get_environment(name, backend=backend, **keywords)
    return Brax(env, f"brax/{name}", bodies if drawn else None)


def velocity_entries(env: Brax) -> np.ndarray | None:
    """Which entries of the observation depend on a velocity: [D] bool, or None if unknown.

    The environment's own `_get_obs` is evaluated at two generic physics states that differ in the
    velocities of joints (`qd`) and bodies (`xd`) alone.
    """
    get_obs = getattr(env.brax, "_get_obs", None)  # `fast` has no physics and no such method
    if get_obs is None:
        return None
    rng = np.random.default_rng(0)

    def generic(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
        return (rng.standard_normal(leaf.shape) if inexact else np.zeros(leaf.shape)).astype(
            leaf.dtype
        )

    slow = jax.tree.map(generic, jax.eval_shape(env.brax.reset, jr.key(0)).pipeline_state)
    fast = slow.replace(qd=2 * slow.qd, xd=jax.tree.map(lambda x: 2 * x, slow.xd))
    wants_action = len(inspect.signature(get_obs).parameters) == 2  # the humanoids show torques
    action = (np.full(env.brax.action_size, 0.1, np.float32),) if wants_action else ()
    observe = jax.jit(lambda state: get_obs(state, *action))
    return np.asarray(observe(slow) != observe(fast))


def render(env: Brax, states: BraxState) -> str:
    """A page that plays `states`, `[T, ...]`, at the speed of the world.

    A browser needs a network to show the page, which loads Brax's viewer from jsdelivr and three.js
    from unpkg: no package that `spg` depends on has three.js as the module that the viewer imports.
    """
    with _quiet():
        from brax.io import html
    leaves, structure = jax.tree.flatten(jax.device_get(states.brax.pipeline_state))
    frames = [structure.unflatten(frame) for frame in zip(*leaves, strict=True)]
    return html.render(env.brax.sys.tree_replace({"opt.timestep": env.brax.dt}), frames)


def capsules(env: Brax, states: BraxState) -> tuple[np.ndarray, np.ndarray]:
    """The bodies of `states`, `[T, ...]`: ends of capsules `[T, n, 2, 3]`, radii `[n]`, in metres.

    A sphere is a capsule of length 0, a cylinder is rounded, and what else a model has is left out.
    """
    model, x = env.brax.sys.mj_model, jax.device_get(states.brax.pipeline_state.x)
    found = np.flatnonzero(np.isin(model.geom_type, (2, 3, 5)))  # sphere, capsule, cylinder
    body, size = model.geom_bodyid[found], model.geom_size[found]
    half = np.where(model.geom_type[found] == 2, 0, size[:, 1])[:, None] * [0.0, 0.0, 1.0]
    axis = _rotate(model.geom_quat[found], half)
    local = model.geom_pos[found][:, None] + np.stack([-axis, axis], 1)  # [n, 2, 3]
    fixed = lambda x, start: np.concatenate([np.tile(start, (len(x), 1, 1)), x], 1)
    pos, rot = fixed(x.pos, np.zeros(3)), fixed(x.rot, np.eye(4)[0])  # body 0 is the world
    return pos[:, body, None] + _rotate(rot[:, body, None], local), size[:, 0]


def _rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """v `[..., 3]` turned by unit quaternions `[..., 4]`, the real part first."""
    twice = 2 * np.cross(q[..., 1:], v)
    return v + q[..., :1] * twice + np.cross(q[..., 1:], twice)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Swallow what Brax and MuJoCo print, warn and log about themselves while they load."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mujoco: Any = importlib.import_module("mujoco")  # lazily; the stubs lack the handler
        handler = mujoco.get_mju_user_warning()
        mujoco.set_mju_user_warning(lambda message: None)  # else also a file MUJOCO_LOG.TXT
        try:
            yield
        finally:
            mujoco.set_mju_user_warning(handler)
