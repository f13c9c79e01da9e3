r"""Iterative Bayesian unfolding (D'Agostini) with its exact covariance and a rule that chooses the number of iterations.

One iteration, with the response P, efficiency eps, fakes phi and background b of `response`:

    n'_mu = n_mu T_mu ,   T_mu = (1 / eps_mu) sum_j P[j, mu] r_j ,   r_j = N_j / f_j(n) ,   f_j(n) = sum_rho A[j, rho] n_rho + b_j ,

and A = P / (1 - phi). Fakes and background take their share of the counts in the sum; nothing is subtracted from the data. This is
expectation maximisation for the Poisson likelihood, stopped early. The number of iterations is the only regularisation, and a result
that has not converged still contains the prior. Three covariances are therefore kept apart: that of the data, J V_N J^T; that of a
response with finite simulation statistics, (dn/dP) V_P (dn/dP)^T; and that of the prior.

Derivatives. They follow from dn' = T dn + n dT at every iteration. With G = diag(T) - diag(n / eps) P^T diag(r / f) A and
q_j = r_j / (f_j (1 - phi_j)):

    data      dn'_mu/dN_j          = (G dn/dN)_{mu j}         + n_mu P[j, mu] / (eps_mu f_j)
    prior     dn'_mu/dn0_nu        = (G dn/dn0)_{mu nu}
    response  dn'_mu/dP[j, rho]    = (G dn/dP)_{mu, j rho}    + delta_{mu rho} n_mu (r_j - T_mu) / eps_mu - n_mu P[j, mu] q_j n_rho / eps_mu

The prior is a shape. It is scaled to the counts above background at the start, and this scale is differentiated too. Between iterations
(not after the last) the ratio n / n0 may be smoothed with a linear kernel, which the derivatives include.

Errors at the expectation. Where few events are expected, the observed counts are a poor estimate of their own variance: an empty bin has
none. With errors="expected" V and J of the data are evaluated at a smooth expectation e = f(`smooth_truth`(N)) instead, as
J(e) diag(e) J(e)^T; the unfolded counts stay the same.

Smooth truth. n_mu = p_mu exp(sum_d theta_d L_d(u_mu)), with Legendre polynomials of the bin number u in [-1, 1], fitted to the counts
through the response by Fisher scoring. A further degree must lower the deviance by 6 (2.4 sigma): with the 2 of Akaike's criterion the
truth follows the noise, and toys drawn from it need more iterations than the data do.

Stopping. Too few iterations leave a bias that the error bar does not include; too many amplify the noise. On a steep spectrum a fixed
number, or a limit on the change per iteration, stops too early. The rule unfolds toys drawn from the smooth truth, where the answer is
known, and stops at the first iteration at which coverage and bias are within limits. (Toys drawn from the iterate under test would
already lean towards the prior and hide the bias.) They are unfolded from the prior in use and from the toys' truth tilted by a factor
`tilt` from the first bin to the last, up and down; otherwise data that happen to agree with the prior would stop at iteration one. A
step or a line narrower than the resolution is not recovered by any number of iterations: the rule is then not met, and a warning names
the bin.

Source: D'Agostini 1995, NIM A 362, 487; Jacobian in the data: Adye 2011, arXiv:1105.1160, here with the efficiency in its last term.
"""

import itertools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import chdtrc, ndtr, xlogy

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows, bin_columns
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.unfold._inputs import bin_name, check_covariance, check_prior
from sbi_phys.unfold.histograms import measured, to_hist
from sbi_phys.unfold.response import Response

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "IBU",
    "Iterate",
    "Stopping",
    "StoppingRule",
    "bayes_step",
    "choose",
    "deviance",
    "ibu",
    "iterations",
    "prior_or_default",
    "scaled_prior",
    "smooth_truth",
    "smoothing_kernel",
]


MAX_ELEMENTS = 20_000_000  # largest number of elements of dn/dP, n_truth^2 n_reco: 160 MB

SIGNAL_FLOOR = 0.05  # smallest share of the counts that the prior starts with, for background as large as the data


