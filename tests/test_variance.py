import csv

import numpy as np
import pytest

from scripts.benchmarks import variance
from spg.estimators.bounds import Constants, bptt_variance_bound, s2pg_variance_bound

pytestmark = pytest.mark.slow

DECAYS = (0.5, 0.9, 1.1)
LENGTHS = (8, 24, 64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The script's directory after a small run."""
    out = tmp_path_factory.mktemp("variance") / "run"
    config = variance.Config(
        out=str(out), decays=DECAYS, lengths=LENGTHS, num_trajectories=1000, num_seeds=2
    )
    variance.main(config)
    return out


@pytest.fixture(scope="module")
def rows(run):
    with (run / "variance.csv").open() as file:
        table = list(csv.DictReader(file))
    kinds = variance.Row.__annotations__.items()
    return [variance.Row(**{name: kind(row[name]) for name, kind in kinds}) for row in table]


def curve(rows, method, decay):
    """Variance over T, without the growth of the squared return: (Σ_t γ^t)² = T² at γ = 1."""
    points = [r for r in rows if (r.method, r.decay) == (method, decay)]
    return np.array([
        np.mean([r.variance for r in points if r.num_steps == n]) / n**2 for n in LENGTHS
    ])  # fmt: skip


def slopes(rows, method, decay):
    """d log Var / d log T between neighbouring lengths."""
    return np.diff(np.log(curve(rows, method, decay))) / np.diff(np.log(LENGTHS))


def test_measured_variances_stay_below_the_bounds(rows):
    assert len(rows) == 2 * len(DECAYS) * len(LENGTHS) * 2
    for row in rows:
        assert 0 < row.variance < row.bound


@pytest.mark.parametrize("decay", DECAYS)
def test_variance_of_s2pg_is_linear_in_the_length(rows, decay):
    """Theorem 3.5: linear whatever |dz'/dz| is; within sampling error of 2000 trajectories."""
    assert np.allclose(slopes(rows, "S2PG", decay), 1, atol=0.25)


def test_variance_of_bptt_is_polynomial_where_the_state_forgets(rows):
    """Theorem 3.4, Z = ½: Z̃ and Z̄ are linear in T."""
    assert np.allclose(slopes(rows, "BPTT", 0.5), 1, atol=0.3)


def test_variance_of_bptt_is_exponential_where_the_state_grows(rows):
    """Theorem 3.4, Z = 1.1: Z̄ grows as Z^{2T}, so the slope in log T keeps growing with T."""
    slope = slopes(rows, "BPTT", 1.1)
    assert slope[1] > slope[0] + 1
    growth = np.diff(np.log(curve(rows, "BPTT", 1.1)))[-1] / (LENGTHS[-1] - LENGTHS[-2])
    assert np.isclose(growth, 2 * np.log(1.1), rtol=0.2)


def test_s2pg_beats_bptt_by_more_the_longer_the_episode(rows):
    ratio = curve(rows, "BPTT", 1.1) / curve(rows, "S2PG", 1.1)
    assert (ratio > 1).all()
    assert (np.diff(ratio) > 0).all()


def test_bounds_are_the_sums_of_the_theorems():
    """Every term written out: T = 3, γ = ½, Z = 2: Z̃ = 0 + 1 + 3 = 4, Z̄ = 0 + 1 + 9 = 10."""
    c = Constants(
        reward=3.0, action_by_params=2.0, z_by_params=5.0, action_by_z=7.0, z_by_z=2.0,
        action_precision=0.5, z_precision=4.0,
    )  # fmt: skip
    setting = {"gamma": 0.5, "num_steps": 3, "num_trajectories": 10}
    scale = 3**2 * 0.5 * 1.75**2 / 10
    bptt = scale * (3 * 2**2 + 2 * 2 * 5 * 7 * 4 + 5**2 * 7**2 * 10)
    assert np.isclose(bptt_variance_bound(c, **setting), bptt)
    assert np.isclose(s2pg_variance_bound(c, **setting), scale * (3 * 2**2 + 3 * 5**2 * 4 / 0.5))


def test_script_leaves_table_and_picture_and_overwrites_nothing(run):
    files = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    assert set(files) == {"config.json", "variance.csv", "variance.png"}
    with pytest.raises(variance.records.RunError, match="holds a run"):
        variance.main(variance.Config(out=str(run)))
    assert files == {path.name: path.stat().st_mtime_ns for path in run.iterdir()}


def test_seeds_are_independent(rows):
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert first[:3] == second[:3]
        assert first.variance != second.variance
