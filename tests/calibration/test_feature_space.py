import numpy as np
import pytest

from sbi_phys.calibration.feature_space import feature_space
from sbi_phys.core.errors import DataError


def test_whitening_is_unit_covariance_whatever_the_units():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 3)) * [1, 1e-8, 1e8] + [0, 3, 0]
    space = feature_space(x, 0)
    np.testing.assert_allclose(np.cov(space.whiten(x).T, ddof=0), np.eye(3), atol=1e-8)
    assert space.empty.shape[1] == 0
    assert set(space.scores(x, 5)) == {"mahalanobis", "neighbours", "density"}


def test_conditional_pull_is_the_residual_of_a_regression_on_the_other_features():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 3))
    _, conditional = feature_space(x, 0).pulls(x)
    centred = x - x.mean(axis=0)
    others = centred[:, :2]
    left = centred[:, 2] - others @ np.linalg.lstsq(others, centred[:, 2])[0]
    np.testing.assert_allclose(conditional[:, 2], left / left.std(), atol=1e-8)


def test_neighbours_are_those_of_a_direct_search():
    rng = np.random.default_rng(2)
    x, new = rng.standard_normal((50, 2)), rng.standard_normal((4, 2))
    space = feature_space(x, 0)
    distance = np.linalg.norm(space.whiten(new)[:, None] - space.whiten(x)[None], axis=-1)
    np.testing.assert_allclose(space.scores(new, 3)["neighbours"], np.sort(distance, axis=1)[:, :3].mean(axis=1), atol=1e-8)


def test_density_of_one_gaussian_is_that_of_the_gaussian():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2000, 2))
    space = feature_space(x, 0)
    assert space.mixture.n_components == 1
    w = space.whiten(x[:5])
    np.testing.assert_allclose(space.scores(x[:5], 1)["density"], np.log(2 * np.pi) + (w**2).sum(axis=1) / 2, atol=1e-3)


def test_directions_that_do_not_move_are_kept_apart():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((100, 2))
    full = np.column_stack([x, x.sum(axis=1), np.zeros(100)])
    space = feature_space(full, 0)
    assert (space.axes.shape[1], space.empty.shape[1]) == (2, 2)
    assert np.all(space.scores(full, 3)["span"] == 0)
    assert space.scores(full + np.array([0, 0, 0, 0.5]), 3)["span"] == pytest.approx(0.5)
    with pytest.raises(DataError, match="every feature is constant"):
        feature_space(np.full((100, 2), 1 / 3), 0)
