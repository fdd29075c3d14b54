"""Learning curves with the interquartile mean over seeds and its bootstrap interval."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
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
    """Returns of one run against environment steps: while training, and of its evaluations."""

    label: str
    steps: Float[np.ndarray, " points"]
    returns: Float[np.ndarray, "seeds points"]
    eval_steps: Float[np.ndarray, " evals"]
    noise_free: Float[np.ndarray, "seeds evals"]


def learning_curve(path: Path, curves: list[Curve], *, title: str) -> None:
    """Draw curves, one colour each: the sampled policy solid, the noise-free one dashed.

    Lines are interquartile means over seeds, bands 95 % bootstrap intervals of the sampled policy.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    for i, curve in enumerate(curves):
        color = f"C{i}"
        name = f"{curve.label} ({len(curve.noise_free)} seeds)"
        axes.plot(curve.steps, iqm(curve.returns), label=name, color=color)
        axes.fill_between(
            curve.steps, *interval(curve.returns), alpha=0.2, linewidth=0, color=color
        )
        label = f"{curve.label}, noise-free"
        axes.plot(
            curve.eval_steps, iqm(curve.noise_free), "--", alpha=0.7, label=label, color=color
        )
    axes.set(xlabel="environment steps per seed", ylabel="return (IQM, 95 % interval)", title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
