"""Tony Cassandra's `.POMDP` files, https://www.pomdp.org/code/pomdp-file-spec.html.

Tables over (action, state, next state) are dense while a file is read, so that later entries simply
overwrite earlier ones; pages of memory that nothing is written to cost nothing.
"""

import math
import re
import warnings
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from spg.worlds.models import Problem, sparse_pomdp

_WORD = re.compile(r":|[^\s:]+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?").fullmatch
_ALL = slice(None)  # the index that `*` stands for
_PROBABILITY, _REWARD = (0.0, 1 + 1e-5), (-1e300, 1e300)  # their limits
_MOST_CELLS = 10**9  # of a table
_LAWS = {  # that may stand for numbers after so many indices
    ("T", 1): ("uniform", "identity", "reset"), ("T", 2): ("uniform", "reset"),
    ("O", 1): ("uniform",), ("O", 2): ("uniform",),
}  # fmt: skip
_PREAMBLE = ("discount", "values", "states", "actions", "observations")


class POMDPFileError(ValueError):
    """`{name}, line {l}, column {c}: {reason}`."""


def read_pomdp(path: str | Path) -> Problem:
    """The problem of a file, named after it. See `parse_pomdp`."""
    path = Path(path)
    return parse_pomdp(path.read_text("utf-8-sig", errors="replace"), path.stem)


def parse_pomdp(text: str, name: str) -> Problem:
    """The problem that a `.POMDP` file describes. Costs become negative rewards.

    How action-dependent observations are carried: the file's O(o | a, s') is what is seen *after*
    a led to s', whereas in our model s emits o *before* the policy acts. Where all actions agree on
    the row of s', that is O(· | s'). Where they do not, s' is split into one copy for each of its
    distinct rows, named `s'/a1,a2` after the actions that share it, and a leads into its own copy;
    rows of actions that never lead to s' make no copy. The observations that follow the first
    action thus have the file's joint distribution, under every policy.

    The file does not say what is seen before the first action. A state that all actions agree on
    opens an episode with its row. Any other opens it with a uniform observation: in its copy with
    the uniform row, else in one more copy `s/(start)` that nothing leads to.

    Rewards that depend on the observation are averaged, so that returns keep their expectation:

        r(s, a, s') = Σ_o O(o | a, s') R(a, s, s', o)

    An observation that is never emitted is kept, with a warning: whatever a controller would do
    about it has zero gradient. Raises POMDPFileError where the text does not follow the format, or
    where probabilities do not sum to one within 1e-5.
    """
    text = re.sub(r"#.*", "", text)
    text = re.sub(r"(?<!\S)([+-])([ \t]+)(?=[.\d])", r"\2\1", text)  # `- 1` is a number, too
    source = _Source(name, text, [*_WORD.findall(text), "", "", ""])
    head = _preamble(source)
    transition, observation, rewards = _entries(source, head)
    a, s, t = np.unravel_index(np.flatnonzero(transition), transition.shape)
    order = np.argsort(s, kind="stable")
    a, s, t = a[order], s[order], t[order]
    p, r = transition[a, s, t], head.sign * _mean_rewards(rewards, s, a, t, observation)
    p = p / transition.sum(-1)[a, s]

    occurs = np.asarray(transition.any(1))
    states, copied, emission, start, led_to = _split(observation, occurs, head)
    c, k = _join(copied, s)
    u, o = np.nonzero(emission)
    actions, observations = head.actions.names, head.observations.names
    seen = np.bincount(o, minlength=len(observations))
    if missing := [x for x, n in zip(observations, seen, strict=True) if not n]:
        warnings.warn(f"{name}: no state emits {', '.join(map(repr, missing))}", stacklevel=2)
    pomdp = sparse_pomdp(
        (c, a[k], led_to[a[k], t[k]], p[k], r[k]), (u, o, emission[u, o]),
        start, num_actions=len(actions), num_obs=len(observations), unemitted=True,
    )  # fmt: skip
    return Problem(name, pomdp, states, actions, observations, head.discount)


