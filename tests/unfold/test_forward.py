"""Forward inference: the learned detector against the exact one, expectation maximisation against IBU, and no memory of the simulation."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold import Response, ibu
from sbi_phys.unfold.bayes import bayesian_unfold
from sbi_phys.unfold.forward import ForwardUnfolder, Kernel, _folds, fit_weights, gathered, minimise_density, points_of
from tests.unfold.omnifold_oracle import gaussian_recursion

SMEAR, MEAN, SD = 0.8, 0.2, 0.8
QUICK = TrainConfig(max_epochs=2, batch_size=64)
SMALL = FlowConfig(kind="affine", n_layers=1, hidden=16)


def efficiency(t):
    return 1 / (1 + np.exp(-(t + 0.5) / 0.5))


def detect(truth, seed):
    rng = rng_for(seed, "detector")
    seen = rng.random(len(truth)) < efficiency(truth)
    return np.where(seen, truth + SMEAR * rng.standard_normal(len(truth)), np.nan), seen


def learned(kind, seed, n=40_000):
    """The detector learned from simulations of one spectrum or another."""
    rng = rng_for(seed, "truth")
    truth = rng.uniform(-3.5, 4, n) if kind == "flat" else -0.6 + 1.15 * rng.standard_normal(n)
    return ForwardUnfolder(seed=seed, device="cpu").fit(truth, *detect(truth, seed))


@pytest.fixture(scope="module")
def flat():
    return learned("flat", 0)


@pytest.fixture(scope="module")
def data():
    """12 000 true events of N(0.2, 0.8), and those that were measured."""
    truth = MEAN + SD * rng_for(9, "data").standard_normal(12_000)
    reco, seen = detect(truth, 9)
    return reco[seen]


def gaussian(t, phi):
    return norm.pdf(t[:, 0], phi[0], abs(phi[1]) + 1e-9)


# --- the detector ---------------------------------------------------------------------------------------------------------------------


def test_density_is_that_of_the_detector(flat):
    rng = rng_for(1, "pairs")
    truth = rng.uniform(-2, 3, 3000)
    reco = truth + SMEAR * rng.standard_normal(3000)
    apart = norm.logpdf(reco, truth, SMEAR) - flat.log_likelihood(reco, truth)
    assert -3 * apart.std() / 55 < apart.mean() < 0.02  # a divergence: positive, and small
    grid = np.linspace(-6, 7, 3001)
    assert np.trapezoid(np.exp(flat.log_likelihood(grid, np.full(3001, 0.3))), grid) == pytest.approx(1, abs=2e-3)
    drawn = flat.sample([[0.3], [2.0]], 4000, seed=1)
    assert drawn.shape == (2, 4000, 1)
    np.testing.assert_allclose(drawn[:, :, 0].mean(axis=1), [0.3, 2.0], atol=0.06)
    np.testing.assert_allclose(drawn[:, :, 0].std(axis=1), SMEAR, atol=0.05)


def test_efficiency_is_that_of_the_detector(flat):
    t = np.linspace(-2.5, 3, 40)
    assert np.abs(flat.efficiency(t) - efficiency(t)).max() < 0.05


def test_without_missed_events_the_efficiency_is_one():
    t = rng_for(0, "t").standard_normal(400)
    unfolder = ForwardUnfolder(seed=0, device="cpu", flow=SMALL, config=QUICK).fit(t, t + 0.1 * t[::-1])
    np.testing.assert_array_equal(unfolder.efficiency(t), 1)
    assert len(unfolder.losses) == 1


def test_response_is_that_of_the_resolution(flat):
    edges = np.linspace(-2, 3, 11)
    found = flat.response(edges, np.linspace(-4, 5, 19))
    exact = Response.from_resolution(edges, np.linspace(-4, 5, 19), SMEAR, efficiency=efficiency)
    assert np.abs(found.matrix - exact.matrix).max() < 0.02
    assert np.abs(found.efficiency - exact.efficiency).max() < 0.05
    assert found.n_simulated.sum() == pytest.approx(40_000 * 5 / 7.5, rel=0.03)
    steep = flat.response(edges, np.linspace(-4, 5, 19), spectrum_index=3.0)
    ratio = steep.truth[1:] / steep.truth[:-1]
    np.testing.assert_allclose(ratio, 10 ** (-2 * 0.5), rtol=1e-6)


def test_learned_response_in_bayesian_unfolding(flat, data):
    """The spectrum within its errors, unfolded with the learned matrix."""
    edges, reco = np.linspace(-2.2, 2.6, 9), np.linspace(-4, 4.4, 22)
    counts = np.histogram(data, reco)[0]
    # the first bins are hardly measured, and log n has a long tail towards 0 there: 500 to 4000 steps, rarely more
    found = bayesian_unfold(counts, flat.response(edges, reco), n_draws=1000, max_steps=40_000, seed=2)
    truth = 12_000 * np.diff(norm.cdf(edges, MEAN, SD))
    pull = (found.counts - truth) / found.errors
    assert np.abs(pull).max() < 3.5 and (np.abs(pull) < 1.5).mean() >= 0.5


# --- parameters and weights -----------------------------------------------------------------------------------------------------------


def test_two_simulations_one_answer(flat, data):
    """Trained on flat truths and on N(-0.6, 1.15): both find N(0.2, 0.8); two iterations from those priors remember them."""
    other = learned("narrow", 3, 24_000)
    fits = [u.fit_density(data, gaussian, [0.0, 1.0], ("mu", "sigma")) for u in (flat, other)]
    for found in fits:
        assert np.abs((found.values - [MEAN, SD]) / np.hypot(found.errors, 0.01)).max() < 3
        assert abs(found.total - 12_000) < 3 * np.hypot(found.total_error, 200)
        assert found.names == ("mu", "sigma") and "true events" in found.summary()
    assert np.abs(fits[0].values - fits[1].values).max() < 0.05
    remembered, _ = gaussian_recursion(-0.6, 1.15**2, MEAN, SD**2, SMEAR**2, 2)
    assert abs(remembered - MEAN) > 0.1


def test_errors_of_the_fit_are_those_of_the_information(flat, data):
    """Hesse against the exact Fisher information of the smeared, selected Gaussian, by differences on a grid."""
    found = flat.fit_density(data, gaussian, [0.0, 1.0], ("mu", "sigma"))
    t, r = np.linspace(-4, 5, 801), np.linspace(-7, 8, 1201)
    kernel = norm.pdf(r[:, None], t, SMEAR) * efficiency(t)

    def density(phi):
        p = kernel @ norm.pdf(t, *phi)
        return p / p.sum() / (r[1] - r[0])

    h = 1e-4
    steps = ((h, 0.0), (0.0, h))
    score = [np.log(density((MEAN + a, SD + b)) / density((MEAN - a, SD - b))) / (2 * h) for a, b in steps]
    information = len(data) * np.array([[np.trapezoid(a * b * density((MEAN, SD)), r) for b in score] for a in score])
    np.testing.assert_allclose(found.errors, np.sqrt(np.diag(np.linalg.inv(information))), rtol=0.12)


def test_weights_find_the_spectrum_whatever_was_simulated(flat, data):
    found = flat.unfold(data, support=120, n_replicas=30, seed=4)
    assert (np.diff(found.log_likelihood) > -1e-6).all()  # expectation maximisation never falls
    values, covariance = found.statistic(lambda w: np.array([w @ found.points[:, 0], w @ found.points[:, 0] ** 2]) / w.sum())
    error = np.sqrt(np.diag(covariance))
    assert abs(values[0] - MEAN) < 3 * np.hypot(error[0], 0.01)
    assert abs(values[1] - (MEAN**2 + SD**2)) < 3 * np.hypot(error[1], 0.02)
    assert abs(found.total - 12_000) < 600
    counts, spread = found.histogram([-3.4, -0.5, 0.5, 3.9])
    truth = 12_000 * np.diff(norm.cdf([-3.4, -0.5, 0.5, 3.9], MEAN, SD))
    assert np.abs((counts - truth) / np.sqrt(np.diag(spread) + (0.03 * truth) ** 2)).max() < 3
    assert "120 truth points" in found.summary()
    assert found.to_hist([-3.4, 0.0, 3.9]).values().sum() == pytest.approx(found.total, rel=0.01)


def test_smoothing_takes_out_the_spikes(flat, data):
    rough, smooth = (flat.unfold(data, support=120, n_iterations=400, smoothing=s, n_replicas=0).weights for s in (None, 0.05))
    assert np.abs(np.diff(smooth, n=2)).sum() < 0.5 * np.abs(np.diff(rough, n=2)).sum()
    assert smooth.sum() == pytest.approx(rough.sum(), rel=0.05)


# --- maximum likelihood with a kernel that is known ---------------------------------------------------------------------------------------


def known_kernel(counts, matrix, points):
    eff = matrix.sum(axis=0)
    s = matrix.shape[1]
    return Kernel(matrix / eff, np.zeros(len(counts)), eff, counts, np.ones(int(counts.sum())), points, np.ones(s))


class _Task:
    def advance(self, n=1, text=""):
        assert n >= 0


def test_expectation_maximisation_is_iterative_bayes():
    """With points for bins both are the same numbers, for any number of iterations."""
    rng = rng_for(2, "matrix")
    matrix = rng.dirichlet(np.ones(7), size=5).T * rng.uniform(0.4, 0.9, 5)
    counts = rng.poisson(200, 7).astype(float)
    kernel = known_kernel(counts, matrix, np.arange(5.0)[:, None])
    for k in (1, 3, 20):
        found = fit_weights(kernel, k, np.zeros(1), 3, rng_for(0, "boot"), _Task())
        np.testing.assert_allclose(found.weights, ibu(counts, matrix, k).counts, rtol=1e-9)
        assert found.n_iterations == k and found.replicas.shape == (3, 5)


def test_bootstrap_covariance_is_the_propagated_one():
    rng = rng_for(3, "matrix")
    matrix = rng.dirichlet(np.ones(6), size=3).T * 0.8
    counts = rng.poisson(3000, 6).astype(float)
    found = fit_weights(known_kernel(counts, matrix, np.arange(3.0)[:, None]), 10, np.zeros(1), 800, rng_for(1, "boot"), _Task())
    exact = ibu(counts, matrix, 10).covariance_data
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((found.statistic(lambda w: w)[1] - exact) / scale).max() < 0.15


def exact_kernel(events):
    """The toy's detector itself, smearing 0.5 and turn-on, for reconstructed events in fine bins."""
    points, nodes = np.linspace(-3.5, 4, 101), np.linspace(-5, 6, 221)
    counts = np.histogram(events, np.append(nodes - 0.025, nodes[-1] + 0.025))[0].astype(float)
    values, width = norm.pdf(nodes[:, None], points, 0.5), np.full(points.size, points[1] - points[0])
    return Kernel(values, np.zeros(nodes.size), expit((points + 0.2) / 0.3), counts, np.ones(int(counts.sum())), points[:, None], width)


