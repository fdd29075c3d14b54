"""What the scripts share that learn from a replay buffer: options, experience, gradient steps."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree
from tyro.conf import Suppress

from spg.estimators.statistics import start_statistics
from spg.kernels.critics import QCritic
from spg.kernels.exploring import Exploring
from spg.kernels.factory import DRAWN, PolicyConfig, Unit
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Flat, Unseen
from spg.limits import (
    Constant,
    Count,
    Fraction,
    Needs,
    NonNegative,
    Positive,
    Range,
    Size,
    Total,
    check,
    fits,
)
from spg.rollout import Carry, Episodes, reset, rollout
from spg.scans import divisors
from spg.training import cli, loop, options, replay
from spg.training.devices import vmap_envs
from spg.types import Env, Transition, critic_view, policy_view

BPTT_LENGTH = 32  # L of bptt where none is given
SEVERAL = ("[2-9]*", "1?*")  # patterns of whole numbers from two on


@dataclass(frozen=True)
class OffPolicyConfig(options.EnvConfig, PolicyConfig, options.RunConfig):
    """The training, e.g. --total-steps 1e6 --buffer-size 5e5 --batch-size 256 --gamma 0.99"""

    env: str = "PointMass-memory"
    observe: Literal["all", "positions", "velocities", "state", "nothing"] = "all"
    privileged: bool = True
    """show the critic the full state"""
    memory: Literal["s2pg", "bptt", "window", "none", "oracle"] = "s2pg"
    """how z' follows from (o, z): drawn, computed, or a window; none and oracle have no memory, the
    oracle sees the state"""
    segment_length: Annotated[int, Range(0, 2**31 - 1, whole=True)] = 0
    """L, consecutive steps of a sample, which are run again from the first stored z: for s2pg the
    reach of a refresh, for bptt that of gradients too; 0: 32 for bptt, otherwise 1"""
    cell: Annotated[Unit, Needs(memory=DRAWN)] = "gated"
    """the unit that places z' (s2pg, bptt), as in `ppo.py`; leaky is for discrete actions"""
    z_size: Annotated[Size, Needs(memory=DRAWN)] = 16
    """size of the internal state (s2pg, bptt)"""
    state_std: Annotated[float, Range(1e-6, 5), Needs(memory="s2pg")] = 0.05
    """standard deviation of the noise on z' at the start, relative to the weight with which a unit
    takes up what is new (s2pg); it is learned where the policy's entropy counts, not by td3.py"""
    k: Annotated[int, Suppress] = 8  # of memories that are not for off-policy learning
    filter: Annotated[str, Suppress] = "belief"
    leak: Annotated[float, Suppress, Constant] = 0.1
    hidden: tuple[Size, ...] = (64, 64)
    """widths of the hidden layers of policy head and critics"""
    total_steps: Total = 600_000
    """environment steps of each seed, after those of --learning-starts"""
    num_envs: Count = 64
    """environments side by side"""
    num_steps: Count = 4
    """steps of each environment between updates"""
    updates_per_step: Annotated[float, Range(0, 1000, open="low"), Constant] = 8.0
    """gradient steps for a step of all environments; rounded to a whole number for a rollout"""
    batch_size: Count = 256
    """steps whose losses make a gradient"""
    buffer_size: Count = 131_072
    """steps of each seed that are kept, as many rollouts as they hold"""
    learning_starts: Count = 8_192
    """steps of each seed by the first policy: for the statistics, and again to fill the buffer"""
    gamma: Fraction = 0.99
    """discount"""
    learning_rate: Positive = 1e-3
    """of Adam, for critics and temperatures"""
    actor_learning_rate: Positive = 1e-3
    """of Adam, for the head of the policy"""
    state_learning_rate: Annotated[NonNegative, Needs(memory=DRAWN)] = 3e-5
    """of Adam, for the cell that places z', and its noise (s2pg, bptt). Where it moves as fast as
    the head, the head reads a memory whose meaning changes, and the buffer holds an old one"""
    noise_correlation: Annotated[float, Range(0, 1, open="high"), Needs(num_envs=SEVERAL)] = 0.95
    """every second environment explores, with noise on actions that keeps this share of itself from
    step to step; the returns reported are those of the others"""
    target_rate: Annotated[float, Range(0, 1, open="low")] = 0.05
    """the way that targets go to what is trained, in each gradient step"""
    layer_norm: bool = True
    """normalise the layers of critics"""
    refresh: Annotated[bool, Needs(memory=DRAWN)] = True
    """write the fresh z' of a sample into the buffer (s2pg, bptt)"""
    loss_steps: Annotated[
        Literal["every", "last"], Needs(segment_length=SEVERAL), Needs(memory="bptt")
    ] = "every"
    """the steps of a segment that have a loss: batch-size / L segments and every step, or, as in
    the paper's BPTT, batch-size segments and the last step"""
    critic_state: Annotated[bool, Needs(memory=("s2pg", "bptt", "window"))] = False
    """show the critics z', as theorem 2.3 of S2PG asks: what s2pg has to learn to write for later
    is learned so, with a --state-learning-rate of 3e-4 or so (RepeatVector-memory). Without it z'
    is placed for the action that follows at once, which was better on the memory point mass, where
    a cell remembers enough untrained, and on HalfCheetah"""
    critics: Annotated[int, Range(1, 100, whole=True)] = 2
    """of which the smallest counts in targets"""

    @property
    def last(self) -> bool:
        return self.loss_steps == "last"

    @property
    def refreshes(self) -> bool:
        return self.refresh and self.memory in DRAWN

    @property
    def sample(self) -> dict[str, int]:
        """The segments of a gradient, as `replay.places` takes them."""
        length = self.length(BPTT_LENGTH)
        return {
            "num_segments": self.batch_size if self.last else self.batch_size // length,
            "length": length,
        }

    @property
    def rollout_size(self) -> int:
        """Environment steps between updates."""
        return self.num_envs * self.num_steps

    @property
    def num_gradients(self) -> int:
        """Gradient steps of an update."""
        return round(self.updates_per_step * self.num_steps)

    @property
    def num_first(self) -> int:
        """Rollouts that fill the buffer before the first update."""
        return -(-self.learning_starts // self.rollout_size)

    @property
    def num_rows(self) -> int:
        """Of the buffer: a multiple of a rollout's."""
        return self.buffer_size // self.rollout_size * self.num_steps


class World(NamedTuple):
    """What off-policy data come from."""

    carry: Carry  # of each environment, with the state of an `Exploring` policy
    ring: replay.Ring


def begin(
    config: OffPolicyConfig, env: Env, key: PRNGKeyArray, *, policy: Callable[..., Kernel]
) -> tuple[Kernel, QCritic, World]:
    """Fresh networks, with the statistics of the first steps, and a buffer with as many more."""
    kernel_key, critic_key, env_key, first_key, fill_key = jr.split(key, 5)
    spec = env.spec
    kernel = policy(config, spec, key=kernel_key)
    feature = kernel.feature if config.critic_state else Unseen()
    critic = QCritic(
        spec.critic_size, spec.num_actions, feature(kernel.z0).size, [*config.hidden],
        num_critics=config.critics, layer_norm=config.layer_norm, feature=feature,
        key=critic_key,
    )  # fmt: skip
    carry = start(config, env, kernel, env_key)
    experience = lambda carry, key: collect(config, env, kernel, carry, key)[:2]
    carry, first = lax.scan(experience, carry, jr.split(first_key, config.num_first))
    kernel, critic = with_statistics(kernel, critic, first.obs)

    def fill(world, key):
        carry, steps, _ = collect(config, env, kernel, world.carry, key)
        return World(carry, replay.write(world.ring, steps)), None

    ring = replay.empty(jax.tree.map(lambda x: x[0, 0], first), config.num_rows)
    world, _ = lax.scan(fill, World(carry, ring), jr.split(fill_key, config.num_first))
    return kernel, critic, world


def start(config: OffPolicyConfig, env: Env, kernel: Kernel, key: PRNGKeyArray) -> Carry:
    """The start of an episode in every environment, for `collect`."""
    acting = Exploring(kernel, env.spec.num_actions, 0.0)
    return jax.vmap(lambda k: reset(acting, env, key=k))(jr.split(key, config.num_envs))


def collect(
    config: OffPolicyConfig, env: Env, kernel: Kernel, carry: Carry, key: PRNGKeyArray
) -> tuple[Carry, Transition, Episodes]:
    """A rollout of every environment: steps `[K, N, ...]`, with the actions that were taken.

    The episodes are those of environments that do not explore.
    """

    def run(kernel, correlation, carry, key):
        acting = Exploring(kernel, env.spec.num_actions, correlation)
        return rollout(acting, env, carry, num_steps=config.num_steps, key=key)

    correlations = config.noise_correlation * (jnp.arange(config.num_envs) % 2)
    keys = jr.split(key, config.num_envs)
    each = vmap_envs(run, (None, 0, 0, 0))
    carry, steps, episodes = each(kernel, correlations, carry, keys)
    steps = jax.tree.map(lambda x: x.swapaxes(0, 1), steps)
    episodes = jax.tree.map(lambda x: jnp.where(correlations == 0, x, 0.0).sum(0), episodes)
    action, (z, _), (z_next, _) = jnp.clip(steps.action, -1.0, 1.0), steps.z, steps.z_next
    return carry, steps._replace(action=action, z=z, z_next=z_next), episodes


def with_statistics(kernel: Kernel, critic: QCritic, obs: PyTree) -> tuple[Kernel, QCritic]:
    """Policy and critic that know these observations too."""
    return start_statistics(kernel, policy_view(obs)), start_statistics(critic, critic_view(obs))


def update(
    config: OffPolicyConfig,
    env: Env,
    learn: Callable[[tuple[Any, replay.Ring], PRNGKeyArray], Any],
    keys: int,
    state: loop.State,
) -> tuple[loop.State, loop.Report]:
    """A rollout of every environment into the buffer, then a scan of `learn` over so many keys.

    `learn` takes and returns (learned, ring), and gives metrics; `learned` has a kernel and a
    critic.
    """
    key, rollout_key, learn_key = jr.split(state.key, 3)
    learned = state.learned
    carry, steps, episodes = collect(config, env, learned.kernel, state.world.carry, rollout_key)
    kernel, critic = with_statistics(learned.kernel, learned.critic, steps.obs)
    opened = learned._replace(kernel=kernel, critic=critic), replay.write(state.world.ring, steps)
    (learned, ring), metrics = lax.scan(learn, opened, jr.split(learn_key, keys))
    report = loop.Report(
        score=episodes.return_sum / episodes.count,
        weight=episodes.count,
        metrics=jax.tree.map(jnp.mean, metrics),
        of_episodes={"episode_length": episodes.length_sum / episodes.count},
    )
    return loop.State(learned, World(carry, ring), key), report


def staleness(choice_z: PyTree, stored_z: PyTree) -> Array:
    """Mean absolute difference of the entries of z' as it is now and as it was stored."""
    apart = Flat()(jax.tree.map(lambda a, b: jnp.abs(a - b), choice_z, stored_z))
    return apart.sum() / max(1, apart.size)


def algorithm(
    config: OffPolicyConfig, name: str, *, init: Callable[..., Any], step: Callable[..., Any]
) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    check(config)
    env = options.make_env(config, oracle=config.memory == "oracle")
    rows, sample = config.num_first * config.num_steps, config.sample
    first = rows * config.num_envs
    each = f"{config.num_envs} x {config.num_steps} steps"
    num_updates = config.total_steps // config.rollout_size
    options.check_updates(config, num_updates, each)
    if env.spec.discrete:
        raise ValueError(
            f"{name} is for continuous actions, and those of {config.env} are discrete: "
            "scripts/ppo.py takes both"
        )
    if config.num_gradients < 1:
        raise ValueError(
            f"updates_per_step {config.updates_per_step} x num_steps {config.num_steps} is less "
            "than one gradient step; more of either would do"
        )
    if config.batch_size % sample["length"] and not config.last:
        raise ValueError(
            f"segments of {sample['length']} steps do not divide batch_size {config.batch_size}; "
            f"segment_length {divisors(config.batch_size)} would"
        )
    if config.num_rows < rows:
        raise ValueError(
            f"buffer_size {config.buffer_size} has no room for the {first} steps of "
            f"learning_starts, in rollouts of {each}; a larger buffer or fewer of these would do"
        )
    if not replay.holds(rows, config.num_envs, **sample):
        raise ValueError(
            f"the first {first} steps do not hold {sample['num_segments']} segments of "
            f"{sample['length']} steps; more learning_starts, or a smaller batch_size, would do"
        )
    ring = jax.eval_shape(partial(init, config, env), jr.key(0)).world.ring
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(ring))
    buffer = f"a buffer of {config.num_seeds} seeds x {config.buffer_size:,} steps"
    fits(config.num_seeds * size, buffer, on_device=True)
    from spg.envs import shows_state  # here: importing gymnax starts JAX's backend

    if config.memory in DRAWN and not (config.privileged or shows_state(env)):
        print(
            f"warning: the critics may not see the state (observe is {config.observe}). Learning "
            "them by bootstrapping together with the memory that would show the rest is unstable "
            "(Al-Hafez et al., 2024); --privileged shows it to them",
            file=sys.stderr,
        )
    return cli.in_episodes(
        config, env, name.upper(), name=name, init=init, step=step, num_updates=num_updates,
        steps_per_update=config.rollout_size, first_steps=2 * first, num_envs=config.num_envs,
    )  # fmt: skip
