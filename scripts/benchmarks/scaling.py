"""What devices that share the environments of a training send in an update, and what takes time.

    python scripts/benchmarks/scaling.py
    python scripts/benchmarks/scaling.py --algorithms sac --devices 2

Collectives and bytes are counted in the programs that XLA compiles for so many devices, which are
forced on a CPU, so these say nothing of speed. Rows of one `num_envs` show strong scaling, those in
which it grows as the devices do show weak scaling. The row of one device is timed.
"""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(1, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import ppo
import sac
from jax.sharding import Mesh

from scripts.benchmarks import timing
from spg.limits import Count, Range, Seed, check
from spg.training import cli, devices, off_policy, on_policy, options, records, tables

SCRIPTS: dict[str, Any] = {"ppo": ppo, "sac": sac}
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
CALLS = r"calls|to_apply|condition|\w+_computation"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8, "c64": 8}


@dataclass(frozen=True)
class Config:
    algorithms: tuple[Literal["ppo", "sac"], ...] = ("ppo", "sac")
    """at their defaults, one seed"""
    devices: tuple[Annotated[int, Range(1, 64, whole=True)], ...] = (1, 2, 4, 8)
    """that share the environments"""
    num_envs: tuple[Count, ...] = (64, 512)
    """of all devices together"""
    repeats: Count = 20
    """of each timing"""
    seed: Seed = 0
    """of the random numbers"""
    out: str | None = None
    """directory of the results; by default a new one under runs/"""


def sent(program: str) -> dict[str, int]:
    """Collectives that one run of a compiled program makes, and the bytes of their results.

    A loop over a fixed number of steps counts as often as it runs. One that ends when something
    holds, as the search for how far statistics may move, counts once.
    """
    bodies: dict[str, list[str]] = {}
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = "entry" if head[1] else head[2]
            bodies[name] = []
        elif line.startswith("  ") and bodies:
            bodies[name].append(line)

    def count(name: str) -> np.ndarray:
        total = np.zeros(2, int)
        for line in bodies[name]:
            if found := re.search(rf" = (.*?) ({COLLECTIVES})(-start)?\(", line):
                total += [1, size(found[1])]
            if body := re.search(r"\bbody=%?([\w.\-]+)", line):
                times = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
                total += count(body[1]) * (int(times[1]) if times else 1)
            called = re.findall(rf"\b(?:{CALLS})=%?([\w.\-]+)", line)
            for branches in re.findall(r"branch_computations=\{(.*?)\}", line):
                called += re.findall(r"[\w.\-]+", branches)
            total += sum(map(count, called))
        return total

    number, size_of_all = count("entry")
    return {"collectives": int(number), "bytes": int(size_of_all)}


def size(shapes: str) -> int:
    """Bytes of one shape of XLA's, or of a tuple of them."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(BYTES.get(kind, 4) * prod(map(int, filter(None, n.split(",")))) for kind, n in found)


def compiled(config: Config, name: str, count: int, num_envs: int) -> dict[str, int]:
    """`sent` of an update on so many devices."""
    script = SCRIPTS[name]
    algorithm = script.make(settings(name, num_envs))
    floats = {k: jnp.full(1, v, jnp.float32) for k, v in algorithm.floats.items()}
    state = jax.eval_shape(jax.vmap(algorithm.init), floats, jr.split(jr.key(config.seed), 1))
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(1, count), ("seed", "env"))
    split = devices.shardings(mesh, (state, floats))
    if split is not None:
        put = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        state, floats = jax.tree.map(put, (state, floats), split)
    step = lambda state, floats: jax.vmap(algorithm.step)(floats, state)
    out = None if split is None else (split[0], None)
    program = devices.program(mesh, step, (devices.SPLIT,) * 2, out_shardings=out)
    return sent(program.lower(state, floats).compile().as_text())


def settings(name: str, num_envs: int) -> Any:
    """The script's defaults with so many environments, and 64 updates of them."""
    config = replace(SCRIPTS[name].Config(), num_seeds=1, num_envs=num_envs)
    steps = num_envs * config.num_steps
    if name == "sac":
        return replace(config, total_steps=64 * steps, buffer_size=max(131_072, 64 * steps))
    return replace(config, total_steps=64 * steps)


def timed(config: Config, name: str, num_envs: int) -> dict[str, float]:
    """Milliseconds of a rollout and of what follows it, on one device."""
    own = settings(name, num_envs)
    algorithm = SCRIPTS[name].make(own)
    env = options.make_env(own)
    state = jax.jit(algorithm.init)(algorithm.floats, jr.key(config.seed))
    parts = on_policy if name == "ppo" else off_policy
    carry = state.world if name == "ppo" else state.world.carry
    act = jax.jit(partial(parts.collect, own, env))
    step = jax.jit(algorithm.step)
    calls = [
        lambda: act(state.learned.kernel, carry, state.key),
        lambda: step(algorithm.floats, state),
    ]
    rollout, whole = timing.interleave(calls, repeats=config.repeats, seed=config.seed)
    rest = whole - rollout
    return {"rollout_ms": 1e3 * float(np.median(rollout)), "rest_ms": 1e3 * float(np.median(rest))}


def main(config: Config) -> list[dict[str, Any]]:
    check(config)
    for count in config.devices:
        for num_envs in config.num_envs:
            devices.sizes("envs", 1, num_envs, count)  # refuses what cannot be shared out
    with suppress(RuntimeError):  # where JAX has started
        jax.config.update("jax_num_cpu_devices", max(config.devices))
    if jax.device_count() < max(config.devices):
        raise ValueError(f"devices is {max(config.devices)}, and JAX has {jax.device_count()}")
    out = records.open_run(config, "scaling", resumable=False)
    rows = []
    for name in config.algorithms:
        for num_envs in config.num_envs:
            for count in config.devices:
                row = {"algorithm": name, "environments": num_envs, "devices": count}
                row |= compiled(config, name, count, num_envs)
                parts = timed(config, name, num_envs) if count == 1 else {}
                rows.append(row | {k: parts.get(k, "") for k in ("rollout_ms", "rest_ms")})
                timing.write(out / "scaling.csv", rows)
    print(tables.table(rows, keep=3))
    print(f"{timing.machine()}\ntable: {out}")
    return rows


if __name__ == "__main__":
    cli.once(Config, main)
