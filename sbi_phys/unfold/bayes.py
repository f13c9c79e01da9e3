r"""Fully Bayesian unfolding: draws of whole spectra from the posterior, with a smoothness that is inferred from the data.

    p(n, sigma | N) ~ prod_j Poisson(N_j | f_j(n)) p(n | sigma) p(sigma) ,   f_j = sum_mu P[j, mu] n_mu / (1 - phi_j) + b_j

The likelihood is exact in every bin, empty ones included; fakes and background are part of the expectation and nothing is subtracted.
The prior acts on log n, so n > 0: independent Gaussian second differences of log(n / reference) with standard deviation sigma, and a
level and a tilt that are almost free (`spectrum` has the formulas). A power law of any index is a straight line there, so that on equal
bins in lg E the index of the reference changes nothing. sigma is sampled with a half-Cauchy prior, so the errors include the uncertainty
of the strength of the smoothing. In the limit of many counts and fixed sigma the posterior is that of Tikhonov's method with strength
1 / sigma and the truth as prior.

A response with finite simulation statistics is marginalised by linear propagation: with H the curvature at the mode and g the gradient,
dz/dP = H^-1 dg/dP, and a draw of N(0, (dz/dP) V_P (dz/dP)^T) is added to each draw of z = log n.

Sampling. Every step of every chain leaves p(z, log sigma | N) invariant, whatever the quality of the approximations:

1. z given sigma by Hamiltonian Monte Carlo, in coordinates whitened by the Laplace approximation at the nearest sigma of a grid.
2. sigma given z by Gibbs sampling: with nu auxiliary, the half-Cauchy prior is sigma^2 | nu ~ IG(1/2, 1/nu), nu ~ IG(1/2, 1/s^2), hence
   nu | sigma ~ IG(1, 1/s^2 + 1/sigma^2),   sigma^2 | nu, z ~ IG((m + 1)/2, 1/nu + |D x|^2 / 2); a draw outside of the range is refused.
   Student's t of k degrees is a Gaussian with a factor l_i ~ IG(k/2, k/2) of sigma^2. The factors are drawn first,
   l_i | sigma, z ~ IG((k + 1)/2, (k + (D x)_i^2 / sigma^2) / 2), and divide the squares in |D x|^2.
3. Both at once, proposed from a mixture of multivariate t distributions around the modes of the grid, weighted by the Laplace evidence
   (independence Metropolis). These moves cross between rough and smooth solutions, where steps 1 and 2 are slow.

4. A few bins B and sigma at once, from their prior given the other bins (independence Metropolis, accepted by the likelihood
   and the prior of level and tilt alone). With A the columns B of D, u = D x without them, m_B = -(A^T A)^-1 A^T u and nu as in step 2,
   sigma^2 | nu, z_-B ~ IG((m - |B| + 1)/2, 1/nu + |u + A m_B|^2 / 2),   x_B | sigma, z_-B ~ N(m_B, sigma^2 (A^T A)^-1).
   A bin that is hardly measured follows this prior down to n -> 0, where log n and sigma are long tails of each other, and no Gaussian
   fits. Bins are proposed in proportion to the share that was accepted during burn-in.

Chains start from widened draws of the mixture. They run until split R-hat of log(1 + n), log sigma and log p is at most 1.01 and the
effective number of draws reaches the number requested.

Source: Choudalakis 2012, arXiv:1201.4612; Neal 2011, arXiv:1206.1901 (HMC); Rue+ 2009, J. R. Stat. Soc. B 71, 319 (grid of Laplace
approximations); Makalic & Schmidt 2016, arXiv:1508.03884 (half-Cauchy by inverse gammas); Tierney 1994, Ann. Statist. 22, 1701 (mixtures
of kernels).
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
from sbi_phys.core.results import Result, Rows, bin_columns
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.samplers.diagnostics import R_HAT_MAX, Verdict, autocorrelation_time, require_converged, run_until_converged, split_r_hat
from sbi_phys.unfold._inputs import check_prior
from sbi_phys.unfold.histograms import measured, to_hist
from sbi_phys.unfold.ibu import bayes_step, scaled_prior
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.spectrum import Laplace, LogPosterior, SpectrumPrior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BayesianUnfold", "Chains", "LaplaceGrid", "bayesian_unfold", "default_reference", "run_chains"]


N_CELLS = 36  # cells of the grid in log sigma, each a third of a unit wide
N_CHAINS = 16
DOF = 30.0  # degrees of freedom of the t distributions, whose tails are heavier than those of the posterior
# scales of the t distributions and their shares: the wide part is for bins with few counts
SCALES, SHARES = np.array([1.0, 3.0]), np.array([0.85, 0.15])
WIDER = 1.3  # factor by which the starts of the chains are wider than the mixture
ANGLE = 1.8  # length of a trajectory; with pi / 2 the draws of a Gaussian are independent
SMALL_SHARE = 0.25  # of trajectories with a smaller step
BURN_BLOCK, BURN_BLOCKS = 25, 8
WIDEST = 3  # neighbouring bins that are drawn from their prior at once


class LaplaceGrid:
    """Laplace approximations on a grid of log sigma, as one density of (z, log sigma).

    Args: posterior. start (t,): where the search for modes begins.   Raises: ConvergenceError.
    """

    def __init__(self, posterior: LogPosterior, start: Array) -> None:
        low, high = posterior.prior.range
        self.hierarchical = posterior.prior.hierarchical
        self.edges = np.linspace(low, high, N_CELLS + 1) if self.hierarchical else np.array([low - 0.5, low + 0.5])
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        cells: list[Laplace] = []
        for log_sigma in centres[::-1]:  # from rough to smooth: each mode starts from the previous one
            start = start if not cells else cells[-1].mode
            cells.append(posterior.laplace(float(log_sigma), start))
        self.cells = cells[::-1]
        self.modes = np.array([c.mode for c in self.cells])
        self.factors = np.array([c.factor for c in self.cells])
        self._inverse = np.linalg.inv(self.factors)
        self._log_det = np.log(np.abs(np.einsum("kii->ki", self.factors))).sum(axis=1)
        evidence = np.array([c.log_evidence for c in self.cells])
        self.log_weights = evidence - np.logaddexp.reduce(evidence)
        # cells with negligible evidence keep a small probability
        self.log_weights = np.logaddexp(self.log_weights + math.log(0.98), math.log(0.02 / len(cells)))

    @property
    def best(self) -> Laplace:
        """Laplace approximation in the cell with the largest evidence."""
        return self.cells[int(np.argmax([c.log_evidence for c in self.cells]))]

    def cell(self, log_sigma: Array) -> Integers:
        """Index of the cell of each log sigma (c,)."""
        return np.clip(np.searchsorted(self.edges, log_sigma, side="right") - 1, 0, len(self.cells) - 1)

    def sample(self, n: int, rng: np.random.Generator, wider: float = 1.0) -> tuple[Array, Array]:
        """Draw z (n, t) and log sigma (n,)."""
        k = rng.choice(len(self.cells), n, p=np.exp(self.log_weights))
        share = rng.random(n) if self.hierarchical else np.full(n, 0.5)
        log_sigma = self.edges[k] + share * (self.edges[k + 1] - self.edges[k])
        scale = wider * rng.choice(SCALES, n, p=SHARES) / np.sqrt(rng.chisquare(DOF, n) / DOF)
        y = rng.standard_normal((n, self.modes.shape[1])) * scale[:, None]
        return self.modes[k] + np.einsum("cij,cj->ci", self.factors[k], y), log_sigma

    def log_prob(self, z: Array, log_sigma: Array) -> Array:
        """Log density (c,), up to a constant."""
        k = self.cell(log_sigma)
        y = np.einsum("cij,cj->ci", self._inverse[k], z - self.modes[k])
        d, squared = z.shape[-1], (y**2).sum(axis=-1)[..., None]
        tails = np.log(SHARES) - d * np.log(SCALES) - (DOF + d) / 2 * np.log1p(squared / (DOF * SCALES**2))
        return np.asarray(self.log_weights[k] - self._log_det[k] + np.logaddexp.reduce(tails, axis=-1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chains:
    """z (c, s, t), log_sigma (c, s) of production; verdict on z, log sigma if it varies, and log p; acceptances."""

    z: Array
    log_sigma: Array
    verdict: Verdict
    acceptance: float
    acceptance_independence: float
    n_burn: int


@dataclass(slots=True)
class _State:
    z: Array
    log_sigma: Array
    value: Array  # log p(z | sigma) of the chains
    gradient: Array


class _Kernel:
    """The four moves for all chains at once, with their acceptance rates."""

    def __init__(self, posterior: LogPosterior, mixture: LaplaceGrid, rng: np.random.Generator) -> None:
        self.posterior, self.mixture, self.rng = posterior, mixture, rng
        self.step_size, self.adapting = 0.45, True
        prior = posterior.prior
        most = 0 if prior.flat else min(WIDEST, posterior.dim - 2)
        self.blocks = [np.arange(i, i + size) for size in range(1, most + 1) for i in range(posterior.dim - size + 1)]
        self.released = np.full((2, len(self.blocks)), 1.0)  # accepted and proposed of each block, in burn-in
        self.forget()

    def forget(self) -> None:
        self.accepted, self.independent, self.n_steps = 0.0, 0.0, 0

    def start(self) -> _State:
        z, log_sigma = self.mixture.sample(N_CHAINS, self.rng, wider=WIDER)
        return _State(z, log_sigma, *self.posterior.given_sigma(z, log_sigma))

    def step(self, state: _State) -> None:
        """One step of every chain, in place."""
        self.accepted += self._hamiltonian(state)
        if self.mixture.hierarchical:
            self._gibbs(state)
        self.independent += self._independent(state)
        for pair in range(2 if self.blocks else 0):
            self._release(state, pair)
        self.n_steps += 1

    def _hamiltonian(self, state: _State) -> float:
        rng, c = self.rng, len(state.z)
        factor = self.mixture.factors[self.mixture.cell(state.log_sigma)]
        # now and then a smaller step, since the whitening of a cell does not fit where a bin is nearly empty
        step = (self.step_size * np.where(rng.random(c) < SMALL_SHARE, rng.uniform(0.05, 0.5, c), rng.uniform(0.8, 1.2, c)))[:, None]
        n_leaps = int(rng.integers(1, 2 * max(1, round(ANGLE / self.step_size))))
        p0 = rng.standard_normal(state.z.shape)
        z, value, gradient = state.z, state.value, state.gradient
        p = p0 + 0.5 * step * np.einsum("cij,ci->cj", factor, gradient)
        for leap in range(n_leaps):
            z = z + step * np.einsum("cij,cj->ci", factor, p)
            value, gradient = self.posterior.given_sigma(z, state.log_sigma)
            p = p + (1.0 if leap < n_leaps - 1 else 0.5) * step * np.einsum("cij,ci->cj", factor, gradient)
        energy = value - state.value - 0.5 * ((p**2).sum(axis=1) - (p0**2).sum(axis=1))
        return self._keep(state, np.where(np.isfinite(energy), energy, -np.inf), z, state.log_sigma, value, gradient)

    def _gibbs(self, state: _State) -> None:
        rng, prior = self.rng, self.posterior.prior
        m, c = prior.curvature.shape[0], len(state.z)
        nu = (1 / prior.hyper_scale**2 + np.exp(-2 * state.log_sigma)) / rng.standard_gamma(1.0, c)
        squared = self.posterior.bent(state.z) ** 2
        if not math.isinf(prior.dof):
            scaled = squared * np.exp(-2 * state.log_sigma)[:, None]
            squared = squared * rng.standard_gamma((prior.dof + 1) / 2, (c, m)) * 2 / (prior.dof + scaled)
        variance = (1 / nu + squared.sum(axis=1) / 2) / rng.standard_gamma((m + 1) / 2, c)
        drawn = 0.5 * np.log(variance)
        low, high = prior.range
        state.log_sigma = np.where((drawn >= low) & (drawn <= high), drawn, state.log_sigma)
        state.value, state.gradient = self.posterior.given_sigma(state.z, state.log_sigma)

    def _independent(self, state: _State) -> float:
        z, log_sigma = self.mixture.sample(len(state.z), self.rng)
        value, gradient = self.posterior.given_sigma(z, log_sigma)
        gain = value + self.posterior.log_hyper(log_sigma) - self.mixture.log_prob(z, log_sigma)
        had = state.value + self.posterior.log_hyper(state.log_sigma) - self.mixture.log_prob(state.z, state.log_sigma)
        ratio = np.where(np.isfinite(gain), gain, -np.inf) - had
        return self._keep(state, ratio, z, log_sigma, value, gradient)

    def _release(self, state: _State, n_released: int) -> None:
        rng, prior, c = self.rng, self.posterior.prior, len(state.z)
        rate = self.released[0] / self.released[1]
        chosen = np.unique(rng.choice(len(self.blocks), 1 + n_released, p=0.8 * rate / rate.sum() + 0.2 / len(rate)))
        block, x = np.unique(np.concatenate([self.blocks[k] for k in chosen])), state.z - self.posterior.centre
        if block.size > state.z.shape[1] - 2:  # two bins have to remain, for level and tilt
            return
        bent = self.posterior.bent(state.z)
        root = np.ones_like(bent)  # of the factors l_i of Student's t
        if not math.isinf(prior.dof):
            scaled = bent**2 * np.exp(-2 * state.log_sigma)[:, None]
            root = np.sqrt((prior.dof + scaled) / 2 / rng.standard_gamma((prior.dof + 1) / 2, bent.shape))
        a = prior.curvature[:, block] / root[:, :, None]
        u = (bent - x[:, block] @ prior.curvature[:, block].T) / root
        lower = np.linalg.cholesky(np.einsum("cmi,cmj->cij", a, a))
        middle = -np.linalg.solve(lower @ lower.transpose(0, 2, 1), np.einsum("cmi,cm->ci", a, u)[:, :, None])[:, :, 0]
        log_sigma = state.log_sigma
        if self.mixture.hierarchical:
            nu = (1 / prior.hyper_scale**2 + np.exp(-2 * log_sigma)) / rng.standard_gamma(1.0, c)
            left = ((u + np.einsum("cmi,ci->cm", a, middle)) ** 2).sum(axis=1)
            variance = (1 / nu + left / 2) / rng.standard_gamma((bent.shape[1] - block.size + 1) / 2, c)
            log_sigma = 0.5 * np.log(variance)
        noise = np.linalg.solve(lower.transpose(0, 2, 1), rng.standard_normal((c, block.size, 1)))[:, :, 0]
        z = state.z.copy()
        z[:, block] = self.posterior.centre[block] + middle + np.exp(log_sigma)[:, None] * noise
        value, gradient = self.posterior.given_sigma(z, log_sigma)
        now = value - prior.log_curvature(self.posterior.bent(z), log_sigma)
        ratio = now - state.value + prior.log_curvature(bent, state.log_sigma)
        inside = (log_sigma >= prior.range[0]) & (log_sigma <= prior.range[1])
        share = self._keep(state, np.where(inside & np.isfinite(ratio), ratio, -np.inf), z, log_sigma, value, gradient)
        if self.adapting and chosen.size == 1:
            self.released[:, chosen[0]] += share, 1.0

    def _keep(self, state: _State, log_ratio: Array, z: Array, log_sigma: Array, value: Array, gradient: Array) -> float:
        yes = np.log(self.rng.random(len(z))) < log_ratio
        state.z, state.gradient = np.where(yes[:, None], z, state.z), np.where(yes[:, None], gradient, state.gradient)
        state.log_sigma, state.value = np.where(yes, log_sigma, state.log_sigma), np.where(yes, value, state.value)
        return float(yes.mean())


def run_chains(
    posterior: LogPosterior,
    mixture: LaplaceGrid,
    *,
    n_draws: int,
    max_steps: int,
    rng: np.random.Generator,
    raise_on_failure: bool,
    task: Task,
) -> Chains:
    """Run until converged, with n_draws effectively independent draws.   Raises: ConvergenceError."""
    kernel = _Kernel(posterior, mixture, rng)
    stored: list[tuple[Array, Array, Array]] = []

    def advance(n: int) -> None:
        for _ in range(n):
            kernel.step(state)
            stored.append((state.z, state.log_sigma, state.value + posterior.log_hyper(state.log_sigma)))

    def history() -> list[Array]:
        return [np.swapaxes(np.array(part), 0, 1) for part in zip(*stored, strict=True)]

    def verdict() -> Verdict:
        z, log_sigma, value = history()
        z = np.logaddexp(0.0, z)  # log(1 + n): how far below one event the draws of an empty bin lie changes no count
        watched = [z, log_sigma[:, :, None], value[:, :, None]] if mixture.hierarchical else [z, value[:, :, None]]
        numbers = np.concatenate(watched, axis=2)
        r_hat, tau = split_r_hat(numbers), autocorrelation_time(numbers)
        size = N_CHAINS * len(stored) / float(tau.max())
        message = (
            f"R-hat {r_hat.max():.4f} (<= {R_HAT_MAX}), {size:.0f} effective draws of {n_draws} wanted in {N_CHAINS} x {len(stored)} steps"
        )
        good = bool(r_hat.max() <= R_HAT_MAX) and size >= n_draws
        # n_needed 0: chains that have not converged are lengthened by half
        return Verdict(autocorr_time=tau, r_hat=r_hat, n_effective=size, n_needed=0.0, converged=good, message=message)

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # diverging trajectories are rejected
        state = kernel.start()
        n_burn = _burn_in(kernel, state)
        first = max(100, math.ceil(1.2 * n_draws / N_CHAINS))
        found = run_until_converged(advance, verdict, task, first=first, max_steps=max_steps)
    if raise_on_failure:
        require_converged("bayesian_unfold", found, max_steps)
    z, log_sigma, _ = history()
    return Chains(
        z=z,
        log_sigma=log_sigma,
        verdict=found,
        acceptance=kernel.accepted / kernel.n_steps,
        acceptance_independence=kernel.independent / kernel.n_steps,
        n_burn=n_burn,
    )


def _burn_in(kernel: _Kernel, state: _State) -> int:
    """Run blocks of steps and reduce the step size until 3 of 4 trajectories are accepted; return the number of steps."""
    for block in range(BURN_BLOCKS):
        kernel.forget()
        for _ in range(BURN_BLOCK):
            kernel.step(state)
        if kernel.accepted / kernel.n_steps >= 0.75 and block > 0:
            break
        if kernel.accepted / kernel.n_steps < 0.75:
            kernel.step_size *= 0.7
    kernel.forget()
    kernel.adapting = False
    return (block + 1) * BURN_BLOCK


PRIORS = ("smooth", "flat")

METHODS = ("hmc", "emcee")

_START_STEPS = 10  # iterations of iterative Bayes before the search for the mode

_REPLICAS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class BayesianUnfold(Result):
    r"""Posterior of the true counts in t bins from r reconstructed bins. Counts, without unit.

    samples (n, t), draws of the spectrum; hyper (n,), draws of sigma, the standard deviation of the curvature of log n (empty if fixed).
    counts (t,), posterior mean. covariance (t, t), of the draws; covariance_data without the response's noise, covariance_response that
    noise, propagated linearly. map (t,), mode in log n at the most probable sigma. refolded (r,), expected counts at the mean;
    chi2, their Poisson deviance (or distance by the covariance given) from the measured ones; effective, parameters used (mean deviance
    minus deviance at the mean). predictive_pvalue, share of replicas with a larger distance from their spectrum than the data.
    reference (t,), the spectrum whose ratio is smooth. r_hat (p,), n_effective, converged, message: of the chains.

    >>> from sbi_phys.unfold import bayesian_unfold
    >>> posterior = bayesian_unfold([90, 60], [[0.8, 0.2], [0.1, 0.7]], n_draws=200, seed=1)
    >>> posterior.intervals(0.9).shape, bool((posterior.errors > 5).all())
    ((2, 2), True)
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
        """Number of measured bins; the fit uses `effective` degrees of freedom."""
        return int(self.measured.size)

    def intervals(self, level: float = 0.9) -> Array:
        """Central credible intervals (t, 2) of each bin: (1 - level) / 2 of the draws lie below, as many above.   Raises: SettingError."""
        share = require_number("level", level, low=0, high=1, open_low=True, open_high=True)
        return np.asarray(np.quantile(self.samples, [(1 - share) / 2, (1 + share) / 2], axis=0).T)

    def to_hist(self) -> Any:
        """Posterior mean and variance as a `hist` or `boost-histogram` object.   Raises: SettingError (no edges), SbiPhysError."""
        return to_hist(self.truth_edges, self.counts, self.covariance)

    def rows(self) -> Rows:
        """Return the table: one row for each truth bin, with posterior mean, sd, median and central intervals of its counts."""
        n = self.counts.size
        values = np.quantile(self.samples, [0.025, 0.16, 0.5, 0.84, 0.975], axis=0)
        q = dict(zip(("q025", "q16", "median", "q84", "q975"), values, strict=True))
        found = bin_columns(self.truth_edges, n) | {"counts": self.counts, "counts_err": self.errors} | q
        return Rows.of(found | {"mode": self.map, "reference": self.reference}, errors={"median": ("q16", "q84")})

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
        return figures.unfolding.spectra(self, ax)


