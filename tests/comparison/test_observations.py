"""Observations compared by posteriors whose medians, intervals and shifts are known."""

import numpy as np
import pytest
from scipy.stats import norm

import sbi_phys as sp
from sbi_phys.comparison import compare_posteriors
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError

PARAMETERS = [sp.Parameter("mass", 0, 10, unit="kg"), sp.Parameter("rate", latex=r"\dot n")]
QUANTILES = norm.ppf((np.arange(20_000) + 0.5) / 20_000)


def normal(mass, rate, sd=1.0):
    """Draws of N(mass, sd^2) and N(rate, 4 sd^2), at the quantiles: medians and widths are exact."""
    return np.column_stack([mass + sd * QUANTILES, rate + 2 * sd * QUANTILES])


def test_medians_intervals_and_shifts():
    found = compare_posteriors({"a": normal(1, 5), "b": normal(4, 5, sd=2.0), "c": normal(1, 5)}, PARAMETERS)
    np.testing.assert_allclose(found.median, [[1, 5], [4, 5], [1, 5]], atol=1e-12)
    np.testing.assert_allclose(found.high[:, 0], [1 + 1.6449, 4 + 2 * 1.6449, 1 + 1.6449], atol=1e-3)
    np.testing.assert_allclose(found.low, 2 * found.median - found.high, atol=1e-9)
    np.testing.assert_allclose(found.shift[1, 0], [3 / np.sqrt(5), 0], atol=1e-3)
    np.testing.assert_allclose(found.shift, -found.shift.transpose(1, 0, 2), atol=1e-12)
    rows = found.rows()
    assert rows.columns[:3] == ("parameter", "observation", "unit") and len(rows.rows) == 6
    assert rows.column("shift_from")[:3] == ["b", "a", "b"] and rows.column("largest_shift")[1] == pytest.approx(3 / np.sqrt(5), abs=1e-3)
    words = found.summary()
    assert "mass [kg]: largest shift 1.34 sd, between a and b" in words and "3 observations, medians and 90 % intervals" in words


def test_figures():
    found = compare_posteriors({"a": normal(1, 5), "b": normal(4, 5)}, PARAMETERS, level=0.68)
    ax = found.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["mass", r"$\dot n$"]
    figure = found.figure()
    assert [a.get_xlabel() for a in figure.axes] == ["mass [kg]", r"$\dot n$"]
    figure.draw_without_rendering()


def test_constant_draws_have_no_shift():
    found = compare_posteriors({"a": np.ones((5, 1)), "b": np.ones((5, 1))}, PARAMETERS[:1])
    assert np.isnan(found.shift).all() and "no shifts" in found.summary()


def test_bad_input():
    draws = normal(1, 5)
    with pytest.raises(SettingError, match="at least two observations"):
        compare_posteriors({"a": draws}, PARAMETERS)
    with pytest.raises(ShapeError, match="draws of b"):
        compare_posteriors({"a": draws, "b": draws[:, :1]}, PARAMETERS)
    with pytest.raises(NonFiniteError, match="draws of b"):
        compare_posteriors({"a": draws, "b": np.full((3, 2), np.nan)}, PARAMETERS)
    with pytest.raises(DataError, match="b has 1 draws"):
        compare_posteriors({"a": draws, "b": draws[:1]}, PARAMETERS)
    with pytest.raises(SettingError, match="level"):
        compare_posteriors({"a": draws, "b": draws}, PARAMETERS, level=1.2)
