"""Filters of a known model as memory: locations without parameters, and what a head sees of z.

The policy's observation is a one-hot observation of the world, followed by the one-hot action that
came before (`previous_action` of `spg.envs.make`); the action is all zeros where an episode opens.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from spg.filters.belief import Filter, exact_filter, forward_filter, leaky_filter
from spg.kernels.cells import Computed, Location
from spg.kernels.networks import FIXED
from spg.worlds.hmm import deterministic_part, hmm
from spg.worlds.models import POMDP

FEATURES = ("belief", "lof", "lof-softmax", "alf", "alf-softmax", "alf-belief")


class FilterLocation(Location):
    """z' = filter(z, o, a) of a known model, without parameters or gradients.

    Observations are not to be normalised.
    """

    filter: Filter = eqx.field(metadata=FIXED)
    num_obs: int = eqx.field(static=True)
    num_actions: int = eqx.field(static=True)

    def __call__(self, obs: Float[Array, " o"], z: Float[Array, " n"]) -> Float[Array, " n"]:
        return lax.stop_gradient(self.filter)(z, *self._read(obs))

    def _read(
        self, obs: Float[Array, " o"]
    ) -> tuple[Int[Array, ""], Int[Array, ""], Bool[Array, ""]]:
        """The observation, the action before it, and whether there was none."""
        if obs.size != self.num_obs + self.num_actions:
            raise ValueError(
                f"a filter reads {self.num_obs} entries of the observation and {self.num_actions} "
                f"of the action before it, not {obs.size}: observe all, with the previous action"
            )
        o, action = obs[: self.num_obs], obs[self.num_obs :]
        return jnp.argmax(o), jnp.argmax(action), action.max() <= 0


class Feature(eqx.Module):
    """softmax(z / temperature), or z itself without one."""

    temperature: float | None = eqx.field(static=True)

    def __call__(self, z: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        return z if self.temperature is None else jax.nn.softmax(z / self.temperature)


def filter_cell(
    pomdp: POMDP, feature: str, *, decay: float = 0.1
) -> tuple[Computed, Float[Array, " S"], Feature]:
    """(cell, z0, feature of z for head and critic), for a known world.

    Call this function outside of `jit`, because it checks the model.

    | feature | z | seen |
    | --- | --- | --- |
    | belief | the belief, by the forward filter | z |
    | lof, lof-softmax | LOF with the deterministic part of T(a) | z; softmax(z) |
    | alf, alf-softmax, alf-belief | ALF with `decay` δ | z; softmax(z); softmax(z / δ) |

    The logits of "lof" are not centred: a network sees the raw ones. Where all T(a) are
    permutations the belief and LOF are exact; ALF forgets, and softmax(z / δ) is near the belief.
    Raises ValueError for another feature, or where `deterministic_part` or `leaky_filter` does.
    """
    if feature not in FEATURES:
        raise ValueError(f"unknown feature {feature!r}; choose from {', '.join(FEATURES)}")
    model = hmm(pomdp)
    kind, _, seen = feature.partition("-")
    rule: Filter
    if kind == "belief":
        rule = forward_filter(model)
    elif kind == "lof":
        likely = deterministic_part(model)
        exact = np.allclose(likely.transition, model.transition)
        rule = exact_filter(likely, least=0.0 if exact else 1e-6, centred=bool(seen))
    else:
        rule = leaky_filter(model, decay=decay)
    temperature = {"": None, "softmax": 1.0, "belief": decay}[seen]
    location = FilterLocation(rule, pomdp.num_obs, pomdp.num_actions)
    return Computed(location), rule.init, Feature(temperature)
