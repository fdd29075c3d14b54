"""Exact values of small problems: forward recursion, linear solves, and sums over trajectories.

The first part needs a finite kernel and costs polynomial time; the second enumerates every
trajectory and takes any kernel whose z' is finite or computed. Everything is differentiable in
the kernel, and small enough to be read as the definition of what the estimators estimate.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree

from spg.distributions import Delta
from spg.exact.checks import check
from spg.kernels.cells import Computed, Drawn
from spg.kernels.finite import FiniteMemory, start_distribution, tables, transitions
from spg.kernels.kernel import Kernel
from spg.types import Scalar, Transition
from spg.worlds.models import DensePOMDP


class DiscountedValues(NamedTuple):
    """DiscountedValues of the infinite horizon, discounted."""

    value: Float[Array, "S G"]  # V(s, z)
    q_value: Float[Array, "S A G"]  # Q(s, z, a, z'): it does not depend on z
    occupancy: Float[Array, "S G"]  # ρ(s, z) = Σ_t γ^t Pr(s_t = s, z_t = z)
    expected_return: Float[Array, ""]  # J = E V(s_0, z_0)


def expected_return(
    kernel: Kernel, pomdp: DensePOMDP, *, gamma: Scalar, num_steps: int
) -> Float[Array, ""]:
    """J = E Σ_{t<T} γ^t r_t of a finite kernel, by forward recursion over p(s, z)."""
    choice = joint_policy(kernel, pomdp)

    def step(occupied, t):
        joint = jnp.einsum("sg,sgha->sha", occupied, choice)
        reward = gamma**t * jnp.einsum("sha,sa->", joint, pomdp.reward)
        return jnp.einsum("sha,sat->th", joint, pomdp.transition), reward

    return lax.scan(step, _start(kernel, pomdp), jnp.arange(num_steps))[1].sum()


def discounted_values(kernel: Kernel, pomdp: DensePOMDP, *, gamma: Scalar) -> DiscountedValues:
    """V, Q and ρ of a finite kernel by linear solves (Al-Hafez et al., 2024, section 2.1).

    V(s, z) = E_{(a, z') ~ π} Q(s, z, a, z'),    Q(s, z, a, z') = r(s, a) + γ E_{s'} V(s', z')
    """
    choice = joint_policy(kernel, pomdp)
    chain, start = joint_chain(kernel, pomdp), _start(kernel, pomdp)
    shape, size = start.shape, start.size
    system = jnp.eye(size) - gamma * chain.reshape(size, size)
    reward = jnp.einsum("sgha,sa->sg", choice, pomdp.reward)
    value = jnp.linalg.solve(system, reward.reshape(-1)).reshape(shape)
    future = jnp.einsum("sat,th->sah", pomdp.transition, value)
    q_value = pomdp.reward[:, :, None] + gamma * future
    occupancy = jnp.linalg.solve(system.T, start.reshape(-1)).reshape(shape)
    return DiscountedValues(value, q_value, occupancy, jnp.vdot(start, value))


def policy_gradient(kernel: Kernel, pomdp: DensePOMDP, *, gamma: Scalar) -> Kernel:
    """∇J of a finite kernel over the infinite horizon, by the policy-gradient theorem.

        ∇J = Σ ρ(s, z) O(o | s) ∇π(a, z' | o, z) Q(s, z, a, z')

    Al-Hafez et al. (2024), theorem 2.2 in its partially observable form, eq. 5.
    """
    exact = lax.stop_gradient(discounted_values(kernel, pomdp, gamma=gamma))

    def surrogate(kernel):
        choice = joint_policy(kernel, pomdp)
        return jnp.einsum("sg,sgha,sah->", exact.occupancy, choice, exact.q_value)

    return eqx.filter_grad(surrogate)(kernel)


def stationary_distribution(kernel: Kernel, pomdp: DensePOMDP) -> Float[Array, "S G"]:
    """d = dK of the joint chain on (s, z), the limit of its time averages from the start.

    The rows of ((I + K) / 2)^(2^60), by squaring, are the limits from each (s, z). With several
    recurrent classes each has the mass that arrives in it.
    """
    chain, start = joint_chain(kernel, pomdp), _start(kernel, pomdp)
    damped = (jnp.eye(start.size) + chain.reshape(start.size, start.size)) / 2

    def square(power, _):
        power = power @ power
        return power / power.sum(1, keepdims=True), None

    return (start.reshape(-1) @ lax.scan(square, damped, length=60)[0]).reshape(start.shape)


def joint_policy(kernel: Kernel, pomdp: DensePOMDP) -> Float[Array, "S G G A"]:
    """Pr(z', a | s, z) = Σ_o O(o | s) ω(z' | o, z) μ(a | o, z'), laid out [s, z, z', a]."""
    check(kernel, pomdp)
    table = tables(kernel, jnp.arange(pomdp.num_obs))
    return jnp.einsum("so,ogh,oha->sgha", pomdp.observation, transitions(table), table.mu)


def joint_chain(kernel: Kernel, pomdp: DensePOMDP) -> Float[Array, "S G S G"]:
    """K[(s, z) → (s', z')]."""
    return jnp.einsum("sgha,sat->sgth", joint_policy(kernel, pomdp), pomdp.transition)


def trajectories(
    kernel: Kernel, pomdp: DensePOMDP, *, num_steps: int
) -> tuple[Transition, Float[Array, " N"]]:
    """Every trajectory `[N, T]` of the problem, and the environment's factor of its probability.

        p(τ) = p(s_0) Π O(o_t | s_t) P(s_{t+1} | s_t, a_t) · Π π(a_t, z_{t+1} | o_t, z_t)

    Of the two products the first is returned, and where it vanishes the trajectory is left out.
    A finite z' is enumerated, (|S||O||G||A|)^T trajectories at most; a computed one follows from
    the observations. Episodes start once and terminate at T.
    """
    check(kernel, pomdp)
    cell = kernel.cell
    memory = cell.distribution if isinstance(cell, Drawn) else None
    if not isinstance(memory, FiniteMemory) and not isinstance(cell, Computed):
        raise TypeError(f"z' must be finite or computed to be enumerated, not {type(cell)}")
    transition, observation, reward, start = jax.tree.map(np.asarray, pomdp)
    num_states, num_obs = observation.shape
    num_z = memory.num_z if isinstance(memory, FiniteMemory) else 1
    sizes = (num_states, num_obs, num_z, reward.shape[1])
    index = np.indices(sizes * num_steps).reshape(num_steps, 4, -1)
    s, o, h, a = index.transpose(1, 2, 0)
    prob = start[s[:, 0]] * observation[s, o].prod(1)
    prob *= transition[s[:, :-1], a[:, :-1], s[:, 1:]].prod(1)
    possible = prob > 0
    s, o, h, a, prob = (x[possible] for x in (s, o, h, a, prob))

    edge = np.zeros(s.shape, bool)
    first, last = (jnp.asarray(np.copy(edge)).at[:, t].set(True) for t in (0, -1))
    obs = jnp.asarray(o) if isinstance(memory, FiniteMemory) else jnp.eye(num_obs)[o]
    z0 = jnp.broadcast_to(kernel.z0, (len(prob), 1, *kernel.z0.shape))
    if isinstance(memory, FiniteMemory):
        z_next = jnp.asarray(h, kernel.z0.dtype)
    else:
        z = jnp.broadcast_to(z0, (*s.shape, *kernel.z0.shape))
        score = jax.vmap(cell.log_prob, (0, 0, 0, 0, None))
        z_next = score(obs, z, z, first, kernel.z0)[1]
    traj = Transition(
        obs=obs,
        z=jnp.concatenate([z0, z_next[:, :-1]], 1),
        action=jnp.asarray(a),
        z_next=z_next,
        reward=jnp.asarray(reward[s, a]),
        first=first,
        terminated=last,
        truncated=jnp.asarray(edge),
        final_obs=jnp.roll(obs, -1, 1),
    )
    return traj, jnp.asarray(prob)


def enumerate_mean(
    estimator: Callable[[Kernel, Transition], PyTree],
    kernel: Kernel,
    pomdp: DensePOMDP,
    *,
    num_steps: int,
) -> PyTree:
    """Σ_τ p(τ) ĝ(τ): the expectation of an estimator of one trajectory."""
    traj, prob = trajectories(kernel, pomdp, num_steps=num_steps)
    prob = prob * jnp.exp(jax.vmap(partial(_log_prob, kernel))(traj))
    estimates = jax.vmap(partial(estimator, kernel))(traj)
    return jax.tree.map(lambda g: jnp.tensordot(prob, g, 1), estimates)


def enumerate_return(
    kernel: Kernel, pomdp: DensePOMDP, *, gamma: Scalar, num_steps: int
) -> Float[Array, ""]:
    """J = Σ_τ p(τ) Σ_t γ^t r_t for any kernel that `trajectories` takes.

    Its derivative is the exact ∇J, through every path by which a computed z' depends on the kernel.
    """
    traj, prob = trajectories(kernel, pomdp, num_steps=num_steps)
    log_prob = jax.vmap(partial(_log_prob, kernel))(traj)
    return jnp.vdot(prob * jnp.exp(log_prob), traj.reward @ gamma ** jnp.arange(num_steps))


def _log_prob(kernel: Kernel, traj: Transition) -> Float[Array, ""]:
    """Σ_t log π, a step at a time by the distributions themselves, without `Kernel.log_prob`."""

    def step(z, x):
        obs, z = kernel.normalizer(x.obs), kernel.reset(x.first, z)
        memory = kernel.cell(obs, z)
        z = memory.loc if isinstance(memory, Delta) else x.z_next
        return z, memory.log_prob(z) + kernel.head(obs, z).log_prob(x.action)

    return lax.scan(step, kernel.z0, traj)[1].sum()


def _start(kernel: Kernel, pomdp: DensePOMDP) -> Float[Array, "S G"]:
    """Law of (s_0, z_0)."""
    return pomdp.start[:, None] * start_distribution(kernel)
