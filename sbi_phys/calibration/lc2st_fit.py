"""The classifiers of L-C2ST: one fitted to truths against draws, and one per exchange of them, which makes the null distribution.

Where latent variables are known, each row of the null is a fresh standard normal vector in the truth's place; otherwise truth and draw
of a row are exchanged at random. Neither depends on the observation, so one set of classifiers serves every observation.
"""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbi_phys.calibration.lc2st_features import W_LIMIT, X_LIMIT, Terms, polynomial
from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array

__all__ = ["Classifier", "check_kind", "fit_all"]


BLOCK = 10  # ensembles in one job; it costs some milliseconds to start


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier:
    """Which classifier, and the terms of its polynomial: kind 'quadratic', 'mlp', or a scikit-learn classifier."""

    kind: Any
    terms: Terms

    def inputs(self, w: Array, u: Array) -> Array:
        """Return what the classifier sees of parameters w (n, d) and components u (n, c)."""
        if isinstance(self.kind, str) and self.kind == "quadratic":
            return polynomial(w, u, self.terms)
        return np.concatenate([np.clip(w, -W_LIMIT, W_LIMIT), np.clip(u, -X_LIMIT, X_LIMIT)], axis=1)

    def fitted(self, one: Array, zero: Array, u: Array, seed: int) -> Any:
        """Train truths `one` (n, d) against draws `zero` (n, d) at the same components u (n, c)."""
        from sklearn.exceptions import ConvergenceWarning

        inputs = np.concatenate([self.inputs(one, u), self.inputs(zero, u)])
        labels = np.repeat([1, 0], one.shape[0])
        estimator = _estimator(self.kind, seed)
        # a network at its last iteration is one more classifier, and the null is made of the same ones
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return estimator.fit(inputs, labels)


def _estimator(kind: Any, seed: int) -> Any:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if isinstance(kind, str):
        if kind == "quadratic":
            return LogisticRegression(C=1.0, solver="newton-cholesky", fit_intercept=False, tol=1e-3, max_iter=30)
        return MLPClassifier(hidden_layer_sizes=(32, 32), alpha=1e-2, learning_rate_init=5e-3, early_stopping=True, random_state=seed)
    copy = clone(kind)
    if "random_state" in copy.get_params():
        copy.set_params(random_state=seed)
    return copy


def check_kind(kind: Any) -> None:
    """Raise SettingError for something that is neither a name nor a classifier with probabilities."""
    if isinstance(kind, str):
        if kind not in ("quadratic", "mlp"):
            raise SettingError(f"classifier is {kind!r}; expected 'quadratic', 'mlp' or a scikit-learn classifier")
    elif not all(hasattr(kind, method) for method in ("fit", "predict_proba", "get_params")):
        raise SettingError(
            f"classifier is a {type(kind).__name__}; expected 'quadratic', 'mlp' or a scikit-learn classifier with predict_proba"
        )


def fit_all(
    classifier: Classifier, rows: Array, u: Array, *, latent: bool, n_members: int, n_null: int, seed: int, workers: int
) -> list[list[Any]]:
    """Fit n_null + 1 ensembles of n_members; the first is the observed one. The result does not depend on the number of workers.

    Args: rows (n, 1, d) latent variables, or (n, 1 + n_members, d) truth and draws. u (n, c).
    """
    from joblib import Parallel, delayed

    blocks = [range(i, min(i + BLOCK, n_null + 1)) for i in range(0, n_null + 1, BLOCK)]
    jobs = (delayed(_block)(classifier, rows, u, latent, n_members, block, seed) for block in blocks)
    return [ensemble for block in Parallel(n_jobs=workers)(jobs) for ensemble in block]


def _block(classifier: Classifier, rows: Array, u: Array, latent: bool, n_members: int, block: range, seed: int) -> list[list[Any]]:
    from sklearn import config_context
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # one thread of linear algebra each: matrices are small, and the numbers must not depend on the number of workers;
    # inputs have been checked once, checking them again for every classifier takes longer than fitting it
    with threadpool_limits(1), config_context(assume_finite=True, skip_parameter_validation=True):
        return [_ensemble(classifier, rows, u, latent, n_members, index, seed) for index in block]


def _ensemble(classifier: Classifier, rows: Array, u: Array, latent: bool, n_members: int, index: int, seed: int) -> list[Any]:
    rng = rng_for(seed, "lc2st", index)
    rows = _latent_rows(rows, n_members, index, rng) if latent else _exchanged(rows, index, rng)
    seeds = [seed_for(seed, "lc2st classifier", index, member) % 2**32 for member in range(n_members)]
    return [classifier.fitted(rows[:, 0], rows[:, 1 + member], u, own) for member, own in enumerate(seeds)]


def _latent_rows(rows: Array, n_members: int, index: int, rng: np.random.Generator) -> Array:
    n, _, d = rows.shape
    truth = rng.standard_normal((n, 1, d)) if index > 0 else rows
    return np.concatenate([truth, rng.standard_normal((n, n_members, d))], axis=1)


def _exchanged(rows: Array, index: int, rng: np.random.Generator) -> Array:
    # whichever of truth and draws takes the truth's place is drawn anew in each row
    if index == 0:
        return rows
    each, chosen = np.arange(rows.shape[0]), rng.integers(0, rows.shape[1], rows.shape[0])
    exchanged = rows.copy()
    exchanged[each, chosen], exchanged[:, 0] = rows[:, 0], rows[each, chosen]
    return exchanged
