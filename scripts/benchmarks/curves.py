"""The README's learning results: every kind of memory on one task, one picture and one table.

    python scripts/benchmarks/curves.py --task cartpole
    python scripts/benchmarks/curves.py --task pointmass --algorithm sac
    python scripts/benchmarks/curves.py --task size --algorithm gail

Each training is a run of its own under --out, as the algorithm's script would leave it; one that is
complete is not run again, one that was cut short is resumed.
"""

import csv
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))

import demonstrate
import gail
import jax
import jax.numpy as jnp
import jax.random as jr
import lsiq
import ppo
import reppo
import sac
import td3

from spg.limits import Count, Seed, Total, check
from spg.rollout import reset, rollout
from spg.training import cli, options, plots, policies, summaries, tables

Task = Literal[
    "cartpole", "acrobot", "pendulum", "memorychain", "tmaze10", "tmaze50", "tmaze200",
    "recall10", "recall50", "cards", "ringworld", "halfcheetah", "ant", "hopper", "walker2d",
    "units-cartpole", "units-memorychain", "units-tmaze10",
    "matrices-cards", "matrices-ringworld", "matrices-tmaze200", "pointmass", "doors",
    "size", "payload",
]  # fmt: skip


@dataclass(frozen=True)
class Config:
    task: Task = "cartpole"
    """the environment, or a comparison of units in one"""
    num_seeds: Count = 8
    """of each training"""
    seed: Seed = 0
    """of the first training; the others take the next integers"""
    out: str | None = None
    """by default runs/curves-<task>, or runs/curves-<task>-<algorithm>"""
    methods: tuple[str, ...] = ()
    """which of the task's methods; by default all"""
    algorithm: Literal["ppo", "reppo", "sac", "td3", "gail", "lsiq"] = "ppo"
    """reppo, sac and td3 are for the tasks with continuous actions; sac and td3 show critics the
    full state; gail and lsiq imitate the expert of the task, which is trained first"""
    total_steps: Total | None = None
    """environment steps of each seed; by default those of the task"""


