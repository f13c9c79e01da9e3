import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.plotting import unfold_figures as figures
from sbi_phys.plotting.figures import save_figure

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