def test_the_iterations_stop_before_the_spikes_and_truths_hardly_ever_seen_take_no_part():
    """The spectrum of every toy is nearer to the truth than after many iterations, and no far event moves its mean."""
    means, nearer = [], 0
    for i in range(8):
        rng = rng_for(i, "exact kernel")
        truth = MEAN + SD * rng.standard_normal(12_000)
        seen = rng.random(truth.size) < expit((truth + 0.2) / 0.3)
        kernel = exact_kernel((truth + 0.5 * rng.standard_normal(truth.size))[seen])
        expected = 12_000 * norm.pdf(kernel.points[:, 0], MEAN, SD) * kernel.volume
        found, late = (fit_weights(kernel, k, np.zeros(1), 0, rng_for(i, "boot"), _Task()) for k in (None, 400))
        assert found.n_iterations < 100
        cut = kernel.efficiency < 1 / np.sqrt(kernel.counts.sum())
        assert cut.sum() > 5 and (found.weights[cut] == 0).all() and found.total == pytest.approx(12_000, rel=0.09)
        nearer += ((found.weights - expected) ** 2).sum() < ((late.weights - expected) ** 2).sum()
        means.append(found.mean[0])
    assert nearer == 8
    # 0.05 over many toys, and 0.19 without the two limits
    assert np.mean(means) == pytest.approx(MEAN, abs=0.06) and np.std(means) < 0.08