METHODS: dict[str, dict[str, Any]] = {
    "S2PG": {"memory": "s2pg"},
    "S2PG score": {"memory": "s2pg", "memory_gradient": "score"},
    "S2PG linear": {"memory": "s2pg", "cell": "linear", "z_size": 32},
    "BPTT": {"memory": "bptt"},
    "BPTT linear": {"memory": "bptt", "cell": "linear", "z_size": 32},
    "S2PG GRU": {"memory": "s2pg", "cell": "gru", "z_size": 32},
    "BPTT GRU": {"memory": "bptt", "cell": "gru", "z_size": 32},
    "window-5": {"memory": "window", "window": 5},
    "none": {"memory": "none"},
    "oracle": {"memory": "oracle"},
}
FILTERS: dict[str, dict[str, Any]] = {
    name: {"memory": "filter", "filter": name}
    for name in ("belief", "lof", "lof-softmax", "alf", "alf-softmax", "alf-belief")
}
UNITS: dict[str, dict[str, Any]] = {
    "GRU-64": {"memory": "bptt", "cell": "gru", "z_size": 64},
    "linear-64": {"memory": "bptt", "cell": "linear", "z_size": 64},
    "gated-64": {"memory": "bptt", "cell": "gated", "z_size": 64},
    "LRU-32": {"memory": "bptt", "cell": "lru", "z_size": 64},
}
RINGWORLD: dict[str, dict[str, Any]] = {
    **FILTERS,
    "deep ALF-12": {"memory": "bptt", "cell": "leaky", "z_size": 24},
    "LRU-12": {"memory": "bptt", "cell": "lru", "z_size": 24},
    "LRU-64": {"memory": "bptt", "cell": "lru", "z_size": 128},
    **{name: UNITS[name] for name in ("linear-64", "gated-64", "GRU-64")},
    **{name: METHODS[name] for name in METHODS if name not in ("window-5", "oracle")},
}
PENDULUM = METHODS | {"S2PG privileged": {"memory": "s2pg", "privileged": True}}
MATRICES: dict[str, dict[str, Any]] = {
    f"{label} {cell}": {"memory": memory, "cell": cell, "z_size": 64}
    for label, memory in (("BPTT", "bptt"), ("S2PG", "s2pg"))
    for cell in ("attention", "delta", "lru", "gated", "gru")
}
BPTT: dict[str, Any] = {"memory": "bptt", "state_learning_rate": 3e-4}
OFF_POLICY: dict[str, dict[str, Any]] = {
    "S2PG": {},
    "S2PG z in Q": {"critic_state": True},
    "S2PG rolled-8": {"segment_length": 8},
    "S2PG rolled-32": {"segment_length": 32},
    "S2PG stale": {"refresh": False},
    "S2PG linear": {"cell": "linear"},
    "S2PG untrained": {"state_learning_rate": 0.0},
    "BPTT-5": BPTT | {"segment_length": 5, "loss_steps": "last"},
    "BPTT-10": BPTT | {"segment_length": 10, "loss_steps": "last"},
    "BPTT-32": BPTT | {"segment_length": 32},
    "window-5": {"memory": "window", "window": 5},
    "none": {"memory": "none"},
    "oracle": {"memory": "oracle"},
}
IMITATION = {
    "gail": {
        "S2PG": METHODS["S2PG"],
        "BPTT-5": METHODS["BPTT"] | {"segment_length": 5},
        "BPTT-32": METHODS["BPTT"] | {"segment_length": 32},
        "none": METHODS["none"],
        "oracle": METHODS["oracle"],
    },
    "lsiq": {
        **{name: OFF_POLICY[name] for name in ("S2PG", "BPTT-5", "none", "oracle")},
        "BPTT-32": OFF_POLICY["BPTT-32"] | {"learning_starts": 4096},  # which hold its segments
    },
}
WITH_GOALS = "PointMass-memory", "Doors-memory"  # what `success` is for
SCRIPTS: dict[str, Any] = {
    "ppo": ppo, "reppo": reppo, "sac": sac, "td3": td3, "gail": gail, "lsiq": lsiq
}  # fmt: skip


MEMORY: dict[str, Any] = {"observe": "all", "entropy_coef": 0.03}
LONG: dict[str, Any] = {"gamma": 1.0, "total_steps": 3_000_000}
TMAZE: dict[str, Any] = MEMORY | {"env": "TMaze-memory"}
BRAX: dict[str, Any] = {
    "previous_action": True, "num_steps": 32, "hidden": (64, 64), "learning_rate": 3e-4,
    "checkpoints": 10, "eval_episodes": 8,
}  # fmt: skip
TASKS: dict[str, dict[str, Any]] = {
    "cartpole": {},
    "acrobot": {"env": "Acrobot-v1"},
    "pendulum": {"env": "Pendulum-v1", "gamma": 0.95, "total_steps": 3_000_000},
    "memorychain": MEMORY | {"env": "MemoryChain-bsuite", "total_steps": 500_000},
    "tmaze10": TMAZE | {"env_params": {"length": 10.0}},
    "tmaze50": TMAZE | LONG | {"env_params": {"length": 50.0}},
    "tmaze200": TMAZE | LONG | {"env_params": {"length": 200.0}, "total_steps": 5_000_000},
    "recall10": MEMORY | {"env": "RepeatFirst-memory", "env_params": {"delay": 10.0}},
    "recall50": MEMORY | LONG | {"env": "RepeatFirst-memory", "env_params": {"delay": 50.0}},
    "cards": MEMORY | {"env": "RecallCards-memory", "total_steps": 3_000_000},
    "ringworld": {
        "env": "ringworld-pomdp", "observe": "all", "previous_action": True,
        "total_steps": 5_000_000,
    },
    **{n: BRAX | {"env": f"brax/{n}"} for n in ("halfcheetah", "ant", "hopper", "walker2d")},
}  # fmt: skip