class _Draws(NamedTuple):
    """z (n, t), log sigma (n,), and their convergence diagnostics."""

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
        smoothness: 1 / sigma, fixed; None: sigma is inferred, with a half-Cauchy prior.
        reference: (t,) > 0, counts, centre of the prior. None: the response's `truth`, else a flat density, scaled to the data.
        hyper_scale: of the half-Cauchy. An index that breaks by dg within a bin of w dex has curvature 2.3 w dg.
        dof: of Student's t for the curvature, >= 1; infinite = Gaussian. 3 for a spectrum that may break sharply in a few places: chains
            take five times as long; with 1 they may not converge.
        level_sd: prior standard deviation of the mean of log(n / reference).
        tilt_sd: the same of its slope over half of the range.
        counts_covariance: (r, r); then the likelihood is Gaussian. None = Poisson.
        background: (r,), expected counts that are no signal; None = the response's own.
        n_draws: effectively independent draws to return.
        max_steps: largest number of steps of each of the 16 chains (of each walker with emcee).
        seed: same seed, same draws.
        method: "hmc" or "emcee" (`samplers.mcmc`; slower, an independent check).
        raise_on_failure: False returns an unconverged result (`converged`, `message`) instead of raising.
        progress: shows the share of the draws needed.

    Returns: BayesianUnfold.
    Raises: ShapeError, NonFiniteError, DataError (the bin is named), SettingError, ConvergenceError.
    Warns: UserWarning for fewer events than truth bins.
    Source: Choudalakis 2012, arXiv:1201.4612.
    Read: bins are correlated, so compute derived quantities on the draws; a predictive p-value near 0 means that no smooth spectrum
        describes the counts (response or background wrong).

    >>> from sbi_phys.unfold import bayesian_unfold
    >>> posterior = bayesian_unfold([90, 60], [[0.8, 0.2], [0.1, 0.7]], n_draws=200, seed=1)
    >>> posterior.samples.shape, posterior.converged
    ((200, 2), True)
    """
    resp, data, covariance = measured(counts, response, counts_covariance, background)
    require_choice("method", method, METHODS)
    n_draws, max_steps = require_int("n_draws", n_draws, low=100), require_int("max_steps", max_steps, low=100)
    spectrum_prior = _prior(prior, smoothness, reference, hyper_scale, dof, level_sd, tilt_sd, data, resp)
    posterior = LogPosterior(data, resp, spectrum_prior, None if covariance is None else _inverse(covariance))
    mixture = LaplaceGrid(posterior, _start(data, resp))
    sample = _by_hmc if method == "hmc" else _by_emcee
    with or_none(progress).task("Bayesian unfolding", 1.0) as task:
        draws = sample(posterior, mixture, n_draws, max_steps, seed, raise_on_failure, task)
    return _result(draws, posterior, mixture.best, resp, data, prior, method, seed)


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
    # refolded and compared without the response's noise: a spectrum drawn for a shifted matrix describes the counts with that matrix only
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
