import os
import subprocess
import sys
from functools import lru_cache

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax import lax

from spg import envs
from spg.envs import brax

make = lru_cache(envs.make)  # loading a model takes about a second


@lru_cache
def pendulum():
    """The physics that compiles fastest, and 24 jitted steps of one action in it."""
    env, params = make("brax/inverted_pendulum", backend="generalized")

    @jax.jit
    def run(params, action, key):
        def step(carry, key):
            obs, state = carry
            after = env.step(key, state, action, params)
            obs_next, state, reward, terminated, truncated, info = after
            out = obs, obs_next, reward, terminated, truncated, info["final_observation"]
            return (obs_next, state), out

        return lax.scan(step, env.reset(key, params), jr.split(key, 24))[1]

    return env, params, run


@pytest.mark.parametrize(
    ("name", "num_positions", "num_velocities"),
    [
        ("ant", 13, 14),  # z, quaternion, 8 angles; then 6 + 8 velocities
        ("halfcheetah", 8, 9),
        ("hopper", 5, 6),
        ("walker2d", 8, 9),
    ],
)
def test_positions_come_first_in_locomotion_observations(name, num_positions, num_velocities):
    env = brax.load(name, "spring")
    velocity = brax.velocity_entries(env)
    assert velocity.tolist() == [False] * num_positions + [True] * num_velocities
    assert num_velocities == env.brax.sys.qd_size()


@pytest.mark.slow
def test_humanoid_hides_velocities_of_joints_and_of_bodies():
    env, params = make("brax/humanoid", backend="spring", observe="positions", privileged=True)
    # z, quaternion, 17 angles | 23 velocities | 11 bodies × 10 inertias | 11 × 6 | 23 torques
    sizes = [(22, False), (23, True), (110, False), (66, True), (23, False)]
    velocity = np.array([flag for size, flag in sizes for _ in range(size)])
    obs, state = jax.eval_shape(lambda: env.reset(jr.key(0), params))
    assert (obs.policy.shape, obs.critic.shape) == ((155,), (244,))
    own = jnp.arange(244.0)
    assert env.policy(own, state.env).tolist() == np.flatnonzero(~velocity).tolist()
    assert env._critic(own, state.env).tolist() == own.tolist()


@pytest.mark.slow
def test_steps_are_those_of_brax_with_a_fresh_reset_per_episode():
    env, params, run = pendulum()
    short = params.replace(max_steps_in_episode=3)
    obs, obs_next, reward, terminated, truncated, final_obs = run(short, jnp.zeros(1), jr.key(5))
    inner = env.inner.brax
    reset, step = jax.jit(inner.reset), jax.jit(inner.step)
    state = reset(jr.key(5))
    for t, key in enumerate(jr.split(jr.key(5), 24)):
        np.testing.assert_allclose(obs[t], state.obs, atol=1e-5)
        state = step(state, jnp.zeros(1))
        np.testing.assert_allclose(final_obs[t], state.obs, atol=1e-5)
        np.testing.assert_allclose(reward[t], state.reward, atol=1e-5)
        if truncated[t]:
            state = reset(jr.split(key)[1])
        np.testing.assert_allclose(obs_next[t], state.obs, atol=1e-5)
    assert np.flatnonzero(truncated).tolist() == [2, 5, 8, 11, 14, 17, 20, 23]
    assert not terminated.any()
    assert len(np.unique(np.asarray(obs)[::3], axis=0)) == 8
    assert (reward.dtype, terminated.dtype, truncated.dtype) == (jnp.float32, bool, bool)


@pytest.mark.slow
def test_a_fall_terminates_and_does_not_truncate():
    _, params, run = pendulum()
    *_, terminated, truncated, final_obs = run(params, jnp.ones(1), jr.key(0))
    assert terminated.any()
    assert not truncated.any()
    np.testing.assert_array_equal(terminated, jnp.abs(final_obs[:, 1]) > 0.2)


