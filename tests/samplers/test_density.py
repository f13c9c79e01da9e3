import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.samplers.start import Checked, spread_start


def normal(u):
    return -0.5 * (u**2).sum(axis=1)


def test_spread_start_populates_a_mode_that_lies_lower_and_repeats_no_point():
    def lower(u):
        return np.logaddexp(-0.5 * ((u - 5) ** 2).sum(axis=1) / 0.01, -40 - 0.5 * ((u + 5) ** 2).sum(axis=1) / 0.01)

    rng = np.random.default_rng(11)
    candidates = rng.uniform(-8, 8, (4000, 2))
    start = spread_start(lower, candidates, 64, rng)
    assert np.unique(start, axis=0).shape == (64, 2)
    assert (np.abs(start + 5).max(axis=1) < 1).sum() >= 2
    assert (np.abs(start - 5).max(axis=1) < 1).sum() >= 5
    again = spread_start(lower, candidates, 64, np.random.default_rng(1))
    np.testing.assert_array_equal(again, spread_start(lower, candidates, 64, np.random.default_rng(1)))
    one_mode = spread_start(normal, rng.standard_normal((5000, 2)), 64, rng, random_share=0.0)
    assert np.abs(one_mode).max() < 4


def test_checked_counts_flattens_and_names_the_bad_point():
    density = Checked(normal, 2)
    u = np.arange(6.0).reshape(3, 2)
    np.testing.assert_array_equal(density(u), normal(u))
    density.power = 0.5
    np.testing.assert_array_equal(density(u), 0.5 * normal(u))
    assert density.n_evaluations == 6
    with pytest.raises(NonFiniteError, match=r"nan at u = \[2.0, 3.0\]"):
        Checked(lambda v: np.where(v[:, 0] == 2, np.nan, 0.0), 2)(u)
    with pytest.raises(ShapeError, match="log_prob"):
        Checked(lambda v: v, 2)(u)


def test_bad_start():
    rng = np.random.default_rng(12)
    start = rng.standard_normal((24, 2))
    with pytest.raises(DataError, match="different points of positive density"):
        spread_start(normal, start[:3], 5, rng)
    with pytest.raises(SettingError, match="rng"):
        spread_start(normal, start, 5, 0)
    with pytest.raises(SettingError, match="random_share"):
        spread_start(normal, start, 5, rng, random_share=2.0)
