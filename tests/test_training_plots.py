"""Curves, and points where curves would lie on one another."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from spg.training import plots
from spg.training.plots import Curve, Final, interval, iqm

RNG = np.random.default_rng(0)


def curve(label, final, *, points=20, seeds=4):
    steps = np.arange(1.0, points + 1)
    returns = np.full((seeds, points), float(final)) + np.arange(seeds)[:, None]
    returns[:, : points - 2] = 0
    return Curve(label, steps, returns, steps[-1:], returns[:, -1:] + 1)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The axes of what is drawn by `learning_curve`."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: figures.append(figure))

    def draw(curves):
        plots.learning_curve(tmp_path / "x.png", curves, title="")
        return figures[-1].axes[0]

    return draw


def test_a_curve_of_one_update_shows_points(drawn):
    axes = drawn([curve("one", 5, points=1)])
    assert [line.get_marker() for line in axes.lines[:2]] == ["o", "o"]
    assert [line.get_markerfacecolor() for line in axes.lines[:2]] == ["C0", "none"]
    axes = drawn([curve("many", 5)])
    assert axes.lines[0].get_marker() == "None"


def test_up_to_eight_methods_are_curves(drawn):
    axes = drawn([curve(str(i), i) for i in range(8)])
    assert len(axes.lines) == 2 * 8 + 1
    assert {len(line.get_xdata()) for line in axes.lines[:16:2]} == {20}


def test_more_than_eight_methods_are_sorted_points_with_intervals(drawn):
    finals = RNG.permutation(15)
    axes = drawn([curve(f"method {i}", i) for i in finals])
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == [f"method {i}" for i in range(15)]  # the best on top
    *intervals, sampled, noise_free = axes.lines
    np.testing.assert_allclose(sampled.get_xdata(), np.arange(15) + 1.5)  # of the last tenth
    np.testing.assert_allclose(noise_free.get_xdata(), np.arange(15) + 2.5)
    for i, line in enumerate(intervals):
        low, high = interval(np.arange(4.0) + i)
        np.testing.assert_allclose(line.get_xdata(), [low, high])


def test_final_returns_write_a_picture(tmp_path):
    finals = [Final("a", 1.0, 0.5, 1.5, 2.0), Final("b", 2.0, 2.0, 2.0, 2.0)]
    plots.final_returns(tmp_path / "x.png", finals, measure="return", title="")
    assert (tmp_path / "x.png").stat().st_size > 1_000


def test_intervals_cover_the_statistic_of_the_sample():
    x = RNG.normal(size=(40, 3))
    for statistic, value in ((plots.TRIMMED_MEAN, iqm(x)), (np.mean, x.mean(0))):
        low, high = interval(x, statistic=statistic)
        assert ((low < value) & (value < high)).all()
    low, high = interval(x, statistic=np.mean)
    np.testing.assert_allclose(high - low, 2 * 1.96 * x.std(0) / np.sqrt(40), rtol=0.2)
    assert (interval(x[:1])[0] == x[0]).all()