OFF_POLICY_TASKS: dict[str, dict[str, Any]] = {
    "pointmass": {},
    "doors": {"env": "Doors-memory", "gamma": 0.95, "z_size": 64, "total_steps": 300_000},
    "pendulum": {"env": "Pendulum-v1", "observe": "positions", "gamma": 0.95},
    **{
        n: {
            "env": f"brax/{n}", "observe": "positions", "previous_action": True,
            "env_params": {"mass_range": 0.3}, "target_entropy": -1.0, "hidden": (128, 128),
            "actor_learning_rate": 3e-4, "updates_per_step": 4.0,
            "total_steps": 500_000, "checkpoints": 5, "eval_episodes": 4,
        }
        for n in ("halfcheetah", "ant", "hopper", "walker2d")
    },
}  # fmt: skip


# bodies of hidden size or load, the worlds of the imitators and of their experts
BODIES: dict[str, dict[str, Any]] = {
    "size": {
        "env": "brax/halfcheetah", "observe": "positions", "previous_action": True,
        "env_params": {"smallest": 0.4},
    },
    "payload": {
        "env": "brax/halfcheetah", "observe": "all", "previous_action": True,
        "env_params": {"payload": 1.0},
    },
    "hopper": {
        "env": "brax/hopper", "observe": "positions", "previous_action": True,
        "env_params": {"smallest": 0.4},
    },
}  # fmt: skip
EXPERT = ppo.Config(
    memory="oracle", num_steps=32, hidden=(64, 64), learning_rate=3e-4, num_seeds=1,
    total_steps=4_000_000, checkpoints=6, eval_episodes=8,
)  # fmt: skip
IMITATION_SETTINGS: dict[str, dict[str, Any]] = {
    "gail": {
        "num_steps": 160, "gamma": 0.97, "discriminator_steps": 8, "checkpoints": 4,
        "eval_episodes": 8,
    },
    "lsiq": {
        "hidden": (128, 128), "gamma": 0.99, "updates_per_step": 4.0, "target_rate": 0.01,
        "actor_learning_rate": 3e-4, "buffer_size": 262_144, "total_steps": 200_000,
        "checkpoints": 4, "eval_episodes": 8,
    },
}  # fmt: skip


TASKS_OF = {
    "ppo": TASKS, "reppo": TASKS, "sac": OFF_POLICY_TASKS, "td3": OFF_POLICY_TASKS,
    "gail": BODIES, "lsiq": BODIES,
}  # fmt: skip


def task(name: str, algorithm: str = "ppo") -> tuple[Any, dict[str, dict[str, Any]]]:
    """The configuration that all methods share, and the methods to compare.

    Cell, noise, size of z and what is not in `TASKS` are the defaults, the same in every task.
    """
    tasks = TASKS_OF[algorithm]
    kind, _, rest = name.rpartition("-")
    if rest not in tasks:
        raise ValueError(f"task {name!r} is not for {algorithm}; choose from {', '.join(tasks)}")
    if tasks is BODIES:
        demonstrations = {"demonstrations": f"{expert_of(name)}/demonstrations.npz"}
        words = BODIES[name] | IMITATION_SETTINGS[algorithm] | demonstrations
        return replace(SCRIPTS[algorithm].Config(), **words), IMITATION[algorithm]
    if tasks is OFF_POLICY_TASKS:
        words = {k: v for k, v in tasks[name].items() if algorithm == "sac" or "entropy" not in k}
        return replace(SCRIPTS[algorithm].Config(), **words), OFF_POLICY
    by_task = {"ringworld": RINGWORLD, "pendulum": PENDULUM}
    by_kind = {"units": UNITS, "matrices": MATRICES}
    methods = by_kind.get(kind) or by_task.get(rest) or METHODS
    if algorithm == "reppo":
        methods = {k: v for k, v in methods.items() if "memory_gradient" not in v}
    return replace(SCRIPTS[algorithm].Config(), **TASKS[rest]), methods


