r"""Depth of shower maximum: generalised Gumbel distributions, acceptance, resolution, and templates on histogram bins.

    pdf(x) = lambda^lambda / (sigma Gamma(lambda)) exp[-lambda (z + e^-z)],   z = (x - mu) / sigma

with l = lgE - 19 and, for each coefficient, p_i = a + b lnA + c ln^2 A:

    mu = p0 + p1 l + p2 l^2,   sigma = p0 + p1 l,   lambda = p0 + p1 l      (mu and sigma in g/cm2)

Source: De Domenico et al., JCAP 07 (2013) 050, arXiv:1305.2331, with the coefficients of EPOS-LHC, QGSJETII-04, Sibyll2.1.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincc, gammaln, ndtr, polygamma, psi

from simulators.errors import require_choice

__all__ = [
    "HADRONIC_MODELS",
    "acceptance",
    "gumbel_cdf",
    "gumbel_mean",
    "gumbel_parameters",
    "gumbel_pdf",
    "gumbel_sample",
    "gumbel_sd",
    "smeared_fraction",
]

Array = NDArray[np.float64]
_Rows = tuple[tuple[float, float, float], ...]

_COEFFICIENTS: Final[dict[str, tuple[_Rows, _Rows, _Rows]]] = {
    "EPOS-LHC": (
        ((775.589, -7.047, -2.427), (57.589, -0.743, 0.214), (-0.820, -0.169, -0.027)),
        ((29.403, 13.553, -3.154), (0.096, -0.961, 0.150)),
        ((0.563, 0.711, 0.058), (0.039, 0.067, -0.004)),
    ),
    "QGSJETII-04": (
        ((761.383, -11.719, -1.372), (57.344, -1.731, 0.309), (-0.355, 0.273, -0.137)),
        ((35.221, 12.335, -2.889), (0.307, -1.147, 0.271)),
        ((0.673, 0.694, -0.007), (0.060, -0.019, 0.017)),
    ),
    "Sibyll2.1": (
        ((770.104, -15.873, -0.960), (58.668, -0.124, -0.023), (-1.423, 0.977, -0.191)),
        ((31.717, 1.335, -0.601), (-1.912, 0.007, 0.086)),
        ((0.683, 0.278, 0.012), (0.008, 0.051, 0.003)),
    ),
}
HADRONIC_MODELS: Final = tuple(_COEFFICIENTS)


def gumbel_parameters(lg_energy: ArrayLike, mass: ArrayLike, model: str = "EPOS-LHC") -> tuple[Array, Array, Array]:
    """(mu, sigma, lambda) at lg(E/eV) for nuclear mass A, broadcast against each other; mu and sigma in g/cm2.

    Raises: SimulatorSettingError for an unknown hadronic model.
    """
    rows = _COEFFICIENTS[require_choice("hadronic_model", model, HADRONIC_MODELS)]
    step = np.asarray(lg_energy, dtype=np.float64) - 19
    log_mass = np.log(np.asarray(mass, dtype=np.float64))
    mu, sigma, shape = (sum((a + b * log_mass + c * log_mass**2) * step**k for k, (a, b, c) in enumerate(row)) for row in rows)
    return np.asarray(mu), np.asarray(sigma), np.asarray(shape)


def _arrays(*values: ArrayLike) -> tuple[Array, ...]:
    return tuple(np.asarray(v, dtype=np.float64) for v in values)


def gumbel_pdf(x: ArrayLike, mu: ArrayLike, sigma: ArrayLike, shape: ArrayLike) -> Array:
    """Density of Xmax at x, per g/cm2; all arguments broadcast."""
    x, mu, sigma, shape = _arrays(x, mu, sigma, shape)
    z = (x - mu) / sigma
    # e^-z overflows far below the mode, where the density is 0
    log_pdf = shape * np.log(shape) - gammaln(shape) - np.log(sigma) - shape * (z + np.exp(np.minimum(-z, 600.0)))
    return np.exp(log_pdf)


def gumbel_cdf(x: ArrayLike, mu: ArrayLike, sigma: ArrayLike, shape: ArrayLike) -> Array:
    """P(Xmax <= x) = Q(lambda, lambda e^-z), the regularised upper incomplete gamma function."""
    x, mu, sigma, shape = _arrays(x, mu, sigma, shape)
    return gammaincc(shape, shape * np.exp(np.minimum((mu - x) / sigma, 600.0)))


def gumbel_sample(mu: ArrayLike, sigma: ArrayLike, shape: ArrayLike, size: int | tuple[int, ...], rng: np.random.Generator) -> Array:
    """Draw Xmax in g/cm2: x = mu - sigma ln g with g ~ Gamma(shape lambda, scale 1/lambda)."""
    mu, sigma, shape = _arrays(mu, sigma, shape)
    return mu - sigma * np.log(rng.gamma(shape, 1 / shape, size=size))


def gumbel_mean(mu: ArrayLike, sigma: ArrayLike, shape: ArrayLike) -> Array:
    """<Xmax> = mu + sigma (ln lambda - psi(lambda)), g/cm2."""
    mu, sigma, shape = _arrays(mu, sigma, shape)
    return mu + sigma * (np.log(shape) - psi(shape))


def gumbel_sd(mu: ArrayLike, sigma: ArrayLike, shape: ArrayLike) -> Array:
    """sigma(Xmax) = sigma sqrt(psi'(lambda)), g/cm2; it does not depend on mu."""
    mu, sigma, shape = _arrays(mu, sigma, shape)
    return sigma * np.sqrt(polygamma(1, shape)) + 0.0 * mu


def acceptance(x: ArrayLike, parameters: ArrayLike) -> Array:
    """Relative acceptance at true Xmax x: 1 between x1 and x2, exponential with lengths l1 below and l2 above.

    Args: x, g/cm2, any shape. parameters (4,): x1, x2, l1, l2 in g/cm2.
    """
    x1, x2, l1, l2 = np.asarray(parameters, dtype=np.float64)
    return np.exp(np.minimum((np.asarray(x, dtype=np.float64) - x1) / l1, 0)) * np.exp(np.minimum((x2 - np.asarray(x)) / l2, 0))


def smeared_fraction(
    lg_energy: float, mass: float, model: str, accept: ArrayLike, resolution: ArrayLike, low: int, high: int
) -> tuple[Array, float]:
    r"""Accepted fraction of showers with measured Xmax below X, for the whole numbers X = low .. high.

        C(X) = int pdf(x) acc(x) [k Phi((X - x)/sigma1) + (1 - k) Phi((X - x)/sigma2)] dx

    Args: lg_energy, lg(E/eV). mass, A. accept (4,) and resolution (3,): rows of `AugerData`. low, high, g/cm2.
    Returns: C (high - low + 1,) and C(infinity), the accepted fraction.   Source: arXiv:1409.4809.
    """
    mu, sigma, shape = gumbel_parameters(lg_energy, mass, model)
    # midpoint rule on a grid of 1 g/cm2, ten times finer than the resolution, over the whole distribution
    x = np.arange(200.0, 2400.0) + 0.5
    weight = gumbel_pdf(x, mu, sigma, shape) * acceptance(x, accept)
    sigma1, sigma2, k = np.asarray(resolution, dtype=np.float64)
    difference = np.arange(low - 2399, high - 199) - 0.5
    kernel = k * ndtr(difference / sigma1) + (1 - k) * ndtr(difference / sigma2)
    size = weight.size + kernel.size - 1
    below = np.fft.irfft(np.fft.rfft(weight, size) * np.fft.rfft(kernel, size), size)[weight.size - 1 : kernel.size]
    return np.maximum.accumulate(np.maximum(below, 0.0)), float(weight.sum())
