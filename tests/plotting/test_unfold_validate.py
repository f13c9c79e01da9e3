"""Figures of the proof: one panel where there should be one, with what the result holds in it."""

import numpy as np
import pytest

from sbi_phys.plotting import unfold_validate as plots_validate
from sbi_phys.unfold.validation import Validation, validate
from tests.unfold import validation_oracle as oracle

TRUTH = oracle.falling()


@pytest.fixture(scope="module")
def two() -> Validation:
    methods = {"inversion": oracle.inversion, "narrow": oracle.scaled(covariance=0.25)}
    scan = {"inversion": {0.0: oracle.inversion, 1.0: oracle.scaled(0.9)}}
    return validate(methods, oracle.response(), TRUTH, n_toys=30, scan=scan)


def test_every_figure_is_made(two: Validation) -> None:
    made = plots_validate.figures(two)
    assert list(made) == ["closure", "stress", "pulls", "coverage", "correlation", "regularisation"]
    assert len(made["stress"].axes) == 3 and len(made["closure"].axes) == 2
    assert len(made["correlation"].axes) == 2 * 2 + 1  # and the colour bar


def test_the_legend_names_the_methods(two: Validation) -> None:
    words = [t.get_text() for t in plots_validate.pulls(two).axes[0].get_legend().get_texts()]
    assert words[1:] == ["inversion", "narrow"]


def test_points_stand_side_by_side_within_their_bins(two: Validation) -> None:
    ax = plots_validate.closure(two).axes[1]
    first, second = (c.lines[0].get_xdata() for c in ax.containers[:2])
    assert (first < second).all() and (np.floor(first) == np.arange(8)).all() and (np.floor(second) == np.arange(8)).all()
    np.testing.assert_allclose(ax.containers[0].lines[0].get_ydata(), 1)


def test_plain_matrices_one_method_and_no_alternatives() -> None:
    found = validate(oracle.inversion, oracle.response().matrix, TRUTH, n_toys=20, alternatives={})
    made = found.figures()
    assert list(made) == ["closure", "pulls", "coverage", "correlation"]
    assert made["closure"].axes[1].get_xlabel() == "truth bin"
    assert {r.name for r in found.table() if r.name.startswith("bottom line")} == {f"bottom line: wave of {k} bins" for k in (2, 3, 4, 6)}
