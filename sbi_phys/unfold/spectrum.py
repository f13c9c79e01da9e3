r"""The model behind Bayesian unfolding: a prior of smooth spectra, the posterior density of z = log n, and the model as a simulator.

    log p(z | N, sigma) = sum_j [N_j log f_j - f_j] - 1/2 (z - z0)^T Q(sigma) (z - z0) + const ,   f = A e^z + b ,   A = P / (1 - phi)
    Q(sigma) = D^T D / sigma^2 + l l^T / s_l^2 + k k^T / s_k^2

D x is the second difference of x = z - z0, l.x its mean and k.x its slope over half of the range. On bins of equal width in lg E a power
law is a straight line in z, so D measures the departure from a power law, for any index of the reference z0. For bins of unequal width h
the differences are those of sum (x'')^2 h, in units of the mean width.

sigma has a half-Cauchy prior of scale s, cut to the range s exp(-7) to s exp(5). With `dof` nu the second differences follow Student's t
instead of a Gaussian, for spectra that are straight except for a few sharp breaks:

    -(nu + 1)/2 sum_i log(1 + (D x)_i^2 / (nu sigma^2))   replaces   -1/2 |D x|^2 / sigma^2

and the weight of row i in Q is (nu + 1) / (nu sigma^2 + (D x)_i^2). It is positive, and steps with it never lower the density.

A flat prior in n is a factor exp(sum z) instead of Q. With a covariance V of the counts -1/2 (N - f)^T V^-1 (N - f) replaces the Poisson
terms.

    gradient  n * A^T (N / f - 1) - Q x        Fisher matrix  diag(n) A^T diag(1 / f) A diag(n)

As a simulator (`SpectrumModel`) the same model is written in independent coordinates w ~ N(0, 1),

    z = z0 + B w ,   B B^T = Q^-1(sigma) ,   N ~ Poisson(A e^z + b) ,

so that neural posterior estimation can unfold many spectra with one network.

Source: Choudalakis 2012, arXiv:1201.4612 (fully Bayesian unfolding); Faulkner & Minin 2018, arXiv:1512.06505 (heavy-tailed increments);
Gelman 2006, Bayesian Anal. 1, 515 (half-Cauchy).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg import cho_solve

from sbi_phys.core.checks import as_matrix, require_known, require_number
from sbi_phys.core.errors import ConvergenceError, SettingError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import NormalPrior, Observable, Parameter
from sbi_phys.unfold._inputs import check_prior
from sbi_phys.unfold.response import Response

__all__ = ["Laplace", "LogPosterior", "SpectrumModel", "SpectrumPrior", "curvature_matrix", "level_and_tilt"]


SIGMA_RANGE = (-7.0, 5.0)  # of log(sigma / scale)

_LOG_LIMIT = 300.0  # of |log n|: larger values overflow; they occur on diverging trajectories, which are rejected

_STEPS, _DECREMENT = 500, 1e-9


def _positions(edges: Array | None, n: int) -> Array:
    """Bin centres (n,) in units of the mean spacing."""
    if edges is None or n < 2:
        return np.arange(n, dtype=np.float64)
    centre = (edges[1:] + edges[:-1]) / 2
    return np.asarray(centre / (centre[-1] - centre[0]) * (n - 1))


def curvature_matrix(edges: Array | None, n: int) -> Array:
    """Second differences D (n - 2, n), exact zeros for a straight line over the bin centres; (1, -2, 1) for equal bins."""
    if n < 3:
        return np.zeros((0, n))
    h = np.diff(_positions(edges, n))
    out = np.zeros((n - 2, n))
    i = np.arange(n - 2)
    middle = (h[1:] + h[:-1]) / 2
    # divided difference times the root of its width
    out[i, i], out[i, i + 2] = 1 / (h[:-1] * np.sqrt(middle)), 1 / (h[1:] * np.sqrt(middle))
    out[i, i + 1] = -out[i, i] - out[i, i + 2]
    return out


def level_and_tilt(edges: Array | None, n: int) -> tuple[Array, Array]:
    """Row vectors l, k (n,): l.x is the mean of x, k.x its least-squares slope per half of the range; k = 0 for one bin."""
    u = _positions(edges, n)
    u = u - u.mean()
    if n < 2:
        return np.full(n, 1.0 / n), np.zeros(n)
    u = 2 * u / (u[-1] - u[0])
    return np.full(n, 1.0 / n), u / (u @ u)


@dataclass(frozen=True, kw_only=True, slots=True)
class SpectrumPrior:
    """Prior of z = log n.

    reference (t,), counts > 0: exp(z0). curvature D (m, t). free (t, t), precision of level and tilt. flat: uniform in n
    instead. log_sigma: fixed, or None = half-Cauchy of scale `hyper_scale`. dof: of Student's t, infinite = Gaussian.
    """

    reference: Array
    curvature: Array
    free: Array
    flat: bool
    log_sigma: float | None
    hyper_scale: float
    dof: float = math.inf

    @classmethod
    def build(
        cls,
        reference: Array,
        edges: Array | None,
        *,
        flat: bool = False,
        smoothness: float | None = None,
        hyper_scale: float = 0.1,
        level_sd: float = 10.0,
        tilt_sd: float = 10.0,
        dof: float = math.inf,
    ) -> "SpectrumPrior":
        """Prior from its settings; smoothness = 1 / sigma."""
        n = reference.size
        level, tilt = level_and_tilt(edges, n)
        free = np.outer(level, level) / level_sd**2 + np.outer(tilt, tilt) / tilt_sd**2
        curvature = curvature_matrix(edges, n)
        fixed = None if smoothness is None else -math.log(smoothness)
        if flat or n < 3:
            fixed = 0.0  # fewer than three bins have no curvature
        return cls(
            reference=reference, curvature=0 * curvature if flat else curvature, free=0 * free if flat else free,
            flat=flat, log_sigma=fixed, hyper_scale=hyper_scale, dof=dof,
        )  # fmt: skip

    @property
    def hierarchical(self) -> bool:
        """Whether sigma is one of the unknowns."""
        return self.log_sigma is None

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest log sigma."""
        if self.log_sigma is not None:
            return self.log_sigma, self.log_sigma
        middle = math.log(self.hyper_scale)
        return middle + SIGMA_RANGE[0], middle + SIGMA_RANGE[1]

    def weights(self, bent: Array, log_sigma: Array) -> Array:
        """Weights of the squared second differences (..., m) in Q: 1 / sigma^2; with Student's t smaller for large differences."""
        inverse = np.exp(-2 * np.asarray(log_sigma))[..., None]
        if math.isinf(self.dof):
            return np.asarray(np.broadcast_to(inverse, bent.shape))
        return np.asarray((self.dof + 1) * inverse / (self.dof + bent**2 * inverse))

    def log_curvature(self, bent: Array, log_sigma: Array) -> Array:
        """Log density of the second differences (..., m) -> (...), without the terms that depend on sigma alone."""
        squared = bent**2 * np.exp(-2 * np.asarray(log_sigma))[..., None]
        if math.isinf(self.dof):
            return np.asarray(-0.5 * squared.sum(axis=-1))
        return np.asarray(-0.5 * (self.dof + 1) * np.log1p(squared / self.dof).sum(axis=-1))

    def precision(self, log_sigma: float, bent: Array | None = None) -> Array:
        """Q(sigma) (t, t), for second differences (m,), which only Student's t uses; None = 0."""
        weight = self.weights(np.zeros(len(self.curvature)) if bent is None else bent, np.asarray(log_sigma))
        return np.asarray(self.free + (self.curvature.T * weight) @ self.curvature)


