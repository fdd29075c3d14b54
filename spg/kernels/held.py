"""Policies whose randomness is held for k steps: the internal state is what has been drawn.

`Held` draws actions of finite worlds, each at the first visit of an observation within a window of
k steps; its z is (t, component, held actions), integers, -1 where none is held yet. `Seed` draws
one of several seeds of a network. Both are laws of z' given (o, z), so that score estimates of
stateful policies are k-step policy gradients.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.distributions import Categorical, Delta, Distribution
from spg.kernels.cells import replay_drawn
from spg.kernels.finite import integer
from spg.kernels.heads import Head
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity


class HeldDistribution(eqx.Module):
    """Law of z' given z and the slots that are visited: new draws where nothing is held."""

    mixture: Float[Array, " C"]
    logits: Float[Array, "C I A"]  # at the slots
    slots: Int[Array, " I"]
    z: Int[Array, " n"]
    opens: Bool[Array, ""]  # does a window open here?

    def sample(self, *, key: PRNGKeyArray) -> Int[Array, " n"]:
        component_key, action_key = jr.split(key)
        component = jr.categorical(component_key, self.mixture)
        component = jnp.where(self.opens, component, self.z[1])
        return self._hold(component, jr.categorical(action_key, self.logits[component]))

    def mode(self) -> Int[Array, " n"]:
        component = jnp.where(self.opens, jnp.argmax(self.mixture), self.z[1])
        return self._hold(component, jnp.argmax(self.logits[component], -1))

    def log_prob(self, x: Int[Array, " n"]) -> Float[Array, ""]:
        """log w_c where a window opens, and Σ log p_c(a | slot) over the slots not held before."""
        drawn = jnp.where(self.opens, jax.nn.log_softmax(self.mixture)[x[1]], 0.0)
        return drawn + self.new_actions(x)[x[1]]

    def new_actions(self, z_next: Int[Array, " n"]) -> Float[Array, " C"]:
        """Σ log p_c(a | slot) over the slots not held before, of every component."""
        actions = z_next[2 + self.slots]
        log_probs = jax.nn.log_softmax(self.logits)[:, jnp.arange(len(actions)), actions]
        return jnp.where(self._is_new(), log_probs, 0.0).sum(-1)

    def entropy(self) -> Float[Array, ""]:
        mixture = jnp.where(
            self.opens, self.mixture, jnp.log(jnp.arange(len(self.mixture)) == self.z[1])
        )
        fresh = jax.vmap(jax.vmap(lambda l: Categorical(l).entropy()))(self.logits)
        of_actions = jax.nn.softmax(mixture) @ jnp.where(self._is_new(), fresh, 0.0).sum(-1)
        return Categorical(mixture).entropy() + of_actions

    def replay(self, x: Int[Array, " n"]) -> Int[Array, " n"]:
        return x

    def _is_new(self) -> Bool[Array, " I"]:
        return self.opens | (self.z[2 + self.slots] < 0)

    def _hold(self, component: Array, drawn: Int[Array, " I"]) -> Int[Array, " n"]:
        held = jnp.where(self.opens, -1, self.z[2:])
        actions = jnp.where(self._is_new(), drawn, held[self.slots])
        held = held.at[self.slots].set(actions.astype(held.dtype))
        front = jnp.stack([self.z[0] + 1, component.astype(held.dtype)])
        return jnp.concatenate([front, held])


class Held(eqx.Module):
    """A cell: of C product laws Π_l p_c(a | l) one is drawn a window, and an action a slot.

    C = 1 is the product class; certain logits, 0 and -inf, are a list of deterministic policies.
    A slot is what one agent may observe; each observation visits one of every agent.
    """

    mixture: Float[Array, " C"]  # logits of the components
    logits: Float[Array, "C L A"]  # log p_c(a | slot), up to a constant
    slots: Int[Array, "O I"]
    k: Int[Array, ""]

    def __call__(self, obs: Array, z: Int[Array, " n"]) -> HeldDistribution:
        slots = self.slots[integer(obs)]
        return HeldDistribution(self.mixture, self.logits[:, slots], slots, z, z[0] % self.k == 0)

    def replay(
        self, obs: Array, z: Array, z_next: Array, first: Array, z0: Array
    ) -> tuple[Float[Array, " L"], Int[Array, "L n"]]:
        return replay_drawn(self, obs, z, z_next)


class HeldHead(eqx.Module):
    """The joint action that z' holds for the observation: Σ_i A^{I-1-i} a_i."""

    slots: Int[Array, "O I"]
    num_actions: int = eqx.field(static=True)  # A, of one agent

    def __call__(self, obs: Array, z_next: Int[Array, " n"]) -> Delta:
        actions = z_next[2 + self.slots[integer(obs)]]
        place = self.num_actions ** np.arange(len(actions))[::-1]
        return Delta(actions @ place)


