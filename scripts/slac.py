"""SLAC, Lee et al. (2020), algorithm 1: an actor of the history, critics of an inferred latent.

A model of what the policy sees is learned on short sequences. The critics see the latent that the
model infers and nothing of the state; the actor sees a window of observations and actions, and runs
without the model. No gradient of actor or critics reaches the model.

    python scripts/slac.py                   # Pendulum without velocities
    python scripts/slac.py --env brax/inverted_pendulum --total-steps 1e5
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray
from tyro.conf import Suppress

from spg.estimators.actor_critic import Choice, polyak, q_target, soft_loss, temperature_loss
from spg.estimators.latent import elbo, sequence
from spg.kernels.critics import QCritic
from spg.kernels.factory import make_kernel
from spg.kernels.kernel import Kernel
from spg.kernels.latent import LatentModel
from spg.kernels.networks import Unseen
from spg.limits import Count, Needs, Positive, Range, Size, Total
from spg.training import cli, loop, replay
from spg.training.descent import adam, descend, regress
from spg.training.loop import Report, State
from spg.training.off_policy import OffPolicyConfig, algorithm, begin, update
from spg.types import Env, Spec, Transition


@dataclass(frozen=True)
class Config(OffPolicyConfig):
    """The training, e.g. --total-steps 1e6 --segment-length 8 --latent-sizes 16 32"""

    env: str = "Pendulum-v1"
    observe: Literal["all", "positions", "velocities", "state", "nothing"] = "positions"
    previous_action: bool = True
    privileged: Annotated[bool, Suppress] = False  # the critics see the latent
    critic_state: Annotated[bool, Suppress] = False
    memory: Annotated[Literal["window"], Suppress] = "window"
    window: Size = 8
    """observations that the policy sees, each with the action before it; zeros, the mean of what is
    seen, stand for those before the episode"""
    segment_length: Annotated[int, Range(2, 2**31 - 1, whole=True)] = 8
    """L, steps of a sequence that the model explains; the critics see the latent at its end"""
    loss_steps: Annotated[Literal["last"], Suppress] = "last"
    batch_size: Count = 256
    """sequences, whose last steps make a gradient of actor and critics"""
    model_batch_size: Count = 32
    """sequences of these that make a gradient of the model"""
    total_steps: Total = 60_000
    """environment steps of each seed, after those of --learning-starts"""
    gamma: Annotated[float, Range(0, 1)] = 0.95
    """discount"""
    actions: Literal["tanh-normal"] = "tanh-normal"
    action_std: Annotated[float, Range(1e-6, 5)] = 1.0
    """of the normal under the tanh, at the start"""
    temperature: Positive = 0.01
    """α, the weight of the entropy of actions, at the start"""
    learn_temperature: bool = True
    """keep the entropy of actions at --target-entropy"""
    target_entropy: Annotated[float, Range(-100, 0.69), Needs(learn_temperature="True")] = -1.0
    """nats for each dimension of an action; 0.69 is that of uniform ones"""
    latent_sizes: tuple[Size, Size] = (16, 32)
    """entries of the two layers of the latent"""
    model_hidden: tuple[Size, ...] = (64, 64)
    """widths of the hidden layers of the model's distributions"""
    decoder_std: Positive = 0.1
    """standard deviation of an observation given the latent, in units of its own"""
    model_learning_rate: Positive = 1e-3
    """of Adam, for the model"""
    model_updates: Annotated[int, Range(0, 2**31 - 1, whole=True)] = 3_000
    """gradient steps of the model alone before the first update, on the first steps"""


class Learned(NamedTuple):
    kernel: Kernel
    critic: QCritic  # of the latent
    slow: QCritic  # the target networks
    log_temperature: Float[Array, ""]
    opt_states: tuple[optax.OptState, optax.OptState, optax.OptState, optax.OptState]
    model: LatentModel


