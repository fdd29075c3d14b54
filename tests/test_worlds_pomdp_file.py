"""`.POMDP` files: every form of the format, its meaning by enumeration, every complaint."""

import time
import warnings
from collections import defaultdict
from itertools import product

import numpy as np
import pytest

from spg.worlds.models import dense
from spg.worlds.pomdp_file import POMDPFileError, parse_pomdp, read_pomdp

pytestmark = pytest.mark.usefixtures("float64")

TIGER = """# This is the tiger problem of AAAI paper fame in the new pomdp format.
discount: 0.75
values: reward
states: tiger-left tiger-right
actions: listen open-left open-right
observations: tiger-left tiger-right
T:listen
identity
T:open-left
uniform
T:open-right
uniform
O:listen
0.85 0.15
0.15 0.85
O:open-left
uniform
O:open-right
uniform
R:listen : * : * : * -1
R:open-left : tiger-left : * : * -100
R:open-left : tiger-right : * : * 10
R:open-right : tiger-left : * : * 10
R:open-right : tiger-right : * : * -100
"""

LOAD = """discount: .95
values: reward
states: near-empty
        near-full far-empty far-full   # over two lines
actions: 2
observations: loading unloading
start: 0.5 0 0
  0.5
T: * : * : * 0.0
T: 0 : near-empty : near-full 1
T: 0 : near-full : near-full 1.0
T: 0 : far-empty : 0 +0.75
T: 0 : far-empty : 2 2.5e-1
T: 0 : far-full : near-full 0.75
T: 0 : far-full : far-full 0.25
T: 1 : * : far-empty 1
O: *
0.9 .1
0.9 .1
1e-1 0.9
0.1 0.9
R: 0 : near-empty : near-full : * 1
R: 1 : near-full : far-empty : * 2
"""

HEAD = """discount: 0.9
values: reward
states: x y z
actions: a b
observations: u v
"""
UNIFORM = "T: * uniform\nO: * uniform\n"
S, A, O = 3, 2, 2


def arrays(text):
    """(transition, observation, reward, start)."""
    return tuple(np.asarray(x) for x in dense(parse_pomdp(text, "test").pomdp))


def rewards(text):
    """r(s, a, s') of a problem without copies, [S, A, S']; zero where s' does not follow."""
    pomdp = parse_pomdp(text, "test").pomdp
    size, num_actions, _ = pomdp.successor.shape
    out = np.zeros((size, num_actions, size))
    for s, a, n in np.ndindex(*pomdp.successor.shape):
        if pomdp.probability[s, a, n] > 0:
            out[s, a, pomdp.successor[s, a, n]] = pomdp.reward[s, a, n]
    return out


def write_rows(kind, table):
    """One line for each number of the table, in random order, zeros included."""
    lines = [f"{kind}: {' : '.join(map(str, i))} {float(x)!r}" for i, x in np.ndenumerate(table)]
    return "\n".join(np.random.default_rng(0).permutation(lines)) + "\n"


def random_law(rng, *shape, zeros=False):
    x = rng.exponential(size=shape)
    x = x * (rng.random(shape) < 0.6) if zeros else x
    x[..., 0] += 0.1
    return x / x.sum(-1, keepdims=True)