class _Source(NamedTuple):
    """The words of a file. Behind the last one are empty ones, which stand for the end."""

    name: str
    text: str
    words: list[str]

    def error(self, i: int, reason: str) -> POMDPFileError:
        """An error at word `i`."""
        starts = (word.start() for word in _WORD.finditer(self.text))
        at = next(islice(starts, i, None), len(self.text.rstrip()))
        line, column = self.text.count("\n", 0, at) + 1, at - self.text.rfind("\n", 0, at)
        return POMDPFileError(f"{self.name}, line {line}, column {column}: {reason}")

    def expected(self, i: int, what: str) -> POMDPFileError:
        found = repr(self.words[i]) if self.words[i] else "the end of the file"
        return self.error(i, f"{what} is expected, found {found}")

    def numbers(self, i: int, shape: tuple[int, ...], limits: tuple[float, float]) -> np.ndarray:
        """The array that begins at word `i`."""
        count, (low, high) = math.prod(shape), limits
        words = self.words[i : i + count]
        if not all(map(_NUMBER, words)):
            k = next(k for k, word in enumerate(words) if not _NUMBER(word))
            rest = f" ({count - k} of {count} numbers are missing)" if count > 1 else ""
            raise self.expected(i + k, f"a number{rest}")
        values = list(map(float, words))
        if min(values) < low or max(values) > high:
            k = next(k for k, x in enumerate(values) if not low <= x <= high)
            raise self.error(i + k, f"{words[k]} is not between {low:.4g} and {high:.4g}")
        return np.array(values).reshape(shape)


class _Space(NamedTuple):
    """The states, the actions or the observations."""

    what: str
    names: tuple[str, ...]
    index: dict[str, int | slice]  # of a name, a number, or `*`

    def find(self, source: _Source, i: int) -> int | slice:
        word = source.words[i]
        if word in self.index:
            return self.index[word]
        if word in ("", ":"):
            raise source.expected(i, f"one of the {self.what}")
        if re.fullmatch(r"[+-]?\d+", word):
            if 0 <= float(word) < len(self.names):
                return int(word)
            known = f"there are {len(self.names)} {self.what}"
            raise source.error(i, f"{word} is out of range: {known}")
        near = " or ".join(map(repr, get_close_matches(word, self.names)))
        hint = f"; near it: {near}" * bool(near)
        raise source.error(i, f"{word!r} is none of the {self.what}{hint}")


class _Preamble(NamedTuple):
    states: _Space
    actions: _Space
    observations: _Space
    discount: float
    sign: int  # of rewards
    start: np.ndarray
    end: int  # the word behind it


def _preamble(source: _Source) -> _Preamble:
    words, spans, i = source.words, {}, 0
    while words[i] and not (words[i] in ("T", "O", "R") and words[i + 1] == ":"):
        begin = i + 2 + (words[i] == "start" and words[i + 1] in ("include", "exclude"))
        if words[i] not in (*_PREAMBLE, "start"):
            raise source.expected(i, "a part of the preamble, or T:, O: or R:,")
        if words[begin - 1] != ":":
            raise source.expected(begin - 1, "a colon")
        if words[i] in spans:
            raise source.error(i, f"{words[i]}: is given twice")
        # The next part begins one word, or two, before the next colon.
        end = words.index(":", begin) - 1 if ":" in words[begin:] else len(words) - 3
        end -= words[end - 1] == "start" and words[end] in ("include", "exclude")
        spans[words[i]], i = (begin, max(begin, end)), max(begin, end)
    for key in _PREAMBLE:
        begin, end = spans.setdefault(key, (i, i))
        if begin == end:
            raise source.expected(begin, f"{key}: with its value")
        if key in ("discount", "values") and end > begin + 1:
            raise source.expected(begin + 1, "the next part of the preamble")
    discount = source.numbers(spans["discount"][0], (), (0.0, 1.0)).item()
    if words[spans["values"][0]] not in ("reward", "cost"):
        raise source.expected(spans["values"][0], "reward or cost")
    sign = 1 if words[spans["values"][0]] == "reward" else -1
    states, actions, observations = (_space(source, key, *spans[key]) for key in _PREAMBLE[2:])
    size, num_obs = len(states.names), len(observations.names)
    if len(actions.names) * size * max(size, num_obs) > _MOST_CELLS:
        raise source.error(spans["states"][0], "the problem is too large to be read")
    start = _start(source, states, *spans["start"]) if "start" in spans else np.ones(size) / size
    return _Preamble(states, actions, observations, discount, sign, start, i)


