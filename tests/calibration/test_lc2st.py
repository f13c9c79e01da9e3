import numpy as np
import pytest
from scipy.special import expit
from sklearn.naive_bayes import GaussianNB

from sbi_phys.calibration.lc2st import (
    MAX_TERMS,
    Classifier,
    LC2STModel,
    Terms,
    _exchanged,
    _latent_rows,
    affordable,
    check_kind,
    fit_all,
    lc2st,
    polynomial,
    reduction,
    residuals,
    train_lc2st,
    whitened,
)
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.priors import Parameter


def moments(kind, x):
    """Mean and sd of q(. | x) for theta ~ N(0, 1), x ~ N(theta, 1); the posterior is N(x/2, 1/2)."""
    mean, sd = x / 2, np.full_like(x, np.sqrt(0.5))
    if kind == "narrow":
        sd = 0.8 * sd
    elif kind == "wide":
        sd = 1.25 * sd
    elif kind == "shifted":
        mean = mean + 0.3 * sd
    elif kind == "prior":
        mean, sd = 0 * x, np.ones_like(x)
    elif kind == "local":
        sd = sd * np.where(x[..., :1] < 0, 0.7, 1.4)
    return mean, sd


def simulated(rng, kind="exact", n=1000, d=1, n_draws=1):
    theta = rng.standard_normal((n, d))
    x = theta + rng.standard_normal((n, d))
    mean, sd = moments(kind, x)
    return theta, mean[:, None] + sd[:, None] * rng.standard_normal((n, n_draws, d)), x, (theta - mean) / sd


def latents(rng, kind="exact", n=1000, d=1):
    _, _, x, z = simulated(rng, kind, n, d)
    return z, x


def draws_at(kind, x_obs, n=500, seed=9):
    mean, sd = moments(kind, np.asarray(x_obs, dtype=float))
    return mean + sd * np.random.default_rng(seed).standard_normal((n, mean.size))


def latent_test(rng, kind, x_obs, *, n=1000, d=1, n_null=39, seed=0):
    z, x = latents(rng, kind, n, d)
    return train_lc2st(None, None, x, latent_theta=z, n_null=n_null, seed=seed).at(x_obs)


def test_size_is_exact_in_latent_space():
    rng = np.random.default_rng(0)
    p = np.array([latent_test(rng, "exact", [0.5], n=60, n_null=19, seed=i).pvalue for i in range(20)])
    assert np.sum(p <= 0.05) <= 4  # binomial(20, 0.05) exceeds 4 in 0.3 %
    assert abs(p.mean() - 0.525) < 3 * np.sqrt(1 / 12 / 20)  # uniform on 1/20 .. 20/20


@pytest.mark.parametrize("n_draws", [1, 40])
def test_size_is_exact_for_exchange_of_truth_and_draw(n_draws):
    rng = np.random.default_rng(1)
    p = []
    for i in range(20):
        theta, draws, x, _ = simulated(rng, "exact", 60, n_draws=n_draws)
        p.append(lc2st(theta, draws, x, [0.5], draws_obs=draws_at("exact", [0.5], 100), n_null=19, seed=i).pvalue)
    assert np.sum(np.array(p) <= 0.05) <= 4  # binomial(20, 0.05) exceeds 4 in 0.3 %
    assert abs(np.mean(p) - 0.525) < 3 * np.sqrt(1 / 12 / 20)


@pytest.mark.slow
@pytest.mark.parametrize("n_draws", [0, 1, 40])
def test_size_in_many_repetitions(n_draws):
    rng = np.random.default_rng(20)
    p = []
    for i in range(400):
        theta, draws, x, z = simulated(rng, "exact", 300, n_draws=max(n_draws, 1))
        if n_draws:
            p.append(lc2st(theta, draws, x, [0.5], draws_obs=draws_at("exact", [0.5], 300), n_null=39, seed=i).pvalue)
        else:
            p.append(lc2st(None, None, x, [0.5], latent_theta=z, n_null=39, seed=i).pvalue)
    assert abs(np.mean(np.array(p) <= 0.05) - 0.05) < 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("kind", ["narrow", "wide", "shifted", "prior"])
