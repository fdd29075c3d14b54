"""GAIL for stateful policies, GAIL-RS of Al-Hafez et al. (2024): PPO on a learned reward.

A discriminator D(s, a) tells the expert's steps from the policy's; the policy, of which it sees no
internal state, is paid for being taken for the expert. The environment's reward is never used.

    python scripts/gail.py                  # S2PG on Pendulum from positions; an expert first
    python scripts/gail.py --memory none    # without memory
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import demonstrate
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
import ppo
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray

from spg.estimators import imitation
from spg.estimators.statistics import start_statistics
from spg.kernels.critics import QCritic
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity, Unseen
from spg.limits import Count, Fraction, Needs, NonNegative, Positive, Size
from spg.rollout import Carry
from spg.scans import join_segments
from spg.training import cli, loop, on_policy
from spg.training.demonstrations import Demonstrations
from spg.training.descent import adam, descend
from spg.training.imitation import ImitationConfig, measured, open_demonstrations
from spg.training.loop import Report, State
from spg.types import Env, Spec, Transition, critic_view


@dataclass(frozen=True)
class Config(ImitationConfig, ppo.Config):
    """The training, e.g. --total-steps 1e6 --discriminator-steps 5 --loss least-squares"""

    env: str = "Pendulum-v1"
    privileged: bool = True
    """show critic and discriminator the full state"""
    num_steps: Count = 200
    """T, steps of each environment between updates: best whole episodes, so that the discriminator
    sees as much of their beginnings as the expert shows"""
    gamma: Fraction = 0.95
    """discount"""
    loss: Literal["logistic", "least-squares"] = "logistic"
    """of the discriminator, which makes the reward too"""
    discriminator_hidden: tuple[Size, ...] = (64, 64)
    """widths of the hidden layers of the discriminator"""
    discriminator_steps: Count = 10
    """gradient steps of the discriminator in an update, after those of the policy"""
    discriminator_batch: Count = 1000
    """steps of the expert in such a gradient, and as many of the policy"""
    discriminator_rate: Positive = 3e-4
    """of Adam, for the discriminator"""
    discriminator_entropy: Annotated[NonNegative, Needs(loss="logistic")] = 1e-3
    """c_H, the weight of the entropy of what the discriminator thinks (logistic)"""
    soft_labels: bool = False
    """draw labels from U(.8, .99) and U(.01, .1) in place of 1 and 0"""
    gradient_penalty: NonNegative = 1.0
    """weight of half the squared slope of the discriminator in what it sees, at all these steps"""


class Learned(NamedTuple):
    imitator: on_policy.Learned
    discriminator: QCritic  # of (s, a): one logit
    opt_state: optax.OptState

    @property
    def kernel(self) -> Kernel:
        """The policy."""
        return self.imitator.kernel


class World(NamedTuple):
    carry: Carry  # of every environment
    expert: Transition  # [N] the demonstrations


def init(
    config: Config, env: Env, key: PRNGKeyArray,
    *, expert: Demonstrations, policy: Callable[..., Kernel] = make_kernel,
) -> State:  # fmt: skip
    """PPO's, and a discriminator that has seen the demonstrations."""
    key, net_key = jr.split(key)
    state = ppo.init(config, env, key, policy=policy)
    discriminator = QCritic(
        env.spec.critic_size, env.spec.num_actions, 0, [*config.discriminator_hidden],
        num_critics=1, layer_norm=False, feature=Unseen(), key=net_key,
    )  # fmt: skip
    words = {"oracle": config.memory == "oracle", "privileged": config.privileged}
    steps = expert.steps(state.learned.kernel, **words)
    discriminator = start_statistics(discriminator, critic_view(steps.obs))
    learned = Learned(state.learned, discriminator, adam(discriminator))
    return State(learned, World(state.world, steps), state.key)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout that the discriminator pays, PPO on it, then the discriminator."""
    key, rollout_key, ppo_key, expert_key = jr.split(state.key, 4)
    imitator, discriminator, opt_state = state.learned
    carry, traj, episodes = on_policy.collect(
        config, env, imitator.kernel, state.world.carry, rollout_key
    )
    pay = {"logistic": imitation.logistic_reward, "least-squares": imitation.least_squares_reward}
    rows = join_segments(traj)
    reward = pay[config.loss](logits(env.spec, discriminator, rows))
    paid = traj._replace(reward=reward.reshape(traj.reward.shape))
    imitator, metrics = ppo.learn(config, imitator, paid, ppo_key)

    discriminator = start_statistics(discriminator, critic_view(traj.obs))
    learn = partial(discriminate, config, env.spec, rows, state.world.expert)
    keys = jr.split(expert_key, config.discriminator_steps)
    (discriminator, opt_state), of_loss = lax.scan(learn, (discriminator, opt_state), keys)
    metrics |= {"paid": reward.mean()} | jax.tree.map(jnp.mean, of_loss)
    learned, world = Learned(imitator, discriminator, opt_state), World(carry, state.world.expert)
    return State(learned, world, key), on_policy.report(episodes, metrics)


def discriminate(
    config: Config, spec: Spec, policy: Transition, expert: Transition,
    state: tuple[QCritic, optax.OptState], key: PRNGKeyArray,
) -> tuple[tuple[QCritic, optax.OptState], dict[str, Array]]:  # fmt: skip
    """A gradient step of the discriminator on as many steps of the expert as of the policy."""
    *keys, label_key = jr.split(key, 3)

    def draw(steps, key):
        rows = jr.randint(key, (config.discriminator_batch,), 0, len(steps.reward))
        return jax.tree.map(lambda x: x[rows], steps)

    batches = [draw(steps, key) for steps, key in zip((expert, policy), keys, strict=True)]
    label = jnp.repeat(jnp.array([1.0, 0.0]), config.discriminator_batch)
    soft = imitation.soft_labels(label, key=label_key) if config.soft_labels else label

    def loss(discriminator):
        logit = jnp.concatenate([logits(spec, discriminator, x) for x in batches])
        if config.loss == "logistic":
            each = imitation.logistic_loss(logit, soft, entropy_coef=config.discriminator_entropy)
        else:
            each = imitation.least_squares_loss(logit, soft)
        slope = jnp.concatenate([slopes(spec, discriminator, x) for x in batches])
        objective = each.mean() + config.gradient_penalty / 2 * slope.mean()
        return objective, jnp.mean((logit > 0) == (label > 0))

    discriminator, opt_state, value, right = descend(config.discriminator_rate, loss, *state)
    metrics = {"discriminator_loss": value, "discriminator_accuracy": right}
    return (discriminator, opt_state), metrics


def logits(spec: Spec, discriminator: QCritic, steps: Transition) -> Float[Array, " B"]:
    """D(s, a) of steps `[B]`."""
    return jax.vmap(lambda obs, a: discriminator(obs, a, None)[0])(steps.obs, taken(spec, steps))


def slopes(spec: Spec, discriminator: QCritic, steps: Transition) -> Float[Array, " B"]:
    """|∇D(s, a)|² of steps `[B]`, where s is standardised."""
    seen = jax.vmap(discriminator.normalizer)(critic_view(steps.obs))
    after = eqx.tree_at(lambda d: d.normalizer, discriminator, Identity())
    logit = lambda obs, a: after(obs, a, None)[0]
    return jax.vmap(partial(imitation.squared_slope, logit))(seen, taken(spec, steps))


def taken(spec: Spec, steps: Transition) -> Float[Array, "B a"]:
    """Actions of steps `[B]` as the environment takes them, within [-1, 1] or one-hot."""
    if spec.discrete:
        return jax.nn.one_hot(steps.action, spec.num_actions)
    return jnp.clip(steps.action, -1.0, 1.0)


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    demonstrate.ensure(config)
    if config.soft_labels and config.discriminator_entropy and config.loss == "logistic":
        raise ValueError(
            f"soft_labels and discriminator_entropy {config.discriminator_entropy} do the same; "
            "discriminator_entropy 0 would do"
        )
    expert = open_demonstrations(config, least=config.discriminator_batch)
    parts = {"init": partial(init, expert=expert, policy=policy), "step": step, "policy": policy}
    return measured(on_policy.algorithm(config, "gail", **parts), expert)


if __name__ == "__main__":
    cli.main(Config, make)