def _space(source: _Source, what: str, begin: int, end: int) -> _Space:
    names = source.words[begin:end]
    if len(names) == 1 and _NUMBER(names[0]):
        if not names[0].isdigit() or not 1 <= float(names[0]) <= 1e6:
            raise source.error(begin, f"{names[0]} cannot be the number of {what}")
        names = list(map(str, range(int(names[0]))))
    elif bad := [i for i, word in enumerate(names, begin) if _NUMBER(word) or word == "*"]:
        raise source.expected(bad[0], f"a name for one of the {what}")
    index = {str(i): i for i in range(len(names))} | {word: i for i, word in enumerate(names)}
    if len(set(names)) < len(names):
        i = next(i for i, word in enumerate(names) if word in names[:i])
        raise source.error(begin + i, f"{names[i]!r} occurs twice among the {what}")
    return _Space(what, tuple(names), {"*": _ALL, **index})


def _start(source: _Source, states: _Space, begin: int, end: int) -> np.ndarray:
    """Law of the first state."""
    size, words, mode = len(states.names), source.words, source.words[begin - 2]
    if begin == end:
        raise source.expected(begin, "the distribution of the first state")
    if mode == "start" and words[begin:end] == ["uniform"]:
        return np.full(size, 1 / size)
    if mode != "start" or (end == begin + 1 and (size > 1 or words[begin] in states.index)):
        chosen = np.zeros(size, bool)
        for i in range(begin, end):
            chosen[states.find(source, i)] = True
        chosen = ~chosen if mode == "exclude" else chosen
        if not chosen.any():
            raise source.error(begin, "start: no state is left")
        return chosen / chosen.sum()
    start = source.numbers(begin, (size,), _PROBABILITY)
    if begin + size < end:
        raise source.expected(begin + size, f"the end of the {size} numbers")
    if abs(start.sum() - 1) > 1e-5:
        raise source.error(begin, f"start: the probabilities sum to {start.sum():.6g}")
    return start / start.sum()


def _entries(source: _Source, head: _Preamble) -> tuple[np.ndarray, np.ndarray, list]:
    """T [A, S, S'] as given, O [A, S', O] normalised, and the list of (index, values) of R."""
    states, actions, observations = head.states, head.actions, head.observations
    spaces = {
        "T": (actions, states, states),
        "O": (actions, states, observations),
        "R": (actions, states, states, observations),
    }
    tables = {kind: np.zeros([len(x.names) for x in spaces[kind]]) for kind in "TO"}
    given = {kind: np.full(tables[kind].shape[:2], len(source.words)) for kind in "TO"}  # where
    words, rewards, i = source.words, [], head.end
    while words[i]:
        kind, begin, index, i = words[i], i, [], i + 1
        if kind not in spaces or words[i] != ":":
            raise source.expected(begin, "T:, O: or R:")
        for space in spaces[kind]:
            if words[i] != ":":
                break
            word = words[i + 1]
            index.append(space.index[word] if word in space.index else space.find(source, i + 1))
            i += 2
        shape, word = tuple(len(x.names) for x in spaces[kind][len(index) :]), words[i]
        if kind == "R" and len(index) < 2:
            raise source.expected(i, "a colon")
        if word in ("uniform", "identity", "reset"):
            if word not in _LAWS.get((kind, len(index)), ()):
                raise source.error(i, f"{word!r} has no meaning here")
            values = 1 / shape[-1] if word == "uniform" else head.start
            values, i = np.eye(shape[0]) if word == "identity" else values, i + 1
        else:
            values = source.numbers(i, shape, _REWARD if kind == "R" else _PROBABILITY)
            i += values.size
        if kind == "R":
            rewards.append(([*index, _ALL, _ALL][:4], values))
        else:
            tables[kind][tuple(index)] = values
            given[kind][tuple(index[:2])] = begin
    for kind, table in tables.items():
        total, where = table.sum(-1), given[kind]
        bad = np.argwhere(np.abs(total - 1) > 1e-5)
        if len(bad):
            a, s = bad[0]
            row = f"{kind}: action {actions.names[a]!r}, state {states.names[s]!r}"
            what = f"sum to {total[a, s]:.6g}" if where[a, s] < len(words) else "are never given"
            more = f" (and {len(bad) - 1} rows more are wrong)" * (len(bad) > 1)
            raise source.error(int(where[a, s]), f"{row}: the probabilities {what}{more}")
    return tables["T"], tables["O"] / tables["O"].sum(-1, keepdims=True), rewards