def test_tiger_has_four_states():
    problem = parse_pomdp(TIGER, "tiger")
    assert problem.name == "tiger"
    assert problem.discount == 0.75
    assert problem.actions == ("listen", "open-left", "open-right")
    assert problem.observations == ("tiger-left", "tiger-right")
    opened = "open-left,open-right"
    assert problem.states == tuple(
        f"tiger-{side}/{seen}" for side in ("left", "right") for seen in ("listen", opened)
    )
    transition, observation, reward, start = (np.asarray(x) for x in dense(problem.pomdp))
    listened, reset = np.array([1.0, 0, 0, 0]), np.array([0, 0.5, 0, 0.5])
    for s, a in product(range(4), range(3)):
        expected = np.roll(listened, 2 * (s // 2)) if a == 0 else reset
        np.testing.assert_allclose(transition[s, a], expected)
    np.testing.assert_allclose(observation, [[0.85, 0.15], [0.5, 0.5], [0.15, 0.85], [0.5, 0.5]])
    np.testing.assert_allclose(reward, [[-1, -100, 10]] * 2 + [[-1, 10, -100]] * 2)
    np.testing.assert_allclose(start, reset)


def test_load_unload():
    problem = parse_pomdp(LOAD, "load")
    assert problem.states == ("near-empty", "near-full", "far-empty", "far-full")
    assert problem.actions == ("0", "1")
    assert problem.discount == 0.95
    transition, observation, reward, start = (np.asarray(x) for x in dense(problem.pomdp))
    load = [[0, 1, 0, 0], [0, 1, 0, 0], [0.75, 0, 0.25, 0], [0, 0.75, 0, 0.25]]
    np.testing.assert_allclose(transition[:, 0], load)
    np.testing.assert_allclose(transition[:, 1], [[0, 0, 1, 0]] * 4)
    np.testing.assert_allclose(observation, [[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2)
    np.testing.assert_allclose(reward, [[1, 0], [0, 2], [0, 0], [0, 0]])
    np.testing.assert_allclose(start, [0.5, 0, 0, 0.5])


EYE = "".join(f"T: a : {s} : {s} 1\n" for s in range(3))
EVEN = "".join(f"T: b : {s} : {t} {1 / 3!r}\n" for s in range(3) for t in range(3))
SEEN = "O: * : * : u 0.5\nO: * : * : v 0.5\n"
FORMS = {
    "names": HEAD + "T: a identity\nT: b uniform\nO: * uniform\n",
    "tight": HEAD.replace(": ", ":") + "T:a identity T:b uniform O:*uniform".replace("*u", "* u"),
    "wide": HEAD.replace(":", " :\t") + "T : 0\nidentity\nT :1 uniform\nO  :  * \n uniform",
    "one line": (HEAD + "T: a identity T: b uniform O: * uniform").replace("\n", " "),
    "windows": (HEAD + "T: a identity\nT: b uniform\nO: * uniform\n").replace("\n", "\r\n"),
    "order": "\n".join(HEAD.splitlines()[::-1]) + "\nO: * uniform T: b uniform T: a identity",
    "many lines": HEAD.replace("x y", "x\n\ny\n") + "T: a 1 0\n0 0\n1 0 0 0 1 T:b uniform\n" + SEEN,
    "comments": HEAD.replace("x", "x # y: T: a\n") + EYE.replace("\n", "#1\n") + EVEN + SEEN,
    "entries": HEAD + EYE + EVEN + SEEN,
    "rows": HEAD + "T:a:x 1 0 0 T:a:1 0 1 0 T:a:z .0 0. +1e0 T:b:* uniform\nO:*:* .5 5e-1",
    "matrix": HEAD + "T: * identity T: b uniform\nO: a .5 .5 .5 .5 .5 .5\nO: b uniform",
    "overwritten row": HEAD + "T: * uniform\nT: a : x 1 0 0\nT: a : y : * 0\nT: a : y : y 1\n"
    "T: a : z 0 0 1\nO: * : * 1 0\nO: * uniform",
    "overwritten": HEAD + "T: * : * : * 0 T: * uniform T: a identity O: * : x 0 1 O: * : * uniform",
    "reset": HEAD + "start: uniform T: * reset T: a identity T: b : y reset O: * uniform",
    "leading zeros": HEAD + "T: 00 identity T: 01 uniform O: * uniform",
    "no state is split": HEAD + "T: a identity T: b uniform O: a uniform O: b : * : * .5",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_model_agree(form):
    transition, observation, reward, start = arrays(FORMS[form])
    np.testing.assert_allclose(transition[:, 0], np.eye(3))
    np.testing.assert_allclose(transition[:, 1], np.full((3, 3), 1 / 3))
    np.testing.assert_allclose(observation, np.full((3, 2), 0.5))
    np.testing.assert_allclose(reward, np.zeros((3, 2)))
    np.testing.assert_allclose(start, np.full(3, 1 / 3))


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ("", [1 / 3, 1 / 3, 1 / 3]),
        ("start: uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("start: 0.25\n\n0.5\n .25", [0.25, 0.5, 0.25]),
        ("start: 1 0 0", [1, 0, 0]),
        ("start: y", [0, 1, 0]),
        ("start: 2", [0, 0, 1]),
        ("start include: x z", [0.5, 0, 0.5]),
        ("start include : 1", [0, 1, 0]),
        ("start exclude: 0", [0, 0.5, 0.5]),
        ("start exclude:\nx y", [0, 0, 1]),
    ],
)
def test_start(start, expected):
    middle = HEAD.replace("actions:", start + "\nactions:")
    for text in (HEAD + start, start + "\n" + HEAD, middle):
        np.testing.assert_allclose(arrays(text + "\n" + UNIFORM)[3], expected)


@pytest.mark.parametrize("start", ["0", "1", "1.0", "uniform", "only"])
def test_start_of_a_single_state(start):
    head = HEAD.replace("x y z", "only") + f"start: {start}\n"
    if start == "1":  # a probability: there is no state 1
        assert "1" not in parse_pomdp(head + UNIFORM, "test").states
    np.testing.assert_allclose(arrays(head + UNIFORM)[3], [1])


def test_reset_is_the_law_of_the_start():
    transition = arrays(HEAD + "start: .2 .3 .5\n" + UNIFORM + "T: b : y\nreset")[0]
    np.testing.assert_allclose(transition[1, 1], [0.2, 0.3, 0.5])
    np.testing.assert_allclose(transition[0, 1], np.full(3, 1 / 3))


def test_costs_are_negative_rewards():
    tail = UNIFORM + "R: a : x : * : * 3\nR: b : * : * : * -2"
    reward = arrays(HEAD.replace("reward", "cost") + tail)[2]
    np.testing.assert_allclose(reward, [[-3, 2], [0, 2], [0, 2]])
    np.testing.assert_allclose(reward, -arrays(HEAD + tail)[2])


@pytest.mark.parametrize("num_cells", [1, 2, 3])
def test_rewards_in_every_form(num_cells):
    """Random R entries of every arity, with wildcards, against a dense array filled in order."""
    rng = np.random.default_rng(num_cells)
    emission = random_law(rng, S, O)
    text = HEAD + write_rows("T", random_law(rng, A, S, S))
    text += "".join(f"O: * : {s} {p!r} {q!r}\n" for s, (p, q) in enumerate(emission.tolist()))
    table = np.zeros((A, S, S, O))
    forms = list(product(*[["*", 1]] * 4)) + list(product(*[["*", 1]] * 3)) + [("*", "*"), (1, 1)]
    names = ("ab", "xyz", "xyz", "uv")
    for k in rng.permutation(np.repeat(np.arange(len(forms)), num_cells)):
        form = forms[k]
        index = [int(rng.integers(n)) for n in table.shape[: len(form)]]
        where = tuple(slice(None) if f == "*" else i for f, i in zip(form, index, strict=True))
        values = rng.normal(size=table.shape[len(form) :])
        table[where] = values
        written = [
            "*" if f == "*" else rng.choice([str(i), name[i]])
            for f, i, name in zip(form, index, names, strict=False)
        ]
        text += f"R: {' : '.join(written)} " + " ".join(map(repr, np.ravel(values).tolist())) + "\n"
    expected = np.einsum("asto,to->sat", table, emission)
    np.testing.assert_allclose(rewards(text), expected, atol=1e-12)


def test_rewards_without_observations_in_every_form():
    text = HEAD + UNIFORM + "R:*:*:*:* 1\nR: a:*:y:* - 2\nR: b : z : * : * +3\nR: b:z:x:* 4"
    expected = np.ones((S, A, S))
    expected[:, 0, 1], expected[2, 1], expected[2, 1, 0] = -2, 3, 4
    np.testing.assert_allclose(rewards(text), expected)


def test_round_trip():
    rng = np.random.default_rng(3)
    size, num_actions, num_obs = 6, 3, 4
    transition = random_law(rng, num_actions, size, size, zeros=True)
    emission = random_law(rng, size, num_obs, zeros=True)
    reward = rng.normal(size=(num_actions, size, size, 1)).repeat(num_obs, 3)
    start = random_law(rng, size)
    text = f"values: reward discount: 0.5 states: {size} actions: {num_actions}\n"
    text += f"observations: {num_obs} start: {' '.join(map(repr, start.tolist()))}\n"
    text += write_rows("T", transition) + write_rows("R", reward)
    text += write_rows("O", np.broadcast_to(emission, (num_actions, size, num_obs)))
    problem = parse_pomdp(text, "random")
    assert problem.states == tuple(map(str, range(size)))
    mean = np.einsum("ast,ast->sa", transition, reward[..., 0])
    expected = (transition.transpose(1, 0, 2), emission, mean, start)
    for x, y in zip(dense(problem.pomdp), expected, strict=True):
        np.testing.assert_allclose(np.asarray(x), y, atol=1e-12)


def joint_of_file(start, opening, transition, observation, reward, actions):
    """p(o_0, r_1, o_1, ...) by Cassandra's order of events, after the opening observation."""
    law = defaultdict(float)
    for s, o in np.ndindex(*opening.shape):
        law[s, (o,)] += start[s] * opening[s, o]
    for a in actions:
        law, before = defaultdict(float), law
        for (s, seen), p in before.items():
            for t, o in np.ndindex(observation.shape[1:]):
                new = (*seen, round(float(reward[a, s, t]), 9), o)
                law[t, new] += p * transition[a, s, t] * observation[a, t, o]
    return law


def joint_of_model(pomdp, actions):
    """p(o_0, r_1, o_1, ...) where s emits o before it moves."""
    arrays = (pomdp.successor, pomdp.probability, pomdp.reward, pomdp.observation, pomdp.emission)
    successor, probability, reward, observation, emission = (np.asarray(x) for x in arrays)
    emit = lambda law: {
        (s, (*seen, int(o))): p * q
        for (s, seen), p in law.items()
        for o, q in zip(observation[s], emission[s], strict=True)
        if q > 0
    }
    law = emit({(s, ()): p for s, p in enumerate(np.asarray(pomdp.start)) if p > 0})
    for a in actions:
        moved = defaultdict(float)
        for (s, seen), p in law.items():
            for t, q, r in zip(successor[s, a], probability[s, a], reward[s, a], strict=True):
                if q > 0:
                    moved[int(t), (*seen, round(float(r), 9))] += p * q
        law = emit(moved)
    return law


def marginal(law):
    out = defaultdict(float)
    for (_, seen), p in law.items():
        if p > 0:
            out[seen] += p
    return out


def split_world():
    """Rows of state 1 depend on the action in two classes, those of state 2 in three.

    State 3 is only started in, and no action is ever seen to lead there.
    """
    rng = np.random.default_rng(7)
    size, num_actions, num_obs = 4, 3, 2
    transition = random_law(rng, num_actions, size, size)
    transition[..., 3] = 0
    transition[0, :, 2] = 0  # action 0 never leads to state 2
    transition /= transition.sum(-1, keepdims=True)
    observation = random_law(rng, num_actions, size, num_obs)
    observation[:, 0] = observation[0, 0]
    observation[2, 1] = observation[0, 1]
    observation[1, 2] = 0.5
    reward = rng.normal(size=(num_actions, size, size, num_obs))
    start = random_law(rng, size)
    head = "discount: 1 values: reward states: w x y z actions: a b c observations: 2\n"
    head += f"start: {' '.join(map(repr, start.tolist()))}\n"
    text = head + write_rows("T", transition) + write_rows("O", observation)
    opening = np.full((size, num_obs), 0.5)
    opening[0] = observation[0, 0]
    return text, start, opening, transition, observation, reward


def test_copies_of_states_whose_observation_depends_on_the_action():
    text, start, *_ = split_world()
    problem = parse_pomdp(text, "split")
    assert problem.states == ("w", "x/a,c", "x/b", "y/b", "y/c", "x/(start)", "z/(start)")
    expected = [start[0], 0, 0, start[2], 0, start[1], start[3]]
    np.testing.assert_allclose(problem.pomdp.start, expected)
    transition = np.asarray(dense(problem.pomdp).transition)
    assert transition[..., 5:].sum() == 0  # nothing leads to the copies of the start


@pytest.mark.parametrize("actions", [(0, 1, 2), (1, 1, 0), (2, 0, 1)])
def test_joint_law_of_observations_and_rewards(actions):
    text, start, opening, transition, observation, reward = split_world()
    reward = reward[..., 0]
    text += write_rows("R", reward[..., None].repeat(2, -1))
    truth = marginal(
        joint_of_file(start, opening, transition, observation, reward, actions)
    )  # fmt: skip
    model = marginal(joint_of_model(parse_pomdp(text, "split").pomdp, actions))
    assert truth.keys() == model.keys()
    assert len(truth) > 100
    for seen, p in truth.items():
        np.testing.assert_allclose(model[seen], p, atol=1e-12)


def test_mean_reward_given_the_past_where_it_depends_on_the_observation():
    """E[r_3; o_0, o_1, o_2] of the file, with r = R(a, s, s', o_3), is that of r(s, a, s')."""
    text, start, opening, transition, observation, reward = split_world()
    pomdp = parse_pomdp(text + write_rows("R", reward), "split").pomdp
    mean = np.asarray(pomdp.mean_reward())
    for *actions, last in [(0, 1, 2), (1, 2, 0), (2, 2, 1)]:
        truth, model = defaultdict(float), defaultdict(float)
        zero = np.zeros(transition.shape)
        law = joint_of_file(start, opening, transition, observation, zero, actions)
        for (s, seen), p in law.items():
            joint = transition[last, s][:, None] * observation[last]
            truth[seen[::2]] += p * (joint * reward[last, s]).sum()
        for (s, seen), p in joint_of_model(pomdp, actions).items():
            model[seen[::2]] += p * mean[s, last]
        assert len(truth) == 8
        for seen, x in truth.items():
            np.testing.assert_allclose(model[seen], x, atol=1e-12)


def test_observation_that_is_never_emitted_is_named():
    with pytest.warns(UserWarning, match=r"^test: no state emits 'v'$"):
        problem = parse_pomdp(HEAD + "T: * uniform O: * : * : u 1", "test")
    assert problem.pomdp.num_obs == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parse_pomdp(TIGER, "tiger")


def test_numbers_are_normalised_within_the_tolerance():
    third = " 0.333333" * 3
    transition, _, _, start = arrays(f"{HEAD}start:{third}\nT: * : *{third}\nO: * uniform")
    np.testing.assert_allclose(transition, 1 / 3, atol=1e-15)
    np.testing.assert_allclose(start, 1 / 3, atol=1e-15)


def test_file_is_read_from_its_path(tmp_path):
    path = tmp_path / "tiger.95.POMDP"
    path.write_bytes(b"\xef\xbb\xbf" + TIGER.encode() + b"# caf\xe9\n")
    for argument in (path, str(path)):
        problem = read_pomdp(argument)
        assert problem.name == "tiger.95"
        assert len(problem.states) == 4


COMPLAINTS = [  # what replaces what in HEAD; the lines after it; line, column, reason
    ("", "", "T: a : w : x 1", 6, 8, "'w' is none of the states"),
    ("states: x", "states: left", "T: a : lft identity",
     6, 8, "'lft' is none of the states; near it: 'left'"),
    ("", "", "T: c identity", 6, 4, "'c' is none of the actions"),
    ("", "", "# T: *\n  O: a : x : w 1", 7, 14, "'w' is none of the observations"),
    ("", "", "T: 2 identity", 6, 4, "2 is out of range: there are 2 actions"),
    ("", "", "T: a : -1 : x 1", 6, 8, "-1 is out of range: there are 3 states"),
    ("", "", "T: : a", 6, 4, "one of the actions is expected, found ':'"),
    ("", "", "T: a :", 6, 7, "one of the states is expected, found the end"),
    ("", "", "T: a : x : y", 6, 13, "a number is expected, found the end"),
    ("", "", "T: a : x : y one", 6, 14, "a number is expected, found 'one'"),
    ("", "", "T: a : x : y nan", 6, 14, "a number is expected, found 'nan'"),
    ("", "", "T: a : x : y : 0.5", 6, 14, "a number is expected, found ':'"),
    ("", "", "T: a\n1 0 0\n0 1 0\n0 0\n\n",
     9, 4, "a number (1 of 9 numbers are missing) is expected, found the end"),
    ("", "", "T: a\n1 0 0\n0 1\nO: a uniform",
     9, 1, "a number (4 of 9 numbers are missing) is expected, found 'O'"),
    ("", "", "T: a : x 1 0 0 0", 6, 16, "T:, O: or R: is expected, found '0'"),
    ("", "", "T: a identity T b identity", 6, 15, "T:, O: or R: is expected, found 'T'"),
    ("", "", UNIFORM + "x", 8, 1, "T:, O: or R: is expected, found 'x'"),
    ("", "", UNIFORM + "discount: 0.5", 8, 1, "T:, O: or R: is expected, found 'discount'"),
    ("", "", "T: a : x : y -0.5", 6, 14, "-0.5 is not between 0 and 1"),
    ("", "", "T: a\n1 0 0\n0 1.5 0\n0 0 1", 8, 3, "1.5 is not between 0 and 1"),
    ("", "", "O: a : x 2 -1", 6, 10, "2 is not between 0 and 1"),
    ("", "", "R: a : x : y : u 1e999", 6, 18, "1e999 is not between -1e+300 and 1e+300"),
    ("", "", "R: a 1", 6, 6, "a colon is expected, found '1'"),
    ("", "", "R: a : x\n1 2 3",
     7, 6, "a number (3 of 6 numbers are missing) is expected, found the end"),
    ("", "", "R: a : x : y uniform", 6, 14, "'uniform' has no meaning here"),
    ("", "", "T: a : x identity", 6, 10, "'identity' has no meaning here"),
    ("", "", "T: a : x : y uniform", 6, 14, "'uniform' has no meaning here"),
    ("", "", "O: a identity", 6, 6, "'identity' has no meaning here"),
    ("u v", "u v w", "O: * identity", 6, 6, "'identity' has no meaning here"),
    ("", "", "O: a : x reset", 6, 10, "'reset' has no meaning here"),
    ("", "", UNIFORM + "T: b : y 0.5 0.4 0.03",
     8, 1, "T: action 'b', state 'y': the probabilities sum to 0.93"),
    ("", "", UNIFORM + "\nT: b : * : z 0",
     9, 1, "T: action 'b', state 'x': the probabilities sum to 0.666667 (and 2 rows more"),
    ("", "", UNIFORM + "O: b : y 0.5 0.6",
     8, 1, "O: action 'b', state 'y': the probabilities sum to 1.1"),
    ("", "", "T: a uniform\nT: b : x uniform\nT: b : y uniform\nO: * uniform",
     9, 13, "T: action 'b', state 'z': the probabilities are never given"),
    ("", "", "T: * uniform",
     6, 13, "O: action 'a', state 'x': the probabilities are never given (and 5"),
    ("", "", "",
     5, 18, "T: action 'a', state 'x': the probabilities are never given (and 5"),
    ("", "", "start: 0.5 0.25 0.2 T: * uniform", 6, 8, "start: the probabilities sum to 0.95"),
    ("", "", "start: 0.5 0.5 T: * uniform",
     6, 16, "a number (1 of 3 numbers are missing) is expected, found 'T'"),
    ("", "", "start: 1 0 0 0 T: * uniform",
     6, 14, "the end of the 3 numbers is expected, found '0'"),
    ("", "", "start: 1.5 -.5 0", 6, 8, "1.5 is not between 0 and 1"),
    ("", "", "start: w", 6, 8, "'w' is none of the states"),
    ("", "", "start: 3", 6, 8, "3 is out of range: there are 3 states"),
    ("", "", "start:", 6, 7, "the distribution of the first state is expected, found the end"),
    ("", "", "start include: x w", 6, 18, "'w' is none of the states"),
    ("discount:", "start include\ndiscount:", "", 2, 1, "a colon is expected, found 'discount'"),
    ("", "", "start exclude: x y z", 6, 16, "start: no state is left"),
    ("", "", "start: x start include: y", 6, 10, "start: is given twice"),
    ("0.9", "1.1", UNIFORM, 1, 11, "1.1 is not between 0 and 1"),
    ("0.9", "-0.1", UNIFORM, 1, 11, "-0.1 is not between 0 and 1"),
    ("0.9", "high", UNIFORM, 1, 11, "a number is expected, found 'high'"),
    ("0.9", "0.9 0.8", UNIFORM, 1, 15, "the next part of the preamble is expected, found '0.8'"),
    ("discount: 0.9\n", "", UNIFORM, 5, 1, "discount: with its value is expected, found 'T'"),
    ("values: reward\n", "", UNIFORM, 5, 1, "values: with its value is expected, found 'T'"),
    ("states: x y z\n", "", UNIFORM, 5, 1, "states: with its value is expected, found 'T'"),
    ("actions: a b\n", "", "", 4, 18, "actions: with its value is expected, found the end"),
    ("observations: u v", "observations:", UNIFORM,
     6, 1, "observations: with its value is expected, found 'T'"),
    ("actions: a b", "actions: a b\nactions: c", UNIFORM, 5, 1, "actions: is given twice"),
    ("reward", "rewards", UNIFORM, 2, 9, "reward or cost is expected, found 'rewards'"),
    ("discount:", "diskount:", UNIFORM,
     1, 1, "a part of the preamble, or T:, O: or R:, is expected, found 'diskount'"),
    ("discount:", "discount", UNIFORM, 1, 10, "a colon is expected, found '0.9'"),
    ("x y z", "x y x", UNIFORM, 3, 13, "'x' occurs twice among the states"),
    ("a b", "a b b", UNIFORM, 4, 14, "'b' occurs twice among the actions"),
    ("x y z", "0", UNIFORM, 3, 9, "0 cannot be the number of states"),
    ("a b", "-2", UNIFORM, 4, 10, "-2 cannot be the number of actions"),
    ("u v", "2.5", UNIFORM, 5, 15, "2.5 cannot be the number of observations"),
    ("x y z", "999999999999", UNIFORM, 3, 9, "999999999999 cannot be the number of states"),
    ("x y z", "99999", UNIFORM, 3, 9, "the problem is too large to be read"),
    ("x y z", "x 2 z", UNIFORM, 3, 11, "a name for one of the states is expected, found '2'"),
    ("u v", "u *", UNIFORM, 5, 17, "a name for one of the observations is expected, found '*'"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "tail", "line", "column", "reason"), COMPLAINTS)
def test_error_says_where_and_what(old, new, tail, line, column, reason):
    assert old in HEAD
    with pytest.raises(POMDPFileError) as error:
        parse_pomdp(HEAD.replace(old, new, 1) + tail, "cut")
    assert str(error.value).startswith(f"cut, line {line}, column {column}: {reason}")
    assert isinstance(error.value, ValueError)


@pytest.mark.filterwarnings("ignore:.*no state emits")
@pytest.mark.parametrize(
    "text", [TIGER, LOAD, FORMS["rows"] + " R: a : x : y 1 2 R: b : x 1 2 3 4 5 6"]
)
def test_cut_file_is_complained_about(text):
    """A file cut behind any token is valid only if all rows are given and an entry just ended."""
    text = "\n".join(line.split("#")[0] for line in text.splitlines())
    tokens = text.replace(":", " : ").split()
    complete = max(i for i, token in enumerate(tokens) if token == "O")  # the last rows begin here
    for i in range(len(tokens) + 1):
        prefix, rest = " ".join(tokens[:i]), tokens[i:]
        if i > complete + 2 and (not rest or rest[0] == "R"):
            parse_pomdp(prefix, "cut")
        else:
            with pytest.raises(POMDPFileError, match=r"^cut, line 1, column \d+: ."):
                parse_pomdp(prefix, "cut")


@pytest.mark.filterwarnings("ignore:.*no state emits")
@pytest.mark.parametrize("seed", range(3))
def test_garbled_file_raises_nothing_else(seed):
    """Tokens dropped, doubled, swapped: a POMDPFileError or a problem, never another exception."""
    rng = np.random.default_rng(seed)
    tokens = (LOAD.split("# over")[0] + LOAD.split("lines\n")[1]).replace(":", " : ").split()
    outcomes = set()
    for _ in range(60):
        garbled = list(tokens)
        for _ in range(rng.integers(1, 4)):
            i, j = rng.integers(len(garbled), size=2)
            garbled[i : i + rng.integers(3)] = [garbled[j]] * int(rng.integers(3))
        try:
            parse_pomdp(" ".join(garbled), "garbled")
            outcomes.add("read")
        except POMDPFileError:
            outcomes.add("refused")
    assert "refused" in outcomes


def large_file(form):
    rng = np.random.default_rng(0)
    size, num_actions, num_obs, n = 212, 5, 20, 20
    text = [f"discount: 0.95 values: reward states: {size} actions: {num_actions}\n"]
    text += [f"observations: {num_obs}\nO: * uniform\n"]
    for a in range(num_actions):
        rows = np.zeros((size, size))
        for row in rows:
            row[rng.choice(size, n, replace=False)] = 1 / n
        if form == "matrix":
            text += [f"T: {a}\n", *(" ".join(f"{x:.2f}" for x in row) + "\n" for row in rows)]
        else:
            text += [f"T: {a} : {s} : {t} {rows[s, t]}\n" for s, t in np.argwhere(rows)]
    text += [f"R: * : * : {i % size} : {i % num_obs} {i}\n" for i in range(1000)]
    text += [f"R: {i % num_actions} : {i % size} : * : * {i}\n" for i in range(5000)]
    return "".join(text)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["entries", "matrix"])
def test_large_file_is_read_in_two_seconds(form):
    """Twice that is allowed to a busy machine. The annotations' checks are included."""
    text = large_file(form)
    assert len(text) > 600_000 - 100_000 * (form == "entries")
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        parse_pomdp(text, "large")
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 4


def test_large_world_given_sparsely_is_read():
    size = 3000
    head = f"discount: 1 values: cost states: {size} actions: 5 observations: 2\n"
    cycle = "".join(f"T: * : {s} : {(s + 1) % size} 1\n" for s in range(size))
    problem = parse_pomdp(head + cycle + "O: * uniform R: * : 7 : * : * 1", "cycle")
    assert problem.pomdp.successor.shape == (size, 5, 1)
    np.testing.assert_array_equal(problem.pomdp.successor[:, 3, 0], (np.arange(size) + 1) % size)
    np.testing.assert_array_equal(problem.pomdp.mean_reward()[:, 2], -1.0 * (np.arange(size) == 7))
