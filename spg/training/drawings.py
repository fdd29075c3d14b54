"""Moving pictures of Gymnax's physics and of finite worlds, drawn from the states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image

WIDTH = 4.8  # inches
FASTEST = 0.04  # seconds that a frame stays, at least; browsers slow down what is much faster


class Drawing(NamedTuple):
    """How to draw an environment: what stands still at once, what moves by the returned function.

    `start(axes, states, params)` is given the states of all steps, `[T, ...]`, and returns a
    function of the step.
    """

    start: Callable[[Axes, Any, Any], Callable[[int], None]]
    seconds: Callable[[Any], float]  # that a step lasts, from the parameters


def animate(path: Path, drawing: Drawing, states: Any, params: Any, *, title: str) -> None:
    """Write a GIF at the speed of the world; of fast worlds some frames are left out."""
    seconds = drawing.seconds(params)
    stride = max(1, round(FASTEST / seconds))
    figure = Figure(figsize=(WIDTH, 3.2), dpi=80, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    axes.set(aspect="equal", xticks=[], yticks=[])
    move = drawing.start(axes, states, params)
    frames = []
    for t in range(0, len(states.time), stride):
        move(t)
        axes.set_title(f"{title}, step {t}", fontsize="small")
        canvas.draw()
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        frames.append(frame.quantize(32, dither=Image.Dither.NONE))
    duration = round(1000 * stride * seconds)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=duration, loop=0)


def finite_world(num_states: int, names: tuple[str, ...] = ()) -> Drawing:
    """All states on a circle, with their names if given; the world's own, and its last move."""
    angle = 2 * np.pi * np.arange(num_states) / num_states
    place = np.stack([np.sin(angle), np.cos(angle)], 1)

    def start(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
        axes.set(xlim=(-2, 2), ylim=(-1.35, 1.35))
        axes.plot(*place.T, "o", color="lightgray", markersize=4)
        for (x, y), name in zip(place, names, strict=False):
            side = "left" if x > 0.01 else "right" if x < -0.01 else "center"
            axes.text(1.12 * x, 1.15 * y, name, ha=side, va="center", fontsize="xx-small")
        (moved,) = axes.plot([], [], color="C0")
        (here,) = axes.plot([], [], "o", color="C3", markersize=10)

        def move(t: int) -> None:
            path = place[s.state[max(t - 1, 0) : t + 1]]
            moved.set_data(*path.T)
            here.set_data(*path[-1:].T)

        return move

    return Drawing(start, lambda params: 0.25)


def bodies(ends: np.ndarray, radius: np.ndarray, seconds: float) -> Drawing:
    """Capsules from the side, in metres: ends `[T, n, 2, 3]`, radii `[n]`. The camera follows."""
    flat, reach = ends[..., [0, 2]], 2.0

    def start(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
        middle = flat[..., 0].mean((1, 2))
        metres = np.arange(np.floor(middle.min() - reach), middle.max() + reach + 1)
        axes.axhline(0, color="gray", linewidth=1, zorder=0)
        axes.vlines(metres, -0.12, 0, color="gray", linewidth=1)
        axes.set(ylim=(-0.5, max(1.7, flat[..., 1].max() + 0.3)))
        points = 72 * WIDTH / (2 * reach)  # of a metre
        shown = LineCollection(flat[0], linewidths=2 * radius * points, capstyle="round")
        axes.add_collection(shown)

        def move(t: int) -> None:
            shown.set_segments(flat[t])
            axes.set_xlim(middle[t] - reach, middle[t] + reach)

        return move

    return Drawing(start, lambda params: seconds)


def _cart_pole(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
    limit, length = float(params.x_threshold), 2 * float(params.length)
    axes.set(xlim=(-limit - 0.3, limit + 0.3), ylim=(-0.5, length + 0.5))
    axes.axhline(0, color="gray", linewidth=1, zorder=0)
    axes.vlines([-limit, limit], -0.15, 0.15, color="C3")
    cart = Rectangle((0, 0), 0.6, 0.3, color="C0")
    axes.add_patch(cart)
    (pole,) = axes.plot([], [], color="C1", linewidth=5, solid_capstyle="round")

    def move(t: int) -> None:
        x, angle = s.x[t], s.theta[t]
        cart.set_xy((x - 0.3, -0.15))
        pole.set_data([x, x + length * np.sin(angle)], [0, length * np.cos(angle)])

    return move


def _arm(axes: Axes, x: np.ndarray, y: np.ndarray, reach: float) -> Callable[[int], None]:
    """Links from the origin through the joints at x, y, `[T, links]`."""
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach))
    (links,) = axes.plot([], [], "o-", color="C0", linewidth=4, solid_capstyle="round")
    return lambda t: links.set_data([0, *x[t]], [0, *y[t]])


def _pendulum(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
    length = float(params.l)  # θ = 0 is up, and θ grows counterclockwise
    x, y = -length * np.sin(s.theta), length * np.cos(s.theta)
    return _arm(axes, x[:, None], y[:, None], 1.3 * length)


def _acrobot(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
    lengths = np.array([params.link_length_1, params.link_length_2], float)
    axes.axhline(1.0, color="C2", linestyle="--")  # the height to reach
    angle = np.stack([s.joint_angle1, s.joint_angle1 + s.joint_angle2], 1)  # 0 is down
    x, y = np.cumsum(lengths * np.sin(angle), 1), np.cumsum(-lengths * np.cos(angle), 1)
    return _arm(axes, x, y, 1.2 * lengths.sum())


def _reacher(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
    x, y = np.cumsum(np.cos(s.angles), 1), np.cumsum(np.sin(s.angles), 1)
    (goal,) = axes.plot([], [], "*", color="C2", markersize=14)
    links = _arm(axes, x, y, 1.5 * x.shape[1])

    def move(t: int) -> None:
        links(t)
        goal.set_data(s.goal_xy[t, :1], s.goal_xy[t, 1:])

    return move


def _mountain_car(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
    height = lambda x: 0.45 * np.sin(3 * x)
    x = np.linspace(float(params.min_position), float(params.max_position), 200)
    goal = float(params.goal_position)
    axes.set(xlim=(x[0] - 0.1, x[-1] + 0.1), ylim=(-0.6, 0.75))
    axes.plot(x, height(x), color="gray")
    axes.vlines([goal], height(goal), height(goal) + 0.2, color="C2")
    axes.plot([goal], [height(goal) + 0.2], "^", color="C2")
    (car,) = axes.plot([], [], "o", color="C0", markersize=12)
    return lambda t: car.set_data([s.position[t]], [height(s.position[t]) + 0.05])


def _points(position: str, goal: str, hazards: str = "") -> Callable:
    """A point, the way so far, where to go, and what to keep away from."""

    def start(axes: Axes, s: Any, params: Any) -> Callable[[int], None]:
        x, target = (np.asarray(vars(s)[name]) for name in (position, goal))
        near = np.asarray(vars(s)[hazards]) if hazards else np.zeros((len(x), 0, 2))
        half = 1.1 * np.abs(np.concatenate([x, target, near.reshape(-1, 2)])).max()
        axes.set(xlim=(-half, half), ylim=(-half, half))
        disc = Circle((0, 0), 0.05 * half, color="C2", alpha=0.6)
        axes.add_patch(disc)
        (keep_off,) = axes.plot([], [], "x", color="C3")
        (way,) = axes.plot([], [], color="C0", linewidth=1)
        (point,) = axes.plot([], [], "o", color="C0")
        opens = np.flatnonzero(np.diff(s.time, prepend=np.inf) < 0)  # an episode

        def move(t: int) -> None:
            since = opens[opens <= t].max(initial=0)
            disc.set_center((target[t, 0], target[t, 1]))
            keep_off.set_data(near[t, :, 0], near[t, :, 1])
            way.set_data(x[since : t + 1, 0], x[since : t + 1, 1])
            point.set_data(x[t, :1], x[t, 1:])

        return move

    return start


DRAWINGS = {
    "CartPole-v1": Drawing(_cart_pole, lambda params: float(params.tau)),
    "Pendulum-v1": Drawing(_pendulum, lambda params: float(params.dt)),
    "Acrobot-v1": Drawing(_acrobot, lambda params: 1 / 15),  # three times too fast, as in Gym
    "MountainCar-v0": Drawing(_mountain_car, lambda params: 1 / 30),
    "MountainCarContinuous-v0": Drawing(_mountain_car, lambda params: 1 / 30),
    "Reacher-misc": Drawing(_reacher, lambda params: float(params.dt)),
    "Swimmer-misc": Drawing(_points("xy", "goal_xy", "urchin_xys"), lambda p: float(p.dt)),
    "PointRobot-misc": Drawing(_points("pos", "goal"), lambda params: 0.1),
}
"""By the names of Gymnax."""