@pytest.mark.slow
def test_typed_and_legacy_keys_agree():
    env, params, _ = pendulum()
    typed = env.reset(jr.key(7), params)
    legacy = env.reset(jr.PRNGKey(7), params)
    jax.tree.map(np.testing.assert_array_equal, typed, legacy)
    step = lambda key: env.step(key, typed[1], jnp.ones(1), params)
    assert jax.eval_shape(step, jr.PRNGKey(0)) == jax.eval_shape(step, jr.key(0))


@pytest.mark.slow
def test_a_step_leaves_the_callers_state_alone():
    env, params, _ = pendulum()
    _, state = env.reset(jr.key(0), params)
    metrics = dict(state.env.brax.metrics)
    jax.eval_shape(lambda: env.step_env(jr.key(1), state, jnp.ones(1), params))
    assert state.env.brax.metrics == metrics


@pytest.mark.slow
def test_backend_and_constructor_keywords_reach_brax():
    env, params = make("brax/reacher", backend="positional", max_steps_in_episode=7)
    assert (env.inner.brax.backend, params.max_steps_in_episode) == ("positional", 7)
    env, params = make("brax/hopper", exclude_current_positions_from_observation=False)
    assert (env.inner.brax.backend, env.observation_space(params).shape) == ("spring", (12,))
    with pytest.raises(ValueError, match="did you mean 'reset_noise_scale'"):
        make("brax/hopper", reset_noise=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["halfcheetah", "walker2d"])
def test_capsules_are_where_mujoco_has_them(name):
    mujoco = pytest.importorskip("mujoco")
    env, params = make(f"brax/{name}", backend="generalized")
    states = jax.vmap(lambda key: jax.jit(env.reset)(key, params)[1])(jr.split(jr.key(0), 3))
    own, states = env.inner, states.env
    ends, radius = brax.capsules(own, states)
    model = own.brax.sys.mj_model
    found = np.flatnonzero(model.geom_type == mujoco.mjtGeom.mjGEOM_CAPSULE)
    for each, q in zip(ends, states.brax.pipeline_state.q, strict=True):
        data = mujoco.MjData(model)
        data.qpos[:] = q
        mujoco.mj_forward(model, data)
        capsule = np.isin(np.flatnonzero(np.isin(model.geom_type, (2, 3, 5))), found)
        axis = data.geom_xmat[found].reshape(-1, 3, 3)[:, :, 2] * model.geom_size[found, 1:2]
        truth = data.geom_xpos[found][:, None] + np.stack([-axis, axis], 1)
        np.testing.assert_allclose(each[capsule], truth, atol=1e-5)
        np.testing.assert_allclose(radius[capsule], model.geom_size[found, 0])


@pytest.mark.slow
def test_brax_is_imported_on_demand_and_in_silence(tmp_path):
    program = """
import sys
from spg import envs
assert "brax" not in sys.modules and "mujoco" not in sys.modules
env, params = envs.make("brax/halfcheetah")
assert params.max_steps_in_episode == 1000
"""
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())  # MuJoCo would leave a log file


@pytest.mark.long
@pytest.mark.parametrize("backend", brax.BACKENDS)
@pytest.mark.parametrize("name", [n for n in brax.names() if n not in ("swimmer", "fast")])
def test_every_brax_environment_runs(name, backend):
    """But for swimmer: `brax.fluid` calls `jnp.clip(a_min=...)`, which JAX 0.10 no longer has."""
    env, params = envs.make(f"brax/{name}", backend=backend, observe="positions", privileged=True)

    def run(key):
        def step(state, key):
            obs, state, reward, *_ = env.step(key, state, jnp.zeros(env.num_actions), params)
            return state, (obs, reward)

        return lax.scan(step, env.reset(key, params)[1], jr.split(key, 5))[1]

    out = jax.jit(run)(jr.key(0))
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(out))
