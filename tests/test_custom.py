"""An environment, a cell and an optimiser of one's own, in the scripts as they are."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment

import spg
from scripts import ppo, reinforce
from spg import envs
from spg.kernels import CategoricalHead, Drawn, Kernel, Location, NormalAround, Normalizer
from spg.training import loop, on_policy
from spg.training.records import open_run


@struct.dataclass
class State:
    place: jax.Array
    goal: jax.Array
    time: jax.Array


@struct.dataclass
class Params:
    length: int = 3
    max_steps_in_episode: int = 8


class Corridor(Environment):
    """Walk to the end that the first observation names; `ends` is their number."""

    num_actions = 2
    name = "Corridor"

    def __init__(self, ends: int = 2):
        self.ends = ends

    @property
    def default_params(self):
        return Params()

    def reset_env(self, key, params):
        goal = jr.bernoulli(key).astype(jnp.int32) * (self.ends - 1)
        state = State(jnp.int32(0), goal, jnp.int32(0))
        return self.observe(key, state, None, params), state

    def step_env(self, key, state, action, params):
        state = State(state.place + 2 * action - 1, state.goal, state.time + 1)
        reached = self.is_terminated(state, params)
        reward = 1.0 * (reached & ((state.place > 0) == (state.goal > 0)))
        return self.observe(key, state, action, params), state, reward, reached, {}

    def observe(self, key, state, action, params):
        cue = jnp.where(state.time == 0, 2.0 * state.goal - 1.0, 0.0)
        return jnp.stack([cue, state.place / params.length])

    def is_terminated(self, state, params):
        return jnp.abs(state.place) >= params.length

    def action_space(self, params=None):
        return spaces.Discrete(2)

    def observation_space(self, params=None):
        return spaces.Box(-1, 1, (2,), jnp.float32)


HERE = f"{__name__}:Corridor"


def walk_right(env):
    """Observations of a walk to the right, and its rewards."""
    obs, state = env.reset(jr.key(0))
    seen, rewards = [obs], []
    for _ in range(2):
        obs, state, reward, terminated, _, info = env.step(jr.key(1), state, 1)
        seen.append(info["final_observation"])
        rewards.append(float(reward))
    return np.stack(seen), rewards, bool(terminated), state


@pytest.mark.parametrize("env", [Corridor(), HERE], ids=["instance", "import"])
def test_a_gymnax_environment_of_yours_opens_with_its_parameters(env):
    opened = envs.make(env, length=2, observe="state")
    assert (opened.params.length, opened.params.max_steps_in_episode) == (2, 8)
    seen, rewards, terminated, _ = walk_right(opened)
    assert seen[:, 1].tolist() == [0, 0.5, 1]  # its own observation
    assert seen[:, 2].tolist() == [0, 1, 2]  # then the hidden state: place, goal, time
    assert rewards == [0, seen[0, 3]]
    assert terminated
    with pytest.raises(ValueError, match="did you mean 'length'"):
        envs.make(env, lenght=2)
    with pytest.raises(ValueError, match="'Corridor' shows no velocities to hide"):
        envs.make(env, observe="positions")


def test_constructor_arguments_reach_a_class_and_not_an_instance():
    assert envs.make(HERE, ends=1).environment.inner.ends == 1
    with pytest.raises(ValueError, match="unknown parameter of Corridor 'ends'"):
        envs.make(Corridor(), ends=1)


class Endless(Corridor):
    """It has no clock."""

    @property
    def default_params(self):
        return Params(max_steps_in_episode=None)


class Needy(Corridor):
    def __init__(self, ends):
        super().__init__(ends)


@pytest.mark.parametrize("script", [ppo, reinforce])
def test_a_world_without_a_clock_is_refused(script):
    with pytest.raises(ValueError, match="need max_steps_in_episode, a number of steps"):
        script.make(script.Config(env=f"{__name__}:Endless", observe="all"))


def test_a_class_that_needs_arguments_is_refused():
    with pytest.raises(ValueError, match=r"Needy' cannot be made without arguments: .*'ends'"):
        envs.make(f"{__name__}:Needy")


def test_a_module_is_found_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine_to_import.py").write_text(
        "from gymnax.environments.classic_control.pendulum import Pendulum\nPENDULUM = Pendulum()\n"
    )
    monkeypatch.chdir(tmp_path)
    assert envs.make("mine_to_import:Pendulum", dt=0.1).params.dt == 0.1
    with pytest.raises(ValueError, match="'mine_to_import:PENDULUM' is not a Gymnax environment"):
        envs.make("mine_to_import:PENDULUM")
    with pytest.raises(ValueError, match="'mine_to_import:Pendulm' is not a Gymnax environment"):
        envs.make("mine_to_import:Pendulm")
    with pytest.raises(ValueError, match="'nowhere:Pendulum' cannot be imported: No module"):
        envs.make("nowhere:Pendulum")


class RunningMean(Location):
    """z' = z + r ⊙ (B o - z)."""

    rate: jax.Array
    inputs: eqx.nn.Linear

    def __call__(self, obs, z):
        return z + jax.nn.sigmoid(self.rate) * (self.inputs(obs) - z)


def make_mine(config, spec, *, key):
    """A kernel with a memory of one's own, in place of `make_kernel`."""
    cell_key, head_key = jr.split(key)
    size, inputs = config.z_size, eqx.nn.Linear(spec.obs_size, config.z_size, key=cell_key)
    cell = Drawn(NormalAround(RunningMean(jnp.zeros(size), inputs), jnp.full(size, -1.5)))
    head = CategoricalHead([spec.obs_size + size, *config.hidden, spec.num_actions], key=head_key)
    return Kernel(cell, head, Normalizer(spec.obs_size), jnp.zeros(size))


@pytest.mark.slow
def test_ppo_trains_a_cell_in_an_environment_with_an_optimiser_of_yours(tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy, "optimiser", lambda config: optax.adamw(1e-3, weight_decay=0.5))
    config = ppo.Config(
        env=HERE, observe="all", cell="linear", z_size=3, hidden=(4,), num_envs=4, num_steps=8,
        num_minibatches=2, num_epochs=1, total_steps=64, num_seeds=2, checkpoints=1,
        eval_episodes=2, out=str(tmp_path / "run"),
    )  # fmt: skip
    algorithm = ppo.make(config, policy=make_mine)
    loop.run(config, algorithm, open_run(config, algorithm.name))
    run = spg.load(tmp_path / "run", make=make_mine)
    assert isinstance(run.kernels.cell.distribution.location, RunningMean)
    assert isinstance(run.env.environment.inner, Corridor)
    assert (run.kernels.normalizer.count > 0).all()
    gone = replace(config, env="test_nowhere:Corridor")
    with pytest.raises(ValueError, match="cannot be imported"):
        ppo.make(gone)
