"""Bayesian unfolding against posteriors that are known: Gamma, a grid, Tikhonov's Gaussian limit; and the spectra it must cover."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gamma, kstest, multivariate_normal
from scipy.stats import t as student

from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.samplers.diagnostics import split_r_hat
from sbi_phys.unfold import Response, bayes, tikhonov
from sbi_phys.unfold.bayes import LaplaceGrid, bayesian_unfold, run_chains
from sbi_phys.unfold.spectrum import LogPosterior, SpectrumPrior, curvature_matrix, level_and_tilt
from tests.unfold import steep_toy

TWO = np.array([[0.6, 0.2], [0.2, 0.5], [0.05, 0.1]])


def small(**extra):
    rng = rng_for(5, "small response")
    return Response(rng.dirichlet(np.ones(6), size=5).T * rng.uniform(0.5, 0.9, 5), **extra)


FAKES, BACKGROUND = np.array([0.1, 0.0, 0.2, 0.05, 0.0, 0.3]), np.array([5.0, 20.0, 0.0, 11.0, 2.0, 30.0])
COUNTS = np.array([120.0, 340.0, 90.0, 205.0, 77.0, 150.0])


def model(**settings):
    response = small(fakes=FAKES, background=BACKGROUND)
    prior = SpectrumPrior.build(np.array([300.0, 200.0, 100.0, 400.0, 250.0]), None, **settings)
    return LogPosterior(COUNTS, response, prior)


# --- exact posteriors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "efficiency"), [(1, 0.5), (7, 0.8), (400, 0.3)])
def test_one_bin_is_a_gamma_distribution(count, efficiency):
    """Flat prior, no background: p(n | N) = Gamma(N + 1, rate eps); the neighbour Gamma(N) is told apart."""
    found = bayesian_unfold([count], [[efficiency]], prior="flat", n_draws=4000, seed=1)
    exact = gamma(count + 1, scale=1 / efficiency)
    assert kstest(found.samples[:, 0], exact.cdf).pvalue > 1e-3
    if count < 100:
        assert kstest(found.samples[:, 0], gamma(count, scale=1 / efficiency).cdf).pvalue < 1e-6
    assert found.counts[0] == pytest.approx(exact.mean(), rel=0.05)
    assert found.map[0] == pytest.approx((count + 1) / efficiency, rel=1e-4)  # the mode in log n
    np.testing.assert_allclose(found.intervals(0.9)[0], exact.ppf([0.05, 0.95]), rtol=0.06)


def test_one_bin_with_background():
    """p(n) ~ (eps n + b)^N e^{-eps n} by quadrature, n > 0: the posterior leans on the edge."""
    count, efficiency, background = 4, 0.5, 5.0
    response = Response([[efficiency]], background=[background])
    found = bayesian_unfold([count], response, prior="flat", n_draws=4000, seed=3)
    n = np.linspace(0, 80, 40_001)
    density = (efficiency * n + background) ** count * np.exp(-efficiency * n)
    cdf = np.cumsum(density) / density.sum()
    assert kstest(found.samples[:, 0], lambda x: np.interp(x, n, cdf)).pvalue > 1e-3


def test_diagonal_response_has_independent_gamma_bins():
    counts, efficiency = np.array([3.0, 50.0, 0.0, 12.0]), np.array([0.9, 0.5, 0.4, 0.7])
    found = bayesian_unfold(counts, np.diag(efficiency), prior="flat", n_draws=4000, seed=2)
    for i, (n, e) in enumerate(zip(counts, efficiency, strict=True)):
        assert kstest(found.samples[:, i], gamma(n + 1, scale=1 / e).cdf).pvalue > 1e-3
    off = found.correlation - np.eye(4)
    assert np.abs(off).max() < 0.07  # 4000 draws: 0.016 each


def grid_moments(counts, response, sides=250):
    """Mean and covariance (in n) of the flat-prior posterior of two bins, on a grid."""
    a = np.linspace(1e-3, 120, sides)
    first, second = np.meshgrid(a, a, indexing="ij")
    n = np.stack([first.ravel(), second.ravel()], axis=1)
    f = response.fold(n)
    log_p = (counts * np.log(f) - f).sum(axis=1)
    p = np.exp(log_p - log_p.max())
    p /= p.sum()
    mean = p @ n
    return mean, (n - mean).T @ ((n - mean) * p[:, None])


@pytest.mark.parametrize("method", ["hmc", pytest.param("emcee", marks=pytest.mark.slow)])
def test_two_bins_against_a_grid(method):
    counts, response = np.array([22.0, 14.0, 5.0]), Response(TWO, fakes=[0.1, 0.0, 0.2], background=[1.0, 2.0, 0.5])
    mean, covariance = grid_moments(counts, response)
    found = bayesian_unfold(counts, response, prior="flat", method=method, n_draws=4000, seed=4)
    np.testing.assert_allclose(found.counts, mean, atol=4 * np.sqrt(np.diag(covariance) / 4000).max())
    np.testing.assert_allclose(found.covariance, covariance, atol=0.08 * np.abs(covariance).max())
    assert found.correlation[0, 1] < -0.2  # migration ties the bins


@pytest.mark.parametrize("dof", [np.inf, 2.0])
def test_hierarchical_posterior_of_three_bins_by_quadrature(dof):
    """sigma and three spectra's logs, on a grid: mean and sd of log n and of log sigma."""
    counts = np.array([30.0, 9.0, 6.0])
    response = Response(np.array([[0.8, 0.2, 0.0], [0.1, 0.6, 0.2], [0.0, 0.1, 0.7]]))
    reference, settings = np.array([40.0, 20.0, 10.0]), {"level_sd": 0.7, "tilt_sd": 0.6, "hyper_scale": 0.5, "dof": dof}
    found = bayesian_unfold(counts, response, reference=reference, n_draws=4000, seed=5, **settings)
    posterior = LogPosterior(counts, response, SpectrumPrior.build(reference, None, **settings))
    side = [np.linspace(m - 7 * s, m + 5 * s, 33) for m, s in zip(np.log(found.samples).mean(0), np.log(found.samples).std(0), strict=True)]
    z = np.stack([g.ravel() for g in np.meshgrid(*side, indexing="ij")], axis=1)
    sigma = np.linspace(*posterior.prior.range, 48)
    weight, moments = np.zeros(48), np.zeros((48, 3))
    for i, s in enumerate(sigma):
        p = np.exp(posterior.joint(z, np.full(len(z), s)) - posterior.joint(np.log(found.map)[None], np.array([sigma[24]]))[0])
        weight[i], moments[i] = p.sum(), p @ z
    mean = moments.sum(axis=0) / weight.sum()
    np.testing.assert_allclose(np.log(found.samples).mean(axis=0), mean, atol=0.02)
    exact = weight @ sigma / weight.sum()
    assert np.log(found.hyper).mean() == pytest.approx(exact, abs=0.12)
    assert np.log(found.hyper).std() == pytest.approx(np.sqrt(weight @ (sigma - exact) ** 2 / weight.sum()), rel=0.08)