def test_power_on_posteriors_wrong_everywhere(kind, d):
    rng = np.random.default_rng(2)
    assert latent_test(rng, kind, [1.0] + [0.0] * (d - 1), d=d).pvalue == 1 / 40


def test_posterior_right_on_average_and_wrong_locally_is_caught_on_both_sides_and_put_in_words():
    rng = np.random.default_rng(3)
    theta, draws, x, z = simulated(rng, "local", 1000, n_draws=40)
    latent = train_lc2st(None, None, x, latent_theta=z, n_null=39, names=["gamma"])
    exchanged = train_lc2st(theta, draws, x, n_null=39, names=["gamma"])
    for x_obs, words in ((-1.0, "overconfident"), (1.0, "underconfident")):
        own = draws_at("local", [x_obs])
        results = (latent.at(x_obs), exchanged.at(x_obs, own))
        for result in results:
            assert result.pvalue == 1 / 40
            assert result.verdicts == {"gamma": words}
            assert words in result.summary()
    assert 0.6 < latent.at(-1.0).width[0] < 0.9
    assert 1.2 < latent.at(1.0).width[0] < 1.7


def test_a_single_draw_each_is_enough_for_the_local_failure():
    theta, draws, x, _ = simulated(np.random.default_rng(4), "local", 1000)
    model = train_lc2st(theta[:, 0], draws[:, 0, 0], x[:, 0], n_null=39)
    assert model.at(-1.0, draws_at("local", [-1.0])[:, 0]).pvalue == 1 / 40
    assert model.at(1.0, draws_at("local", [1.0])).pvalue == 1 / 40


def test_probability_approaches_the_exact_density_ratio():
    rng = np.random.default_rng(5)
    z, x = latents(rng, "narrow", 20_000)
    result = train_lc2st(None, None, x, latent_theta=z, n_null=19).at(0.3)
    w = result.points[:, 0]
    exact = expit(np.log(0.8) + w**2 / 2 * (1 - 0.8**2))  # N(0, 1/0.8^2) over N(0, 1)
    assert np.abs(result.probability - exact)[np.abs(w) < 2].max() < 0.03
    assert np.all(result.band[:, 0] <= result.band[:, 1])


def test_shift_is_that_of_the_wrong_mean():
    result = latent_test(np.random.default_rng(6), "shifted", 0.0, n=5000)
    assert result.shift[0] == pytest.approx(0.3, abs=4 * result.shift_err[0])
    assert result.verdicts["theta_0"] == "biased high"


def test_directions_are_given_in_parameters_where_latent_and_draws_are_paired():
    rng = np.random.default_rng(7)
    z, x = latents(rng, "shifted", 2000, 2)
    model = train_lc2st(None, None, x, latent_theta=z, n_null=39, names=[Parameter("a", 0, 1, latex="a"), Parameter("b", 0, 1)])
    own = rng.standard_normal((500, 2))
    result = model.at([0, 0], 17.0 - 1e-3 * own, latent_obs=own)  # a flow that runs backwards in theta
    np.testing.assert_array_equal(result.points, 17.0 - 1e-3 * own)
    assert set(result.verdicts.values()) == {"biased low"}
    assert result.labels == ("$a$", "b")
    assert model.at([0, 0]).labels == ("latent $a$", "latent b")
    assert "latent variables" in model.at([0, 0]).summary()
    assert "latent" not in result.summary()
    np.testing.assert_allclose(result.shift, -model.at([0, 0], latent_obs=own).shift, rtol=1e-6)


def test_many_columns_of_which_one_matters():
    rng = np.random.default_rng(8)
    z, x = latents(rng, "local", 1500)
    pattern, noise = rng.standard_normal(195), rng.standard_normal((1500, 195))
    model = train_lc2st(None, None, x * pattern + 0.5 * noise, latent_theta=z, n_null=39)
    assert model.reduce.n_components == 8
    assert model.at(-1.0 * pattern).pvalue == 1 / 40
    assert "overconfident" in model.at(-1.0 * pattern).summary()


