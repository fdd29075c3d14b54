from functools import partial

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg import envs
from spg.envs.cards import RecallCards

SUITS, CARDS, PAUSE = 3, 4, 2


def game():
    env = RecallCards(SUITS)
    return env, env.default_params.replace(num_cards=CARDS, pause=PAUSE)


@partial(jax.jit, static_argnums=0)
def play(policy, key):
    """One episode under `policy(state, obs)`: states, observations, rewards, ends."""
    env, params = game()

    def step(carry, key):
        obs, state = carry
        action = policy(state, obs)
        after = env.step_env(key, state, action, params)
        return after[:2], (state, obs, after[2], after[3])

    keys = jr.split(key, 2 * CARDS + PAUSE)
    return lax.scan(step, env.reset_env(key, params), keys)[1]


def right(state, obs):
    """The suit of the place that is asked for, by what the environment hides."""
    return state.suits[jnp.argmax(obs[SUITS : SUITS + CARDS])]


def wrong(state, obs):
    return (right(state, obs) + 1) % SUITS


def constant(state, obs):
    return 1


def test_cards_are_shown_in_order_then_nothing_then_each_place_is_asked_for():
    state, obs, _, terminated = play(right, jr.key(0))
    suit, place, asked = jnp.split(obs, [SUITS, SUITS + CARDS], 1)
    hidden = np.asarray(state.suits[0])
    np.testing.assert_array_equal(suit[:CARDS], np.eye(SUITS)[hidden])
    np.testing.assert_array_equal(place[:CARDS], np.eye(CARDS))
    assert not obs[CARDS : CARDS + PAUSE].any()
    assert not suit[CARDS:].any()
    questions = np.asarray(place[CARDS + PAUSE :])
    assert (questions.sum(0) == 1).all()
    assert (questions.sum(1) == 1).all()
    np.testing.assert_array_equal(asked[:, 0], np.arange(2 * CARDS + PAUSE) >= CARDS + PAUSE)
    assert np.flatnonzero(terminated).tolist() == [2 * CARDS + PAUSE - 1]


def test_answers_are_paid_and_earlier_actions_are_not():
    for policy, pay in ((right, 1 / CARDS), (wrong, -1 / (SUITS - 1) / CARDS)):
        _, obs, reward, _ = play(policy, jr.key(1))
        np.testing.assert_allclose(reward, pay * obs[:, -1], rtol=1e-6)
        assert -1 <= reward.sum() <= 1


def test_policy_with_memory_returns_one_and_a_constant_one_zero_in_the_mean():
    keys = jr.split(jr.key(2), 2000)
    perfect, constants = (
        jax.vmap(lambda key, p=policy: play(p, key)[2].sum())(keys) for policy in (right, constant)
    )
    np.testing.assert_allclose(perfect, 1, rtol=1e-6)
    assert abs(constants.mean()) < 4 * constants.std() / len(keys) ** 0.5


def test_suits_and_questions_are_uniform():
    env, params = game()
    reset = jax.jit(jax.vmap(lambda key: env.reset_env(key, params)[1]))
    state = reset(jr.split(jr.key(3), 3000))
    for place in range(CARDS):
        for x, n in ((state.suits, SUITS), (state.order, CARDS)):
            share = np.bincount(x[:, place], minlength=n) / 3000
            assert np.abs(share - 1 / n).max() < 4 * (0.25 / 3000) ** 0.5
    pairs = np.bincount(SUITS * state.suits[:, 0] + state.suits[:, 1], minlength=9) / 3000
    assert np.abs(pairs - 1 / 9).max() < 4 * (8 / 81 / 3000) ** 0.5


def test_make_sets_cards_suits_and_pause_and_the_horizon_follows():
    env, params = envs.make("RecallCards-memory", num_cards=2, num_suits=5, pause=3)
    assert params.max_steps_in_episode == 7
    assert env.observation_space(params).shape == (5 + 2 + 1,)
    assert env.action_space(params).n == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_suits": 1}, "num_suits is 1; it has to be at least 2"),
        ({"num_cards": 0}, "num_cards is 0; it has to be at least 1"),
        ({"max_steps_in_episode": 3}, "unknown parameter of RecallCards-memory"),
    ],
)
def test_games_that_cannot_be_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        envs.make("RecallCards-memory", **words)