def test_gaussian_limit_is_tikhonov():
    """1e9 events and a fixed smoothness: mean and covariance are those of the formula with the same precision matrix."""
    response = Response.from_resolution(np.arange(9.0), np.arange(9.0), 0.7)
    truth = 1e8 * np.exp(-0.3 * np.arange(8.0))
    counts = response.fold(truth) * (1 + 1e-5 * rng_for(1, "noise").standard_normal(8))
    strength = 3e3
    found = bayesian_unfold(counts, response, smoothness=strength, reference=truth, level_sd=1e3, tilt_sd=1e3, n_draws=5000, seed=6)
    exact = tikhonov(counts, response, strength, prior=truth)
    weight = np.linalg.inv(np.diag(response.fold(truth)))
    penalty = curvature_matrix(None, 8)
    precision = (response.matrix * truth).T @ weight @ (response.matrix * truth) + strength**2 * penalty.T @ penalty
    covariance = np.linalg.inv(precision) * np.outer(truth, truth)
    error = np.sqrt(np.diag(covariance))
    assert np.abs((found.counts - exact.counts) / error).max() < 0.08
    np.testing.assert_allclose(found.covariance / np.outer(error, error), covariance / np.outer(error, error), atol=0.08)
    # the posterior is wider than the estimator's scatter: the prior's share is in it
    assert (np.diag(found.covariance) > np.diag(exact.covariance_data)).all()


