r"""The tests of a binned unfolding: toys, closure, stress, bottom line, comparison of priors, scan of the regularisation, and criteria.

Toys           N_i ~ Poisson(f(n*)) ,   (n_i, V_i) = method(N_i, P_i) ,   z_i = (n_i - n*) / sigma_i ,   sigma_i = sqrt(diag V_i)
               Poisson true events, moved by the response with Poisson fakes and background, are Poisson in every reconstructed bin, so
               counts are drawn there. If the response was filled with simulated events (`n_simulated`), every toy gets its own matrix,
               drawn multinomially from it, so that the response's share of the covariance is tested too.
Closure        n = method(f(n*)) against n*, in quoted errors; without noise, so that the difference is the bias.
Stress         the same for other truths n', with the method and its prior unchanged. Any method whose prior is the truth passes closure;
               only a method that follows the data passes stress.
Bottom line    for two hypotheses n1, n2:   chi2_unfolded / chi2_reco <= 1 ,
                   chi2_reco = (f1 - f2)^T diag(f1)^-1 (f1 - f2) ,    chi2_unfolded = (u1 - u2)^T V_u^-1 (u1 - u2) ,
               because the unfolded result cannot contain more information than the measurement. A covariance that is too small, or that
               lacks its correlations, violates this. With V_u = J diag(f1) J^T it holds exactly for a linear method; hypotheses far
               apart are therefore moved together until chi2_reco <= 25. Waves of 2 to 6 bins are tested too, so small
               (chi2_reco <= 0.01) that the method is linear: missing correlations show up in smooth hypotheses if neighbours are
               correlated, and in one of the waves if they are anticorrelated.
Priors         spread between the results for the same counts with different priors, in quoted errors.
Scan           bias of the worst of all truths, and spread over toys, for every strength of the regularisation.

Empty bins. An error of sqrt(N) is 0 where nothing was measured, and the error of a truth bin may be 0 too. For coverage the interval is
taken as quoted, and a point does not cover. For a pull the error is at least a tenth of that quoted for the expectation f(n*), so that no
pull is infinite; the share of toys where this applies is reported for each bin (`degenerate`).

Tests on toys ask whether the true number, not that of m toys, meets the criterion; their p-values are small where it does not:

    mean pull       |mean| <= bias in every bin             one-sided t tests, Bonferroni over bins
    coverage        >= coverage, coverage_95 in every bin   binomial tests against the criterion, Bonferroni over bins
    average         mean over bins of coverage >= average   one t test on the share of bins covered in each toy; correlations
                                                            between bins do not matter
    refolded        E D(N, f(n)) <= E D(N, f(n*))           paired t test: a result fitted to the data lies no further from them
                                                            than the truth does (D: Poisson deviance)
    refolded data   D of the measured counts among the toys', p = (1 + #{D_i >= D}) / (m + 1); beyond all of them, that of a scaled
                    chi-square with their mean and variance

Tests without noise are not random: they are met or not.

Source: bottom line: Cousins, May & Sun 2016, arXiv:1607.07038.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.special import bdtr, chdtrc, ndtr, ndtri, stdtr

from sbi_phys.calibration.pvalues import smallest_pvalue
from sbi_phys.core.checks import as_array, require_number
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Task
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Mask
from sbi_phys.unfold._inputs import bin_name
from sbi_phys.unfold.ibu import deviance
from sbi_phys.unfold.response import Response

__all__ = [
    "Answer",
    "BottomLine",
    "Check",
    "Closure",
    "Criteria",
    "Method",
    "Priors",
    "Scan",
    "Toys",
    "bottom_line",
    "closure",
    "compare_priors",
    "default_alternatives",
    "distance",
    "in_errors",
    "noiseless_checks",
    "prior_check",
    "run_toys",
    "scan_strengths",
    "toy_checks",
]


Unfold = Callable[[Array, Response], Any]

ERROR_FLOOR = 0.1  # smallest error of a pull, as a share of the expected error

LIMIT = 1e6  # largest |pull|, so that means are finite for a method without errors

FOLDED_FLOOR = 1e-6  # counts: the folded result of a method may be negative

ATTEMPTS = 100  # draws of a response until one has no empty row or column


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a method for one set of counts: counts (t,) and covariance (t, t)."""

    counts: Array
    covariance: Array

    @property
    def errors(self) -> Array:
        """Standard errors (t,)."""
        return np.asarray(np.sqrt(np.diag(self.covariance)))


