"""Point-based value iteration: what a policy that knows the belief earns, between two bounds.

From below, backups of α-vectors at beliefs that are reached in simulation (Pineau et al., 2003; all
of them at once, as in Spaan & Vlassis, 2005, from values that no policy undercuts). From above, the
fast informed bound and its interpolation between these beliefs (Hauskrecht, 2000).

A belief b(s) is what is known of the state once its observation is seen; its successor after
(a, o), times the probability of o, is τ(s') = O(o | s') Σ_s b(s) P(s' | s, a).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spg.kernels.finite import finite_kernel
from spg.kernels.kernel import Kernel
from spg.limits import Range, fits
from spg.types import Scalar
from spg.worlds import models
from spg.worlds.models import POMDP, DensePOMDP, SparsePOMDP

Belief = Float[Array, " S"]  # also times a probability


class PolicyGraph(NamedTuple):
    """A deterministic controller: in node i take `action[i]`, on o go to `successor[i, o]`."""

    action: Int[Array, " N"]
    successor: Int[Array, "N O"]
    alpha: Float[Array, "N S"]  # what following it earns from node i and state s on


class UpperBound(NamedTuple):
    """At b the least of max_a Σ_s b(s) Q(s, a) and of the sawtooth between points of known bound.

    V*(b) <= Σ_s b(s) v_s + min_i λ_i (v_i - Σ_s b_i(s) v_s), λ_i = min_s b(s) / b_i(s): V* is
    convex, and b is λ_i b_i and something on corners (Hauskrecht, 2000).
    """

    q_value: Float[Array, "S A"]  # of the fast informed bound
    points: Float[Array, "M S"]  # the corners first
    value: Float[Array, " M"]  # v

    def __call__(self, belief: Belief) -> Float[Array, ""]:
        i, ratio = self.nearest(belief)
        corner = self.value[: belief.size]
        sawtooth = belief @ corner + ratio * (self.value[i] - self.points[i] @ corner)
        return jnp.minimum(jnp.max(belief @ self.q_value), sawtooth)

    def nearest(self, belief: Belief) -> tuple[Int[Array, ""], Float[Array, ""]]:
        """The point i that bounds best, and λ_i."""
        gain = self.value - self.points @ self.value[: belief.size]
        ratio = jnp.where(self.points > 0, belief / self.points, jnp.inf).min(1)
        i = jnp.argmin(ratio * gain)
        return i, ratio[i]


class PointBased(NamedTuple):
    """The best discounted return from the start is between `lower` and `upper`, up to rounding."""

    graph: PolicyGraph  # its value is `lower`
    bound: UpperBound
    lower: Float[Array, ""]
    upper: Float[Array, ""]


def point_based_bounds(
    pomdp: POMDP,
    *,
    gamma: float,
    num_beliefs: int = 256,
    num_rounds: int = 6,
    num_backups: int = 100,
    num_runs: int = 64,
    key: PRNGKeyArray,
) -> PointBased:
    """Bounds at the start of a small world, in rounds of `num_backups` at each of the beliefs.

    A round spends its share of `num_beliefs` on those of `num_runs` simulated episodes that are
    far from all so far (in L1); the episodes end after 3 / (1 - γ) steps, and half of their actions
    are random, the others those of the last round. The graph with the best exact value is kept.
    A backup of N beliefs takes O(N² A |O| S). Raises ValueError for a world that is none or that
    is too large, and for numbers out of range.
    """
    models.check(pomdp)
    Range(0, 1, open="both").check("gamma", gamma)
    size, num_obs, num_actions = pomdp.start.size, pomdp.num_obs, pomdp.num_actions
    Range(num_obs, 10**5, whole=True, usual="at least one for each observation").check(
        "num_beliefs", num_beliefs
    )
    counts = {"num_rounds": num_rounds, "num_backups": num_backups, "num_runs": num_runs}
    for name, value in counts.items():
        Range(1, 10**6, whole=True).check(name, value)
    branches = num_beliefs * num_actions * num_obs
    fits(8 * branches * size, f"what follows {num_beliefs:,} beliefs of {size:,} states")
    world = models.dense(pomdp) if isinstance(pomdp, SparsePOMDP) else pomdp
    num_steps = int(np.ceil(3 / (1 - gamma)))
    beliefs = _normal(opening(world))[jnp.arange(num_beliefs) % num_obs]
    alpha = jnp.full_like(beliefs, world.reward.min() / (1 - gamma))
    unknown = jnp.zeros((num_beliefs, num_obs), int)
    best = graph = PolicyGraph(unknown[:, 0], unknown, alpha)
    for i in range(num_rounds):
        key, run_key = jr.split(key)
        runs = simulate(world, graph, num_runs=num_runs, num_steps=num_steps, key=run_key)
        begin, end = (num_obs + (num_beliefs - num_obs) * j // num_rounds for j in (i, i + 1))
        beliefs = _farthest(beliefs, runs, begin, end)
        graph, plans = improve(world, beliefs, alpha, gamma=gamma, num_backups=num_backups)
        followed, planned, least = (_at_start(world, x) for x in (graph.alpha, plans, best.alpha))
        alpha = graph.alpha if followed >= planned else plans
        best = graph if followed >= least else best
    bound = tighten(world, fast_informed_bound(world, gamma=gamma), beliefs, gamma=gamma)
    upper = jnp.sum(jax.vmap(bound)(opening(world)))
    return PointBased(best, bound, _at_start(world, best.alpha), upper)


def opening(world: DensePOMDP) -> Float[Array, "O S"]:
    """Pr(o, s) of the first observation: beliefs at the start, times their probability."""
    return world.observation.T * world.start


def follow(world: DensePOMDP, belief: Belief) -> Float[Array, "A O S"]:
    """τ of each action and observation."""
    moved = jnp.einsum("s,sat->at", belief, world.transition)
    return moved[:, None] * world.observation.T


@jax.jit
def improve(
    world: DensePOMDP, beliefs: Float[Array, "N S"], alpha: Float[Array, "N S"], *, gamma: Scalar,
    num_backups: int | Array,
) -> tuple[PolicyGraph, Float[Array, "N S"]]:  # fmt: skip
    """`num_backups` point-based backups of all beliefs: the last one's policy graph, and vectors.

        α_b = argmax_a b·[r(·, a) + γ Σ_{s'} P(s' | ·, a) Σ_o O(o | s') α_{a,o}(s')],
        α_{a,o} = argmax_α τ·α

    If every `alpha` is earned by some plan, so is every new vector, by one more step. Nodes of the
    graph are the beliefs; where o cannot be, it goes on as if the world started with o. Its values
    are exact, but for 1e-9 of the horizon: they come from r_min / (1 - γ), hence from below.
    """
    point = lambda alpha: lambda b: _backup(world, alpha, b, gamma)
    backed = lambda alpha: lax.map(point(alpha), beliefs, batch_size=64)
    before = lax.fori_loop(0, num_backups - 1, lambda _, alpha: backed(alpha)[2], alpha)
    action, successor, plans = backed(before)
    opened = jnp.argmax(opening(world) @ plans.T, 1)
    successor = jnp.where(successor < 0, opened, successor)
    least = jnp.full_like(alpha, world.reward.min() / (1 - gamma))
    return _evaluated(world, PolicyGraph(action, successor, least), gamma), plans


@jax.jit
def fast_informed_bound(world: DensePOMDP, *, gamma: Scalar) -> UpperBound:
    """Q(s, a) = r(s, a) + γ Σ_o max_a' Σ_{s'} P(s' | s, a) O(o | s') Q(s', a'), from above.

    Hauskrecht (2000); at most that of the world with full sight (QMDP). The sawtooth has
    its corners alone.
    """
    size = world.start.size

    def step(_, q):
        seen = jnp.einsum("sat,to,tb->saob", world.transition, world.observation, q)
        return jnp.minimum(q, world.reward + gamma * seen.max(-1).sum(-1))

    q = jnp.full_like(world.reward, world.reward.max() / (1 - gamma))
    q = lax.fori_loop(0, _horizon(gamma), step, q)
    return UpperBound(q, jnp.eye(size, dtype=q.dtype), q.max(1))


@jax.jit
def tighten(
    world: DensePOMDP, bound: UpperBound, beliefs: Float[Array, "N S"], *, gamma: Scalar
) -> UpperBound:
    """The bound with the sawtooth at corners and beliefs, after backups of the values there.

    v_i ← max_a b_i·r(·, a) + γ Σ_o U(τ), where that is less. Points between which τ lies are
    looked for ten times; of any others U would be a bound, too.
    """
    points = jnp.concatenate([jnp.eye(world.start.size, dtype=beliefs.dtype), beliefs])
    value = lax.map(bound, points, batch_size=64)
    tau = jax.vmap(partial(follow, world))(points)
    informed = jnp.max(tau @ bound.q_value, -1)
    reward = points @ world.reward

    def look(_, bound):
        i, ratio = lax.map(jax.vmap(jax.vmap(bound.nearest)), tau, batch_size=8)

        def backup(_, v):
            corner = v[: world.start.size]
            sawtooth = tau @ corner + ratio * (v - points @ corner)[i]
            future = jnp.minimum(informed, sawtooth).sum(-1)
            return jnp.minimum(v, jnp.max(reward + gamma * future, 1))

        return bound._replace(value=lax.fori_loop(0, 50, backup, bound.value))

    return lax.fori_loop(0, 10, look, UpperBound(bound.q_value, points, value))


@partial(jax.jit, static_argnames=("num_runs", "num_steps"))
def simulate(
    world: DensePOMDP, graph: PolicyGraph, *, num_runs: int, num_steps: int, key: PRNGKeyArray
) -> Float[Array, "B S"]:
    """The beliefs of episodes in which every action is the graph's or, as often, a random one."""

    def step(belief, u):
        greedy = graph.action[jnp.argmax(graph.alpha @ belief)]
        anything = (u[1] * world.num_actions).astype(greedy.dtype)
        action = jnp.where(u[0] < 0.5, greedy, anything)
        return _draw(follow(world, belief)[action], u[2]), belief

    def run(u):
        return lax.scan(step, _draw(opening(world), u[0, 2]), u[1:])[1]

    u = jr.uniform(key, (num_runs, num_steps + 1, 3), world.start.dtype)
    return jax.vmap(run)(u).reshape(-1, world.start.size)