def test_counts_covariance_gives_the_gaussian_posterior():
    """Against the conjugate answer where log n is as good as linear."""
    response = Response(TWO)
    truth = np.array([1e6, 2e6])
    v = np.diag([1e6, 4e6, 1e6]) + 3e5
    mean = response.fold(truth) + np.array([900.0, -700.0, 300.0])
    found = bayesian_unfold(mean, response, prior="flat", counts_covariance=v, n_draws=5000, seed=7)
    inverse = np.linalg.inv(v)
    covariance = np.linalg.inv(TWO.T @ inverse @ TWO)
    centre = covariance @ TWO.T @ inverse @ mean
    error = np.sqrt(np.diag(covariance))
    assert np.abs((found.counts - centre) / error).max() < 0.08
    np.testing.assert_allclose(found.covariance / np.outer(error, error), covariance / np.outer(error, error), atol=0.08)


# --- density, gradient, sampler -------------------------------------------------------------------------------------------------------


def test_heavy_tails_are_those_of_students_t():
    """Ratio of prior densities at two spectra; and the weights are those of the best Gaussian that touches the t from below."""
    log_sigma, bent = np.array([-0.7]), np.array([[0.3, -2.0, 0.05], [0.0, 0.0, 0.0]])
    prior = model(dof=3.0).prior
    value = prior.log_curvature(bent, log_sigma)
    exact = student(3.0, scale=np.exp(-0.7)).logpdf(bent).sum(axis=1)
    assert value[0] - value[1] == pytest.approx(exact[0] - exact[1])
    near = model(dof=1e7).prior
    np.testing.assert_allclose(near.log_curvature(bent, log_sigma), model().prior.log_curvature(bent, log_sigma), rtol=1e-5)
    np.testing.assert_allclose(near.precision(-0.7, bent[0]), model().prior.precision(-0.7), rtol=1e-5, atol=1e-9)
    other = np.array([[0.9, -1.0, 0.4]])
    bound = value[:1] - 0.5 * (prior.weights(bent, log_sigma)[:1] * (other**2 - bent[:1] ** 2)).sum(axis=1)
    assert prior.log_curvature(other, log_sigma)[0] > bound[0]


@pytest.mark.parametrize("settings", [{}, {"flat": True}, {"smoothness": 7.0}, {"dof": 2.0}])
def test_gradient_and_information_against_differences(settings):
    posterior = model(**settings)
    z, log_sigma = np.log(np.array([250.0, 240.0, 90.0, 330.0, 180.0])), -1.3
    value, gradient = posterior.given_sigma(z, np.float64(log_sigma))
    step = 1e-5 * np.eye(5)
    up, slope_up = posterior.given_sigma(z + step, np.full(5, log_sigma))
    down, slope_down = posterior.given_sigma(z - step, np.full(5, log_sigma))
    np.testing.assert_allclose((up - down) / 2e-5, gradient, rtol=1e-6, atol=1e-6 * np.abs(gradient).max())
    curved = -(slope_up - slope_down) / 2e-5
    if "dof" in settings:  # there a positive matrix below minus the curvature takes its place
        assert np.linalg.eigvalsh(posterior.information(z, log_sigma, expected=True)).min() > 0
        return
    np.testing.assert_allclose(posterior.information(z, log_sigma, expected=False), curved, rtol=1e-5, atol=1e-6 * np.abs(curved).max())
    assert np.isfinite(value)


def test_gaussian_likelihood_gradient_against_differences():
    response = small(background=BACKGROUND)
    weight = np.linalg.inv(np.diag(COUNTS) + 20.0)
    posterior = LogPosterior(COUNTS, response, SpectrumPrior.build(np.full(5, 200.0), None), weight)
    z, step = np.log(np.array([250.0, 240.0, 90.0, 330.0, 180.0])), 1e-5 * np.eye(5)
    gradient = posterior.likelihood(z)[1]
    np.testing.assert_allclose(
        (posterior.likelihood(z + step)[0] - posterior.likelihood(z - step)[0]) / 2e-5, gradient, rtol=1e-5, atol=1e-6
    )


