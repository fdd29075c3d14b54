import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_pomdp

from spg.filters.belief import exact_filter, forward_filter, leaky_filter, log_forward_filter
from spg.worlds.hmm import HMM, deterministic_part, hmm
from spg.worlds.models import sparse

pytestmark = pytest.mark.usefixtures("float64")


def model(**changes):
    """Three states on a cycle."""
    transition = np.roll(np.eye(3), 1, 0)[None]
    emission = np.array([[0.5, 0.25, 0.25], [0.5, 0.75, 0.75]])
    return HMM(transition, emission, np.array([0.5, 0.5, 0.0]))._replace(**changes)


def test_columns_are_the_laws_of_the_world():
    import jax.random as jr

    pomdp = make_pomdp(jr.key(0), num_states=3, num_obs=4)
    for form in (pomdp, sparse(pomdp)):
        transition, emission, start = hmm(form)
        for s, a, t in np.ndindex(3, 2, 3):
            assert transition[a, t, s] == pytest.approx(pomdp.transition[s, a, t])
        assert jnp.allclose(emission, pomdp.observation.T)
        assert jnp.allclose(start, pomdp.start)


def test_deterministic_part_is_the_permutation_of_the_recurrent_states():
    """0 → 1 → 2 → 0 is a cycle, 3 leads into it and 4 to 3: these two are made to stay."""
    target = np.array([1, 2, 0, 0, 3])
    transition = 0.9 * np.eye(5)[target].T + 0.1 / 5
    noisy = HMM(transition[None], np.full((2, 5), 0.5), np.full(5, 0.2))
    part = deterministic_part(noisy).transition[0]
    assert (part == np.eye(5)[[1, 2, 0, 3, 4]].T).all()
    exact_filter(deterministic_part(noisy))  # takes it


def test_columns_without_a_likeliest_successor_are_told():
    with pytest.raises(ValueError, match=r"T\(0\) is not nearly .* column 0 has probability 0.5"):
        deterministic_part(model(transition=np.full((1, 3, 3), [[0.5], [0.5], [0.0]])))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emission": np.array([[0, 0, 0], [1, 1, 1]])}, "emissions of observation 0 are all zero"),
        ({"emission": np.ones((2, 3))}, "column 0 of E is no distribution, it sums to 2"),
        ({"emission": np.array([[1.5, 1, 1], [-0.5, 0, 0]])}, "column 0 of E is no distribution"),
        (
            {"start": np.array([1.0, np.nan, 0.0])},
            "column 0 of start is no distribution, it sums to nan",
        ),
        (
            {"transition": np.eye(3)[None] * [1, 0.5, 1]},
            r"column 1 of T\(0\) is no distribution, .* 0.5",
        ),
        ({"start": np.full(4, 0.25)}, r"different S: \[\(1, 3, 3\), \(2, 3\), \(4,\)\]"),
        ({"transition": np.eye(3)}, "of different S"),
    ],
)
def test_what_is_no_model_is_refused_by_every_filter(changes, message):
    leaky = lambda model: leaky_filter(model, decay=0.1)
    for make in (forward_filter, log_forward_filter, exact_filter, leaky):
        with pytest.raises(ValueError, match=message):
            make(model(**changes))
