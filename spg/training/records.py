"""The run directory: what a training leaves behind, and its reading back."""

import csv
import dataclasses
import json
import os
import time
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from tensorboardX import SummaryWriter

from spg.training import plots

UNSAVED = ("out", "resume")  # fields of a configuration that may differ on resumption


class RunError(Exception):
    """A run cannot start or go on, for a reason that the user can mend."""


def open_run(config: Any, name: str, *, resumable: bool = True) -> Path:
    """The directory of a run, with its `config.json`: a new one, or on resumption the old one.

    A configuration without the field `resume` is not `resumable`.

    Raises RunError if the directory holds a run already (without `resume`), or if it holds none
    or one of another configuration (with it).
    """
    resume = resumable and config.resume
    if resume and config.out is None:
        raise RunError("--resume needs --out, the directory of the run to go on with")
    out = Path(config.out or time.strftime(f"runs/{name}-%Y%m%d-%H%M%S"))
    path = out / "config.json"
    fields = {k: v for k, v in dataclasses.asdict(config).items() if k not in UNSAVED}
    now = json.loads(json.dumps({"name": name} | fields))
    if resume:
        if not path.exists():
            raise RunError(f"--resume: {out} holds no run; without --resume one would start there")
        then = json.loads(path.read_text())
        differ = [k for k in {**then, **now} if then.get(k) != now.get(k)]
        if differ:
            listed = ", ".join(f"{k} (was {then.get(k)}, now {now.get(k)})" for k in differ)
            raise RunError(f"--resume: {out} was run with another configuration: {listed}")
        return out
    if path.exists():
        goes_on = "--resume goes on with it, " if resumable else ""
        raise RunError(f"{out} holds a run; {goes_on}another --out starts afresh")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} exists and is not an empty directory; name another one with --out")
    out.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(now, indent=2) + "\n")
    return out


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class Table:
    """`metrics.csv`: a row per update and seed, evaluations in the rows of their updates."""

    def __init__(
        self,
        path: Path,
        *,
        seeds: np.ndarray,
        metrics: list[str],
        scores: list[str],
        steps_per_update: int,
        keep: int,
    ):
        """Opens the file, keeping the rows of the first `keep` updates."""
        self.path, self.seeds, self.steps_per_update = path, seeds, steps_per_update
        self.metrics, self.scores = metrics, scores
        kept: list[list[str]] = []
        if keep:
            with path.open(newline="") as file:
                whole = [row for row in csv.reader(file) if len(row) == len(self.columns)]
            kept = [row for row in whole[1:] if int(row[0]) <= keep]  # the last one may be torn
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *kept])
        os.replace(partial, path)

    @property
    def columns(self) -> list[str]:
        return ["update", "seed", "env_steps", *self.metrics, *self.scores]

    def append(
        self,
        update: int,
        metrics: dict[str, Float[np.ndarray, "seeds updates"]],
        scores: dict[str, Float[np.ndarray, " seeds"]],
    ) -> None:
        """Add the rows of the updates up to `update`."""
        count = metrics[self.metrics[0]].shape[1]
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            for i in range(count):
                number = update - count + 1 + i
                for j, seed in enumerate(self.seeds):
                    values = [metrics[k][j, i] for k in self.metrics]
                    if i == count - 1 and scores:
                        values += [scores[k][j] for k in self.scores]
                    cells = ["" if np.isnan(v) else f"{v:.8g}" for v in values]
                    cells += [""] * (len(self.columns) - 3 - len(cells))
                    writer.writerow([number, seed, number * self.steps_per_update, *cells])


def read_metrics(out: Path) -> dict[str, Float[np.ndarray, "seeds updates"]]:
    """The columns of a run's `metrics.csv`; empty cells are nan."""
    with (out / "metrics.csv").open(newline="") as file:
        columns, *rows = csv.reader(file)
    data = np.array([[float(x) if x else np.nan for x in row] for row in rows])
    num_seeds = len(np.unique(data[:, columns.index("seed")])) if rows else 1
    return {k: data[:, i].reshape(-1, num_seeds).T for i, k in enumerate(columns)}


def write_events(
    events: SummaryWriter,
    update: int,
    metrics: dict[str, Float[np.ndarray, "seeds updates"]],
    scores: dict[str, Float[np.ndarray, " seeds"]],
) -> None:
    """TensorBoard scalars at `update`, means over seeds and the updates of `metrics`."""
    for name, values in {**metrics, **scores}.items():
        if not np.isnan(values).all():
            events.add_scalar(name, np.nanmean(values), update)


def measure(names: Iterable[str]) -> str:
    """What a run is judged by: the `average_reward` of endless ones, else the `return`."""
    return "average_reward" if "average_reward" in names else "return"