def held_kernel(
    logits: Float[Array, "C L A"],
    mixture: Float[Array, " _"] | None = None,
    *,
    k: int | Int[Array, ""],
    slots: Int[np.ndarray, "O I"] | None = None,
) -> Kernel:
    """The policy that draws one of C product laws, and its actions, for k steps at a time.

    Without `slots` a single agent sees each of L observations apart; `mixture` is even by default.
    Raises ValueError for k < 1, another number of logits in `mixture`, a slot that is none of L,
    and one that two agents share.
    """
    num_components, num_slots, num_actions = logits.shape
    if not isinstance(k, core.Tracer) and k < 1:
        raise ValueError(f"k is {k}; a window has at least 1 step")
    slots = np.arange(num_slots)[:, None] if slots is None else slots
    bad = slots[(slots < 0) | (slots >= num_slots)]
    if bad.size:
        raise ValueError(f"slot {bad[0]} is out of range: there are {num_slots}")
    unique, agents = np.unique(np.concatenate([np.unique(s) for s in slots.T]), return_counts=True)
    if (agents > 1).any():
        raise ValueError(f"two agents share slot {unique[agents > 1][0]}; a slot is of one agent")
    if mixture is not None and mixture.shape != (num_components,):
        raise ValueError(f"mixture has {mixture.size} logits for {num_components} components")
    places = jnp.asarray(slots, int)
    mixture = jnp.zeros(num_components, logits.dtype) if mixture is None else mixture
    cell = Held(mixture, logits, places, jnp.asarray(k, int))
    z0 = jnp.full(2 + num_slots, -1, int).at[:2].set(0)
    return Kernel(cell, HeldHead(places, num_actions), Identity(), z0)


def certain_logits(policies: Int[np.ndarray, "N L"], num_actions: int) -> Float[Array, "N L A"]:
    """Deterministic policies as components: 0 for the action taken, -inf for the others."""
    return jnp.log(jax.nn.one_hot(policies, num_actions, dtype=float))


class ForcedHeld(eqx.Module):
    """`Held`, but that the window of this number holds this component."""

    cell: Held
    window: Int[Array, ""]
    component: Int[Array, ""]

    def __call__(self, obs: Array, z: Int[Array, " n"]) -> HeldDistribution:
        law: Any = self.cell(obs, z)
        sure = jnp.log(jnp.arange(len(law.mixture)) == self.component)
        here = z[0] // self.cell.k == self.window
        return eqx.tree_at(lambda l: l.mixture, law, jnp.where(here, sure, law.mixture))

    def replay(
        self, obs: Array, z: Array, z_next: Array, first: Array, z0: Array
    ) -> tuple[Float[Array, " L"], Int[Array, "L n"]]:
        return replay_drawn(self, obs, z, z_next)


class SeedDistribution(eqx.Module):
    """Law of z' = (phase, one-hot seed): a new seed where a window opens, else the held one."""

    logits: Float[Array, " n"]
    z: Float[Array, " m"]
    k: int = eqx.field(static=True)

    def sample(self, *, key: PRNGKeyArray) -> Float[Array, " m"]:
        return self._hold(jr.categorical(key, self.logits))

    def mode(self) -> Float[Array, " m"]:
        return self._hold(jnp.argmax(self.logits))

    def log_prob(self, x: Float[Array, " m"]) -> Float[Array, ""]:
        """log w_c where a window opens, else 0."""
        return self._opens() * jnp.vdot(x[1:], jax.nn.log_softmax(self.logits))

    def entropy(self) -> Float[Array, ""]:
        return self._opens() * Categorical(self.logits).entropy()

    def replay(self, x: Float[Array, " m"]) -> Float[Array, " m"]:
        return x

    def _opens(self) -> Bool[Array, ""]:
        return self.z[0] < 0.5 / self.k

    def _hold(self, drawn: Int[Array, ""]) -> Float[Array, " m"]:
        fresh = jax.nn.one_hot(drawn, len(self.logits), dtype=self.z.dtype)
        seed = jnp.where(self._opens(), fresh, self.z[1:])
        steps = jnp.round(self.z[0] * self.k) + 1
        return jnp.concatenate([(steps % self.k)[None] / self.k, seed])


class Seed(eqx.Module):
    """A cell: one of n seeds is drawn for k steps, c ~ softmax(logits), and shared by all agents.

    z = (steps into the window / k, one-hot seed). The head sees the seed alone, through
    `SeedHead`, and is a mixture of n policies that share one network; a critic sees the phase too.
    """

    logits: Float[Array, " n"]
    k: int = eqx.field(static=True)

    def __call__(self, obs: Array, z: Float[Array, " m"]) -> SeedDistribution:
        return SeedDistribution(self.logits, z, self.k)

    def replay(
        self, obs: Array, z: Array, z_next: Array, first: Array, z0: Array
    ) -> tuple[Float[Array, " L"], Float[Array, "L m"]]:
        return replay_drawn(self, obs, z, z_next)


class SeedHead(eqx.Module):
    """Any head, of the observation and the seed; the phase of the window is kept from it."""

    head: Head

    def __call__(self, obs: Array, z_next: Float[Array, " m"]) -> Distribution:
        return self.head(obs, z_next[1:])
