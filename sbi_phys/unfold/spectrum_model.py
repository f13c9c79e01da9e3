r"""The generative model behind Bayesian unfolding, as a simulator, so that neural posterior estimation unfolds classes of spectra at once.

    w ~ N(0, 1),   log n = log n0 + B w,   N_j ~ Poisson(f_j(n)),      B B^T = Q(sigma)^-1

Q is the prior's precision of `bayesian_unfold` (`spectrum_posterior`), so that for a fixed smoothness and the same reference both have the
same posterior: `bayesian_unfold` samples it for one histogram, a network learns it for all of them (amortised) and never sees a density.

    model = SpectrumModel(response, reference, smoothness=10, level_sd=0.5, tilt_sd=0.5)
    theta = model.prior.sample(20_000, rng)
    npe = sp.NPE(model.prior, observables=model.observables).fit(theta, model.simulate(theta, rng))
    spectra = model.spectrum(npe.sample(counts, 4000))

Column k of B belongs to the k-th eigenvector of Q, the smallest eigenvalue first: level and tilt, then ever shorter waves.
"""

from typing import Any

import numpy as np

from sbi_phys.core.checks import as_matrix, require_known, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import NormalPrior, Observable, Parameter
from sbi_phys.unfold.inputs import check_prior
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.spectrum_posterior import SpectrumPrior

__all__ = ["SpectrumModel"]


ARRAYS = ("matrix", "truth_edges", "reco_edges", "fakes", "background")


class SpectrumModel:
    """Spectra from the smooth prior, and counts from them: a `Simulator`.

    Args: response: Response, or a dict of its arrays (as in `settings`). reference (t,) > 0, counts: the prior's centre, absolute.
    smoothness = 1 / sigma. level_sd, tilt_sd: of the mean of log(n / reference) and of its slope over half of the range; they make up the
    range of spectra that a network has to learn, so no wider than needed.
    Raises: SettingError, ShapeError, NonFiniteError, DataError.
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
        """The waves w_k, without unit."""
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
