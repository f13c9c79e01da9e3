import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbi_phys.calibration._covariates import check_x, normal_scores, random_features, standardised
from sbi_phys.core.errors import DataError, ShapeError


@given(st.integers(10, 60), st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_normal_scores_depend_on_order_alone(n, shift, scale):
    x = np.random.default_rng(n).standard_normal((n, 2))
    scores = normal_scores(x)
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(scores.std(axis=0), 1)
    np.testing.assert_allclose(normal_scores(shift + scale * np.sinh(x)), scores)


def test_standardised_leaves_out_constants_and_survives_decades():
    rng = np.random.default_rng(1)
    x = np.column_stack([rng.standard_normal(100), np.full(100, 0.1), 1e300 * rng.standard_normal(100), 10 ** rng.uniform(0, 12, 100)])
    out = standardised(x)
    assert out.shape == (100, 6)
    assert np.abs(out).max() <= 4
    assert np.isfinite(out).all()


def test_random_features_are_functions_of_their_row():
    rng = np.random.default_rng(2)
    scores = rng.standard_normal((50, 3))
    scores[7] = scores[3]
    out = random_features(scores, 5, np.random.default_rng(3))
    np.testing.assert_array_equal(out[7], out[3])
    np.testing.assert_allclose(out.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(out.var(axis=0), 1)


def test_check_x():
    assert check_x(np.arange(12).reshape(3, 2, 2), 3).shape == (3, 4)
    assert check_x([1, 2, 3], 3).shape == (3, 1)
    for bad in (np.zeros((3, 0)), np.zeros(4), 1.0):
        with pytest.raises(ShapeError, match="x has shape"):
            check_x(bad, 3)
    with pytest.raises(DataError, match="constant"):
        check_x(np.ones((3, 2)), 3)
