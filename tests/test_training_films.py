"""Pictures and films show the states, observations and actions of the noise-free policy."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from gymnax.environments.classic_control import acrobot, cartpole, pendulum
from matplotlib.figure import Figure
from PIL import Image

import spg
from spg import envs
from spg.training import films
from spg.training.drawings import DRAWINGS, animate, finite_world

SMALL = spg.PolicyConfig(memory="none", hidden=(2,))


def opened(name, **words):
    """An environment and an untrained kernel for it."""
    env = envs.make(name, **words)
    shapes = jax.eval_shape(lambda key: spg.make_kernel(SMALL, env.spec, key=key), jr.key(0))
    return env, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)


def test_what_is_watched_is_the_noise_free_policy_step_by_step():
    env, kernel = opened("CartPole-v1", max_steps_in_episode=4)
    states, steps = jax.jit(lambda k: spg.watch(k, env, num_steps=6, key=jr.key(0)))(kernel)
    assert steps.first.tolist() == [True, False, False, False, True, False]
    assert steps.truncated.tolist() == [False, False, False, True, False, False]
    np.testing.assert_array_equal(steps.obs[:, 0], states.env.x)
    modes = jax.vmap(lambda o, z: kernel.mode(o, z)[0])(steps.obs, steps.z)
    np.testing.assert_array_equal(steps.action, modes)
    np.testing.assert_array_equal(steps.final_obs[:3], steps.obs[1:4])


def at_rest(kind, **fields):
    """States of T = 2 steps."""
    return kind(time=np.arange(2), **{k: np.array(v, float) for k, v in fields.items()})


CART = at_rest(cartpole.EnvState, x=[0, 0.5], x_dot=[0, 0], theta=[0, 0.1], theta_dot=[0, 0])
UP = at_rest(pendulum.EnvState, theta=[0, np.pi / 2], theta_dot=[0, 0], last_u=[0, 0])
ARM = at_rest(
    acrobot.EnvState,
    joint_angle1=[0, np.pi / 2], joint_angle2=[0, np.pi / 2], velocity_1=[0, 0], velocity_2=[0, 0],
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "params", "states", "line", "expected"),
    [
        ("CartPole-v1", cartpole.EnvParams(), CART, -1,
         [[(0, 0), (0, 1)], [(0.5, 0), (0.5 + np.sin(0.1), np.cos(0.1))]]),
        ("Pendulum-v1", pendulum.EnvParams(), UP, -1, [[(0, 0), (0, 1)], [(0, 0), (-1, 0)]]),
        ("Acrobot-v1", acrobot.EnvParams(), ARM, -1,
         [[(0, 0), (0, -1), (0, -2)], [(0, 0), (1, 0), (1, 1)]]),
    ],
)  # fmt: skip
def test_bodies_are_drawn_where_they_are(name, params, states, line, expected):
    axes = Figure().subplots()
    move = DRAWINGS[name].start(axes, states, params)
    for t, points in enumerate(expected):
        move(t)
        drawn = np.stack(axes.lines[line].get_data(), 1)
        np.testing.assert_allclose(drawn, points, atol=1e-12)


@pytest.mark.parametrize("name", DRAWINGS)
def test_every_drawing_moves_at_the_speed_of_the_world(name, tmp_path):
    env, _ = opened(name)
    inner, params, key = env.environment.inner, env.params, jr.key(0)
    states = jax.device_get(jax.vmap(lambda k: inner.reset_env(k, params)[1])(jr.split(key, 4)))
    animate(tmp_path / "film.gif", DRAWINGS[name], states, params, title=name)
    seconds = DRAWINGS[name].seconds(params)
    with Image.open(tmp_path / "film.gif") as film:
        stride = max(1, round(0.04 / seconds))
        assert film.n_frames == -(-4 // stride)
        assert film.info["duration"] == pytest.approx(1000 * seconds * stride, abs=10)
        frames = [
            np.asarray(film.convert("RGB"))[40:] for _ in map(film.seek, range(film.n_frames))
        ]
    assert any((frame != frames[0]).any() for frame in frames[1:])  # below the title


@pytest.mark.slow
def test_a_film_of_physics_is_a_picture_and_an_animation(tmp_path):
    env, kernel = opened("CartPole-v1", observe="positions")
    written = films.save(kernel, env, tmp_path, title="CartPole", key=jr.key(0))
    assert [path.name for path in written] == ["rollout.png", "rollout.gif"]
    assert all(path.stat().st_size > 5_000 for path in written)


@pytest.mark.slow
def test_a_finite_world_is_drawn_with_its_names_and_an_endless_one_for_100_steps(
    tmp_path, monkeypatch
):
    shown = []
    monkeypatch.setattr(films, "_draw", lambda path, panels, steps, title: shown.append(panels))
    env, kernel = opened("loadunload-pomdp")
    endless = env._replace(params=env.params.replace(max_steps_in_episode=None))
    films.save(kernel, endless, tmp_path, title="", key=jr.key(0))
    state, observation, action = shown[0]
    assert [p.label for p in shown[0]] == ["state", "observation", "action"]  # z is empty
    assert state.values.shape == (100,)
    assert observation.names == ("loading", "travel", "unloading")
    assert action.names == ("left", "right")


@pytest.mark.slow
def test_a_film_of_a_finite_world_shows_the_state_it_is_in(tmp_path, monkeypatch):
    drawing = finite_world(4, ("north", "east", "south", "west"))
    axes = Figure().subplots()
    move = drawing.start(axes, SimpleNamespace(state=np.array([0, 1, 3])), None)
    for t, (x, y) in enumerate([(0, 1), (1, 0), (-1, 0)]):
        move(t)
        np.testing.assert_allclose(np.ravel(axes.lines[-1].get_data()), [x, y], atol=1e-12)
    assert [text.get_text() for text in axes.texts] == ["north", "east", "south", "west"]
    env, kernel = opened("loadunload-pomdp", max_steps_in_episode=5)
    written = films.save(kernel, env, tmp_path, title="Load/Unload", key=jr.key(0))
    assert [path.name for path in written] == ["rollout.png", "rollout.gif"]
    monkeypatch.setattr(films, "DRAWN", 3)  # this world is larger
    written = films.save(kernel, env, tmp_path, title="Load/Unload", key=jr.key(0))
    assert [path.name for path in written] == ["rollout.png"]


def test_a_panel_holds_internal_states_of_every_form():
    z = {"i": np.arange(3), "c": np.ones((3, 2)) * 1j}
    assert films._columns(z).tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 2]]
    assert films._columns(np.arange(3)).tolist() == [0, 1, 2]
    assert films._columns(()).size == films._columns(np.zeros((3, 0))).size == 0


@pytest.mark.slow
def test_a_brax_policy_is_played_on_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(films, "MOST", 3)
    env, kernel = opened("brax/inverted_pendulum", backend="positional")
    written = films.save(kernel, env, tmp_path, title="", key=jr.key(0))
    assert [path.name for path in written] == ["rollout.png", "rollout.gif", "rollout.html"]
    assert Image.open(written[1]).n_frames == 2  # of 0.02 s, faster than browsers show
    page = written[2].read_text()
    assert "<html>" in page
    assert len(page) > 1_000  # the compressed states


def test_other_environments_have_no_page(tmp_path):
    env, kernel = opened("CartPole-v1")
    films.save_page(jax.tree.map(lambda x: x[None], kernel), env, tmp_path)
    assert not list(tmp_path.iterdir())
