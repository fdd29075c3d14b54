"""Exact k-step policy gradients: deterministic policies, drawn from w and held for k steps.

DeWeese & Qu (2026); definitions, bound and step sizes are derived here, after that paper. Windows
m = 0, 1, …: D_m ~ w independently, and a_t = D_m(o_t) for mk <= t < (m+1)k. With P_D^k the k-step
transitions of D and R_D^k(s) = E Σ_{t<k} γ^t r_t,

    V(s) = Σ_D w_D Q(s, D),    Q(s, D) = R_D^k(s) + γ^k Σ_{s'} P_D^k(s' | s) V(s'),

    ν = (1 - γ^k) Σ_m γ^{km} Pr(s_{mk} = ·),    ∂J/∂w_D = E_{s~ν} Q(s, D) / (1 - γ^k)

k = 1 with a product distribution w is the ordinary memoryless policy. `spg.exact.ascent` climbs J.
"""

from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax
from jaxtyping import Array, Float, Int

from spg.exact import policy_chains
from spg.types import Scalar
from spg.worlds import models
from spg.worlds.models import POMDP, DensePOMDP, SparsePOMDP

Steps = (
    int | Int[Array, ""]
)  # k: an int where gradients are taken of `kstep_values`, else it may be traced


class KStepValues(NamedTuple):
    """What `kstep_values` finds."""

    value: Float[Array, " S"]  # V(s), where a window opens
    q_value: Float[Array, "S N"]  # Q(s, D)
    window_distribution: Float[Array, " S"]  # ν, sums to 1
    gradient: Float[Array, " N"]  # ∂J/∂w_D
    expected_return: Float[Array, ""]  # J, from the start
    error: Float[Array, ""]  # a bound: of V relative to max |V|, and of ν in the norm ‖·‖₁


# --- deterministic policies


def all_policies(num_slots: int, num_actions: int) -> Int[np.ndarray, "N L"]:
    """Every map from L slots to actions, in the order of counting."""
    return np.array(list(product(range(num_actions), repeat=num_slots)))


def joint_policies(
    policies: Int[np.ndarray, "N L"], slots: Int[np.ndarray, "O I"], num_actions: int
) -> Int[np.ndarray, "N O"]:
    """The joint action Σ_i A^{I-1-i} a_i at each joint observation, a_i = D(slots[o, i]).

    A slot is a pair of an agent and what it observes; `slots[o, i]` is that of agent i at o.
    """
    place = num_actions ** np.arange(slots.shape[1])[::-1]
    return policies[:, slots] @ place


def product_weights(
    policies: Int[Array, "N L"], logits: Float[Array, "C L A"], mixture: Float[Array, " C"]
) -> Float[Array, " N"]:
    """w_D = Σ_c softmax(mixture)_c Π_l softmax(logits[c, l])_{D(l)}: a mixture of products.

    The k-step gradient in the logits is the pull-back of `KStepValues.gradient` by this function.
    """
    log_probs = jax.nn.log_softmax(logits)[:, jnp.arange(policies.shape[1]), policies]
    return jax.nn.softmax(mixture) @ jnp.exp(log_probs.sum(-1))


# --- values and gradient


