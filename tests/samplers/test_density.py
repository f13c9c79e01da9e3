"""Log densities: checked and counted."""

import numpy as np
import pytest

from sbi_phys.core.errors import NonFiniteError, ShapeError
from sbi_phys.samplers.density import CheckedDensity


def normal(u):
    return -0.5 * (u**2).sum(axis=1)


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
