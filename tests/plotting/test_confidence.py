"""Figures of confidence sets and their coverage, from arrays with known answers."""

import numpy as np
import pytest

from sbi_phys.confidence import coverage_map
from sbi_phys.core.errors import DataError
from sbi_phys.plotting.confidence import coverage_figure, limits_figure

RNG = np.random.default_rng(0)


def texts(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


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
    assert titles[0].startswith("sets of 90 %") and "error of the coverage" in titles[1] and "Wilks, 90 %" in titles[2]
    mine, theirs = (figure.axes[i].collections[0] for i in (0, 2))
    assert mine.get_clim() == theirs.get_clim() and mine.get_clim()[1] <= 1.0
    line = [{0.9: coverage_map(theta[:, 0], inside, 0.9, names=["a"])} for inside in (own, wilks)]
    (ax,) = coverage_figure(*line).axes
    assert texts(ax)[0].startswith("Wilks, ") and "on average" in texts(ax)[1] and ax.get_xlabel() == "a"
    with pytest.raises(DataError, match="expected the same"):
        coverage_figure(maps[0], {})
