"""Sampled k-step policy gradients in finite worlds, from trajectories of a `held_kernel`.

Derived here, after DeWeese & Qu (2026). The policy draws a component c ~ w for every window of k
steps, and an action at the first visit of a slot in that window. The estimate is unbiased if each
draw is scored once and weighted with the *whole* return that follows, γ^t included. An estimate
that scores every visit is biased, and so is one that uses the return of the window alone.

`score_estimate` of the kernel scores the component that was drawn; `responsibilities` takes the
expectation over the component, which lowers the variance where C > 1.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from spg.kernels.cells import Drawn
from spg.kernels.held import ForcedHeld, held
from spg.kernels.kernel import Kernel
from spg.scans import linear_scan
from spg.types import Scalar, Transition, policy_view


def responsibilities(
    kernel: Kernel, memory: Float[Array, " C"], segment: Transition
) -> tuple[Float[Array, " L"], Float[Array, " C"]]:
    """log m_t, m_t the probability of the actions newly drawn at t given those of the window.

        m_t = Σ_c ρ_{t-1,c} Π p_c(a | o),    ρ_{t,c} ∝ ρ_{t-1,c} Π p_c(a | o),    ρ = w at its start

    This is a likelihood for `estimators.gpomdp.gradient`. Over a window, Σ_t ∇ log m_t is ρ_c - w_c
    in the logits of the mixture and ρ_c Σ ∇ log p_c in those of component c. The estimate is
    unbiased with the return from t, or from the start of the window (`window_returns`). The memory
    is log ρ; it starts as `zeros(C)`.
    """
    drawn = held(kernel)
    prior = jax.nn.log_softmax(drawn.mixture)

    def step(log_rho, x):
        choice = drawn(policy_view(x.obs), x.z)
        before = jnp.where(choice.opens, prior, log_rho)
        joint = before + choice.new_actions(x.z_next)
        log_m = jax.nn.logsumexp(joint) - jax.nn.logsumexp(before)
        return joint, log_m

    memory, log_m = lax.scan(step, memory, segment)
    return log_m, memory


def discounted_returns(segment: Transition, *, gamma: Scalar) -> Float[Array, " T"]:
    """γ^t G_t within the episode, t counted from its start: the weight of a draw at step t.

    An episode that the segment's end cuts off loses the rest of its return.
    """
    going = ~(segment.terminated | segment.truncated)
    decay = jnp.append(going[:-1], False).astype(segment.reward.dtype)
    return linear_scan(decay, gamma**segment.z.time * segment.reward, reverse=True)


def window_returns(kernel: Kernel, segment: Transition, *, gamma: Scalar) -> Float[Array, " T"]:
    """`discounted_returns` from the start of each step's window: more variance, no bias.

    The segment has to start with an episode.
    """
    steps = jnp.arange(len(segment.reward))
    return discounted_returns(segment, gamma=gamma)[steps - segment.z.time % held(kernel).k]


def hold(
    kernel: Kernel, component: Int[Array, ""], *, gamma: Scalar, key: PRNGKeyArray
) -> tuple[Kernel, Int[Array, ""], Int[Array, ""]]:
    """The kernel that holds `component` in window M, with M and how many windows it lives on.

    Both numbers are geometric, P(n) = (1 - γ^k) γ^{kn}. Roll the kernel out for T steps and give
    the record to `direct_estimate`; what lies beyond T is missing, about
    γ^T (1 + (1 - γ^k) T/k) of the estimate.
    """
    drawn = held(kernel)
    u = jr.uniform(key, (2,), minval=jnp.finfo(jnp.float32).tiny)
    window, life = jnp.floor(jnp.log(u) / (drawn.k * jnp.log(gamma))).astype(int)
    forced = Drawn(ForcedHeld(drawn, window, component))
    return eqx.tree_at(lambda k: k.cell, kernel, forced), window, life


def direct_estimate(
    traj: Transition,
    window: Int[Array, ""],
    life: Int[Array, ""],
    *,
    k: int | Int[Array, ""],
    gamma: Scalar,
) -> Float[Array, ""]:
    """∂J/∂w_D from one trajectory of `hold`, D held in window M: no score, no weight w_D.

        Σ_{m=M}^{M+life} Σ_{i<k} γ^i r_{mk+i} / (1 - γ^k)

    Rewards are discounted inside a window only. Between windows the trajectory instead goes on with
    probability γ^k. The trajectory starts an episode; what follows its end does not count.
    """
    ended = jnp.cumsum(traj.terminated | traj.truncated)
    window_of, step = jnp.divmod(jnp.arange(len(ended)), k)
    counted = (window_of >= window) & (window_of <= window + life)
    counted &= jnp.append(True, ended[:-1] == 0)
    return jnp.sum(counted * gamma**step * traj.reward) / (1 - gamma**k)
