import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from spg.distributions import Categorical, Delta, Normal, TanhNormal

pytestmark = pytest.mark.usefixtures("float64")

finite = st.floats(-3, 3)
spread = st.floats(0.05, 3)


@given(loc=finite, std=spread, x=finite)
@settings(max_examples=20, deadline=None)
def test_normal_matches_scipy(loc, std, x):
    law = Normal(jnp.array([loc, 0.0]), jnp.array([std, 1.0]))
    truth = stats.norm(loc, std).logpdf(x) + stats.norm.logpdf(0.5)
    assert np.allclose(law.log_prob(jnp.array([x, 0.5])), truth, rtol=1e-12)
    assert np.allclose(law.entropy(), stats.norm(loc, std).entropy() + stats.norm.entropy())


@given(loc=finite, std=st.floats(0.1, 1.5), u=finite)
@settings(max_examples=20, deadline=None)
def test_tanh_normal_is_the_change_of_variables(loc, std, u):
    """p(tanh u) = N(u) / (d tanh / du), with the slope from scipy's normal and 1/cosh²."""
    log_prob = TanhNormal(jnp.array([loc]), jnp.array([std])).log_prob(jnp.tanh(jnp.array([u])))
    truth = stats.norm(loc, std).logpdf(u) + 2 * np.log(np.cosh(u))
    assert np.allclose(log_prob, truth, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("loc", "std"), [(0.0, 0.3), (0.4, 0.5), (-1.0, 0.8), (0.0, 1.0)])
def test_tanh_normal_is_normalised_and_its_entropy_is_the_integral(loc, std):
    law = TanhNormal(jnp.array([loc]), jnp.array([std]))
    log_p = jax.jit(jax.vmap(lambda x: law.log_prob(x[None])))
    x = np.tanh(np.linspace(-9, 9, 40001))  # dense towards the edges
    p = np.exp(log_p(jnp.asarray(x)))
    assert np.allclose(integrate.trapezoid(p, x), 1, atol=1e-6)
    assert np.allclose(law.entropy(), -integrate.trapezoid(p * log_p(x), x), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("x", [-1.0, 1.0, 0.99999994])
def test_tanh_normal_is_finite_on_its_edges(x, dtype):
    law = lambda loc: TanhNormal(loc, jnp.ones(1, dtype))
    value, score = jax.value_and_grad(lambda loc: law(loc).log_prob(jnp.full(1, x, dtype)))(
        jnp.zeros(1, dtype)
    )
    assert np.isfinite(value)
    assert np.isfinite(score).all()
    assert np.sign(score[0]) == np.sign(x)


@given(logits=st.lists(finite, min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_categorical_matches_scipy(logits):
    law = Categorical(jnp.asarray(logits))
    p = np.exp(logits) / np.exp(logits).sum()
    log_prob = jax.vmap(law.log_prob)(jnp.arange(len(p)))
    assert np.allclose(log_prob, np.log(p), rtol=1e-12, atol=1e-12)
    assert np.allclose(law.entropy(), stats.entropy(p), atol=1e-12)
    assert p[law.mode()] == p.max()


def test_categorical_entropy_ignores_what_cannot_happen():
    law = lambda logits: Categorical(jnp.append(logits, -jnp.inf))
    entropy, slope = jax.value_and_grad(lambda x: law(x).entropy())(jnp.zeros(2))
    assert np.allclose(entropy, np.log(2))
    assert np.allclose(slope, 0)


LAWS = {
    "normal": lambda: Normal(jnp.array([1.0, -0.5]), jnp.array([0.2, 2.0])),
    "tanh_normal": lambda: TanhNormal(jnp.array([1.0, -0.5]), jnp.array([0.2, 0.7])),
    "categorical": lambda: Categorical(jnp.array([0.3, -1.0, 1.2])),
}


@pytest.mark.parametrize("name", LAWS)
def test_samples_follow_log_prob(name):
    """Moments of 40,000 samples against integrals of exp(log_prob), within four errors."""
    law = LAWS[name]()
    samples = np.asarray(jax.vmap(lambda key: law.sample(key=key))(jr.split(jr.key(0), 40_000)))
    if name == "categorical":
        values = np.eye(3)[samples]
        truth = np.exp(jax.vmap(law.log_prob)(jnp.arange(3)))
    else:
        values = np.concatenate([samples, samples**2], 1)
        grid = (
            np.linspace(-12, 12, 20001) if name == "normal" else np.tanh(np.linspace(-8, 8, 20001))
        )
        truth = np.array([moment(law, i, grid, power) for power in (1, 2) for i in (0, 1)])
    error = values.std(0) / len(values) ** 0.5
    assert (np.abs(values.mean(0) - truth) < 4 * error).all()


def moment(law, i, grid, power):
    """E x_i^power of one component by quadrature; the law is a product over components."""
    component = type(law)(law.loc[i : i + 1], law.std[i : i + 1])
    p = np.exp(jax.vmap(lambda x: component.log_prob(x[None]))(jnp.asarray(grid)))
    return integrate.trapezoid(p * grid**power, grid)


def test_a_computed_value_is_certain():
    loc, other = jnp.array([1.0, 2.0]), jnp.array([5.0, 6.0])
    law = Delta(loc)
    assert np.array_equal(law.sample(key=jr.key(0)), loc)
    assert np.array_equal(law.mode(), loc)
    assert law.log_prob(other) == law.entropy() == 0


@pytest.mark.parametrize("name", LAWS)
def test_the_score_has_mean_zero(name):
    law = LAWS[name]()

    def score(key):
        x = law.sample(key=key)
        return jax.grad(lambda law: law.log_prob(jax.lax.stop_gradient(x)))(law)

    scores = jax.vmap(score)(jr.split(jr.key(2), 20_000))
    for s in map(np.asarray, jax.tree.leaves(scores)):
        assert (np.abs(s.mean(0)) < 4 * s.std(0) / len(s) ** 0.5 + 1e-12).all()