def test_result_does_not_depend_on_workers_and_follows_the_seed():
    z, x = latents(np.random.default_rng(9), "narrow", 100)
    one, two, other = (
        train_lc2st(None, None, x, latent_theta=z, n_null=19, seed=s, workers=w).at(0.0) for s, w in ((1, 1), (1, 2), (2, 1))
    )
    np.testing.assert_array_equal(one.null, two.null)
    assert one.statistic == two.statistic
    assert one.statistic != other.statistic


def test_other_classifiers_and_ensembles():
    theta, draws, x, z = simulated(np.random.default_rng(10), "local", 400, n_draws=3)
    bayes = train_lc2st(None, None, x, latent_theta=z, classifier=GaussianNB(), n_null=19).at(1.0)
    assert bayes.pvalue <= 1  # has no products of w and x, and sees little
    network = train_lc2st(None, None, x, latent_theta=z, classifier="mlp", n_null=19).at(-1.5)
    assert network.pvalue == 1 / 20
    members = train_lc2st(theta, draws, x, n_ensemble=3, n_null=19)
    assert [len(m) for m in members.members] == [3] * 20
    assert members.at(1.5, draws_at("local", [1.5])).pvalue == 1 / 20


def test_constant_columns_of_x_carry_nothing():
    z, x = latents(np.random.default_rng(11), "narrow", 200)
    plain = train_lc2st(None, None, x, latent_theta=z, n_null=19).at(0.3)
    padded = train_lc2st(None, None, np.insert(x, 0, 1 / 3, axis=1), latent_theta=z, n_null=19).at([99.0, 0.3])
    assert padded.statistic == pytest.approx(plain.statistic)


def test_x_far_from_the_simulations_is_said():
    result = latent_test(np.random.default_rng(12), "exact", 12.0, n=200, n_null=19)
    assert result.farthest > 6
    assert "sd from the calibration simulations" in result.summary()


def test_ties_integers_and_copies_are_legal():
    rng = np.random.default_rng(13)
    theta = rng.integers(0, 5, 200)
    x = theta + rng.integers(-1, 2, 200)
    draws = rng.integers(0, 5, (200, 30))
    result = lc2st(theta, draws, x, 2, draws_obs=rng.integers(0, 5, 50), n_null=19)
    assert 0 < result.pvalue <= 1
    assert isinstance(train_lc2st(theta, np.repeat(draws[:, :1], 30, axis=1) + 1e-3 * draws, x, n_null=19), LC2STModel)


@pytest.mark.parametrize("d", [1, 2])
def test_plots(d):
    result = latent_test(np.random.default_rng(14), "local", [1.0] * d, n=200, d=d, n_null=19)
    null = result.plot()
    assert null.get_xlabel() == "L-C2ST statistic T(x_obs)"
    assert result.plot(null) is null
    shown = result.plot(kind="map")
    assert shown.get_xlabel() == result.labels[0]
    with pytest.raises(SettingError, match="kind"):
        result.plot(kind="maps")
    if d == 2:
        with pytest.raises(SettingError, match="pair"):
            result.plot(kind="map", pair=(0, 2))