def seen_size(spec: Spec) -> int:
    """Entries of an observation without the previous action, which the model explains.

    Raises ValueError if there are none.
    """
    size = spec.obs_size - spec.num_actions * spec.previous_action
    if size < 1:
        raise ValueError("the policy sees its actions alone: nothing is left that a model explains")
    return size


def init(config: Config, env: Env, key: PRNGKeyArray) -> State:
    """Fresh networks and a buffer with the first steps."""
    begin_key, critic_key, model_key, key = jr.split(key, 4)
    kernel, _, world = begin(config, env, begin_key, policy=make_kernel)
    spec = env.spec
    critic = QCritic(
        sum(config.latent_sizes), spec.num_actions, 0, [*config.hidden],
        num_critics=config.critics, layer_norm=config.layer_norm, normalize=False,
        feature=Unseen(), key=critic_key,
    )  # fmt: skip
    model = LatentModel(
        seen_size(spec), spec.num_actions, config.latent_sizes, [*config.model_hidden],
        decoder_std=config.decoder_std, key=model_key,
    )  # fmt: skip
    log_temperature = jnp.log(jnp.asarray(config.temperature, jnp.float32))
    opt_states = adam(kernel), adam(critic), adam(log_temperature), adam(model)
    learned = Learned(kernel, critic, critic, log_temperature, opt_states, model)
    return State(learned, world, key)


def step(config: Config, env: Env, state: State) -> tuple[State, Report]:
    """One update: a rollout of every environment, then gradient steps."""
    fit_key, key = jr.split(state.key)
    learned = fit(config, state.learned, state.world.ring, fit_key)
    state = State(learned, state.world, key)
    return update(config, env, partial(gradient_step, config), config.num_gradients, state)


def fit(config: Config, learned: Learned, ring: replay.Ring, key: PRNGKeyArray) -> Learned:
    """The model alone on the first steps, before the first update; later nothing is done."""
    few = {"num_segments": config.model_batch_size, "length": config.segment_length}

    def one(i, learned):
        place_key, model_key = jr.split(jr.fold_in(key, i))
        segments = replay.take(ring, replay.places(ring, **few, key=place_key))
        return model_step(config, learned, segments, model_key)[0]

    fresh = optax.tree.get(learned.opt_states[3], "count") == 0
    return lax.fori_loop(0, jnp.where(fresh, config.model_updates, 0), one, learned)


def gradient_step(
    config: Config, state: tuple[Learned, replay.Ring], key: PRNGKeyArray
) -> tuple[tuple[Learned, replay.Ring], dict[str, Array]]:
    """Model, actor, temperature, critics: a step of each on one sample of the buffer."""
    place_key, model_key, latent_key, actor_key = jr.split(key, 4)
    learned, ring = state
    segments = replay.take(ring, replay.places(ring, **config.sample, key=place_key))
    few = jax.tree.map(lambda x: x[: config.model_batch_size], segments)
    learned, terms = model_step(config, learned, few, model_key)
    latent = infer(learned, segments, latent_key)
    steps = jax.tree.map(lambda x: x[:, -1], segments)
    window = jax.vmap(lambda x: learned.kernel.roll(x, key=None).z_next[-1])(segments)
    kernel, kernel_state, actor_loss, choice = actor_step(
        config, learned, steps, window, latent[:, -1], actor_key
    )
    log_temperature, temperature_state = temperature_step(config, learned, steps, choice)
    q_next = jax.vmap(learned.slow)(latent[:, -1], choice.action, window)
    bonus = -jnp.exp(learned.log_temperature) * choice.log_prob_action
    goal = jax.vmap(partial(q_target, gamma=config.gamma))(
        steps.reward, steps.terminated, q_next, bonus
    )
    critic, critic_state, metrics = regress(
        config.learning_rate, learned.critic, learned.opt_states[1],
        steps._replace(obs=latent[:, -2]), window, goal,
    )  # fmt: skip
    metrics |= terms | {
        "actor_loss": actor_loss,
        "entropy": -choice.log_prob_action.mean(),
        "temperature": jnp.exp(learned.log_temperature),
    }
    slow = polyak(learned.slow, critic, config.target_rate)
    opt_states = kernel_state, critic_state, temperature_state, learned.opt_states[3]
    return (
        Learned(kernel, critic, slow, log_temperature, opt_states, learned.model),
        ring,
    ), metrics


