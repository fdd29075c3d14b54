"""POPGym's games of search: pairs on a table, ships, mines, and the arms of a bandit."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from spg.envs.popgym.cards import COLORS, DECK, RANKS
from spg.envs.popgym.task import Task, deal, draw
from spg.limits import Range

LENGTHS = 2, 3, 3, 4  # of the ships


class ConcentrationState(NamedTuple):
    left: Int[Array, " K"]  # cards of each kind that were never turned
    cards: Int[Array, " N"]  # kind of each card that was, else K
    up: Bool[Array, " N"]  # cards of pairs that were found
    shown: Bool[Array, " N"]  # cards that are seen now
    first: Int[Array, ""]  # card that was turned as the first of two, or N
    time: Int[Array, ""]


class Concentration(Task):
    """Turn two cards at a time and find the pairs (popgym/envs/concentration.py).

    Observed is the kind of each of the N = 52 `num_decks` cards, K+1 entries each, the last for a
    card that lies face down; the action is the card to turn. A pair pays 2/N and stays; two others,
    or twice the same card, pay -2/H and are turned back. To turn a card of a pair that was found
    pays -1/H, or -2/H as the second of two. H = ⌈2N - N/(2N-1)⌉ steps truncate, the last pair
    terminates. Easy, Medium, Hard: pairs of the 2 colours in 1 and 2 decks, of the 13 ranks in 1.
    """

    def __init__(self, num_decks: int = 1, num_kinds: int = COLORS):
        Range(1, 1000, whole=True).check("num_decks", num_decks)
        if num_kinds not in (COLORS, RANKS):
            raise ValueError(f"num_kinds is {num_kinds}; it has to be 2 or 13")
        self.num_cards = n = DECK * num_decks
        self.num_kinds = num_kinds
        horizon = math.ceil(2 * n - n / (2 * n - 1))
        super().__init__(parts=[num_kinds + 1] * n, num_actions=n, horizon=horizon)

    def start(self, key: PRNGKeyArray) -> ConcentrationState:
        n, kinds = self.num_cards, self.num_kinds
        left = jnp.full(kinds, n // kinds, jnp.int32)
        none = jnp.zeros(n, bool)
        first, time = jnp.array(n, jnp.int32), jnp.array(0, jnp.int32)
        return ConcentrationState(left, jnp.full(n, kinds, jnp.int32), none, none, first, time)

    def play(
        self, key: PRNGKeyArray, state: ConcentrationState, action: Array
    ) -> tuple[ConcentrationState, Float[Array, ""]]:
        n, places = self.num_cards, jnp.arange(self.num_cards)
        after, kind = deal(key, state.left)
        new = state.cards[action] == self.num_kinds
        left = jnp.where(new, after, state.left)
        cards = jnp.where(new & (places == action), kind, state.cards)
        turned = (places == action) | (places == state.first)
        second, found = state.first < n, state.up[action]
        pair = second & ~found & (state.first != action) & (cards[state.first] == cards[action])
        cost = -jnp.where(second | found, 1.0 + second, 0.0) / self.horizon
        reward = jnp.where(pair, 2 / n, cost)
        up = state.up | (turned & pair)
        first = jnp.where(second | found, n, action).astype(jnp.int32)
        shown = state.up | turned
        return ConcentrationState(left, cards, up, shown, first, state.time + 1), reward

    def show(self, state: ConcentrationState) -> Int[Array, " N"]:
        return jnp.where(state.shown, state.cards, self.num_kinds)

    def over(self, state: ConcentrationState) -> Bool[Array, ""]:
        return state.up.all()


class BattleshipState(NamedTuple):
    ships: Bool[Array, "S S"]
    shots: Bool[Array, "S S"]
    hit: Bool[Array, ""]  # by the last shot
    time: Int[Array, ""]


class Battleship(Task):
    """Sink ships of lengths 2, 3, 3, 4 on a board that is not seen (popgym/envs/battleship.py).

    Ships are placed one after the other, each uniformly where it overlaps no other. Observed is
    whether the last shot hit a place of a ship for the first time: entries (no, yes). Such a hit
    pays 1/12 and any other shot -1/(S² - 12). S² steps truncate, the last hit terminates. Easy,
    Medium, Hard: S = `size` = 8, 10, 12.
    """

    def __init__(self, size: int = 8):
        Range(5, 100, whole=True).check("size", size)
        self.size = size
        super().__init__(parts=(2,), num_actions=size**2, horizon=size**2)

    def start(self, key: PRNGKeyArray) -> BattleshipState:
        none = jnp.zeros((self.size, self.size), bool)
        ships = none
        for length, ship_key in zip(LENGTHS, jr.split(key, len(LENGTHS)), strict=True):
            ships = place_ship(ship_key, ships, length)
        return BattleshipState(ships, none, jnp.array(False), jnp.array(0, jnp.int32))

    def play(
        self, key: PRNGKeyArray, state: BattleshipState, action: Array
    ) -> tuple[BattleshipState, Float[Array, ""]]:
        place = _cell(action, self.size)
        hit = (state.ships & ~state.shots & place).any()
        reward = jnp.where(hit, 1 / sum(LENGTHS), -1 / (self.horizon - sum(LENGTHS)))
        return BattleshipState(state.ships, state.shots | place, hit, state.time + 1), reward

    def show(self, state: BattleshipState) -> Int[Array, "1"]:
        return state.hit.astype(jnp.int32)[None]

    def over(self, state: BattleshipState) -> Bool[Array, ""]:
        return ~(state.ships & ~state.shots).any()


def place_ship(key: PRNGKeyArray, ships: Bool[Array, "S S"], length: int) -> Bool[Array, "S S"]:
    """Add a ship, uniformly over the places along a row or a column that are free."""
    size, width = len(ships), len(ships) - length + 1  # `width` places in each row
    both = jnp.stack([ships, ships.T])
    free = ~jnp.stack([both[..., i : i + width] for i in range(length)]).any(0)
    free = free.reshape(2 * size, width).astype(jnp.int32)
    line_key, place_key = jr.split(key)
    line = draw(line_key, free.sum(1))
    across = jnp.arange(size) - draw(place_key, free[line])
    ship = (jnp.arange(size) == line % size)[:, None] & (across >= 0) & (across < length)
    return ships | jnp.where(line < size, ship, ship.T)


class MineSweeperState(NamedTuple):
    mines: Bool[Array, "S S"]
    viewed: Bool[Array, "S S"]
    near: Int[Array, ""]  # mines within the 3 × 3 squares around the last one viewed; 0 at first
    time: Int[Array, ""]


class MineSweeper(Task):
    """View all squares without a mine, one in a step (popgym/envs/minesweeper.py).

    Observed is the number of mines within the 3 × 3 squares around the last one viewed, itself
    included, min(M+1, 10) entries. A new square pays 1/n, of n = S² - M, an old one -1/(2(n-2)), a
    mine -1/2 - 1/n. A mine terminates, and so does the last free square; n steps truncate. Easy,
    Medium, Hard: S = `size` = 4, 6, 8 and M = `num_mines` = 2, 6, 10.
    """

    both_ends = False
    resets_rarely = False

    def __init__(self, size: int = 4, num_mines: int = 2):
        Range(2, 100, whole=True).check("size", size)
        Range(1, size**2 - 3, whole=True).check("num_mines", num_mines)
        self.size, self.num_mines = size, num_mines
        num_free = size**2 - num_mines
        parts = (min(num_mines + 1, 10),)
        super().__init__(parts=parts, num_actions=size**2, horizon=num_free)

    def start(self, key: PRNGKeyArray) -> MineSweeperState:
        mines = jr.permutation(key, jnp.arange(self.size**2) < self.num_mines)
        mines = mines.reshape(self.size, self.size)
        zero = jnp.array(0, jnp.int32)
        return MineSweeperState(mines, jnp.zeros_like(mines), zero, zero)

    def play(
        self, key: PRNGKeyArray, state: MineSweeperState, action: Array
    ) -> tuple[MineSweeperState, Float[Array, ""]]:
        place, n = _cell(action, self.size), self.horizon
        mine, old = (state.mines & place).any(), (state.viewed & place).any()
        reward = jnp.where(mine, -0.5 - 1 / n, jnp.where(old, -0.5 / (n - 2), 1 / n))
        row, column = (jnp.abs(jnp.arange(self.size) - x) <= 1 for x in divmod(action, self.size))
        near = (state.mines & row[:, None] & column).sum().astype(jnp.int32)
        return MineSweeperState(state.mines, state.viewed | place, near, state.time + 1), reward

    def show(self, state: MineSweeperState) -> Int[Array, "1"]:
        return state.near[None]

    def over(self, state: MineSweeperState) -> Bool[Array, ""]:
        return (state.mines & state.viewed).any() | (state.mines | state.viewed).all()


class BanditState(NamedTuple):
    chances: Float[Array, " N"]  # of the arms to pay
    paid: Bool[Array, ""]  # the last one
    time: Int[Array, ""]


class MultiarmedBandit(Task):
    """Find out which arm pays most often (popgym/envs/multiarmed_bandit.py).

    The chances of the N = `num_bandits` arms are uniform and independent. Observed is whether the
    last arm paid: entries (no, yes). It earns 1/H, and -1/H if not; H = `episode_length` steps
    truncate. Easy, Medium, Hard: 10, 20, 30 arms and 200, 400, 600 steps.
    """

    def __init__(self, num_bandits: int = 10, episode_length: int = 200):
        Range(1, 10**6, whole=True).check("num_bandits", num_bandits)
        Range(1, 10**9, whole=True).check("episode_length", episode_length)
        super().__init__(parts=(2,), num_actions=num_bandits, horizon=episode_length)

    def start(self, key: PRNGKeyArray) -> BanditState:
        chances = jr.uniform(key, (self.num_actions,), jnp.float32)
        return BanditState(chances, jnp.array(False), jnp.array(0, jnp.int32))

    def play(
        self, key: PRNGKeyArray, state: BanditState, action: Array
    ) -> tuple[BanditState, Float[Array, ""]]:
        paid = jr.uniform(key, (), jnp.float32) < state.chances[action]
        reward = jnp.where(paid, 1.0, -1.0) / self.horizon
        return BanditState(state.chances, paid, state.time + 1), reward

    def show(self, state: BanditState) -> Int[Array, "1"]:
        return state.paid.astype(jnp.int32)[None]


def _cell(action: Int[Array, ""], size: int) -> Bool[Array, "S S"]:
    """Where the action points: squares are numbered row by row."""
    return (jnp.arange(size**2) == action).reshape(size, size)