def test_folds_are_whole_events_and_lose_none():
    counts = np.array([0.0, 7.0, 1000.0, 3.0])
    parts = _folds(counts, rng_for(0, "folds"))
    np.testing.assert_array_equal(parts.sum(axis=0), counts)
    assert parts.shape == (5, 4) and (parts == np.rint(parts)).all() and 140 < parts[:, 2].min() <= parts[:, 2].max() < 260
    halves = np.array([_folds(np.full(50, 0.5), rng_for(i, "folds")).sum() for i in range(40)])
    assert halves.mean() == pytest.approx(25, abs=2)


def test_density_fit_with_an_exact_kernel():
    """Exponential truths, no smearing, efficiency t: the likelihood is that of a Gamma distribution, rate = 2 n / sum t."""
    t = np.linspace(1e-3, 30, 3000)
    events = rng_for(4, "events").gamma(2.0, 1 / 1.3, 900)
    place = np.clip(np.searchsorted(t, events), 0, t.size - 1)
    values = np.zeros((events.size, t.size))
    values[np.arange(events.size), place] = 1
    points, volume = t[:, None], np.full(t.size, t[1] - t[0])
    kernel = Kernel(values, np.zeros(900), t / 30, np.ones(900), np.ones(900), points, volume)
    found = minimise_density(kernel, lambda p, phi: np.exp(-phi[0] * p[:, 0]), [0.7], ("rate",))
    rate = 2 * 900 / events.sum()
    assert found.values[0] == pytest.approx(rate, rel=5e-3)
    assert found.errors[0] == pytest.approx(rate / np.sqrt(1800), rel=0.02)
    assert found.efficiency == pytest.approx(1 / (30 * rate), rel=0.01)
    assert found.total_error / found.total == pytest.approx(np.sqrt(1 / 900 + 1 / 1800), rel=0.03)


