r"""Iterative Bayesian unfolding (D'Agostini), with the exact covariance from data, response and prior, kept apart.

    M[j, mu] = P[j, mu] n_mu / (eps_mu f_j(n))        n'_mu = sum_j N_j M[j, mu]        f_j(n) = sum_rho P[j, rho] n_rho / (1 - phi_j) + b_j

It is expectation maximisation for the Poisson likelihood, stopped early: the number of iterations is its only regularisation, and what
has not converged is still the prior. Hence three covariances: V = J V_N J^T of the data, (dn/dP) V_P (dn/dP)^T of a response with
finite simulation statistics, and that of the prior. The derivatives are exact at any iteration (`ibu_steps`).

Where few events are expected the counts are a poor guide to their own errors: a bin that fluctuated down quotes a small one, an empty
bin none. With errors="expected" V and J of the data are taken at a smooth expectation instead, e = f(`smooth_truth`(N)): V = J(e) diag(e)
J(e)^T. The answer stays the same. Counts that a smooth truth does not describe have e from a late iterate, nearly the counts again.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold.histograms import counts_of, to_hist
from sbi_phys.unfold.ibu_steps import Iterate, iterations, scaled_prior
from sbi_phys.unfold.inputs import check_counts, check_covariance, check_nonnegative, check_prior, warn_few
from sbi_phys.unfold.response import Response, as_response
from sbi_phys.unfold.smooth_truth import deviance, smooth_truth
from sbi_phys.unfold.stopping import Stopping, StoppingRule, choose

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["IBU", "ibu"]


@dataclass(frozen=True, kw_only=True, slots=True)
class IBU:
    r"""Unfolded counts of t truth bins from r reconstructed bins, with what they depend on. Counts, without unit.

    counts (t,), corrected for efficiency, fakes and background. covariance (t, t) = covariance_data + covariance_response +
    covariance_prior. jacobian (t, r) = dn/dN. prior_jacobian (t, t) = dn/dn0. response_jacobian (t, r, t) = dn/dP[j, rho], or None.
    history (k + 1, t): the scaled prior, then every iterate. prior (t,), as given; prior_origin, where it came from in words.
    prior_remaining (t,) = sum_nu |dn_mu/dn0_nu| n0_nu / n_mu: 0 = no prior left, 1 to 2 = structure from bin to bin is the prior's
    (the worst pattern of signs counts; for a smooth change see `tilt_remaining`). refolded (r,), expected counts. chi2 and ndf = r:
    refolded against measured, Poisson deviance, or with the covariance of the counts if one was given. stopping, scan of the rule or None.
    expected (r,), the smooth counts that covariance_data was taken at, None = the measured ones. jacobian is that at the measured ones.
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
        """Number of measured bins; the fit has used up an unknown part of them, so chi2 / ndf below 1 is normal."""
        return int(self.measured.size)

    def to_hist(self) -> Any:
        """Counts and variances as a `hist` or `boost-histogram` object.   Raises: SettingError (no edges), SbiPhysError."""
        return to_hist(self.truth_edges, self.counts, self.covariance)

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
        return figures.unfold_classical.spectrum(self, ax, prior=self.history[0])


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
        prior_covariance: (t, t) of the prior as given, passed on to the result. None: with a number of iterations nothing; with a rule
            the bias that its toys found and half of the difference between its two tilted priors, each fully correlated.
        rule: what "coverage" and "bias" ask for; StoppingRule() by default.
        errors: "observed", of the data at the counts themselves; "expected", at the smooth expectation (see the module), for bins with
            few events. A rule tests the errors that are quoted.
        seed: of the toys; the answer for a number of iterations has nothing random in it.

    Returns: IBU.
    Raises: ShapeError, NonFiniteError, DataError (counts that are not counts, no overlap: the bin is named), SettingError.
    Warns: UserWarning for fewer events than truth bins, or if no number of iterations meets the rule.
    Source: D'Agostini 1995, NIM A 362, 487; Jacobian as in Adye 2011, arXiv:1105.1160, for any efficiency and response.
    Read: prior_remaining and tilt_remaining tell which bins the data have not reached; use the full covariance, not its diagonal alone.
    """
    resp = _with_background(as_response(response), background)
    values, own = counts_of(counts, resp)
    data = check_counts(values, resp.n_reco, resp.reco_edges)
    warn_few(data, resp.n_truth)
    spread = own if counts_covariance is None else counts_covariance
    given = None if spread is None else check_covariance("counts_covariance", spread, resp.n_reco)
    start, origin = _prior(prior, resp)
    strength = 0.0 if smoothing is None else require_number("smoothing", smoothing, low=0, high=1)
    v_prior = None if prior_covariance is None else check_covariance("prior_covariance", prior_covariance, resp.n_truth)
    at_expectation = require_choice("errors", errors, ("observed", "expected")) == "expected"
    stopping = None
    if isinstance(n_iterations, str):
        stopping = choose(n_iterations, rule or StoppingRule(), data, resp, start, given, strength, seed, at_expectation)
        n = stopping.chosen
    elif rule is not None:
        raise SettingError(f"rule is given, but n_iterations is {n_iterations!r}; expected 'coverage' or 'bias' for a rule to act on")
    else:
        n = require_int("n_iterations", n_iterations, low=1)
    steps = itertools.islice(iterations(data, resp, start, strength, by_response=resp.n_simulated is not None), n)
    history = [scaled_prior(data, start, resp)]
    for step in steps:
        history.append(step.counts)
    smooth = resp.fold(smooth_truth(data, resp, start)) if at_expectation else None
    by_data = step.by_data if smooth is None else next(itertools.islice(iterations(smooth, resp, start, strength), n - 1, n)).by_data
    return _result(step, history, data, resp, start, origin, given, v_prior, stopping, smooth, by_data)


def _with_background(response: Response, background: ArrayLike | None) -> Response:
    if background is None:
        return response
    b = check_nonnegative("background", background, (response.n_reco,), "reco", response.reco_edges)
    if response.background.any():
        raise SettingError("background is given twice, here and in the response; expected one of them")
    return response.with_background(b)


def _prior(prior: ArrayLike | None, response: Response) -> tuple[Array, str]:
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
