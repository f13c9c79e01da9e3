"""What is drawn of an observation: bands are the quantiles of the simulations, pulls and fractions those of their definitions."""

from dataclasses import dataclass

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.plotting import block_kind, features_figure, predictive_figure, prior_predictive_figure
from sbi_phys.plotting.observables import _OUT
from sbi_phys.priors import Observable

RNG = np.random.default_rng(0)
REPLICAS = RNG.normal(5.0, 2.0, (200, 12))
DATA = np.linspace(3.0, 7.0, 12)
BINS = Observable("n", 12, kind="counts", edges=tuple(np.linspace(0, 60, 13)), edges_unit="deg")


@dataclass(frozen=True)
class Shaped:
    """An observable with a shape."""

    name: str
    shape: tuple[int, ...]
    unit: str = ""
    latex: str = ""
    kind: str = "real"
    edges: tuple[float, ...] = ()
    edges_unit: str = ""

    @property
    def size(self):
        return int(np.prod(self.shape))


def texts(legend):
    return [t.get_text() for t in legend.get_texts()]


def points(ax):
    """All points of an axes without a line -> x, y, in the order of x."""
    found = np.concatenate([line.get_xydata() for line in ax.lines if line.get_linestyle() == "None"])
    return found[np.argsort(found[:, 0])].T


def events(n, rng, n_max=30):
    x = np.zeros((n, n_max, 3))
    for row, m in zip(x, rng.integers(0, n_max, n), strict=True):
        row[:m, :2], row[:m, 2] = rng.normal(size=(m, 2)), 1.0
    return x


def test_a_block_is_drawn_as_what_it_holds():
    sets = events(50, np.random.default_rng(1)).reshape(50, -1)
    cases = {
        "histogram": (BINS, None),
        "vector": (Observable("x", 12), None),
        "trace": (Shaped("x", (2, 128)), RNG.normal(size=(5, 256))),
        "image": (Shaped("x", (16, 16)), RNG.normal(size=(5, 256))),
        "set": (Shaped("x", (30, 3)), sets),
    }
    assert {kind: block_kind(*case) for kind, case in cases.items()} == {kind: kind for kind in cases}
    assert block_kind(Observable("x", 200)) == "trace"
    assert block_kind(Observable("x", 200, kind="counts")) == "histogram"
    assert block_kind(Shaped("x", (3, 16, 16))) == "image"
    broken = sets.copy().reshape(50, 30, 3)
    broken[0, -1, 0] = 1.0  # a value in an empty slot
    assert block_kind(Shaped("x", (30, 3)), broken.reshape(50, -1)) == "image"


def test_bins_have_the_quantiles_as_bands_and_pulls_below():
    fig = predictive_figure(BINS, DATA, REPLICAS)
    top, bottom = fig.axes
    wide, narrow, middle = top.patches[:3]
    low, lower, median, upper, high = np.quantile(REPLICAS, [0.025, 0.16, 0.5, 0.84, 0.975], axis=0)
    for patch, value, base in ((wide, high, low), (narrow, upper, lower)):
        np.testing.assert_allclose(patch.get_data().values, value)
        np.testing.assert_allclose(patch.get_data().baseline, base)
        np.testing.assert_array_equal(patch.get_data().edges, BINS.edges)
    np.testing.assert_allclose(middle.get_data().values, median)
    x, y = points(top)
    np.testing.assert_allclose(x, np.arange(12) * 5 + 2.5)
    np.testing.assert_array_equal(y, DATA)
    np.testing.assert_allclose(points(bottom)[1], (DATA - REPLICAS.mean(axis=0)) / REPLICAS.std(axis=0))
    assert bottom.get_xlabel() == "n bins [deg]" and top.get_ylabel() == "n per bin"
    assert texts(fig.legends[0]) == ["data", "95 % of the posterior predictive", "68 %", "median"]
    assert top.get_ylim()[0] == 0 and top.get_yscale() == "linear"


def test_a_steep_spectrum_has_logarithmic_axes_and_open_bins_are_named():
    edges = tuple(np.geomspace(0.1, 100, 13))
    expected = 1e4 * np.array(edges[:-1]) ** -1.5
    counts = RNG.poisson(expected, (100, 12))
    top, bottom = predictive_figure(Observable("n", 12, kind="counts", edges=edges, edges_unit="TeV"), counts[0], counts).axes
    assert (top.get_xscale(), top.get_yscale()) == ("log", "log")
    np.testing.assert_allclose(points(top)[0], np.sqrt(np.array(edges[1:]) * edges[:-1]))
    opened = Observable("n", 3, kind="counts", edges=(0, 1, 3, np.inf))
    top, bottom = predictive_figure(opened, [1, 1, 1], np.ones((30, 3)) + RNG.poisson(1, (30, 3))).axes
    assert top.get_xlim() == (0, 5) and bottom.get_xlabel() == "n bins (last bin open)"


