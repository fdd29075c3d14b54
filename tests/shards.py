"""Updates of a script on 1, 2 and 4 devices, in float64; prints how far apart they end, as JSON."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from scripts import gpomdp, ppo, reinforce, reppo, sac, td3, trpo
from spg.rollout import Carry
from spg.training import devices

SMALL = {"num_envs": 8, "num_seeds": 2}
NETS = SMALL | {"cell": "linear", "z_size": 4, "hidden": (8,), "eval_episodes": 1}
REPLAY = NETS | {
    "cell": "gated",
    "num_steps": 2, "updates_per_step": 1.0, "batch_size": 16, "buffer_size": 64,
    "learning_starts": 32, "total_steps": 64, "env_params": {"max_steps_in_episode": 5},
}  # fmt: skip
CONFIGS = {
    "ppo": ppo.Config(num_steps=8, num_minibatches=4, num_epochs=2, total_steps=256, **NETS),
    "trpo": trpo.Config(num_steps=8, num_minibatches=4, num_epochs=2, total_steps=256, **NETS),
    "reppo": reppo.Config(
        num_steps=8, num_minibatches=4, num_epochs=2, total_steps=256, critic_hidden=(8,), **NETS
    ),
    "reinforce": reinforce.Config(
        env="TMaze-memory", env_params={"length": 5}, total_steps=256, **NETS
    ),
    "gpomdp": gpomdp.Config(num_steps=8, total_steps=256, **SMALL),
    "sac": sac.Config(**REPLAY),
    "td3": td3.Config(**REPLAY),
}
LAYOUTS = {"1": ("auto", 1), "1x2": ("envs", 2), "1x4": ("envs", 4), "2x2": ("auto", 4)}
UPDATES = 3


def collectives(text: str) -> dict[str, int]:
    """The most numbers that one collective of each kind moves."""
    found: dict[str, int] = {}
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    for shapes, kind in re.findall(rf"= (.*) ({kinds})(?:-start)?\(", text):
        sizes = [
            np.prod([int(n) for n in x.split(",") if n]) for x in re.findall(r"\[(.*?)\]", shapes)
        ]
        found[kind] = max(found.get(kind, 0), int(sum(sizes)))
    return found


def main(name: str, labels: list[str]) -> None:
    config = CONFIGS[name]
    algorithm = globals()[name].make(config)
    floats = {k: jnp.full(2, v) for k, v in algorithm.floats.items()}
    start = jax.jit(jax.vmap(algorithm.init))(floats, jax.random.split(jax.random.key(0)))
    available, ends, told = jax.devices(), {}, {}

    for label in labels:
        shard, count = LAYOUTS[label]
        devices.jax.devices = lambda count=count: available[:count]
        mesh = devices.layout(shard, 2, algorithm.num_envs)
        both = start, floats
        state, own = jax.device_put(both, devices.shardings(mesh, both))
        out = devices.shardings(mesh, state), None
        step = lambda state, floats: jax.vmap(algorithm.step)(floats, state)
        specs = devices.SPLIT, devices.SPLIT
        step = devices.program(mesh, step, specs, out_shardings=out).lower(state, own).compile()
        metrics = []
        for _ in range(UPDATES):
            state, report = step(state, own)
            metrics.append((report.metrics, report.score))
        shown = state.learned, metrics
        ends[label] = [np.asarray(x) for x in jax.tree.leaves(shown)]
        carries = jax.tree.leaves(state.world, is_leaf=lambda x: isinstance(x, Carry))
        first = [x.first for x in carries if isinstance(x, Carry)]
        shapes = [x.sharding.shard_shape(x.shape) for x in first]
        told[label] = {
            "mesh": [*mesh.shape.values()],
            "held": shapes,
            "collectives": collectives(step.as_text()),
        }
    for label, end in ends.items():
        pairs = [(a, b) for a, b in zip(end, ends["1"], strict=True) if a.size]
        told[label]["apart"] = float(max((np.abs(a - b) / (1 + np.abs(b))).max() for a, b in pairs))
    moved = zip(jax.tree.leaves(start.learned), ends["1"], strict=False)
    told["moved"] = float(max(np.abs(a - b).max(initial=0.0) for a, b in moved))
    print(json.dumps(told))


if __name__ == "__main__":
    with jax.enable_x64(True):
        main(sys.argv[1], sys.argv[2:])
