"""Confidence sets from margins: ends of a hull, edges of the grid, boxes, and a construction whose sets are known exactly."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, norm

from sbi_phys.confidence.sets import Construction, Fixed, Interval, Region, hull, nuisances_of, require_within
from sbi_phys.core.errors import NonFiniteError, SettingError, ShapeError, SupportError
from sbi_phys.core.types import Array

NAN, INF = np.nan, np.inf


class Exact(Construction):
    """x ~ N(theta, I), q = |x - theta|^2: critical values are those of chi2, and with nuisances the sum of their `slope` is added."""

    slope = 0.0

    def critical(self, theta, level=None):
        theta = np.asarray(theta)
        return chi2.ppf(level, self.dim) + self.slope * theta[:, self.interest :].sum(axis=1)

    def _tail(self, q, theta):
        return chi2.sf(q, self.dim)

    def _nuisances(self):
        return np.array([[-1.0], [0.0], [1.0]])


def distance(theta: Array, x: Any) -> Array:
    return ((np.asarray(x).reshape(len(x), -1)[:, : len(theta)] - theta) ** 2).sum(axis=1)


def exact(dim: int = 1, interest: int = 1, **changes: Any) -> Exact:
    plain: dict[str, Any] = {
        "names": tuple("abc"[:dim]),
        "labels": tuple("abc"[:dim]),
        "interest": interest,
        "levels": (0.68, 0.9),
        "low": np.full(dim, -5.0),
        "high": np.full(dim, 5.0),
        "bounds": ((None, None),) * dim,
        "statistic": distance,
        "profile": None,
        "method": "exact",
    }
    return Exact(**(plain | changes))


# ---- ends of a set


def test_the_ends_are_where_the_line_between_two_points_crosses_zero() -> None:
    axis = np.array([0.0, 1.0, 3.0, 4.0])
    margin = np.array(
        [
            [1.0, -1.0, -1.0, 3.0],  # 0.5, and a quarter of the way from 3 to 4
            [-1.0, -1.0, 2.0, 2.0],  # to the edge below
            [2.0, 2.0, 1.0, 0.0],  # exactly zero is inside: one point
            [-1.0, 5.0, 5.0, -1.0],  # two pieces: their hull
            [1.0, 1.0, 1.0, 1.0],  # empty
            [INF, -1.0, -INF, INF],  # the last points inside
            [NAN, -1.0, -1.0, NAN],
        ]
    )
    low, high = hull(axis, margin)
    assert low == pytest.approx([0.5, 0, 4, 0, NAN, 1, 1], nan_ok=True)
    assert high == pytest.approx([3.25, 1 + 2 / 3, 4, 4, NAN, 3, 3], nan_ok=True)


def test_an_interval_holds_its_ends_and_an_empty_one_nothing() -> None:
    found = Interval(name="a", level=0.9, low=np.array([0.0, NAN, -INF]), high=np.array([1.0, NAN, 0.5]), method="m")
    assert found.empty.tolist() == [False, True, False]
    assert [found.covers(v).tolist() for v in (0.0, 0.75, -9.0)] == [[True, False, True], [True, False, False], [False, False, True]]
    assert found.summary().splitlines() == ["90 % intervals for a (m)", "  [0, 1]", "  [nan, nan]", "  [-inf, 0.5]"]


def test_many_intervals_are_told_by_their_medians() -> None:
    low = np.r_[np.arange(10.0), NAN]
    found = Interval(name="a", level=0.68, low=low, high=low + 2, method="m")
    assert found.summary() == "68 % intervals for a (m): 11 data sets, median [4.5, 6.5], 1 empty"
    none = np.full(11, NAN)
    assert Interval(name="a", level=0.68, low=none, high=none, method="m").summary().endswith("11 data sets, all empty")


def test_a_region_is_where_the_margin_is_not_positive() -> None:
    axis = np.array([0.0, 1.0])
    found = Region(names=("a", "b"), level=0.9, axes=(axis, axis), margin=np.array([[[0.0, 1e-12], [-1.0, NAN]]]))
    assert found.inside.tolist() == [[[True, False], [True, False]]]


# ---- boxes and nuisances


def test_points_at_the_edge_are_within_and_beyond_is_named() -> None:
    low, high = np.array([0.0, -1.0]), np.array([10.0, 1.0])
    require_within("theta", np.array([[0.0, 1.0], [10.0 + 1e-9, -1.0 - 1e-10]]), low, high, ("a", "b"))
    with pytest.raises(SupportError, match=r"theta: b = 1\.5 lies beyond what was simulated, \[-1, 1\] \(2 of 3 points do\)"):
        require_within("theta", np.array([[0.0, 0.0], [1.0, 1.5], [-3.0, 9.0]]), low, high, ("a", "b"))


def test_nuisances_have_a_row_per_data_set() -> None:
    psi = np.array([2.0])
    assert nuisances_of(Fixed(np.array([1.0, 3.0])), None, psi, 3, 2).tolist() == [[1, 3]] * 3
    # (n,) with one nuisance is a column
    assert nuisances_of(lambda p, x: x - p, np.array([5.0, 6.0]), psi, 2, 1).tolist() == [[3], [4]]
    with pytest.raises(ShapeError, match=r"the profiled nuisances has shape \(2,\); expected \(2, 2\)"):
        nuisances_of(lambda p, x: x, np.zeros(2), psi, 2, 2)
    with pytest.raises(NonFiniteError, match="the profiled nuisances has NaN"):
        nuisances_of(lambda p, x: x * NAN, np.zeros(2), psi, 2, 1)


# ---- the construction


def test_intervals_are_x_plus_minus_z() -> None:
    z = norm.ppf(0.95)
    x = np.array([-1.0, 0.0, 2.0])
    found = exact().interval(x, n_points=2001)
    assert found.level == 0.9 and found.method == "exact" and found.name == "a"
    assert found.low == pytest.approx(x - z, abs=1e-4) and found.high == pytest.approx(x + z, abs=1e-4)
    assert exact().interval(x, 0.68, n_points=2001).high == pytest.approx(x + norm.ppf(0.84), abs=1e-4)


def test_membership_and_pvalues_agree() -> None:
    x = np.array([0.0, 1.6, 1.7])
    assert exact().contains(x, 0.0).tolist() == [True, True, False]
    assert exact().contains(x, 0.0, 0.68).tolist() == [True, False, False]
    assert exact().pvalue(x, [0.0]) == pytest.approx(2 * norm.sf(x))


def test_a_region_of_two_gaussians_is_a_disc() -> None:
    found = exact(2, 2).region([[1.0, 0.0]], n_points=11)
    a, b = np.meshgrid(*found.axes, indexing="ij")
    assert found.names == ("a", "b") and found.margin.shape == (1, 11, 11)
    assert np.array_equal(found.inside[0], (a - 1) ** 2 + b**2 <= chi2.ppf(0.9, 2))


def test_without_a_profile_the_set_is_projected() -> None:
    x = [[0.0, 0.75]]  # nearest of the nuisances -1, 0, 1: 1
    sets = exact(2)
    edge = (chi2.ppf(0.9, 2) - 0.25**2) ** 0.5
    assert [bool(sets.contains(x, edge + d)[0]) for d in (-1e-6, 1e-6)] == [True, False]
    assert sets.pvalue(x, 0.3) == pytest.approx(chi2.sf(0.3**2 + 0.25**2, 2))
    # all parameters given: at these nuisances alone
    assert sets.pvalue(x, [0.3, -1.0]) == pytest.approx(chi2.sf(0.3**2 + 1.75**2, 2))


def test_with_a_profile_the_critical_value_is_that_of_the_fitted_nuisance() -> None:
    sets = exact(2, profile=lambda psi, x: x[:, 1])
    object.__setattr__(sets, "slope", 1.0)
    x = np.array([[2.0, 0.0], [2.0, -1.0]])
    # q = 4 in the first column alone, C = 4.605 + nu
    assert sets.contains(x, 0.0).tolist() == [True, False]
    assert sets.contains(x, [0.0, 0.0]).tolist() == [True, True]  # at nuisances as given
    with pytest.raises(SupportError, match=r"theta: b = 7 lies beyond what was simulated, \[-5, 5\] \(1 of 2 points do\)"):
        sets.contains(np.array([[0.0, 7.0], [0.0, 1.0]]), 0.0)


# ---- edges of the grid


def test_a_set_that_reaches_the_end_of_the_grid() -> None:
    x = [4.5, 0.0]
    with pytest.raises(SupportError, match="set of 1 of 2 data sets reaches the end of the simulated grid at a = 5; .*on_edge='open'"):
        exact().interval(x)
    found = exact().interval(x, on_edge="open")
    assert found.high[0] == INF and found.low[0] == pytest.approx(4.5 - norm.ppf(0.95), abs=1e-2) and np.isfinite(found.high[1])
    bounded = exact(bounds=((None, 5.0),)).interval(x)  # nothing is beyond a physical bound
    assert bounded.high[0] == 5.0
    with pytest.raises(SupportError, match="a = -5"):
        exact(bounds=((None, 5.0),)).interval([-4.5])
    with pytest.raises(SupportError, match="a = 5"):  # the bound is elsewhere
        exact(bounds=((None, 6.0),)).interval(x)


@pytest.mark.parametrize(("kind", "bounds", "ends"), [("upper", (None, None), (-INF, 1)), ("lower", (None, None), (-1, INF)),
                                                      ("upper", (-9.0, None), (-9, 1)), ("lower", (None, 8.0), (-1, 8))])  # fmt: skip
def test_a_limit_is_open_on_its_other_side(kind: str, bounds: Any, ends: tuple[float, float]) -> None:
    class OneSided:
        def __init__(self) -> None:
            self.kind = kind

        def __call__(self, theta: Array, x: Any) -> Array:
            return distance(theta, x)

    sets = exact(statistic=OneSided(), bounds=(bounds,))
    axis = np.linspace(-5, 5, 11)
    margin = (axis if kind == "upper" else -axis) - 1.0
    found = sets.interval_of(axis, margin[None])
    assert (found.low[0], found.high[0]) == pytest.approx(ends)


def test_what_a_construction_refuses() -> None:
    with pytest.raises(SettingError, match=r"there are 2 parameters of interest, \('a', 'b'\); expected 1, see region\(\)"):
        exact(2, 2).interval([[0.0, 0.0]])
    with pytest.raises(SettingError, match=r"there are 1 parameters of interest; expected 2 for a region, see interval\(\)"):
        exact().region([0.0])
    with pytest.raises(SettingError, match="level is 0.95; expected one that critical values were made for: 0.68, 0.9"):
        exact().interval([0.0], 0.95)
    with pytest.raises(SettingError, match="n_points is 2; expected"):
        exact().interval([0.0], n_points=2)
    with pytest.raises(SettingError, match="on_edge is 'opne'; .*did you mean 'open'"):
        exact().interval([0.0], on_edge="opne")
    with pytest.raises(ShapeError, match=r"margin has shape \(1, 3\); expected \(n, 4\)|margin has shape \(1, 3\)"):
        exact().interval_of(np.arange(4.0), np.zeros((1, 3)))
    with pytest.raises(ShapeError, match=r"theta has shape \(2,\); expected \(1,\) = \('a',\)$"):
        exact().contains([0.0], [0.0, 0.0])
    with pytest.raises(ShapeError, match=r"theta has shape \(3,\); expected \(1,\) = \('a',\), or \(2,\) with nuisances"):
        exact(2).contains([[0.0, 0.0]], [0.0, 0.0, 0.0])
    with pytest.raises(SupportError, match="a = 6 lies beyond"):
        exact().contains([0.0], 6.0)
    with pytest.raises(NonFiniteError, match="at a = 0"):
        exact(statistic=lambda t, x: np.full(len(x), NAN)).contains([0.0], 0.0)


def test_what_does_not_depend_on_theta_is_prepared_once() -> None:
    class Prepared:
        calls = 0

        def prepare(self, x: Any) -> Any:
            self.calls += 1
            return np.asarray(x) + 1.0

        def __call__(self, theta: Array, x: Any) -> Array:
            return distance(theta, x)

    statistic = Prepared()
    found = replace(exact(), statistic=statistic).interval([0.0], n_points=101)
    assert statistic.calls == 1 and (found.low + found.high)[0] / 2 == pytest.approx(1.0, abs=1e-2)