def test_gathering_keeps_total_and_mean():
    rng = rng_for(5, "values")
    values, weights = rng.standard_normal(5000), rng.uniform(0, 2, 5000)
    nodes, total = gathered(values, weights, 100)
    assert total.sum() == pytest.approx(weights.sum())
    assert total @ nodes[:, 0] == pytest.approx(weights @ values)
    assert len(nodes) <= 100 and (total > 0).all()


def test_points_and_volumes():
    truth = np.array([[-1.0], [3.0], [0.5]])
    points, volume = points_of(5, truth, 0)
    np.testing.assert_allclose(points[:, 0], [-1, 0, 1, 2, 3])
    np.testing.assert_allclose(volume, [0.5, 1, 1, 1, 0.5])
    _, volume = points_of([2.0, -1.0, 0.0], truth, 0)
    np.testing.assert_allclose(volume, [1.0, 0.5, 1.5])
    points, volume = points_of(60, np.array([[0.0, 10], [1, 30]]), 0)
    assert points.shape == (64, 2) and volume.sum() == pytest.approx(20)
    assert (points.min(axis=0) >= [0, 10]).all() and (points.max(axis=0) <= [1, 30]).all()


@pytest.mark.slow
def test_two_dimensions_with_correlated_smearing():
    """Truths of (0, 0) and unit spread; data shifted, narrower and correlated by 0.5; both reco smeared together."""
    rng = rng_for(6, "two")
    smear = np.linalg.cholesky(np.array([[0.16, 0.08], [0.08, 0.25]]))

    def measured(truth):
        return truth + rng.standard_normal(truth.shape) @ smear.T

    truth = rng.uniform(-3.2, 3.2, (30_000, 2))
    unfolder = ForwardUnfolder(seed=1, device="cpu").fit(truth, measured(truth))
    real = np.linalg.cholesky(np.array([[0.49, 0.28], [0.28, 0.64]]))
    data = measured(np.array([0.3, -0.2]) + rng.standard_normal((3000, 2)) @ real.T)
    found = unfolder.unfold(data, support=1024, n_replicas=20, n_iterations=300)
    np.testing.assert_allclose(found.mean, [0.3, -0.2], atol=0.06)
    np.testing.assert_allclose(found.sd, [0.7, 0.8], atol=0.06)
    centred = found.points - found.mean
    correlation = (found.weights @ centred.prod(axis=1)) / found.weights.sum() / found.sd.prod()
    assert correlation == pytest.approx(0.5, abs=0.08)

    def normal(t, phi):
        u = (t - phi[:2]) / np.abs(phi[2:4])
        c = np.tanh(phi[4])
        return np.exp(-(u[:, 0] ** 2 - 2 * c * u[:, 0] * u[:, 1] + u[:, 1] ** 2) / (2 * (1 - c**2)))

    fit = unfolder.fit_density(data, normal, [0, 0, 1, 1, 0], ("mx", "my", "sx", "sy", "arc"), support=2048)
    expected = np.array([0.3, -0.2, 0.7, 0.8, np.arctanh(0.5)])
    assert np.abs((fit.values - expected) / np.hypot(fit.errors, 0.015)).max() < 3.5


