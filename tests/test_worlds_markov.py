import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg import envs
from spg.worlds.hmm import deterministic_part, hmm
from spg.worlds.markov import random_hmm, ringworld, swap_hmm


def test_swap_hmm_is_that_of_the_paper():
    """T = [[ε, 1-ε], [1-ε, ε]]; the controlled one has the action to stay before it."""
    swap = [[0.1, 0.9], [0.9, 0.1]]
    model = hmm(swap_hmm(0.1).pomdp)
    np.testing.assert_allclose(model.transition, [swap], rtol=1e-6)
    np.testing.assert_allclose(model.emission, [[0.9, 0.1], [0.1, 0.9]], rtol=1e-6)
    np.testing.assert_array_equal(model.start, [1, 0])
    both = hmm(swap_hmm(0.1, controlled=True).pomdp).transition
    np.testing.assert_allclose(both, [np.eye(2)[[0, 1]] * 0.8 + 0.1, swap], rtol=1e-6)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_random_hmm_is_a_permutation_with_noise(epsilon):
    model = hmm(random_hmm(5, num_obs=3, num_actions=2, epsilon=epsilon, seed=1).pomdp)
    part = deterministic_part(model).transition
    assert (part.sum(1) == 1).all()
    assert (part.sum(2) == 1).all()
    assert np.abs(model.transition - (1 - epsilon) * part).max() <= epsilon
    assert (model.emission > 0).all()
    assert not np.array_equal(part[0], part[1])


def test_ringworld_moves_slips_and_pays_as_specified():
    """By the words of the specification, position by position, numbered from 1."""
    problem, epsilon = ringworld(epsilon=0.2), 0.2
    world = jax.tree.map(np.asarray, problem.pomdp)
    step = {"CW1": 1, "CW2": 2, "CCW1": -1, "CCW2": -2}
    place = lambda n: (n - 1) % 12 + 1
    for position in range(1, 13):
        for a, name in enumerate(problem.actions):
            further = step[name] + (1 if step[name] > 0 else -1)
            expected = {
                place(position + step[name]): 1 - epsilon,
                position: epsilon / 2,
                place(position + further): epsilon / 2,
            }
            found = zip(
                world.successor[position - 1, a] + 1,
                world.probability[position - 1, a],
                world.reward[position - 1, a],
                strict=True,
            )
            for to, p, reward in found:
                assert p == pytest.approx(expected.pop(to))
                assert reward == {2: 1, 3: 1, 6: -1, 11: -1, 12: -1}.get(to, 0)
            assert not expected
    np.testing.assert_allclose(world.start, 1 / 12, rtol=1e-6)


def test_ringworld_beacons_tell_all_positions_apart():
    emission = hmm(ringworld().pomdp).emission
    assert emission[0, 0] / emission[2, 0] == pytest.approx(
        np.exp(2 - 2 * np.cos(np.deg2rad(170))), rel=1e-5
    )  # position 1 is at 0°, beacons 0 and 2 at 0° and 170°
    differ = np.abs(emission[:, :, None] - emission[:, None]).max(0)
    assert (differ + np.eye(12) > 0.01).all()


def test_ringworld_is_played_in_episodes_of_a_hundred_steps():
    """One-hot beacons and previous actions, which are zeros where an episode opens."""
    env, params = envs.make("ringworld-pomdp", previous_action=True, epsilon=0.0)
    assert env.observation_space(params).shape == (8,)
    assert env.action_space(params).n == 4
    assert params.max_steps_in_episode == 100

    @jax.jit
    def play(key):
        def step(state, key):
            obs, after, reward, terminated, truncated, _ = env.step(key, state, 1, params)
            return after, (obs, state.env.state, reward, terminated, truncated)

        obs, state = env.reset(key, params)
        return obs, lax.scan(step, state, jr.split(key, 150))[1]

    first, (obs, state, reward, terminated, truncated) = play(jr.key(0))
    assert not terminated.any()
    assert np.flatnonzero(truncated).tolist() == [99]
    assert (obs[:, :4].sum(1) == 1).all()
    assert (first[4:] == 0).all()
    assert (obs[99, 4:] == 0).all()
    assert (jnp.delete(obs, 99, 0)[:, 5] == 1).all()
    assert (np.diff(state[:100]) % 12 == 2).all()
    gain = np.zeros(12)
    gain[[1, 2]], gain[[5, 10, 11]] = 1, -1
    np.testing.assert_array_equal(reward[:99], gain[state[1:100]])


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, np.nan])
def test_noise_out_of_range_is_refused(epsilon):
    for make in (swap_hmm, lambda e: random_hmm(3, epsilon=e), lambda e: ringworld(epsilon=e)):
        with pytest.raises(ValueError, match=f"epsilon is {epsilon}; it has to be from 0 to 1"):
            make(epsilon)


@pytest.mark.parametrize("name", ["num_states", "num_obs", "num_actions"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 0; it has to be at least 1"):
        random_hmm(**({"num_states": 3} | {name: 0}))