class Iterate(NamedTuple):
    """counts (t,) and their derivatives by data (t, r), by the prior (t, t) and by the response (t, r, t) or None."""

    counts: Array
    by_data: Array
    by_prior: Array
    by_response: Array | None


def bayes_step(counts: Array, truth: Array, response: Response) -> Array:
    """One iteration without derivatives: counts (..., n_reco), truth (..., n_truth) -> (..., n_truth)."""
    folded = response.fold(truth)
    ratio = np.divide(counts, folded, out=np.zeros(np.broadcast_shapes(counts.shape, folded.shape)), where=folded > 0)
    return np.asarray(truth * (ratio @ response.matrix) / response.efficiency)


def smoothing_kernel(n: int, strength: float) -> Array:
    """Matrix (n, n) = (1 - s) 1 + s (1/4, 1/2, 1/4), reflected at the ends: rows sum to 1, all elements are >= 0."""
    kernel = (1 - strength / 2) * np.eye(n)
    kernel += strength / 4 * (np.eye(n, k=1) + np.eye(n, k=-1))
    kernel[0, 0] += strength / 4
    kernel[-1, -1] += strength / 4
    return kernel


def _signal(counts: Array, response: Response) -> tuple[Array, float]:
    # counts above background over all bins (for a batch too), and its derivative by the number of counts
    total, background = counts.sum(axis=-1), response.background.sum()
    plain = total - background
    floor = SIGNAL_FLOOR * total
    slope = 1.0 if np.all(plain > floor) else SIGNAL_FLOOR
    return np.maximum(plain, floor), slope


def scaled_prior(counts: Array, prior: Array, response: Response) -> Array:
    """Prior shape (n_truth,) scaled to the counts (..., n_reco) above background: where the iteration starts."""
    signal, _ = _signal(counts, response)
    return np.asarray(signal[..., None] * prior / (response.fold(prior) - response.background).sum())


def iterations(counts: Array, response: Response, prior: Array, smoothing: float = 0.0, *, by_response: bool = False) -> Iterator[Iterate]:
    """Yield iterates 1, 2, ... without end.

    Args: counts (n_reco,). prior (n_truth,) > 0, any scale. smoothing, 0 to 1. by_response: dn/dP as well.
    Raises: DataError (counts in a bin where the response expects none), SettingError (dn/dP too large for memory).
    """
    matrix, eff, real = response.matrix, response.efficiency, 1 - response.fakes
    n_reco, n_truth = matrix.shape
    a = matrix / real[:, None]
    n = scaled_prior(counts, prior, response)
    d_data, d_prior, d_resp = _start(counts, response, prior, n, by_response=by_response)
    kernel = smoothing_kernel(n_truth, smoothing)
    every = np.arange(n_truth)
    while True:
        f = a @ n + response.background
        _require_source(counts, f, response)
        inverse = np.divide(1, f, out=np.zeros(n_reco), where=f > 0)
        r = counts * inverse
        t = (r @ matrix) / eff
        causes = (n / eff)[:, None] * matrix.T
        g = -(causes * (r * inverse)) @ a
        g[every, every] += t
        d_data = g @ d_data + causes * inverse
        d_prior = g @ d_prior
        if d_resp is not None:
            d_resp = (g @ d_resp.reshape(n_truth, -1)).reshape(d_resp.shape)
            d_resp -= (causes * (r * inverse / real))[:, :, None] * n
            d_resp[every, :, every] += (n / eff)[:, None] * (r - t[:, None])
        n = n * t
        yield Iterate(n, d_data, d_prior, d_resp)
        if smoothing > 0:
            change = prior[:, None] * kernel / prior
            d_prior = change @ d_prior + np.diag(kernel @ (n / prior)) - change * (n / prior)
            n, d_data = change @ n, change @ d_data
            d_resp = None if d_resp is None else (change @ d_resp.reshape(n_truth, -1)).reshape(d_resp.shape)


