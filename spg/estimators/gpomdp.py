"""IState-GPOMDP and Exp-GPOMDP: the gradient of the average reward from one endless trajectory.

Aberdeen & Baxter (2002); Baxter & Bartlett (2001). With the score s_t of step t,

    e_t = β e_{t-1} + s_t,        Δ = mean over t of r_{t+1} e_t - b_t s_t,

The limit of Δ for T → ∞ is d ∇K (I - βK)⁻¹ r, which tends to ∇η for β → 1. The two methods differ
in the score: a *likelihood* computes log m_t, of which s_t is the gradient, from what was recorded
and from a memory that depends on the kernel. `step` consumes one transition with eligibility
traces; `segment` consumes a recorded segment by one backward pass. Both functions take and return
the same state and give the same numbers.

A baseline b_t, zero by default, that depends only on what precedes action a_t changes the variance
of Δ and not its mean. The unit of b_t is that of Σ_u β^u r.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from spg.kernels.finite import start_distribution, tables, transitions
from spg.kernels.kernel import Kernel
from spg.scans import linear_scan
from spg.types import Scalar, Transition, policy_view

# (kernel, memory [M], segment) ↦ (log m_t of each step [L], memory after it [M])
Likelihood = Callable[[Kernel, Array, Transition], tuple[Array, Array]]


class State(NamedTuple):
    """An estimate under way. `sensitivity`, `trace` and `estimate` are shaped like the kernel."""

    memory: Float[Array, " M"]
    sensitivity: Kernel  # ∂memory/∂kernel, each leaf with a leading axis M
    trace: Kernel  # e_{t-1}
    estimate: Kernel  # Δ
    count: Int[Array, ""]  # transitions consumed


# --- likelihoods


def istate(
    kernel: Kernel, memory: Float[Array, "0"], segment: Transition
) -> tuple[Float[Array, " L"], Float[Array, "0"]]:
    """IState-GPOMDP: m_t = ω(g_{t+1} | g_t, o_t) μ(a_t | g_{t+1}, o_t), of the I-states drawn.

    The memory is empty, `jnp.zeros(0)`, since the record holds the internal state. Any kernel that
    draws z' will do. The estimate is of the gradient of that kernel.
    """
    return kernel.log_prob(segment).joint, memory


def exp_istate(
    kernel: Kernel, memory: Float[Array, " G"], segment: Transition, *, num_obs: int
) -> tuple[Float[Array, " L"], Float[Array, " G"]]:
    """Exp-GPOMDP with the actions filtered: m_t(a) = Pr(a_t = a | o_0 … o_t, a_0 … a_{t-1}).

        b_t(h) = Σ_g α_t(g) ω(h | g, o_t),   m_t = Σ_h b_t(h) μ(a_t | h, o_t),
        α_{t+1}(h) = b_t(h) μ(a_t | h, o_t) / m_t

    The memory is α, the distribution of the I-state given the record; `start_distribution` starts
    it. The gradient is that of the kernel, without bias, whether actions were drawn by way of
    I-states or from m_t. Given the record it is the mean of IState-GPOMDP's, which therefore
    varies more.
    """
    return _filter(kernel, memory, segment, num_obs, filter_actions=True)


def exp_istate_by_observations(
    kernel: Kernel, memory: Float[Array, " G"], segment: Transition, *, num_obs: int
) -> tuple[Float[Array, " L"], Float[Array, " G"]]:
    """Exp-GPOMDP as Aberdeen & Baxter (2002) have it: α is filtered by the observations alone.

        α_{t+1}(h) = b_t(h) = Σ_g α_t(g) ω(h | g, o_t),   m_t = Σ_h b_t(h) μ(a_t | h, o_t)

    The estimate is of the gradient of another policy, `expected_kernel`, which draws each action
    from m_t independently; on a record made by that policy the estimate is unbiased. On a record
    made by the kernel itself, whose actions depend on each other through the I-state, the estimate
    is biased. The two policies agree where ω is deterministic and where μ ignores the I-state.
    """
    return _filter(kernel, memory, segment, num_obs, filter_actions=False)


def filtered(
    kernel: Kernel, memory: Float[Array, " G"], segment: Transition, *, num_obs: int
) -> Float[Array, "L G"]:
    """α_t of `exp_istate` before o_t is consumed. A baseline may depend on α_t and on o_t."""
    return _alphas(kernel, memory, segment, num_obs, True)[1][0]


def _filter(
    kernel: Kernel,
    memory: Float[Array, " G"],
    segment: Transition,
    num_obs: int,
    *,
    filter_actions: bool,
) -> tuple[Float[Array, " L"], Float[Array, " G"]]:
    memory, (_, log_prob) = _alphas(kernel, memory, segment, num_obs, filter_actions)
    return log_prob, memory


def _alphas(
    kernel: Kernel,
    memory: Float[Array, " G"],
    segment: Transition,
    num_obs: int,
    filter_actions: bool,
) -> tuple[Float[Array, " G"], tuple[Float[Array, "L G"], Float[Array, " L"]]]:
    """The memory after the segment; α_t and log m_t of its steps."""
    table = tables(kernel, jnp.arange(num_obs))  # once, not at every step
    facts = policy_view(segment.obs), segment.action, segment.first
    start = start_distribution(kernel).astype(memory.dtype)
    scan: Any = _scan
    return scan(filter_actions, memory, transitions(table), table.mu, start, facts)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(filter_actions: bool, memory, omega, mu, start, facts):
    """`_alphas`, of ω [O, G, G], μ [O, G, A], α_0 [G] and the record (o, a, first), each [L]."""
    memory, (alphas, _, log_prob) = _run(filter_actions, memory, omega, mu, start, facts)
    return memory, (alphas, log_prob)


def _run(filter_actions: bool, memory, omega, mu, start, facts):
    """α after the record; α_t, b_t and log m_t of its steps."""

    def step(alpha, facts):
        obs, action, first = facts
        alpha = jnp.where(first, start, alpha)
        prior = jnp.sum(alpha[:, None] * omega[obs], 0)
        joint = prior * mu[obs, :, action]
        m = joint.sum()
        return joint / m if filter_actions else prior, (alpha, prior, jnp.log(m))

    return lax.scan(step, memory, facts)


def _scan_forward(filter_actions, memory, omega, mu, start, facts):
    memory, (alphas, priors, log_prob) = _run(filter_actions, memory, omega, mu, start, facts)
    return (memory, (alphas, log_prob)), (alphas, priors, omega, mu, facts)


def _scan_backward(filter_actions, saved, cotangents):
    """λ_t = ∂/∂α_t, backward in time; ω gathers its share after the scan, by one product."""
    alphas, priors, omega, mu, facts = saved
    by_memory, by_steps = cotangents
    back = jnp.swapaxes(omega, 1, 2)  # sums over the first axis are quicker on a CPU

    def step(by_alpha, inputs):
        prior, (obs, action, first), (by_this, by_log) = inputs
        act = mu[obs, :, action]
        joint = prior * act
        m = joint.sum()
        if filter_actions:
            by_joint = (by_log + by_alpha - jnp.sum(by_alpha * joint) / m) / m
            by_prior, by_act = by_joint * act, by_joint * prior
        else:
            by_prior, by_act = by_alpha + by_log * act / m, by_log * prior / m
        before = jnp.sum(back[obs] * by_prior[:, None], 0) + by_this
        return jnp.where(first, 0, before), (by_prior, by_act, first * before)

    inputs = priors, facts, by_steps
    by_memory, (by_prior, by_act, by_start) = lax.scan(step, by_memory, inputs, reverse=True)
    obs, action, _ = facts
    seen = jax.nn.one_hot(obs, len(omega), dtype=omega.dtype)
    by_omega = jnp.einsum("log,lh->ogh", seen[:, :, None] * alphas[:, None], by_prior)
    taken = jax.nn.one_hot(action, mu.shape[-1], dtype=mu.dtype)
    by_mu = jnp.einsum("loa,lh->oha", seen[:, :, None] * taken[:, None], by_act)
    return by_memory, by_omega, by_mu, by_start.sum(0), None


_scan.defvjp(_scan_forward, _scan_backward)


# --- estimates


def init(kernel: Kernel, memory: Float[Array, " M"]) -> State:
    """The state before the first transition: `memory` is that of the likelihood to be used."""
    zero = jax.tree.map(jnp.zeros_like, eqx.filter(kernel, eqx.is_inexact_array))
    sensitivity = jax.tree.map(lambda x: jnp.zeros((memory.size, *x.shape), x.dtype), zero)
    return State(memory, sensitivity, zero, zero, jnp.zeros((), jnp.int32))


def step(
    likelihood: Likelihood,
    kernel: Kernel,
    state: State,
    transition: Transition,
    *,
    beta: Scalar,
    baseline: Scalar = 0.0,
) -> State:
    """Consume one transition: e ← βe + s, Δ ← Δ + (r e - b s - Δ)/(t+1)."""
    params, static = eqx.partition(kernel, eqx.is_inexact_array)
    one = jax.tree.map(lambda x: jnp.asarray(x)[None], transition)

    def consume(params, memory):
        log_prob, memory = likelihood(eqx.combine(params, static), memory, one)
        return (log_prob[0], memory), memory

    jacobian = jax.jacrev(consume, argnums=(0, 1), has_aux=True)
    ((score, by_memory), (sensitivity, decay)), memory = jacobian(params, state.memory)
    total = lambda direct, by: jax.tree.map(
        lambda x, s: x + jnp.tensordot(by, s, 1), direct, state.sensitivity
    )
    score, sensitivity = total(score, by_memory), total(sensitivity, decay)
    kept = beta * ~transition.first
    trace = jax.tree.map(lambda e, s: kept * e + s, state.trace, score)
    sample = jax.tree.map(lambda e, s: transition.reward * e - baseline * s, trace, score)
    estimate = jax.tree.map(lambda d, x: d + (x - d) / (state.count + 1), state.estimate, sample)
    return State(memory, sensitivity, trace, estimate, state.count + 1)


def segment(
    likelihood: Likelihood,
    kernel: Kernel,
    state: State,
    segment: Transition,
    *,
    beta: Scalar,
    baseline: Float[Array, " L"] | None = None,
) -> State:
    """Consume a segment: the numbers of `step` over it, by one pass backward in time.

    A score is weighted by the rewards after it, Σ_u β^{u-t} r_{u+1} within the segment; what came
    before arrives by the trace and by the sensitivity of the memory. Parts of the state that are
    not used afterwards cost nothing under `jit`.
    """
    params, static = eqx.partition(kernel, eqx.is_inexact_array)
    consume = lambda params, memory: likelihood(eqx.combine(params, static), memory, segment)
    (log_prob, memory), pull = jax.vjp(consume, params, state.memory)

    def total(weight, by_memory):
        direct, by_memory = pull((weight.astype(log_prob.dtype), by_memory))
        return jax.tree.map(
            lambda x, s: x + jnp.tensordot(by_memory, s, 1), direct, state.sensitivity
        )

    kept = beta * ~segment.first
    before = jnp.cumprod(kept)  # of e_{-1} in e_t
    weight = returns(segment, beta) - (0 if baseline is None else baseline)
    end = jnp.zeros_like(weight).at[-1].set(1)
    last = linear_scan(_decay(segment, beta), end, reverse=True)  # of a score in the last trace
    zero = jnp.zeros_like(memory)
    from_before = jnp.vdot(segment.reward, before)
    num_steps = len(segment.reward)
    count = state.count + num_steps
    estimate = jax.tree.map(
        lambda d, x, e: d + (x + from_before * e - num_steps * d) / count,
        state.estimate, total(weight, zero), state.trace,
    )  # fmt: skip
    trace = jax.tree.map(lambda x, e: x + before[-1] * e, total(last, zero), state.trace)
    sensitivity = jax.vmap(lambda v: total(jnp.zeros_like(weight), v))(jnp.eye(memory.size))
    return State(memory, sensitivity, trace, estimate, count)


def gradient(
    likelihood: Likelihood,
    kernel: Kernel,
    memory: Float[Array, "N M"],
    trajs: Transition,
    weight: Float[Array, "N T"],
) -> Kernel:
    """Σ w_t s_t, mean over the steps of N trajectories, in one backward pass.

    With `returns` less a baseline it is the mean of the estimates of `segment` from empty traces;
    an advantage estimate will do as well.
    """

    def surrogate(kernel):
        log_prob, _ = jax.vmap(lambda memory, traj: likelihood(kernel, memory, traj))(memory, trajs)
        return jnp.mean(lax.stop_gradient(weight) * log_prob)

    return eqx.filter_grad(surrogate)(kernel)


def returns(segment: Transition, beta: Scalar) -> Float[Array, " L"]:
    """Σ_u β^{u-t} r_{u+1} within the segment and the episode: the weight of the score of step t."""
    return linear_scan(_decay(segment, beta), segment.reward, reverse=True)


def _decay(segment: Transition, beta: Scalar) -> Float[Array, " L"]:
    return jnp.append(beta * ~segment.first[1:], 0.0)


# --- a baseline


class ValueTable(NamedTuple):
    """Σ_u β^u r seen after each I-state and place: its sums, and how often.

    A place is an observation, or anything else of the past: a state, where a simulator shows it.
    """

    sums: Float[Array, "G P"]
    counts: Float[Array, "G P"]


def collect(
    alpha: Float[Array, "N T G"],
    place: Int[Array, "N T"],
    returns: Float[Array, "N T"],
    *,
    num_places: int,
) -> ValueTable:
    """The returns of N trajectories by place and by I-state, weighted by its distribution α."""
    zero = jnp.zeros((num_places, alpha.shape[-1]))
    add = lambda x: zero.at[place].add(x).T
    return ValueTable(add(alpha * returns[..., None]), add(alpha))


def value_baseline(
    values: ValueTable, alpha: Float[Array, "N T G"], place: Int[Array, "N T"]
) -> Float[Array, "N T"]:
    """Σ_g α_t(g) v(g, place_t), v the mean return. Unbiased if `values` is of other trajectories.

    For `istate` α may be certain of g_t, for the others it is what they filter: given g_t their
    scores are not zero in the mean.
    """
    table = values.sums / jnp.maximum(values.counts, 1e-6)
    return jnp.einsum("ntg,ntg->nt", alpha, table.T[place])
