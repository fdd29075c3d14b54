import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg.exact import conjugate
from spg.exact.conjugate import Settings

pytestmark = pytest.mark.usefixtures("float64")

SIZE = 4
_a = np.random.default_rng(0).normal(size=(SIZE, SIZE))
CURVATURE = _a @ _a.T + 0.5 * np.eye(SIZE)
PEAK = np.arange(1.0, SIZE + 1)


def quadratic(x):
    return -0.5 * (x - PEAK) @ CURVATURE @ (x - PEAK)


def hilly(x):
    """Not concave, so that restarts and both directions of the line search occur."""
    return jnp.sum(jnp.sin(x)) - 0.05 * jnp.sum((x - 2) ** 2) + 0.3 * jnp.cos(x[0] * x[1])


@jax.jit
def pair_ascent(start):
    """The parameters after each of 60 turns on a pytree of two leaves."""
    value = lambda tree: quadratic(jnp.append(tree["a"], tree["b"]))
    return _turns(value, {"a": start[:1], "b": start[1:]}, Settings(), 60)


def _turns(value, params, settings, count):
    def turn(state, _):
        trial = conjugate.ask(state, settings)
        state = conjugate.tell(state, settings, *jax.value_and_grad(value)(trial))
        return state, state

    return lax.scan(turn, conjugate.init(params), length=count)[1]


def reference(value, x, *, first_step, eps, max_searches):
    """CONJPOMDP with GSEARCH as Baxter, Bartlett & Weaver (2001) write them: loops, no state."""
    grad = jax.jit(jax.grad(value))

    def search(x, h):
        s = first_step
        p = grad(x + s * h) @ h
        if p < 0:
            while True:
                s_plus, p_plus = s, p
                s = s / 2
                p = grad(x + s * h) @ h
                if p > -eps:
                    break
            s_minus, p_minus = s, p
        else:
            while True:
                s_minus, p_minus = s, p
                s = 2 * s
                p = grad(x + s * h) @ h
                if p < eps:
                    break
            s_plus, p_plus = s, p
        if p_minus > 0 and p_plus < 0:
            return x + (s_minus - p_minus * (s_plus - s_minus) / (p_plus - p_minus)) * h
        return x + (s_minus + s_plus) / 2 * h

    g = h = grad(x)
    path = [x]
    while g @ g >= eps and len(path) <= max_searches:
        x = search(x, h)
        new = grad(x)
        h = new + ((new - g) @ new / (g @ g)) * h
        h = new if h @ new < 0 else h
        g = new
        path.append(x)
    return jnp.stack(path)


@pytest.mark.parametrize("first_step", [0.1, 4.0])
@pytest.mark.parametrize("value", [quadratic, hilly])
def test_ascent_is_the_algorithm_of_the_paper(value, first_step):
    start = jnp.array([0.3, -0.5, 2.5, 0.7])
    eps = 1e-10
    truth = reference(value, start, first_step=first_step, eps=eps, max_searches=8)
    settings = Settings(first_step, tolerance=eps, stop=eps, bound=1e9, safeguard=False)
    states = jax.jit(lambda x: _turns(value, x, settings, 150))(start)
    arrived = np.flatnonzero(np.diff(states.searches, prepend=-1))
    path = states.params[arrived][: len(truth)]
    assert len(truth) > 4
    np.testing.assert_allclose(path, truth, rtol=1e-7, atol=1e-9)


def test_ascent_finds_the_peak_of_a_quadratic_and_then_rests():
    states = pair_ascent(jnp.zeros(SIZE))
    found = jnp.append(states.params["a"][-1], states.params["b"][-1])
    np.testing.assert_allclose(found, PEAK, rtol=1e-9)
    assert states.converged[-1]
    rest = int(np.argmax(states.converged))
    assert (states.searches[rest:] == states.searches[rest]).all()
    assert (np.diff(states.value[: rest + 1][1:]) >= -1e-12).all()


def test_ascents_are_vmapped():
    starts = jr.normal(jr.key(0), (3, SIZE))
    together = jax.vmap(pair_ascent)(starts)
    for i in range(3):
        np.testing.assert_allclose(together.value[i], pair_ascent(starts[i]).value, atol=1e-12)


def test_parameters_stay_in_bounds():
    states = jax.jit(lambda x: _turns(quadratic, x, Settings(bound=2.0), 60))(jnp.zeros(SIZE))
    assert jnp.abs(states.params).max() <= 2
    at_bound = jnp.abs(states.params[-1]) == 2
    assert at_bound.any()


def saturating(x):
    """Rises to 1, falls over an edge to 0, and is flat from there: a line search runs over."""
    return jnp.tanh(x[0]) * jax.nn.sigmoid(200 * (3 - x[0]))


@pytest.mark.parametrize("safeguard", [False, True])
def test_safeguard_keeps_what_was_reached(safeguard):
    settings = Settings(first_step=8.0, safeguard=safeguard)
    states = jax.jit(lambda x: _turns(saturating, x, settings, 40))(jnp.array([0.5]))
    assert (states.value[-1] > 0.9) == safeguard
    if safeguard:
        assert (np.diff(states.value) >= -1e-12).all()


def test_a_flat_start_has_converged():
    states = jax.jit(lambda x: _turns(lambda x: 0.0 * x.sum(), x, Settings(), 3))(jnp.ones(2))
    assert states.converged.all()
    np.testing.assert_array_equal(states.params, np.ones((3, 2)))
