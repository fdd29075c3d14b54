"""What a run comes to: `summary.json`, its table for a terminal, and the learning curve."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from spg.training import plots
from spg.training.metrics import mean_score, measure_of, read_metrics
from spg.training.records import write


def summarise(
    out: Path,
    *,
    title: str,
    seeds: list[int],
    diverged: dict[int, int],
    clock: dict[str, float],
    env_steps: int,
    first_steps: int,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write `summary.json` and `curve.png`, and return the summary.

    The steps of a second are without the `first_steps`, which are no part of the training's time.

    `seeds` are those that finished, `diverged` the update at which each other one ended. The final
    return, or average reward, is that of the sampled policy over the last tenth of training (of
    its last evaluation, if no episode ended then); the noise-free one is from the last evaluation.
    What is nan in the summary is null in the file.
    """
    data = read_metrics(out)
    chosen = np.isin(data["seed"][:, 0], seeds)
    every, num_updates = data["update"].shape
    data = {k: v[chosen] for k, v in data.items()}
    measure = measure_of(data)
    final = mean_score(data, slice(num_updates - max(1, num_updates // 10), None))
    sampled, noise_free = (data[k][:, -1] for k in measure.evaluated)
    final = np.where(np.isnan(final), sampled, final)
    low, high = plots.interval(final)
    seconds = max(clock["train_seconds"], 1e-9)
    summary = {
        f"final_{measure.name}_mean": float(final.mean()),
        f"final_{measure.name}_iqm": float(plots.iqm(final)),
        f"final_{measure.name}_ci95": [float(low), float(high)],
        f"final_{measure.name}_noise_free_mean": float(noise_free.mean()),
        f"final_{measure.name}": final.tolist(),
        f"final_{measure.name}_noise_free": noise_free.tolist(),
        "measure": measure.name,
        "seeds": seeds,
        "diverged": {str(seed): update for seed, update in diverged.items()},
        "env_steps": env_steps,
        **{k: round(v, 3) for k, v in clock.items()},
        "steps_per_second": round((env_steps - first_steps) * every / seconds, 1),
        "updates_per_second": round(num_updates * every / seconds, 3),
        **facts,
    }
    text = json.dumps(_replace(summary, np.nan, None), indent=2, allow_nan=False)
    write(out / "summary.json", text + "\n")
    plots.learning_curve(out / "curve.png", [read_curve(out, "sampled policy")], title=title)
    return summary


def read_summary(out: Path) -> dict[str, Any]:
    """A run's `summary.json`, where null stands for nan."""
    return _replace(json.loads((out / "summary.json").read_text()), None, np.nan)


def _replace(tree: Any, old: float | None, new: float | None) -> Any:
    """The lists and dictionaries of a summary with nan, or infinity, written otherwise."""
    if isinstance(tree, dict):
        return {k: _replace(v, old, new) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_replace(v, old, new) for v in tree]
    if old is None:
        return new if tree is None else tree
    return new if isinstance(tree, float) and not np.isfinite(tree) else tree


def read_curve(out: Path, label: str, *, bins: int = 100) -> plots.Curve:
    """The learning curve of a finished run, its updates gathered in at most `bins` points."""
    data = read_metrics(out)
    chosen = np.isin(data["seed"][:, 0], read_summary(out)["seeds"])
    data = {k: v[chosen] for k, v in data.items()}
    measure = measure_of(data)
    num_updates = data["update"].shape[1]
    edges = np.unique(np.linspace(0, num_updates, min(bins, num_updates) + 1).astype(int))
    simulated = data["env_steps"].any()
    clock = data["env_steps" if simulated else "update"][0]
    returns = np.stack([mean_score(data, slice(a, b)) for a, b in pairwise(edges)], 1)
    shown = ~np.isnan(returns).any(0)
    free = data[measure.evaluated[1]]
    evaluated = ~np.isnan(free).any(0)
    return plots.Curve(
        label=label,
        steps=clock[edges[1:] - 1][shown],
        returns=returns[:, shown],
        eval_steps=clock[evaluated],
        noise_free=free[:, evaluated],
        unit="environment steps" if simulated else "updates",
        measure=measure.label,
    )


def table(out: Path, summary: dict[str, Any]) -> str:
    """The summary for a terminal of 80 columns."""
    name = summary["measure"]
    final, noise_free = summary[f"final_{name}"], summary[f"final_{name}_noise_free"]
    label = name.replace("_", " ")
    width = max(len(label), 10)
    rows = [f"{'seed':>8}  {label:>{width}}  {'noise-free':>10}"]
    for seed, sampled, free in zip(summary["seeds"], final, noise_free, strict=True):
        rows.append(f"{seed:>8}  {sampled:>{width}.4g}  {free:>10.4g}")
    rows += [f"{s:>8}  diverged at update {u}" for s, u in summary["diverged"].items()]
    mean, free = summary[f"final_{name}_mean"], summary[f"final_{name}_noise_free_mean"]
    rows.append(f"{'mean':>8}  {mean:>{width}.4g}  {free:>10.4g}")
    low, high = summary[f"final_{name}_ci95"]
    iqm = summary[f"final_{name}_iqm"]
    rows.append(f"{'IQM':>8}  {iqm:>{width}.4g}  95% interval [{low:.4g}, {high:.4g}] over seeds")
    if steps := summary["env_steps"]:
        speed = summary["steps_per_second"]
        rows.append(f"{steps:,} steps per seed, {speed:,.0f} steps/s in all")
    else:
        rows.append(f"{summary['updates_per_second']:,.0f} updates/s in all")
    rows.append(
        f"{summary['compile_seconds']:.1f} s compiling, {summary['train_seconds']:.1f} s training, "
        f"{summary['evaluate_seconds']:.1f} s evaluating"
    )
    rows.append(f"curve, metrics and checkpoints: {out}")
    return "\n".join(rows)