def _mean_rewards(
    entries: list, s: np.ndarray, a: np.ndarray, t: np.ndarray, observation: np.ndarray
) -> np.ndarray:
    """Σ_o O(o | a, s') R(a, s, s', o) of each transition; these are sorted by s."""
    num_actions, size, num_obs = observation.shape
    if all(index[3] == _ALL and values.ndim == 0 for index, values in entries):
        observation = np.ones((num_actions, size, 1))
    row, o = np.nonzero(observation.reshape(num_actions * size, -1))
    i, j = _join(a * size + t, row)
    s, a, t, o = s[i], a[i], t[i], o[j]
    begin = np.searchsorted(s, np.arange(size + 1))
    reward = np.zeros(len(i))
    for (ka, ks, kt, ko), values in entries:
        row = _ALL if ks == _ALL else slice(begin[ks], begin[ks + 1])
        hit = np.ones(len(reward[row]), bool)
        for x, k in ((a, ka), (t, kt), (o, ko)):
            if k != _ALL:
                hit &= x[row] == k
        if values.ndim:
            values = np.broadcast_to(values, (size, num_obs))[t[row][hit], o[row][hit]]
        reward[row][hit] = values
    return np.bincount(i, observation[a, t, o] * reward)


def _join(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with x[i] = y[j], by i; y is sorted."""
    begin = np.searchsorted(y, x)
    count = np.searchsorted(y, x, "right") - begin
    j = np.repeat(begin - np.cumsum(count) + count, count) + np.arange(count.sum())
    return np.repeat(np.arange(len(x)), count), j


def _split(
    observation: np.ndarray, occurs: np.ndarray, head: _Preamble
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The states of our model: copies of the file's, one for each row of observations that occurs.

    `occurs[a, s']`: a may lead to s'. Returns names; of which state each is a copy, [C];
    O(o | copy), [C, O]; that of the first copy, [C]; the copy of s' that a leads to, [A, S'].
    """
    num_actions, size, num_obs = observation.shape
    same = lambda x, y: np.asarray(np.abs(x - y).max(-1) < 1e-9)
    # The first action with the same row stands for all that share it.
    shown = np.stack(
        [same(observation[: a + 1], row).argmax(0) for a, row in enumerate(observation)]
    )
    split = np.asarray(shown.any(0))
    # A state that nothing leads to is kept, once: here, or below if it opens in a copy of its own.
    alone = ~occurs.any(0) & ~(split & (head.start > 0))
    key = np.arange(size) * num_actions + shown
    keys = np.unique(np.append(key[occurs], key[0, alone]))
    state, action = np.divmod(keys, num_actions)
    emission = observation[action, state]

    # Episodes open in the copies `opens`, and in `more` copies for states that have none of these.
    opens = np.flatnonzero(~split[state] | same(emission, 1 / num_obs))
    opening = np.full(size, -1)
    opening[state[opens]] = opens
    more = np.flatnonzero((head.start > 0) & (opening < 0))
    opening[more] = len(state) + np.arange(len(more))
    start = np.zeros(len(state) + len(more))
    start[opening[head.start > 0]] = head.start[head.start > 0]

    actions, names = np.array(head.actions.names), head.states.names
    sharing = lambda s, a: "/" + ",".join(actions[shown[:, s] == a]) if split[s] else ""
    names = [names[s] + sharing(s, a) for s, a in zip(state, action, strict=True)] + [
        f"{names[s]}/(start)" for s in more
    ]
    emission = np.concatenate([emission, np.full((len(more), num_obs), 1 / num_obs)])
    state = np.concatenate([state, more])
    return tuple(names), state, emission, start, np.searchsorted(keys, key)
