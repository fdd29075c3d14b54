import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg.exact.gamp import long_run
from spg.kernels.finite import finite_kernel, tables
from spg.training.controllers import edges, load, save, visits
from spg.training.graphs import draw
from spg.worlds.problems import load_unload

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(scope="module")
def problem(float64):
    return load_unload()


@pytest.fixture(scope="module")
def law_of(problem):
    solution = jax.jit(lambda kernel: long_run(kernel, problem.pomdp).stationary)
    laws = {make: np.asarray(solution(make())) for make in (optimal, sparse)}
    return laws.__getitem__


def optimal():
    """Of Load/Unload: h = 1 from loading to unloading, and right if and only if h = 1."""
    omega = jax.nn.one_hot(jnp.array([[1, 0, 0], [1, 1, 0]]), 2)  # loading, travel, unloading
    mu = jax.nn.one_hot(jnp.array([[0, 0, 0], [1, 1, 1]]), 2)
    return finite_kernel(*(jnp.where(p > 0, 0.0, -jnp.inf) for p in (omega, mu)))


def sparse():
    """Random, with two successors of each (g, o); those of I-state 0 are one and the same."""
    rng = np.random.default_rng(0)
    successors = np.array([[[2, 2]] * 3, [[0, 3]] * 3, [[1, 3], [0, 3], [2, 1]], [[2, 0]] * 3])
    cell, head = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3, 2))
    return finite_kernel(*(jnp.asarray(x) for x in (cell, head, successors)))


@jax.jit
def _tables(kernel):
    return tables(kernel, jnp.arange(3))


def tables_of(kernel):
    return [np.asarray(x) for x in _tables(kernel)]


@pytest.mark.parametrize("make", [optimal, sparse])
def test_a_saved_controller_comes_back(make, problem, law_of, tmp_path):
    kernel, path = make(), tmp_path / "controller.npz"
    kernel = type(kernel)(kernel.cell, kernel.head, kernel.normalizer, jnp.asarray(1))
    law = law_of(make)
    save(path, kernel, problem, law)
    back = load(path)
    for x, y in zip(tables_of(kernel), tables_of(back), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-12)
    assert back.z0 == 1
    assert back.z0.dtype == kernel.z0.dtype
    assert all(np.isfinite(x).all() for x in (back.cell.distribution.logits, back.head.logits))
    with np.load(path) as file:
        np.testing.assert_allclose(file["visits"], visits(problem.pomdp, law))
        assert str(file["problem"]) == "loadunload"
        assert tuple(file["actions"]) == problem.actions
        assert tuple(file["observations"]) == problem.observations


def write_other(path):
    np.savez(path, x=np.zeros(3))


def write_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def write_no_law(path):
    ones = np.ones((3, 2, 2))
    np.savez(path, omega=ones, successors=ones.astype(int), mu=ones, z0=np.zeros((), int))


def write_no_such_state(path):
    half = np.full((3, 2, 2), 0.5)
    np.savez(path, omega=half, successors=np.full(half.shape, 2), mu=half, z0=np.zeros((), int))


@pytest.mark.parametrize(
    "write",
    [
        write_other,
        write_array,
        write_no_law,
        write_no_such_state,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no controller"),
        lambda path: path.write_bytes(b"PK\x03\x04 cut off"),
    ],
)
def test_another_file_is_refused(write, tmp_path):
    path = tmp_path / "controller.npz"
    write(path)
    with pytest.raises(ValueError, match=r"^\S*controller.npz does not hold a finite-state contr"):
        load(path)


