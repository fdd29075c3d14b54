"""Learning curves with the interquartile mean over seeds and its bootstrap interval."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from scipy import stats


def iqm(x: Float[np.ndarray, "seeds *points"]) -> Float[np.ndarray, "*points"]:
    """Interquartile mean over the first axis, Agarwal et al. (2021)."""
    return np.asarray(stats.trim_mean(x, 0.25, axis=0))


def interval(
    x: Float[np.ndarray, "seeds *points"], level: float = 0.95
) -> tuple[Float[np.ndarray, "*points"], Float[np.ndarray, "*points"]]:
    """Percentile bootstrap interval of the interquartile mean, over seeds; a point for one seed."""
    if x.shape[0] == 1:
        return np.asarray(x[0]), np.asarray(x[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a degenerate sample, where the interval is a point
        result = stats.bootstrap(
            (x,),
            lambda x, axis: stats.trim_mean(x, 0.25, axis=axis),
            axis=0,
            confidence_level=level,
            n_resamples=1000,
            method="percentile",
            rng=np.random.default_rng(0),
        )
    low, high = result.confidence_interval
    return np.asarray(low), np.asarray(high)


class Curve(NamedTuple):
    """Returns of one run against environment steps: while training, and of its evaluations.

    Or, by `unit` and `measure`, average rewards, against updates.
    """

    label: str
    steps: Float[np.ndarray, " points"]
    returns: Float[np.ndarray, "seeds points"]
    eval_steps: Float[np.ndarray, " evals"]
    noise_free: Float[np.ndarray, "seeds evals"]
    unit: str = "environment steps"
    measure: str = "return"


def learning_curve(path: Path, curves: list[Curve], *, title: str) -> None:
    """Draw curves, one colour each: the sampled policy solid, the noise-free one dashed.

    Lines are interquartile means over seeds, bands 95 % bootstrap intervals of the sampled policy.
    """
    many = len(curves) > 10
    figure = Figure(figsize=(8.0, 6.0) if many else (6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        color = colormaps["tab20"](i) if many else f"C{i}"
        low, high = interval(curve.returns)
        axes.plot(curve.steps, iqm(curve.returns), color=color, label=curve.label)
        axes.fill_between(curve.steps, low, high, color=color, alpha=0.2, linewidth=0)
        axes.plot(curve.eval_steps, iqm(curve.noise_free), "--", color=color, linewidth=1)
    axes.plot([], [], "--", color="gray", linewidth=1, label="noise-free policy")
    num_seeds = len(curves[0].noise_free)
    seeds = f"IQM and 95 % interval of {num_seeds} seeds" if num_seeds > 1 else "one seed"
    axes.set(
        xlabel=f"{curves[0].unit} per seed", ylabel=f"{curves[0].measure}\n{seeds}", title=title
    )
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    ncols = 4 if max(len(curve.label) for curve in curves) <= 16 else 3
    figure.legend(loc="outside lower center", ncols=ncols, fontsize="small", frameon=False)
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