def _start(counts: Array, response: Response, prior: Array, n: Array, *, by_response: bool) -> tuple[Array, Array, Array | None]:
    # derivatives of the scaled prior n = s p / sum(A p): by the counts, by p and by P
    n_reco, n_truth = response.matrix.shape
    signal, slope = _signal(counts, response)
    real = 1 - response.fakes
    reach = (1 / real) @ response.matrix
    total = reach @ prior
    by_data = np.repeat((n * slope / signal)[:, None], n_reco, axis=1)
    by_prior = signal / total * (np.eye(n_truth) - np.outer(prior, reach) / total)
    if not by_response:
        return by_data, by_prior, None
    if n_truth**2 * n_reco > MAX_ELEMENTS:
        raise SettingError(
            f"the derivative by the response has {n_truth}^2 x {n_reco} elements; expected at most {MAX_ELEMENTS}, use fewer bins"
        )
    return by_data, by_prior, -n[:, None, None] / total * (prior / real[:, None])


def _require_source(counts: Array, folded: Array, response: Response) -> None:
    orphan = np.flatnonzero((counts > 0) & (folded <= 0))
    if orphan.size:
        j = int(orphan[0])
        place = bin_name("reco", j, response.reco_edges)
        raise DataError(f"counts are {counts[j]:g} in {place}, where the response expects none: no overlap of data and simulation there")


MAX_DEGREE = 7

GAIN = 6.0  # decrease of the deviance required for a further degree

LATE = 150  # iterations of Bayesian unfolding where no polynomial describes the data; fewer would hide the bias of the iterate under test

REFUSED = 1e-3  # p-value below which the polynomial does not describe the data


def deviance(counts: Array, folded: Array) -> float:
    """Poisson deviance 2 sum(f - N + N ln(N/f)), chi-square like; bins with neither expectation nor counts contribute 0."""
    safe = np.where(folded > 0, folded, 1.0)
    terms = folded - counts + xlogy(counts, np.where(counts > 0, counts, 1.0) / safe)
    return float(2 * terms.sum())


def smooth_truth(counts: Array, response: Response, prior: Array) -> Array:
    """Return the spectrum (n_truth,) of the best degree from 1 to 7, or a late iterate if none describes the counts (p < 0.001)."""
    u = np.linspace(-1, 1, response.n_truth)
    start = scaled_prior(counts, prior, response)
    best, best_score, best_p = start, np.inf, 0.0
    theta = np.zeros(1)
    for degree in range(1, min(MAX_DEGREE, response.n_truth - 1, response.n_reco - 1) + 1):
        basis = np.asarray(np.polynomial.legendre.legvander(u, degree), dtype=np.float64)
        theta = _fit(counts, response, start, basis, np.append(theta, 0.0))
        n = start * np.exp(basis @ theta)
        distance = deviance(counts, response.fold(n))
        score = distance + GAIN * degree
        if score < best_score:
            ndf = max(response.n_reco - degree - 1, 1)
            best, best_score, best_p = n, score, float(chdtrc(ndf, max(distance, 0.0)))
    if best_p >= REFUSED:
        return best
    n = start
    for _ in range(LATE):
        n = bayes_step(counts, n, response)
    # a bin with no expected events cannot be tested on toys
    return np.maximum(n, 1e-6 * n.max())


def _fit(counts: Array, response: Response, start: Array, basis: Array, theta: Array) -> Array:
    a = response.matrix / (1 - response.fakes)[:, None]
    current = deviance(counts, response.fold(start * np.exp(basis @ theta)))
    for _ in range(50):
        n = start * np.exp(basis @ theta)
        f = np.maximum(response.fold(n), 1e-300)
        slope = (a * n) @ basis
        fisher = slope.T @ (slope / f[:, None])
        step = np.linalg.lstsq(fisher, slope.T @ (counts / f - 1), rcond=1e-12)[0]
        size = 1.0
        while size > 1e-4:
            trial = theta + size * step
            reached = deviance(counts, response.fold(start * np.exp(np.clip(basis @ trial, -50, 50))))
            if reached <= current + 1e-12:
                break
            size /= 2
        else:
            return theta
        theta, gain, current = trial, current - reached, reached
        if gain < 1e-8:
            break
    return theta


GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingRule:
    """Criteria for the number of iterations.

    coverage: least coverage of the 68.3 % interval in the worst bin. bias: largest |mean pull| in the worst bin. tilt: factor, first
    to last bin, by which the priors of the toys are tilted either way, 1 = only the prior in use. n_toys per prior. max_iterations.

    >>> from sbi_phys.unfold import StoppingRule, ibu
    >>> rule = StoppingRule(bias=0.2, n_toys=100)
    >>> result = ibu([90, 60], [[0.8, 0.2], [0.1, 0.7]], "bias", rule=rule)
    >>> result.stopping.met, result.n_iterations < 30
    (True, True)
    """

    coverage: float = 0.60
    bias: float = 0.3
    tilt: float = 4.0
    n_toys: int = 300
    max_iterations: int = 128

    def __post_init__(self) -> None:
        require_number("coverage", self.coverage, low=0, high=0.68, open_low=True)
        require_number("bias", self.bias, low=0, open_low=True)
        require_number("tilt", self.tilt, low=1)
        require_int("n_toys", self.n_toys, low=50)
        require_int("max_iterations", self.max_iterations, low=1, high=GRID[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopping(Result):
    r"""The scan over iterations on toys, and the chosen number.

    kind, "coverage" or "bias". chosen, iterations; met, False if the last does not meet the rule either. iterations (k,). coverage
    (k, n_truth) and mean_pull (k, n_truth) of the worst of the priors in each bin. truth (n_truth,), of the toys. bias (n_truth,),
    unfolded expectation minus truth of the prior in use, counts; spread (n_truth,), half the difference of the tilted priors, counts.

    >>> from sbi_phys.unfold import StoppingRule, ibu
    >>> result = ibu([90, 60], [[0.8, 0.2], [0.1, 0.7]], "coverage", rule=StoppingRule(n_toys=100))
    >>> stopping = result.stopping
    >>> stopping.chosen == result.n_iterations, stopping.coverage.shape == (stopping.iterations.size, 2)
    (True, True)
    """

    kind: str
    rule: StoppingRule
    chosen: int
    met: bool
    iterations: Integers
    coverage: Array
    mean_pull: Array
    truth: Array
    bias: Array
    spread: Array

    def rows(self) -> Rows:
        """Return the table: one row for each number of iterations, with coverage and mean pull of the worst bin."""
        found = {"iterations": self.iterations, "worst_coverage": self.coverage.min(axis=1)}
        found |= {"worst_pull": np.abs(self.mean_pull).max(axis=1)}
        return Rows.of(found | {"chosen": self.iterations == self.chosen})

    def summary(self) -> str:
        """Return the result in words."""
        met = "meet the rule" if self.met else "the most that were tried, do NOT meet the rule"
        last = int(np.argmin(np.abs(self.iterations - self.chosen)))
        return (
            f"stopping by {self.kind}: {self.chosen} iterations {met}; there the worst bin has coverage "
            f"{100 * self.coverage[last].min():.1f} % and mean pull {np.abs(self.mean_pull[last]).max():.2f}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw worst-bin coverage and |mean pull| against iterations.   Read: the dashed line marks the chosen number."""
        return figures.unfolding.stopping(self, ax)


def choose(
    kind: str,
    rule: StoppingRule,
    counts: Array,
    response: Response,
    prior: Array,
    covariance: Array | None,
    smoothing: float,
    seed: int,
    at_expectation: bool = False,
) -> Stopping:
    """Scan the iterations on toys and stop at the first that meets the rule, or at the last with a warning.

    Args: kind "coverage" (coverage and bias) or "bias" (bias alone). covariance (n_reco, n_reco) of the counts, None = Poisson.
        at_expectation: every toy quotes the errors of the expectation, not of its own counts.
    """
    require_choice("n_iterations", kind, ("coverage", "bias"))
    truth = smooth_truth(counts, response, prior)
    expected = response.fold(truth)
    rng = rng_for(seed, "ibu stopping toys")
    toys = _toys(expected, covariance, rule.n_toys, rng)
    ramp = np.linspace(-0.5, 0.5, response.n_truth)
    priors = [prior] + ([truth * rule.tilt**ramp, truth * rule.tilt**-ramp] if rule.tilt > 1 else [])
    runs = [_Run(toys, expected, response, p, covariance, smoothing, truth, at_expectation) for p in priors]
    rows: list[tuple[int, Array, Array]] = []
    met = False
    for k in range(1, rule.max_iterations + 1):
        for run in runs:
            run.advance()
        if k not in GRID and k != rule.max_iterations:
            continue
        found = [run.pulls() for run in runs]
        coverage = np.min([_coverage(m, s) for m, s in found], axis=0)
        pull = np.array([m for m, _ in found])
        worst = np.take_along_axis(pull, np.abs(pull).argmax(axis=0)[None], axis=0)[0]
        rows.append((k, coverage, worst))
        met = bool(np.abs(worst).max() <= rule.bias) and (kind == "bias" or bool(coverage.min() >= rule.coverage))
        if met:
            break
    steps, coverages, worst_pulls = zip(*rows, strict=True)
    if not met:
        _warn(kind, rule, coverages[-1], worst_pulls[-1], response)
    spread = (runs[1].expectation - runs[2].expectation) / 2 if len(runs) > 1 else np.zeros(response.n_truth)
    return Stopping(
        kind=kind,
        rule=rule,
        chosen=steps[-1],
        met=met,
        iterations=np.array(steps),
        coverage=np.array(coverages),
        mean_pull=np.array(worst_pulls),
        truth=truth,
        bias=runs[0].expectation - truth,
        spread=spread,
    )


def _toys(expected: Array, covariance: Array | None, n: int, rng: np.random.Generator) -> Array:
    if covariance is None:
        return rng.poisson(expected, size=(n, expected.size)).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    noise = rng.standard_normal((n, expected.size)) * np.sqrt(np.maximum(values, 0))
    return np.maximum(expected + noise @ vectors.T, 0)


class _Run:
    """All toys, unfolded from one prior, with the errors that each would quote."""

    def __init__(
        self,
        toys: Array,
        expected: Array,
        response: Response,
        prior: Array,
        covariance: Array | None,
        smoothing: float,
        truth: Array,
        at_expectation: bool,
    ) -> None:
        self.at_expectation = at_expectation
        self.toys, self.expected, self.response, self.prior, self.covariance, self.truth = (
            toys,
            expected,
            response,
            prior,
            covariance,
            truth,
        )
        self.current = scaled_prior(toys, prior, response)
        self.linear = iterations(expected, response, prior, smoothing)
        self.kernel = smoothing_kernel(response.n_truth, smoothing)
        self.smoothing, self.first = smoothing, True
        self.expectation, self.jacobian = truth, np.zeros((response.n_truth, response.n_reco))

    def advance(self) -> None:
        if self.smoothing > 0 and not self.first:
            self.current = (self.current / self.prior) @ self.kernel.T * self.prior
        self.first = False
        self.current = bayes_step(self.toys, self.current, self.response)
        step = next(self.linear)
        self.expectation, self.jacobian = step.counts, step.by_data

    def pulls(self) -> tuple[Array, Array]:
        # each toy would quote J diag(N) J^T; J of the expectation is near enough and 300 times cheaper
        j, moved = self.jacobian, self.toys - self.expected
        if self.covariance is None:
            exact = self.expected @ (j**2).T
            variance = exact if self.at_expectation else self.toys @ (j**2).T
        else:
            variance = exact = np.einsum("ti,ij,tj->t", j, self.covariance, j)
        pull = (self.current - self.truth) / np.sqrt(np.maximum(variance, 1e-300))
        # the linear answer has mean 0 and variance 1: its deviation on these toys is noise that the pulls share, and is subtracted
        linear = moved @ j.T / np.sqrt(np.maximum(exact, 1e-300))
        spread = pull.var(axis=0, ddof=1) - linear.var(axis=0, ddof=1) + 1
        return pull.mean(axis=0) - linear.mean(axis=0), np.sqrt(np.maximum(spread, 0.01))


def _coverage(mean: Array, spread: Array) -> Array:
    # of +-1 sigma for Gaussian pulls: far less noise than counting toys
    return np.asarray(ndtr((1 - mean) / spread) - ndtr((-1 - mean) / spread))


def _warn(kind: str, rule: StoppingRule, coverage: Array, pull: Array, response: Response) -> None:
    low, far = int(coverage.argmin()), int(np.abs(pull).argmax())
    words = (
        f"after {rule.max_iterations} iterations |mean pull| is {abs(pull[far]):.2f} in {bin_name('truth', far, response.truth_edges)}"
        f" and coverage {coverage[low]:.2f} in {bin_name('truth', low, response.truth_edges)}; "
        f"expected at most {rule.bias:g}" + (f" and at least {rule.coverage:g}" if kind == "coverage" else "")
    )
    warnings.warn(f"{words}: use wider bins there or quote the prior as a systematic", UserWarning, stacklevel=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class IBU(Result):
    r"""Unfolded counts of t truth bins from r reconstructed bins, with their derivatives. Counts, without unit.

    counts (t,), corrected for efficiency, fakes and background. covariance (t, t) = covariance_data + covariance_response +
    covariance_prior. jacobian (t, r) = dn/dN. prior_jacobian (t, t) = dn/dn0. response_jacobian (t, r, t) = dn/dP[j, rho], or None.
    history (k + 1, t): the scaled prior, then every iterate. prior (t,), as given; prior_origin, where it came from in words.
    prior_remaining (t,) = sum_nu |dn_mu/dn0_nu| n0_nu / n_mu: 0 = no prior left, 1 to 2 = structure from bin to bin is the prior's
    (the worst pattern of signs counts; for a smooth change see `tilt_remaining`). refolded (r,), expected counts. chi2 and ndf = r:
    refolded against measured, Poisson deviance, or with the covariance of the counts if one was given. stopping, scan of the rule or None.
    expected (r,), the smooth counts that covariance_data was taken at, None = the measured ones. jacobian is that at the measured ones.

    >>> from sbi_phys.unfold import ibu
    >>> result = ibu([90, 60], [[0.8, 0.2], [0.1, 0.7]], n_iterations=50)
    >>> result.refolded.round(), result.covariance.shape, result.history.shape
    (array([90., 60.]), (2, 2), (51, 2))
    """

    counts: Array
    covariance: Array
    covariance_data: Array
    covariance_response: Array
    covariance_prior: Array
    jacobian: Array
    prior_jacobian: Array
    response_jacobian: Array | None
    history: Array
    n_iterations: int
    prior: Array
    prior_origin: str
    prior_remaining: Array
    measured: Array
    refolded: Array
    chi2: float
    truth_edges: Array | None
    reco_edges: Array | None
    stopping: Stopping | None
    expected: Array | None = None

    @property
    def errors(self) -> Array:
        """Standard errors (t,), square roots of the diagonal of the full covariance."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    @property
    def tilt_remaining(self) -> Array:
        """Relative change (t,) of the result for a prior tilted by -1 to 1 from the first bin to the last, |dn/dn0 (n0 u)| / n.

        Read: 0.01 = a prior wrong by a factor e at the ends moves this bin by about 1 %.
        """
        moved = np.abs(self.prior_jacobian @ (self.prior * np.linspace(-1, 1, self.prior.size)))
        return np.divide(moved, self.counts, out=np.zeros_like(moved), where=self.counts > 0)

    @property
    def correlation(self) -> Array:
        """Correlation matrix (t, t) of the full covariance; 0 where an error is 0."""
        scale = np.outer(self.errors, self.errors)
        return np.divide(self.covariance, scale, out=np.zeros_like(scale), where=scale > 0)

    @property
    def ndf(self) -> int:
        """Number of measured bins; the number of effective parameters is not known, so chi2 / ndf below 1 is normal."""
        return int(self.measured.size)

    def to_hist(self) -> Any:
        """Counts and variances as a `hist` or `boost-histogram` object.   Raises: SettingError (no edges), SbiPhysError."""
        return to_hist(self.truth_edges, self.counts, self.covariance)

    def rows(self) -> Rows:
        """Return the table: one row for each truth bin, with the parts of its error."""
        parts = {"data": self.covariance_data, "response": self.covariance_response, "prior": self.covariance_prior}
        found = bin_columns(self.truth_edges, self.counts.size) | {"counts": self.counts, "counts_err": self.errors}
        found |= {f"error_{name}": np.sqrt(np.diag(c)) for name, c in parts.items()}
        return Rows.of(found | {"prior": self.prior, "prior_remaining": self.prior_remaining})

    def summary(self) -> str:
        """Return the result in words."""
        pieces = (("data", self.covariance_data), ("response", self.covariance_response), ("prior", self.covariance_prior))
        positive = self.counts > 0
        n = np.where(positive, self.counts, 1.0)
        sizes = "  ".join(f"{name} {100 * float(np.median((np.sqrt(np.diag(v)) / n)[positive])):.2g} %" for name, v in pieces)
        lines = [
            f"iterative Bayes, {self.n_iterations} iterations from prior '{self.prior_origin}': {self.counts.sum():.6g} events in"
            f" {self.counts.size} truth bins from {self.measured.sum():.6g} in {self.measured.size}",
            f"  refolded chi2 = {self.chi2:.4g} for {self.ndf} bins",
            f"  median relative error: {sizes}" + ("" if self.expected is None else " (data: at the smooth expectation)"),
            f"  prior remaining, worst bin: bin to bin {self.prior_remaining.max():.3g}, of a tilt {self.tilt_remaining.max():.3g}",
        ]
        if self.stopping is not None:
            s = self.stopping
            lines.append(
                f"  stopped by {s.kind} on {s.rule.n_toys} toys ({'met' if s.met else 'NOT met'}): worst bin covers"
                f" {s.coverage[-1].min():.3f} of 0.683, |mean pull| {np.abs(s.mean_pull[-1]).max():.2f}"
            )
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw unfolded counts with the errors of the data and of all, the measured counts and the prior."""
        return figures.unfolding.spectrum(self, ax, prior=self.history[0])


def ibu(
    counts: ArrayLike,
    response: Response | ArrayLike,
    n_iterations: int | str = 4,
    prior: ArrayLike | None = None,
    *,
    counts_covariance: ArrayLike | None = None,
    background: ArrayLike | None = None,
    smoothing: float | None = None,
    prior_covariance: ArrayLike | None = None,
    rule: StoppingRule | None = None,
    errors: str = "observed",
    seed: int = 0,
) -> IBU:
    r"""Unfold counts by k steps of Bayes' theorem, n'_mu = (n_mu / eps_mu) sum_j P[j, mu] N_j / f_j(n), with full covariance.

    Args:
        counts: (r,), measured, >= 0; nothing subtracted. Or a histogram (UHI) with the response's edges; weighted: its variances.
        response: Response, or matrix (r, t) = P(reco | truth) whose column sums are the efficiency.
        n_iterations: a number, or "coverage" or "bias": the first iteration that meets `rule` on toys (steep spectra need tens).
        prior: (t,) > 0, shape where the iteration starts, any scale. None: the response's own `truth` spectrum, else flat.
        counts_covariance: (r, r) of the counts; None = Poisson, diag(counts): an empty bin has no error then, merge it with others
            or ask for errors="expected".
        background: (r,), expected counts that are no signal; None = the response's own.
        smoothing: 0 to 1, weight of the (1/4, 1/2, 1/4) kernel on n / prior between iterations; None = 0.
        prior_covariance: (t, t) of the prior as given, passed on to the result. None: 0 with a number of iterations; with a rule
            the bias that its toys found and half of the difference between its two tilted priors, each fully correlated.
        rule: criteria of "coverage" and "bias"; StoppingRule() by default.
        errors: "observed", of the data at the counts themselves; "expected", at the smooth expectation (see the module), for bins with
            few events. A rule tests the errors that are quoted.
        seed: of the toys; with a number of iterations the result is not random.

    Returns: IBU.
    Raises: ShapeError, NonFiniteError, DataError (negative counts, no overlap: the bin is named), SettingError.
    Warns: UserWarning for fewer events than truth bins, or if no number of iterations meets the rule.
    Source: D'Agostini 1995, NIM A 362, 487; Jacobian as in Adye 2011, arXiv:1105.1160, for any efficiency and response.
    Read: prior_remaining and tilt_remaining tell which bins still depend on the prior; use the full covariance, not its diagonal alone.

    >>> from sbi_phys.unfold import ibu
    >>> result = ibu([90, 60], [[0.8, 0.2], [0.1, 0.7]], n_iterations=50)
    >>> result.counts.round()
    array([94., 72.])
    >>> result.errors.round()
    array([13., 12.])
    """
    resp, data, given = measured(counts, response, counts_covariance, background)
    start, origin = prior_or_default(prior, resp)
    strength = 0.0 if smoothing is None else require_number("smoothing", smoothing, low=0, high=1)
    v_prior = None if prior_covariance is None else check_covariance("prior_covariance", prior_covariance, resp.n_truth)
    at_expectation = require_choice("errors", errors, ("observed", "expected")) == "expected"
    stopping = None
    if isinstance(n_iterations, str):
        stopping = choose(n_iterations, rule or StoppingRule(), data, resp, start, given, strength, seed, at_expectation)
        n = stopping.chosen
    elif rule is not None:
        raise SettingError(f"rule is given, but n_iterations is {n_iterations!r}; expected 'coverage' or 'bias' with a rule")
    else:
        n = require_int("n_iterations", n_iterations, low=1)
    steps = itertools.islice(iterations(data, resp, start, strength, by_response=resp.n_simulated is not None), n)
    history = [scaled_prior(data, start, resp)]
    for step in steps:
        history.append(step.counts)
    smooth = resp.fold(smooth_truth(data, resp, start)) if at_expectation else None
    by_data = step.by_data if smooth is None else next(itertools.islice(iterations(smooth, resp, start, strength), n - 1, n)).by_data
    return _result(step, history, data, resp, start, origin, given, v_prior, stopping, smooth, by_data)


def prior_or_default(prior: ArrayLike | None, response: Response) -> tuple[Array, str]:
    """Prior (t,) > 0 and its origin in words: as given, else the response's `truth`, else flat."""
    if prior is not None:
        return check_prior(prior, response.n_truth, response.truth_edges), "given"
    if response.truth is not None and (response.truth > 0).all():
        return response.truth, "spectrum of the response"
    return np.ones(response.n_truth), "flat"


def _result(
    step: Iterate,
    history: list[Array],
    data: Array,
    response: Response,
    prior: Array,
    origin: str,
    given: Array | None,
    v_prior: Array | None,
    stopping: Stopping | None,
    smooth: Array | None,
    by_data: Array,
) -> IBU:
    n = step.counts
    v_data = (by_data * (data if smooth is None else smooth)) @ by_data.T if given is None else by_data @ given @ by_data.T
    v_response = response.propagate(step.by_response) if step.by_response is not None else np.zeros((n.size, n.size))
    if v_prior is not None:
        from_prior = step.by_prior @ v_prior @ step.by_prior.T
    elif stopping is not None:
        from_prior = np.outer(stopping.bias, stopping.bias) + np.outer(stopping.spread, stopping.spread)
    else:
        from_prior = np.zeros_like(v_data)
    pull = np.abs(step.by_prior) @ prior
    refolded = response.fold(n)
    return IBU(
        counts=n,
        covariance=v_data + v_response + from_prior,
        covariance_data=v_data,
        covariance_response=v_response,
        covariance_prior=from_prior,
        jacobian=step.by_data,
        prior_jacobian=step.by_prior,
        response_jacobian=step.by_response,
        history=np.array(history),
        n_iterations=len(history) - 1,
        prior=prior,
        prior_origin=origin,
        prior_remaining=np.divide(pull, n, out=np.zeros_like(n), where=n > 0),
        measured=data,
        refolded=refolded,
        chi2=deviance(data, refolded) if given is None else _distance(data - refolded, given),
        truth_edges=response.truth_edges,
        reco_edges=response.reco_edges,
        stopping=stopping,
        expected=smooth,
    )


def _distance(residual: Array, covariance: Array) -> float:
    try:
        return float(residual @ np.linalg.solve(covariance, residual))
    except np.linalg.LinAlgError as err:
        raise DataError(f"counts_covariance is singular ({err}); expected one that can be inverted for the refolded chi2") from err
