r"""Intervals, limits and significances from the likelihood's asymptotic distributions.

With q(mu) = 2 [ln L(mu_hat, nu_hat) - ln L(mu, nu(mu))] and z_p = Phi^-1(p):

    interval        q(mu) <= chi2_level(1)                               both sides
    upper limit     q_mu = q(mu) for mu_hat <= mu, else 0;   p = 1 - Phi(sqrt q_mu);   limit where q = z_level^2
    discovery       q_0 = q(0) for mu_hat >= 0, else 0;      p = 1 - Phi(sqrt q_0),    Z = sqrt q_0
    CLs             CLs(mu) = p_mu / P(q_mu >= q_obs | no signal), a limit where it is 1 - level

For CLs the second probability needs sqrt(q_A) = mu / sigma, q_A being q of the Asimov data set (the expected data without signal):
sqrt q is then shifted by it. With mu_hat >= 0 imposed (a limit at 0), large values follow another law:

    q <= q_A:  p_mu = 1 - Phi(sqrt q),                   CL_b = Phi(sqrt q_A - sqrt q)
    q >  q_A:  p_mu = 1 - Phi((q + q_A) / (2 sqrt q_A)),  CL_b = 1 - Phi((q - q_A) / (2 sqrt q_A))

Expected limits for data N sd from the median: sigma (Phi^-1(1 - alpha Phi(N)) + N) for CLs, alpha = 1 - level.

All of it is for many events and mu away from a limit. At a limit the nominal 68.3 % covers 84.1 %, 90 % covers 95 %.

Source: Cowan, Cranmer, Gross & Vitells 2011, arXiv:1007.1727; Read 2002 (CLs).
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import chdtri, ndtr, ndtri

from sbi_phys.confidence.inputs import check_level
from sbi_phys.confidence.profile import Fit
from sbi_phys.confidence.scans import conditional, crossing
from sbi_phys.core.checks import as_real, require_finite
from sbi_phys.core.errors import ConvergenceError, DataError, SettingError
from sbi_phys.core.types import Array, ArrayLike

__all__ = ["Discovery", "asymptotic_interval", "asymptotic_limit", "cls_limit", "cls_value", "discovery"]


BANDS = (-2.0, -1.0, 0.0, 1.0, 2.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Discovery:
    """Test of `name` = null against larger values: q0, its significance Z = sqrt(q0) in sd and one-sided p-value."""

    name: str
    null: float
    q0: float
    significance: float
    pvalue: float

    def summary(self) -> str:
        """Return the result in words."""
        return f"{self.name} > {self.null:g}: {self.significance:.2f} sigma (p = {self.pvalue:.3g}, asymptotic)"


def asymptotic_interval(fit: Fit, name: str, level: float = 0.683) -> tuple[float, float]:
    """Profile likelihood interval {q <= chi2_level(1)}; it ends at a limit where q stays below up to there.

    Raises: SettingError, ConvergenceError.   Source: Wilks 1938; arXiv:1007.1727, section 3.
    """
    target = float(chdtri(1, 1 - check_level(level)))
    return crossing(fit, name, target, -1), crossing(fit, name, target, 1)


def asymptotic_limit(fit: Fit, name: str, level: float = 0.95, *, kind: str = "upper") -> float:
    """One-sided limit where q = Phi^-1(level)^2, kind 'upper' or 'lower'; level > 0.5.

    Raises: SettingError, ConvergenceError.   Source: arXiv:1007.1727, section 2.4, equation 68.
    """
    if check_level(level) <= 0.5:
        raise SettingError(f"level is {level:g}; expected more than 0.5 for a one-sided limit")
    if kind not in ("upper", "lower"):
        raise SettingError(f"kind is {kind!r}; expected upper or lower")
    return crossing(fit, name, float(ndtri(level)) ** 2, 1 if kind == "upper" else -1)


def discovery(fit: Fit, name: str, null: float = 0.0) -> Discovery:
    """Significance of a signal, Z = sqrt(q_0); 0 where the fit lies below `null`.

    Raises: SettingError, ConvergenceError.   Source: arXiv:1007.1727, equations 12 and 52.
    """
    above = fit.value(name) > null
    q0 = max(2 * (conditional(fit, {name: null})[0] - fit.nll), 0.0) if above else 0.0
    z = float(np.sqrt(q0))
    return Discovery(name=name, null=float(null), q0=q0, significance=z, pvalue=float(ndtr(-z)))


def cls_value(q: ArrayLike, q_asimov: ArrayLike) -> Array:
    """CLs = p_mu / CL_b of the statistic with mu_hat >= 0 imposed, from q_mu >= 0 of the data and of the Asimov data set (> 0).

    Raises: NonFiniteError, DataError.   Source: arXiv:1007.1727, equations 65 and 66.
    """
    data, asimov = as_real("q", q), as_real("q_asimov", q_asimov)
    require_finite("q", data)
    require_finite("q_asimov", asimov)
    if (data < 0).any() or (asimov <= 0).any():
        raise DataError(f"q is {data.min():g} and q_asimov {asimov.min():g} at least; expected q >= 0 and q_asimov > 0")
    root, root_a = np.sqrt(data), np.sqrt(asimov)
    small = data <= asimov
    p_mu = np.where(small, ndtr(-root), ndtr(-(data + asimov) / (2 * root_a)))
    cl_b = np.where(small, ndtr(root_a - root), ndtr(-(data - asimov) / (2 * root_a)))
    return np.asarray(p_mu / np.maximum(cl_b, 1e-300))


def cls_limit(fit: Fit, asimov: Fit, name: str, level: float = 0.95) -> tuple[float, Array]:
    """Upper limit where CLs = 1 - level, and the expected ones without signal, (5,) at -2, -1, 0, 1, 2 sd.

    Args: fit: to the data, with 0 as lower limit of `name`. asimov: the same to the expected data without signal.
    Raises: SettingError, ConvergenceError.   Source: arXiv:1007.1727, equation 89 for the bands.
    """
    alpha = 1 - check_level(level)

    def excess(mu: float) -> float:
        q = max(2 * (conditional(fit, {name: mu})[0] - fit.nll), 0.0) if fit.value(name) <= mu else 0.0
        q_a = max(2 * (conditional(asimov, {name: mu})[0] - asimov.nll), 1e-12)
        return float(cls_value(q, q_a)) - alpha

    low = max(fit.value(name), asimov.value(name))
    step = max(fit.error(name), asimov.error(name))
    inside, high = low + 1e-3 * step, low + 2 * step
    while excess(high) > 0:
        inside, step = high, 1.5 * step
        high += step
        if step > 1e4 * max(fit.error(name), asimov.error(name)):
            raise ConvergenceError(f"CLs of {name} stays above {alpha:.3g} up to {high:g}; expected data that bound it")
    observed = float(brentq(excess, inside, high, xtol=1e-6 * step)) if excess(inside) > 0 else inside
    return observed, _expected(asimov, name, alpha)


def _expected(asimov: Fit, name: str, alpha: float) -> Array:
    # sigma = mu / sqrt(q_A(mu)) where it matters: at the limit itself, so found by iteration
    out = []
    for n in BANDS:
        factor = float(ndtri(1 - alpha * ndtr(n))) + n
        limit = factor * asimov.error(name)
        for _ in range(8):
            q_a = max(2 * (conditional(asimov, {name: limit})[0] - asimov.nll), 1e-12)
            limit = factor * limit / np.sqrt(q_a)
        out.append(limit)
    return np.array(out)