def mean_measure(
    data: dict[str, Float[np.ndarray, "seeds updates"]], updates: slice
) -> Float[np.ndarray, " seeds"]:
    """Mean in these updates: of the average reward, or of the return over the episodes that ended.

    nan for a seed in which none did.
    """
    name = measure(data)
    values = np.nan_to_num(data[name][:, updates])
    weight = data["episodes"][:, updates] if name == "return" else np.ones_like(values)
    with np.errstate(invalid="ignore"):
        return (values * weight).sum(1) / weight.sum(1)


def read_curve(out: Path, label: str, *, bins: int = 100) -> plots.Curve:
    """The learning curve of a run, its updates gathered in at most `bins` points."""
    data = read_metrics(out)
    num_updates = data["update"].shape[1]
    edges = np.unique(np.linspace(0, num_updates, min(bins, num_updates) + 1).astype(int))
    simulated = data["env_steps"].any()
    clock = data["env_steps" if simulated else "update"][0]
    returns = [mean_measure(data, slice(a, b)) for a, b in pairwise(edges)]
    returns = np.stack(returns, 1).reshape(len(data["seed"]), -1)
    shown = ~np.isnan(returns).any(0)
    free = data[f"eval_{measure(data)}_noise_free"]
    evaluated = ~np.isnan(free).any(0)
    return plots.Curve(
        label=label,
        steps=clock[edges[1:] - 1][shown],
        returns=returns[:, shown],
        eval_steps=clock[evaluated],
        noise_free=free[:, evaluated],
        unit="environment steps" if simulated else "updates",
        measure=measure(data).replace("_", " "),
    )


def summarise(
    out: Path, *, title: str, seeds: np.ndarray, clock: dict[str, float], env_steps: int
) -> dict[str, Any]:
    """Write `summary.json` and `curve.png`, and return the summary.

    The final return, or average reward, is that of the sampled policy over the last tenth of
    training (of its last evaluation, if no episode ended then); the noise-free one is from the
    last evaluation.
    """
    data = read_metrics(out)
    num_updates = data["update"].shape[1]
    name = measure(data)
    final = mean_measure(data, slice(num_updates - max(1, num_updates // 10), None))
    final = np.where(np.isnan(final), data[f"eval_{name}"][:, -1], final)
    noise_free = data[f"eval_{name}_noise_free"][:, -1]
    low, high = plots.interval(final)
    seconds = max(clock["train_seconds"], 1e-9)
    summary = {
        f"final_{name}_mean": float(final.mean()),
        f"final_{name}_iqm": float(plots.iqm(final)),
        f"final_{name}_ci95": [float(low), float(high)],
        f"final_{name}_noise_free_mean": float(noise_free.mean()),
        f"final_{name}": final.tolist(),
        f"final_{name}_noise_free": noise_free.tolist(),
        "seeds": seeds.tolist(),
        "env_steps": env_steps,
        **{k: round(v, 3) for k, v in clock.items()},
        "steps_per_second": round(env_steps * len(seeds) / seconds, 1),
        "updates_per_second": round(num_updates * len(seeds) / seconds, 3),
        "devices": [d.device_kind for d in jax.devices()],
        "jax": jax.__version__,
    }
    write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    plots.learning_curve(out / "curve.png", [read_curve(out, "sampled policy")], title=title)
    return summary


def table(out: Path, summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    name = measure(k.removeprefix("final_") for k in summary)
    final, noise_free = summary[f"final_{name}"], summary[f"final_{name}_noise_free"]
    label = name.replace("_", " ")
    width = max(len(label), 10)
    rows = [f"{'seed':>8}  {label:>{width}}  {'noise-free':>10}"]
    for seed, sampled, free in zip(summary["seeds"], final, noise_free, strict=True):
        rows.append(f"{seed:>8}  {sampled:>{width}.4g}  {free:>10.4g}")
    mean, free = summary[f"final_{name}_mean"], summary[f"final_{name}_noise_free_mean"]
    rows.append(f"{'mean':>8}  {mean:>{width}.4g}  {free:>10.4g}")
    low, high = summary[f"final_{name}_ci95"]
    iqm = summary[f"final_{name}_iqm"]
    rows.append(f"{'IQM':>8}  {iqm:>{width}.4g}  95% interval [{low:.4g}, {high:.4g}] over seeds")
    speed = f"{summary['updates_per_second']:,.0f} updates/s in all"
    if steps := summary["env_steps"]:
        speed = f"{steps:,} steps per seed, {summary['steps_per_second']:,.0f} steps/s in all"
    rows.append(
        f"{speed}; {summary['compile_seconds']:.1f} s compiling, {summary['train_seconds']:.1f} s "
        f"training, {summary['evaluate_seconds']:.1f} s evaluating"
    )
    rows.append(f"curve, metrics and checkpoints: {out}")
    return "\n".join(rows)
