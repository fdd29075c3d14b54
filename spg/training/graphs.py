"""The picture of a finite-state controller as a graph: I-states, observations, actions."""

import textwrap
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch
from matplotlib.path import Path as Curve

from spg.exact import gamp
from spg.kernels.finite import tables
from spg.kernels.kernel import Kernel
from spg.training import controllers
from spg.training.controllers import Edge, Stationary, edges, visits
from spg.worlds.models import Problem

MOST_NODES, LEAST_SHARE, RADIUS = 24, 1e-3, 0.3  # of a picture; radius in inches
CAPTION = "observation, Pr(this edge | it): action, Pr(action); from .95 on without number"


def save_best(kernels: Kernel, problem: Problem, out: Path) -> None:
    """Save the best of several controllers, `controller.npz`, and draw that one, `controller.png`.

    The best has the largest average reward, computed from the model.
    """
    solve = eqx.filter_jit(lambda kernel: gamp.long_run(kernel, problem.pomdp))
    each = [jax.tree.map(lambda x: x[i], kernels) for i in range(len(kernels.z0))]  # noqa: B023
    solutions = [solve(kernel) for kernel in each]
    rewards = [float(s.average_reward) if s.converged else -np.inf for s in solutions]
    best = int(np.argmax(rewards))
    controllers.save(out / "controller.npz", each[best], problem, solutions[best].stationary)
    reward = float(solutions[best].average_reward)
    title = f"{problem.name}, average reward of this controller {reward:.4g}"
    draw(out / "controller.png", each[best], problem, solutions[best].stationary, title)


def draw(path: Path, kernel: Kernel, problem: Problem, stationary: Stationary, title: str) -> None:
    """Draw a controller as a graph, `controller.png`, if it visits at most 24 I-states.

    The graph shows I-states with Pr(g) > 0.1 %, with number and Pr(g); a double ring marks z0. Of
    the edges that carry over 1 % of the visits to their source, the graph shows the best into and
    out of each I-state and then the most probable ones, at most thirty or three per I-state. The
    width of an edge grows with Pr(g, h); edges and labels have the colour of the source. A label
    lists up to six observations; of more than six the first three, or fewer where room is short,
    and then '+n'.
    """
    seen = visits(problem.pomdp, stationary)
    share, z0 = seen.sum(0), int(kernel.z0)
    if not 0 < np.sum(share > LEAST_SHARE) <= MOST_NODES:
        return
    every = edges(tables(kernel, jnp.arange(problem.pomdp.num_obs)), seen, least=0.01)
    every = [e for e in every if min(share[e.source], share[e.target]) > LEAST_SHARE]
    order = _ring(share, every, z0)
    n = len(order)
    best = {(k, e[k]): i for i, e in reversed([*enumerate(every)]) for k in (0, 1)}.values()
    rank = sorted(range(len(every)), key=lambda i: (i not in best, i))
    shown = [every[i] for i in sorted(rank[: max(3 * n, 30)])]

    angle = np.pi * (0.5 if n > 2 else 1) - 2 * np.pi * np.arange(n) / n  # clockwise
    around = np.stack([np.cos(angle), np.sin(angle)], 1)
    points = max(2.1, n / 6) * around
    wider = 3.4 if n > 8 else 4.4 if n > 2 else 7.5 - 2.1 * n  # room for loops and labels
    size = np.ptp(points, axis=0) + np.array([wider, 3.0])
    points += size / 2 - (points.min(0) + points.max(0)) / 2 - [0, 0.1 if n > 2 else 0.4]
    place = dict(zip(order, points, strict=True))
    outward = dict(zip(order, around if n > 2 else np.array([[0.0, 1.0]] * n), strict=True))
    color = {g: hsv_to_rgb([(0.6 + 0.382 * i) % 1, 0.9, 0.6]) for i, g in enumerate(order)}

    figure = Figure(figsize=(size[0], size[1]), dpi=120)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, size[0]), ylim=(0, size[1]))
    axes.axis("off")
    axes.text(size[0] / 2, size[1] - 0.1, title, ha="center", va="top", fontsize=11)
    drawn = sum(e.probability for e in shown)
    note = f"{CAPTION}\n{len(shown)} of {len(every)} edges, {drawn:.0%} of the steps"
    axes.text(size[0] / 2, 0.06, note, ha="center", va="bottom", fontsize=7, color="gray")
    for g, (x, y) in place.items():
        for radius in (RADIUS, RADIUS - 0.04)[: 1 + (g == z0)]:
            axes.add_patch(Circle((x, y), radius, fc="white", ec=color[g], lw=1.5, zorder=2))
        percent = f"{share[g]:.1%}" if share[g] < 0.1 else f"{share[g]:.0%}"
        axes.text(x, y, str(g), ha="center", va="bottom", fontsize=10, color=color[g], zorder=3)
        axes.text(x, y - 0.02, percent, ha="center", va="top", fontsize=7, zorder=3)

    curves = [_curve(place[e.source], place[e.target], outward[e.source]) for e in shown]
    taken = [(x - RADIUS - 0.04, x + RADIUS + 0.04) for x in place.values()]
    room = np.array([0, 0.35]), size - [0, 0.35]
    for i, e in enumerate(shown):
        hue, width = color[e.source], 0.5 + 2.5 * np.sqrt(e.probability / shown[0].probability)
        arrow = FancyArrowPatch(path=Curve(curves[i]), arrowstyle="-|>", color=hue, alpha=0.75)
        arrow.set(linewidth=width, mutation_scale=7 + 2 * width)
        axes.add_patch(arrow)
        others = np.concatenate([np.empty((0, 2)), *curves[:i], *curves[i + 1 :]])
        for label in _labels(e, problem, 6 if n < 9 else 3):
            text = axes.text(0, 0, label, ha="center", va="center", ma="left", zorder=4, color=hue)
            text.set(fontsize=8 if n < 9 else 7, bbox={"fc": "w", "ec": hue, "lw": 0.3, "pad": 1})
            half = np.array(text.get_window_extent().size) / (2 * figure.dpi) + 0.03
            spot = _spot(curves[i], e.source != e.target, half, room, taken, others)
            if spot is not None:
                text.set_position((spot[0], spot[1]))
                taken.append((spot - half, spot + half))
                break
            text.remove()
    figure.savefig(path)