def expert_of(name: str) -> str:
    """The directory of the task's expert."""
    return f"runs/expert-{name}"


def train_expert(name: str) -> None:
    """PPO that sees the state and what is hidden; then 40 sampled episodes of it."""
    out = Path(expert_of(name))
    if not (out / "demonstrations.npz").exists():
        cli.train(ppo.make, replace(EXPERT, **BODIES[name]), out)
        demonstrate.main(demonstrate.Config(str(out), episodes=40))


def success(directory: Path, num_episodes: int = 256) -> dict[str, str]:
    """Of a run in `PointMass` or `Doors`, by the sampled policy: return, episodes at the goal.

    Means over seeds, and the seeds' least and largest.
    """
    run = policies.load(directory)
    own = run.env.environment.inner  # type: ignore[attr-defined]

    def play(kernel, key):
        reset_key, key = jr.split(key)
        start = reset(kernel, run.env, key=reset_key)
        num_steps = int(run.env.params.max_steps_in_episode)
        _, steps, _ = rollout(kernel, run.env, start, num_steps=num_steps, key=key)
        ended = steps.terminated | steps.truncated
        reward = jnp.where(jnp.cumsum(ended) - ended == 0, steps.reward, 0.0)  # up to the first end
        return reward.sum(), (reward >= own.success_reward).any()

    each = jax.vmap(lambda kernel, keys: jax.vmap(lambda key: play(kernel, key))(keys))
    keys = jr.split(jr.key(0), (len(run.seeds), num_episodes))
    sampled, reached = (x.mean(1) for x in jax.jit(each)(run.kernels, keys))
    return {
        "sampled": f"{sampled.mean():.4g}",
        "success": f"{reached.mean():.3f}",
        "seeds_from_to": f"{reached.min():.3f} to {reached.max():.3f}",
    }


def main(config: Config) -> None:
    check(config)
    shared, methods = task(config.task, config.algorithm)
    unknown = [m for m in config.methods if m not in methods]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; choose from {', '.join(methods)}")
    suffix = "" if config.algorithm == "ppo" else f"-{config.algorithm}"
    out = Path(config.out or f"runs/curves-{config.task}{suffix}")
    shared = replace(shared, num_seeds=config.num_seeds, seed=config.seed)
    if config.total_steps is not None:
        shared = replace(shared, total_steps=config.total_steps)
    if config.algorithm in IMITATION:
        train_expert(config.task)
    rows, curves = [], []
    for name in config.methods or methods:
        directory = out / name.replace(" ", "-")
        summary = cli.train(
            SCRIPTS[config.algorithm].make, replace(shared, **methods[name]), directory
        )
        curves.append(summaries.read_curve(directory, name))
        measure = summary["measure"]
        low, high = summary[f"final_{measure}_ci95"]
        rows.append(
            {
                "method": name,
                "seeds": config.num_seeds,
                "env_steps": summary["env_steps"],
                measure: f"{summary[f'final_{measure}_mean']:.4g}",
                "iqm": f"{summary[f'final_{measure}_iqm']:.4g}",
                "ci95": f"{low:.4g} to {high:.4g}",
                "noise_free": f"{summary[f'final_{measure}_noise_free_mean']:.4g}",
                **(success(directory) if shared.env in WITH_GOALS else {}),
                "steps_per_s": f"{summary['steps_per_second']:.0f}",
                "minutes": f"{summary['train_seconds'] / 60:.1f}",
            }
        )
    dialled = "".join(f", {k} {v:g}" for k, v in shared.env_params.items())
    title = options.describe(shared) + dialled
    plots.learning_curve(out / "curves.png", curves, title=title)
    with (out / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print("", tables.table(rows), sep="\n")


if __name__ == "__main__":
    cli.once(Config, main, seeds=lambda config: config.num_seeds)
