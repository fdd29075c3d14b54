"""What follows a step: discounted returns and advantages, by one linear recurrence each."""

from jaxtyping import Array, Bool, Float

from spg.limits import same_shape
from spg.scans import linear_scan
from spg.types import Scalar


def returns_to_go(
    reward: Float[Array, " T"],
    next_value: Float[Array, " T"],
    terminated: Bool[Array, " T"],
    truncated: Bool[Array, " T"],
    *,
    gamma: Scalar,
) -> Float[Array, " T"]:
    """Discounted return from each step to the end of its episode, or of the rollout.

        G_t = r_t + γ G_{t+1}        inside an episode
        G_t = r_t                    where it terminated
        G_t = r_t + γ V(o'_t, z'_t)  where it was truncated, and at the end of the rollout

    `next_value` is V at the true successor (zeros for a pure Monte-Carlo return).
    """
    same_shape(reward=reward, next_value=next_value, terminated=terminated, truncated=truncated)
    ended = (terminated | truncated).at[-1].set(True)
    bootstrap = gamma * (ended & ~terminated) * next_value
    return linear_scan(gamma * ~ended, reward + bootstrap, reverse=True)


def gae(
    reward: Float[Array, " T"],
    value: Float[Array, " T"],
    next_value: Float[Array, " T"],
    terminated: Bool[Array, " T"],
    truncated: Bool[Array, " T"],
    *,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> Float[Array, " T"]:
    """Generalised advantage estimate, Schulman et al. (2016), eq. 16.

        δ_t = r_t + γ (1 - terminated_t) V(o'_t, z_{t+1}) - V(o_t, z_t)
        A_t = δ_t + γλ (1 - terminated_t)(1 - truncated_t) A_{t+1}

    `next_value` is taken at `final_obs` under the internal state after the step, so a truncated
    step still bootstraps. A_t + V_t is the λ-return that a critic is fitted to.
    """
    same_shape(
        reward=reward, value=value, next_value=next_value, terminated=terminated,
        truncated=truncated,
    )  # fmt: skip
    delta = reward + gamma * ~terminated * next_value - value
    decay = gamma * gae_lambda * ~(terminated | truncated)
    return linear_scan(decay, delta, reverse=True)