@dataclass(slots=True)
class Method:
    """A method with its name; `warned` counts its warnings by text, instead of showing each for every toy."""

    name: str
    unfold: Unfold
    warned: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not callable(self.unfold):
            raise SettingError(f"method {self.name!r} is a {type(self.unfold).__name__}; expected a callable (counts, response) -> result")

    def ask(self, counts: Array, response: Response, place: str) -> Answer:
        """Unfold, and check the result; `place` names in errors what was unfolded.

        Raises: SettingError (no .counts or .covariance), ShapeError (other bins), NonFiniteError, DataError; errors of the method get
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
        """Standard deviation of the answers (t,), which the quoted errors should equal."""
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
    """Difference over error; where the error is 0, the result is 0 for equal values and infinite otherwise."""
    infinite = np.where(difference == 0, 0.0, np.copysign(np.inf, difference))
    return np.asarray(np.divide(difference, errors, out=infinite, where=errors > 0))


def distance(counts: Array, folded: Array) -> float:
    """Poisson deviance of counts from a folded result, which may be 0 or negative in some bins."""
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
    """A response drawn as if filled by another simulation of the same size; the same response if it is known exactly.

    Raises: DataError if every draw leaves a bin empty.
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


TILT, BUMP = 2.0, 0.2  # factor from the first to the last bin; height of the bump relative to the spectrum

WAVES = (2, 3, 4, 6)  # lengths in bins

FAR, FAR_WAVE = 25.0, 0.01  # chi2_reco above which two hypotheses are moved closer to each other

NEAR = 1e-6  # chi2_reco below which the data do not distinguish two hypotheses

CUT = 1e-10  # relative eigenvalues of a correlation matrix below which they are rounding errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Closure:
    """Answer (t,) to the folded `truth` (t,) without noise, with its quoted errors and covariance. Counts, without unit."""

    truth: Array
    counts: Array
    errors: Array
    covariance: Array

    @property
    def pull(self) -> Array:
        """Bias in quoted errors (t,)."""
        return in_errors(self.counts - self.truth, self.errors)


@dataclass(frozen=True, kw_only=True, slots=True)
class BottomLine:
    """chi2 between two hypotheses, measured and unfolded.   Read: above 1 the covariance is too small or lacks correlations."""

    reco: float
    unfolded: float

    @property
    def ratio(self) -> float:
        """chi2_unfolded / chi2_reco; NaN where the data do not distinguish the hypotheses."""
        return self.unfolded / self.reco if self.reco > NEAR else float("nan")


