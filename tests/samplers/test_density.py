"""Log densities: checked and counted."""

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.samplers.density import CheckedDensity, CheckedGradient, require_positive
from tests.samplers.targets import normal


def test_checked_counts_flattens_and_names_the_bad_point():
    density = CheckedDensity(normal, 2)
    u = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(density(u), normal(u))
    density.power = 0.5
    np.testing.assert_array_equal(density(u), 0.5 * normal(u))
    assert density.n_evaluations == 6
    with pytest.raises(NonFiniteError, match=r"nan at u = \[2.0, 3.0\]"):
        CheckedDensity(lambda v: np.where(v[:, 0] == 2, np.nan, 0.0), 2)(u)
    with pytest.raises(ShapeError, match="log_prob"):
        CheckedDensity(lambda v: v, 2)(u)


def test_the_gradient_is_checked_and_zero_where_the_density_is():
    def half(u):
        inside = u[:, 0] > 0
        return np.where(inside, -u[:, 0], -np.inf), np.where(inside[:, None], -1.0, np.nan)

    density = CheckedGradient(half, 1)
    values, gradient = density(np.array([[1.0], [-1.0]]))
    np.testing.assert_array_equal(values, [-1.0, -np.inf])
    np.testing.assert_array_equal(gradient, [[-1.0], [0.0]])
    assert density.n_evaluations == 2
    with pytest.raises(NonFiniteError, match=r"with gradient \[nan\] at u = \[1.0\]"):
        CheckedGradient(lambda u: (np.zeros(len(u)), np.full(u.shape, np.nan)), 1)(np.array([[1.0]]))
    with pytest.raises(ShapeError, match="gave a ndarray"):
        CheckedGradient(lambda u: np.zeros(len(u)), 1)(np.array([[1.0]]))


def test_a_start_of_zero_density_is_refused():
    start = np.array([[0.0], [2.0]])
    require_positive(np.array([0.0, -1.0]), start, "walker")
    with pytest.raises(DataError, match=r"log_prob -inf at walker \[2.0\]"):
        require_positive(np.array([0.0, -np.inf]), start, "walker")
