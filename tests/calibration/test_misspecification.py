import numpy as np
import pytest

from sbi_phys.calibration.misspecification import feature_space, fit_mixture, misspecification
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError


def banana(rng, n):
    u = rng.standard_normal(n)
    return np.column_stack([u, u**2 - 1 + 0.1 * rng.standard_normal(n)])


def thin(rng, n, k=6):
    """The last feature is the mean of the others, up to 0.02."""
    x = rng.standard_normal((n, k))
    x[:, -1] = x[:, :-1].mean(axis=1) + 0.02 * rng.standard_normal(n)
    return x


def gaussian(rng, n, k=3):
    return rng.standard_normal((n, k))


@pytest.mark.parametrize("make", [gaussian, banana])
def test_size_is_exact_for_every_score(make):
    rng = np.random.default_rng(0)
    results = [misspecification(make(rng, 100), make(rng, 1)[0], seed=i) for i in range(40)]
    for name in results[0].pvalues:
        p = np.array([r.pvalues[name] for r in results])
        assert abs(np.mean(p <= 0.1) - 5 / 51) < 3 * np.sqrt(0.1 * 0.9 / 40)  # ranks 1..5 of 51
        assert abs(p.mean() - 0.51) < 3 * np.sqrt(1 / 12 / 40)
    combined = np.array([r.pvalue for r in results])
    assert abs(np.mean(combined <= 0.1) - 0.09) < 3 * np.sqrt(0.1 * 0.9 / 40)
    assert abs(combined.mean() - 0.51) < 3 * np.sqrt(1 / 12 / 40)


def test_step_in_a_direction_of_little_variance():
    rng = np.random.default_rng(1)
    x = thin(rng, 1000)
    odd = thin(rng, 1)[0]
    odd[-1] += 0.15
    result = misspecification(x, odd, [f"s{j}" for j in range(6)])
    assert result.pvalues["mahalanobis"] == 1 / 501
    assert result.pvalue < 0.05
    assert np.abs(result.pulls).max() < 3  # nothing to see in any marginal
    assert abs(result.conditional_pulls[0, -1]) == pytest.approx(0.15 / 0.02, abs=2.5)
    assert "farthest given the others" in result.summary()
    assert misspecification(x, thin(rng, 1)[0]).pvalue > 0.05


def test_point_off_a_curved_manifold_but_within_every_marginal():
    rng = np.random.default_rng(2)
    result = misspecification(banana(rng, 1000), [0.0, 0.8])
    assert result.pvalues["mahalanobis"] > 0.1
    assert result.pvalues["neighbours"] < 0.02
    assert result.pvalues["density"] < 0.02
    assert result.pvalue < 0.05
    assert result.n_mixture > 1


def test_one_gaussian_is_enough_for_a_gaussian():
    assert misspecification(gaussian(np.random.default_rng(3), 1000), np.zeros(3)).n_mixture == 1


def test_mahalanobis_and_pulls_are_those_of_the_fitted_half():
    rng = np.random.default_rng(4)
    x = gaussian(rng, 20_000) @ np.array([[1, 0.5, 0], [0, 1, 0], [0, 0, 30.0]]) + 5
    cov = np.array([[1, 0.5, 0], [0.5, 1.25, 0], [0, 0, 900.0]])
    obs = np.array([6.0, 4.0, 35.0])
    result = misspecification(x, obs, max_simulations=20_000)
    off = obs - 5
    assert result.scores["mahalanobis"][0] == pytest.approx(np.sqrt(off @ np.linalg.solve(cov, off)), rel=0.03)
    precision = np.linalg.inv(cov)
    np.testing.assert_allclose(result.conditional_pulls[0], precision @ off / np.sqrt(np.diag(precision)), atol=0.05)
    np.testing.assert_allclose(result.pulls[0], off / np.sqrt(np.diag(cov)), atol=0.05)
    assert (result.n_fit, result.n_held) == (10_000, 10_000)