def loop_over_edges(kernel, pomdp, law):
    """{(g, h): {o: Pr(g, o, h)}} by enumerating everything."""
    omega, successors, _ = tables_of(kernel)
    found = {}
    observed, emission = (np.asarray(x) for x in pomdp.emissions())
    for s, g in np.ndindex(law.shape):
        for m, k in np.ndindex(observed.shape[1], omega.shape[2]):
            o = observed[s, m]
            p = float(law[s, g] * emission[s, m] * omega[o, g, k])
            flow = found.setdefault((g, int(successors[o, g, k])), {})
            flow[int(o)] = flow.get(int(o), 0.0) + p
    flows = {pair: {o: p for o, p in flow.items() if p > 0} for pair, flow in found.items()}
    return {pair: flow for pair, flow in flows.items() if flow}


@pytest.mark.parametrize("make", [optimal, sparse])
def test_edges_are_those_of_a_loop(make, problem, law_of):
    kernel = make()
    law = law_of(make)
    table = _tables(kernel)
    seen = visits(problem.pomdp, law)
    found = edges(table, seen)
    flows = loop_over_edges(kernel, problem.pomdp, law)
    assert {(e.source, e.target) for e in found} == set(flows)
    for e in found:
        flow = flows[e.source, e.target]
        assert dict(zip(e.obs.tolist(), e.flow, strict=True)) == pytest.approx(flow)
        assert e.probability == pytest.approx(sum(flow.values()))
        np.testing.assert_allclose(e.mu, table.mu[e.obs, e.target])
        np.testing.assert_allclose(e.omega * seen[e.obs, e.source], e.flow)
        assert (np.diff(e.flow) <= 0).all()
    assert sum(e.probability for e in found) == pytest.approx(1, abs=1e-10)
    assert (np.diff([e.probability for e in found]) <= 0).all()


def test_edges_of_the_optimal_controller(problem, law_of):
    """A tour has 8 steps: one at each end, three of travel each way."""
    kernel = optimal()
    seen = visits(problem.pomdp, law_of(optimal))
    found = edges(_tables(kernel), seen, least=1e-6)  # of the start a trace is left
    assert all(len(e.obs) == 1 for e in found)
    names = {
        (e.source, e.target): (problem.observations[e.obs[0]], problem.actions[e.mu[0].argmax()])
        for e in found
    }
    assert names == {
        (0, 0): ("travel", "left"),
        (0, 1): ("loading", "right"),
        (1, 1): ("travel", "right"),
        (1, 0): ("unloading", "left"),
    }
    expected = {(0, 0): 3 / 8, (0, 1): 1 / 8, (1, 1): 3 / 8, (1, 0): 1 / 8}
    assert {(e.source, e.target): e.probability for e in found} == pytest.approx(expected)


def test_rare_edges_and_observations_are_left_out(problem, law_of):
    table, seen = _tables(sparse()), visits(problem.pomdp, law_of(sparse))
    kept = {(e.source, e.target): e for e in edges(table, seen, least=0.2)}
    for e in edges(table, seen):
        pair = e.source, e.target
        assert (pair in kept) == (e.probability > 0.2 * seen[:, e.source].sum())
        if pair in kept:
            assert kept[pair].obs.tolist() == e.obs[e.flow > 0.2 * e.flow[0]].tolist()
            assert kept[pair].probability == e.probability


def test_small_controllers_are_drawn(problem, law_of, tmp_path):
    one = finite_kernel(jnp.zeros((1, 3, 1)), jnp.zeros((1, 3, 2)))
    laws = np.full((10, 1), 0.1), law_of(optimal), law_of(sparse)
    for i, (kernel, law) in enumerate(zip([one, optimal(), sparse()], laws, strict=True)):
        path = tmp_path / f"{i}.png"
        draw(path, kernel, problem, law, "a title")
        assert path.read_bytes().startswith(b"\x89PNG")


def test_large_controllers_are_not_drawn(problem, tmp_path):
    path = tmp_path / "controller.png"
    kernel = finite_kernel(jnp.zeros((25, 3, 25)), jnp.zeros((25, 3, 2)))
    draw(path, kernel, problem, np.full((10, 25), 1 / 250), "a title")
    assert not path.exists()
