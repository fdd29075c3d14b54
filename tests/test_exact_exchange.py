import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import make_finite_kernel, make_pomdp

from spg.exact import enumeration, exchange
from spg.exact.exchange import Rows, average_reward, kernel_of, neighbours, rows_of
from spg.worlds import dense, load_unload, random_pomdp

pytestmark = pytest.mark.usefixtures("float64")


def world():
    return dense(random_pomdp(5, num_actions=2, num_obs=2, seed=3).pomdp)


def deterministic(num_z, num_actions, num_obs):
    """All deterministic controllers, as tables with a leading axis."""
    rows = num_obs * num_z
    index = np.indices((num_z,) * rows + (num_actions,) * rows).reshape(2, rows, -1)
    table = lambda x, size: jnp.asarray(np.eye(size)[x.T.reshape(-1, num_obs, num_z)])
    return Rows(table(index[0], num_z), table(index[1], num_actions))


@eqx.filter_jit
def eta_of(kernel, pomdp):
    d = enumeration.stationary_distribution(kernel, pomdp)
    policy = enumeration.joint_policy(kernel, pomdp)
    return jnp.einsum("sg,sgha,sa->", d, policy, pomdp.reward)


def changed(rows, table, o, row, i, mix):
    """The tables after one exchange, by hand."""
    new = [np.array(x) for x in rows]
    new[table][o, row] = (1 - mix) * new[table][o, row] + mix * np.eye(new[table].shape[2])[i]
    return Rows(*map(jnp.asarray, new))


@pytest.mark.parametrize("mix", [1.0, 0.3])
def test_the_gain_of_every_exchange_is_that_of_the_controller_after_it(mix):
    pomdp, kernel = make_pomdp(jr.key(0)), make_finite_kernel(jr.key(1))
    rows = rows_of(kernel, pomdp)
    found = neighbours(rows, pomdp, mix=mix)
    eta = eta_of(kernel, pomdp)
    assert np.allclose(found.average_reward, eta, rtol=1e-6)
    for table, gains in enumerate(found.gain):
        for o, row, i in np.ndindex(gains.shape):
            after = kernel_of(changed(rows, table, o, row, i, mix))
            truth = eta_of(after, pomdp) - eta
            assert np.isclose(gains[o, row, i], truth, atol=1e-6)
    assert np.abs(found.gain.omega).max() > 1e-3
    assert np.abs(found.gain.mu).max() > 1e-2


def test_the_steepest_exchanges_are_those_of_a_small_share():
    pomdp = make_pomdp(jr.key(0))
    rows = rows_of(make_finite_kernel(jr.key(1)), pomdp)
    some, every = neighbours(rows, pomdp, most=2).gain, neighbours(rows, pomdp).gain
    slope = neighbours(rows, pomdp, mix=1e-5).gain
    for o in range(pomdp.num_obs):
        flat = lambda rows, o=o: np.concatenate([np.ravel(x[o]) for x in rows])
        seen = np.isfinite(flat(some))
        assert seen.sum() == 2
        assert np.allclose(flat(some)[seen], flat(every)[seen], rtol=1e-9, atol=1e-12)
        assert flat(slope)[seen].min() >= flat(slope)[~seen].max()


def test_exchanges_find_the_best_of_all_deterministic_controllers():
    """Of Load/Unload with two I-states, all 4096 of them."""
    pomdp = dense(load_unload().pomdp)
    every = deterministic(2, 2, 3)
    values = jax.lax.map(lambda rows: average_reward(rows, pomdp), every, batch_size=256)
    assert len(values) == 4096
    rng, ends = np.random.default_rng(0), []
    for i in rng.integers(0, 4096, 12):
        rows, value = exchange.exchange(jax.tree.map(lambda x, i=i: x[i], every), pomdp)
        assert value >= values[i] - 1e-9
        assert np.isclose(value, eta_of(kernel_of(rows), pomdp), atol=1e-5)
        ends.append(value)
    assert np.isclose(max(ends), values.max(), atol=1e-9)
    assert np.isclose(values.max(), 1 / 4, atol=1e-5)


def test_no_exchange_is_left_that_gains():
    pomdp = world()
    rows = rows_of(make_finite_kernel(jr.key(1)), pomdp)
    start = average_reward(rows, pomdp)
    ended, value = exchange.exchange(rows, pomdp, mixes=(1.0, 0.3, 0.1), tol=1e-6)
    assert value > start
    for mix in (1.0, 0.3, 0.1):
        assert max(float(x.max()) for x in neighbours(ended, pomdp, mix=mix).gain) <= 1e-6
    assert np.allclose(ended.omega.sum(-1), 1)
    assert np.allclose(ended.mu.sum(-1), 1)


def test_a_controller_that_starts_elsewhere_is_refused():
    kernel = eqx.tree_at(lambda k: k.z0, make_finite_kernel(jr.key(1)), jnp.ones((), int))
    with pytest.raises(ValueError, match="starts in I-state 1"):
        rows_of(kernel, make_pomdp(jr.key(0)))