def test_leaving_the_subspace_of_the_simulations():
    rng = np.random.default_rng(5)
    x = gaussian(rng, 200)
    full = np.column_stack([x, x[:, 0] + x[:, 1], np.full(200, 1 / 3)])
    inside = np.array([0.1, 0.2, 0.3, 0.3, 1 / 3])
    result = misspecification(full, inside)
    assert result.scores["span"][0] == 0
    assert result.pvalues["span"] == 1
    for j in (3, 4):
        off = inside.copy()
        off[j] += 0.01
        assert misspecification(full, off).pvalues["span"] == 1 / 101


def test_more_features_than_simulations():
    rng = np.random.default_rng(6)
    x = rng.standard_normal((60, 100))
    assert misspecification(x, rng.standard_normal(100)).pvalue > 0.05
    assert misspecification(x, 30 * rng.standard_normal(100)).pvalues["span"] == 1 / 31


@pytest.mark.parametrize("m", [2, 12])
def test_size_for_a_set(m):
    rng = np.random.default_rng(7)
    results = [misspecification(gaussian(rng, 100), gaussian(rng, m), seed=i) for i in range(25)]
    assert ("mmd" in results[0].pvalues) == (m >= 5)
    for name in results[0].pvalues:
        p = np.array([r.pvalues[name] for r in results])
        assert np.mean(p <= 0.1) < 0.1 + 3 * np.sqrt(0.1 * 0.9 / 25)
    assert np.mean([r.pvalue <= 0.05 for r in results]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 25)


@pytest.mark.slow
@pytest.mark.parametrize("make", [gaussian, banana])
@pytest.mark.parametrize("m", [1, 8])
def test_size_in_many_repetitions(make, m):
    rng = np.random.default_rng(20)
    results = [misspecification(make(rng, 200), make(rng, m), seed=i) for i in range(400)]
    for name in results[0].pvalues:
        p = np.array([r.pvalues[name] for r in results])
        assert np.mean(p <= 0.05) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)
    assert np.mean([r.pvalue <= 0.05 for r in results]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


def test_a_set_that_is_shifted_too_narrow_or_has_one_stranger():
    rng = np.random.default_rng(8)
    x = gaussian(rng, 2000)
    shifted = misspecification(x, gaussian(rng, 30) + 0.6)
    assert max(shifted.pvalues["mmd"], shifted.pvalues["mean"]) < 0.01
    assert "are unlike" in shifted.summary()
    assert misspecification(x, 0.3 * gaussian(rng, 30)).pvalues["mmd"] < 0.01  # every one of them is ordinary
    one = gaussian(rng, 30)
    one[17] = 6.0
    result = misspecification(x, one)
    assert result.pvalues["strangest"] < 0.2
    assert int(np.argmin(result.each)) == 17
    assert "number 17" in result.summary()


def test_reproducible_and_ties_and_integers():
    rng = np.random.default_rng(9)
    x = rng.integers(0, 3, (300, 2))
    one, two = (misspecification(x, [1, 1], seed=3) for _ in range(2))
    assert one.pvalues == two.pvalues
    assert one.pvalue > 0.2
    top = misspecification(x, [2, 2], seed=3)
    assert top.pvalues["mahalanobis"] > 0.05  # a ninth of all simulations are there


@pytest.mark.parametrize("m", [1, 8])
def test_plots(m):
    rng = np.random.default_rng(11)
    result = misspecification(gaussian(rng, 200), gaussian(rng, m) + np.array([0, 0, 9]))
    ax = result.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == list(result.scores)
    assert result.plot(ax) is ax


def test_bad_input():
    x = gaussian(np.random.default_rng(12), 100)
    with pytest.raises(ShapeError, match="features_obs"):
        misspecification(x, np.zeros(2))
    with pytest.raises(ShapeError, match="features_sim"):
        misspecification(x[:, 0], np.zeros(1))
    with pytest.raises(ShapeError, match="at least one feature"):
        misspecification(x[:, :0], np.zeros(0))
    with pytest.raises(NonFiniteError, match="features_sim"):
        misspecification(x * np.nan, np.zeros(3))
    with pytest.raises(NonFiniteError, match="features_obs"):
        misspecification(x, [0, 0, np.inf])
    with pytest.raises(DataError, match="complex"):
        misspecification(x * 1j, np.zeros(3))
    with pytest.raises(DataError, match="at least 40"):
        misspecification(x[:39], np.zeros(3))
    with pytest.raises(DataError, match="at least 40 and 1"):
        misspecification(x, np.zeros((0, 3)))
    with pytest.raises(DataError, match="every feature is constant"):
        misspecification(np.ones((100, 2)), np.ones(2))
    with pytest.raises(SettingError, match="n_neighbours"):
        misspecification(x, np.zeros(3), n_neighbours=0)
    with pytest.raises(ShapeError, match="names"):
        misspecification(x, np.zeros(3), ["a"])


def test_whitening_is_unit_covariance_whatever_the_units():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 3)) * [1, 1e-8, 1e8] + [0, 3, 0]
    space = feature_space(x)
    np.testing.assert_allclose(np.cov(space.whiten(x).T, ddof=0), np.eye(3), atol=1e-8)
    assert space.empty.shape[1] == 0
    assert set(space.scores(x, 5, fit_mixture(space.rows, 0))) == {"mahalanobis", "neighbours", "density"}


