"""The bound of a latent model against likelihoods of linear Gaussian ones, which are known."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from spg.distributions import Normal
from spg.estimators.latent import Sequence, elbo, sequence
from spg.kernels.cells import Computed, Window
from spg.kernels.heads import TanhNormalHead
from spg.kernels.kernel import Kernel
from spg.kernels.latent import LatentModel
from spg.kernels.networks import Normalizer
from spg.types import Transition

pytestmark = pytest.mark.usefixtures("float64")

SIZES, NUM_ACTIONS, LENGTH = (2, 3), 1, 4
PARTS = "posterior", "prior", "memory", "reward"


def affine(net):
    return net.layers[-1] if hasattr(net, "layers") else net.mlp.layers[-1]


def with_affine(model, name, weight, bias):
    where = lambda m: [affine(getattr(m, name)).weight, affine(getattr(m, name)).bias]
    return eqx.tree_at(where, model, [jnp.asarray(weight), jnp.asarray(bias)])


@eqx.filter_jit
def linear_model(key):
    """Every mean is affine in what it is given, and every deviation is constant."""
    make_key, *keys = jr.split(key, 6)
    model = LatentModel(2, NUM_ACTIONS, SIZES, [], decoder_std=1.2, key=make_key)
    for name, key in zip((*PARTS, "decoder"), keys, strict=True):
        weight = 0.3 * jr.normal(key, affine(getattr(model, name)).weight.shape)
        means = len(weight) if name == "decoder" else len(weight) // 2
        bias = 0.3 * jr.normal(jr.fold_in(key, 1), (len(weight),))
        if name != "decoder":  # posteriors are wide, so that weights p / q are bounded
            wider = 1.0 if "posterior" in name else 0.0
            bias = bias.at[means:].add(wider - getattr(model, name).start)
        model = with_affine(model, name, weight.at[means:].set(0.0), bias)
    return model


def mean_and_std(model, name):
    """W and b of the mean, and the deviation."""
    net = affine(getattr(model, name))
    (weight, _), (bias, spread) = jnp.split(net.weight, 2), jnp.split(net.bias, 2)
    return weight, bias, jax.nn.softplus(spread + getattr(model, name).start) + 1e-5


def log_likelihood(model, seq):
    """log p(x) of all observations at once: every variable is affine in standard normal noise."""
    size = len(seq.x) * (sum(SIZES) + 2)
    constant = lambda x: (np.asarray(x), np.zeros((len(x), size)))
    join = lambda *parts: tuple(np.concatenate(x) for x in zip(*parts, strict=True))
    number = iter(np.eye(size))

    def draw(weight, bias, std, *given):
        at, by = join(*given)
        weight, bias, own = map(np.asarray, (weight, bias, [s * next(number) for s in std]))
        return weight @ at + bias, weight @ by + own

    seen, y2, decoder = [], None, affine(model.decoder)
    for t, first in enumerate(seq.first):
        if t == 0 or first:
            y1 = draw(np.zeros((2, 0)), np.zeros(2), np.ones(2), constant([]))
            y2 = draw(
                *mean_and_std(model, "memory"), y1, constant(np.zeros(SIZES[1] + NUM_ACTIONS))
            )
        else:
            a = constant(seq.action[t - 1])
            y1 = draw(*mean_and_std(model, "prior"), y2, a)
            y2 = draw(*mean_and_std(model, "memory"), y1, y2, a)
        seen.append(draw(decoder.weight, decoder.bias, [float(model.decoder_std)] * 2, y1, y2))
    at, by = join(*seen)
    likelihood: Any = stats.multivariate_normal
    return likelihood.logpdf(np.asarray(seq.x).reshape(-1), at, by @ by.T)


def random_sequence(key, first=()):
    keys = jr.split(key, 3)
    x = jr.normal(keys[0], (LENGTH, 2))
    action, reward = (
        jr.normal(keys[1], (LENGTH - 1, NUM_ACTIONS)),
        jr.normal(keys[2], (LENGTH - 1,)),
    )
    opens = np.zeros(LENGTH, bool)
    opens[list(first)] = True
    return Sequence(x, action, reward, jnp.asarray(opens))


@eqx.filter_jit
def draws(model, seq, count):
    """Bounds without the reward `[count]`, and log p(x, y) - log q(y) of the same latents."""

    def one(key):
        terms, latent = elbo(model, seq, key=key)
        _, posterior, prior = model.infer(seq.x, seq.before, seq.first, key=key)
        ratio = jax.vmap(lambda p, q, y: p.log_prob(y) - q.log_prob(y))
        y1 = latent[:, : SIZES[0]]
        weight = terms.reconstruction.sum() + ratio(prior, posterior, y1).sum()
        return terms.reconstruction.sum() - terms.kl.sum(), weight

    return jax.vmap(one)(jr.split(jr.key(9), count))


@pytest.mark.slow
@pytest.mark.parametrize("first", [(), (2,)])
def test_weights_of_latents_average_to_the_likelihood_and_no_bound_exceeds_it(first):
    """E_q p(x, y) / q(y) = p(x) for every q, of a sequence and of two episodes in one."""
    model, seq = linear_model(jr.key(2)), random_sequence(jr.key(3), first)
    exact = log_likelihood(model, seq)
    bounds, weights = draws(model, seq, 40_000)
    share = jnp.exp(weights - exact)
    assert abs(share.mean() - 1) < 4 * share.std() / math.sqrt(len(share))
    assert share.std() < 8  # else the line above would say little
    assert bounds.mean() < exact - 0.1
    if first:  # the bound, too, is that of two sequences
        cut = first[0]
        parts = Sequence(*(x[:cut] for x in seq)), Sequence(*(x[cut:] for x in seq))
        parts = [p._replace(action=a, reward=r) for p, a, r in zip(
            parts, (seq.action[: cut - 1], seq.action[cut:]),
            (seq.reward[: cut - 1], seq.reward[cut:]), strict=True)]  # fmt: skip
        alone = sum(log_likelihood(model, p) for p in parts)
        np.testing.assert_allclose(alone, exact, rtol=1e-10)


def filtered_model(exact):
    """y2 is told by the actions alone, so q can be the exact posterior of y1.

    p(y1) is N(0, I) where nothing was before, as at the first step.
    """
    model = linear_model(jr.key(2))
    spread = lambda name, std: jnp.log(jnp.expm1(std - 1e-5)) - getattr(model, name).start
    weight, bias, _ = mean_and_std(model, "memory")
    weight = weight.at[:, : SIZES[0]].set(0.0)
    model = with_mean(model, "memory", weight, bias, jnp.full(SIZES[1], -60.0))  # as good as none
    weight, bias, _ = mean_and_std(model, "prior")
    model = with_mean(model, "prior", weight, 0 * bias, spread("prior", jnp.ones(2)))
    slope, offset = jnp.array([0.8, -1.3]), affine(model.decoder).bias
    decoder = jnp.zeros((2, sum(SIZES))).at[jnp.arange(2), jnp.arange(2)].set(slope)
    model = with_affine(model, "decoder", decoder, offset)
    if not exact:
        return model
    noise = model.decoder_std**2
    precision = 1 + slope**2 / noise
    by_x = jnp.diag(slope / noise / precision)
    weight = jnp.concatenate([by_x, weight / precision[:, None]], 1)
    mean = -slope * offset / noise / precision
    return with_mean(model, "posterior", weight, mean, spread("posterior", precision**-0.5))


def with_mean(model, name, weight, bias, spread):
    weight = jnp.concatenate([weight, jnp.zeros_like(weight)])
    return with_affine(model, name, weight, jnp.concatenate([bias, spread]))


@pytest.mark.slow
@pytest.mark.parametrize("first", [(), (2,)])
def test_the_bound_is_the_likelihood_less_the_kl_to_the_exact_posterior(first):
    """So with the exact posterior it is the likelihood."""
    seq = random_sequence(jr.key(3), first)
    best, other = filtered_model(True), filtered_model(False)
    exact = log_likelihood(best, seq)
    infer = eqx.filter_jit(lambda m: m.infer(seq.x, seq.before, seq.first, key=jr.key(0)).posterior)
    gap = jax.vmap(Normal.kl)(infer(other), infer(best)).sum()  # y2 is the same in every draw
    for model, expected in ((best, exact), (other, exact - gap)):
        bounds, _ = draws(model, seq, 20_000)
        error = bounds.std() / math.sqrt(len(bounds))
        assert abs(bounds.mean() - expected) < 4 * error + 1e-3
        assert error < 0.05
    assert gap > 0.5


def test_gradient_of_the_kl_is_that_in_closed_form():
    """d KL / d m = m and d KL / d s = s - 1/s where the prior is N(0, I)."""
    model = linear_model(jr.key(4))
    seq = random_sequence(jr.key(5))
    kl = lambda model: elbo(model, seq, key=jr.key(0))[0].kl[0]
    found = affine(eqx.filter_jit(eqx.filter_grad(kl))(model).posterior).bias
    weight, bias, std = mean_and_std(model, "posterior")
    mean = weight[:, :2] @ seq.x[0] + bias
    spread = jnp.asarray(affine(model.posterior).bias)[2:] + model.posterior.start
    expected = jnp.concatenate([mean, (std - 1 / std) * jax.nn.sigmoid(spread)])
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_reward_is_explained_by_both_latents_and_the_action_but_not_across_an_end():
    model, seq = linear_model(jr.key(6)), random_sequence(jr.key(7), (2,))
    terms, latent = eqx.filter_jit(elbo)(model, seq, key=jr.key(0))
    weight, bias, std = mean_and_std(model, "reward")
    for t in range(LENGTH - 1):
        given = jnp.concatenate([latent[t], seq.action[t], latent[t + 1]])
        expected = Normal(weight @ given + bias, std).log_prob(seq.reward[t, None])
        np.testing.assert_allclose(terms.reward[t], 0.0 if t == 1 else expected)
    total = terms.reconstruction.sum() - terms.kl.sum() + terms.reward.sum()
    np.testing.assert_allclose(terms.total, total)


def test_nothing_of_an_episode_reaches_the_next_one():
    """Not in latents, nor in the window of the actor; x is as the policy's statistics show it."""
    model, keys = linear_model(jr.key(8)), jr.split(jr.key(8), 3)
    normalizer = Normalizer(3).update(jr.normal(keys[0], (50, 3)))
    head = TanhNormalHead([3 + 4 * 3, 1], std=1.0, key=keys[1])
    kernel = Kernel(Computed(Window()), head, normalizer, jnp.zeros(4 * 3))
    first = jnp.arange(LENGTH) == 2
    nothing = jnp.zeros(LENGTH)

    @jax.jit
    def seen(before):
        obs = jr.normal(keys[2], (LENGTH, 3)).at[:2].add(before)
        z = jnp.full((LENGTH, 12), before)
        segment = Transition(
            obs, z, obs[:, 2:], z, nothing + before * ~first, first, first, first, obs + 1.0
        )
        seq = sequence(kernel, segment, 2)
        latent = model.infer(seq.x, seq.before, seq.first, key=jr.key(0)).latent
        return obs, seq, latent, kernel.roll(segment, key=None).z_next.reshape(LENGTH, 4, 3)

    obs, seq, latent, window = seen(0.0)
    _, _, other_latent, other_window = seen(5.0)
    np.testing.assert_array_equal(latent[2:], other_latent[2:])
    assert (latent[:2] != other_latent[:2]).all()
    np.testing.assert_array_equal(window[2:], other_window[2:])
    shown = jax.vmap(normalizer)(obs)
    np.testing.assert_allclose(window[-1], jnp.concatenate([jnp.zeros((2, 3)), shown[2:]]))
    np.testing.assert_allclose(seq.x[:-1], shown[:, :2])
    np.testing.assert_allclose(seq.x[-1], normalizer(obs[-1] + 1.0)[:2])
    assert seq.first.tolist() == [False, False, True, False, False]
