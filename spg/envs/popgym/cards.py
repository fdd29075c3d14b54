"""POPGym's games in which cards are dealt one by one: what was seen when, and how often."""

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.envs.popgym.task import Task, deal
from spg.limits import Range

DECK, COLORS, SUITS, RANKS = 52, 2, 4, 13


class DealtState(NamedTuple):
    left: Int[Array, "D K"]  # cards of each kind in each of D piles
    card: Int[Array, " D"]  # dealt last
    kept: Int[Array, " M"]  # earlier cards that matter later; -1 before there are any
    time: Int[Array, ""]


class _Dealing(Task):
    """In every step each pile deals a card, which is seen. The last one terminates the episode.

    A correct answer pays 1/n and a wrong one -1/n, so that returns are within [-1, 1].
    """

    both_ends = False
    num_piles = 1

    def __init__(self, num_decks: int, num_kinds: int, num_actions: int, num_kept: int = 0):
        Range(1, 1000, whole=True).check("num_decks", num_decks)
        Range(2, RANKS, whole=True).check("num_kinds", num_kinds)
        if DECK % num_kinds:
            raise ValueError(f"num_kinds is {num_kinds}; it has to be 2, 4 or 13")
        self.num_cards, self.num_kept = DECK * num_decks, num_kept
        self.of_each = self.num_cards // num_kinds
        parts = [num_kinds] * self.num_piles
        super().__init__(parts=parts, num_actions=num_actions, horizon=self.num_cards - 1)

    def keep(self, kept: Int[Array, " M"], card: Int[Array, " D"]) -> Int[Array, " M"]:
        return kept

    @abc.abstractmethod
    def pay(self, before: DealtState, after: DealtState, action: Array) -> Float[Array, ""]: ...

    def start(self, key: PRNGKeyArray) -> DealtState:
        shape = self.num_piles, self.num_cards // self.of_each
        kept = jnp.full(self.num_kept, -1, jnp.int32)
        time = jnp.array(-1, jnp.int32)
        return self._next(key, jnp.full(shape, self.of_each, jnp.int32), kept, time)

    def play(
        self, key: PRNGKeyArray, state: DealtState, action: Array
    ) -> tuple[DealtState, Float[Array, ""]]:
        after = self._next(key, state.left, state.kept, state.time)
        return after, self.pay(state, after, action)

    def show(self, state: DealtState) -> Int[Array, " D"]:
        return state.card

    def over(self, state: DealtState) -> Bool[Array, ""]:
        return state.time >= self.num_cards - 1

    def _next(
        self, key: PRNGKeyArray, left: Array, kept: Array, time: Int[Array, ""]
    ) -> DealtState:
        left, card = jax.vmap(deal)(jr.split(key, self.num_piles), left)
        return DealtState(left, card, self.keep(kept, card), time + 1)


class RepeatFirst(_Dealing):
    """Name in every step the suit of the first card (popgym/envs/repeat_first.py).

    Observed is the suit of the card that is dealt, 4 entries. Each of the N-1 answers pays
    ±1/(N-1), of N = 52 `num_decks` cards. Easy, Medium, Hard: 1, 8, 16 decks. (The original's text
    promises an indicator of the first card; it shows none, and neither does this one.)
    """

    def __init__(self, num_decks: int = 1):
        super().__init__(num_decks, SUITS, num_actions=SUITS, num_kept=1)

    def keep(self, kept: Int[Array, "1"], card: Int[Array, "1"]) -> Int[Array, "1"]:
        return jnp.where(kept < 0, card, kept)

    def pay(self, before: DealtState, after: DealtState, action: Array) -> Float[Array, ""]:
        return jnp.where(action == before.kept[0], 1.0, -1.0) / (self.num_cards - 1)


class RepeatPrevious(_Dealing):
    """Name the suit of the card k-1 steps ago (popgym/envs/repeat_previous.py).

    With k = 1 it is the card in sight. Observed is the suit of the card that is dealt, 4 entries.
    As soon as k cards have been seen an answer pays ±1/(N-k), of N = 52 `num_decks` cards. Easy,
    Medium, Hard: 1, 2, 3 decks and k = 4, 32, 64.
    """

    def __init__(self, num_decks: int = 1, k: int = 4):
        Range(1, DECK * num_decks - 1, whole=True).check("k", k)
        super().__init__(num_decks, SUITS, num_actions=SUITS, num_kept=k)

    def keep(self, kept: Int[Array, " k"], card: Int[Array, "1"]) -> Int[Array, " k"]:
        return jnp.concatenate([kept[1:], card])

    def pay(self, before: DealtState, after: DealtState, action: Array) -> Float[Array, ""]:
        asked = before.kept[0]
        answer = jnp.where(action == asked, 1.0, -1.0) / (self.num_cards - self.num_kept)
        return jnp.where(asked < 0, 0.0, answer)


