"""What `offpolicy_times.py` times: gradient steps on random data, and steps of an environment.

A program takes up the state that it left, so that it need not copy the buffer, as in a training.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray

sys.path.insert(0, str(Path(__file__).parents[1]))

import sac
import td3

from spg.kernels.factory import make_kernel
from spg.training.loop import State
from spg.training.off_policy import collect, start
from spg.types import Env, Observation, Spec

NUM_GRADIENTS = 4  # of a timing; a multiple of TD3's policy delay
NUM_STEPS = 16  # of a timing of a single environment


class Random:
    """In place of an environment: random observations of the sizes that `sizes` names."""

    def __init__(self, sizes: Spec):
        self.sizes = sizes

    def spec(self, params: Any) -> Spec:
        return self.sizes

    def reset(self, key: PRNGKeyArray, params: Any) -> tuple[Observation, Array]:
        policy_key, critic_key = jr.split(key)
        policy = jr.normal(policy_key, (self.sizes.obs_size,))
        return Observation(policy, jr.normal(critic_key, (self.sizes.critic_size,))), jnp.zeros(())

    def step(self, key: PRNGKeyArray, state: Array, action: Array, params: Any) -> tuple:
        obs_key, key = jr.split(key)
        obs, _ = self.reset(obs_key, params)
        terminated = jr.bernoulli(key, 1e-3)
        info = {"final_observation": obs}
        return obs, state, obs.critic[0], terminated, jnp.array(False), info


def learners(configs: Sequence[Any], spec: Spec) -> list[Callable[[], Any]]:
    """Gradient steps of each configuration, which differ in the batch alone, on one state."""
    first = configs[0]
    if first.memory == "oracle":
        spec = spec._replace(obs_size=spec.critic_size)
    init = (td3 if isinstance(first, td3.Config) else sac).init
    state = jax.jit(partial(init, first, Env(Random(spec), None)))(jr.key(0))
    held = [jax.tree.map(jnp.copy, state)]
    return [_advance(partial(_learn, config), held) for config in configs]


def actors(config: Any, env: Env) -> list[Callable[[], Any]]:
    """A rollout of environments side by side, and NUM_STEPS steps of a single one."""
    kernel = make_kernel(config, env.spec, key=jr.key(0))

    def act(sizes, state):
        key, act_key = jr.split(state[1])
        return collect(sizes, env, kernel, state[0], act_key)[0], key

    calls = []
    for count, num_steps in ((config.num_envs, config.num_steps), (1, NUM_STEPS)):
        sizes = replace(config, num_envs=count, num_steps=num_steps)
        carry = jax.jit(partial(start, sizes, env, kernel))(jr.key(1))
        state = jax.tree.map(jnp.copy, (carry, jr.key(2)))
        calls.append(_advance(partial(act, sizes), [state]))
    return calls


def _advance(function: Callable[[Any], Any], held: list[Any]) -> Callable[[], Any]:
    """`function`, compiled, of what is held, and its result in that place: buffers are reused."""
    compiled = jax.jit(function, donate_argnums=0).lower(held[0]).compile()

    def call():
        held[0] = compiled(held[0])
        return held[0]

    return call


def _learn(config: Any, state: State) -> State:
    """NUM_GRADIENTS gradient steps."""
    key, learn_key = jr.split(state.key)
    step, count = sac.gradient_step, NUM_GRADIENTS
    if isinstance(config, td3.Config):
        step, count = td3.policy_step, NUM_GRADIENTS // config.policy_delay
    start = state.learned, state.world.ring
    (learned, ring), _ = lax.scan(partial(step, config), start, jr.split(learn_key, count))
    return State(learned, state.world._replace(ring=ring), key)
