import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from spg.distributions import (
    Categorical,
    Delta,
    Normal,
    TanhNormal,
    log_from_std,
    std_from_log,
)
from spg.kernels.heads import NormalHead

pytestmark = pytest.mark.usefixtures("float64")

log_prob = jax.jit(lambda law, x: law.log_prob(x))
entropy = jax.jit(lambda law: law.entropy())
value_and_score = jax.jit(jax.value_and_grad(log_prob))
sample = jax.jit(lambda law, key: law.sample(key=key))
sample_and_log_prob = jax.jit(lambda law, key: law.sample_and_log_prob(key=key))
finite = st.floats(-3, 3)
spread = st.floats(0.05, 3)


@given(loc=finite, std=spread, x=finite)
@settings(max_examples=20, deadline=None)
def test_normal_matches_scipy(loc, std, x):
    law = Normal(jnp.array([loc, 0.0]), jnp.array([std, 1.0]))
    truth = stats.norm(loc, std).logpdf(x) + stats.norm.logpdf(0.5)
    assert np.allclose(log_prob(law, jnp.array([x, 0.5])), truth, rtol=1e-12)
    assert np.allclose(entropy(law), stats.norm(loc, std).entropy() + stats.norm.entropy())


@given(loc=finite, std=st.floats(0.1, 1.5), u=finite)
@settings(max_examples=20, deadline=None)
def test_tanh_normal_is_the_change_of_variables(loc, std, u):
    """p(tanh u) = N(u) / (d tanh / du), with the slope from scipy's normal and 1/cosh²."""
    law = TanhNormal(jnp.array([loc]), jnp.array([std]))
    truth = stats.norm(loc, std).logpdf(u) + 2 * np.log(np.cosh(u))
    assert np.allclose(log_prob(law, jnp.array([np.tanh(u)])), truth, rtol=1e-8, atol=1e-8)


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
    law = TanhNormal(jnp.zeros(1, dtype), jnp.ones(1, dtype))
    value, score = value_and_score(law, jnp.full(1, x, dtype))
    score = score.loc
    assert np.isfinite(value)
    assert np.isfinite(score).all()
    assert np.sign(score[0]) == np.sign(x)


@given(
    logits=st.sampled_from([1, 2, 5]).flatmap(lambda n: st.lists(finite, min_size=n, max_size=n))
)
@settings(max_examples=20, deadline=None)
def test_categorical_matches_scipy(logits):
    law = Categorical(jnp.asarray(logits))
    p = np.exp(logits) / np.exp(logits).sum()
    for i, q in enumerate(p):
        assert np.allclose(log_prob(law, jnp.array(i)), np.log(q), rtol=1e-12, atol=1e-12)
    assert np.allclose(entropy(law), stats.entropy(p), atol=1e-12)
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
OTHERS = {
    "delta": lambda: Delta(jnp.array([1.0, 2.0])),
    "complex": lambda: Normal(jnp.array([1.0 + 2j, -0.5j]), jnp.array([0.2, 2.0])),
    "support": lambda: Categorical(jnp.array([0.3, -1.0, 1.2]), jnp.array([4, 1, 7])),
}


@pytest.mark.parametrize("name", LAWS)
def test_samples_follow_log_prob(name):
    """Moments of 40,000 samples against integrals of exp(log_prob), within four errors."""
    law = LAWS[name]()
    keys = jr.split(jr.key(0), 40_000)
    samples = np.asarray(jax.jit(jax.vmap(sample, (None, 0)))(law, keys))
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


log_prob_of_each = jax.jit(jax.vmap(log_prob, (None, 0)))


def moment(law, i, grid, power):
    """E x_i^power of one component by quadrature; the law is a product over components."""
    component = type(law)(law.loc[i : i + 1], law.std[i : i + 1])
    p = np.exp(log_prob_of_each(component, jnp.asarray(grid)[:, None]))
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

    def score(law, key):
        x = law.sample(key=key)
        return jax.grad(lambda law: law.log_prob(jax.lax.stop_gradient(x)))(law)

    scores = jax.jit(jax.vmap(score, (None, 0)))(law, jr.split(jr.key(2), 20_000))
    for s in map(np.asarray, jax.tree.leaves(scores)):
        assert (np.abs(s.mean(0)) < 4 * s.std(0) / len(s) ** 0.5 + 1e-12).all()


@pytest.mark.parametrize("name", [*LAWS, *OTHERS])
def test_sample_and_log_prob_is_the_sample_of_the_key_and_its_log_prob(name):
    law = (LAWS | OTHERS)[name]()
    for key in jr.split(jr.key(3), 3):
        x, density = sample_and_log_prob(law, key)
        assert np.array_equal(x, sample(law, key))
        assert np.allclose(density, log_prob(law, x), rtol=1e-9)


@pytest.mark.parametrize("name", ["normal", "tanh_normal", "complex"])
def test_sample_and_log_prob_is_reparameterised(name):
    """For the same key: derivatives in loc and std against central differences."""
    law, key, step = (LAWS | OTHERS)[name](), jr.key(4), 1e-6

    @jax.jit
    def draw(shift):
        moved = type(law)(law.loc + shift[0], law.std + shift[1])
        x, density = moved.sample_and_log_prob(key=key)
        return jnp.append(jnp.concatenate([x.real, x.imag]), density)

    zero = jnp.zeros((2, 2))
    jacobian = jax.jit(jax.jacobian(draw))(zero)
    assert np.any(jacobian[:2, 0])
    for i in np.ndindex(2, 2):
        there, back = (draw(zero.at[i].set(s)) for s in (step, -step))
        assert np.allclose(jacobian[:, *i], (there - back) / (2 * step), rtol=1e-6, atol=1e-8)


