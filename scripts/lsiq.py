"""LS-IQ for stateful policies, LSIQ-RS of Al-Hafez et al. (2024): SAC on a reward implicit in Q.

The critics regress on the largest value where the expert chose, and where the policy did on what
pays least. The environment's reward is never used.

    python scripts/lsiq.py                  # S2PG on Pendulum from positions; an expert first
    python scripts/lsiq.py --memory none    # without memory
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).parent))

import demonstrate
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import sac
from jaxtyping import Array, PRNGKeyArray

from spg.estimators.actor_critic import polyak
from spg.estimators.imitation import lsiq_target
from spg.kernels.factory import DRAWN, make_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Count, Fraction, Needs, NonNegative, Positive, Range, Total
from spg.scans import join_segments
from spg.training import cli, loop, replay
from spg.training.demonstrations import Demonstrations
from spg.training.descent import regress
from spg.training.imitation import ImitationConfig, measured, open_demonstrations
from spg.training.loop import Report, State
from spg.training.off_policy import algorithm, staleness, update, with_statistics
from spg.types import Env


@dataclass(frozen=True)
class Config(ImitationConfig, sac.Config):
    """The training, e.g. --total-steps 1e6 --penalty 10 --expert-target bootstrapped"""

    env: str = "Pendulum-v1"
    observe: Literal["all", "positions", "velocities", "state", "nothing"] = "positions"
    total_steps: Total = 100_000
    """environment steps of each seed, after those of --learning-starts"""
    learning_starts: Count = 2_048
    """steps of each seed by the first policy: for the statistics, and again to fill the buffer"""
    gamma: Annotated[float, Range(0, 1, open="high")] = 0.95
    """discount; values are within 1 / (c (1 - γ))"""
    state_learning_rate: Annotated[NonNegative, Needs(memory=DRAWN)] = 3e-4
    """of Adam, for the cell that places z', and its noise (s2pg, bptt)"""
    temperature: Positive = 0.03
    """τ_a, the weight of the entropy of actions, at the start"""
    learn_temperature: bool = False
    """keep the entropy of actions at --target-entropy"""
    target_entropy: Annotated[float, Range(-100, 0.69), Needs(learn_temperature="True")] = -1.0
    """nats for each dimension of an action; 0.69 is that of uniform ones"""
    penalty: Positive = 0.5
    """c, the weight of the squares of implicit rewards, which are within ±1/c"""
    expert_target: Literal["fixed", "bootstrapped"] = "fixed"
    """what Q regresses on at the expert's steps: its largest value, or 1/c and what follows"""
    final_rate: Fraction = 0.0
    """the share of the learning rates that is left at the end; they fall linearly"""


def init(
    config: Config, env: Env, key: PRNGKeyArray,
    *, expert: Demonstrations, policy: Callable[..., Kernel] = make_kernel,
) -> State:  # fmt: skip
    """SAC's, and the demonstrations with the z' of the first policy."""
    key, expert_key = jr.split(key)
    state = sac.init(config, env, key, policy=policy)
    kernel, critic = state.learned.kernel, state.learned.critic
    steps = expert.steps(kernel, oracle=config.memory == "oracle", privileged=config.privileged)
    kernel, critic = with_statistics(kernel, critic, steps.obs)
    roll = kernel.roll(steps, key=expert_key)
    steps = steps._replace(z=roll.z, z_next=roll.z_next)
    size = jnp.int32(len(steps.reward))
    ring = replay.Ring(jax.tree.map(lambda x: x[:, None], steps), jnp.int32(0), size)
    learned = state.learned._replace(kernel=kernel, critic=critic, slow=critic, expert=ring)
    return state._replace(learned=learned)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then gradient steps."""
    return update(config, env, partial(gradient_step, config), config.num_gradients, state)


def gradient_step(
    config: Config, state: tuple[sac.Learned, replay.Ring], key: PRNGKeyArray
) -> tuple[tuple[sac.Learned, replay.Ring], dict[str, Array]]:
    """Policy and temperatures, then critics, on a sample of the buffer and one of the expert.

    This is the order of SAC; LSIQ-RS moves the critics first. Temperatures see no expert steps.
    """
    *place_keys, policy_key, next_key = jr.split(key, 4)
    learned, ring = state
    assert learned.expert is not None
    config = slower(config, learned.opt_states[1])
    rings = [ring, learned.expert]
    places = [
        replay.places(r, **config.sample, key=k) for r, k in zip(rings, place_keys, strict=True)
    ]
    taken = [replay.take(r, place) for r, place in zip(rings, places, strict=True)]
    segments = jax.tree.map(lambda *x: jnp.concatenate(x), *taken)
    own = lambda tree: jax.tree.map(lambda x: x[: len(x) // 2], tree)  # what is not the expert's
    kernel, kernel_state, actor_loss, choice = sac.actor_step(config, learned, segments, policy_key)
    log_temperature, temperature_state = sac.temperature_step(config, learned, own(choice))
    if config.last:
        segments, places = jax.tree.map(lambda x: x[:, -1:], (segments, places))
    steps, z_next = join_segments((segments, choice.z_next))
    label = jnp.repeat(jnp.array([0.0, 1.0]), len(steps.reward) // 2)
    # V(s', z'): what SAC regresses on where nothing is paid, discounted or over
    nothing = steps._replace(reward=0 * label, terminated=label < 0)
    undiscounted = replace(config, gamma=1.0)
    v_next = sac.targets(undiscounted, learned._replace(kernel=kernel), nothing, z_next, next_key)
    goal = lsiq_target(
        v_next, steps.terminated, label, c=config.penalty, gamma=config.gamma,
        fixed=config.expert_target == "fixed",
    )  # fmt: skip
    critic, critic_state, metrics = regress(
        config.learning_rate, learned.critic, learned.opt_states[1], steps, z_next, goal
    )
    v_policy, v_expert = (jnp.mean(x) for x in jnp.split(goal, 2))
    metrics |= {
        "actor_loss": actor_loss,
        "target": v_policy,
        "target_expert": v_expert,
        "entropy": -own(choice).log_prob_action.mean(),
        "entropy_z": -own(choice).log_prob_z.mean(),
        "temperature": learned.temperatures[0],
        "staleness": staleness(choice.z_next, segments.z_next),
    }
    if config.refreshes:
        halves = [jax.tree.map(lambda x, i=i: jnp.split(x, 2)[i], choice.z_next) for i in (0, 1)]
        rings = [replay.refresh(r, p, z) for r, p, z in zip(rings, places, halves, strict=True)]
    slow = polyak(learned.slow, critic, config.target_rate)
    opt_states = kernel_state, critic_state, temperature_state
    learned = sac.Learned(kernel, critic, slow, log_temperature, opt_states, rings[1])
    return (learned, rings[0]), metrics


def slower(config: Config, opt_state: optax.OptState) -> Config:
    """With the learning rates of the gradient step that comes next."""
    count = optax.tree_utils.tree_get(opt_state, "count")
    num_gradients = config.total_steps // config.rollout_size * config.num_gradients
    share = 1 - (1 - config.final_rate) * count / num_gradients
    rates = ("learning_rate", "actor_learning_rate", "state_learning_rate")
    return replace(config, **{name: share * vars(config)[name] for name in rates})


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    demonstrate.ensure(config)
    count, length = config.sample["num_segments"], config.sample["length"]
    expert = open_demonstrations(config, least=(count + 1) * length - 1)  # see `replay.holds`
    start = partial(init, expert=expert, policy=policy)
    return measured(algorithm(config, "lsiq", init=start, step=step), expert)


if __name__ == "__main__":
    cli.main(Config, make)