@dataclass(frozen=True, kw_only=True, slots=True)
class Priors:
    """Answers of k variants to the same counts: names, counts (k, t), errors (k, t)."""

    names: tuple[str, ...]
    counts: Array
    errors: Array

    @property
    def spread(self) -> Array:
        """Largest difference between variants over their mean quoted error (t,)."""
        return in_errors(np.ptp(self.counts, axis=0), self.errors.mean(axis=0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scan:
    """Bias and spread for s strengths in t bins. Counts, without unit.

    strength (s,), increasing. bias (s, t): of the worst of truth and alternatives, without noise, signed. sd (s, t): over toys of the
    truth. quoted (s, t): errors on the folded truth. truth (t,).
    """

    strength: Array
    bias: Array
    sd: Array
    quoted: Array
    truth: Array

    def sizes(self) -> tuple[Array, Array, Array]:
        """Root mean square over bins of bias, sd and quoted error, each (s,), in units of the root of the true counts."""
        unit = np.sqrt(np.maximum(self.truth, 1e-300))
        bias, sd, quoted = (np.sqrt(np.mean((a / unit) ** 2, axis=1)) for a in (self.bias, self.sd, self.quoted))
        return bias, sd, quoted


def default_alternatives(truth: Array) -> dict[str, Array]:
    """Truths (t,) for the stress closure: tilted up and down by a factor 2 from end to end, and with a bump of 20 %, t/10 bins wide."""
    ramp = np.linspace(-0.5, 0.5, truth.size)
    at = np.arange(truth.size) - (truth.size - 1) / 2
    bump = np.exp(-0.5 * (at / max(1.0, truth.size / 10)) ** 2)
    return {"tilt up": truth * TILT**ramp, "tilt down": truth * TILT**-ramp, "bump": truth * (1 + BUMP * bump)}


def waves(truth: Array) -> dict[str, Array]:
    """Truths (t,) with waves of 2, 3, 4 and 6 bins; the height in each bin is three Poisson errors, at most half of its content."""
    height = np.minimum(0.5 * truth, 3 * np.sqrt(truth))
    at = np.arange(truth.size)
    return {f"wave of {k} bins": truth + height * np.cos(2 * np.pi * at / k) for k in WAVES if k <= truth.size}


def closure(method: Method, response: Response, truth: Array, place: str) -> Closure:
    """Unfold the folded truth without noise."""
    answer = method.ask(response.fold(truth), response, place)
    return Closure(truth=truth, counts=answer.counts, errors=answer.errors, covariance=answer.covariance)


def bottom_line(method: Method, response: Response, first: Closure, other: Array, place: str, far: float = FAR) -> BottomLine:
    """chi2 between the truth of `first` and another (t,), moved towards it until chi2_reco <= far, and between their unfolded results."""
    f1 = response.fold(first.truth)
    apart = response.fold(other) - f1
    reco = float((apart**2 / np.maximum(f1, 1e-300)).sum())
    near = min(1.0, np.sqrt(far / reco)) if reco > 0 else 1.0
    answer = method.ask(f1 + near * apart, response, place)
    return BottomLine(reco=near**2 * reco, unfolded=chi2(answer.counts - first.counts, first.covariance))


def chi2(difference: Array, covariance: Array) -> float:
    """d^T V^-1 d, in the directions that V resolves; infinite if d has a part where V has no error at all."""
    errors = np.sqrt(np.diag(covariance))
    sure = errors <= 0
    if (difference[sure] != 0).any():
        return float("inf")
    if sure.all():
        return 0.0
    scaled = difference[~sure] / errors[~sure]
    values, vectors = np.linalg.eigh(covariance[np.ix_(~sure, ~sure)] / np.outer(errors[~sure], errors[~sure]))
    keep = values > CUT * values[-1]
    return float(((scaled @ vectors[:, keep]) ** 2 / values[keep]).sum())


def compare_priors(variants: Mapping[str, Callable[[Array, Response], Any]], counts: Array, response: Response) -> Priors:
    """Unfold the same counts with every variant.   Raises: DataError (fewer than two)."""
    if len(variants) < 2:
        raise DataError(f"priors has {len(variants)} variants; expected two or more to compare")
    answers = [Method(name, unfold).ask(counts, response, "the counts that priors are compared on") for name, unfold in variants.items()]
    return Priors(
        names=tuple(variants),
        counts=np.array([a.counts for a in answers]),
        errors=np.array([a.errors for a in answers]),
    )


def scan_strengths(
    variants: Mapping[float, Callable[[Array, Response], Any]],
    response: Response,
    truth: Array,
    others: Mapping[str, Array],
    n_toys: int,
    seed: int,
    task: Task,
) -> Scan:
    """Bias without noise of the worst truth, and spread over toys, for each strength.   Raises: SettingError (no number)."""
    for strength in variants:
        require_number("strength", strength)
    expected = response.fold(truth)
    toys = [rng_for(seed, "validate scan", i).poisson(expected).astype(np.float64) for i in range(n_toys)]
    bias, sd, quoted = [], [], []
    for strength in sorted(variants):
        method = Method(f"strength {strength:g}", variants[strength])
        first = closure(method, response, truth, "the truth")
        all_bias = [first.counts - truth] + [closure(method, response, o, name).counts - o for name, o in others.items()]
        bias.append(_largest(np.array(all_bias)))
        answers: list[Answer] = []
        for i, counts in enumerate(toys):
            answers.append(method.ask(counts, response, f"toy {i}"))
            task.advance(1, text=method.name)
        sd.append(np.array([a.counts for a in answers]).std(axis=0, ddof=1))
        quoted.append(first.errors)
    return Scan(strength=np.array(sorted(variants)), bias=np.array(bias), sd=np.array(sd), quoted=np.array(quoted), truth=truth)


def _largest(values: Array) -> Array:
    # for each column the entry with the largest absolute value
    return np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]


ONE_SIGMA = float(2 * ndtr(1.0) - 1)

TWO_SIGMA = float(-ndtri(0.025))


@dataclass(frozen=True, kw_only=True, slots=True)
class Criteria:
    """Limits of the tests of an unfolding. Biases in units of the quoted error, coverages as probabilities.

    bias: of closure, and of the mean pull over toys, worst bin. stress: bias for other truths, worst bin. coverage, coverage_95: of
    the intervals of 68.3 and 95 %, worst bin. average: of those of 68.3 %, mean over bins. prior: spread between priors, worst bin.
    bottom_line: chi2 unfolded over measured. degenerate: share of toys with a quoted error near 0, worst bin.

    >>> from sbi_phys.unfold import Criteria, tikhonov, validate
    >>> matrix = [[0.8, 0.1, 0.0], [0.2, 0.8, 0.2], [0.0, 0.1, 0.8]]
    >>> strict = Criteria(bias=1e-12)
    >>> validate(lambda n, r: tikhonov(n, r, 10.0), matrix, [100, 160, 40], criteria=strict, n_toys=20).passed
    False
    """

    bias: float = 0.5
    stress: float = 1.0
    coverage: float = 0.60
    coverage_95: float = 0.90
    average: float = 0.65
    prior: float = 0.6
    bottom_line: float = 1.02
    degenerate: float = 0.05

    def __post_init__(self) -> None:
        for name in ("bias", "stress", "prior", "bottom_line"):
            require_number(name, getattr(self, name), low=0, open_low=True)
        for name, most in (("coverage", ONE_SIGMA), ("average", ONE_SIGMA), ("coverage_95", 0.95), ("degenerate", 1.0)):
            require_number(name, getattr(self, name), low=0, high=most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One test: its number, the criterion, whether it is met (None: decided by a p-value, or no criterion), and a description."""

    name: str
    value: float
    criterion: str
    met: bool | None = None
    pvalue: float | None = None
    words: str = ""


def _worst(values: Array, response: Response) -> tuple[int, float, str]:
    at = int(np.abs(values).argmax())
    return at, float(np.abs(values[at])), bin_name("truth", at, response.truth_edges)


def noiseless_checks(
    first: Closure, stress: Mapping[str, Closure], lines: Mapping[str, BottomLine], criteria: Criteria, response: Response
) -> list[Check]:
    """Closure, stress closures and bottom lines."""
    checks = []
    for name, found, bound in [("closure", first, criteria.bias)] + [(f"stress: {k}", c, criteria.stress) for k, c in stress.items()]:
        at, value, place = _worst(found.pull, response)
        words = f"largest bias {found.pull[at]:+.2f} sigma in {place}"
        checks.append(Check(name=name, value=value, criterion=f"|bias| <= {bound:g} sigma in every bin", met=value <= bound, words=words))
    for name, line in lines.items():
        told = np.isfinite(line.ratio) or line.unfolded == np.inf
        words = f"chi2 measured {line.reco:.4g}, unfolded {line.unfolded:.4g}" if told else "the data do not distinguish the hypotheses"
        checks.append(
            Check(
                name=f"bottom line: {name}",
                value=line.ratio,
                criterion=f"chi2 unfolded / measured <= {criteria.bottom_line:g}",
                met=bool(line.ratio <= criteria.bottom_line) if told else None,
                words=words,
            )
        )
    return checks


def toy_checks(toys: Toys, criteria: Criteria, response: Response, observed: float | None) -> list[Check]:
    """Mean pull, coverages, errors near zero, refolded deviances; `observed`: that of the measured counts."""
    n, n_bins = toys.n, toys.truth.size
    pull, error = toys.mean_pull, toys.mean_pull_err
    at, value, place = _worst(pull, response)
    tails = [_t_tail(abs(m) - criteria.bias, e, n) for m, e in zip(pull, error, strict=True)]
    checks = [
        Check(
            name="mean pull",
            value=value,
            criterion=f"|mean pull| <= {criteria.bias:g} in every bin",
            pvalue=min(1.0, n_bins * min(tails)),
            words=f"largest {pull[at]:+.2f} +- {error[at]:.2f} in {place}",
        )
    ]
    for name, width, bound in (("68", 1.0, criteria.coverage), ("95", TWO_SIGMA, criteria.coverage_95)):
        share = toys.covered(width).mean(axis=0)
        low = int(share.argmin())
        words = (
            f"smallest {share[low]:.3f} +- {np.sqrt(share[low] * (1 - share[low]) / n):.3f} in "
            f"{bin_name('truth', low, response.truth_edges)}"
        )
        p = min(1.0, n_bins * float(bdtr(int(np.rint(share[low] * n)), n, bound)))
        checks.append(
            Check(
                name=f"coverage of {name} % intervals",
                value=float(share[low]),
                criterion=f">= {bound:g} in every bin",
                pvalue=p,
                words=words,
            )
        )
    each = toys.covered(1.0).mean(axis=1)
    error_each = float(each.std(ddof=1) / np.sqrt(n))
    checks.append(
        Check(
            name="coverage of 68 % intervals, mean of bins",
            value=float(each.mean()),
            criterion=f">= {criteria.average:g}",
            pvalue=_t_tail(criteria.average - float(each.mean()), error_each, n),
            words=f"{each.mean():.3f} +- {error_each:.3f}; {ONE_SIGMA:.3f} is nominal",
        )
    )
    return [*checks, *_spread_checks(toys, criteria, response), *_refolded_checks(toys, response, observed)]


def _spread_checks(toys: Toys, criteria: Criteria, response: Response) -> list[Check]:
    _, value, place = _worst(toys.degenerate, response)
    words = f"{100 * value:.1f} % of toys in {place}: no counts reach it; merge bins there" if value > 0 else "none"
    quoted = np.sqrt(np.mean(toys.errors**2, axis=0))
    ratio = np.divide(toys.sd, quoted, out=np.ones_like(quoted), where=quoted > 0)
    far = int(np.abs(np.log(np.maximum(ratio, 1e-300))).argmax())
    return [
        Check(
            name="quoted errors near zero",
            value=value,
            criterion=f"share of toys <= {criteria.degenerate:g} in every bin",
            met=value <= criteria.degenerate,
            words=words,
        ),
        Check(
            name="spread of toys over quoted error",
            value=float(ratio[far]),
            criterion="for information",
            words=f"{ratio.min():.2f} to {ratio.max():.2f}, furthest from 1 in {bin_name('truth', far, response.truth_edges)}",
        ),
        Check(
            name="quoted error over root of true counts",
            value=float(np.sqrt(np.mean(quoted**2 / toys.truth))),
            criterion="for information",
            words="rms over bins; an error that is large enough passes every other test",
        ),
    ]


def _refolded_checks(toys: Toys, response: Response, observed: float | None) -> list[Check]:
    more = toys.refolded - toys.by_truth
    error = float(more.std(ddof=1) / np.sqrt(toys.n))
    checks = [
        Check(
            name="refolded chi2 of toys",
            value=float(toys.refolded.mean()),
            criterion=f"on average <= that of the truth, {toys.by_truth.mean():.4g}",
            pvalue=_t_tail(float(more.mean()), error, toys.n),
            words=f"{toys.refolded.mean():.4g} for {response.n_reco} bins; truth to answer {more.mean():+.3g} +- {error:.2g}",
        )
    ]
    if observed is not None:
        # exact fits are equal up to rounding
        p = smallest_pvalue(np.round([observed], 6), np.round(toys.refolded, 6)[:, None], _chi2_tail(observed, toys.refolded))
        words = f"{observed:.4g} for {response.n_reco} bins; toys {toys.refolded.mean():.4g} +- {toys.refolded.std(ddof=1):.2g}"
        checks.append(
            Check(name="refolded chi2 of the counts", value=observed, criterion="like that of toys, p > 0.05", pvalue=p, words=words)
        )
    return checks


def prior_check(found: Priors, criteria: Criteria, response: Response) -> Check:
    """Spread between priors."""
    _, value, place = _worst(found.spread, response)
    words = f"{', '.join(found.names)}: furthest apart in {place}"
    return Check(
        name="priors apart", value=value, criterion=f"<= {criteria.prior:g} sigma in every bin", met=value <= criteria.prior, words=words
    )


def _chi2_tail(value: float, sample: Array) -> float:
    """P(more than value) of the multiple of a chi-square with the mean and variance of a sample."""
    mean, variance = float(sample.mean()), float(sample.var(ddof=1))
    if mean <= 0 or variance <= 0:
        return 1.0
    return float(chdtrc(2 * mean**2 / variance, max(value, 0.0) * 2 * mean / variance))


def _t_tail(above: float, error: float, n: int) -> float:
    """P-value of the hypothesis 'the mean is not above the bound', from the excess of the measured mean."""
    if error <= 0:
        return 1.0 if above <= 0 else 1e-300
    return float(max(stdtr(n - 1, -above / error), 1e-300))