@given(st.integers(2, 9), st.floats(-5, 5), st.floats(-5, 5))
def test_curvature_is_blind_to_straight_lines_on_any_bins(n, level, slope):
    edges = np.cumsum(rng_for(n, "edges").uniform(0.2, 3, n + 1))
    centre = (edges[1:] + edges[:-1]) / 2
    line = level + slope * (centre - centre.mean()) / (centre[-1] - centre.mean())
    assert np.abs(curvature_matrix(edges, n) @ line).max(initial=0) < 1e-9
    flat, k = level_and_tilt(edges, n)
    assert flat @ line == pytest.approx(level, abs=1e-9)
    assert k @ line * (2 / (centre[-1] - centre[0])) == pytest.approx(slope / (centre[-1] - centre.mean()), abs=1e-9)
    assert n == 2 or np.linalg.matrix_rank(curvature_matrix(edges, n)) == n - 2


def test_curvature_of_equal_bins_is_the_second_difference():
    np.testing.assert_allclose(curvature_matrix(np.linspace(18, 20, 6), 5), np.diff(np.eye(5), n=2, axis=0), atol=1e-12)


def test_mixture_density_is_that_of_its_draws():
    """Importance weights between two mixtures of the same draws average to one."""
    posterior = model()
    mixture, other = LaplaceGrid(posterior, np.log(np.full(5, 200.0))), LaplaceGrid(model(hyper_scale=0.13), np.log(np.full(5, 200.0)))
    z, log_sigma = other.sample(40_000, rng_for(0, "mixture"))
    inside = (log_sigma > mixture.edges[0]) & (log_sigma < mixture.edges[-1])
    ratio = np.exp(mixture.log_prob(z, log_sigma) - other.log_prob(z, log_sigma)) * inside
    covered = np.mean(mixture.sample(40_000, rng_for(1, "mixture"))[1] > other.edges[0])
    assert ratio.mean() == pytest.approx(covered, abs=6 * ratio.std() / 200)
    assert np.exp(mixture.log_weights).sum() == pytest.approx(1)


class _Task:
    def update(self, completed, text=""):
        assert 0 <= completed <= 1


def test_each_move_alone_leaves_the_posterior_alone():
    """Chains with the independent proposals off agree with those that have them, in mean and spread, sigma included."""
    posterior = model(hyper_scale=0.3)
    mixture = LaplaceGrid(posterior, np.log(np.full(5, 200.0)))
    kept = run_chains(posterior, mixture, n_draws=1500, max_steps=4000, rng=rng_for(1, "a"), raise_on_failure=True, task=_Task())
    draws = np.concatenate([kept.z.reshape(-1, 5), kept.log_sigma.reshape(-1, 1)], axis=1)
    for cell in range(len(mixture.cells)):
        mixture.log_weights[cell] = -50 if cell else 0.0  # proposes one corner alone: never of use, and never wrong
    alone = run_chains(posterior, mixture, n_draws=1500, max_steps=2000, rng=rng_for(2, "b"), raise_on_failure=False, task=_Task())
    again = np.concatenate([alone.z.reshape(-1, 5), alone.log_sigma.reshape(-1, 1)], axis=1)
    assert alone.acceptance_independence < 0.05 < kept.acceptance_independence
    assert kept.acceptance > 0.6
    sd = draws.std(axis=0)
    assert np.abs((draws.mean(axis=0) - again.mean(axis=0)) / sd).max() < 0.15
    np.testing.assert_allclose(again.std(axis=0) / sd, 1, atol=0.12)


@pytest.mark.parametrize("dof", [math.inf, 3.0])
def test_bins_released_to_their_prior_have_the_same_posterior(monkeypatch, dof):
    """The first bin is hardly measured: with the moves that release bins all quantiles are those without, and fewer draws are needed."""
    truth, matrix = np.array([30.0, 200.0, 400.0, 300.0, 100.0]), np.diag([0.03, 0.5, 0.8, 0.9, 0.9]) + 0.05 * np.eye(5, k=1)
    response = Response(matrix)
    prior = SpectrumPrior.build(np.full(5, 200.0), None, hyper_scale=0.3, dof=dof)
    posterior = LogPosterior(np.round(matrix @ truth), response, prior)
    mixture = LaplaceGrid(posterior, np.log(truth))
    found, slow = [], []
    for widest in (3, 0):
        monkeypatch.setattr(bayes, "WIDEST", widest)
        steps = 700 if widest else 1400
        chains = run_chains(posterior, mixture, n_draws=10**6, max_steps=steps, rng=rng_for(3), raise_on_failure=False, task=_Task())
        found.append(np.column_stack([chains.z[:, :, 0].ravel(), chains.z[:, :, 3].ravel(), chains.log_sigma.ravel()]))
        slow.append(chains.verdict.autocorr_time[0])
    assert slow[0] < slow[1]
    for a, b in zip(found[0].T, found[1].T, strict=True):
        shares = [(b < q).mean() for q in np.quantile(a, [0.05, 0.25, 0.5, 0.75, 0.95])]
        np.testing.assert_allclose(shares, [0.05, 0.25, 0.5, 0.75, 0.95], atol=0.05)