def graph_kernel(world: DensePOMDP, graph: PolicyGraph) -> Kernel:
    """The nodes that the graph reaches from its start as a finite-state controller."""
    action, successor = np.asarray(graph.action), np.asarray(graph.successor)
    first = np.asarray(jnp.argmax(opening(world) @ graph.alpha.T, 1))
    reached, new = np.unique(first), np.unique(first)
    while new.size:
        new = np.setdiff1d(successor[new], reached)
        reached = np.union1d(reached, new)
    number = np.zeros(len(action), int)
    number[reached] = 1 + np.arange(len(reached))  # before them the one that opens an episode
    table = number[np.concatenate([first[None], successor[reached]])]
    acts = np.broadcast_to(np.insert(action[reached], 0, 0)[:, None], table.shape)
    chosen = jax.nn.one_hot(acts, world.num_actions, dtype=graph.alpha.dtype)
    shape = *table.shape, 1
    return finite_kernel(
        jnp.zeros(shape, graph.alpha.dtype), jnp.where(chosen > 0, 0, -jnp.inf),
        jnp.asarray(table).reshape(shape),
    )  # fmt: skip


def _backup(
    world: DensePOMDP, alpha: Float[Array, "N S"], belief: Belief, gamma: Scalar
) -> tuple[Int[Array, ""], Int[Array, " O"], Belief]:
    """The action, the α_{a,o} of each observation (-1 where it cannot be), and the new vector."""
    tau = follow(world, belief)
    chosen = jnp.argmax(tau @ alpha.T, -1)
    future = jnp.einsum("to,aot->at", world.observation, alpha[chosen])
    q = world.reward + gamma * jnp.einsum("sat,at->sa", world.transition, future)
    action = jnp.argmax(belief @ q)
    successor = jnp.where(tau[action].sum(-1) > 0, chosen[action], -1)
    return action, successor, q[:, action]