@dataclass(frozen=True, kw_only=True, slots=True)
class Laplace:
    """Gaussian approximation at one sigma: mode z (t,), factor L (t, t) with covariance L L^T, precision (t, t), log evidence."""

    log_sigma: float
    mode: Array
    factor: Array
    precision: Array
    log_evidence: float


class LogPosterior:
    """Log density of c pairs of z (c, t) and log sigma (c,).

    Args: counts (r,). response. prior. weight (r, r), inverse covariance of the counts; None = Poisson.
    """

    def __init__(self, counts: Array, response: Response, prior: SpectrumPrior, weight: Array | None = None) -> None:
        self.counts, self.prior, self.weight = counts, prior, weight
        self.matrix = np.asarray(response.matrix / (1 - response.fakes)[:, None])
        self.background = response.background
        self.centre = np.log(prior.reference)
        self._safe = np.where(counts > 0, counts, 1.0)

    @property
    def dim(self) -> int:
        """Number of truth bins."""
        return self.centre.size

    def likelihood(self, z: Array) -> tuple[Array, Array]:
        """Log likelihood (c,) relative to a perfect fit, and its gradient (c, t)."""
        n = np.exp(np.clip(z, -_LOG_LIMIT, _LOG_LIMIT))
        f = n @ self.matrix.T + self.background
        if self.weight is not None:
            residual = self.counts - f
            pulled = residual @ self.weight
            return -0.5 * (residual * pulled).sum(axis=-1), n * (pulled @ self.matrix)
        # N log(f / N) + N - f = N (log(1 + d) - d) with d = f / N - 1: the same without the rounding of N log N
        apart = (f - self.counts) / self._safe
        value = np.where(self.counts > 0, self.counts * (np.log1p(np.where(self.counts > 0, apart, 0.0)) - apart), -f).sum(axis=-1)
        return value, n * ((self.counts / f - 1) @ self.matrix)

    def bent(self, z: Array) -> Array:
        """Second differences D x (c, m)."""
        return np.asarray((z - self.centre) @ self.prior.curvature.T)

    def given_sigma(self, z: Array, log_sigma: Array) -> tuple[Array, Array]:
        """log p(z | N, sigma) (c,) up to terms that depend on sigma alone, and its gradient in z (c, t)."""
        value, slope = self.likelihood(z)
        if self.prior.flat:
            return value + z.sum(axis=-1), slope + 1.0
        x = z - self.centre
        bent, free = self.bent(z), x @ self.prior.free
        pull = free + (bent * self.prior.weights(bent, log_sigma)) @ self.prior.curvature
        return value - 0.5 * (x * free).sum(axis=-1) + self.prior.log_curvature(bent, log_sigma), slope - pull

    def log_hyper(self, log_sigma: Array) -> Array:
        """Log prior density of log sigma plus the terms of D x that depend on sigma alone; 0 for fixed sigma, -inf outside of its range."""
        if not self.prior.hierarchical:
            return np.zeros(np.shape(log_sigma))
        low, high = self.prior.range
        ratio = np.asarray(log_sigma) - math.log(self.prior.hyper_scale)
        value = ratio - np.logaddexp(0, 2 * ratio) - self.prior.curvature.shape[0] * np.asarray(log_sigma)
        return np.asarray(np.where((log_sigma >= low) & (log_sigma <= high), value, -np.inf))

    def joint(self, z: Array, log_sigma: Array) -> Array:
        """log p(z, log sigma | N) (c,), unnormalised."""
        return np.asarray(self.given_sigma(z, log_sigma)[0] + self.log_hyper(log_sigma))

    def information(self, z: Array, log_sigma: float, *, expected: bool) -> Array:
        """Minus the second derivatives (t, t) at z (t,): those of the data, or their expectation, which is positive."""
        n = np.exp(z)
        q = np.eye(z.size) if self.prior.flat else self.prior.precision(log_sigma, self.bent(z))
        scaled = self.matrix * n
        if self.weight is not None:
            fisher, slope = scaled.T @ self.weight @ scaled, (self.counts - n @ self.matrix.T - self.background) @ self.weight @ self.matrix
        else:
            f = self.matrix @ n + self.background
            curved = 1 / f if expected else self.counts / f**2
            fisher, slope = scaled.T @ (scaled * curved[:, None]), (self.counts / f - 1) @ self.matrix
        if expected:
            return np.asarray(fisher + q)
        return np.asarray(fisher - np.diag(n * slope) + (0 * q if self.prior.flat else q))

    def laplace(self, log_sigma: float, start: Array) -> Laplace:
        """Mode at one sigma, from `start` (t,), and the curvature there.   Raises: ConvergenceError."""
        mode = self._mode(log_sigma, start)
        precision, lower = self._curvature(mode, log_sigma)
        factor = np.linalg.inv(lower).T
        at = self.joint(mode, np.asarray(log_sigma))
        evidence = float(at) - float(np.log(np.diag(lower)).sum())
        return Laplace(log_sigma=log_sigma, mode=mode, factor=np.asarray(factor), precision=precision, log_evidence=evidence)

    def _curvature(self, z: Array, log_sigma: float) -> tuple[Array, Array]:
        """Information and its Cholesky factor: the observed one where it is positive (Newton's steps), else the expected one (scoring)."""
        for expected in (False, True):
            matrix = self.information(z, log_sigma, expected=expected)
            try:
                return matrix, np.asarray(np.linalg.cholesky(matrix))
            except np.linalg.LinAlgError:
                continue
        raise ConvergenceError(f"bayesian_unfold: the curvature at {z.tolist()} is not positive; expected counts that determine all bins")

    def _mode(self, log_sigma: float, start: Array) -> Array:
        z, sigma = start.copy(), np.asarray(log_sigma)
        value, gradient = self.given_sigma(z, sigma)
        for _ in range(_STEPS):
            step = cho_solve((self._curvature(z, log_sigma)[1], True), gradient)
            if float(gradient @ step) < _DECREMENT * (1 + abs(float(value))):
                return z
            size = min(1.0, 3.0 / float(np.abs(step).max()))  # the quadratic approximation does not hold for changes beyond e^3
            while size > 1e-10:
                trial = z + size * step
                reached, slope = self.given_sigma(trial, sigma)
                if reached >= value:
                    break
                size /= 2
            else:
                if float(gradient @ step) < 1e-4:  # limited by rounding: the step is below a hundredth of an error
                    return z
                break
            z, value, gradient = trial, reached, slope
        raise ConvergenceError(
            f"bayesian_unfold: the mode at sigma = {math.exp(log_sigma):.3g} was not found in {_STEPS} Newton steps, gradient up to"
            f" {np.abs(gradient).max():.3g}; expected counts that the response can describe"
        )


