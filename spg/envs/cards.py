"""A game of recall: cards are shown one by one; later the game asks for them in another order."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from flax import struct
from gymnax.environments import spaces
from gymnax.environments.environment import Environment
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PRNGKeyArray

from spg.limits import Range


class RecallCardsState(NamedTuple):
    suits: Int[Array, " N"]  # of the card in each place
    order: Int[Array, " N"]  # in which places are asked for
    time: Int[Array, ""]


@struct.dataclass
class RecallCardsParams:
    num_cards: int = struct.field(pytree_node=False, default=6)
    pause: Any = 0  # steps between the last card and the first question

    def __post_init__(self):
        Range(1, 10**9, whole=True).check("num_cards", self.num_cards)
        if isinstance(self.pause, int | float):  # in a pytree it may be anything
            Range(0, 10**9, whole=True).check("pause", self.pause)

    @property
    def max_steps_in_episode(self) -> Any:
        """The horizon is part of the task and cannot be set apart."""
        return 2 * self.num_cards + self.pause


class RecallCards(Environment):
    """Remember which suit lies where.

    In the spirit of the card games of POPGym (Morad et al., 2023), by rules of our own. N =
    `num_cards` cards lie face down in places 0..N-1; their suits are uniform and independent.

    | step t | what happens |
    | --- | --- |
    | 0 … N-1 | place t and its suit are shown; actions do nothing |
    | … `pause` steps | nothing is shown; actions do nothing |
    | N more | a place is asked for, each once, in random order; the action names its suit |

    Of K = `num_suits`, the right one earns 1/N and a wrong one -1/(N(K-1)). Observed are the suit
    (K entries) and the place (N), one-hot or zeros, and whether this is a question. Every episode
    terminates after 2N + `pause` steps. The optimal return is 1; every memoryless policy returns 0
    in the mean, the worst -1/(K-1).
    """

    def __init__(self, num_suits: int = 4):
        Range(2, 10**6, whole=True).check("num_suits", num_suits)
        self.num_suits = num_suits

    @property
    def default_params(self) -> RecallCardsParams:
        return RecallCardsParams()

    def reset_env(
        self, key: PRNGKeyArray, params: RecallCardsParams
    ) -> tuple[Float[Array, " D"], RecallCardsState]:
        suit_key, order_key = jr.split(key)
        suits = jr.randint(suit_key, (params.num_cards,), 0, self.num_suits, jnp.int32)
        order = jr.permutation(order_key, jnp.arange(params.num_cards, dtype=jnp.int32))
        state = RecallCardsState(suits, order, jnp.int32(0))
        return self.observe(key, state, None, params), state

    def step_env(
        self,
        key: PRNGKeyArray,
        state: RecallCardsState,
        action: ArrayLike,
        params: RecallCardsParams,
    ) -> tuple[Float[Array, " D"], RecallCardsState, Float[Array, ""], Bool[Array, ""], dict]:
        asked, place = self._asked(state, params)
        right = action == state.suits[place]
        answer = jnp.where(right, 1.0, -1.0 / (self.num_suits - 1)) / params.num_cards
        reward = jnp.where(asked, answer, 0.0).astype(jnp.float32)
        state = state._replace(time=state.time + 1)
        terminated = self.is_terminated(state, params)
        obs = self.observe(key, state, action, params)
        return obs, state, reward, terminated, {"discount": 1.0 - terminated}

    def observe(
        self, key: PRNGKeyArray, state: RecallCardsState, action: Any, params: RecallCardsParams
    ) -> Float[Array, " D"]:
        n = params.num_cards
        asked, place = self._asked(state, params)
        shown = state.time < n
        place = jnp.where(shown, jnp.minimum(state.time, n - 1), place)
        suit = jax.nn.one_hot(state.suits[place], self.num_suits, dtype=jnp.float32) * shown
        position = jax.nn.one_hot(place, n, dtype=jnp.float32) * (shown | asked)
        return jnp.concatenate([suit, position, asked[None].astype(jnp.float32)])

    def is_truncated(self, state: RecallCardsState, params: RecallCardsParams) -> Bool[Array, ""]:
        return jnp.array(False)

    def is_terminated(self, state: RecallCardsState, params: RecallCardsParams) -> Bool[Array, ""]:
        return state.time >= params.max_steps_in_episode

    @property
    def name(self) -> str:
        return "RecallCards-memory"

    @property
    def num_actions(self) -> int:
        return self.num_suits

    def action_space(self, params: RecallCardsParams | None = None) -> spaces.Discrete:
        return spaces.Discrete(self.num_suits)

    def observation_space(self, params: RecallCardsParams | None = None) -> spaces.Box:
        num_cards = (params or self.default_params).num_cards
        return spaces.Box(-jnp.inf, jnp.inf, (self.num_suits + num_cards + 1,), jnp.float32)

    def _asked(
        self, state: RecallCardsState, params: RecallCardsParams
    ) -> tuple[Bool[Array, ""], Int[Array, ""]]:
        """Is this a question, and for which place?"""
        n = params.num_cards
        question = state.time - n - params.pause
        asked = (question >= 0) & (question < n)
        return asked, state.order[jnp.clip(question, 0, n - 1)]
