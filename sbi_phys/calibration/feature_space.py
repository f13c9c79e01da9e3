r"""Features as one set of simulations sees them: whitened, with scores of how strange a row is. Fitted once, then applied to any rows.

Columns are standardised, so that units do not matter, and rotated onto principal components of unit variance. Directions in which
the simulations do not move at all (constant or exactly dependent columns, or more columns than rows) are kept apart: there a
distance in sd has no meaning, and leaving them is a score of its own, `span`.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbi_phys.core.errors import DataError
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array

__all__ = ["FeatureSpace", "feature_space"]


MIXTURE_DIM = 20  # leading components that the mixture sees: its covariances have the square of that many entries
MIXTURES = (1, 2, 3, 5, 8, 12, 18)  # numbers of Gaussians that BIC chooses from
MIXTURE_ROWS = 5000
NO_WIDTH = 1e-6  # of the largest component: the simulations do not move in directions narrower than this


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureSpace:
    """Features (n, k) -> whitened components (n, c), scores and pulls; `rows` (n, c) are those of the simulations fitted."""

    mean: Array
    scale: Array
    axes: Array
    empty: Array
    precision: Array
    rows: Array
    mixture: Any

    def _standard(self, x: Array) -> Array:
        return (x - self.mean) / self.scale

    def whiten(self, x: Array) -> Array:
        """Return the components, of unit variance over the simulations fitted."""
        return np.asarray(self._standard(x) @ self.axes)

    def scores(self, x: Array, n_neighbours: int) -> dict[str, Array]:
        """Return {name: (n,)}, larger is stranger: mahalanobis, neighbours, density, and span if the simulations lie in a subspace."""
        from sklearn.neighbors import NearestNeighbors

        w = self.whiten(x)
        near = NearestNeighbors(n_neighbors=n_neighbours).fit(self.rows).kneighbors(w)[0].mean(axis=1)
        density = -self.mixture.score_samples(w[:, :MIXTURE_DIM])
        found = {"mahalanobis": np.sqrt((w**2).sum(axis=1)), "neighbours": near, "density": density}
        if self.empty.shape[1]:
            away = np.sqrt(((self._standard(x) @ self.empty) ** 2).sum(axis=1))
            # rounding must not rank rows that all lie in the subspace
            found["span"] = np.where(away < NO_WIDTH * np.sqrt(1 + (self._standard(x) ** 2).sum(axis=1)), 0.0, away)
        # equal rows have equal scores whatever the size of the block they came in
        return {name: np.round(score, 9) for name, score in found.items()}

    def pulls(self, x: Array) -> tuple[Array, Array]:
        """Return (feature - mean) / sd (n, k), and the same given all other features, in the sd that they leave (linear)."""
        standard = self._standard(x)
        left = np.diag(self.precision)
        conditional = standard @ self.precision / np.sqrt(np.where(left > 0, left, 1.0))
        return standard, np.where(left > 0, conditional, standard)


def feature_space(fit: Array, seed: int) -> FeatureSpace:
    """Fit to simulations (n, k).   Raises: DataError if no feature varies."""
    mean, sd = fit.mean(axis=0), fit.std(axis=0)
    varies = sd > 1e-12 * np.maximum(np.abs(fit).max(axis=0), 1e-300)
    if not varies.any():
        raise DataError("every feature is constant in the simulations; expected features that vary")
    # a constant column has no sd: its own size, or 1, is the unit in which leaving it is counted
    scale = np.where(varies, sd, np.where(mean != 0, np.abs(mean), 1.0))
    standard = np.where(varies, (fit - mean) / scale, 0.0)
    # singular values of the rows: their squares alone would lose directions of relative sd below 1e-8
    _, size, vector = np.linalg.svd(standard, full_matrices=True) if fit.shape[0] < fit.shape[1] else _thin(standard)
    size = np.concatenate([size, np.zeros(fit.shape[1] - size.size)]) / np.sqrt(fit.shape[0])
    moves = size > NO_WIDTH * size[0]
    axes = vector[moves].T / size[moves]
    rows = standard @ axes
    return FeatureSpace(
        mean=mean,
        scale=scale,
        axes=axes,
        empty=vector[~moves].T,
        precision=axes @ axes.T,
        rows=rows,
        mixture=_mixture(rows[:MIXTURE_ROWS, :MIXTURE_DIM], seed),
    )


def _thin(standard: Array) -> tuple[Array, Array, Array]:
    # the singular values and right vectors of a tall matrix are those of its R factor, a small square
    return np.linalg.svd(np.linalg.qr(standard, mode="r"))


def _mixture(rows: Array, seed: int) -> Any:
    """Gaussian mixture with the number of components that BIC prefers; the search ends when two in a row are worse."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    n, dim = rows.shape
    best, lowest, worse = None, np.inf, 0
    for number in MIXTURES:
        if worse == 2 or (number > 1 and n < 5 * number * (dim + 1)):
            break
        mixture = GaussianMixture(number, reg_covar=1e-4, random_state=seed_for(seed, "mixture", number) % 2**32)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            bic = mixture.fit(rows).bic(rows)
        best, lowest, worse = (mixture, bic, 0) if bic < lowest else (best, lowest, worse + 1)
    return best
