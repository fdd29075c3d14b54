"""Learning curves and final returns: interquartile means over seeds, bootstrap intervals."""

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats

TRIMMED_MEAN = partial(stats.trim_mean, proportiontocut=0.25)
MOST_CURVES = 8  # that one picture can show on one another


def iqm(x: Float[np.ndarray, "seeds *points"]) -> Float[np.ndarray, "*points"]:
    """Interquartile mean over the first axis, Agarwal et al. (2021)."""
    return np.asarray(TRIMMED_MEAN(x, axis=0))


def interval(
    x: Float[np.ndarray, "seeds *points"],
    level: float = 0.95,
    statistic: Callable[..., Any] = TRIMMED_MEAN,
) -> tuple[Float[np.ndarray, "*points"], Float[np.ndarray, "*points"]]:
    """Percentile bootstrap interval of a statistic over the first axis; a point for one seed."""
    if x.shape[0] == 1:
        return np.asarray(x[0]), np.asarray(x[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a degenerate sample, where the interval is a point
        result = stats.bootstrap(
            (x,),
            statistic,
            axis=0,
            confidence_level=level,
            n_resamples=1000,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = result.confidence_interval
    return np.asarray(low), np.asarray(high)


class Curve(NamedTuple):
    """Returns of one run against environment steps: while training, and in evaluations.

    With other words in `unit` and `measure`, these are average rewards against updates.
    """

    label: str
    steps: Float[np.ndarray, " points"]
    returns: Float[np.ndarray, "seeds points"]
    eval_steps: Float[np.ndarray, " evals"]
    noise_free: Float[np.ndarray, "seeds evals"]
    unit: str = "environment steps"
    measure: str = "return"


class Final(NamedTuple):
    """What one method reaches at the end: the sampled policy, and the noise-free one."""

    label: str
    iqm: float
    low: float  # of the 95 % interval
    high: float
    noise_free: float


def learning_curve(path: Path, curves: list[Curve], *, title: str) -> None:
    """Draw curves, one colour each: the sampled policy solid, the noise-free one dashed.

    Lines are interquartile means over seeds, bands 95 % bootstrap intervals of the sampled policy.
    Of more than eight methods `final_returns` draws the last tenth of each curve instead.
    """
    num_seeds = len(curves[0].returns)
    seeds = f"IQM and 95 % interval of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    if len(curves) > MOST_CURVES:
        last = [c.returns[:, -max(1, len(c.steps) // 10) :].mean(1) for c in curves]
        finals = [
            Final(curve.label, float(iqm(x)), *map(float, interval(x)), noise_free=free)
            for curve, x in zip(curves, last, strict=True)
            for free in [float(iqm(curve.noise_free[:, -1]))]
        ]
        return final_returns(
            path, finals, measure=f"final {curves[0].measure}, {seeds}", title=title
        )
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        low, high = interval(curve.returns)
        how: dict[str, Any] = {"color": f"C{i}", "markersize": 5}
        dot = "o" if len(curve.steps) == 1 else ""  # a line of one point would not be seen
        axes.plot(curve.steps, iqm(curve.returns), f"{dot}-", label=curve.label, **how)
        axes.fill_between(curve.steps, low, high, color=f"C{i}", alpha=0.2, linewidth=len(dot))
        free = iqm(curve.noise_free)
        axes.plot(curve.eval_steps, free, f"{dot}--", linewidth=1, markerfacecolor="none", **how)
    dot = "o" if all(len(curve.steps) == 1 for curve in curves) else ""
    axes.plot(
        [], [], f"{dot}--", color="gray", linewidth=1, markerfacecolor="none",
        label="noise-free policy",
    )  # fmt: skip
    axes.set(
        xlabel=f"{curves[0].unit} per seed", ylabel=f"{curves[0].measure}\n{seeds}", title=title
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    ncols = 4 if max(len(curve.label) for curve in curves) <= 16 else 3
    figure.legend(loc="outside lower center", ncols=ncols, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def final_returns(
    path: Path, finals: list[Final], *, measure: str, title: str, by_rank: bool = True
) -> None:
    """Draw what each of many methods reaches, a point and an interval, with the best on top.

    Not `by_rank`, they are in their own order, from below.
    """
    order = sorted(finals, key=lambda final: final.iqm) if by_rank else finals
    figure = Figure(figsize=(6.4, 1.2 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    for i, final in enumerate(order):
        axes.plot([final.low, final.high], [i, i], color="C0", linewidth=2, alpha=0.5)
    axes.plot([f.iqm for f in order], range(len(order)), "o", color="C0", label="sampled policy")
    noise_free = [f.noise_free for f in order]
    axes.plot(noise_free, range(len(order)), "|", color="C1", label="noise-free policy")
    axes.set_yticks(range(len(order)), [final.label for final in order])
    axes.set(xlabel=measure, title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def heat_map(
    path: Path,
    values: Float[np.ndarray, "rows columns"],
    rows: tuple[str, list[str]],
    columns: tuple[str, list[str]],
    *,
    measure: str,
    title: str,
) -> None:
    """Draw a table of numbers, where nan stays empty; `rows` and `columns` are names and labels."""
    size = 2.4 + 0.8 * values.shape[1], 1.6 + 0.5 * values.shape[0]
    figure = Figure(figsize=(max(4.8, size[0]), max(3.2, size[1])), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2 if np.isfinite(values).any() else 0.0
    for (i, j), value in np.ndenumerate(values):
        color = "black" if value > middle else "white"
        if np.isfinite(value):
            axes.text(j, i, f"{value:.4g}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(columns[1])), columns[1])
    axes.set_yticks(range(len(rows[1])), rows[1])
    axes.set(xlabel=columns[0], ylabel=rows[0], title=title)
    figure.colorbar(image, label=measure)
    figure.savefig(path, dpi=120)


def gaps(
    path: Path,
    k: tuple[int, ...],
    gap: Float[np.ndarray, "K runs updates"],
    limit: Float[np.ndarray, "K T"],
    *,
    bound: str,
    title: str,
) -> None:
    """Draw how far from the best an ascent ends, against k, and after every number of updates.

    `limit` is the theorem's, dashed, called `bound`. What is below 1e-6 is drawn there.
    """
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    gap = np.maximum(gap, 1e-6)
    last = gap[:, :, -1]
    left.plot(k, limit[:, -1], "k--", label=bound)
    left.plot(k, last.max(1), "C3o-", label="worst run")
    left.plot(k, np.median(last, 1), "C0o-", label="median run")
    left.set(xlabel="k, steps held", ylabel="gap to the best deterministic policy")
    left.set(xscale="log", xticks=k, xticklabels=map(str, k))
    left.minorticks_off()
    updates = np.arange(1, limit.shape[1] + 1)
    for i, number in enumerate(k):
        right.plot(updates, gap[i].max(0)[1:], color=f"C{i}", label=f"k = {number}")
        right.plot(updates, limit[i], "--", color=f"C{i}", linewidth=1)
    right.set(xscale="log", xlabel="updates", ylabel="gap, worst run; bounds dashed")
    for axes in (left, right):
        axes.set(yscale="log", ylim=(5e-7, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", ncols=2)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
