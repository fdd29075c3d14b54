"""The ascents of k-step gradients: every method, its files, and what is refused."""

import csv
from dataclasses import replace

import jax
import jax.random as jr
import numpy as np
import pytest

from scripts import kstep
from spg.training.records import RunError

TINY = kstep.Config(k=(1, 8), num_runs=3, num_updates=4, num_episodes=8, num_steps=20)


def read(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_gap_falls_with_k_below_the_bound(tmp_path, capsys):
    """The default, of fewer worlds: its table, its picture, and that it is not overwritten."""
    config = kstep.Config(num_runs=5, k=(1, 4, 16), out=str(tmp_path / "run"))
    kstep.main(config)
    rows = read(tmp_path / "run" / "gap.csv")
    assert [row["k"] for row in rows] == [1, 4, 16]
    assert all(row["worst gap"] < row["bound"] for row in rows)
    assert rows[0]["worst gap"] > 1 > rows[1]["worst gap"] > 0.05 > rows[2]["worst gap"]
    ascent = read(tmp_path / "run" / "ascent.csv")
    assert [row["update"] for row in ascent] == list(range(301))
    assert ascent[-1]["k=4"] == rows[1]["worst gap"]
    assert (tmp_path / "run" / "gap.png").stat().st_size > 0
    assert "worst gap" in capsys.readouterr().out
    with pytest.raises(RunError, match="holds a run; another --out starts afresh"):
        kstep.main(config)


@pytest.mark.parametrize(
    ("problem", "method", "gradient"),
    [
        ("twostate", "projected", "exact"),
        ("matching", "mixture", "exact"),
        pytest.param("aggregated", "mixture", "sampled", marks=pytest.mark.slow),
        pytest.param("chain", "mirror", "sampled", marks=pytest.mark.slow),
    ],
)
def test_every_method_runs(problem, method, gradient, tmp_path):
    out = tmp_path / "run"
    words = {"problem": problem, "method": method, "gradient": gradient, "out": str(out)}
    kstep.main(replace(TINY, **words))
    assert np.isfinite([list(row.values()) for row in read(out / "gap.csv")]).all()


@pytest.mark.slow
def test_policies_too_many_to_list_are_ascended_by_samples(tmp_path):
    """Matching with m = 3, 3^8 policies: the gap is to full sight, where both agents go up."""
    out = tmp_path / "run"
    config = replace(
        TINY, problem="matching", problem_params={"m": 3.0}, method="mixture", gradient="sampled",
        k=(1, 4), num_runs=2, num_updates=2, out=str(out),
    )  # fmt: skip
    kstep.main(config)
    best = 0.3 + 0.9**3 / (1 - 0.9)  # .3 for the first step, and 1 in every step from the third on
    rows = read(out / "gap.csv")
    assert all(0 < row["gap at the start"] < best for row in rows)
    with pytest.raises(ValueError, match=r"3\^8 deterministic policies; .* by sampled gradients"):
        kstep.main(replace(config, gradient="exact"))


def test_gradient_and_return_of_samples_are_the_exact_ones():
    """Of a mixture of two in matching with m = 2, within four standard errors of 16 batches."""
    config = replace(
        TINY, problem="matching", method="mixture", gradient="sampled", num_components=2,
        num_episodes=64, num_steps=80,
    )  # fmt: skip
    world, k = kstep.open_world(config), 3
    params, _ = kstep.init(config, world, jr.key(0))
    one = lambda key: kstep.sampled_softmax(config, world, k, params, key)
    found = jax.jit(jax.vmap(one))(jr.split(jr.key(1), 16))
    exact = kstep.evaluate(replace(config, gradient="exact"), world, k, params, jr.key(0))
    for batches, truth in zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True):
        error = np.std(batches, 0, ddof=1) / 4
        assert (np.abs(np.mean(batches, 0) - truth) < 4.5 * error + 1e-3).all()


@pytest.mark.slow
def test_large_worlds_run_by_products(tmp_path):
    config = replace(
        TINY, problem="cartpole", problem_params={"bins": 5.0}, num_runs=1, num_updates=1,
        out=str(tmp_path / "run"),
    )  # fmt: skip
    kstep.main(config)
    rows = read(tmp_path / "run" / "gap.csv")
    assert all(0 < row["worst gap"] < row["bound"] for row in rows)


@pytest.mark.slow
def test_sampled_gradients_leave_the_trap_if_held_for_8_steps(tmp_path):
    """Of the product class, from the uniform policy."""
    out = tmp_path / "run"
    config = kstep.Config(
        problem="chain", method="product", gradient="sampled", k=(1, 8), start_std=0.0,
        num_runs=3, num_updates=150, num_episodes=32, num_steps=60, out=str(out),
    )  # fmt: skip
    kstep.main(config)
    one, eight = read(out / "gap.csv")
    assert one["median gap"] > 3
    assert eight["worst gap"] < 0.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"k": (0, 2)}, r"k is 0; it has to be at least 1"),
        ({"k": (2, 2)}, r"k is \(2, 2\)"),
        ({"gamma": 1.5}, "gamma is 1.5; it has to be at least 0 and below 1"),
        ({"problem_params": {"length": 2.0}}, "aggregated has no parameter 'length'; choose from"),
        ({"problem": "twostate", "problem_params": {"n": 2.0}}, "no parameter 'n'; choose from"),
        ({"problem": "chain", "problem_params": {"n": 0.0}}, "n is 0; it has to be at least 1"),
        (
            {"problem": "matching", "problem_params": {"m": 4.0}},
            "matching-4 has 3\\^10 deterministic policies; 5,000 can be listed",
        ),
        ({"num_episodes": 1}, "num_episodes is 1"),
    ],
)
def test_what_cannot_run_is_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        kstep.main(replace(kstep.Config(out=str(tmp_path / "run")), **words))
    assert not (tmp_path / "run").exists()
