"""The evidence lower bound of a latent model on a recorded segment, Lee et al. (2020)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from spg.distributions import Normal
from spg.kernels.kernel import Kernel
from spg.kernels.latent import LatentModel
from spg.types import Transition, policy_view


class Sequence(NamedTuple):
    """What a latent model explains: L steps and the observation behind the last one."""

    x: Float[Array, "T x"]  # T = L + 1
    action: Float[Array, "L a"]
    reward: Float[Array, " L"]
    first: Bool[Array, " T"]  # x opens an episode

    @property
    def before(self) -> Float[Array, "T a"]:
        """The action before each x, zeros before the first one."""
        return jnp.concatenate([jnp.zeros_like(self.action[:1]), self.action])


class Elbo(NamedTuple):
    """The terms of a bound on log p(x, r), step by step; their `total` is a draw of it."""

    reconstruction: Float[Array, " T"]  # log p(x_t | y_t)
    kl: Float[Array, " T"]  # KL(q(y1_t | .) || p(y1_t | .)) in nats; that of y2 is 0
    reward: Float[Array, " L"]  # log p(r_t | y_t, a_t, y_{t+1}); 0 where t + 1 opens an episode

    @property
    def total(self) -> Float[Array, ""]:
        return self.reconstruction.sum() - self.kl.sum() + self.reward.sum()


def sequence(kernel: Kernel, segment: Transition, size: int) -> Sequence:
    """A recorded segment `[L, ...]` as a policy's statistics show it to a model of `size` entries.

    What an observation has behind them is left out, the previous action. An episode that ends
    within the segment lacks the observation behind its last step.
    """
    last = jax.tree.map(lambda x: x[-1:], policy_view(segment.final_obs))
    x = jax.vmap(kernel.normalizer)(jnp.concatenate([policy_view(segment.obs), last]))
    first = jnp.concatenate([segment.first, jnp.zeros(1, bool)])
    return Sequence(x[:, :size], segment.action, segment.reward, first)


def elbo(
    model: LatentModel, seq: Sequence, *, key: PRNGKeyArray
) -> tuple[Elbo, Float[Array, "T y"]]:
    """One draw of the bound, reparameterised, and the latents of that draw.

        Σ_t log p(x_t | y_t) - KL(q(y1_t | x_t, y2_{t-1}, a_{t-1}) ‖ p(y1_t | y2_{t-1}, a_{t-1}))
            + log p(r_t | y_t, a_t, y_{t+1})

    -J_M of Lee et al. (2020), and the reward of their code. Where an episode opens p(y1) is
    N(0, I), and so it is at the first step, wherever that is in its episode.
    """
    latent, posterior, prior = model.infer(seq.x, seq.before, seq.first, key=key)
    std = jnp.full(seq.x.shape[-1], model.decoder_std)
    seen = lambda y, x: Normal(model.decoder(y), std).log_prob(x)
    paid = lambda y, a, y_next, r: model.reward(y, a, y_next).log_prob(r[None])
    reward = jax.vmap(paid)(latent[:-1], seq.action, latent[1:], seq.reward)
    kl = jax.vmap(lambda q, p: q.kl(p))(posterior, prior)
    return Elbo(jax.vmap(seen)(latent, seq.x), kl, jnp.where(seq.first[1:], 0.0, reward)), latent
