"""Record episodes of a run's best policy, for the scripts that imitate it.

    python scripts/demonstrate.py                       # of an oracle on Pendulum, trained first
    python scripts/demonstrate.py runs/mine --episodes 50

The directory of the run gets `demonstrations.npz`. A policy that imitates them sees what the run
observes (`--observe`, `--previous-action`), also where the expert, an oracle, sees the full state.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parent))

import jax
import jax.random as jr
import numpy as np
import ppo
import tyro

import spg
from spg.limits import Count, Seed, check
from spg.training import cli, demonstrations, experts, options, policies, tables

RUN = "runs/expert"
DEFAULT = ppo.Config(
    env="Pendulum-v1", observe="positions", memory="oracle", gamma=0.95, total_steps=1_000_000,
    num_seeds=1, checkpoints=5, out=RUN,
)  # fmt: skip
"""The expert of the default runs."""
FEW = 10  # values of what episodes hide, whose returns are told one by one


@dataclass(frozen=True)
class Config:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")] = RUN
    """directory of a run; the default one is trained where it is not there"""
    episodes: Count = 20
    """to record"""
    sampled: bool = True
    """draw actions and internal states; the noise-free policy may rest at a single point, and does
    not show how to come back to it"""
    memoryless: str | None = None
    """directory of a run with --memory none in the same world, trained by reward; a warning, if the
    expert is no better"""
    seed: Seed = 0
    """of the episodes"""


def main(config: Config) -> None:
    check(config)
    out = Path(config.run)
    if config.run == RUN and not (out / "summary.json").exists():
        cli.train(ppo.make, DEFAULT, out)
    run = _open(config.run)
    best, key = _best(run, config)
    view = policies.part(options.EnvConfig, run.config)
    env = options.make_env(replace(view, privileged=True))
    made = {name: vars(view)[name] for name in demonstrations.WORLD + demonstrations.SEEN} | {
        "run": config.run,
        "memory": run.config["memory"],
        "policy_seed": run.seeds[best],
        "sampled": config.sampled,
        "seed": config.seed,
    }
    if config.memoryless is not None:
        made["memoryless_return"] = _memoryless_return(config.memoryless, made, config)
    expert = experts.Expert(run.kernel(best), config.sampled, run.config["memory"] == "oracle")
    found = experts.record(expert, env, num_episodes=config.episodes, made=made, key=key)
    demonstrations.save(out / "demonstrations.npz", found)
    if line := demonstrations.weakness(found):
        print(f"warning: {line}", file=sys.stderr)
    references = ", ".join(f"of {k} {v:.4g}" for k, v in demonstrations.references(found).items())
    print(
        f"{config.episodes} episodes, {len(found.action):,} steps, of seed {run.seeds[best]}; "
        f"return {found.returns.mean():.4g}, of {experts.EPISODES} others "
        f"{found.made['expert_return']:.4g}, {references}\n"
        f"{out / 'demonstrations.npz'}"
    )
    if rows := _by_hidden(found):
        print(tables.table(rows))


def ensure(config: Any) -> None:
    """Record the demonstrations of the default runs, if `config` asks for them and they lack."""
    path = Path(RUN) / "demonstrations.npz"
    asked = (config.demonstrations, config.env) == (str(path), DEFAULT.env)
    if asked and not path.exists() and jax.process_count() == 1:
        print(f"{path} is not there: an expert is trained and recorded first", file=sys.stderr)
        main(Config())


def _by_hidden(found: demonstrations.Demonstrations) -> list[dict[str, str]]:
    """Episodes and their mean return for each value of what they hide, if these are a few."""
    values, index = np.unique(found.hidden, axis=0, return_inverse=True)
    if not 1 < len(values) <= FEW:
        return []
    own = [found.returns[index.ravel() == i] for i in range(len(values))]
    return [
        {
            "hidden": ", ".join(f"{x:.4g}" for x in value),
            "episodes": str(len(returns)),
            "return": f"{returns.mean():.4g}",
        }
        for value, returns in zip(values, own, strict=True)
    ]


def _open(directory: str) -> spg.Run:
    run = spg.load(directory)
    if "problem" in run.config:
        raise ValueError(f"{directory} is of a finite-state controller, which is not imitated")
    return run


def _memoryless_return(directory: str, made: dict[str, Any], config: Config) -> float:
    """That of the best seed, sampled or noise-free as the expert is.

    Raises ValueError for a policy that remembers or sees what imitators do not, or another world.
    """
    run = _open(directory)
    if (memory := run.config["memory"]) != "none":
        raise ValueError(f"{directory} has memory {memory}; --memoryless is for a run with none")
    view = vars(policies.part(options.EnvConfig, run.config))
    demonstrations.check_world(directory, view, "the expert's run", made)
    best, key = _best(run, config)
    found = spg.evaluation(run.kernel(best), run.env, num_episodes=experts.EPISODES, key=key)
    return float(found.sampled if config.sampled else found.noise_free)


def _best(run: spg.Run, config: Config) -> tuple[int, jax.Array]:
    """The seed with the best mean return over fresh episodes, and a key for others."""
    key, eval_key = jr.split(jr.key(config.seed))
    if len(run.seeds) == 1:
        return 0, key
    one = lambda kernel: spg.evaluation(kernel, run.env, num_episodes=64, key=eval_key)
    found = jax.jit(jax.vmap(one))(run.kernels)
    return int((found.sampled if config.sampled else found.noise_free).argmax()), key


if __name__ == "__main__":
    cli.once(Config, main)