def test_the_distance_is_that_of_the_inverse_covariance():
    rng = np.random.default_rng(5)
    x, new = rng.standard_normal((400, 3)) @ rng.standard_normal((3, 3)) + 2, rng.standard_normal((6, 3))
    apart = new - x.mean(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", apart, np.linalg.inv(np.cov(x.T, ddof=0)), apart))
    np.testing.assert_allclose(feature_space(x).mahalanobis(new), expected, rtol=1e-9)


def test_conditional_pull_is_the_residual_of_a_regression_on_the_other_features():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 3)) @ rng.standard_normal((3, 3))
    _, conditional = feature_space(x).pulls(x)
    centred = x - x.mean(axis=0)
    others = centred[:, :2]
    left = centred[:, 2] - others @ np.linalg.lstsq(others, centred[:, 2])[0]
    np.testing.assert_allclose(conditional[:, 2], left / left.std(), atol=1e-8)


def test_neighbours_are_those_of_a_direct_search():
    rng = np.random.default_rng(2)
    x, new = rng.standard_normal((50, 2)), rng.standard_normal((4, 2))
    space = feature_space(x)
    distance = np.linalg.norm(space.whiten(new)[:, None] - space.whiten(x)[None], axis=-1)
    np.testing.assert_allclose(
        space.scores(new, 3, fit_mixture(space.rows, 0))["neighbours"], np.sort(distance, axis=1)[:, :3].mean(axis=1), atol=1e-8
    )


def test_density_of_one_gaussian_is_that_of_the_gaussian():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2000, 2))
    space = feature_space(x)
    mixture = fit_mixture(space.rows, 0)
    assert mixture.n_components == 1
    w = space.whiten(x[:5])
    np.testing.assert_allclose(space.scores(x[:5], 1, mixture)["density"], np.log(2 * np.pi) + (w**2).sum(axis=1) / 2, atol=1e-3)


def test_directions_that_do_not_move_are_kept_apart():
    rng = np.random.default_rng(4)
    x = rng.standard_normal((100, 2))
    full = np.column_stack([x, x.sum(axis=1), np.zeros(100)])
    space = feature_space(full)
    mixture = fit_mixture(space.rows, 0)
    assert (space.axes.shape[1], space.empty.shape[1]) == (2, 2)
    assert np.all(space.scores(full, 3, mixture)["span"] == 0)
    assert space.scores(full + np.array([0, 0, 0, 0.5]), 3, mixture)["span"] == pytest.approx(0.5)
    with pytest.raises(DataError, match="every feature is constant"):
        feature_space(np.full((100, 2), 1 / 3))
