"""Pictures of where the policy goes in the fields of `PointMass` and `Doors`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from jaxtyping import PRNGKeyArray
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle

from spg.envs.point_mass import (
    COLUMNS,
    DOOR_WIDTH,
    FIELD,
    HALF_THICKNESS,
    HIGH,
    LOW,
    REACHED,
    WALLS,
)
from spg.kernels.kernel import Kernel
from spg.rollout import watch
from spg.types import Env

LONGEST = 1000  # steps of a path
OUTCOMES = {"reached the goal": "C0", "did not": "C1", "crashed": "C3"}
THIN = {"linewidth": 0.8, "color": "gray", "linestyle": "--"}


class Episode(NamedTuple):
    """One episode: its states before each step `[T, ...]`, and how it ended."""

    states: Any
    reached: bool
    crashed: bool


class Paths(NamedTuple):
    """How many episodes a picture shows, and how to draw them."""

    num_episodes: int
    draw: Callable[[Figure, Any, Sequence[Episode]], None]


def save(kernel: Kernel, env: Env, own: Any, path: Path, *, key: PRNGKeyArray) -> None:
    """Draw some episodes of the sampled policy; `own` is the environment behind the adapter."""
    count, draw = PATHS[own.name]
    num_steps = int(min(env.params.max_steps_in_episode, LONGEST))
    one = lambda kernel, key: watch(kernel, env, num_steps=num_steps, noise=True, key=key)
    play = jax.jit(jax.vmap(one, (None, 0)))
    states, steps = jax.device_get(play(kernel, jr.split(key, count)))
    states = states if own is env.environment else states.env
    ends = steps.terminated | steps.truncated
    last = np.where(ends.any(1), ends.argmax(1), num_steps - 1)
    episodes = []
    for i, t in enumerate(last):
        walked = jax.tree.map(lambda x: x[i, : t + 1], states)  # noqa: B023
        reached = (steps.reward[i, : t + 1] >= own.success_reward).any()
        episodes.append(Episode(walked, bool(reached), bool(steps.terminated[i, t])))
    figure = Figure(layout="constrained")
    draw(figure, own, episodes)
    arrived = sum(episode.reached for episode in episodes)
    figure.suptitle(f"{own.name}: {arrived} of {count} episodes reach the goal")
    figure.savefig(path, dpi=100)


def _point_mass(figure: Figure, own: Any, episodes: Sequence[Episode]) -> None:
    """All episodes in one field, a colour for each goal."""
    figure.set_size_inches(7.2, 5.6)
    axes = _field(figure.subplots())
    colours = {x: f"C{i}" for i, x in enumerate(COLUMNS)}
    for x, colour in colours.items():
        axes.add_patch(Circle((x, HIGH), REACHED, facecolor=colour, alpha=0.35, zorder=1))
        _circle(axes, (x, LOW), own.start_radius)
        axes.plot(x, LOW, "o", color="black", markersize=5, zorder=3)
    for episode in episodes:
        _path(axes, episode, colours[float(episode.states.goal[0, 0])])
    goals = [Line2D([], [], color=c, label=f"to the goal at {x:g}") for x, c in colours.items()]
    crash = Line2D([], [], marker="x", linestyle="", color="black", label="crash")
    marks = _marks("the goal is seen")
    figure.legend(handles=[*goals, *marks, crash], loc="outside right center")


def _doors(figure: Figure, own: Any, episodes: Sequence[Episode]) -> None:
    """A field for each episode, which has doors of its own; the colour tells how it ended."""
    figure.set_size_inches(9.6, 5.6)
    every = figure.subplots(2, len(episodes) // 2, sharex=True, sharey=True)
    for axes, episode in zip(every.flat, episodes, strict=True):
        _field(axes)
        axes.add_patch(Circle(own.goal, REACHED, facecolor="C2", alpha=0.5, zorder=1))
        _circle(axes, own.start, own.start_radius)
        axes.plot(*own.start, "o", color="black", markersize=4, zorder=3)
        for height, left in zip(WALLS, episode.states.edges[0], strict=True):
            right = left + DOOR_WIDTH
            for x, width in ((0.0, left), (right, FIELD - right)):
                corner = (x, height - HALF_THICKNESS)
                axes.add_patch(Rectangle(corner, width, 2 * HALF_THICKNESS, color="dimgray"))
        _path(axes, episode, _colour(episode))
    ends = [Line2D([], [], color=colour, label=name) for name, colour in OUTCOMES.items()]
    ends[-1].set(marker="x", markersize=7, markeredgewidth=2)
    goal = Line2D(
        [], [], marker="o", linestyle="", color="C2", markersize=8, alpha=0.5, label="goal"
    )
    handles = [*ends, *_marks("the doors are seen"), goal]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


PATHS = {"PointMass-memory": Paths(24, _point_mass), "Doors-memory": Paths(8, _doors)}
"""By the names of the environments."""


def _field(axes: Axes) -> Axes:
    axes.set(aspect="equal", xlim=(-4, FIELD + 4), ylim=(-4, FIELD + 4))
    axes.set(xticks=range(0, 151, 50), yticks=range(0, 151, 50))
    axes.tick_params(length=0)
    axes.add_patch(Rectangle((0, 0), FIELD, FIELD, fill=False, linewidth=1.2))
    for side in axes.spines.values():
        side.set_visible(False)
    return axes


def _circle(axes: Axes, start: tuple[float, float], radius: float) -> None:
    """Where the policy sees what it has to remember."""
    circle = Circle(start, radius, fill=False, zorder=1, **THIN)
    axes.add_patch(circle)
    circle.set_clip_path(Rectangle((0, 0), FIELD, FIELD, transform=axes.transData))


def _path(axes: Axes, episode: Episode, colour: str) -> None:
    x, y = episode.states.position.T
    axes.plot(x, y, color=colour, linewidth=1.1, alpha=0.8, zorder=2)
    if episode.crashed:
        axes.plot(x[-1], y[-1], "x", color=colour, markersize=7, markeredgewidth=2, zorder=4)


def _colour(episode: Episode) -> str:
    ends = ("crashed" if episode.crashed else "did not", "reached the goal")
    return OUTCOMES[ends[episode.reached]]


def _marks(seen: str) -> list[Line2D]:
    """Of the legend."""
    return [
        Line2D([], [], marker="o", linestyle="", color="black", markersize=5, label="start"),
        Line2D([], [], label=f"inside: {seen}", **THIN),
    ]