# --- a steep spectrum -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steep():
    response = steep_toy.response()
    counts = rng_for(1, "steep").poisson(response.fold(steep_toy.power_law(2.7)))
    return response, counts, bayesian_unfold(counts, response, n_draws=2000, seed=8)


def test_steep_spectrum_is_found_within_its_errors(steep):
    _, counts, found = steep
    pull = (found.counts - steep_toy.power_law(2.7)) / found.errors
    assert np.abs(pull).max() < 4 and (np.abs(pull) < 1).mean() > 0.3
    assert found.converged and found.r_hat.max() <= 1.01 and found.n_effective >= 2000
    assert found.predictive_pvalue > 0.01
    assert found.refolded.sum() == pytest.approx(counts.sum(), rel=0.01)
    assert 1 < found.effective < 12  # of 20 bins: a straight line and a little
    assert split_r_hat(found.samples.reshape(4, 500, 20)).max() < 1.02  # in random order
    assert "curvature of log n" in found.summary() and "converged" in found.summary()


def test_the_index_of_the_reference_changes_nothing(steep):
    """A power law is a straight line in log n: 2.4 and 3.0 give the same posterior, within the noise of the draws."""
    response, counts, found = steep
    for index in (2.4, 3.0):
        other = bayesian_unfold(counts, response, reference=steep_toy.power_law(index), n_draws=2000, seed=9)
        assert np.abs((other.counts - found.counts) / found.errors).max() < 0.12


def test_a_wrong_background_is_seen(steep):
    response, counts, _ = steep
    spoiled = counts.copy()
    spoiled[8] *= 1.5
    assert bayesian_unfold(spoiled, response, smoothness=100, n_draws=500).predictive_pvalue < 0.01


