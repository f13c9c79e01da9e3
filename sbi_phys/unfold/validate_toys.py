r"""Toys of a binned unfolding: what a method answers, how far it lies from the truth in its own errors, how often they cover.

    N_i ~ Poisson(f(n*)),   (n_i, V_i) = method(N_i, P_i),   z_i = (n_i - n*) / sigma_i,   sigma_i = sqrt(diag V_i)

A Poisson number of true events, moved by the response with Poisson fakes and background, is Poisson in every reconstructed bin, so
counts are drawn there. If the response was filled with simulated events (`n_simulated`), every toy gets a matrix of its own, drawn
multinomially from it, and the data come from the given one: covariances with the response's share in them are tested for that share.

Empty bins. An error of sqrt(N) is 0 where nothing was measured, and so may be that of a truth bin. Convention: coverage takes the
interval as it is quoted, and a point does not cover. For a *pull* the error is at least a tenth of that which the method quotes on
the expectation f(n*), so that no pull is infinite; how often this happened is counted, bin by bin (`degenerate`).
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Task
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Mask
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.smooth_truth import deviance

__all__ = ["Answer", "Method", "Toys", "distance", "in_errors", "run_toys"]

Unfold = Callable[[Array, Response], Any]

ERROR_FLOOR = 0.1  # of the expected error, for pulls
LIMIT = 1e6  # of a pull: means stay finite for a method without errors
FOLDED_FLOOR = 1e-6  # counts: a method may fold back to less than nothing
ATTEMPTS = 100  # at a response without empty rows and columns


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method says of one set of counts: counts (t,) and covariance (t, t)."""

    counts: Array
    covariance: Array

    @property
    def errors(self) -> Array:
        """Standard errors (t,)."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))


@dataclass(slots=True)
class Method:
    """A method by its name; `warned` counts what it warned of, by text, instead of showing it once for each toy."""

    name: str
    unfold: Unfold
    warned: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.unfold):
            raise SettingError(f"method {self.name!r} is a {type(self.unfold).__name__}; expected a callable (counts, response) -> result")

    def ask(self, counts: Array, response: Response, place: str) -> Answer:
        """Unfold, and check what comes back; `place` says in errors what was unfolded.

        Raises: SettingError (no .counts or .covariance), ShapeError (other bins), NonFiniteError, DataError; what the method raises gets
        a note with its name and the place.
        """
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = self.unfold(counts, response)
        except Exception as err:
            err.add_note(f"raised by method {self.name!r} on {place}")
            raise
        for text in {str(w.message) for w in caught}:
            self.warned[text] = self.warned.get(text, 0) + 1
        return self._checked(result, response, place)

    def _checked(self, result: Any, response: Response, place: str) -> Answer:
        who, n = f"method {self.name!r} on {place}", response.n_truth
        for name in ("counts", "covariance"):
            if not hasattr(result, name):
                raise SettingError(f"{who} gave a {type(result).__name__} without .{name}; expected .counts and .covariance")
        shape = np.shape(result.counts)
        if shape != (n,):
            raise ShapeError(f"{who} gave counts of shape {shape}; expected ({n},), the truth bins of the response")
        edges, own = getattr(result, "truth_edges", None), response.truth_edges
        if edges is not None and own is not None and not (np.shape(edges) == own.shape and np.allclose(edges, own, rtol=1e-9, atol=1e-9)):
            raise ShapeError(f"{who} unfolds into bins with other edges; expected those of the response, {own[0]:g} to {own[-1]:g}")
        values = as_array(f"counts of {who}", result.counts, (n,))
        covariance = as_array(f"covariance of {who}", result.covariance, (n, n))
        variance = np.diag(covariance)
        if (variance < -1e-9 * max(float(np.abs(variance).max()), 1e-300)).any():
            raise DataError(f"{who} gave a variance of {variance.min():g} in truth bin {int(variance.argmin())}; expected none below zero")
        covariance = np.array(covariance)
        np.fill_diagonal(covariance, np.maximum(variance, 0.0))
        return Answer(values, covariance)


@dataclass(frozen=True, kw_only=True, slots=True)
class Toys:
    """Answers to m toys in t truth bins. Counts, without unit.

    truth (t,). expected_errors (t,), quoted on the folded truth without noise. counts, errors (m, t), as quoted. refolded (m,), Poisson
    deviance of each toy from its answer folded back; by_truth (m,), from the folded truth. covariance (t, t), quoted, mean over toys.
    """

    truth: Array
    expected_errors: Array
    counts: Array
    errors: Array
    refolded: Array
    by_truth: Array
    covariance: Array

    @property
    def n(self) -> int:
        """Number of toys."""
        return int(self.counts.shape[0])

    @property
    def _low(self) -> Mask:
        return np.asarray(self.errors < ERROR_FLOOR * self.expected_errors) | (self.errors == 0)

    @property
    def pulls(self) -> Array:
        """(answer - truth) / error (m, t), with the floor on errors that the module states."""
        found = in_errors(self.counts - self.truth, np.maximum(self.errors, ERROR_FLOOR * self.expected_errors))
        return np.clip(found, -LIMIT, LIMIT)

    @property
    def mean_pull(self) -> Array:
        """Mean over toys (t,)."""
        return np.asarray(self.pulls.mean(axis=0))

    @property
    def mean_pull_err(self) -> Array:
        """Its standard error (t,)."""
        return np.asarray(self.pulls.std(axis=0, ddof=1) / np.sqrt(self.n))

    @property
    def degenerate(self) -> Array:
        """Share of toys (t,) whose quoted error is 0 or below a tenth of the expected one."""
        return np.asarray(self._low.mean(axis=0))

    @property
    def bias(self) -> Array:
        """Mean answer minus truth (t,)."""
        return np.asarray(self.counts.mean(axis=0) - self.truth)

    @property
    def sd(self) -> Array:
        """Standard deviation of the answers (t,): what the quoted errors should be."""
        return np.asarray(self.counts.std(axis=0, ddof=1))

    @property
    def correlation(self) -> Array:
        """Correlation of the answers over toys (t, t)."""
        scale = np.where(self.sd > 0, self.sd, 1.0)
        moved = (self.counts - self.counts.mean(axis=0)) / scale
        return np.asarray(moved.T @ moved / (self.n - 1))

    def covered(self, width: float) -> Mask:
        """Whether answer +- width x quoted error holds the truth, (m, t)."""
        return np.asarray(np.abs(self.counts - self.truth) <= width * self.errors)


def in_errors(difference: Array, errors: Array) -> Array:
    """Difference over error; where the error is 0, 0 for no difference and infinite else."""
    infinite = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.asarray(np.divide(difference, errors, out=infinite, where=errors > 0))


def distance(counts: Array, folded: Array) -> float:
    """Poisson deviance of counts from a folded answer, which may be 0 or negative in places."""
    return deviance(counts, np.maximum(folded, FOLDED_FLOOR))


def run_toys(method: Method, response: Response, truth: Array, expected_errors: Array, n: int, seed: int, task: Task) -> Toys:
    """Unfold n toys; equal seeds give equal data to every method."""
    expected = response.fold(truth)
    answers: list[tuple[Array, Array]] = []
    refolded, by_truth = np.empty(n), np.empty(n)
    covariance = np.zeros((response.n_truth, response.n_truth))
    for i in range(n):
        rng = rng_for(seed, "validate toy", i)
        counts = rng.poisson(expected).astype(np.float64)
        own = redrawn(response, rng)
        answer = method.ask(counts, own, f"toy {i}")
        refolded[i], by_truth[i] = distance(counts, own.fold(answer.counts)), distance(counts, expected)
        covariance += answer.covariance / n
        answers.append((answer.counts, answer.errors))
        task.advance(1, text=method.name)
    found, errors = (np.array(column) for column in zip(*answers, strict=True))
    return Toys(
        truth=truth,
        expected_errors=expected_errors,
        counts=found,
        errors=errors,
        refolded=refolded,
        by_truth=by_truth,
        covariance=covariance,
    )


def redrawn(response: Response, rng: np.random.Generator) -> Response:
    """The response as another simulation of the same size would have filled it; itself if it is known exactly.

    Raises: DataError, where hardly any simulation of this size reaches all bins.
    """
    if response.n_simulated is None:
        return response
    n = np.maximum(np.rint(response.n_simulated), 1).astype(np.int64)
    shares = np.vstack([response.matrix, np.maximum(1 - response.efficiency, 0)])
    shares = (shares / shares.sum(axis=0)).T
    reached = (response.matrix.sum(axis=1) > 0) & (response.background <= 0)
    for _ in range(ATTEMPTS):
        matrix = rng.multinomial(n, shares)[:, :-1].T / n
        if (matrix.sum(axis=0) > 0).all() and (matrix.sum(axis=1) > 0)[reached].all():
            return replace(response, matrix=matrix)
    raise DataError(
        f"{ATTEMPTS} responses drawn from {n.min()} to {n.max()} simulated events per truth bin all had an empty row or column; "
        "expected a simulation that fills every bin: wider bins, or more events"
    )
