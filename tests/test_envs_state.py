"""What `observe="state"` means: the process that it shows is Markov, but for the clock."""

import gymnax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnax.environments.bsuite import mnist

from spg import envs

TURN = 2 * jnp.pi
HIDDEN = {
    "CartPole-v1": {},
    "Pendulum-v1": {"theta": TURN, "last_u": 1.0},
    "Acrobot-v1": {"joint_angle1": TURN, "joint_angle2": TURN},
    "MountainCar-v0": {},
    "MountainCarContinuous-v0": {},
    "Reacher-misc": {"angles": TURN},
    "Swimmer-misc": {},
}
"""Of Gymnax's physics: changes of the hidden state, besides its clock, that the state hides."""
FREE = {"last_u"}  # hidden altogether; an angle is hidden but for whole turns
OTHERS = [n for n in gymnax.registered_envs if n not in HIDDEN and n != "MNISTBandit-bsuite"]
OTHERS += ["TMaze-memory", "RepeatFirst-memory", "RecallCards-memory", "tiger-pomdp"]


@pytest.mark.parametrize("name", HIDDEN)
def test_of_physics_it_is_the_own_observation_and_equal_states_have_equal_futures(name):
    env = envs.make(name, observe="state")
    plain = envs.make(name)

    @jax.jit
    def futures(key):
        """What a state and its twin show, and what both show and earn after the same action."""
        obs, state = env.reset(key)
        own, _ = plain.reset(key)
        hidden = state.env
        twin = {f: vars(hidden)[f] + change for f, change in (HIDDEN[name] | {"time": 3}).items()}
        other = state._replace(env=hidden.replace(**twin))
        seen = env.environment.observe(key, other, None, env.params)
        action = env.environment.action_space().sample(key)
        after = [env.step(key, s, action) for s in (state, other)]
        fixed = {f: x for f, x in vars(hidden).items() if f not in FREE | {"time"}}
        see = lambda x: env.environment.observe(
            key, state._replace(env=hidden.replace(**x)), None, env.params
        )
        slopes = jax.tree.leaves(jax.jacfwd(see)(fixed))
        slope = jnp.concatenate([x.reshape(len(obs), -1) for x in slopes], 1)
        return own, obs, seen, *((x[0], x[2], x[3]) for x in after), slope

    own, obs, seen, one, two, slope = futures(jr.key(1))
    np.testing.assert_array_equal(obs, own)
    np.testing.assert_allclose(seen, obs, atol=1e-5)
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4)
    assert np.linalg.matrix_rank(slope) == slope.shape[1]  # it fixes all the rest


@pytest.mark.parametrize("name", OTHERS)
def test_elsewhere_every_leaf_of_the_hidden_state_follows_the_own_observation(name):
    env = envs.make(name, observe="state", privileged=True)
    plain = envs.make(name)
    own, state = jax.eval_shape(plain.reset, jr.key(0))
    hidden = sum(x.size for x in jax.tree.leaves(state.env))
    assert env.spec.obs_size == env.spec.critic_size == own.size + hidden
    assert hidden > 0


def test_the_leaves_follow_in_their_order():
    env = envs.make("MemoryChain-bsuite", observe="state", num_bits=3, memory_length=4)
    obs, state = env.reset(jr.key(0))
    for t in range(4):
        obs, state, *_ = env.step(jr.key(t), state, 0)
        hidden = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(state.env)])
        np.testing.assert_array_equal(obs[5:], hidden)
        assert state.env.context.shape == (3,)
        assert t < 1 or not obs[2:5].any()  # the context is hidden from the own observation


def test_data_that_cannot_be_downloaded_are_one_clear_error(monkeypatch):
    def offline(*arguments):
        raise OSError("<urlopen error [Errno -2] Name or service not known>")

    monkeypatch.setattr(mnist.load_mnist, "load_mnist", offline)
    with pytest.raises(ValueError, match=r"^'MNISTBandit-bsuite' needs data .*urlopen error"):
        envs.make("MNISTBandit-bsuite")