def test_same_seed_same_draws(steep):
    response, counts, _ = steep
    one, two, other = (bayesian_unfold(counts, response, n_draws=300, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.samples, two.samples)
    assert (one.samples != other.samples).any()


def test_noise_of_the_response_is_propagated():
    """Against refits with resampled matrices: the spread of the mode that the simulation's statistics gives."""
    exact = small()
    n_simulated = np.full(5, 2000.0)
    response = small(n_simulated=n_simulated)
    counts = exact.fold(np.array([3e5, 2e5, 1e5, 4e5, 2.5e5]))
    settings = {"smoothness": 20.0, "n_draws": 3000, "seed": 3}
    found = bayesian_unfold(counts, response, **settings)
    without = bayesian_unfold(counts, exact, **settings)
    rng = rng_for(4, "matrices")
    modes = []
    for _ in range(150):
        shares = np.vstack([exact.matrix, 1 - exact.efficiency])
        drawn = np.array([rng.multinomial(2000, column / column.sum()) for column in shares.T]).T[:-1] / 2000
        prior = SpectrumPrior.build(found.reference, None, smoothness=20.0)
        modes.append(LogPosterior(counts, Response(drawn), prior).laplace(-np.log(20.0), np.log(found.map)).mode)
    spread = np.cov(np.exp(np.array(modes)), rowvar=False)
    np.testing.assert_allclose(np.sqrt(np.diag(found.covariance_response)), np.sqrt(np.diag(spread)), rtol=0.25)
    total = np.diag(without.covariance) + np.diag(spread)
    np.testing.assert_allclose(np.diag(found.covariance), total, rtol=0.4)
    assert np.diag(found.covariance_data) == pytest.approx(np.diag(without.covariance), rel=0.15)


@pytest.mark.slow
def test_ranks_of_truths_from_the_prior_are_uniform():
    """Simulation-based calibration of the whole hierarchy: sigma and spectrum from the prior, counts from them, rank among draws."""
    response = Response.from_resolution(np.arange(7.0), np.arange(7.0), 0.6, efficiency=0.8)
    reference = 60 * np.exp(-0.4 * np.arange(6.0))
    settings = {"level_sd": 0.4, "tilt_sd": 0.4, "hyper_scale": 0.2}
    ranks = []
    for i in range(150):
        rng = rng_for(11, "sbc", i)
        while True:
            sigma = 0.2 * abs(np.tan(np.pi * (rng.random() - 0.5)))
            if np.exp(-7) < sigma / 0.2 < np.exp(5):
                break
        prior = SpectrumPrior.build(reference, response.truth_edges, smoothness=1 / sigma, level_sd=0.4, tilt_sd=0.4)
        x = multivariate_normal(np.zeros(6), np.linalg.inv(prior.precision(np.log(sigma))), allow_singular=True).rvs(random_state=rng)
        truth = reference * np.exp(x)
        if truth.max() > 1e6:
            continue  # a half-Cauchy has no mean: such spectra are in the prior, not in a test's budget
        found = bayesian_unfold(rng.poisson(response.fold(truth)), response, reference=reference, n_draws=199, seed=i, **settings)
        ranks.append(np.append((found.samples < truth).sum(axis=0), (found.hyper < sigma).sum()))
    uniform = (np.array(ranks) + rng_for(12, "jitter").random((len(ranks), 7))) / 200
    assert len(ranks) > 130
    assert min(kstest(column, "uniform").pvalue for column in uniform.T) > 1e-3


# --- bad input ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"counts": [1, 2, 3]}, ShapeError, r"counts has shape \(3,\); expected \(6,\)"),
        ({"counts": [1, 2, 3, 4, 5, -1]}, DataError, "counts is -1 at reco bin 5"),
        ({"counts": [1, 2, 3, 4, 5, np.nan]}, NonFiniteError, "counts has NaN"),
        ({"counts": np.zeros(6)}, DataError, "counts are zero in all 6 bins"),
        ({"prior": "smoth"}, SettingError, "did you mean 'smooth'"),
        ({"method": "nuts"}, SettingError, "method is 'nuts'; expected one of hmc, emcee"),
        ({"smoothness": 0.0}, SettingError, "smoothness is 0.0; expected a finite number > 0"),
        ({"smoothness": 5.0, "prior": "flat"}, SettingError, "smoothness is 5, but prior is 'flat'"),
        ({"dof": 0.5}, SettingError, "dof is 0.5"),
        ({"hyper_scale": -1.0}, SettingError, "hyper_scale is -1.0"),
        ({"reference": [1, 2, 0, 4, 5]}, DataError, "prior is 0 at truth bin 2"),
        ({"n_draws": 10}, SettingError, "n_draws is 10; expected a finite number >= 100"),
        ({"background": np.ones(5)}, ShapeError, "background has shape"),
        ({"counts_covariance": np.zeros((6, 6))}, DataError, "counts_covariance is singular"),
        ({"progress": "bar"}, SettingError, "progress is 'bar'"),
    ],
)
def test_bad_input_is_named(change, error, message):
    arguments = {"counts": COUNTS, "response": small()} | change
    with pytest.raises(error, match=message):
        bayesian_unfold(arguments.pop("counts"), arguments.pop("response"), **arguments)


def test_background_given_twice_and_few_events():
    with pytest.raises(SettingError, match="background is given twice"):
        bayesian_unfold(COUNTS, small(background=BACKGROUND), background=BACKGROUND)
    with pytest.warns(UserWarning, match="3 events for 5 truth bins"):
        bayesian_unfold([1, 0, 0, 1, 0, 1], small(), level_sd=1.0, tilt_sd=1.0, n_draws=100)


def test_too_few_steps_are_an_error_that_says_how_far_it_got():
    with pytest.raises(ConvergenceError, match="R-hat .* effective draws of 100000 wanted"):
        bayesian_unfold(COUNTS, small(), n_draws=100_000, max_steps=100)
    found = bayesian_unfold(COUNTS, small(), n_draws=100_000, max_steps=100, raise_on_failure=False)
    assert not found.converged and "NOT converged" in found.summary() and len(found.samples) == 1600


def test_plot(steep):
    from matplotlib.figure import Figure

    ax = steep[2].plot()
    assert isinstance(ax.figure, Figure) and ax.get_yscale() == "log"
    assert {t.get_text() for t in ax.get_legend().get_texts()} >= {"measured", "refolded", "68 %"}
