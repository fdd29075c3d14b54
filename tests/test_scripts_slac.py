"""SLAC runs, resumes, and moves what each loss is for; what cannot run is refused in one line."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close, largest_difference
from jax import lax
from test_scripts import run, two_updates, whole_and_half
from test_training_loop import assert_same_run

import spg
from scripts import slac
from spg.estimators.actor_critic import Choice
from spg.training import options, replay

SLAC = slac.Config(
    num_envs=4, num_steps=2, total_steps=16, learning_starts=24, buffer_size=32, batch_size=4,
    model_batch_size=2, updates_per_step=1.0, hidden=(8,), model_hidden=(), latent_sizes=(2, 3),
    window=3, segment_length=3, model_updates=2, num_seeds=2, eval_episodes=2, checkpoints=1,
    env_params={"max_steps_in_episode": 5.0},
)  # fmt: skip
TERMS = ("reconstruction", "kl", "reward_fit", "actor_loss", "critic_loss", "entropy")


@pytest.mark.slow
def test_two_updates_log_the_terms_of_the_bound_and_the_policy_can_be_opened(tmp_path):
    data = two_updates(slac, SLAC, tmp_path)
    assert data["env_steps"][0].tolist() == [56, 64]  # 24 for statistics, 24 for the buffer
    for name in TERMS:
        assert np.isfinite(data[name]).all()
    assert (data["kl"] > 0).all()
    opened = spg.load(tmp_path / "run")
    action, z_next = opened.kernel(0).mode(jnp.zeros(3), opened.kernel(0).z0)
    assert (action.shape, z_next.shape) == ((1,), (9,))


@pytest.fixture(scope="module")
def start():
    """One seed before its first update."""
    return jax.jit(partial(slac.init, SLAC, options.make_env(SLAC)))(jr.key(0))


@pytest.mark.slow
def test_steps_that_ended_do_not_move_the_temperature(start):
    config, learned = replace(SLAC, learn_temperature=True), start.learned
    log_prob = jnp.array([-1.0, 2.0, 50.0])
    steps = replay.take(
        start.world.ring, replay.places(start.world.ring, num_segments=3, length=1, key=jr.key(0))
    )
    steps = jax.tree.map(lambda x: x[:, 0], steps)

    def after(log_prob, terminated):
        choice = Choice(log_prob, jnp.zeros((3, 1)), None, log_prob, log_prob)
        ended = steps._replace(terminated=jnp.array(terminated))
        return slac.temperature_step(config, learned, ended, choice)[0]

    ended = [False, False, True]
    assert after(log_prob, ended) == after(log_prob.at[2].set(-9.0), ended)
    assert after(log_prob, ended) != after(log_prob, [False] * 3)


@pytest.mark.slow
def test_a_gradient_step_moves_all_weights_and_each_loss_its_own(start):
    """The model moves by its bound alone, so not at all where its rate is 0."""

    @jax.jit
    def step(rates, pair):
        names = "model_learning_rate", "actor_learning_rate", "learning_rate"
        config = replace(SLAC, **dict(zip(names, rates, strict=True)))
        return slac.gradient_step(config, pair, jr.key(1))[0][0]

    def moved(*rates):
        after = step(jnp.array(rates), (start.learned, start.world.ring))
        parts = lambda x: (x.model, x.kernel.head, x.critic, x.slow, x.log_temperature)
        pairs = zip(parts(start.learned), parts(after), strict=True)
        return [largest_difference(a, b) > 0 for a, b in pairs]

    assert moved(1e-3, 1e-3, 1e-3) == [True] * 5
    assert moved(0.0, 1e-3, 1e-3) == [False, True, True, True, True]
    assert moved(1e-3, 0.0, 0.0) == [True, False, False, False, False]


def test_where_every_episode_has_ended_the_actor_has_nothing_to_learn(start):
    window, latent = jnp.zeros((4, 9)), jnp.ones((4, 5))
    steps = jax.tree.map(lambda x: x[0], start.world.ring.steps)

    @jax.jit
    def act(terminated):
        ended = steps._replace(terminated=terminated)
        return slac.actor_step(SLAC, start.learned, ended, window, latent, jr.key(1))

    for terminated in (True, False):
        kernel, _, loss, _ = act(jnp.full(4, terminated))
        assert (loss == 0) == terminated
        assert (largest_difference(kernel, start.learned.kernel) == 0) == terminated


@pytest.mark.slow
def test_the_model_is_fitted_once_before_the_first_update(start):
    fit = jax.jit(partial(slac.fit, SLAC))
    once = fit(start.learned, start.world.ring, jr.key(1))
    assert largest_difference(once.model, start.learned.model) > 1e-4
    assert_trees_close(once, fit(once, start.world.ring, jr.key(2)), rtol=0, atol=0)
    assert_trees_close(once.kernel, start.learned.kernel, rtol=0, atol=0)


@pytest.mark.long
def test_a_seed_is_alone_what_it_is_among_others():
    env = options.make_env(SLAC)

    def train(key):
        step = lambda state, _: slac.step(SLAC, env, state)
        return lax.scan(step, slac.init(SLAC, env, key), length=2)

    keys = jr.split(jr.key(0), 2)
    both, alone = jax.jit(jax.vmap(train))(keys), jax.jit(train)(keys[1])
    one = jax.tree.map(lambda x: x[1], both)
    assert_trees_close(one[0].learned, alone[0].learned, rtol=1e-3, atol=1e-5)
    assert_trees_close(one[0].world.ring, alone[0].world.ring, rtol=1e-3, atol=1e-4)
    assert largest_difference(one[0].learned, jax.tree.map(lambda x: x[0], both[0].learned)) > 1e-2


@pytest.mark.long
def test_resumed_run_equals_the_uninterrupted_one(tmp_path):
    run(slac, whole_and_half(slac, replace(SLAC, total_steps=48), tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "half")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"segment_length": 0}, "segment_length is 0; it has to be at least 2"),
        ({"segment_length": 1}, "segment_length is 1; it has to be at least 2"),
        ({"env": "CartPole-v1"}, "slac is for continuous actions, and those of CartPole-v1 are"),
        ({"observe": "nothing"}, "the policy sees its actions alone: nothing is left"),
        ({"model_batch_size": 5}, "model_batch_size 5 is more than batch_size 4"),
        ({"batch_size": 20}, "the first 24 steps do not hold 20 segments of 3 steps"),
        ({"memory": "s2pg"}, "unknown memory 's2pg'"),
        ({"latent_sizes": (0, 4)}, "latent_sizes is 0; it has to be at least 1"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        slac.make(replace(SLAC, **words))
    assert len(str(error.value).splitlines()) == 1
