"""A grid of options for one of the training scripts, with a table, a picture and the best of it.

Floats are vmapped in one program, beside the seeds; other options are trained one after another.

    python scripts/sweep.py ppo --grid learning-rate 1e-4 1e-3 --grid gamma .9 1
    python scripts/sweep.py sac --grid memory s2pg bptt --out runs/mine
    python scripts/sweep.py sac --out runs/mine --resume
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds: one line, status 130
    signal.signal(signal.SIGINT, lambda *_: os.write(2, b"interrupted\n") and os._exit(130))

import dataclasses
import importlib
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from spg import limits
from spg.training import cli, devices, grids, records, tables, terminal

ALGORITHMS = "ppo", "trpo", "reppo", "reinforce", "sac", "td3", "slac", "gpomdp", "gamp"


def config_of(script: Any) -> type:
    """The options of a script, and those of a grid."""
    own = {"__module__": __name__, "__doc__": script.Config.__doc__}
    bases = (grids.Grid, script.Config)
    return dataclasses.make_dataclass("Config", [], bases=bases, namespace=own, frozen=True)


def sweep(name: str, script: Any, config: Any, say: terminal.Interruption) -> None:
    """Train the points that are not there yet. Raises ValueError for what cannot run."""
    fields = [f.name for f in dataclasses.fields(script.Config)]
    plain = script.Config(**{field: getattr(config, field) for field in fields})
    told = [getattr(config, name) for name in records.PROCESSES]
    if any(x is not None and x is not False for x in told):
        raise ValueError("a sweep runs in one process, on all of its devices")
    if config.resume and config.out is None:
        raise records.RunError("--resume needs --out, the directory of the sweep to go on with")
    axes = grids.axes(config.grid, script.Config)
    checked = grids.points(plain, axes, Path())
    for line in dict.fromkeys(x for p in checked for x in limits.without_effect(p.config)):
        print(f"warning: {line}", file=sys.stderr)
    cli.keep_programs()
    if name != "gamp":
        together = [len(axis.values) for axis in axes if axis.name in limits.floats(plain)]
        seeds = math.prod(together) * config.num_seeds
        cli.use_cores(sys.maxsize if config.shard == "envs" else seeds)
    make = script.make_precise if name == "gamp" else script.make
    one, *_ = [make(point.config) for point in checked]  # refuses what cannot run
    for group in grids.programs(checked, one):
        algorithm, _ = grids.make(group, make)  # and what memory does not hold
        seeds, alone = len(group) * config.num_seeds, not algorithm.sharded
        devices.layout(config.shard, seeds, algorithm.num_envs, alone=alone)
    out = records.open_run(config, f"sweep-{name}")
    points = grids.points(plain, axes, out)
    say.line = f"interrupted; --out {out} --resume goes on from the last checkpoint"
    groups = grids.programs(points, one)
    label = one.measure.label
    title = one.title if len(groups) == 1 else f"{name}, {config.num_seeds} seeds"
    for i, group in enumerate(groups, 1):
        if all(point.done for point in group):
            continue
        algorithm, floats = grids.make(group, make)  # now, since precision is that of the process
        print(
            f"{algorithm.title}; program {i} of {len(groups)}, {len(group)} points x "
            f"{config.num_seeds} seeds; {out}",
            file=sys.stderr,
        )
        grids.train(group, algorithm, floats)
        rows = grids.results(points)
        grids.write(out, rows)
        grids.draw(out / "grid.png", axes, rows, measure=f"final {label}", title=title)
    rows = grids.results(points)
    print(tables.table([{k: v for k, v in row.items() if k != "run"} for row in rows]))
    best = next(point for point in points if point.out.name == rows[0]["run"])
    print(f"mean: final {label}; low, high: its 95 % interval over seeds")
    print(f"table, picture and runs: {out}\nthe best: {grids.command(f'scripts/{name}.py', best)}")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print(
            f"usage: sweep.py {{{','.join(ALGORITHMS)}}} [OPTIONS], which --help behind one lists"
        )
        print(f"\n{__doc__}")
        return
    with terminal.interruptible() as say:
        try:
            if name not in ALGORITHMS:
                raise ValueError(f"unknown algorithm {name!r}; choose from {', '.join(ALGORITHMS)}")
            script = importlib.import_module(name)
            sweep(name, script, cli.parse(config_of(script), sys.argv[2:]), say)
        except (ValueError, OSError, records.RunError) as error:
            cli.fail(error)


if __name__ == "__main__":
    main()