def test_bad_input():
    theta, draws, x, z = simulated(np.random.default_rng(15), n=60)
    with pytest.raises(SettingError, match="expected theta and draws, or latent_theta"):
        train_lc2st(theta, None, x)
    with pytest.raises(ShapeError, match="theta has shape"):
        train_lc2st(theta, draws[:50], x)
    with pytest.raises(ShapeError, match="x has shape"):
        train_lc2st(theta, draws, x[:50])
    with pytest.raises(ShapeError, match="latent_theta"):
        train_lc2st(None, None, x, latent_theta=draws)
    with pytest.raises(ShapeError, match="at least one parameter"):
        train_lc2st(None, None, x, latent_theta=z[:, :0])
    with pytest.raises(NonFiniteError, match="theta has NaN"):
        train_lc2st(theta * np.nan, draws, x)
    with pytest.raises(NonFiniteError, match="draws has NaN"):
        train_lc2st(theta, draws * np.inf, x)
    with pytest.raises(NonFiniteError, match="x has NaN"):
        train_lc2st(theta, draws, x * np.nan)
    with pytest.raises(DataError, match="complex"):
        train_lc2st(theta * 1j, draws, x)
    with pytest.raises(DataError, match="at least 50"):
        train_lc2st(theta[:49], draws[:49], x[:49])
    with pytest.raises(DataError, match="x is constant"):
        train_lc2st(theta, draws, np.ones(60))
    with pytest.raises(DataError, match="parameter 0 is constant"):
        train_lc2st(np.ones(60), np.ones(60), x)
    with pytest.raises(DataError, match="constant within the draws"):
        train_lc2st(theta, np.ones((60, 40, 1)), x)
    with pytest.raises(DataError, match="n_ensemble = 2"):
        train_lc2st(theta, draws, x, n_ensemble=2)
    with pytest.raises(SettingError, match="n_null"):
        train_lc2st(theta, draws, x, n_null=5)
    with pytest.raises(SettingError, match="classifier is 'forest'"):
        train_lc2st(theta, draws, x, classifier="forest")
    with pytest.raises(SettingError, match="predict_proba"):
        train_lc2st(theta, draws, x, classifier=3)
    with pytest.raises(ShapeError, match="names"):
        train_lc2st(theta, draws, x, names=["a", "b"])


def test_bad_input_at_the_observation():
    theta, draws, x, z = simulated(np.random.default_rng(16), n=60)
    own = draws_at("exact", [0.0], 30)
    exchanged = train_lc2st(theta, draws, x, n_null=19)
    with pytest.raises(SettingError, match="expected draws_obs"):
        exchanged.at(0.0)
    with pytest.raises(DataError, match="at least 20"):
        exchanged.at(0.0, own[:10])
    with pytest.raises(ShapeError, match="draws_obs"):
        exchanged.at(0.0, np.ones((30, 2)))
    with pytest.raises(ShapeError, match="x_obs"):
        exchanged.at([0.0, 1.0], own)
    with pytest.raises(NonFiniteError, match="x_obs"):
        exchanged.at(np.nan, own)
    latent = train_lc2st(None, None, x, latent_theta=z, n_null=19)
    with pytest.raises(SettingError, match="without latent_obs"):
        latent.at(0.0, own)
    with pytest.raises(ShapeError, match="rows differ"):
        latent.at(0.0, own, latent_obs=own[:25])


@pytest.mark.parametrize("terms", [Terms(True, True), Terms(False, True), Terms(True, False), Terms(False, False)])
@pytest.mark.parametrize(("d", "c"), [(1, 1), (2, 3), (3, 2)])
def test_features_are_orthonormal_for_standard_normal_variables(terms, d, c):
    rng = np.random.default_rng(0)
    features = polynomial(rng.standard_normal((100_000, d)), rng.standard_normal((100_000, c)), terms)
    assert features.shape[1] == terms.count(d, c)
    gram = features.T @ features / len(features)
    # w and u are held at 6 and 3 sd, which takes 1.5 % of the variance of u^2
    np.testing.assert_allclose(gram, np.eye(len(gram)), atol=0.12)


def test_features_by_hand():
    row = polynomial(np.array([[2.0, 3.0]]), np.array([[0.5]]), Terms(False, False))[0]
    root = np.sqrt(2)
    np.testing.assert_allclose(row, [1, 0.5, 2, 1, 3, 1.5, 3 / root, 1.5 / root, 8 / root, 4 / root, 6])


@pytest.mark.parametrize("n", [100, 1000, 10_000])
@pytest.mark.parametrize(("d", "c"), [(1, 1), (2, 8), (7, 8), (10, 8)])
def test_terms_stay_within_what_rows_and_time_allow(n, d, c):
    terms = affordable(n, d, c)
    assert terms == Terms(False, False) or terms.count(d, c) <= min(n / 10, MAX_TERMS)
    assert affordable(10_000, 2, 2) == Terms(True, True)


