"""Figures of methods, ratios and confidence sets: what stands in them, from arrays with known answers."""

import numpy as np
import pytest

from sbi_phys.calibration import reliability
from sbi_phys.confidence import coverage_map
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.plotting.limits import coverage_figure, limits_figure
from sbi_phys.plotting.posterior import PairRatios, methods_figure, ratios_figure
from sbi_phys.priors import Parameter

PARAMETERS = [Parameter("a", latex=r"\alpha"), Parameter("b")]
RNG = np.random.default_rng(0)
EXACT = RNG.standard_normal((1000, 2))


def texts(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_contours_over_the_exact_ones():
    figure = methods_figure({"NPE": EXACT + 1, "NLE": EXACT * 1.1}, PARAMETERS, ("exact", EXACT), truth=[0.0, 0.5])
    plane, top, right, legend = figure.axes
    assert texts(legend) == ["exact", "NPE", "NLE", "truth"]
    assert (plane.get_xlabel(), plane.get_ylabel()) == (PARAMETERS[0].label, PARAMETERS[1].label)
    assert plane.get_xlim() == top.get_xlim() and plane.get_ylim() == right.get_ylim()
    assert len(plane.collections) == 3  # one filled, two of lines
    (peak,) = (line for line in top.lines if line.get_color() == "#0072B2")
    assert abs(peak.get_xdata()[np.argmax(peak.get_ydata())] - 1) < 0.35  # moved by 1


def test_a_mode_far_away_is_left_out_of_view_and_said():
    far = np.concatenate([EXACT[:250], EXACT[:750] + 40])
    plane, *_, legend = methods_figure({"NPE": far, "NLE": EXACT + 1}, PARAMETERS, ("exact", EXACT)).axes
    assert plane.get_xlim()[1] < 12 and texts(legend)[1:] == ["NPE\n(75 % out of view)", "NLE"]
    assert len(plane.collections) == 2  # most of the first is not there to be drawn


def test_where_nothing_lies_near_the_exact_draws_all_is_in_view():
    plane, *_, legend = methods_figure({"NPE": EXACT + 40}, PARAMETERS, ("exact", EXACT)).axes
    assert plane.get_xlim()[1] > 40 and plane.get_xlim()[0] < 0
    assert texts(legend) == ["exact", "NPE"] and len(plane.collections) == 2


def test_one_parameter_and_too_many_sets():
    figure = methods_figure({"NPE": EXACT[:, :1]}, PARAMETERS[:1])
    assert len(figure.axes) == 1 and texts(figure.axes[0]) == ["NPE"]
    with pytest.raises(SettingError, match="5 sets; expected at most 4"):
        methods_figure({str(i): EXACT for i in range(5)}, PARAMETERS)
    with pytest.raises(ShapeError, match="NPE"):
        methods_figure({"NPE": EXACT[:, :1]}, PARAMETERS)


def test_ratios_on_the_diagonal_with_what_is_out_of_view_said():
    exact = RNG.normal(3, 1, 60)
    curve = reliability(RNG.normal(1, 1, 200), RNG.normal(-1, 1, 200), n_bins=5)
    pairs = PairRatios(exact, exact + 0.5, np.append(exact - 4, -1e4), np.append(exact - 4, -1e4), curve)
    assert pairs.rms == pytest.approx(0.5)
    figure = ratios_figure({"NRE": pairs, "NLE": PairRatios(exact, exact, np.zeros(0), np.zeros(0))})
    first, second, last = figure.axes
    assert "rms 0.50 nats" in texts(first)[1] and "of 61 in view" in texts(first)[0] and first.get_xlim()[0] > -20
    assert "rms 0.00 nats" in texts(second)[0] and "NRE: p = " in texts(last)[0]
    one_off = exact.copy()
    one_off[0] = -80
    (ax,) = ratios_figure({"NLE": PairRatios(exact, one_off, np.zeros(0), np.zeros(0))}).axes
    assert ax.get_ylim()[0] > -5 and texts(ax)[-1] == "1 beyond"
    with pytest.raises(DataError, match="found is empty"):
        ratios_figure({})


def test_sets_along_one_parameter_look_at_what_matters():
    x = np.linspace(-50, 50, 801)
    figure = limits_figure([x], x**2, {0.9: np.full(x.size, 3.0), 0.683: np.full(x.size, 1.1)}, {0.9: 2.7, 0.683: 1.0}, ["a"])
    (ax,) = figure.axes
    assert -5 < ax.get_xlim()[0] < -2 and texts(ax).count("Wilks, 90 %") == 1
    assert ax.get_ylim()[1] < 10
    with pytest.raises(DataError, match=r"q has shape \(3,\) over 1 axes"):
        limits_figure([x], np.zeros(3), {0.9: x}, {0.9: 2.7}, ["a"])


def test_joint_sets_are_drawn_around_the_set():
    x = np.linspace(-10, 10, 81)
    q = x[:, None] ** 2 + x[None] ** 2
    (ax,) = limits_figure([x, x], q, {0.9: np.full(q.shape, 5.0)}, {0.9: 4.6}, ["a", "b"]).axes
    assert texts(ax) == ["set, 90 %", "Wilks, 90 %"] and -8 < ax.get_xlim()[0] < -2


def test_coverage_of_one_and_of_two_parameters():
    theta = RNG.uniform(0, 1, (2000, 2))
    own, wilks = RNG.uniform(size=2000) < 0.9, RNG.uniform(size=2000) < 0.7 + 0.2 * theta[:, 0]
    maps = [{0.9: coverage_map(theta, inside, 0.9, names=["a", "b"])} for inside in (own, wilks)]
    figure = coverage_figure(*maps)
    titles = [ax.get_title() for ax in figure.axes]
    assert titles[0].startswith("sets of 90 %") and "error of that map" in titles[1] and "Wilks, 90 %" in titles[2]
    mine, theirs = (figure.axes[i].collections[0] for i in (0, 2))
    assert mine.get_clim() == theirs.get_clim() and mine.get_clim()[1] <= 1.0
    line = [{0.9: coverage_map(theta[:, 0], inside, 0.9, names=["a"])} for inside in (own, wilks)]
    (ax,) = coverage_figure(*line).axes
    assert texts(ax)[0].startswith("Wilks, ") and "on average" in texts(ax)[1] and ax.get_xlabel() == "a"
    with pytest.raises(DataError, match="expected the same"):
        coverage_figure(maps[0], {})