ARRAYS = ("matrix", "truth_edges", "reco_edges", "fakes", "background")


class SpectrumModel:
    """Spectra from the smooth prior, and counts from them: a `Simulator`.

    Args: response: Response, or a dict of its arrays (as in `settings`). reference (t,) > 0, counts: the prior's centre, absolute.
    smoothness = 1 / sigma. level_sd, tilt_sd: of the mean of log(n / reference) and of its slope over half of the range; they set the
    range of spectra that a network has to learn and should be no wider than needed.
    Raises: SettingError, ShapeError, NonFiniteError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response, SpectrumModel
    >>> model = SpectrumModel(Response([[0.8, 0.2], [0.1, 0.7]]), reference=[100.0, 80.0])
    >>> rng = np.random.default_rng(1)
    >>> theta = model.prior.sample(5, rng)
    >>> model.spectrum(theta).shape, model.simulate(theta, rng).shape
    ((5, 2), (5, 2))
    """

    def __init__(
        self,
        response: Response | dict[str, Any],
        reference: ArrayLike,
        *,
        smoothness: float = 10.0,
        level_sd: float = 0.5,
        tilt_sd: float = 0.5,
    ) -> None:
        if isinstance(response, dict):
            require_known("response", response, ARRAYS)
            arrays: dict[str, Any] = {name: None if v is None else np.asarray(v, dtype=np.float64) for name, v in response.items()}
            response = Response(**arrays)
        if not isinstance(response, Response):
            raise SettingError(f"response is a {type(response).__name__}; expected a Response")
        self.response = response
        self.reference = check_prior(reference, response.n_truth, response.truth_edges)
        self.smoothness = require_number("smoothness", smoothness, low=0, open_low=True)
        self.level_sd = require_number("level_sd", level_sd, low=0, open_low=True)
        self.tilt_sd = require_number("tilt_sd", tilt_sd, low=0, open_low=True)
        built = SpectrumPrior.build(
            self.reference, response.truth_edges, smoothness=self.smoothness, level_sd=self.level_sd, tilt_sd=self.tilt_sd
        )
        values, vectors = np.linalg.eigh(built.precision(-np.log(self.smoothness)))
        self.basis = vectors / np.sqrt(values)
        self.prior = NormalPrior([Parameter(f"w{k}", latex=f"w_{{{k}}}") for k in range(response.n_truth)])

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The coordinates w_k, dimensionless."""
        return self.prior.parameters

    @property
    def observables(self) -> tuple[Observable, ...]:
        """The measured counts."""
        edges = self.response.reco_edges
        return (Observable("counts", self.response.n_reco, kind="counts", edges=() if edges is None else tuple(edges)),)

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments as plain values, the response by its arrays, for the identity of stores and models."""
        arrays = {name: getattr(self.response, name) for name in ARRAYS}
        plain = {name: None if value is None else value.tolist() for name, value in arrays.items()}
        return {
            "response": plain, "reference": self.reference.tolist(), "smoothness": self.smoothness,
            "level_sd": self.level_sd, "tilt_sd": self.tilt_sd,
        }  # fmt: skip

    def spectrum(self, theta: ArrayLike) -> Array:
        """True counts (n, t) of theta (n, t) = w.   Raises: ShapeError, NonFiniteError."""
        w = as_matrix("theta", theta, self.prior.dim)
        return np.asarray(self.reference * np.exp(w @ self.basis.T))

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw measured counts (n, r), Poisson around the folded spectra of theta (n, t).   Raises: ShapeError, NonFiniteError."""
        return rng.poisson(self.response.fold(self.spectrum(theta))).astype(np.float64)