def test_reduction_has_unit_variance_and_drops_what_does_not_move():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((500, 3)) * [1, 1e-6, 1e6] + [0, 5, 0]
    full = np.column_stack([x, x[:, 0] - 2, np.full(500, 1 / 3)])
    reduce = reduction(full, 8, rng)
    u = reduce(full)
    assert u.shape == (500, 3)
    np.testing.assert_allclose(np.cov(u.T, ddof=0), np.eye(3), atol=1e-8)
    assert reduction(full, 2, rng).n_components == 2
    with pytest.raises(DataError, match="every column of x is constant"):
        reduction(np.full((500, 2), 1 / 3), 2, rng)


def test_spare_draws_whiten_and_their_own_rows_come_out_standard():
    rng = np.random.default_rng(2)
    mix = rng.standard_normal((4, 3, 3)) + 2 * np.eye(3)
    spare = np.einsum("nij,nsj->nsi", mix, rng.standard_normal((4, 200, 3))) + 7
    w = whitened(spare, spare)
    np.testing.assert_allclose(w.mean(axis=1), 0, atol=1e-8)
    for rows in w:
        np.testing.assert_allclose(np.cov(rows.T), np.eye(3), atol=1e-4)
    shifted = whitened(1e3 * spare - 5, 1e3 * spare - 5)
    np.testing.assert_allclose(shifted, w, atol=1e-6)


def test_residuals_know_no_truth_and_remove_the_trend():
    rng = np.random.default_rng(3)
    u = rng.standard_normal((400, 1))
    rows = (u + 0.5 * u**2)[:, None] * [1.0, -2.0] + 0.1 * rng.standard_normal((400, 2, 2))
    frame, swapped = residuals(rows, u), residuals(rows[:, ::-1], u)
    np.testing.assert_allclose(frame(rows[:, 0], u), swapped(rows[:, 0], u), rtol=1e-6)
    w = np.concatenate([frame(rows[:, 0], u), frame(rows[:, 1], u)])
    np.testing.assert_allclose(np.cov(w.T, ddof=0), np.eye(2), atol=1e-6)
    inside = np.abs(u[:, 0]) < 3
    assert abs(np.corrcoef(frame(rows[:, 0], u)[inside, 0], u[inside, 0])[0, 1]) < 0.15


def test_exchange_keeps_each_row_and_gives_each_member_the_first_place_equally_often():
    rows = np.arange(3000.0).reshape(1000, 3, 1)
    np.testing.assert_array_equal(_exchanged(rows, 0, np.random.default_rng(0)), rows)
    exchanged = _exchanged(rows, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(exchanged, axis=1), rows)
    counts = np.bincount((exchanged[:, 0, 0] % 3).astype(int))
    assert np.all(np.abs(counts - 1000 / 3) < 4 * np.sqrt(1000 * 2 / 9))


def test_null_rows_replace_the_latent_variables_and_the_observed_ones_stay():
    z = np.full((50, 1, 2), 7.0)
    observed, null = (_latent_rows(z, 2, index, np.random.default_rng(1)) for index in (0, 1))
    assert observed.shape == null.shape == (50, 3, 2)
    assert np.all(observed[:, 0] == 7)
    assert np.abs(null).max() < 6


def test_ensembles_are_keyed_by_their_number():
    rng = np.random.default_rng(2)
    rows, u = rng.standard_normal((100, 1, 1)), rng.standard_normal((100, 1))
    kind = Classifier(kind="quadratic", terms=Terms(True, True))
    few, many = (fit_all(kind, rows, u, latent=True, n_members=2, n_null=n, seed=3, workers=1) for n in (3, 15))
    assert [len(f) for f in (few, many, many[0])] == [4, 16, 2]
    for one, other in zip(few, many, strict=False):  # a longer null begins with the shorter one
        np.testing.assert_array_equal(one[1].coef_, other[1].coef_)


def test_what_is_no_classifier():
    for kind in ("forest", 3, None):
        with pytest.raises(SettingError, match="classifier is"):
            check_kind(kind)
