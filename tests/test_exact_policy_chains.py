import jax.numpy as jnp
import numpy as np
import pytest

from spg.exact import policy_chains
from spg.worlds.models import dense, sparse_pomdp

pytestmark = pytest.mark.usefixtures("float64")


def make_world(rng, num_states, num_actions):
    """Some rows with `WIDTH` successors and more, some with one; all go to state 3 at times."""
    occurs = rng.random((num_states, num_actions, num_states)) < rng.random((num_states, 1, 1))
    occurs[..., 3] = True
    occurs[..., 5] = False
    s, a, t = np.nonzero(occurs)
    p = rng.random(len(s))
    total = np.zeros((num_states, num_actions))
    np.add.at(total, (s, a), p)
    state = np.arange(num_states)
    return sparse_pomdp(
        (s, a, t, p / total[s, a], p), (state, state, np.ones(num_states)), state == 0,
        num_actions=num_actions, num_obs=num_states,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_states", "num_actions", "block"), [(40, 3, 1024), (40, 3, 16), (6, 1, 1024)]
)
def test_products_are_those_of_the_matrix_of_each_policy(
    num_states, num_actions, block, monkeypatch
):
    """Of lists that fill one block or several, of states with many predecessors and with none."""
    monkeypatch.setattr(policy_chains, "BLOCK", block)
    rng = np.random.default_rng(0)
    pomdp = make_world(rng, num_states, num_actions)
    action = rng.integers(num_actions, size=(num_states, 5))
    x = jnp.asarray(rng.normal(size=(num_states, 5)))
    transition = np.asarray(dense(pomdp).transition)
    expect, push = policy_chains.products(pomdp, jnp.asarray(action))
    for n in range(5):
        chain = transition[np.arange(num_states), action[:, n]]
        assert np.allclose(expect(x)[:, n], chain @ x[:, n], rtol=1e-12, atol=1e-14)
        assert np.allclose(push(x)[:, n], x[:, n] @ chain, rtol=1e-12, atol=1e-14)