def test_a_complex_normal_is_two_real_ones():
    law = OTHERS["complex"]()
    parts = [Normal(part, law.std) for part in (law.loc.real, law.loc.imag)]
    x = jnp.array([1.1 + 1.5j, 2.0 - 3j])
    truth = log_prob(parts[0], x.real) + log_prob(parts[1], x.imag)
    assert np.allclose(log_prob(law, x), truth, rtol=1e-12)
    assert np.allclose(entropy(law), sum(map(entropy, parts)), rtol=1e-12)
    keys = jr.split(jr.key(5), 40_000)
    noise = np.asarray(jax.jit(jax.vmap(sample, (None, 0)))(law, keys)) - np.asarray(law.loc)
    noise = np.concatenate([noise.real, noise.imag], 1) / np.tile(law.std, 2)
    error = 4 / len(noise) ** 0.5
    assert np.abs(noise.mean(0)).max() < error
    assert np.abs(noise.T @ noise / len(noise) - np.eye(4)).max() < 2 * error


# --- single precision at the edge of tanh


def single(x):
    return jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("loc", [0.0, 7.0, 9.0, 12.0, -30.0])
def test_tanh_normal_takes_log_prob_from_the_u_that_it_sampled(loc):
    """Against float64 at the u of the same key, which tanh rounds to 1 from 9 on."""
    loc, std = single([loc]), single([1.5])
    for key in jr.split(jr.key(6), 5):
        x, density = sample_and_log_prob(TanhNormal(loc, std), key)
        u = np.float64(sample(Normal(loc, std), key))
        log_slope = 2 * (np.log(2) - np.abs(u) - np.log1p(np.exp(-2 * np.abs(u))))
        truth = stats.norm(np.float64(loc), 1.5).logpdf(u) - log_slope
        assert np.allclose(x, np.tanh(u), rtol=0, atol=2**-23)
        assert np.allclose(density, truth, rtol=1e-5, atol=1e-5)


def edge_truth(x, loc, std):
    """log p and score of a float32 x in float64; of ±1 the mean density of what rounds to it."""
    law = stats.norm(loc, std)
    if abs(x) < 1:
        u = np.arctanh(np.float64(x))
        return law.logpdf(u) + 2 * np.log(np.cosh(u)), (u - loc) / std**2
    edge = np.sign(x) * np.arctanh(1 - 2.0**-25)
    tail = law.logsf(edge) if x > 0 else law.logcdf(edge)
    return tail + 25 * np.log(2), np.sign(x) * np.exp(law.logpdf(edge) - tail)


@pytest.mark.parametrize("below", [0, 1, 2, 100])  # how many floats below 1
@pytest.mark.parametrize("sign", [-1, 1])
def test_tanh_normal_scores_what_a_float_tells(below, sign):
    x = single(sign * (1 - below * 2.0**-24))
    for loc, std in [(0, 1), (8, 1), (12, 1), (12, 0.3), (-5, 2)]:
        value, slope = value_and_score(TanhNormal(single([loc]), single([std])), x[None])
        truth = edge_truth(np.float64(x), loc, std)
        assert np.allclose((value, slope.loc[0]), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loc", [6.0, 9.0, 12.0])
def test_the_score_of_recorded_edges_has_mean_zero(loc):
    """Of numbers rounded to float32: E u is 0.1 off at most where few floats are left."""
    rng = np.random.default_rng(0)
    x = single(np.tanh(loc + rng.normal(size=20_000)))
    score = jax.grad(lambda loc, x: TanhNormal(loc, jnp.ones(1, jnp.float32)).log_prob(x[None]))
    scores = jax.jit(jax.vmap(score, (None, 0)))(single([loc]), x)
    assert abs(float(scores.mean())) < 0.05


# --- standard deviations


def test_std_from_log_is_bounded_and_its_gradient_lives():
    log_std = jnp.array([-1e30, -25.0, -20.0, -1.0, 2.0, 5.0, 1e30])
    std, slope = jax.jit(jax.vmap(jax.value_and_grad(std_from_log)))(log_std)
    truth = np.exp([-20, -20, -20, -1, 2, 2, 2])
    assert np.allclose(std, truth, rtol=1e-12)
    assert np.allclose(slope, truth, rtol=1e-12)


@pytest.mark.parametrize("log_std", [-22.0, 4.0])
def test_a_step_out_of_range_comes_back(log_std):
    """Ascent of the likelihood of data of standard deviation 1/2."""
    x = 0.5 * jr.normal(jr.key(0), (200, 1))
    likelihood = lambda l: jax.vmap(Normal(jnp.zeros(1), std_from_log(l)).log_prob)(x).mean()
    step = jax.jit(lambda l: l + 0.1 * jnp.sign(jax.grad(likelihood)(l)))
    log_std = jnp.array([log_std])
    for _ in range(300):
        log_std = step(log_std)
    assert abs(log_std[0] - np.log(0.5)) < 0.2


@pytest.mark.parametrize("std", [0.0, -1.0, 8.0, float("nan"), float("inf")])
def test_a_std_out_of_range_is_refused(std):
    with pytest.raises(ValueError, match=r"it has to be from 2.1e-09 to 7.4"):
        NormalHead([2, 1], std=std, key=jr.key(0))
    with pytest.raises(ValueError, match="state_std is"):
        log_from_std(std, "state_std")


def test_a_traced_std_is_taken_as_it_is():
    head = eqx.filter_vmap(lambda std: NormalHead([2, 1], std=std, key=jr.key(0)))
    assert np.allclose(head(jnp.array([0.1, 9.0])).log_std[:, 0], np.log([0.1, 9.0]))