def test_the_prior_panel_has_the_fraction_of_simulations_below_and_marks_what_is_outside_all():
    data = DATA.copy()
    data[4] = REPLICAS[:, 4].max() + 1
    bottom = prior_predictive_figure(BINS, data, REPLICAS).axes[1]
    np.testing.assert_allclose(points(bottom)[1], (data > REPLICAS).mean(axis=0))
    red = [line.get_xydata() for line in bottom.lines if line.get_color() == _OUT]
    np.testing.assert_allclose(np.concatenate(red), [[22.5, 1.0]])


def test_missing_values_leave_gaps():
    data, replicas = DATA.copy(), REPLICAS.copy()
    data[2], replicas[:, 7], replicas[:100, 3] = np.nan, np.nan, np.nan
    fig = predictive_figure(BINS, data, replicas)
    pull = points(fig.axes[1])[1]
    known = [j for j in range(12) if j not in (2, 7)]
    np.testing.assert_allclose(pull, (data[known] - np.nanmean(replicas[:, known], axis=0)) / np.nanstd(replicas[:, known], axis=0))


def test_values_of_unequal_size_share_an_axis_in_their_own_widths():
    scale = np.geomspace(1e-3, 1e3, 12)
    top = predictive_figure(Observable("x", 12), DATA * scale, REPLICAS * scale).axes[0]
    _, lower, median, upper, _ = np.quantile(REPLICAS, [0.025, 0.16, 0.5, 0.84, 0.975], axis=0)
    np.testing.assert_allclose(points(top)[1], (DATA - median) / ((upper - lower) / 2))
    assert "half 68 % range" in top.get_ylabel()
    assert "half 68 % range" not in predictive_figure(Observable("x", 12), DATA, REPLICAS).axes[0].get_ylabel()


def test_a_short_vector_has_a_panel_for_each_column():
    data = np.array([5.0, 50.0, 4.0, np.nan])
    fig = predictive_figure(Observable("x", 4, unit="m"), data, REPLICAS[:, :4])
    assert [ax.get_xlabel() for ax in fig.axes] == [f"x[{j}] [m]" for j in range(4)]
    pull = (data - REPLICAS[:, :4].mean(axis=0)) / REPLICAS[:, :4].std(axis=0)
    assert [ax.get_title() for ax in fig.axes] == [f"pull {p:+.2f}".replace("-", "−") for p in pull[:3]] + ["no value"]
    assert fig.axes[1].lines[0].get_xdata() == [50.0, 50.0] and fig.axes[1].lines[0].get_color() == _OUT
    assert not fig.axes[3].lines
    below = prior_predictive_figure(Observable("x", 4), data, REPLICAS[:, :4]).axes[0].get_title()
    assert below == f"{100 * (REPLICAS[:, 0] < 5).mean():.3g} % below"


def test_a_trace_is_a_line_over_the_band_of_each_channel():
    camera = Shaped("adc", (2, 100), unit="mV")
    rows = RNG.normal(size=(150, 200))
    fig = predictive_figure(camera, rows[0], rows[1:])
    assert len(fig.axes) == 4
    assert [fig.axes[k].get_ylabel() for k in (0, 2)] == ["adc [mV]\nchannel 0", "adc [mV]\nchannel 1"]
    line = next(line for line in fig.axes[2].lines if line.get_label() == "data")
    np.testing.assert_array_equal(line.get_ydata(), rows[0, 100:])
    np.testing.assert_array_equal(line.get_xdata(), np.arange(100))
    band = fig.axes[2].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(np.quantile(rows[1:, 100:], 0.975, axis=0).max())
    assert fig.axes[3].get_xlabel() == "sample"
    many = predictive_figure(Shaped("adc", (7, 100)), np.zeros(700), RNG.normal(size=(20, 700)))
    assert len(many.axes) == 8 and many.axes[-1].get_xlabel() == "sample; channels 0 to 3 of 7"