# --- bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick():
    t = rng_for(0, "t").standard_normal(500)
    return ForwardUnfolder(seed=0, device="cpu", flow=SMALL, config=QUICK).fit(t, t + 0.3 * rng_for(1, "t").standard_normal(500))


def test_not_trained():
    for call in (lambda u: u.unfold([1.0]), lambda u: u.efficiency([1.0]), lambda u: u.response([0, 1], [0, 1])):
        with pytest.raises(SettingError, match="not trained"):
            call(ForwardUnfolder(seed=0, device="cpu"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros(300), np.zeros(200)), ShapeError, "truth has 300 rows and reco 200"),
        ((np.full(300, np.nan), np.zeros(300)), NonFiniteError, "truth has NaN"),
        ((np.zeros(50), np.zeros(50)), DataError, "50 of 50 simulated events are reconstructed"),
        ((np.zeros(300), np.zeros(300), np.zeros(300)), DataError, "0 of 300 simulated events"),
    ],
)
def test_bad_pairs(arguments, error, message):
    with pytest.raises(error, match=message):
        ForwardUnfolder(seed=0, device="cpu").fit(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda u: u.unfold(np.zeros((5, 2))), ShapeError, "data has 2 columns; expected 1"),
        (lambda u: u.unfold(np.full(200, 90.0)), DataError, "no overlap in reco column 0"),
        (lambda u: u.unfold([0.1, 0.2], support=[0.0, 99.0]), DataError, r"1 of 2 points outside of the simulated truths, first \[99.0\]"),
        (lambda u: u.unfold([0.1, 0.2], n_iterations=0), SettingError, "n_iterations is 0"),
        (lambda u: u.unfold([0.1, 0.2], data_weights=[1, -1]), DataError, "below 0"),
        (lambda u: u.unfold([0.1, 0.2], n_replicas=0, n_iterations=1).histogram([0, 1]), SettingError, "0 replicas"),
        (lambda u: u.response([0.0, 50.0, 60.0], [0, 1]), DataError, r"no training events in truth bin 1 \[50, 60\)"),
        (lambda u: u.fit_density([0.1], gaussian, [0.0], ("mu", "sigma")), ShapeError, "start has 1 values and names"),
        (lambda u: u.fit_density([0.1], lambda t, p: 0 * t[:, 0], [0.0], ("a",)), SettingError, "density is 0 at all truth points"),
        (lambda u: u.fit_density([0.1], lambda t, p: t, [0.0], ("a",)), ShapeError, r"density\(t, phi\) has shape"),
        (lambda u: u.fit_density([0.1, 0.3], lambda t, p: np.ones(len(t)), [0.5], ("a",)), ConvergenceError, "did not converge"),
    ],
)
def test_bad_calls(quick, call, error, message):
    with pytest.raises(error, match=message):
        call(quick)


def test_too_many_pairs_say_so():
    t = rng_for(0, "t").standard_normal((400, 2))
    unfolder = ForwardUnfolder(seed=0, device="cpu", flow=SMALL, config=QUICK).fit(t, t + 0.1 * rng_for(1, "t").standard_normal((400, 2)))
    with pytest.raises(SettingError, match="expected at most 30000000: fewer points"):
        unfolder.unfold(np.zeros((20_000, 2)), support=2048)
    with pytest.raises(SettingError, match="2 truth and 2 reco quantities; expected one of each"):
        unfolder.response([0, 1], [0, 1])
