"""Something to watch of every environment: what the noise-free policy sees, keeps and does."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spg.kernels.kernel import Kernel
from spg.rollout import watch
from spg.training.drawings import DRAWINGS, animate, bodies, finite_world
from spg.training.records import write
from spg.types import Env, policy_view

LEAST, MOST = 60, 300  # steps of a film: those of an episode within these limits
ENDLESS = 100  # steps of a film where no episode ends
DRAWN = 1000  # states of a finite world in an animation, at most
NAMED = 24  # values that a panel writes out, at most
LINES = 6  # numbers that a panel draws as lines, at most; of more it shows a map


class Panel(NamedTuple):
    """One thing of every step: integers `[T]`, perhaps with names, or numbers `[T, D]`."""

    label: str
    values: np.ndarray
    names: tuple[str, ...] = ()


def save(kernel: Kernel, env: Env, out: Path, *, title: str, key: PRNGKeyArray) -> list[Path]:
    """Write `rollout.png`; also `rollout.html`, `rollout.gif` or `paths.png`.

    The page is for Brax, the animation for physics and worlds, the paths are for `PointMass` and
    `Doors`. In the rollout time goes to the right, and a vertical line opens an episode. The page
    loads Brax's viewer from the network. Worlds are those of at most `DRAWN` states.
    """
    from spg.envs import Brax, Tabular, capsules, render  # here: gymnax starts JAX's backend
    from spg.training import paths  # which imports it too

    clock = env.params.max_steps_in_episode
    num_steps = ENDLESS if clock is None else int(np.clip(clock, LEAST, MOST))
    own, states, steps = _play(kernel, env, num_steps=num_steps, key=key)
    written = [out / "rollout.png"]
    panels = [p for p in _panels(own, states, steps) if p.values.size]
    total = f"{num_steps} steps, {steps.reward.sum():.4g} of reward"
    _draw(written[0], panels, steps, title=f"{title}: {total}")
    drawing = DRAWINGS.get(own.name)
    if isinstance(own, Tabular) and len(own.pomdp.start) <= DRAWN:
        names = own.problem.states if own.problem is not None else ()
        drawing = finite_world(len(own.pomdp.start), names if len(names) <= NAMED else ())
    if isinstance(own, Brax) and hasattr(states.brax.pipeline_state, "x"):
        drawing = bodies(*capsules(own, states), seconds=float(own.brax.dt))
    if drawing is not None:
        written.append(out / "rollout.gif")
        animate(written[1], drawing, states, env.params, title=title)
    if isinstance(own, Brax):
        written.append(out / "rollout.html")
        write(written[-1], render(own, states))
    if own.name in paths.PATHS:
        written.append(out / "paths.png")
        paths.save(kernel, env, own, written[1], key=key)
    return written


def save_page(kernels: Kernel, env: Env, out: Path, *, num_steps: int = 300) -> None:
    """Of the first of the kernels: `rollout.html` in Brax, `paths.png` in `PointMass`, `Doors`."""
    from spg.envs import Brax, render  # here: importing gymnax starts JAX's backend
    from spg.training import paths  # which imports it too

    first, own = jax.tree.map(lambda x: x[0], kernels), _own(env)
    if isinstance(own, Brax):
        _, states, _ = _play(first, env, num_steps=num_steps, key=jr.key(0))
        write(out / "rollout.html", render(own, states))
    if own.name in paths.PATHS:
        paths.save(first, env, own, out / "paths.png", key=jr.key(0))


def _own(env: Env) -> Any:
    """The environment behind the adapter."""
    from spg.envs import Adapter  # here: importing gymnax starts JAX's backend

    environment = env.environment
    return environment.inner if isinstance(environment, Adapter) else environment


def _play(kernel: Kernel, env: Env, *, num_steps: int, key: PRNGKeyArray) -> Any:
    """The environment behind the adapter, its states, and the steps of the noise-free policy."""
    play = jax.jit(lambda kernel, key: watch(kernel, env, num_steps=num_steps, key=key))
    states, steps = jax.device_get(play(kernel, key))
    own = _own(env)
    return own, states if own is env.environment else states.env, steps


def _panels(own: Any, states: PyTree, steps: Any) -> list[Panel]:
    from spg.envs import Tabular  # here: importing gymnax starts JAX's backend

    seen, actions = [Panel("observation", _columns(policy_view(steps.obs)))], ()
    if isinstance(own, Tabular):
        names: tuple[tuple[str, ...], ...] = ((), ())
        if own.problem is not None:
            names, actions = (own.problem.states, own.problem.observations), own.problem.actions
        seen = [Panel("state", states.state, names[0]), Panel("observation", states.obs, names[1])]
    action = Panel("action", _columns(steps.action), actions)
    return [*seen, Panel("z'", _columns(steps.z_next)), action]


def _columns(tree: PyTree) -> np.ndarray:
    """Integers `[T]` as they are, everything else side by side, `[T, D]`."""
    leaves: list[Any] = [np.asarray(x) for x in jax.tree.leaves(tree)]
    if len(leaves) == 1 and leaves[0].ndim == 1 and np.issubdtype(leaves[0].dtype, np.integer):
        return leaves[0]
    flat = [x.reshape(len(x), -1) for x in leaves]
    parts = [part for x in flat for part in ((x.real, x.imag) if np.iscomplexobj(x) else (x,))]
    return np.concatenate([np.empty((len(parts[0]) if parts else 0, 0)), *parts], 1)


def _draw(path: Path, panels: list[Panel], steps: Any, *, title: str) -> None:
    heights = [_height(panel) for panel in panels] + [1.0]
    figure = Figure(figsize=(10, sum(heights) + 1), layout="constrained")
    every = figure.subplots(len(heights), sharex=True, gridspec_kw={"height_ratios": heights})
    for axes, panel in zip(every, panels, strict=False):
        _draw_panel(axes, panel)
    time = np.arange(len(steps.reward))
    every[-1].vlines(time, 0, steps.reward, color="C2")
    every[-1].set(ylabel="reward", xlabel="step", xlim=(-0.5, len(time) - 0.5))
    for axes in every:
        for t in np.flatnonzero(steps.first)[1:]:
            axes.axvline(t - 0.5, color="black", linewidth=0.5)
    figure.align_ylabels()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=100)


def _height(panel: Panel) -> float:
    """Inches."""
    if panel.values.ndim == 1:
        return float(np.clip(0.17 * _levels(panel), 0.6, 4.0))
    return float(np.clip(0.15 * panel.values.shape[1], 1.0, 3.0))


def _levels(panel: Panel) -> int:
    """How many values an axis of integers shows: all that have names, or up to the largest."""
    named = len(panel.names) if len(panel.names) <= NAMED else 0
    return max(int(panel.values.max()) + 1, named)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    """Integers as dots, few numbers as lines, many as a map, each relative to its largest."""
    values, time = panel.values, np.arange(len(panel.values))
    axes.set_ylabel(panel.label)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=values.ndim == 1))
    if values.ndim == 1:
        axes.plot(time, values, "o", markersize=3)
        axes.set_ylim(-0.5, _levels(panel) - 0.5)
        if 0 < len(panel.names) <= NAMED:
            axes.set_yticks(range(len(panel.names)), panel.names, fontsize="x-small")
    elif values.shape[1] <= LINES and not np.isin(values, (0, 1)).all():
        axes.plot(time, values)
    else:
        scale = np.maximum(np.abs(values).max(0), 1e-8)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.imshow(
            (values / scale).T,
            cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="nearest",
        )  # fmt: skip
