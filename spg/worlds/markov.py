"""Worlds whose transitions are permutations, or nearly: where a linear memory can filter."""

import numpy as np

from spg.limits import Range, fits
from spg.worlds.models import Problem, sparse_pomdp

PROBABILITY = Range(0, 1)


def swap_hmm(epsilon: float, *, controlled: bool = False) -> Problem:
    """Two states that swap with probability 1 - ε, Zhao et al. (2026), section 6.1.

    Each is seen through 10 % noise. Starts in 0. The controlled one, of ours, has two actions, one
    to swap and one to stay, each with the other's effect with probability ε. Rewards are 0.
    """
    PROBABILITY.check("epsilon", epsilon)
    swap = np.array([[epsilon, 1 - epsilon], [1 - epsilon, epsilon]])
    actions = ("stay", "swap") if controlled else ("swap",)
    transition = np.stack([1 - swap, swap] if controlled else [swap])
    emission = np.array([[0.9, 0.1], [0.1, 0.9]])
    name = f"swap-{epsilon:.6g}"
    return _problem(name, transition, emission, np.eye(2)[0], actions=actions)


def random_hmm(
    num_states: int,
    *,
    num_obs: int = 4,
    num_actions: int = 1,
    epsilon: float = 0.0,
    contrast: float = 1.0,
    seed: int = 0,
) -> Problem:
    """Random permutations Π(a), and emissions ∝ exp(N(0, contrast²)): positive, columns differ.

    T(a) = (1-ε) Π(a) + ε R(a) with columns of R(a) uniform on the simplex. Start uniform, rewards
    0. Raises ValueError for a size below 1 or ε outside [0, 1].
    """
    sizes = {"num_states": num_states, "num_obs": num_obs, "num_actions": num_actions}
    for name, size in sizes.items():
        Range(1, 10**9, whole=True).check(name, size)
    PROBABILITY.check("epsilon", epsilon)
    Range(0, 100).check("contrast", contrast)
    fits(60 * num_states**2 * num_actions, f"a random model of {num_states:,} states")
    rng = np.random.default_rng(seed)
    targets = rng.permuted(np.tile(np.arange(num_states), (num_actions, 1)), axis=1)
    noise = rng.exponential(size=(num_actions, num_states, num_states))
    noise /= noise.sum(-1, keepdims=True)
    transition = (1 - epsilon) * np.eye(num_states)[targets] + epsilon * noise
    emission = np.exp(contrast * rng.normal(size=(num_states, num_obs)))
    emission /= emission.sum(-1, keepdims=True)
    start = np.full(num_states, 1 / num_states)
    return _problem(f"random-hmm-{num_states}", transition, emission, start)


def ringworld(*, epsilon: float = 0.05) -> Problem:
    """RingWorld, our stand-in for section 6.2 of Zhao et al. (2026), who do not publish all of it.

    Positions 1 to 12 lie on a circle, 30° apart. Actions move by one or two, clockwise or not; with
    probability ε/2 the agent stays, with ε/2 it goes one further. It sees one of four beacons, at
    angles ξ of 0°, 70°, 170° and 250°, with probability ∝ exp(2 cos(θ - ξ)). Reward 1 on arrival in
    2 and 3, -1 in 6, 11 and 12. Start uniform. The angles, the noise and the discount are ours.
    """
    PROBABILITY.check("epsilon", epsilon)
    size, moves = 12, {"CW1": 1, "CW2": 2, "CCW1": -1, "CCW2": -2}
    eye = np.eye(size)
    shifts = lambda n: np.roll(eye, n, 1)  # [s, s'], s' = s + n
    slip = epsilon / 2
    transition = np.stack(
        [(1 - epsilon) * shifts(n) + slip * (eye + shifts(n + np.sign(n))) for n in moves.values()]
    )
    angle = np.deg2rad(30.0 * np.arange(size)[:, None] - np.array([0.0, 70.0, 170.0, 250.0]))
    emission = np.exp(2 * np.cos(angle))
    emission /= emission.sum(1, keepdims=True)
    reward = np.zeros(size)
    reward[[1, 2]] = 1
    reward[[5, 10, 11]] = -1
    return _problem(
        "ringworld-stand-in", transition, emission, np.full(size, 1 / size), reward,
        states=tuple(str(s + 1) for s in range(size)), actions=tuple(moves),
        observations=("beacon 0°", "beacon 70°", "beacon 170°", "beacon 250°"),
    )  # fmt: skip


def _problem(
    name: str,
    transition: np.ndarray,  # [A, S, S], P(s' | s, a) at [a, s, s']
    emission: np.ndarray,  # [S, O]
    start: np.ndarray,
    reward: np.ndarray | None = None,  # [S], on arrival
    states: tuple[str, ...] = (),
    actions: tuple[str, ...] = (),
    observations: tuple[str, ...] = (),
) -> Problem:
    a, s, t = np.nonzero(transition)
    u, o = np.nonzero(emission)
    reward = np.zeros(len(start)) if reward is None else reward
    states = states or tuple(map(str, range(len(start))))
    actions = actions or tuple(map(str, range(len(transition))))
    observations = observations or tuple(map(str, range(emission.shape[1])))
    pomdp = sparse_pomdp(
        (s, a, t, transition[a, s, t], reward[t]), (u, o, emission[u, o]), start,
        num_actions=len(actions), num_obs=len(observations), states=states, actions=actions,
        observations=observations,
    )  # fmt: skip
    return Problem(name, pomdp, states, actions, observations, 0.99)