def model_step(
    config: Config, learned: Learned, segments: Transition, key: PRNGKeyArray
) -> tuple[Learned, dict[str, Array]]:
    """A step up the bound on segments `[S, L]`, and its terms for a step of the environment."""
    sequences = jax.vmap(partial(sequence, learned.kernel, size=learned.model.obs_size))(segments)
    keys = jr.split(key, len(segments.reward))

    def loss(model):
        bound = jax.vmap(lambda x, key: elbo(model, x, key=key)[0])(sequences, keys)
        return -jnp.mean(jax.vmap(lambda x: x.total)(bound)), jax.tree.map(jnp.mean, bound)

    model, opt_state, _, terms = descend(
        config.model_learning_rate, loss, learned.model, learned.opt_states[3]
    )
    opt_states = *learned.opt_states[:3], opt_state
    metrics = {"reconstruction": terms.reconstruction, "kl": terms.kl, "reward_fit": terms.reward}
    return learned._replace(model=model, opt_states=opt_states), metrics


def infer(learned: Learned, segments: Transition, key: PRNGKeyArray) -> Float[Array, "S T y"]:
    """Latents of segments `[S, L]` and of the observations behind them, T = L + 1."""

    def one(segment, key):
        seq = sequence(learned.kernel, segment, size=learned.model.obs_size)
        return learned.model.infer(seq.x, seq.before, seq.first, key=key).latent

    return jax.vmap(one)(segments, jr.split(key, len(segments.reward)))


def actor_step(
    config: Config,
    learned: Learned,
    steps: Transition,
    window: Float[Array, "B w"],
    latent: Float[Array, "B y"],
    key: PRNGKeyArray,
) -> tuple[Kernel, optax.OptState, Array, Choice]:
    """A step of the actor where steps `[B]` led, its loss, and what it chose before the step.

    Where an episode ended nothing is chosen, so these count nothing.
    """
    keys = jr.split(key, len(window))

    def loss(kernel):
        draw = jax.vmap(lambda obs, z, key: kernel.sample_and_log_prob(obs, z, key=key))
        action, z_next, log_prob = draw(steps.final_obs, window, keys)
        q_value = jax.vmap(learned.critic)(latent, action, z_next)
        choice = Choice(q_value, action, z_next, log_prob.action, log_prob.z)
        weights = {"temperature": jnp.exp(learned.log_temperature), "state_temperature": 0.0}
        each = soft_loss(choice, **weights)
        return jnp.mean(jnp.where(steps.terminated, 0.0, each)), choice

    return descend(config.actor_learning_rate, loss, learned.kernel, learned.opt_states[0])


def temperature_step(
    config: Config, learned: Learned, steps: Transition, choice: Choice
) -> tuple[Float[Array, ""], optax.OptState]:
    """A step of the temperature, which keeps the entropy at its target, where it is learned.

    As for the actor, steps at which an episode ended count nothing.
    """
    old, state = learned.log_temperature, learned.opt_states[2]
    if not config.learn_temperature:
        return old, state
    goal = config.target_entropy * choice.action.shape[-1]

    def loss(log_temperature):
        each = temperature_loss(log_temperature, choice.log_prob_action, goal)
        return jnp.mean(jnp.where(steps.terminated, 0.0, each)), None

    return descend(config.learning_rate, loss, old, state)[:2]


def make(config: Config) -> loop.Algorithm:
    """What `loop.run` takes. Raises ValueError for what cannot run."""
    if config.model_batch_size > config.batch_size:
        raise ValueError(
            f"model_batch_size {config.model_batch_size} is more than batch_size "
            f"{config.batch_size}, of which it is a part"
        )
    return algorithm(config, "slac", init=init, step=step)


if __name__ == "__main__":
    cli.main(Config, make)