def _ring(share: np.ndarray, every: list[Edge], z0: int) -> list[int]:
    """The I-states in a circle: next comes the most probable successor not there yet."""
    flow = {(e.source, e.target): e.probability for e in every}
    left, order = {int(g) for g in np.flatnonzero(share > LEAST_SHARE)}, []
    while left:
        rank = lambda g: (flow.get((order[-1], g), 0) if order else float(g == z0), share[g])
        order.append(max(left, key=rank))
        left.remove(order[-1])
    return order


def _curve(start: np.ndarray, end: np.ndarray, outward: np.ndarray) -> Float[np.ndarray, "N 2"]:
    """Points of an arrow from circle to circle that bends to the left; of a loop, outward."""
    t, loop = np.linspace(0, 1, 200)[:, None], np.all(start == end)
    along = outward if loop else end - start
    u = 0.42 - 0.26 * np.cos(2 * np.pi * t) if loop else t
    v = 0.26 * np.sin(2 * np.pi * t) if loop else 0.36 * t * (1 - t)
    points = start + u * along + v * np.array([-along[1], along[0]])
    return points[np.all([np.linalg.norm(points - x, axis=1) > RADIUS for x in (start, end)], 0)]


def _spot(curve, on_curve: bool, half, room, taken, others) -> np.ndarray | None:
    """Where a label of half the size `half`, in `room` and off all `taken`, hides few `others`."""
    t = 0.5 + 0.04 * np.array([0, 1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6])
    spots = curve[(t * len(curve)).astype(int)]
    side = curve[len(curve) // 2] - (curve[0] + curve[-1]) / 2
    side /= np.linalg.norm(side)
    spots = np.concatenate([spots[: len(t) * on_curve], spots + side * (half @ np.abs(side))])
    meets = lambda x, low, high: np.all((x + half > low) & (x - half < high))
    fits = lambda x: np.all((x - half > room[0]) & (x + half < room[1]))
    free = [i for i, x in enumerate(spots) if fits(x) and not any(meets(x, *box) for box in taken)]
    hidden = lambda i: np.sum(np.all(np.abs(others - spots[i]) < half, 1)) / 5
    return spots[min(free, key=lambda i: hidden(i) + 0.4 * i)] if free else None


def _labels(edge: Edge, problem: Problem, most: int) -> list[str]:
    """What an edge may be labelled with, the longest first: 's0 / s1 .70: N', a line per action."""
    number = lambda p: "" if p >= 0.95 else " " + f"{p:.2f}"[1:]
    join = lambda parts: "\xa0/ ".join(x.replace(" ", "\xa0") for x in parts)  # no line break there
    wrap = textwrap.TextWrapper(36, subsequent_indent="  ", break_long_words=False)
    out = []
    for count in [len(edge.obs)] * (len(edge.obs) <= most) + [3, 2, 1]:
        lines: dict[str, list[str]] = {}
        for o, omega, mu in zip(edge.obs[:count], edge.omega, edge.mu, strict=False):
            likely = [a for a in np.argsort(-mu) if mu[a] > 0.1] or [np.argmax(mu)]
            act = join(problem.actions[a] + number(mu[a]) for a in likely)
            lines.setdefault(act, []).append(problem.observations[o] + number(omega))
        text = [wrap.fill(join(obs) + f": {act}") for act, obs in lines.items()]
        out.append("\n".join(text + [f"+{len(edge.obs) - count}"] * (count < len(edge.obs))))
    return [label for label in out if label.count("\n") < 6] or out[-1:]