def kstep_values(
    pomdp: POMDP,
    policies: Int[Array, "N O"] | Int[np.ndarray, "N O"],
    weights: Float[Array, " W"],  # W = N
    *,
    k: Steps,
    gamma: Scalar,
) -> KStepValues:
    """V, Q, ν, J and ∂J/∂w of the distribution `weights` over `policies`.

    A policy is the list of its actions at each observation.

    One linear equation for each of V and ν. Of a `DensePOMDP` it is solved directly, after k
    products of the transition matrix with N S vectors; of a `SparsePOMDP` by iteration of k
    products with N vectors, log(1/ε) / log(1/γ) at most whatever k is, for rounding ε, and fewer
    where the chain mixes. Observations may be random; they are drawn anew at every step. The
    solution of a `DensePOMDP` is differentiable where k is not traced.

    `error` is ‖R + γ^k P v - v‖ / (1 - γ^k), the distance of v from the fixed point of a
    contraction, plus 4ε / (1 - γ) for the rounding of that residual and of γ: in single precision
    .5 % at γ = .9999. J is off by no more than `error` max |V|, and the gradient by no more than
    2 `error` max |Q| / (1 - γ^k).

    Raises ValueError for k < 1, gamma outside (0, 1), weights off the simplex, and an empty list
    of policies, one that repeats a policy or has a wrong shape or action. Traced values go
    unchecked.
    """
    check(pomdp, policies, weights, k=k, gamma=gamma)
    observation, emission = pomdp.emissions()
    action = jnp.asarray(policies)[:, observation]  # [N S M]
    every = jax.nn.one_hot(action, pomdp.num_actions, dtype=weights.dtype)
    choice = jnp.einsum("sm,nsma->san", emission, every)  # Pr(a | s) of each policy
    reward = jnp.einsum("san,sa->sn", choice, pomdp.mean_reward())

    expect = lambda x: jnp.einsum("san,san->sn", choice, pomdp.expect(x))
    push = lambda x: pomdp.push(choice * x[:, None])
    if isinstance(pomdp, SparsePOMDP) and observation.shape[1] == 1:
        expect, push = policy_chains.products(pomdp, action[..., 0].T)

    def hold(reward, v):  # R_D^k + γ^k P_D^k v; the first product is of one vector
        last = jnp.einsum("san,sa->sn", choice, pomdp.expect(v[:, None])[..., 0])
        return lax.fori_loop(1, k, lambda _, x: reward + gamma * expect(x), reward + gamma * last)

    def release(x):  # γ^k Σ_D x_D P_D^k; the last product is of one vector
        x = lax.fori_loop(1, k, lambda _, x: gamma * push(x), x)
        return gamma * pomdp.push((choice * x[:, None]).sum(-1, keepdims=True))[:, 0]

    ahead = lambda v: hold(jnp.zeros_like(reward), v) @ weights
    behind = lambda d: release(d[:, None] * weights)
    window_reward = hold(reward, jnp.zeros_like(pomdp.start)) @ weights
    fresh = 1 - gamma**k
    start = fresh * pomdp.start
    if isinstance(pomdp, DensePOMDP):
        identity = jnp.eye(len(start), dtype=weights.dtype)
        system = identity - jax.vmap(ahead, 1, 1)(identity)
        value = jnp.linalg.solve(system, window_reward)
        window_distribution = jnp.linalg.solve(system.T, start)
        residual = start + behind(window_distribution) - window_distribution
    else:
        value, _ = _series(ahead, window_reward, k, gamma)
        window_distribution, moved = _series(behind, start, k, gamma)
        residual = gamma**k * moved  # not less in ‖·‖₁ than the residual: see `_series`
    q_value = hold(reward, value)
    of_value = _ratio(jnp.abs(q_value @ weights - value).max(), jnp.abs(value).max())
    of_windows = jnp.abs(residual).sum()
    rounding = 4 * jnp.finfo(value.dtype).eps / (1 - gamma)
    return KStepValues(
        value=value,
        q_value=q_value,
        window_distribution=window_distribution,
        gradient=window_distribution @ q_value / fresh,
        expected_return=pomdp.start @ value,
        error=jnp.maximum(of_value, of_windows) / fresh + rounding,
    )


def policy_returns(
    pomdp: POMDP, policies: Int[Array, "N O"] | Int[np.ndarray, "N O"], *, gamma: Scalar
) -> Float[Array, " N"]:
    """J^D of every deterministic policy, held for ever."""

    def one(policy):
        certain = jnp.ones(1, pomdp.start.dtype)
        return kstep_values(pomdp, policy[None], certain, k=1, gamma=gamma).expected_return

    check(pomdp, policies, None, k=1, gamma=gamma)
    return lax.map(one, jnp.asarray(policies))


