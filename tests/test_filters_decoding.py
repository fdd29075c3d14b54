import numpy as np
import pytest
from scipy.integrate import quad

from spg.filters.decoding import constants
from spg.worlds.hmm import HMM, hmm
from spg.worlds.markov import random_hmm, swap_hmm


@pytest.mark.parametrize("epsilon", [0.0, 0.01])
def test_constants_of_two_swapping_states(epsilon):
    xi, wide_xi, kl, least_a = constants(hmm(swap_hmm(epsilon).pomdp))
    assert xi == pytest.approx(0.7206014, abs=1e-6)
    assert wide_xi == pytest.approx(0.9691021, abs=1e-6)
    assert kl == pytest.approx(0.8 * np.log(9), abs=1e-6)  # 1.7577797
    assert least_a == pytest.approx(2.17816, abs=1e-5)


def test_with_actions_one_step_decides():
    controlled = constants(hmm(swap_hmm(0.01, controlled=True).pomdp))
    assert controlled.xi == controlled.wide_xi == pytest.approx(0.9691021, abs=1e-6)


def test_exponent_is_the_least_of_all_pairs_and_skips_transient_states():
    """States 0 and 1 swap, 2 stays; 3 leads to 2. The period is 2."""
    target = np.array([1, 0, 2, 2])
    transition = (0.9 * np.eye(4)[target].T + 0.1 / 4)[None]
    rng = np.random.default_rng(0)
    emission = rng.dirichlet(np.ones(3), 4).T
    emission[:, 3] = emission[:, 2]  # no other state emits like 3 where it matters
    found = constants(HMM(transition, emission, np.full(4, 0.25)))

    def exponent(i, j):
        total = 0.0
        for _ in range(2):
            p, q = emission[:, i], emission[:, j]
            integrand = lambda t, p=p, q=q: np.log(p @ (p / q) ** t) / t
            total -= quad(integrand, 0, -0.5)[0] / 2
            i, j = target[i], target[j]
        return total

    expected = min(exponent(i, j) for i in range(3) for j in range(3) if i != j)
    assert found.xi == pytest.approx(expected, abs=1e-6)


def test_assumptions_are_checked():
    model = hmm(random_hmm(3).pomdp)
    alike = np.full((2, 3), 0.5)
    with pytest.raises(ValueError, match="states 0 and 1 always emit alike"):
        constants(model._replace(emission=alike))
    alike[:, 1] = 0, 1
    with pytest.raises(ValueError, match="emission 0 of state 1 is zero"):
        constants(model._replace(emission=alike))
