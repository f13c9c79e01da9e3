"""Figures of unfolding: of several methods, and of the report of `validate`; each has the panels and the content of its result."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.plotting import unfolding as figures
from sbi_phys.plotting.style import save_figure
from sbi_phys.unfold.validation import Validation, validate
from tests.unfold import validation_oracle as oracle

EDGES = np.linspace(18.4, 19.4, 11)

CENTRE = (EDGES[1:] + EDGES[:-1]) / 2

J = 1e-18 * 10 ** (-3 * (CENTRE - 18.5))

ERRORS = np.stack([0.02 * J, 0.03 * J])


def flux(**changes):
    return {"one": (J, ERRORS), "another": (1.02 * J, ERRORS)} | changes


def labels(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


def test_flux_and_ratio_hold_every_method(tmp_path):
    far = J.copy()
    far[3] *= 1.5  # beyond the ratio's range: an arrow at the edge
    fig = figures.flux_figure(EDGES, flux(third=(far, ERRORS)), (J, ERRORS), unit="km$^{-2}$")
    top, bottom = fig.axes
    assert labels(top) == ["published", "one", "another", "third"]
    assert bottom.get_ylim() == (0.93, 1.07)
    arrows = [line for line in bottom.lines if line.get_marker() == 6 and line.get_xdata().size]
    assert len(arrows) == 1 and arrows[0].get_xdata()[0] == pytest.approx(CENTRE[3], abs=0.05)
    png, pdf = save_figure(fig, tmp_path, "flux", dpi=50)
    assert png.stat().st_size > 2000 and pdf.stat().st_size > 2000


def test_without_published_numbers_the_first_method_is_the_reference():
    top, bottom = figures.flux_figure(EDGES, flux()).axes
    assert labels(top) == ["one", "another"] and bottom.get_ylabel() == "ratio to one"


def test_corrections_show_the_band_that_is_asked_for(tmp_path):
    c = 0.9 + 0.05 * (CENTRE - 18.4)
    hole = c.copy()
    hole[-1] = np.nan
    fig = figures.corrections_figure(EDGES, {"one": c, "holes": hole}, c + 0.001, others={"other": c - 0.01}, target=(18.5, 19.2, 0.02))
    assert labels(fig.axes[0]) == ["published", "other", "one", "holes"]
    assert labels(fig.axes[1]) == ["within 2 %"]
    save_figure(fig, tmp_path, "corrections", dpi=50)
    assert len(figures.corrections_figure(EDGES, {"one": c}).axes) == 1


def test_refolded_pulls_are_those_of_poisson_counts():
    n = np.full(10, 100.0)
    fig = figures.refolded_figure(EDGES, n, {"exact": n, "high": np.full(10, 121.0)}, {"exact": "0 / 9"})
    ax = fig.axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_allclose(drawn["exact: 0 / 9"], 0)
    np.testing.assert_allclose(drawn["high"], -21 / 11)


def test_correlations_on_one_scale():
    fig = figures.correlations_figure(EDGES, {name: np.eye(10) for name in "abcd"})
    meshes = [c for ax in fig.axes[:4] for c in ax.collections if hasattr(c, "get_clim") and c.get_clim() == (-1, 1)]
    assert len(meshes) == 4
    assert [ax.get_title() for ax in fig.axes[:4]] == list("abcd")


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: figures.flux_figure(EDGES, {}), DataError),
        (lambda: figures.flux_figure(EDGES[::-1], flux()), DataError),
        (lambda: figures.flux_figure(EDGES, {"one": (J[:-1], ERRORS)}), ShapeError),
        (lambda: figures.flux_figure(EDGES, {"one": (np.full(10, np.nan), ERRORS)}), NonFiniteError),
        (lambda: figures.correlations_figure(EDGES, {"a": np.eye(9)}), ShapeError),
        (lambda: figures.refolded_figure(EDGES, np.ones(9), {"a": np.ones(10)}), ShapeError),
        (lambda: figures.corrections_figure(EDGES, {"a": np.ones(10)}, np.ones(9)), ShapeError),
    ],
)
def test_what_does_not_fit_is_refused(call, error):
    with pytest.raises(error):
        call()


TRUTH = oracle.falling()


@pytest.fixture(scope="module")
def two() -> Validation:
    methods = {"inversion": oracle.inversion, "narrow": oracle.scaled(covariance=0.25)}
    scan = {"inversion": {0.0: oracle.inversion, 1.0: oracle.scaled(0.9)}}
    return validate(methods, oracle.response(), TRUTH, n_toys=30, scan=scan)


def test_every_figure_is_made(two: Validation) -> None:
    made = figures.validation(two)
    assert list(made) == ["closure", "stress", "pulls", "coverage", "correlation", "regularisation"]
    assert len(made["stress"].axes) == 3 and len(made["closure"].axes) == 2
    assert len(made["correlation"].axes) == 2 * 2 + 1  # and the colour bar


def test_the_legend_names_the_methods(two: Validation) -> None:
    words = [t.get_text() for t in figures.pulls(two).axes[0].get_legend().get_texts()]
    assert words[1:] == ["inversion", "narrow"]


def test_points_stand_side_by_side_within_their_bins(two: Validation) -> None:
    ax = figures.closure(two).axes[1]
    first, second = (c.lines[0].get_xdata() for c in ax.containers[:2])
    assert (first < second).all() and (np.floor(first) == np.arange(8)).all() and (np.floor(second) == np.arange(8)).all()
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(), 1)


def test_plain_matrices_one_method_and_no_alternatives() -> None:
    found = validate(oracle.inversion, oracle.response().matrix, TRUTH, n_toys=20, alternatives={})
    made = found.figures()
    assert list(made) == ["closure", "pulls", "coverage", "correlation"]
    assert made["closure"].axes[1].get_xlabel() == "truth bin"
    assert {r.name for r in found.decisions if r.name.startswith("bottom line")} == {f"bottom line: wave of {k} bins" for k in (2, 3, 4, 6)}
