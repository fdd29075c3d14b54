"""The linear filters against the belief, by the forward filter and by slow loops of matrices."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spg.filters.belief import exact_filter, forward_filter, leaky_filter, log_forward_filter
from spg.worlds.hmm import HMM, deterministic_part, hmm
from spg.worlds.markov import random_hmm

pytestmark = pytest.mark.usefixtures("float64")

SWAP = HMM(np.array([[[0.0, 1], [1, 0]]]), np.array([[0.9, 0.1], [0.1, 0.9]]), np.full(2, 0.5))


def permutations(contrast=0.02, epsilon=0.0, seed=0):
    """Six states, three actions; with a low contrast beliefs stay inside the simplex for long."""
    return hmm(random_hmm(6, num_actions=3, epsilon=epsilon, contrast=contrast, seed=seed).pomdp)


def sequence(num_steps, reset=0.0, seed=0):
    """Observations and actions of six states and three actions, and where episodes open."""
    rng = np.random.default_rng(seed)
    obs, action = rng.integers(0, 4, num_steps), rng.integers(0, 3, num_steps)
    return jnp.asarray(obs), jnp.asarray(action), jnp.asarray(rng.random(num_steps) < reset)


@eqx.filter_jit
def unroll(rule, obs, action, first, z=None):
    return rule.unroll(rule.init if z is None else z, obs, action, first)


@eqx.filter_jit
def loop(rule, obs, action, first, z=None):
    """The step form, by a scan of ours."""
    step = lambda z, x: (rule(z, *x),) * 2
    return jax.lax.scan(step, rule.init if z is None else z, (obs, action, first))[1]


def zero_emissions():
    """Three states on two cycles; observation o is impossible in state o."""
    emission = np.array([[0, 0.5, 0.3], [0.6, 0, 0.7], [0.4, 0.5, 0]])
    transition = np.eye(3)[[[1, 2, 0], [0, 2, 1]]].transpose(0, 2, 1)
    return HMM(transition, emission, np.array([0.6, 0.0, 0.4]))


def possible_sequence(model, num_steps, reset, seed=0):
    """Drawn from the model, under uniform actions."""
    model = HMM(*map(np.asarray, model))
    rng = np.random.default_rng(seed)
    num_actions, size, _ = model.transition.shape
    action = rng.integers(0, num_actions, num_steps)
    first = rng.random(num_steps) < reset
    first[0] = True
    obs, s = np.zeros(num_steps, int), 0
    for t in range(num_steps):
        law = model.start if first[t] else model.transition[action[t]][:, s]
        s = rng.choice(size, p=law)
        obs[t] = rng.choice(len(model.emission), p=model.emission[:, s])
    return jnp.asarray(obs), jnp.asarray(action), jnp.asarray(first)


@pytest.mark.parametrize(
    ("contrast", "reset", "seed"),
    [(0.02, 0.0, 0), (0.02, 0.001, 1), (0.02, 0.0, 2), (1.0, 0.01, 3)],
)
def test_log_domain_filter_is_the_belief_over_ten_thousand_steps(contrast, reset, seed):
    """In double precision to 1e-10, and in single precision to 1e-3."""
    model, steps = permutations(contrast, seed=seed), sequence(10_000, reset, seed)
    belief = unroll(forward_filter(model), *steps)
    if contrast < 1:
        assert (belief.max(1) < 0.95).mean() > 0.5  # it is not a comparison of ones with ones
    logits = unroll(exact_filter(model), *steps)
    np.testing.assert_allclose(jax.nn.softmax(logits), belief, rtol=0, atol=1e-10)
    assert (logits.max(1) == 0).all()
    with jax.enable_x64(False):
        single = [jnp.asarray(x) for x in map(np.asarray, steps)]
        rule = exact_filter(model)
        for form in (unroll, loop):
            logits = form(rule, *single)
            assert logits.dtype == jnp.float32
            np.testing.assert_allclose(jax.nn.softmax(logits), belief, rtol=0, atol=1e-3)


def test_log_forward_filter_is_the_belief_of_any_transitions():
    for model in (permutations(), permutations(1.0, epsilon=0.3)):
        steps = sequence(500, 0.02)
        logits = unroll(log_forward_filter(model), *steps)
        belief = unroll(forward_filter(model), *steps)
        np.testing.assert_allclose(jax.nn.softmax(logits), belief, rtol=0, atol=1e-12)


def test_log_domain_filter_is_not_the_belief_of_stochastic_transitions():
    """With the permutations of a model that jumps now and then."""
    steps = sequence(500, 0.02)
    belief = unroll(forward_filter(permutations(1.0, epsilon=0.1)), *steps)
    logits = unroll(exact_filter(permutations(1.0)), *steps)
    assert jnp.abs(jax.nn.softmax(logits) - belief).max() > 0.1


@pytest.mark.parametrize(
    ("make", "gaps"),
    [
        (exact_filter, np.log(9) * np.array([1, -2, 3, -2, 1])),
        (
            lambda model: leaky_filter(model, decay=0.1),
            [0.2197225, -0.4174727, 0.5954479, -0.3161806, 0.0648401],
        ),
    ],
)
def test_logit_gaps_of_two_swapping_states(make, gaps):
    """Each step swaps the gap and adds ±log 9; the leaky filter multiplies by .9 and .1."""
    obs, zeros = jnp.array([0, 1, 0, 0, 1]), jnp.zeros(5, int)
    for form in (unroll, loop):
        z = form(make(SWAP), obs, zeros, zeros > 0)
        np.testing.assert_allclose(z[:, 0] - z[:, 1], gaps, rtol=0, atol=5e-8)


def test_leaky_filter_is_the_recurrence_of_matrices():
    """w' = (1-δ) Π(a) w + δ log E'o, from δ log start where an episode opens."""
    model, decay = permutations(1.0), 0.2
    obs, action, first = map(np.asarray, sequence(500, 0.02))
    w, expected = np.zeros(6), []
    for o, a, opens in zip(obs, action, first, strict=True):
        w = np.zeros(6) if opens else (1 - decay) * np.asarray(model.transition[a]) @ w
        w = w + decay * np.log(np.asarray(model.emission[o]))
        expected.append(w)
    rule = leaky_filter(permutations(1.0, epsilon=0.01), decay=decay)  # reads Π off T
    np.testing.assert_allclose(unroll(rule, obs, action, first), expected, rtol=0, atol=1e-12)


def test_leaky_filter_of_a_nearly_deterministic_model_stays_near_the_belief():
    """It mostly names the same state; LOF, which cannot forget, loses track (Theorem 5.9)."""
    model = permutations(1.0, epsilon=0.01)
    steps = possible_sequence(model, 2000, 0.0)
    named = lambda rule: unroll(rule, *steps).argmax(1)
    belief = named(forward_filter(model))
    assert (named(leaky_filter(model, decay=0.05)) == belief).mean() > 0.85
    assert (named(exact_filter(deterministic_part(model))) == belief).mean() < 0.6


RULES = {
    "forward": forward_filter,
    "log-forward": log_forward_filter,
    "exact": exact_filter,
    "raw": lambda model: exact_filter(model, centred=False),
    "associative": lambda model: exact_filter(model, method="associative"),
    "leaky": lambda model: leaky_filter(model, decay=0.3),
}


@pytest.mark.parametrize("name", RULES)
def test_sequence_is_the_steps_also_where_emissions_are_zero(name):
    """From any state, with and without resets, and of one step; nothing is nan."""
    model = zero_emissions()
    rule = RULES[name](model)
    steps = possible_sequence(model, 500, 0.05)
    z, by_steps = unroll(rule, *steps), loop(rule, *steps)
    assert jnp.isfinite(z).all()
    floor = lambda z: jnp.maximum(z, -1e6)  # sums of log 0 are rounded
    np.testing.assert_allclose(floor(z), floor(by_steps), rtol=1e-9, atol=1e-9)
    if name not in ("forward", "leaky"):  # those whose z are logits of the belief
        belief = unroll(forward_filter(model), *steps)
        assert ((belief == 0) == (jax.nn.softmax(z) < 1e-300)).all()
        np.testing.assert_allclose(jax.nn.softmax(z), belief, rtol=0, atol=1e-10)
    z = jnp.array([0.2, 0.5, 0.3])
    some = tuple(x[7:8] for x in steps)
    np.testing.assert_allclose(unroll(rule, *some, z), loop(rule, *some, z), rtol=1e-12)


def test_history_of_probability_zero_leaves_finite_numbers_until_a_reset():
    model = zero_emissions()._replace(start=np.array([1.0, 0.0, 0.0]))
    obs, zeros = jnp.array([0, 0, 0, 1]), jnp.zeros(4, int)  # 0 is impossible in state 0
    first = jnp.array([True, False, False, True])
    for make in RULES.values():
        z = unroll(make(model), obs, zeros, first)
        assert jnp.isfinite(z).all()
        if make is not RULES["leaky"]:
            assert z[-1].argmax() == 0


def test_wrong_start_is_carried_along_and_no_more():
    """w_k - l_k = Π(a_k) … Π(a_1) (w_0 - l_0), section 4.1: bounded, while the evidence grows."""
    model, steps = permutations(1.0), sequence(300)
    rule = exact_filter(model, centred=False)
    error = np.arange(6.0)
    difference = unroll(rule, *steps, jnp.asarray(error)) - unroll(rule, *steps, jnp.zeros(6))
    for a, d in zip(np.asarray(steps[1]), difference, strict=True):
        error = np.asarray(model.transition[a]) @ error
        np.testing.assert_allclose(d, error, atol=1e-9)


def test_filters_vmap():
    rule = exact_filter(permutations(1.0))
    each = [sequence(20, 0.1, seed) for seed in range(3)]
    batch = [jnp.stack(x) for x in zip(*each, strict=True)]
    together = jax.jit(jax.vmap(lambda *steps: rule.unroll(rule.init, *steps)))(*batch)
    for i in range(3):
        np.testing.assert_allclose(together[i], unroll(rule, *(x[i] for x in batch)), atol=1e-12)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0.05, 0.95, 0.0], r"column 0 of T\(1\) holds 0.95 at most; leaky_filter is for"),
        ([0.0, 0.0, 1.0], r"column 0 of T\(1\) leads to state 2, as column 1 does"),
    ],
)
def test_exact_filter_refuses_what_is_no_permutation(column, message):
    model = zero_emissions()
    model.transition[1, :, 0] = column
    with pytest.raises(ValueError, match=message):
        exact_filter(model)
    if max(column) < 1:
        leaky_filter(model, decay=0.1)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1, np.nan])
def test_leaky_filter_refuses_a_decay_outside(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}; it has to be inside"):
        leaky_filter(SWAP, decay=decay)


@pytest.mark.parametrize("name", ["forward", "log-forward", "exact"])
def test_sequences_of_different_lengths_are_refused(name):
    rule, zeros = RULES[name](SWAP), jnp.zeros(5, int)
    with pytest.raises(ValueError, match=r"different lengths: \[5, 4, 5\]"):
        rule.unroll(rule.init, zeros, zeros[:4], zeros > 0)
