"""Policies for finite worlds whose random actions are held for k steps.

An action is drawn at the first visit of an observation within a window of k steps. The internal
state says what has been drawn, so the score estimate of a `held_kernel`, a stateful policy, is a
k-step policy gradient.
"""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax import core
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.distributions import Categorical, Delta
from spg.kernels.cells import Drawn
from spg.kernels.finite import integer
from spg.kernels.kernel import Kernel
from spg.kernels.networks import Identity


class HeldState(NamedTuple):
    """The internal state of `Held`."""

    time: Int[Array, ""]  # steps since the episode opened
    component: Int[Array, ""]
    actions: Int[Array, " L"]  # held at each slot, -1 where none is


class HeldDistribution(eqx.Module):
    """The distribution of z' given z and the visited slots: a draw where nothing is held."""

    mixture: Float[Array, " C"]
    logits: Float[Array, "C I A"]  # at the slots
    slots: Int[Array, " I"]
    z: HeldState
    opens: Bool[Array, ""]  # does a window open here?

    def sample(self, *, key: PRNGKeyArray) -> HeldState:
        component_key, action_key = jr.split(key)
        component = jr.categorical(component_key, self.mixture)
        component = jnp.where(self.opens, component, self.z.component)
        return self._hold(component, jr.categorical(action_key, self.logits[component]))

    def sample_and_log_prob(self, *, key: PRNGKeyArray) -> tuple[HeldState, Float[Array, ""]]:
        z_next = self.sample(key=key)
        return z_next, self.log_prob(z_next)

    def mode(self) -> HeldState:
        component = jnp.where(self.opens, jnp.argmax(self.mixture), self.z.component)
        return self._hold(component, jnp.argmax(self.logits[component], -1))

    def log_prob(self, x: HeldState) -> Float[Array, ""]:
        """log w_c where a window opens, and Σ log p_c(a | slot) over the slots not held before."""
        drawn = jnp.where(self.opens, jax.nn.log_softmax(self.mixture)[x.component], 0.0)
        return drawn + self.new_actions(x)[x.component]

    def new_actions(self, z_next: HeldState) -> Float[Array, " C"]:
        """Σ log p_c(a | slot) over the slots not held before, of every component."""
        actions = z_next.actions[self.slots]
        log_probs = jax.nn.log_softmax(self.logits)[:, jnp.arange(len(actions)), actions]
        return jnp.where(self._is_new(), log_probs, 0.0).sum(-1)

    def entropy(self) -> Float[Array, ""]:
        certain = jnp.log(jnp.arange(len(self.mixture)) == self.z.component)
        mixture = jnp.where(self.opens, self.mixture, certain)
        fresh = jax.vmap(jax.vmap(lambda l: Categorical(l).entropy()))(self.logits)
        of_actions = jax.nn.softmax(mixture) @ jnp.where(self._is_new(), fresh, 0.0).sum(-1)
        return Categorical(mixture).entropy() + of_actions

    def _is_new(self) -> Bool[Array, " I"]:
        return self.opens | (self.z.actions[self.slots] < 0)

    def _hold(self, component: Array, drawn: Int[Array, " I"]) -> HeldState:
        held = jnp.where(self.opens, -1, self.z.actions)
        actions = jnp.where(self._is_new(), drawn, held[self.slots])
        held = held.at[self.slots].set(actions.astype(held.dtype))
        return HeldState(self.z.time + 1, component.astype(self.z.component.dtype), held)


class Held(eqx.Module):
    """ω( . | o, z): one of C product distributions Π_l p_c(a | l) a window, and an action a slot.

    C = 1 is the product class; certain logits, 0 and -inf, are a list of deterministic policies.
    A slot is what one agent may observe; each observation visits one slot of every agent.
    """

    mixture: Float[Array, " C"]  # logits of the components
    logits: Float[Array, "C L A"]  # log p_c(a | slot), up to a constant
    slots: Int[Array, "O I"]
    k: Int[Array, ""]

    def __call__(self, obs: Array, z: HeldState) -> HeldDistribution:
        slots = self.slots[integer(obs)]
        return HeldDistribution(self.mixture, self.logits[:, slots], slots, z, z.time % self.k == 0)


class HeldHead(eqx.Module):
    """The joint action that z' holds for the observation: Σ_i A^{I-1-i} a_i."""

    slots: Int[Array, "O I"]
    num_actions: int = eqx.field(static=True)  # A, of one agent

    def __call__(self, obs: Array, z_next: HeldState) -> Delta:
        actions = z_next.actions[self.slots[integer(obs)]]
        place = self.num_actions ** np.arange(len(actions))[::-1]
        return Delta(actions @ place)


def held_kernel(
    logits: Float[Array, "C L A"],
    mixture: Float[Array, " _"] | None = None,
    *,
    k: int | Int[Array, ""],
    slots: Int[np.ndarray, "O I"] | None = None,
) -> Kernel:
    """The policy that draws one of C product distributions, and its actions, for k steps at a time.

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
    cell = Drawn(Held(mixture, logits, places, jnp.asarray(k, int)))
    zero = jnp.zeros((), int)
    z0 = HeldState(zero, zero, jnp.full(num_slots, -1, int))
    return Kernel(cell, HeldHead(places, num_actions), Identity(), z0)


def certain_logits(policies: Int[np.ndarray, "N L"], num_actions: int) -> Float[Array, "N L A"]:
    """Deterministic policies as components: 0 for the action taken, -inf for the others."""
    return jnp.log(jax.nn.one_hot(policies, num_actions, dtype=float))


class ForcedHeld(eqx.Module):
    """`Held`, except that the window of this number holds this component."""

    held: Held
    window: Int[Array, ""]
    component: Int[Array, ""]

    def __call__(self, obs: Array, z: HeldState) -> HeldDistribution:
        free = self.held(obs, z)
        certain = jnp.log(jnp.arange(len(free.mixture)) == self.component)
        here = z.time // self.held.k == self.window
        return eqx.tree_at(lambda x: x.mixture, free, jnp.where(here, certain, free.mixture))


def held(kernel: Kernel) -> Held:
    """The `Held` of a `held_kernel`. Raises TypeError for another kernel."""
    if not isinstance(kernel.cell, Drawn) or not isinstance(kernel.cell.distribution, Held):
        raise TypeError(f"a held_kernel is needed; the cell of this one is {kernel.cell}")
    return kernel.cell.distribution