def sighted_return(pomdp: POMDP, *, gamma: Scalar) -> Float[Array, ""]:
    """J of the best policy that sees the state, which no other exceeds; by value iteration."""
    reward = pomdp.mean_reward()
    best = lambda _, v: jnp.max(reward + gamma * pomdp.expect(v[:, None])[..., 0], 1)
    steps = jnp.ceil(jnp.log(jnp.finfo(reward.dtype).eps) / jnp.log(gamma)).astype(int)
    return pomdp.start @ lax.fori_loop(0, steps, best, jnp.zeros_like(pomdp.start))


# --- checks and solvers


def check(
    pomdp: POMDP,
    policies: Int[Array, "N O"] | Int[np.ndarray, "N O"],
    weights: Float[Array, " W"] | None,
    *,
    k: Steps,
    gamma: Scalar,
) -> None:
    """Raise the errors of `kstep_values`, for what is not traced."""
    models.check(pomdp)
    if _known(k) and k < 1:
        raise ValueError(f"k is {k}; a window has at least 1 step")
    if _known(gamma) and not 0 < gamma < 1:
        raise ValueError(f"gamma is {gamma}; it has to be between 0 and 1, without the ends")
    if policies.shape[0] == 0:
        raise ValueError("the list of policies is empty")
    if policies.ndim != 2 or policies.shape[1] != pomdp.num_obs:
        raise ValueError(
            f"the policies name actions for {policies.shape[-1]} observations; "
            f"there are {pomdp.num_obs}"
        )
    if _known(policies):
        table = np.asarray(policies)
        if table.min() < 0 or table.max() >= pomdp.num_actions:
            bad = table[(table < 0) | (table >= pomdp.num_actions)][0]
            raise ValueError(f"action {bad} is out of range: there are {pomdp.num_actions}")
        unique, count = np.unique(table, axis=0, return_counts=True)
        if len(unique) < len(table):
            raise ValueError(f"policy {unique[count > 1][0].tolist()} repeats in the list")
    if weights is not None and weights.shape != policies.shape[:1]:
        raise ValueError(f"{weights.size} weights for {policies.shape[0]} policies")
    if weights is not None and _known(weights):
        w = np.asarray(weights, np.float64)
        if not (w >= 0).all() or abs(w.sum() - 1) > 1e-5:
            least, total = w.min(), w.sum()
            raise ValueError(f"weights are off the simplex: min {least:.6g}, sum {total:.6g}")


def _known(x: object) -> bool:
    return not isinstance(x, core.Tracer)


def _series(
    rest: Callable, rhs: Float[Array, " S"], k: Steps, gamma: Scalar
) -> tuple[Float[Array, " S"], Float[Array, " S"]]:
    """x = rhs + rest(x) by the sum of rest^n(rhs), until only rounding moves x; and what moved it.

    What moved x last is the residual of the x before, r = rhs + rest(x) - x. That of x is rest(r).

    `rest` is γ^k times a stochastic matrix, so the count of terms is bounded beforehand. A term d
    with rest(d) = γ^k d, as where the chain has mixed or its episodes have ended, is the last: the
    terms after d sum up to γ^k / (1 - γ^k) d.
    """
    eps, shrink = jnp.finfo(rhs.dtype).eps, gamma**k
    most = jnp.ceil(jnp.log(eps) / (k * jnp.log(gamma)))

    def step(state):
        total, term, _, count = state
        after = rest(term)
        x = total + after + shrink / (1 - shrink) * after
        moved = (after - shrink * term) / (1 - shrink)
        going = jnp.abs(moved).max() > eps * jnp.abs(x).max()
        return total + after, after, (x, moved, going), count + 1

    going = lambda state: state[2][2] & (state[3] < most)
    start = rhs, rhs, (rhs, jnp.full_like(rhs, jnp.inf), jnp.array(True)), 0
    x, moved, _ = lax.while_loop(going, step, start)[2]
    return x, moved


def _ratio(x: Array, of: Array) -> Float[Array, ""]:
    return x / jnp.where(of > 0, of, 1)