def _evaluated(world: DensePOMDP, graph: PolicyGraph, gamma: Scalar) -> PolicyGraph:
    """α_i(s) ← r(s, a_i) + γ Σ_{s'} P(s' | s, a_i) Σ_o O(o | s') α_{σ(i, o)}(s'), from α on."""
    reward, transition = world.reward[:, graph.action].T, world.transition[:, graph.action]

    def step(_, alpha):
        add = lambda o, x: x + world.observation[:, o] * alpha[graph.successor[:, o]]
        future = lax.fori_loop(0, world.num_obs, add, jnp.zeros_like(alpha))
        return reward + gamma * jnp.einsum("snt,nt->ns", transition, future)

    return graph._replace(alpha=lax.fori_loop(0, _horizon(gamma), step, graph.alpha))


def _horizon(gamma: Scalar) -> Int[Array, ""]:
    """Steps after which γ^n is 1e-9."""
    return jnp.ceil(jnp.log(1e-9) / jnp.log(gamma)).astype(int)


def _at_start(world: DensePOMDP, alpha: Float[Array, "N S"]) -> Float[Array, ""]:
    return jnp.max(opening(world) @ alpha.T, 1).sum()


def _draw(joint: Float[Array, "O S"], u: Array) -> Belief:
    """The belief after the observation that u, uniform in [0, 1), stands for."""
    total = jnp.cumsum(joint.sum(1))
    return _normal(joint)[jnp.sum(u * total[-1] >= total)]


def _normal(joint: Float[Array, "O S"]) -> Float[Array, "O S"]:
    """Beliefs; where an observation cannot be, that of all of them."""
    total = joint.sum(1, keepdims=True)
    return jnp.where(total > 0, joint / jnp.where(total > 0, total, 1), joint.sum(0) / total.sum())


@jax.jit
def _farthest(
    beliefs: Float[Array, "N S"], pool: Float[Array, "B S"], begin: int | Array, end: int | Array
) -> Float[Array, "N S"]:
    """Rows `begin` to `end` become those of the pool that are farthest from all others so far."""
    apart = lambda x: jnp.abs(pool - x).sum(1)
    near = lax.fori_loop(
        0, begin, lambda i, d: jnp.minimum(d, apart(beliefs[i])), jnp.full(len(pool), jnp.inf)
    )

    def add(i, state):
        beliefs, near = state
        new = pool[jnp.argmax(near)]
        return beliefs.at[i].set(new), jnp.minimum(near, apart(new))

    return lax.fori_loop(begin, end, add, (beliefs, near))[0]