def test_an_image_has_data_mean_and_pulls_with_dead_pixels_grey():
    rows = RNG.normal(3.0, 1.0, (100, 8, 16))
    rows[:, 2, 5], rows[:, 6, 6] = 0.0, 0.0
    data = rows[0].copy()
    data[6, 6] = 4.0  # a pixel that never has a value in the simulations
    fig = predictive_figure(Shaped("camera", (8, 16), unit="p.e."), data.ravel(), rows[1:].reshape(99, -1))
    shown, mean, pull = (ax.images[0].get_array() for ax in fig.axes[:3])
    np.testing.assert_array_equal(shown, data)
    np.testing.assert_allclose(mean, rows[1:].mean(axis=0))
    assert pull.mask[2, 5] and pull.mask.sum() <= 2
    good = rows[1:].std(axis=0) > 0
    np.testing.assert_allclose(np.asarray(pull)[good], ((data - rows[1:].mean(axis=0))[good] / rows[1:].std(axis=0)[good]))
    crosses = fig.axes[2].lines[0].get_xydata()
    assert [6.0, 6.0] in crosses.tolist()
    assert texts(fig.legends[0]) == ["|pull| > 5", "constant or without a value"]
    assert [ax.get_title() for ax in fig.axes[:3]] == ["data", "mean of the posterior predictive", "pull"]
    prior = prior_predictive_figure(Shaped("camera", (8, 16)), data.ravel(), rows[1:].reshape(99, -1))
    fraction = prior.axes[2].images[0].get_array()
    np.testing.assert_allclose(np.asarray(fraction)[good], (rows[1:] < data).mean(axis=0)[good])
    assert len(predictive_figure(Shaped("rgb", (3, 8, 8)), np.zeros(192), RNG.normal(size=(20, 192))).axes) == 18


def test_a_set_has_a_histogram_of_each_column_and_the_number_of_events():
    rows = events(60, np.random.default_rng(2))
    data = rows[0].ravel()
    fig = predictive_figure(Shaped("events", (30, 3)), data, rows[1:].reshape(59, -1))
    assert [ax.get_xlabel() for ax in fig.axes] == ["events, column 0", "events, column 1", "number of events"]
    m = int(rows[0, :, 2].sum())
    assert points(fig.axes[0])[1].sum() == m
    assert fig.axes[2].lines[0].get_xdata() == [m, m]
    edges = fig.axes[0].patches[0].get_data().edges
    counts = np.stack([np.histogram(row[: int(row[:, 2].sum()), 0], edges)[0] for row in rows[1:]])
    np.testing.assert_allclose(fig.axes[0].patches[0].get_data().values, np.quantile(counts, 0.975, axis=0))
    empty = np.zeros((30, 3))
    assert points(predictive_figure(Shaped("events", (30, 3)), empty, rows.reshape(60, -1)).axes[0])[1].sum() == 0


def test_features_say_how_many_lie_outside():
    simulated = RNG.normal(size=(80, 6))
    observed = np.array([0.0, 0.1, -0.2, 0.0, 30.0, 0.0])
    fig = features_figure({"inputs": (observed, simulated), "features": (observed[:4], simulated[:, :4])}, {"inputs": [("a", 0), ("b", 3)]})
    assert [ax.get_title(loc="right") for ax in fig.axes] == ["1 of 6 outside all 80 simulations", "all 4 within the simulations"]
    z = (observed - simulated.mean(axis=0)) / simulated.std(axis=0)
    np.testing.assert_allclose(fig.axes[0].lines[0].get_ydata(), np.delete(z, 4))
    assert [t.get_text() for t in fig.axes[0].texts] == ["a", "b"]
    arrow = [line for line in fig.axes[0].lines if line.get_marker() == "^" and len(line.get_xdata())]
    assert arrow[0].get_xdata().tolist() == [4]
    assert arrow[0].get_color() == _OUT
    rare = np.append(np.zeros(199), 1.0)[:, None]  # 14 sd from the mean, and within the simulations
    ax = features_figure({"mask": ([1.0], rare)}).axes[0]
    assert [line.get_color() for line in ax.lines if line.get_marker() == "^" and len(line.get_xdata())] == ["black"]


@pytest.mark.parametrize(
    ("x", "rows", "error", "message"),
    [
        (DATA[:5], REPLICAS, ShapeError, "x_obs has shape"),
        (DATA, REPLICAS[:, :5], ShapeError, "replicas has shape"),
        (DATA, REPLICAS[:19], DataError, "19 simulations; expected at least 20"),
    ],
)
def test_wrong_arrays_are_refused(x, rows, error, message):
    with pytest.raises(error, match=message):
        predictive_figure(BINS, x, rows)


def test_no_panels_are_refused():
    with pytest.raises(DataError, match="panels is empty"):
        features_figure({})
