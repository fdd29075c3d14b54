"""A stand-in for learning that compiles in no time: a random walk, as a script of its own."""

import os
import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from spg.rollout import Evaluation
from spg.training import cli, loop, options
from spg.training.loop import Report, State


@dataclass(frozen=True)
class Config(options.RunConfig):
    checkpoints: int = 2
    num_updates: int = 20
    rate: float = 0.5
    diverge: dict[str, int] = field(default_factory=dict)
    """the update in which a seed turns nan"""
    sizes: tuple[int, ...] = (3,)
    pause: float = 0.0
    """seconds of an update"""
    unrolled: int = 0
    """operations that take long to compile"""


class Learned(NamedTuple):
    kernel: dict
    empty: jax.Array
    key: jax.Array  # a key may be anywhere


def make(config: Config) -> loop.Algorithm:
    seeds = config.seed + np.arange(config.num_seeds)
    roots = jax.vmap(lambda seed: jr.key_data(jr.split(jr.key(seed))[0]))(seeds)
    ends = jnp.asarray([config.diverge.get(str(seed), -1) for seed in seeds])

    def init(floats, key):
        end = ends[jnp.argmax((roots == jr.key_data(key)).all(1))]
        learned = Learned({"x": jnp.zeros(config.sizes)}, jnp.zeros((4, 0)), key)
        return State(learned, {"t": jnp.int32(0), "end": end}, key)

    def step(floats, state):
        key, noise = jr.split(state.key)
        number = state.world["t"] + 1
        x = state.learned.kernel["x"] + floats["rate"] * jr.normal(noise, config.sizes)
        x = jnp.where(number == state.world["end"], jnp.nan, x)
        for _ in range(config.unrolled):
            x = jnp.sin(x @ jnp.outer(x, x) + 0.1)
        if config.pause:
            sleep = lambda x: (time.sleep(config.pause), np.asarray(x))[1]
            x = jax.pure_callback(sleep, x, x, vmap_method="expand_dims")
        ended = number % 3 > 0  # else no episode ends
        report = Report(
            score=jnp.where(ended, x.sum(), jnp.nan),
            weight=jnp.where(ended, 2.0, 0.0),
            metrics={"loss": x[0] ** 2, "count": number},
            of_episodes={"episode_length": jnp.where(ended, 7.0, jnp.nan)},
        )
        learned = state.learned._replace(kernel={"x": x})
        return State(learned, state.world | {"t": number}, key), report

    def evaluate(state, key):
        x = state.learned.kernel["x"].sum()
        return Evaluation(x + jr.normal(key), x)

    return loop.Algorithm(
        name="walk",
        title="walk",
        init=init,
        step=step,
        kernel=lambda state: state.learned.kernel,
        evaluate=evaluate,
        export=lambda learned, out: None,
        num_updates=config.num_updates,
        steps_per_update=10,
        floats={"rate": config.rate},
    )


if __name__ == "__main__":
    cli.main(Config, make)
