r"""Tikhonov's regularised least squares: chi-square plus the curvature of truth / prior.

    minimise (N - b - A n)^T V^-1 (N - b - A n) + tau^2 |L x|^2 ,     x_mu = n_mu / p_mu ,  (L x)_i = x_{i-1} - 2 x_i + x_{i+1}

A = P / (1 - phi), p the prior scaled to the data. The solution is linear in the counts: with B = A diag(p) and
K = (B^T V^-1 B + tau^2 L^T L)^-1,

    n = diag(p) K B^T V^-1 (N - b) ,   J = diag(p) K B^T V^-1 ,   cov = J V J^T .

A constant factor and a straight tilt of n / p have no penalty; only curvature has. In the generalised eigenvectors of
(L^T L, B^T V^-1 B), with eigenvalues l_i, the contribution of the data is damped by 1 / (1 + tau^2 l_i). This is the filter of the SVD
method, and it sets the range of the scan. V holds the expected counts of a first pass, because weights 1/N favour bins with a downward
fluctuation; J neglects this dependence.

Source: Hocker & Kartvelishvili 1996, hep-ph/9509307 (SVD); Schmitt 2012, arXiv:1205.6201 (TUnfold: L-curve, global correlation).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.linalg import eigh

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows, bin_columns
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold.histograms import measured, to_hist
from sbi_phys.unfold.ibu import prior_or_default, scaled_prior
from sbi_phys.unfold.response import Response, as_response

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Tikhonov", "TikhonovScan", "tikhonov"]


METHODS = ("l_curve", "global_correlation")


@dataclass(frozen=True, kw_only=True, slots=True)
class TikhonovScan(Result):
    """Scan over k strengths. All (k,).

    strength tau. chi2 of the data. penalty |L x|^2. curvature of the L-curve (log chi2, log penalty), largest at its corner.
    global_correlation, mean over bins of sqrt(1 - 1 / (V_ii (V^-1)_ii)). effective, trace of dn_folded/dN: free parameters.
    method and chosen: criterion and index of the choice.

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response, tikhonov
    >>> edges = np.linspace(0, 6, 7)
    >>> response = Response.from_resolution(edges, edges, resolution=0.5)
    >>> result = tikhonov([40, 90, 150, 160, 90, 35], response, method="l_curve", n_strengths=20)
    >>> result.scan.strength.shape, bool(result.scan.strength[result.scan.chosen] == result.strength)
    ((20,), True)
    """

    strength: Array
    chi2: Array
    penalty: Array
    curvature: Array
    global_correlation: Array
    effective: Array
    method: str
    chosen: int

    def rows(self) -> Rows:
        """Return the table: one row for each strength."""
        shown = ("strength", "chi2", "penalty", "curvature", "global_correlation", "effective")
        return Rows.of({k: getattr(self, k) for k in shown} | {"chosen": np.arange(self.strength.size) == self.chosen})

    def summary(self) -> str:
        """Return the result in words."""
        k = self.chosen
        return (
            f"scan of {self.strength.size} strengths from {self.strength.min():.3g} to {self.strength.max():.3g} by {self.method}: "
            f"{self.strength[k]:.4g}, chi2 {self.chi2[k]:.4g}, {self.effective[k]:.3g} effective parameters"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the L-curve with the chosen point.   Read: noise dominates to the left of the corner, bias to the right."""
        return figures.unfolding.scan(self, ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tikhonov(Result):
    r"""Unfolded counts of t truth bins from r reconstructed bins.

    counts (t,), may be negative. covariance (t, t) = covariance_data + covariance_response. jacobian (t, r) = dn/dN at fixed weights.
    strength tau; scan, or None if tau was given. refolded (r,). chi2 with the covariance of the data; effective, its free parameters.

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response, tikhonov
    >>> edges = np.linspace(0, 6, 7)
    >>> response = Response.from_resolution(edges, edges, resolution=0.5)
    >>> result = tikhonov([40, 90, 150, 160, 90, 35], response, strength=0.1)
    >>> result.strength, result.scan is None, result.covariance.shape
    (0.1, True, (6, 6))
    """

    counts: Array
    covariance: Array
    covariance_data: Array
    covariance_response: Array
    jacobian: Array
    strength: float
    scan: TikhonovScan | None
    prior: Array
    measured: Array
    refolded: Array
    chi2: float
    effective: float
    truth_edges: Array | None
    reco_edges: Array | None

    @property
    def errors(self) -> Array:
        """Standard errors (t,), square roots of the diagonal of the covariance."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))

    def to_hist(self) -> Any:
        """Counts and variances as a `hist` or `boost-histogram` object.   Raises: SettingError (no edges), SbiPhysError."""
        return to_hist(self.truth_edges, self.counts, self.covariance)

    def rows(self) -> Rows:
        """Return the table: one row for each truth bin, with the parts of its error."""
        parts = {"data": self.covariance_data, "response": self.covariance_response}
        found = bin_columns(self.truth_edges, self.counts.size) | {"counts": self.counts, "counts_err": self.errors}
        return Rows.of(found | {f"error_{name}": np.sqrt(np.diag(c)) for name, c in parts.items()} | {"prior": self.prior})

    def summary(self) -> str:
        """Return the result in words."""
        how = "given" if self.scan is None else f"by {self.scan.method}"
        return (
            f"Tikhonov, strength {self.strength:.4g} ({how}): {self.counts.sum():.6g} events in {self.counts.size} truth bins from"
            f" {self.measured.sum():.6g} in {self.measured.size}\n"
            f"  refolded chi2 = {self.chi2:.4g} for {self.measured.size} bins and {self.effective:.3g} effective parameters"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw unfolded counts with errors, the measured counts and the prior."""
        return figures.unfolding.spectrum(self, ax, prior=self.prior)


@dataclass(frozen=True, slots=True)
class _Problem:
    """The linear problem: b = A diag(p) (r, t), weight V^-1 (r, r), target N - background (r,), penalty L^T L (t, t)."""

    folding: Array
    weight: Array
    covariance: Array
    target: Array
    penalty: Array

    def solve(self, strength: float) -> tuple[Array, Array]:
        """Return ratio x (t,) and dx/dN (t, r)."""
        weighted = self.folding.T @ self.weight
        slope = np.asarray(np.linalg.solve(weighted @ self.folding + strength**2 * self.penalty, weighted), dtype=np.float64)
        return slope @ self.target, slope

    def chi2(self, ratio: Array) -> float:
        """Distance of the folded ratio to the data."""
        residual = self.target - self.folding @ ratio
        return float(residual @ self.weight @ residual)


def tikhonov(
    counts: ArrayLike,
    response: Response | ArrayLike,
    strength: float | None = None,
    prior: ArrayLike | None = None,
    *,
    method: str = "global_correlation",
    counts_covariance: ArrayLike | None = None,
    background: ArrayLike | None = None,
    n_strengths: int = 60,
) -> Tikhonov:
    r"""Unfold by least squares with a curvature penalty, min chi2(n) + tau^2 |L (n / p)|^2.

    Args:
        counts: (r,), measured, >= 0; nothing subtracted. Or a histogram (UHI) with the response's edges; weighted: its variances.
        response: Response, or matrix (r, t) = P(reco | truth); r >= t.
        strength: tau, for a penalty on n over the scaled prior; None = chosen on a scan by `method`.
        prior: (t,) > 0, any scale: the shape whose ratio is to be smooth. None: the response's `truth` spectrum, else flat.
        method: "global_correlation" (smallest mean) or "l_curve" (largest curvature).
        counts_covariance: (r, r); None = Poisson.
        background: (r,), expected counts that are no signal; None = the response's own.
        n_strengths: of the scan.

    Returns: Tikhonov.
    Raises: ShapeError, NonFiniteError, DataError, SettingError (fewer reco than truth bins, a matrix of lower rank).
    Source: Hocker & Kartvelishvili 1996, hep-ph/9509307; Schmitt 2012, arXiv:1205.6201.

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response, tikhonov
    >>> edges = np.linspace(0, 6, 7)
    >>> response = Response.from_resolution(edges, edges, resolution=0.5)
    >>> result = tikhonov([40, 90, 150, 160, 90, 35], response)
    >>> result.counts.shape, bool(abs(result.refolded.sum() / 565 - 1) < 0.02)
    ((6,), True)
    """
    resp = as_response(response)
    if not 3 <= resp.n_truth <= resp.n_reco:
        raise SettingError(
            f"response is {resp.n_reco} x {resp.n_truth}; expected n_reco >= n_truth >= 3, or least squares has no unique solution"
        )
    resp, data, given = measured(counts, resp, counts_covariance, background)
    shape, _ = prior_or_default(prior, resp)
    p = scaled_prior(data, shape, resp)
    require_choice("method", method, METHODS)
    n_strengths = require_int("n_strengths", n_strengths, low=10, high=10_000)
    tau = 0.0 if strength is None else require_number("strength", strength, low=0)
    found: TikhonovScan | None = None
    problem = _problem(data, resp, p, given if given is not None else np.diag(np.maximum(data, 1.0)))
    for last in (True,) if given is not None else (False, True):
        if strength is None:
            found = _scan(problem, p, method, n_strengths)
            tau = float(found.strength[found.chosen])
        ratio, slope = problem.solve(tau)
        if not last:  # expected instead of observed counts, at least half a count
            problem = _problem(data, resp, p, np.diag(np.maximum(resp.fold(p * ratio), 0.5)))
    return _result(problem, resp, data, p, ratio, slope, tau, found)


def _problem(data: Array, response: Response, p: Array, variance: Array) -> _Problem:
    a = response.matrix / (1 - response.fakes)[:, None]
    n = p.size
    second = np.diff(np.eye(n), n=2, axis=0)
    try:
        weight = np.asarray(np.linalg.inv(variance), dtype=np.float64)
    except np.linalg.LinAlgError as err:
        raise DataError(f"counts_covariance is singular ({err}); expected one that can be inverted") from err
    folding = a * p
    if np.linalg.matrix_rank(folding / np.sqrt(np.diag(variance))[:, None], tol=None) < n:
        raise SettingError(f"response has rank below its {n} truth bins; expected independent columns, merge truth bins")
    return _Problem(folding, weight, variance, data - response.background, second.T @ second)


def _scan(problem: _Problem, p: Array, method: str, n: int) -> TikhonovScan:
    information = problem.folding.T @ problem.weight @ problem.folding
    values = eigh(problem.penalty, information, eigvals_only=True)
    damped = values[2:]  # constant and tilt have no curvature
    strength = np.sqrt(np.geomspace(1e-2 / damped[-1], 1e2 / max(damped[0], 1e-12 * damped[-1]), n))
    chi2, penalty, correlation, effective = (np.empty(n) for _ in range(4))
    for i, tau in enumerate(strength):
        ratio, slope = problem.solve(float(tau))
        chi2[i], penalty[i] = problem.chi2(ratio), ratio @ problem.penalty @ ratio
        effective[i] = np.trace(problem.folding @ slope)
        correlation[i] = _global_correlation((p[:, None] * slope) @ problem.covariance @ (p[:, None] * slope).T)
    curvature = _curvature(np.log(strength), np.log(np.maximum(chi2, 1e-300)), np.log(np.maximum(penalty, 1e-300)))
    chosen = int(np.nanargmin(correlation)) if method == "global_correlation" else int(np.argmax(curvature[1:-1])) + 1
    return TikhonovScan(
        strength=strength,
        chi2=chi2,
        penalty=penalty,
        curvature=curvature,
        global_correlation=correlation,
        effective=effective,
        method=method,
        chosen=chosen,
    )


def _global_correlation(covariance: Array) -> float:
    # scaled to unit variances first: a steep spectrum's covariance spans decades
    scale = np.sqrt(np.diag(covariance))
    values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    if values[0] <= 1e-13 * values[-1]:
        return np.nan  # the damping is so strong that the covariance is singular
    inverse = ((vectors / values) * vectors).sum(axis=1)
    return float(np.sqrt(np.maximum(1 - 1 / inverse, 0)).mean())


def _curvature(t: Array, x: Array, y: Array) -> Array:
    dx, dy = np.gradient(x, t), np.gradient(y, t)
    ddx, ddy = np.gradient(dx, t), np.gradient(dy, t)
    return np.asarray((dx * ddy - dy * ddx) / np.maximum((dx**2 + dy**2) ** 1.5, 1e-300))


def _result(
    problem: _Problem, response: Response, data: Array, p: Array, ratio: Array, slope: Array, tau: float, found: TikhonovScan | None
) -> Tikhonov:
    n, jacobian = p * ratio, p[:, None] * slope
    v_data = jacobian @ problem.covariance @ jacobian.T
    v_response = np.zeros_like(v_data)
    if response.n_simulated is not None:
        # dn/dP[j, m] = [diag(p) K]_{. m} p_m (V^-1 residual)_j - J_{. j} n_m, over 1 - phi_j
        weighted = problem.folding.T @ problem.weight
        inverse = np.linalg.inv(weighted @ problem.folding + tau**2 * problem.penalty)
        pulled = problem.weight @ (problem.target - problem.folding @ ratio)
        by_response = (p[:, None] * inverse * p)[:, None, :] * pulled[:, None] - jacobian[:, :, None] * n
        v_response = response.propagate(by_response / (1 - response.fakes)[:, None])
    return Tikhonov(
        counts=n,
        covariance=v_data + v_response,
        covariance_data=v_data,
        covariance_response=v_response,
        jacobian=jacobian,
        strength=tau,
        scan=found,
        prior=p,
        measured=data,
        refolded=response.fold(n),
        chi2=problem.chi2(ratio),
        effective=float(np.trace(problem.folding @ slope)),
        truth_edges=response.truth_edges,
        reco_edges=response.reco_edges,
    )
