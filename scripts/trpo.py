"""TRPO for stateful policies, TRPO-RS of Al-Hafez et al. (2024), lemma A.1, and its baselines.

An update is a rollout of every environment, a step of the policy along the natural gradient of its
joint distribution of actions and internal states, and epochs of minibatches for the critic.

    python scripts/trpo.py                # S2PG on CartPole without velocities
    python scripts/trpo.py --memory bptt  # by backpropagation through time
    python scripts/trpo.py --max-kl 0.01 --memory-gradient score
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from spg.estimators.statistics import observe, observe_critic
from spg.estimators.trust_region import fisher_product, trust_region_step
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.networks import trainable
from spg.limits import Count, NonNegative, Range
from spg.scans import join_segments
from spg.training import cli, loop, on_policy
from spg.training.loop import Report, State
from spg.training.on_policy import Learned, OnPolicyConfig
from spg.types import Env, Transition

NO_CLIP = 1e6  # finite: a slope of z' may be 0


@dataclass(frozen=True)
class Config(OnPolicyConfig):
    """The training, e.g. --total-steps 1e6 --num-envs 32 --max-kl 0.01 --cg-steps 20"""

    max_kl: Annotated[float, Range(0, open="low", usual="0.01 to 0.1 is usual")] = 0.05
    """δ, the largest mean KL from the old policy to the new one, of action and z' together"""
    cg_steps: Count = 10
    """of conjugate gradients, each with a Fisher-vector product"""
    damping: NonNegative = 0.1
    """λ, added to the diagonal of the Fisher matrix"""
    fisher_every: Count = 4
    """the Fisher matrix is that of every n-th segment; the KL that is limited is that of all"""


def init(
    config: Config, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel] = make_kernel
) -> State:
    """`on_policy.begin`; Adam moves the critic."""
    return on_policy.begin(config, env, key, policy=policy, adam=lambda agent: agent.critic)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, a step of the policy, epochs for the critic."""
    return on_policy.update(learn, config, env, state)


def learn(
    config: Config, learned: Learned, traj: Transition, key: PRNGKeyArray
) -> tuple[Learned, dict[str, Array]]:
    """A step of the policy and epochs of the critic on what the kernel recorded, and metrics."""
    kernel, critic, opt_state = learned
    (segments, *old, targets), explained = on_policy.weigh(config, kernel, critic, traj)
    moved, metrics = improve(config, kernel, segments, *old)

    def loss(critic, batch):
        value_loss = on_policy.value_loss(critic, *batch)
        return value_loss, {"value_loss": value_loss}

    fitted, opt_state, of_critic = on_policy.descend(
        config, loss, critic.rescale(targets), opt_state, (segments, targets), key
    )
    kernel = observe(moved, kernel, segments)
    critic = observe_critic(fitted, critic, segments)
    metrics = of_critic | metrics | {"explained_variance": explained}
    return Learned(kernel, critic, opt_state), metrics


def improve(
    config: Config, kernel: Kernel, segments: Transition, old: Any, advantage: Array
) -> tuple[Kernel, dict[str, Array]]:
    """The kernel after a step in the trust region, and metrics; all 0 where none was found."""
    params, fixed = eqx.partition(kernel, trainable(kernel))

    def objective(params):
        kernel = eqx.combine(params, fixed)
        surrogate, new = on_policy.surrogate(config, kernel, segments, old, advantage, clip=NO_CLIP)
        return jnp.mean(surrogate.objective) + config.entropy_coef * jnp.mean(new.entropy)

    def policy(segments, params):
        return join_segments(jax.vmap(eqx.combine(params, fixed).distributions)(segments))

    few = jax.tree.map(lambda x: x[:: config.fisher_every], segments)
    product = fisher_product(partial(policy, few), params)
    params, found, gradient = trust_region_step(
        objective, partial(policy, segments), product, params,
        max_kl=config.max_kl, damping=config.damping, cg_steps=config.cg_steps,
    )  # fmt: skip
    metrics = {"step_share": found.share, "gain": found.gain, **found.kl._asdict()}
    return eqx.combine(params, fixed), metrics | {"gradient_norm": optax.global_norm(gradient)}


def make(config: Config, *, policy: Callable[..., Kernel] = make_kernel) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    start = partial(init, policy=policy)
    return on_policy.algorithm(config, "trpo", init=start, step=step, policy=policy)


if __name__ == "__main__":
    cli.main(Config, make)
