"""Worlds in which gradients of restricted policies are myopic, for k-step policy gradients.

All but CartPole's dynamics are our constructions.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from spg.limits import Range, fits
from spg.worlds.models import Problem, aggregate, sparse_pomdp


def chain(n: int = 4, reward: float = 0.3) -> Problem:
    """Stay and earn a little, or advance n steps blindly to where advancing earns 1.

    State 0..n, one observation. 'stay' leads to 0, and earns `reward` in 0 alone; 'advance' leads
    one on, and earns 1 in n, where it remains. Held for ever they earn reward/(1 - γ) and
    γⁿ/(1 - γ). Never advancing is a strict local maximum of the memoryless policy for every
    positive reward; the k-step gradient leaves it iff reward < (γⁿ - γ^k) / (1 - γ^{k+1}).
    Raises ValueError unless n >= 1.
    """
    Range(1, 2**30, whole=True).check("n", n)
    Range().check("reward", reward)
    fits(300 * n, f"a chain of {n:,} steps")  # lists, their sorting, names
    state = np.arange(n + 1)
    s, a = np.repeat(state, 2), np.tile([0, 1], n + 1)
    to = np.stack([0 * state, np.minimum(state + 1, n)], 1).ravel()
    earned = np.where(a == 0, reward * (s == 0), s == n)
    return Problem(
        f"chain-{n}",
        sparse_pomdp(
            (s, a, to, np.ones(len(s)), earned),
            (state, 0 * state, np.ones(n + 1)),
            state == 0,
            num_actions=2,
            num_obs=1,
        ),
        tuple(map(str, state)),
        ("stay", "advance"),
        ("anywhere",),
        0.9,
    )


def two_states(reward: float = 0.5) -> Problem:
    """The chain with one step: 'stay' in the first state, or 'advance' to the second."""
    return chain(1, reward)


def matching(m: int = 2, reward: float = 0.3) -> Problem:
    """Number matching: two agents with private counters in 0..m, which each may move by one.

    State and observation (i, j), row-major, of which each agent sees its own counter: `slots`.
    Actions (down, stay, up)², row-major. In (0, 0), the start, a step earns `reward`, in (m, m) 1,
    else nothing. Both going down is a local maximum if the agents draw independently, for every
    positive reward; of one draw for both, held k >= m steps, 'up' improves upon 'return to 0' iff
    reward < (γ^m - γ^{k+1}) / (γ - γ^{k+m}). Raises ValueError unless m >= 1.
    """
    Range(1, 10**6, whole=True).check("m", m)
    Range().check("reward", reward)
    size = (m + 1) ** 2
    fits(1500 * size, f"matching of {size:,} states")
    s, a = (x.ravel() for x in np.mgrid[:size, :9])
    i, j = np.divmod(s, m + 1)
    up, right = np.divmod(a, 3)
    to = np.clip(i + up - 1, 0, m) * (m + 1) + np.clip(j + right - 1, 0, m)
    earned = np.where(s == 0, reward, s == size - 1)
    state = np.arange(size)
    names = tuple(f"{x} {y}" for x in range(m + 1) for y in range(m + 1))
    moves = ("down", "stay", "up")
    own = np.stack(np.divmod(state, m + 1), 1)
    return Problem(
        f"matching-{m}",
        sparse_pomdp(
            (s, a, to, np.ones(len(s)), earned),
            (state, state, np.ones(size)),
            state == 0,
            num_actions=9,
            num_obs=size,
        ),
        names,
        tuple(f"{x} {y}" for x in moves for y in moves),
        names,
        0.9,
        slots=own + (m + 1) * np.arange(2),
    )


def random_aggregated(
    num_states: int = 6, num_obs: int = 3, num_actions: int = 2, *, seed: int = 0
) -> Problem:
    """A random world whose states are seen in groups of equal size, as nearly as may be.

    Rows of transitions are normalised Gamma(.3) draws, rewards uniform in [0, 1]; starts in 0.
    Raises ValueError for a number below 1, and for more observations than states.
    """
    Range(1, 10**9, whole=True).check("num_states", num_states)
    Range(1, 10**9, whole=True).check("num_actions", num_actions)
    Range(1, num_states, whole=True).check("num_obs", num_obs)
    size = num_states**2 * num_actions
    fits(120 * size, f"a random world of {size:,} transitions")
    rng = np.random.default_rng(seed)
    transition = rng.gamma(0.3, size=(num_states, num_actions, num_states))
    transition /= transition.sum(-1, keepdims=True)
    earned = rng.uniform(size=(num_states, num_actions))
    s, a, to = np.indices(transition.shape).reshape(3, -1)
    state = np.arange(num_states)
    pomdp = sparse_pomdp(
        (s, a, to, transition.ravel(), earned[s, a]),
        (state, state, np.ones(num_states)),
        state == 0,
        num_actions=num_actions,
        num_obs=num_states,
    )
    return Problem(
        f"random-{num_states}-{num_obs}",
        aggregate(pomdp, state * num_obs // num_states),
        tuple(map(str, state)),
        tuple(map(str, range(num_actions))),
        tuple(map(str, range(num_obs))),
        0.9,
    )


def cartpole(bins: int = 10, *, repeat: int = 2) -> Problem:
    """Gymnax's CartPole on a grid of bins⁴ nodes, of which the signs of x and of θ are seen.

    An action is applied `repeat` times; the state that it leads to is spread over the 16 nodes
    around it with the weights of multilinear interpolation, so that its mean is kept (Kushner &
    Dupuis, 2001), but for velocities, which are clipped to the grid. Reward 1 until the pole falls
    or the cart leaves, at the ends of the grid; then nothing, for ever. Starts at rest in the
    middle. Raises ValueError unless bins >= 2 and repeat >= 1.
    """
    from gymnax.environments.classic_control.cartpole import CartPole, EnvState

    Range(2, 10**6, whole=True).check("bins", bins)
    Range(1, 1000, whole=True).check("repeat", repeat)
    fits(5000 * bins**4, f"a cart-pole of {bins:,}^4 nodes")
    env = CartPole()
    params = env.default_params
    limit = np.array([params.x_threshold, 3.0, params.theta_threshold_radians, 3.5])
    axes = [np.linspace(-b, b, bins + 2) for b in limit]  # with the ends, where it has fallen
    nodes = np.stack(np.meshgrid(*(axis[1:-1] for axis in axes), indexing="ij"), -1).reshape(-1, 4)
    size = len(nodes)
    fallen = size
    number = np.pad(np.arange(size).reshape((bins,) * 4), 1, constant_values=fallen).ravel()

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    @partial(jax.vmap, in_axes=(None, 0))
    def move(node, action):
        x, x_dot, theta, theta_dot = node
        state, gone = EnvState(0, x, x_dot, theta, theta_dot), False
        for _ in range(repeat):
            _, state, _, terminated, _ = env.step_env(jr.key(0), state, action, params)
            gone |= terminated
        return jnp.stack([state.x, state.x_dot, state.theta, state.theta_dot]), gone

    moved, gone = map(np.asarray, move(jnp.asarray(nodes), jnp.arange(2)))
    inside = [np.inf, axes[1][-2], np.inf, axes[3][-2]]  # velocities are clipped
    moved = np.clip(moved.reshape(-1, 4), np.negative(inside), inside)
    corner, weight = _interpolate(np.concatenate([moved, np.zeros((3, 4))]), axes)
    corner = number[corner]
    start = np.bincount(corner[-1], weight[-1], size + 1)
    gone = np.append(gone, [True, True])[:, None]  # what has fallen lies
    s, a = (np.repeat(x, 16) for x in np.mgrid[: size + 1, :2])
    state = np.arange(size + 1)
    pomdp = sparse_pomdp(
        (
            s,
            a,
            np.where(gone, fallen, corner[:-1]).ravel(),
            np.where(gone, np.eye(16)[0], weight[:-1]).ravel(),
            (s != fallen) * 1.0,
        ),
        (state, state, np.ones(size + 1)),
        start,
        num_actions=2,
        num_obs=size + 1,
    )
    seen = np.append(2 * (nodes[:, 0] > 0) + (nodes[:, 2] > 0), 0)
    sides = ("left", "right")
    return Problem(
        f"cartpole-{bins}",
        aggregate(pomdp, seen),
        (*(np.array2string(x, precision=2) for x in nodes), "fallen"),
        sides,
        tuple(f"cart {x}, pole {y}" for x in sides for y in sides),
        0.95,
    )


TRAPS: dict[str, Callable[[], Problem]] = {
    "twostate": two_states,
    "chain": chain,
    "matching": matching,
    "aggregated": random_aggregated,
    "cartpole": cartpole,
}


def _interpolate(points: np.ndarray, axes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The 2^d nodes around each point, row-major, and their weights; clipped to the grid."""
    index, weight = np.zeros((len(points), 1), int), np.ones((len(points), 1))
    for x, axis in zip(points.T, axes, strict=True):
        place = np.clip((x - axis[0]) / (axis[1] - axis[0]), 0, len(axis) - 1)
        low = np.minimum(place.astype(int), len(axis) - 2)
        high = place - low
        index = (index[:, :, None] * len(axis) + low[:, None, None] + [0, 1]).reshape(
            len(points), -1
        )
        sides = np.stack([1 - high, high], -1)
        weight = (weight[:, :, None] * sides[:, None]).reshape(len(points), -1)
    return index, weight
