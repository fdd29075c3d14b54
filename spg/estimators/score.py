"""Score-function (likelihood-ratio) estimates of ∇J for any kernel and segment length."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from spg.kernels.kernel import Kernel
from spg.scans import split_segments
from spg.types import Transition


def score_estimate(
    kernel: Kernel, traj: Transition, weight: Float[Array, " T"], *, segment_length: int
) -> Kernel:
    """Score-function estimate of ∇J from one trajectory, shaped like `kernel`; it points uphill.

        ĝ = Σ_t w_t ∇ log π(a_t, z_{t+1} | o_t, z_t)

    With w_t an unbiased γ^t Q_t: a kernel that draws z' is unbiased at every `segment_length`
    (Al-Hafez et al., 2024, lemma 2.1); one that computes z' only if a segment is the whole
    episode (BPTT). Raises ValueError if `segment_length` does not divide T, and for another number
    of weights.
    """
    if weight.shape != traj.reward.shape:
        raise ValueError(f"weight {weight.shape} for the steps {traj.reward.shape}")
    segments = split_segments(traj, segment_length)

    def surrogate(kernel):
        log_prob = jax.vmap(kernel.log_prob)(segments).joint
        return jnp.vdot(lax.stop_gradient(weight), log_prob.reshape(-1))

    return eqx.filter_grad(surrogate)(kernel)


def reinforce(
    score: PyTree[Float[Array, "N ..."]], episode_return: Float[Array, " N"]
) -> PyTree[Float[Array, "..."]]:
    """REINFORCE over N episodes with the variance-optimal baseline of each parameter j.

        g_j = mean[S_j (J - b_j)],    b_j = mean[S_j² J] / mean[S_j²]    (0/0 := 0)

    S is the score Σ_t ∇ log π of an episode (`score_estimate` with unit weights), J its
    discounted return. The baseline is fitted on the same episodes: bias O(1/N). Williams (1992),
    Peters & Schaal (2008), eq. 12; REINFORCE-RS of Al-Hafez et al. (2024). Raises ValueError for
    N = 1, where the baseline is the return itself and the estimate 0.
    """
    _check_episodes(len(episode_return))

    def component(s):
        j = episode_return.reshape(-1, *(1,) * (s.ndim - 1))
        return jnp.mean(s * (j - _ratio(jnp.mean(s**2 * j, 0), jnp.mean(s**2, 0))), 0)

    return jax.tree.map(component, score)


def episodic_gpomdp(
    kernel: Kernel,
    trajs: Transition,
    reward: Float[Array, "N T"],
    alive: Float[Array, "N T"],
    *,
    segment_length: int,
) -> Kernel:
    """GPOMDP over N episodes with a variance-optimal baseline of each parameter j and time t.

        S_{t,j} = Σ_{i≤t} ∂_j log π(a_i, z_{i+1} | o_i, z_i)
        g_j = mean Σ_t S_{t,j} (r_t - b_{t,j}),    b_{t,j} = mean[S²_{t,j} r_t] / mean[S²_{t,j}]

    `reward` is the discounted one, γ^t r_t; `alive` (1 until an episode's end, 0 after) masks
    scores. Baxter & Bartlett (2001); GPOMDP-RS of Al-Hafez et al. (2024). The partial sums are
    never stored: memory is that of one segment's scores, N · L parameter vectors. For a kernel
    that computes z', segments are truncated BPTT, as in `score_estimate`. Raises ValueError for
    N = 1, where the baseline is the reward itself and the estimate 0.
    """
    _check_episodes(len(reward))
    split = jax.vmap(lambda x: split_segments(x, segment_length), out_axes=1)  # time first
    segments, reward, alive = split((trajs, reward, alive))
    scores = jax.vmap(eqx.filter_jacrev(lambda k, s: k.log_prob(s).joint), (None, 0))

    def step(carry, inputs):
        partial, gradient = carry
        segment, reward, alive = inputs

        def component(s, partial, gradient):
            expand = lambda x: x.reshape(*x.shape, *(1,) * (s.ndim - 2))
            s = partial[:, None] + jnp.cumsum(s * expand(alive), 1)
            r = expand(reward)
            baseline = _ratio(jnp.mean(s**2 * r, 0), jnp.mean(s**2, 0))
            return s[:, -1], gradient + jnp.mean(s * (r - baseline), 0).sum(0)

        pairs = jax.tree.map(component, scores(kernel, segment), partial, gradient)
        return jax.tree.transpose(
            jax.tree.structure(gradient), jax.tree.structure((0, 0)), pairs
        ), None

    params = eqx.filter(kernel, eqx.is_inexact_array)
    zeros = jax.tree.map(lambda p: jnp.zeros((reward.shape[1], *p.shape), p.dtype), params)
    gradient = jax.tree.map(jnp.zeros_like, params)
    (_, gradient), _ = lax.scan(step, (zeros, gradient), (segments, reward, alive))
    return gradient


def _check_episodes(num_episodes: int) -> None:
    if num_episodes < 2:
        raise ValueError(
            f"{num_episodes} episode: the baseline is fitted on the episodes of the estimate, of "
            "which there have to be at least 2"
        )


def _ratio(numerator: Array, denominator: Array) -> Array:
    zero = denominator == 0
    return jnp.where(zero, 0.0, numerator / jnp.where(zero, 1.0, denominator))
