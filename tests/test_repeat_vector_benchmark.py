"""The comparison on `RepeatVector`: what is trained, and what a regression reads off a memory."""

import csv

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from conftest import assert_trees_close

from scripts import sac
from scripts.benchmarks import repeat_vector
from scripts.benchmarks.repeat_vector import Config, arms, explained, with_noise
from spg.kernels.factory import make_kernel
from spg.types import Spec

KEY = jr.key(0)


def test_a_regression_explains_what_is_not_noise_and_nothing_where_there_is_nothing():
    keys = jr.split(KEY, 3)
    x, noise = jr.normal(keys[0], (4000, 5)), jr.normal(keys[1], (4000, 2))
    y = 3.0 + x[:, :2] + 2.0 * noise  # variance 1 of 5
    np.testing.assert_allclose(explained(x, y), 0.2, atol=0.03)
    np.testing.assert_allclose(explained(10 * x - 7, y), explained(x, y), rtol=1e-3)
    np.testing.assert_allclose(explained(x, 3.0 + x @ np.ones((5, 2))), 1.0, atol=1e-4)
    assert -0.02 < explained(jr.normal(keys[2], (4000, 5)), y) < 0.01
    assert explained(jnp.zeros((4000, 0)), y) == 0


def test_cells_are_compared_with_the_noise_that_s2pg_starts_with():
    spec = Spec(4, 5, 2, discrete=False)
    make = lambda memory: make_kernel(sac.Config(memory=memory, state_std=0.3), spec, key=KEY)
    drawn, computed = make("s2pg"), make("bptt")
    quiet = eqx.tree_at(lambda k: k.cell.distribution.log_std, drawn, jnp.full(16, -9.0))
    for kernel in (drawn, quiet, computed):  # the same key, the same location
        assert_trees_close(with_noise(kernel, 0.3).cell, drawn.cell)


def test_cells_are_trained_at_every_rate_and_the_untrained_one_once():
    found = arms(Config(state_learning_rates=(1e-4, 1e-3)))
    trained = [f"{m}, {r}" for m in repeat_vector.TRAINED for r in (0.0001, 0.001)]
    assert [name for name, _ in found] == ["oracle", "none", "untrained", *trained]
    words = dict(found)
    assert words["untrained"] == {"state_learning_rate": 0.0}
    assert words["Q(s, a, z'), 0.001"] == {"critic_state": True, "state_learning_rate": 1e-3}
    with pytest.raises(ValueError, match=r"unknown methods .'GRU'.; choose from oracle, none"):
        arms(Config(methods=("none", "GRU")))


@pytest.mark.long
def test_the_comparison_leaves_a_table_and_a_picture(tmp_path):
    config = Config(methods=("none", "untrained"), num_seeds=2, total_steps=512, out=str(tmp_path))
    rows = repeat_vector.main(config)
    assert [row["method"] for row in rows] == ["none", "untrained"]
    assert float(rows[1]["cue_at_first"]) > 0.5  # seen a moment ago
    assert float(rows[1]["cue_at_query"]) < 0.5
    with (tmp_path / "repeat_vector.csv").open(newline="") as file:
        assert list(csv.DictReader(file)) == [{k: str(x) for k, x in row.items()} for row in rows]
    assert (tmp_path / "repeat_vector.png").stat().st_size > 0
