"""Figures that several results share: what is drawn is what was given."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from sbi_phys.plotting import results
from sbi_phys.plotting.style import PALETTE


def labels(ax):
    return [t.get_text() for t in ax.get_yticklabels()]


def test_forest_has_a_row_for_each_value_with_its_error():
    ax = results.forest(["a", "b"], [1.0, 2.0], [0.1, np.nan], line=0.5, xlabel="nats")
    points, _, (bars,) = ax.containers[0]
    assert points.get_xdata().tolist() == [1, 2] and points.get_ydata().tolist() == [1, 0]  # the first on top
    np.testing.assert_allclose([s[:, 0] for s in bars.get_segments()], [[0.9, 1.1], [2, 2]])
    assert labels(ax) == ["b", "a"] or labels(ax) == ["a", "b"]
    assert ax.get_xlabel() == "nats" and ax.lines[0].get_xdata() == [0.5, 0.5]


def test_intervals_end_where_they_are_closed():
    ax = results.intervals([1.0, -np.inf, np.nan], [2.0, 3.0, np.nan], ["a", "b", "c"], bands=np.array([0.5, 0.8, 1.0, 1.5, 2.5]))
    markers = [(line.get_marker(), float(line.get_xdata()[0])) for line in ax.lines if len(line.get_xdata()) == 1]
    assert markers[:2] == [("|", 1.0), ("|", 2.0)]
    assert markers[2][0] == "<" and markers[2][1] < 0.5 and markers[3] == ("|", 3.0)
    assert markers[4][0] == "x"  # empty
    assert ax.get_xlim()[0] < markers[2][1]


def test_rejected_pvalues_have_their_colour():
    ax = results.pvalue_rows({"fine": 0.4, "bad": 1e-8, "zero": 0.0})
    kept, rejected = ax.lines
    assert kept.get_xdata().tolist() == [0.4] and to_hex(kept.get_color()) == PALETTE[0].lower()
    assert rejected.get_xdata()[0] == 1e-8 and to_hex(rejected.get_color()) == PALETTE[1].lower()
    assert ax.get_xlim()[0] < 1e-8 and ax.get_xscale() == "log"


def test_chains_of_groups_are_averaged_in_blocks():
    steps = np.linspace(-1, 1, 1000)
    positions = np.stack([steps, steps, -steps, -steps])[:, :, None]
    ax = results.chains(positions, [0, 0, 1, 1])
    up, down = ax.lines
    assert len(up.get_xdata()) == 100
    np.testing.assert_allclose(up.get_ydata(), -down.get_ydata(), atol=1e-12)
    assert up.get_ydata()[-1] == pytest.approx(0.99 / np.std(steps), rel=1e-2)
    assert len(results.chains(np.zeros((3, 5, 2))).lines) == 6  # constant columns too


def test_marginals_are_normalised_with_weights():
    theta = np.random.default_rng(0).normal(3, 2, (20_000, 1))
    weights = np.exp(theta[:, 0] / 2)  # N(3, 4) times e^(x/2) is N(5, 4)
    ax = results.marginals(theta, ["a"], weights / weights.sum())
    density = ax.patches[-1].get_data()
    assert density.values.sum() * 0.2 == pytest.approx(1, abs=0.01)
    centres = (density.edges[:-1] + density.edges[1:]) / 2
    assert (density.values * centres).sum() * 0.2 == pytest.approx(0, abs=0.02)
    assert len(results.marginals(np.ones((5, 2)), ["a", "b"]).patches) == 0  # constant columns have no density


def test_bars_and_trace():
    ax = results.bars({"intact": 3, "missing": 1})
    assert [p.get_width() for p in ax.patches] == [3, 1]
    assert results.trace([1, 4, 9]).lines[0].get_xdata().tolist() == [0, 1, 2]
    assert results.trace([1, 4], at=[10, 20]).lines[0].get_xdata().tolist() == [10, 20]
    assert labels(results.forest([str(i) for i in range(50)], np.arange(50)))[0] not in ("0", "49")  # too many to name
