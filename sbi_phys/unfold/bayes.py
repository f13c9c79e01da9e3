r"""Fully Bayesian unfolding: draws of whole spectra from the posterior, with a smoothness that the data choose.

    p(n, sigma | N) ~ prod_j Poisson(N_j | f_j(n)) p(n | sigma) p(sigma),   f_j = sum_mu P[j, mu] n_mu / (1 - phi_j) + b_j

The likelihood is exact in every bin, empty ones too, with fakes and background in the expectation; nothing is subtracted. The prior acts on
log n, so n > 0: independent Gaussian second differences of log(n / reference) with standard deviation sigma, level and tilt all but free
(`spectrum_posterior` has the formulas). A power law of whatever index is a straight line there: on equal bins in lg E the index of the
reference changes nothing, and no simulated spectrum is remembered. sigma is sampled along (half-Cauchy prior), so the strength of the
smoothing is neither tuned on the data nor fixed, and its uncertainty is in the errors.

In the limit of many counts and a fixed sigma the posterior is that of Tikhonov's method with strength 1 / sigma and the truth as prior.

A response with finite simulation statistics is marginalised by linear propagation: with H the curvature at the mode and g the gradient,
dz/dP = H^-1 dg/dP, and a draw of N(0, (dz/dP) V_P (dz/dP)^T) is added to each draw of z = log n.

Source: Choudalakis 2012, arXiv:1201.4612; sampling: `bayes_sampler`.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import chdtrc, xlogy

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold.bayes_sampler import LaplaceGrid, run_chains
from sbi_phys.unfold.histograms import counts_of, to_hist
from sbi_phys.unfold.ibu_steps import bayes_step, scaled_prior
from sbi_phys.unfold.inputs import check_counts, check_covariance, check_nonnegative, check_prior, warn_few
from sbi_phys.unfold.response import Response, as_response
from sbi_phys.unfold.spectrum_posterior import Laplace, LogPosterior, SpectrumPrior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BayesianUnfold", "bayesian_unfold", "default_reference"]


PRIORS = ("smooth", "flat")
METHODS = ("hmc", "emcee")
_START_STEPS = 10  # of iterative Bayes, from where the search for the mode begins
_REPLICAS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class BayesianUnfold:
    r"""Posterior of the true counts in t bins from r reconstructed bins. Counts, without unit.

    samples (n, t), draws of the spectrum; hyper (n,), draws of sigma, the standard deviation of the curvature of log n (empty if fixed).
    counts (t,), posterior mean. covariance (t, t), of the draws; covariance_data without the response's noise, covariance_response that
    noise, propagated linearly. map (t,), mode in log n at the most probable sigma. refolded (r,), expected counts at the mean;
    chi2, their Poisson deviance (or distance by the covariance given) from the measured ones; effective, parameters used (mean deviance
    minus deviance at the mean). predictive_pvalue, share of replicas of the data that lie farther from their spectrum than the data do.
    reference (t,), the spectrum whose ratio is smooth. r_hat (p,), n_effective, converged, message: of the chains.
    """

    samples: Array
    hyper: Array
    counts: Array
    covariance: Array
    covariance_data: Array
    covariance_response: Array
    map: Array
    measured: Array
    refolded: Array
    chi2: float
    effective: float
    predictive_pvalue: float
    reference: Array
    prior: str
    method: str
    r_hat: Array
    n_effective: float
    converged: bool
    message: str
    truth_edges: Array | None
    reco_edges: Array | None

    @property
    def median(self) -> Array:
        """Median of each bin (t,)."""
        return np.asarray(np.median(self.samples, axis=0))

    @property
    def errors(self) -> Array:
        """Posterior standard deviations (t,)."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    @property
    def correlation(self) -> Array:
        """Correlation matrix (t, t)."""
        return np.asarray(self.covariance / np.outer(self.errors, self.errors))

    @property
    def ndf(self) -> int:
        """Number of measured bins; `effective` of them are used up."""
        return int(self.measured.size)

    def intervals(self, level: float = 0.6826894921370859) -> Array:
        """Central credible intervals (t, 2) of each bin: (1 - level) / 2 of the draws lie below, as many above.   Raises: SettingError."""
        share = require_number("level", level, low=0, high=1, open_low=True, open_high=True)
        return np.asarray(np.quantile(self.samples, [(1 - share) / 2, (1 + share) / 2], axis=0).T)

    def to_hist(self) -> Any:
        """Posterior mean and variance as a `hist` or `boost-histogram` object.   Raises: SettingError (no edges), SbiPhysError."""
        return to_hist(self.truth_edges, self.counts, self.covariance)

    def summary(self) -> str:
        """Return the result in words."""
        lines = [
            f"Bayesian unfolding, prior '{self.prior}', {self.method}: {self.counts.sum():.6g} events in {self.counts.size} truth bins from"
            f" {self.measured.sum():.6g} in {self.measured.size}; {len(self.samples)} spectra",
            f"  {'converged' if self.converged else 'NOT converged'}: {self.message}",
            f"  refolded chi2 = {self.chi2:.4g} for {self.ndf} bins and {self.effective:.3g} effective parameters"
            f" (predictive p = {self.predictive_pvalue:.3g})",
            f"  median relative error {100 * float(np.median(self.errors / self.counts)):.2g} %",
        ]
        if self.hyper.size:
            low, middle, high = np.quantile(self.hyper, [0.16, 0.5, 0.84])
            lines.append(f"  sigma, curvature of log n: {middle:.3g} [{low:.3g}, {high:.3g}]")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw median, 68 % and 95 % intervals, the measured and the refolded counts."""
        return figures.unfold_bayes.spectra(self, ax)


class _Draws(NamedTuple):
    """z (n, t), log sigma (n,), and what is known of their convergence."""

    z: Array
    log_sigma: Array
    r_hat: Array
    n_effective: float
    converged: bool
    message: str


def bayesian_unfold(
    counts: ArrayLike,
    response: Response | ArrayLike,
    *,
    prior: str = "smooth",
    smoothness: float | None = None,
    reference: ArrayLike | None = None,
    hyper_scale: float = 0.1,
    dof: float = math.inf,
    level_sd: float = 10.0,
    tilt_sd: float = 10.0,
    counts_covariance: ArrayLike | None = None,
    background: ArrayLike | None = None,
    n_draws: int = 4000,
    max_steps: int = 4000,
    seed: int = 0,
    method: str = "hmc",
    raise_on_failure: bool = True,
    progress: Progress | None = None,
) -> BayesianUnfold:
    r"""Draw spectra from p(n | counts) ~ Poisson likelihood through the response x prior on log n.

    Args:
        counts: (r,), measured, >= 0; nothing subtracted. Or a histogram (UHI) with the response's edges; weighted: its variances are used.
        response: Response, or matrix (r, t) = P(reco | truth).
        prior: "smooth", Gaussian curvature of log(n / reference); or "flat", uniform in each n_mu > 0 (fine bins: long tails).
        smoothness: 1 / sigma, fixed; None: sigma is an unknown with a half-Cauchy prior.
        reference: (t,) > 0, counts, centre of the prior. None: the response's `truth`, else a flat density, scaled to the data.
        hyper_scale: of the half-Cauchy. An index that breaks by dg within a bin of w dex has curvature 2.3 w dg.
        dof: of Student's t for the curvature, >= 1; infinite = Gaussian. 3 for a spectrum that may break sharply in a few places: chains
            take five times as long; with 1 they may not converge.
        level_sd: prior standard deviation of the mean of log(n / reference).
        tilt_sd: the same of its slope over half of the range.
        counts_covariance: (r, r); then the likelihood is Gaussian. None = Poisson.
        background: (r,), expected counts that are no signal; None = the response's own.
        n_draws: effectively independent draws to return.
        max_steps: most steps of each of the 16 chains (of each walker with emcee).
        seed: same seed, same draws.
        method: "hmc" (`bayes_sampler`) or "emcee" (`samplers.mcmc`; slower, an independent check).
        raise_on_failure: False returns an unconverged result (`converged`, `message`) instead of raising.
        progress: shows the share of the draws needed.

    Returns: BayesianUnfold.
    Raises: ShapeError, NonFiniteError, DataError (the bin is named), SettingError, ConvergenceError.
    Warns: UserWarning for fewer events than truth bins.
    Source: Choudalakis 2012, arXiv:1201.4612.
    Read: bins are correlated, so use draws for whatever is computed from the spectrum; a predictive p-value near 0 says that no smooth
        spectrum describes the counts (response or background wrong).
    """
    resp, data, covariance = _inputs(counts, response, counts_covariance, background)
    warn_few(data, resp.n_truth)
    require_choice("method", method, METHODS)
    n_draws, max_steps = require_int("n_draws", n_draws, low=100), require_int("max_steps", max_steps, low=100)
    spectrum_prior = _prior(prior, smoothness, reference, hyper_scale, dof, level_sd, tilt_sd, data, resp)
    posterior = LogPosterior(data, resp, spectrum_prior, None if covariance is None else _inverse(covariance))
    mixture = LaplaceGrid(posterior, _start(data, resp))
    sample = _by_hmc if method == "hmc" else _by_emcee
    with or_none(progress).task("Bayesian unfolding", 1.0) as task:
        draws = sample(posterior, mixture, n_draws, max_steps, seed, raise_on_failure, task)
    return _result(draws, posterior, mixture.best, resp, data, prior, method, seed)


def _inputs(
    counts: ArrayLike, response: Response | ArrayLike, counts_covariance: ArrayLike | None, background: ArrayLike | None
) -> tuple[Response, Array, Array | None]:
    resp = as_response(response)
    if background is not None:
        if resp.background.any():
            raise SettingError("background is given twice, here and in the response; expected one of them")
        resp = resp.with_background(check_nonnegative("background", background, (resp.n_reco,), "reco", resp.reco_edges))
    values, own = counts_of(counts, resp)
    data = check_counts(values, resp.n_reco, resp.reco_edges)
    given = own if counts_covariance is None else counts_covariance
    return resp, data, None if given is None else check_covariance("counts_covariance", given, resp.n_reco)


def _prior(
    prior: str,
    smoothness: float | None,
    reference: ArrayLike | None,
    hyper_scale: float,
    dof: float,
    level_sd: float,
    tilt_sd: float,
    data: Array,
    response: Response,
) -> SpectrumPrior:
    require_choice("prior", prior, PRIORS)
    fixed = None if smoothness is None else require_number("smoothness", smoothness, low=0, open_low=True)
    if fixed is not None and prior == "flat":
        raise SettingError(f"smoothness is {fixed:g}, but prior is 'flat', which has none; expected prior='smooth' or smoothness=None")
    centre = default_reference(data, response) if reference is None else reference
    return SpectrumPrior.build(
        check_prior(centre, response.n_truth, response.truth_edges),
        response.truth_edges,
        flat=prior == "flat",
        smoothness=fixed,
        hyper_scale=require_number("hyper_scale", hyper_scale, low=0, open_low=True),
        dof=dof if dof == math.inf else require_number("dof", dof, low=1),
        level_sd=require_number("level_sd", level_sd, low=0, open_low=True),
        tilt_sd=require_number("tilt_sd", tilt_sd, low=0, open_low=True),
    )


def default_reference(counts: Array, response: Response) -> Array:
    """Spectrum (t,) that the response was made with, or else a flat density, scaled to the counts above background."""
    if response.truth is not None and (response.truth > 0).all():
        shape = response.truth
    else:
        shape = np.ones(response.n_truth) if response.truth_edges is None else np.diff(response.truth_edges)
    return scaled_prior(counts, shape, response)


def _start(data: Array, response: Response) -> Array:
    n = default_reference(data, response)
    for _ in range(_START_STEPS):
        n = bayes_step(data, n, response)
    return np.log(np.maximum(n, 1e-3 * n.mean()))


def _inverse(covariance: Array) -> Array:
    try:
        return np.asarray(np.linalg.inv(covariance))
    except np.linalg.LinAlgError as err:
        raise DataError(f"counts_covariance is singular ({err}); expected one that can be inverted, merge bins without variance") from err


def _by_hmc(posterior: LogPosterior, mixture: LaplaceGrid, n: int, max_steps: int, seed: int, strict: bool, task: Task) -> _Draws:
    rng = rng_for(seed, "bayes chains")
    chains = run_chains(posterior, mixture, n_draws=n, max_steps=max_steps, rng=rng, raise_on_failure=strict, task=task)
    # evenly spaced along each chain, so that neighbours are a correlation time apart
    z, log_sigma = chains.z.reshape(-1, posterior.dim), chains.log_sigma.ravel()
    keep = rng.permutation(np.unique(np.linspace(0, len(z) - 1, min(n, len(z))).round().astype(np.int64)))
    found = chains.verdict
    accepted = f"; accepted {chains.acceptance:.2f} (HMC), {chains.acceptance_independence:.2f} (independent)"
    return _Draws(z[keep], log_sigma[keep], found.r_hat, found.n_effective, found.converged, found.message + accepted)


def _by_emcee(posterior: LogPosterior, mixture: LaplaceGrid, n: int, max_steps: int, seed: int, strict: bool, task: Task) -> _Draws:
    from sbi_phys.samplers.mcmc import run_emcee

    best, d = mixture.best, posterior.dim
    varied = int(mixture.hierarchical)

    def unpack(u: Array) -> tuple[Array, Array]:
        # in units of the best Gaussian approximation, so that one scale fits all coordinates
        return best.mode + u[:, :d] @ best.factor.T, u[:, d] if varied else np.full(len(u), best.log_sigma)

    def log_prob(u: Array) -> Array:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            value = posterior.joint(*unpack(u))
        return np.where(np.isfinite(value), value, -np.inf)

    z, log_sigma = mixture.sample(4 * max(2 * (d + varied) + 2, 8), rng_for(seed, "bayes start"))
    whitened = np.linalg.solve(best.factor, (z - best.mode).T).T
    start = np.column_stack([whitened, log_sigma]) if varied else whitened
    found = run_emcee(log_prob, start, n_draws=n, max_steps=max_steps, seed=seed_for(seed, "bayes emcee") % 2**31, raise_on_failure=strict)
    task.update(1.0)
    z, log_sigma = unpack(found.samples)
    return _Draws(z, log_sigma, found.r_hat, found.n_effective, found.converged, found.message)


def _result(
    draws: _Draws, posterior: LogPosterior, best: Laplace, response: Response, data: Array, prior: str, method: str, seed: int
) -> BayesianUnfold:
    rng = rng_for(seed, "bayes result")
    plain = np.exp(draws.z)
    samples, from_response = plain, np.zeros((posterior.dim, posterior.dim))
    if response.n_simulated is not None:
        in_log = response.propagate(_by_response(posterior, best, response))
        values, vectors = np.linalg.eigh(in_log)
        shift = rng.standard_normal(draws.z.shape) * np.sqrt(np.maximum(values, 0))
        samples = np.exp(draws.z + shift @ vectors.T)
        from_response = in_log * np.outer(np.exp(best.mode), np.exp(best.mode))
    # refolded and compared without the response's noise: a spectrum that a shifted matrix asks for fits that matrix, not this one
    refolded = response.fold(plain.mean(axis=0))
    distances = _distances(posterior, response.fold(plain))
    chi2 = float(_distances(posterior, refolded[None])[0])
    return BayesianUnfold(
        samples=samples,
        hyper=np.exp(draws.log_sigma) if posterior.prior.hierarchical else np.empty(0),
        counts=samples.mean(axis=0),
        covariance=np.atleast_2d(np.cov(samples, rowvar=False)),
        covariance_data=np.atleast_2d(np.cov(plain, rowvar=False)),
        covariance_response=from_response,
        map=np.exp(best.mode),
        measured=data,
        refolded=refolded,
        chi2=chi2,
        effective=float(distances.mean()) - chi2,
        predictive_pvalue=_predictive(posterior, response, plain[:_REPLICAS], distances[:_REPLICAS], rng),
        reference=posterior.prior.reference,
        prior=prior,
        method=method,
        r_hat=draws.r_hat,
        n_effective=draws.n_effective,
        converged=draws.converged,
        message=draws.message,
        truth_edges=response.truth_edges,
        reco_edges=response.reco_edges,
    )


def _by_response(posterior: LogPosterior, best: Laplace, response: Response) -> Array:
    """dz/dP at the mode (t, r, t), by the implicit function theorem."""
    n, real = np.exp(best.mode), 1 - response.fakes
    f = response.fold(n)
    if posterior.weight is None:
        pulled, curved = posterior.counts / f - 1, posterior.matrix * (posterior.counts / f**2)[:, None]
    else:
        pulled, curved = (posterior.counts - f) @ posterior.weight, posterior.weight @ posterior.matrix
    by_matrix = -(n * curved / real[:, None]).T[:, :, None] * n
    every = np.arange(n.size)
    by_matrix[every, :, every] += n[:, None] * (pulled / real)
    return np.asarray(np.linalg.solve(best.precision, by_matrix.reshape(n.size, -1)).reshape(by_matrix.shape))


def _distances(posterior: LogPosterior, folded: Array) -> Array:
    if posterior.weight is None:
        return _deviances(posterior.counts, folded)
    residual = posterior.counts - folded
    return np.asarray(((residual @ posterior.weight) * residual).sum(axis=1))


def _deviances(counts: Array, folded: Array) -> Array:
    """Poisson deviances (s,) of counts (r,) or (s, r) from expectations (s, r) > 0."""
    return np.asarray(2 * (folded - counts + xlogy(counts, counts / folded)).sum(axis=-1))


def _predictive(posterior: LogPosterior, response: Response, spectra: Array, distances: Array, rng: np.random.Generator) -> float:
    if posterior.weight is not None:
        return float(chdtrc(posterior.counts.size, distances).mean())
    folded = response.fold(spectra)
    replicas = rng.poisson(np.minimum(folded, 1e15)).astype(np.float64)
    return float((_deviances(replicas, folded) >= distances).mean())
