"""Experts that act, and their episodes as demonstrations."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray, PyTree

from spg.kernels.kernel import Kernel
from spg.rollout import reset, rollout
from spg.training.demonstrations import Demonstrations
from spg.types import Env, critic_view, policy_view

EPISODES = 256  # whose mean is the return of the expert, and of random actions


class Expert(eqx.Module):
    """A trained kernel that acts; `sees_state`, if that is what it was trained with."""

    kernel: Kernel
    noise: bool = eqx.field(static=True)
    sees_state: bool = eqx.field(static=True)

    @property
    def z0(self) -> PyTree:
        return self.kernel.z0

    def reset(self, first: Bool[Array, ""], z: PyTree) -> PyTree:
        return self.kernel.reset(first, z)

    def sample(self, obs: PyTree, z: PyTree, *, key: PRNGKeyArray) -> tuple[Array, PyTree]:
        """A draw, or without noise the modes."""
        obs = critic_view(obs) if self.sees_state else policy_view(obs)
        return self.kernel.sample(obs, z, key=key) if self.noise else self.kernel.mode(obs, z)


class Random(eqx.Module):
    """Uniform actions."""

    discrete: bool = eqx.field(static=True)
    num_actions: int = eqx.field(static=True)

    @property
    def z0(self) -> PyTree:
        return jnp.zeros(0)

    def reset(self, first: Bool[Array, ""], z: PyTree) -> PyTree:
        return z

    def sample(self, obs: PyTree, z: PyTree, *, key: PRNGKeyArray) -> tuple[Array, PyTree]:
        if self.discrete:
            return jr.randint(key, (), 0, self.num_actions), z
        return jr.uniform(key, (self.num_actions,), minval=-1.0, maxval=1.0), z


def record(
    expert: Expert, env: Env, *, num_episodes: int, made: dict[str, Any], key: PRNGKeyArray
) -> Demonstrations:
    """Fresh episodes of the expert in an environment that shows critics the state apart.

    The returns of the expert and of random actions, which `made` tells, are those of as many as
    `EPISODES` others. Raises ValueError for a world without end.
    """
    steps = env.params.max_steps_in_episode
    if steps is None:
        raise ValueError(
            "this world goes on for ever, so it has no episodes to record; the parameter "
            "max_steps_in_episode gives it a clock"
        )

    @eqx.filter_jit
    def play(policy, keys):
        def one(key):
            start, key = jr.split(key)
            carry = reset(policy, env, key=start)
            traj = rollout(policy, env, carry, num_steps=int(steps), key=key)[1]
            done = traj.terminated | traj.truncated
            over = jnp.cumsum(done) - done > 0  # of a later episode
            return traj, ~over

        return jax.vmap(one)(keys)

    def mean_return(policy, key):
        traj, own = play(policy, jr.split(key, EPISODES))
        return float(jnp.sum(traj.reward * own, 1).mean())

    keys = jr.split(key, 3)
    traj, own = jax.device_get(play(expert, jr.split(keys[0], num_episodes)))
    flat = jax.tree.map(lambda x: x[own], traj)
    ends = flat.terminated | flat.truncated
    action = flat.action if env.spec.discrete else np.clip(flat.action, -1.0, 1.0)
    returns = {
        "expert_return": mean_return(expert, keys[1]),
        "random_return": mean_return(Random(env.spec.discrete, env.spec.num_actions), keys[2]),
    }
    critic = critic_view(flat.obs)
    return Demonstrations(
        policy_view(flat.obs), critic, action, flat.terminated, flat.truncated,
        policy_view(flat.final_obs)[ends], critic_view(flat.final_obs)[ends],
        hidden(critic, ends), (traj.reward * own).sum(1), made | returns,
    )  # fmt: skip


def hidden(
    critic: Float[np.ndarray, "N s"], ends: Bool[np.ndarray, " N"]
) -> Float[np.ndarray, "E h"]:
    """Those entries of the state that stay as they are in every episode, and differ between some.

    They are what an episode draws: a goal, the masses of a body.
    """
    episode = np.cumsum(ends) - ends
    opening = critic[np.roll(ends, 1)]
    constant = (critic == opening[episode]).all(0)
    return opening[:, constant & (opening != opening[0]).any(0)]
