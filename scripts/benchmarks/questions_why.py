"""What z carries over training, and where the credit arrives: S2PG on RepeatFirst, step by step.

Before each update, on fresh episodes of the sampled policy, for each step t of an episode:

    decoding   share of episodes whose cue a ridge regression reads off z_{t+1}, on the half of the
               episodes that it was not fitted on; chance is 1 / num_symbols
    credit     Σ_c p_c ‖E[x_t | c]‖² / E‖x_t‖²,   x_t = A_t ∇ log ω at the location of z_{t+1}

Credit is the share of the memory's score-times-advantage that is the same in all episodes with the
cue c: 0 where the advantage says nothing about what to write, 1 where it is all that counts.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray
from matplotlib.ticker import EngFormatter

from scripts.benchmarks.curves import ppo, task
from spg.estimators.returns import gae
from spg.rollout import reset, rollout
from spg.training import cli, loop, options
from spg.training.metrics import read_metrics
from spg.types import Env

NUM_EPISODES, RIDGE = 256, 1.0
BINS = 25


class Row(NamedTuple):
    env_steps: int
    step: int  # t
    decoding: float
    credit: float
    return_: float  # of the training, the same for all t


def decoding(
    z: Float[Array, "N n"], cue: Float[Array, "N c"], *, ridge: float = RIDGE
) -> Float[Array, ""]:
    """Share of the second half of the episodes whose cue, one-hot, the first half's fit finds."""
    half = len(z) // 2
    mean, std = z[:half].mean(0), z[:half].std(0)
    x = (z - mean) / (std + 1e-6)
    target = cue[:half] - cue[:half].mean(0)
    gram = x[:half].T @ x[:half] + ridge * jnp.eye(z.shape[1])
    guess = x[half:] @ jnp.linalg.solve(gram, x[:half].T @ target) + cue[:half].mean(0)
    return jnp.mean(guess.argmax(1) == cue[half:].argmax(1))


def credit(x: Float[Array, "N n"], cue: Float[Array, "N c"]) -> Float[Array, ""]:
    """Σ_c p_c ‖E[x | c]‖² / E‖x‖², without the bias of squaring a mean of n_c episodes."""
    count = jnp.maximum(cue.sum(0), 2.0)
    mean = cue.T @ x / count[:, None]
    square = cue.T @ jnp.sum(x**2, 1) / count
    known = jnp.sum(mean**2, 1)
    known = known - (square - known) / (count - 1)
    return count @ known / (count @ square + 1e-12)


def probe(config: ppo.Config, env: Env, learned: Any, key: PRNGKeyArray) -> dict[str, Array]:
    """Decoding and credit at each step of `NUM_EPISODES` episodes; the cue is their first entry."""
    kernel, critic = learned.kernel, learned.critic
    num_symbols, num_steps = env.spec.num_actions, env.params.max_steps_in_episode

    def episode(key):
        reset_key, key = jr.split(key)
        carry = reset(kernel, env, key=reset_key)
        traj = rollout(kernel, env, carry, num_steps=num_steps, key=key)[1]
        value = jax.vmap(critic)(traj.obs, traj.z)
        next_value = jax.vmap(critic)(traj.final_obs, traj.z_next)
        weights = {"gamma": config.gamma, "gae_lambda": config.gae_lambda}
        ends = traj.terminated, traj.truncated
        return traj, gae(traj.reward, value, next_value, *ends, **weights)

    traj, advantage = jax.vmap(episode)(jr.split(key, NUM_EPISODES))
    density = lambda obs, z, x: kernel.cell(kernel.normalizer(obs), z).log_prob(x)
    score = jax.vmap(jax.vmap(jax.grad(density, argnums=2)))(traj.obs, traj.z, traj.z_next)
    x = (advantage - advantage.mean())[..., None] * score
    cue = jax.nn.one_hot(traj.obs[:, 0, :num_symbols].argmax(1), num_symbols)
    found = {
        "decoding": jax.vmap(decoding, (1, None))(traj.z_next, cue),
        "credit": jax.vmap(credit, (1, None))(x, cue),
    }
    return {f"{k}_{t}": v[t] for k, v in found.items() for t in range(num_steps)}


def make(config: ppo.Config) -> loop.Algorithm:
    """PPO that reports `probe` in every update."""
    algorithm, env = ppo.make(config), options.make_env(config)

    def step(floats, state):
        seen = probe(config, env, state.learned, jr.fold_in(state.key, 1))
        state, report = algorithm.step(floats, state)
        return state, report._replace(metrics=report.metrics | seen)

    return algorithm._replace(step=step)


def measure(out: Path, changes: dict[str, Any]) -> list[Row]:
    """Train, and average over seeds and over the updates of each of at most `BINS` bins."""
    config = replace(task("recall10")[0], memory="s2pg", memory_gradient="score")
    config = replace(config, **{"total_steps": 1_000_000} | changes)
    cli.train(make, config, out / "training")
    data = read_metrics(out / "training")
    num_updates = data["update"].shape[1]
    rows = []
    for chosen in np.array_split(np.arange(num_updates), min(BINS, num_updates)):
        average = lambda name, chosen=chosen: float(np.nanmean(data[name][:, chosen]))
        steps = int(data["env_steps"][0, chosen[-1]])
        for t in range(sum(name.startswith("decoding_") for name in data)):
            found = (average(name) for name in (f"decoding_{t}", f"credit_{t}", "return"))
            rows.append(Row._make((steps, t, *found)))
    return rows


def table(rows: list[Row]) -> list[dict[str, float]]:
    """For each step of the episode: the last decoding, and when half of it and most credit came."""
    shown = []
    for t in sorted({row.step for row in rows}):
        some = [row for row in rows if row.step == t]
        last, chance = some[-1].decoding, some[0].decoding
        half = next(row for row in some if row.decoding >= min(last, (chance + last) / 2))
        most = max(some, key=lambda row: row.credit)
        shown.append(
            {
                "step": t,
                "decoding at first": chance,
                "at last": last,
                "half way after": half.env_steps,
                "most credit": most.credit,
                "after": most.env_steps,
            }
        )
    return shown


def draw(rows: list[Row], path: Path) -> None:
    """Environment steps to the right, steps of the episode upwards."""
    steps, t = (sorted({getattr(row, k) for row in rows}) for k in ("env_steps", "step"))
    shape = len(steps), len(t)
    figure, axes = plt.subplots(
        3, 1, figsize=(7.0, 7.6), sharex=True, height_ratios=(1, 2, 2), layout="constrained"
    )
    axes[0].plot(steps, [row.return_ for row in rows if row.step == 0])
    axes[0].set(ylabel="return")
    axes[0].grid(alpha=0.3)
    for ax, kind in zip(axes[1:], ("decoding", "credit"), strict=True):
        found = np.array([getattr(row, kind) for row in rows]).reshape(shape)
        top = 1.0 if kind == "decoding" else None
        image = ax.pcolormesh(steps, t, found.T, shading="nearest", vmin=0, vmax=top)
        figure.colorbar(image, ax=ax, label=kind)
        ax.set(ylabel="step of the episode, t")
    axes[-1].set(xlabel="environment steps per seed")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(path, dpi=150)
    plt.close(figure)
