"""The picture of a run in `PointMass` or `Doors` shows where the policy went, and how it ended."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import spg
from spg import envs
from spg.envs.point_mass import DoorsState, PointMassState
from spg.training import films
from spg.training.paths import PATHS, Episode


def walked(kind, position, **fields):
    """An episode of T = 3 steps."""
    flags = {"crashed": np.zeros(3, bool), "time": np.arange(3)}
    constant = {name: np.tile(np.array(value, float), (3, 1)) for name, value in fields.items()}
    return kind(position=np.array(position, float), **constant, **flags)


def test_paths_have_the_colour_of_their_goal_and_crosses_where_they_end():
    way = [(25, 15), (26, 16), (27, 17)]
    one = walked(PointMassState, way, start=(25, 15), goal=(25, 130))
    other = walked(PointMassState, way[::-1], start=(25, 15), goal=(120, 130))
    figure = Figure()
    episodes = [Episode(one, True, False), Episode(other, False, True)]
    PATHS["PointMass-memory"].draw(figure, envs.PointMass(), episodes)
    lines = figure.axes[0].lines[4:]  # after the four starts
    assert [line.get_color() for line in lines] == ["C0", "C3", "C3"]
    np.testing.assert_array_equal(np.stack(lines[0].get_data(), 1), way)
    assert np.ravel(lines[2].get_data()).tolist() == [25, 15]
    assert lines[2].get_marker() == "x"


def test_walls_stand_where_they_are_touched_and_colours_tell_the_outcome():
    doors = walked(DoorsState, [(75, 10), (75, 12), (75, 14)], edges=(20, 90))
    outcomes = [(True, False), (False, False), (False, True), (True, True)]
    figure = Figure()
    episodes = [Episode(doors, *outcome) for outcome in outcomes]
    PATHS["Doors-memory"].draw(figure, envs.Doors(), episodes)
    colours = [axes.lines[1].get_color() for axes in figure.axes]  # after the start
    assert colours == ["C0", "C1", "C3", "C0"]
    bars = [p for p in figure.axes[0].patches if p.get_height() == 5.0]
    assert [(*p.get_xy(), p.get_width()) for p in bars] == [
        (0, 57.5, 20), (60, 57.5, 90), (0, 87.5, 90), (130, 87.5, 20),
    ]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_run_exports_its_paths(name, tmp_path, monkeypatch):
    """Of a policy that has not learned."""
    env = envs.make(name, privileged=True, max_steps_in_episode=5)
    small = spg.PolicyConfig(memory="none", hidden=(2,))
    shapes = jax.eval_shape(
        lambda key: spg.make_kernel(small, env.spec, key=key), jax.random.key(0)
    )
    kernels = jax.tree.map(lambda x: jnp.zeros((1, *x.shape), x.dtype), shapes)
    shown = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **words: shown.append(path))
    monkeypatch.setattr(
        Figure, "suptitle", lambda figure, text, **words: shown.append(text.split(": ")[1])
    )
    films.save_page(kernels, env, Path(tmp_path))
    count = PATHS[name].num_episodes
    assert shown == [f"0 of {count} episodes reach the goal", tmp_path / "paths.png"]
