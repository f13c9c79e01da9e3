r"""Forward folding: fit a parametric flux to the counts through the response, then correct the counts by c_i = unfolded_i / folded_i.

    n_mu(theta) = exposure int_mu J(E; theta) dE ,   f_j = sum_mu P[j, mu] n_mu / (1 - phi_j) + b_j ,   -2 ln L = 2 sum (f - N ln f) + const
    c_i = [exposure int_{reco bin i} J dE] / f_i ,   J_i = c_i N_i / (exposure dE_i)

The matrix is not inverted, so no noise is amplified; the result depends on the parametric form of J instead. The truth bins should reach
beyond the reco bins on both sides, so that f contains the events that migrate in from below the first bin. The fit depends on the data,
and so do the corrections: with C the covariance of the fit, dtheta/dN_j = C (df_j/dtheta) / f_j, and the covariance of U_i = c_i N_i is
G diag(f) G^T with G_ij = c_i delta_ij + N_i (dc_i/dtheta) . dtheta/dN_j.

The flux is a power law, or power laws that are joined by b smooth breaks of width w = 0.05 in lg E (about a tenth of a decade):

    J(E) = J0 (E / E0)^-g1  prod_{i=1..b} [1 + (E / E_i)^(1/w)]^((g_i - g_{i+1}) w) ,   E0 = 10^18.5 eV ,
    theta = (lg J0, g_1 .. g_{b+1}, lg E_1 .. lg E_b) .

Source: Pierre Auger Collaboration 2020, Phys. Rev. D 102, 062005, arXiv:2008.06486.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy.special import chdtrc

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import ConvergenceError, SbiPhysError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows, bin_columns
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold._inputs import check_counts
from sbi_phys.unfold.histograms import counts_of, to_hist
from sbi_phys.unfold.ibu import deviance
from sbi_phys.unfold.response import Response

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LG_E0", "ForwardFold", "bin_integral", "broken_power_law", "forward_fold", "parameter_names"]


Flux = Callable[[Array, Array], Array]

LG_E0 = 18.5

WIDTH = 0.05

POINTS, PANELS = 8, 2  # Gauss-Legendre in each half of a bin: a break of width 0.05 is resolved


def parameter_names(n_breaks: int) -> tuple[str, ...]:
    """Return the names of theta for b smooth breaks (0 = power law): lg_j0, gamma_1 .., lg_e_1 .."""
    return ("lg_j0", *(f"gamma_{i + 1}" for i in range(n_breaks + 1)), *(f"lg_e_{i + 1}" for i in range(n_breaks)))


def broken_power_law(lg_energy: Array, theta: Array) -> Array:
    """J(E) of theta (2 + 2 b,) at lg(E/eV) (n,), in the unit of J0 (1/(eV km2 sr yr)).

    Source: arXiv:2008.06486.

    >>> import numpy as np
    >>> from sbi_phys.unfold import broken_power_law
    >>> broken_power_law(np.array([18.5, 19.5]), np.array([-18.0, 3.0]))
    array([1.e-18, 1.e-21])
    """
    n_breaks = theta.size // 2 - 1
    gammas, breaks = theta[1 : n_breaks + 2], theta[n_breaks + 2 :]
    ln_j = np.log(10) * (theta[0] - gammas[0] * (lg_energy - LG_E0))
    for i, at in enumerate(breaks):
        # logaddexp: (E/E_i)^20 overflows nowhere, and far below the break the factor is exactly 1
        ln_j = ln_j + (gammas[i] - gammas[i + 1]) * WIDTH * np.logaddexp(0, np.log(10) * (lg_energy - at) / WIDTH)
    return np.asarray(np.exp(np.clip(ln_j, -600, 600)))


def bin_integral(flux: Flux, edges: Array, theta: Array) -> Array:
    """Integral of J dE over bins with edges in lg(E/eV), (n,) = int J(E) E ln10 dlgE.

    >>> import numpy as np
    >>> from sbi_phys.unfold import bin_integral, broken_power_law
    >>> edges = np.array([18.5, 18.6, 18.7])
    >>> bin_integral(broken_power_law, edges, np.array([-18.0, 3.0])).round(3)
    array([0.584, 0.368])
    """
    u, w = np.polynomial.legendre.leggauss(POINTS)
    cuts = np.linspace(edges[:-1], edges[1:], PANELS + 1).T
    low, high = cuts[:, :-1, None], cuts[:, 1:, None]
    x = (low + high) / 2 + (high - low) / 2 * u
    values = flux(x.ravel(), theta).reshape(x.shape) * 10.0**x * np.log(10)
    return np.asarray((values * w * (high - low) / 2).sum(axis=(1, 2)))


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardFold(Result):
    r"""Fitted flux and corrected data; p parameters, r reconstructed bins.

    names (p). values, errors (p,), covariance_parameters (p, p), from Hesse. minos (p, 2), lower (negative) and upper errors, or None.
    correction (r,) = c_i. counts (r,) = c_i N_i, true events in the reco bins; covariance (r, r); jacobian (r, r) = dU/dN.
    flux (r,) and flux_covariance (r, r), 1/(eV km2 sr yr) for an exposure in km2 sr yr. refolded (r,). chi2, Poisson deviance.

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response, forward_fold
    >>> response = Response.from_resolution(np.linspace(18.2, 19.8, 17), np.linspace(18.5, 19.5, 11), resolution=0.05, exposure=1.0)
    >>> fit = forward_fold([3660, 2310, 1460, 921, 581, 367, 231, 146, 92, 58], response)
    >>> fit.counts.shape, fit.ndf, fit.pvalue > 0.01
    ((10,), 8, True)
    """

    names: tuple[str, ...]
    values: Array
    errors: Array
    covariance_parameters: Array
    minos: Array | None
    correction: Array
    correction_errors: Array
    counts: Array
    covariance: Array
    jacobian: Array
    flux: Array
    flux_covariance: Array
    measured: Array
    refolded: Array
    chi2: float
    ndf: int
    reco_edges: Array
    model: Flux

    @property
    def pvalue(self) -> float:
        """Probability of a chi-square this large for r - p degrees of freedom; an approximation below about 5 counts in a bin."""
        return float(chdtrc(self.ndf, self.chi2)) if self.ndf > 0 else float("nan")

    def band(self, lg_energy: ArrayLike) -> tuple[Array, Array]:
        """Fitted J and its standard error at lg(E/eV) (n,), linear in the parameters."""
        x = as_array("lg_energy", lg_energy, (None,))
        slope = _slope(lambda theta: self.model(x, theta), self.values, self.errors)
        return self.model(x, self.values), np.sqrt(np.einsum("ia,ab,ib->i", slope, self.covariance_parameters, slope))

    def to_hist(self) -> Any:
        """Corrected counts and variances in the reco bins as a `hist` or `boost-histogram` object.   Raises: SbiPhysError."""
        return to_hist(self.reco_edges, self.counts, self.covariance)

    def rows(self) -> Rows:
        """Return the table: one row for each reconstructed bin; the fitted parameters are in `names`, `values` and `errors`."""
        found = {"measured": self.measured, "correction": self.correction, "correction_err": self.correction_errors}
        found |= {"counts": self.counts, "counts_err": np.sqrt(np.diag(self.covariance))}
        found |= {"flux": self.flux, "flux_err": np.sqrt(np.diag(self.flux_covariance))}
        return Rows.of(bin_columns(self.reco_edges, self.counts.size) | found)

    def summary(self) -> str:
        """Return the result in words."""
        lines = [f"forward folding: chi2 = {self.chi2:.4g} for {self.ndf} degrees of freedom (p = {self.pvalue:.3g})"]
        for i, name in enumerate(self.names):
            minos = "" if self.minos is None else f"  Minos {self.minos[i, 0]:+.3g} {self.minos[i, 1]:+.3g}"
            lines.append(f"  {name:<8} {self.values[i]:.5g} +- {self.errors[i]:.3g}{minos}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, power: float = 3.0) -> "Axes":
        """Draw E^power J(E), corrected data and fit."""
        return figures.unfolding.flux(self, ax, power)


class _Best(NamedTuple):
    """Values (p,), covariance (p, p) and errors (p,) of the fit; Minos errors (p, 2) or None."""

    values: Array
    covariance: Array
    errors: Array
    minos: Array | None


def forward_fold(
    counts: ArrayLike,
    response: Response,
    *,
    exposure: float | None = None,
    n_breaks: int = 0,
    start: ArrayLike | None = None,
    flux: Flux | None = None,
    names: Sequence[str] | None = None,
    minos: bool = False,
) -> ForwardFold:
    r"""Fit J(E; theta) to counts through the response by maximum Poisson likelihood, and correct the counts with it.

    Args:
        counts: (r,), measured, >= 0; nothing subtracted. Or a histogram (UHI) with the response's edges, not weighted.
        response: Response with truth_edges and reco_edges in lg(E/eV).
        exposure: km2 sr yr, independent of energy; None = the response's own. Include any energy dependence in the efficiency.
        n_breaks: smooth breaks of the power law, as in `flux.broken_power_law`: theta = (lg_j0, gamma_1 .., lg_e_1 ..).
        start: (p,), where the fit begins; None is enough for a power law without breaks.
        flux: J(lg E (n,), theta (p,)) -> (n,) instead; then start and names are needed.
        names: p names, with `flux`.
        minos: asymmetric errors from the profile likelihood too.

    Returns: ForwardFold.
    Raises: ShapeError, NonFiniteError, DataError, SettingError (edges, exposure or start missing), ConvergenceError, SbiPhysError
        (iminuit is not installed).
    Source: arXiv:2008.06486.

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response, forward_fold
    >>> response = Response.from_resolution(np.linspace(18.2, 19.8, 17), np.linspace(18.5, 19.5, 11), resolution=0.05, exposure=1.0)
    >>> fit = forward_fold([3660, 2310, 1460, 921, 581, 367, 231, 146, 92, 58], response)
    >>> fit.names, round(float(fit.values[1]), 1)
    (('lg_j0', 'gamma_1'), 3.0)
    """
    truth_edges, reco_edges, area = _axes(response, exposure)
    values, own = counts_of(counts, response)
    if own is not None:
        raise SettingError("counts is a weighted histogram; expected plain counts, because the likelihood of forward_fold is Poisson")
    data = check_counts(values, response.n_reco, reco_edges)
    model = broken_power_law if flux is None else flux
    labels, theta0 = _start(data, response, area, n_breaks, start, flux is not None, names)
    if theta0.size > data.size:
        raise SettingError(f"{theta0.size} parameters for {data.size} bins; expected no more parameters than bins")

    def folded(theta: Array) -> Array:
        return response.fold(area * bin_integral(model, truth_edges, theta))

    best = _minimise(lambda theta: deviance(data, np.maximum(folded(theta), 1e-300)), theta0, labels, minos=minos)
    return _correct(best, folded, model, data, reco_edges, area, labels)


def _correct(
    best: _Best, folded: Callable[[Array], Array], model: Flux, data: Array, reco_edges: Array, area: float, names: tuple[str, ...]
) -> ForwardFold:
    values, covariance = best.values, best.covariance

    def wanted(theta: Array) -> Array:
        return area * bin_integral(model, reco_edges, theta)

    f = folded(values)
    correction = wanted(values) / f
    slope_f = _slope(folded, values, best.errors)
    slope_c = _slope(lambda theta: wanted(theta) / folded(theta), values, best.errors)
    jacobian = np.diag(correction) + data[:, None] * (slope_c @ covariance @ (slope_f / f[:, None]).T)
    v = (jacobian * f) @ jacobian.T
    per_flux = area * np.diff(10.0**reco_edges)
    return ForwardFold(
        names=names,
        values=values,
        errors=best.errors,
        covariance_parameters=covariance,
        minos=best.minos,
        correction=correction,
        correction_errors=np.sqrt(np.einsum("ia,ab,ib->i", slope_c, covariance, slope_c)),
        counts=correction * data,
        covariance=v,
        jacobian=jacobian,
        flux=correction * data / per_flux,
        flux_covariance=v / np.outer(per_flux, per_flux),
        measured=data,
        refolded=f,
        chi2=deviance(data, f),
        ndf=data.size - values.size,
        reco_edges=reco_edges,
        model=model,
    )


def _axes(response: Response, exposure: float | None) -> tuple[Array, Array, float]:
    if response.truth_edges is None or response.reco_edges is None:
        raise SettingError("response has no edges; expected truth_edges and reco_edges in lg(E/eV)")
    area = response.exposure if exposure is None else require_number("exposure", exposure, low=0, open_low=True)
    if area is None:
        raise SettingError("exposure is not given, here or in the response; expected a number in km2 sr yr (1 for a flux per exposure)")
    return response.truth_edges, response.reco_edges, area


def _start(
    data: Array, response: Response, area: float, n_breaks: int, start: ArrayLike | None, own: bool, names: Sequence[str] | None
) -> tuple[tuple[str, ...], Array]:
    n_breaks = require_int("n_breaks", n_breaks, low=0, high=10)
    if own and (start is None or names is None):
        raise SettingError("flux is a function; expected both start and names for its parameters")
    if not own and names is not None:
        raise SettingError("names is given without a flux function; expected None with n_breaks")
    labels = tuple(names) if own and names is not None else parameter_names(n_breaks)
    if start is not None:
        theta = as_array("start", start, (None,))
        if theta.size != len(labels):
            raise ShapeError(f"start has {theta.size} values; expected {len(labels)}: {', '.join(labels)}")
        return labels, theta
    if n_breaks:
        raise SettingError(f"start is None; expected values near the answer for a law with {n_breaks} breaks: {', '.join(labels)}")
    # index 3, and the number of events sets the scale
    theta = np.array([0.0, 3.0])
    edges = response.truth_edges if response.truth_edges is not None else np.array([LG_E0, LG_E0 + 1])
    signal = response.fold(area * bin_integral(broken_power_law, edges, theta)) - response.background
    return labels, np.array([np.log10(max(data.sum() - response.background.sum(), 1.0) / signal.sum()), 3.0])


def _minimise(cost: Callable[[Array], float], start: Array, names: tuple[str, ...], *, minos: bool) -> _Best:
    try:
        from iminuit import Minuit
    except ImportError as err:
        raise SbiPhysError("forward_fold needs iminuit, which is not installed; expected `pip install iminuit`") from err
    fit: Any = Minuit(cost, start, name=names)
    fit.errordef = Minuit.LEAST_SQUARES  # the deviance is -2 ln L
    fit.errors = np.full(start.size, 0.02)
    fit.migrad(ncall=20_000)
    if not fit.valid:
        fit.simplex()
        fit.migrad(ncall=20_000)
    if not fit.valid or not np.isfinite(fit.fval):
        got = ", ".join(f"{n} = {v:.4g}" for n, v in zip(names, fit.values, strict=True))
        raise ConvergenceError(f"forward_fold: the fit did not converge, it ended at {got}; expected a start near the answer")
    fit.hesse()
    if fit.covariance is None:
        raise ConvergenceError("forward_fold: the curvature at the minimum is not positive; expected parameters that the data determine")
    limits = None
    if minos:
        fit.minos()
        limits = np.array([[fit.merrors[n].lower, fit.merrors[n].upper] for n in names])
    return _Best(np.array(fit.values), np.array(fit.covariance), np.array(fit.errors), limits)


def _slope(function: Callable[[Array], Array], at: Array, errors: Array) -> Array:
    # central differences in steps of a hundredth of an error: f' to 1e-4 or better
    columns = []
    for i, h in enumerate(0.01 * np.maximum(errors, 1e-12)):
        step = np.zeros(at.size)
        step[i] = h
        columns.append((function(at + step) - function(at - step)) / (2 * h))
    return np.stack(columns, axis=-1)