class CountRecall(_Dealing):
    """Tell how often a kind of card has been dealt (popgym/envs/count_recall.py).

    Of two shuffled decks, one deals a card, the other says which kind is asked for. Observed are
    both kinds, K entries each. The answer, a number from 0 to N/K, pays ±1/(N-1), of N = 52
    `num_decks` cards. Easy, Medium, Hard: K = `num_kinds` = 2 colours, 4 suits, 13 ranks, of 1, 2,
    4 decks.
    """

    num_piles = 2

    def __init__(self, num_decks: int = 1, num_kinds: int = COLORS):
        super().__init__(num_decks, num_kinds, num_actions=DECK * num_decks // num_kinds + 1)

    def pay(self, before: DealtState, after: DealtState, action: Array) -> Float[Array, ""]:
        count = self.of_each - before.left[0, before.card[1]]
        return jnp.where(action == count, 1.0, -1.0) / (self.num_cards - 1)


class HigherLower(_Dealing):
    """Guess if the next card is higher (action 0) or lower (popgym/envs/higher_lower.py).

    Observed is the rank of the card that is dealt, 13 entries; the ace is lowest. A guess pays
    ±1/N, of N = 52 `num_decks` cards, and nothing where the ranks are the same. Easy, Medium, Hard:
    1, 2, 3 decks.
    """

    def __init__(self, num_decks: int = 1):
        super().__init__(num_decks, RANKS, num_actions=2)

    def pay(self, before: DealtState, after: DealtState, action: Array) -> Float[Array, ""]:
        rise = jnp.sign(after.card[0] - before.card[0])
        return rise * jnp.where(action == 0, 1.0, -1.0) / self.num_cards


class AutoencodeState(NamedTuple):
    left: Int[Array, "4"]  # cards of each suit still in the deck
    cards: Int[Array, " N"]  # dealt so far, in order; 0 elsewhere
    time: Int[Array, ""]


class Autoencode(Task):
    """Watch a deck, then name its suits from the last to the first (popgym/envs/autoencode.py).

    | step t | what happens |
    | --- | --- |
    | 0 … N-2 | a card is dealt, and its suit seen; actions do nothing |
    | N-1 … 2N-2 | the action names a suit, in reverse order, for ±1/N; then suit 0 is seen |

    Observed are whether it is time to answer, as entries (answer, watch), and a suit, 4 entries.
    N = 52 `num_decks`. The last answer terminates. Easy, Medium, Hard: 1, 2, 3 decks.
    """

    both_ends = False

    def __init__(self, num_decks: int = 1):
        Range(1, 1000, whole=True).check("num_decks", num_decks)
        self.num_cards = DECK * num_decks
        super().__init__(parts=(2, SUITS), num_actions=SUITS, horizon=2 * self.num_cards - 1)

    def start(self, key: PRNGKeyArray) -> AutoencodeState:
        left, card = deal(key, jnp.full(SUITS, self.num_cards // SUITS, jnp.int32))
        cards = jnp.zeros(self.num_cards, jnp.int32).at[0].set(card)
        return AutoencodeState(left, cards, jnp.array(0, jnp.int32))

    def play(
        self, key: PRNGKeyArray, state: AutoencodeState, action: Array
    ) -> tuple[AutoencodeState, Float[Array, ""]]:
        left, card = deal(key, state.left)
        last, time = self.num_cards - 1, state.time + 1
        cards = jnp.where(jnp.arange(self.num_cards) == time, card, state.cards)
        answer = jnp.where(action == state.cards[2 * last - state.time], 1.0, -1.0)
        reward = jnp.where(state.time < last, 0.0, answer / self.num_cards)
        return AutoencodeState(left, cards, time), reward

    def show(self, state: AutoencodeState) -> Int[Array, "2"]:
        watching = state.time < self.num_cards - 1
        suit = jnp.where(state.time < self.num_cards, state.cards[state.time], 0)
        return jnp.stack([watching.astype(jnp.int32), suit])

    def over(self, state: AutoencodeState) -> Bool[Array, ""]:
        return state.time >= self.horizon
