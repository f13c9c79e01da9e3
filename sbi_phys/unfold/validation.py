r"""Validation of an unfolding in one call: closure, stress, toys, bottom line, prior, regularisation, and event posteriors.

    methods = {"IBU": lambda c, r: sp.unfold.ibu(c, r, "coverage"), "Tikhonov": sp.unfold.tikhonov}
    report = sp.unfold.validate(methods, response, truth)
    print(report.summary())
    report.write("validation")                                 # validation.json and figures

Every method gets the same tests on the same toys; `checks` defines them, and `Criteria` holds the limits. The p-values of tests on toys
are corrected for their number within a method by Holm's rule: a method that meets all criteria fails at least one test in at most 5 % of
calls. Tests without noise are met or not.

Event posteriors (`event_pit`). The rank of each true value among l draws of q(truth | reco) for its own event is uniform on 0..l if and
only if q is right on average over events; correct marginals of the unfolded spectrum do not show this. For two quantities the product

    (t_a - m_a)(t_b - m_b) ,   m = mean of draws and truth of the event ,

is ranked as well: it is sensitive to a wrong correlation within the events' posteriors. With the measured quantities the ranks are also
regressed on them, which finds a q that is right on average over events and wrong for some of them.

Source: Cousins, May & Sun 2016, arXiv:1607.07038 (bottom line); Talts et al. 2018, arXiv:1804.06788 (ranks); Zhao et al. 2021,
arXiv:2102.10473 (regression).
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sbi_phys.calibration.inputs import check_names, check_pairs
from sbi_phys.calibration.pit import PITRegression, pit_regression
from sbi_phys.calibration.pvalues import ALPHA, combine, holm
from sbi_phys.calibration.sbc import SBC, sbc
from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.files import write_aside
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.results import Result, Rows, plain
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold._inputs import bin_name, check_counts, check_nonnegative
from sbi_phys.unfold.checks import (
    FAR_WAVE,
    BottomLine,
    Check,
    Closure,
    Criteria,
    Method,
    Priors,
    Scan,
    Toys,
    bottom_line,
    closure,
    compare_priors,
    default_alternatives,
    distance,
    noiseless_checks,
    prior_check,
    run_toys,
    scan_strengths,
    toy_checks,
    waves,
)
from sbi_phys.unfold.response import Response, as_response

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["EventPIT", "MethodValidation", "Row", "Validation", "event_pit", "validate"]


MAX_PAIRS = 10  # of truth quantities whose products are ranked


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPIT(Result):
    """Ranks of the events' truths: `sbc` of each quantity and of products of two; `regression` of ranks on reco, or None.

    >>> import numpy as np
    >>> from sbi_phys.unfold import event_pit
    >>> rng = np.random.default_rng(1)
    >>> truth, draws = rng.normal(size=200), rng.normal(size=(200, 50))
    >>> result = event_pit(truth, draws)
    >>> result.sbc.ranks.shape, result.regression is None
    ((200, 1), True)
    """

    sbc: SBC
    regression: PITRegression | None

    @property
    def pvalue(self) -> float:
        """Combined p-value: the smaller of both, times two if there are two."""
        both = {"ranks": self.sbc.pvalue} | ({} if self.regression is None else {"regression": float(self.regression.pvalue)})
        return combine(both)

    def rows(self) -> Rows:
        """Return the table of the ranks: one row for each quantity."""
        return self.sbc.rows()

    def summary(self) -> str:
        """Return the result in words."""
        return self.sbc.summary() if self.regression is None else f"{self.sbc.summary()}\n{self.regression.summary()}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the ranks' distribution minus the uniform one, with its band.   Read: inside the band = calibrated."""
        return self.sbc.plot(ax)


def event_pit(
    truth: ArrayLike, draws: ArrayLike, reco: ArrayLike | None = None, names: Sequence[str] | None = None, *, seed: int = 0
) -> EventPIT:
    r"""Ranks of the truths of n events among l draws of q(truth | reco) for each, and their dependence on reco.

    Args:
        truth: (n, d) or (n,), true values, that q was not trained on, of the spectrum that q has as its prior.
        draws: (n, l, d) or (n, l), e.g. `FlowUnfolder.sample(reco, l)`; same units.
        reco: (n, k) or (n,), measured quantities to look for dependence on; None = ranks alone.
        names: d names.
        seed: of ties and of the simulated null of the regression.

    Returns: EventPIT.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 10 events or 2 draws), SettingError.
    Source: arXiv:1804.06788, 2102.10473.
    Read: p < 0.05 = the event posteriors are wrong; the summary says whether they are shifted, too narrow, or wrong in correlation.

    >>> import numpy as np
    >>> from sbi_phys.unfold import event_pit
    >>> rng = np.random.default_rng(1)
    >>> truth, draws = rng.normal(size=200), rng.normal(size=(200, 50))
    >>> event_pit(truth, draws).pvalue > 0.01, event_pit(truth + 1, draws).pvalue > 0.01
    (True, False)
    """
    theta, samples = check_pairs(truth, draws)
    plain, _ = check_names(names if names is not None else [f"truth_{j}" for j in range(theta.shape[1])], theta.shape[1])
    together = np.concatenate([theta[:, None], samples], axis=1)  # the truth is one of l + 1 exchangeable values
    moved = together - together.mean(axis=1, keepdims=True)
    products = {}
    for a, b in itertools.islice(itertools.combinations(range(theta.shape[1]), 2), MAX_PAIRS):
        product = moved[:, :, a] * moved[:, :, b]
        products[f"{plain[a]} x {plain[b]}"] = (product[:, 0], product[:, 1:])
    ranks = sbc(theta, samples, plain, products, seed=seed)
    regression = None if reco is None else pit_regression(theta, samples, np.asarray(reco), names=plain, seed=seed)
    return EventPIT(sbc=ranks, regression=regression)


EVENTS = "event posteriors"


class Row(NamedTuple):
    """One line of the table: passed is None where there is no criterion; pvalue, corrected, of tests on toys."""

    name: str
    value: float
    criterion: str
    passed: bool | None
    words: str
    pvalue: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodValidation:
    """Results of one method.

    checks, each test with its own number. closure; stress and bottom_lines, by the name of the other truth; toys. counts, the answer to
    the measured counts with its error, or None. priors, scan: None unless given. warned: texts of the method's warnings and their numbers.
    """

    name: str
    checks: tuple[Check, ...]
    closure: Closure
    stress: Mapping[str, Closure]
    bottom_lines: Mapping[str, BottomLine]
    toys: Toys
    priors: Priors | None
    scan: Scan | None
    warned: Mapping[str, int]

    @property
    def pvalues(self) -> dict[str, float]:
        """Uncorrected p-value of each test on toys."""
        return {c.name: c.pvalue for c in self.checks if c.pvalue is not None}

    @property
    def adjusted(self) -> dict[str, float]:
        """P-values of the tests on toys, corrected by Holm's rule."""
        return holm(self.pvalues)

    @property
    def decisions(self) -> tuple[Row, ...]:
        """Every test with its decision."""
        adjusted = self.adjusted
        return tuple(
            Row(c.name, c.value, c.criterion, c.met if c.pvalue is None else adjusted[c.name] > ALPHA, c.words, adjusted.get(c.name))
            for c in self.checks
        )

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that are not passed."""
        return tuple(row.name for row in self.decisions if row.passed is False)

    @property
    def passed(self) -> bool:
        """Whether all tests are passed."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        n = sum(row.passed is not None for row in self.decisions)
        if self.passed:
            return f"{self.name}: passes all {n} tests."
        return f"{self.name}: fails {len(self.failed)} of {n} tests: {', '.join(self.failed)}."


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation(Result):
    """Results of `validate`.

    methods, by name. response, truth (t,), n_toys, criteria: as passed. events: ranks of event posteriors, or None. seconds, by method.

    >>> from sbi_phys.unfold import tikhonov, validate
    >>> matrix = [[0.8, 0.1, 0.0], [0.2, 0.8, 0.2], [0.0, 0.1, 0.8]]
    >>> report = validate(lambda n, r: tikhonov(n, r, 0.0), matrix, [400, 300, 200], n_toys=50)
    >>> report.passed, [row.name for row in report.decisions][:2]
    (True, ['closure', 'stress: tilt up'])
    """

    methods: Mapping[str, MethodValidation]
    response: Response
    truth: Array
    n_toys: int
    criteria: Criteria
    events: EventPIT | None
    seconds: Mapping[str, float] = field(compare=False)

    @property
    def decisions(self) -> tuple[Row, ...]:
        """Rows (name, value, criterion, passed, words, pvalue); with several methods the name begins with that of the method."""
        several = len(self.methods) > 1
        rows = [r._replace(name=f"{name}: {r.name}") if several else r for name, m in self.methods.items() for r in m.decisions]
        if self.events is not None:
            p = self.events.pvalue
            words = self.events.sbc.summary().split("\n")[0]
            rows.append(Row(EVENTS, p, "ranks of event truths uniform, p > 0.05", p > ALPHA, words, p))
        return tuple(rows)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the tests that are not passed."""
        return tuple(row.name for row in self.decisions if row.passed is False)

    @property
    def passed(self) -> bool:
        """Whether every method passes every test."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """A sentence for each method."""
        words = [m.verdict for m in self.methods.values()]
        if self.events is not None:
            words.append(
                f"{EVENTS.capitalize()}: {'calibrated' if self.events.pvalue > ALPHA else 'wrong'} (p = {self.events.pvalue:.3g})."
            )
        return " ".join(words)

    def rows(self) -> Rows:
        """Return the table: one row for each test, with its decision; with several methods the name begins with that of the method."""
        return Rows(Row._fields, tuple(tuple(row) for row in self.decisions))

    def summary(self) -> str:
        """Every result in words, the verdict first."""
        lines = [self.verdict, ""]
        for row in self.decisions:
            mark = {True: "passes", False: "FAILS", None: "-"}[row.passed]
            p = "" if row.pvalue is None else f", p = {row.pvalue:.3g} corrected"
            lines.append(f"  {mark:<7} {row.name}: {row.value:.4g} ({row.criterion}{p}); {row.words}")
        for m in self.methods.values():
            lines += [f"  {m.name} warned {k} times: {text}" for text, k in m.warned.items()]
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the p-values of the tests on toys after the correction.   Read: in the grey area = rejected."""
        shown = {row.name: row.pvalue for row in self.decisions if row.pvalue is not None}
        return figures.results.pvalue_rows(shown, ax, alpha=ALPHA, xlabel="p-value, corrected")

    def figures(self) -> "dict[str, Figure]":
        """Figures by name: closure, stress, pulls, coverage, correlation; regularisation and events where they were requested.

        Read: the docstrings in `sbi_phys.plotting.unfolding` say what to expect of a correct method.
        """
        return figures.unfolding.validation(self)

    def to_dict(self) -> dict[str, Any]:
        """Verdict, decisions and the results of every bin as JSON values, None for infinity."""
        return {
            "verdict": self.verdict, "passed": self.passed, "failed": list(self.failed), "n_toys": self.n_toys,
            "criteria": asdict(self.criteria), "truth": self.truth.tolist(), "seconds": dict(self.seconds),
            "rows": [plain(row._asdict()) for row in self.decisions],
            "bins": {name: _bins(m) for name, m in self.methods.items()},
            "warned": {name: dict(m.warned) for name, m in self.methods.items()},
        }  # fmt: skip

    def write(self, folder: str | Path) -> Path:
        """Write validation.json and each figure as PNG and PDF into a folder, each written atomically -> the folder.

        Raises: WriteError (the folder cannot be written).
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_aside(target / "validation.json", text, sync=True)
        for name, figure in self.figures().items():
            figures.style.save_figure(figure, target, name, dpi=160)
        return target


def _bins(m: MethodValidation) -> dict[str, Any]:
    """Results of every bin, for tables and other plots."""
    arrays = {
        "closure": m.closure.counts,
        "closure_errors": m.closure.errors,
        "mean_pull": m.toys.mean_pull,
        "mean_pull_err": m.toys.mean_pull_err,
        "coverage": m.toys.covered(1.0).mean(axis=0),
        "bias": m.toys.bias,
        "sd": m.toys.sd,
        "quoted": np.sqrt(np.mean(m.toys.errors**2, axis=0)),
        **{f"stress: {name}": c.counts for name, c in m.stress.items()},
    }
    return {name: values.tolist() for name, values in arrays.items()}


Unfold = Callable[[Array, Response], Any]

SCAN_TOYS = 50


def validate(
    methods: Unfold | Mapping[str, Unfold],
    response: Response | ArrayLike,
    truth: ArrayLike,
    *,
    counts: ArrayLike | None = None,
    alternatives: Mapping[str, ArrayLike] | None = None,
    priors: Mapping[str, Unfold] | Mapping[str, Mapping[str, Unfold]] | None = None,
    scan: Mapping[float, Unfold] | Mapping[str, Mapping[float, Unfold]] | None = None,
    events: EventPIT | None = None,
    criteria: Criteria | None = None,
    n_toys: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Validation:
    r"""Test unfoldings n = method(N, P) where the truth n* is known: bias, coverage, information, prior and regularisation.

    Args:
        methods: (counts (r,), response) -> result with .counts (t,) and .covariance (t, t), such as `ibu`; or several, by name.
        response: Response or matrix (r, t). With `n_simulated` every toy has a matrix of its own.
        truth: (t,), expected true counts, > 0: a plausible truth, best a smooth spectrum that describes the data.
        counts: (r,), measured, for their refolded chi2 and the comparison of priors; None = the folded truth for the latter.
        alternatives: other truths (t,) by name, for stress and bottom line; None = tilts by 2 from end to end and a bump of 20 %.
        priors: variants of the method by the name of their prior; with several methods, one such mapping by the name of each method.
        scan: variants by strength of the regularisation (iterations, tau), likewise.
        events: result of `event_pit` for a method that works event by event.
        criteria: Criteria() by default.
        n_toys: at least 20; with 200 the error of a coverage is 0.03.
        seed: of the toys.
        progress: default none.

    Returns: Validation.
    Raises: ShapeError (a method with other bins), NonFiniteError, DataError, SettingError; a method's own errors, with a note of the place.
    Source: Cousins, May & Sun 2016, arXiv:1607.07038 (bottom line); the others are common practice.
    Read: `.verdict`, then the rows that fail. A method that passes closure and fails stress repeats its prior.

    >>> from sbi_phys.unfold import tikhonov, validate
    >>> matrix = [[0.8, 0.1, 0.0], [0.2, 0.8, 0.2], [0.0, 0.1, 0.8]]
    >>> report = validate(lambda n, r: tikhonov(n, r, 0.0), matrix, [400, 300, 200], n_toys=50)
    >>> print(report.verdict)
    method: passes all 15 tests.
    """
    named = _methods(methods)
    call = _call(response, truth, counts, alternatives, criteria, n_toys, seed)
    if events is not None and not isinstance(events, EventPIT):
        raise SettingError(f"events is a {type(events).__name__}; expected what event_pit(truth, draws) returns")
    found, seconds = _test_all(call, named, _by_method("priors", priors, named), _by_method("scan", scan, named), progress)
    return Validation(
        methods=found, response=call.response, truth=call.truth, n_toys=call.n_toys, criteria=call.criteria, events=events, seconds=seconds
    )


def _test_all(
    call: "_Call",
    methods: Mapping[str, Method],
    priors: Mapping[str, Mapping[str, Unfold]],
    scan: Mapping[str, Mapping[float, Unfold]],
    progress: Progress | None,
) -> tuple[dict[str, MethodValidation], dict[str, float]]:
    """Results of every method, and its run time in seconds."""
    found, seconds = {}, {}
    total = len(methods) * call.n_toys + sum(len(v) for v in scan.values()) * min(call.n_toys, SCAN_TOYS)
    with or_none(progress).task("validate", total) as task:
        for name, method in methods.items():
            begin = time.perf_counter()
            found[name] = call.test(method, priors.get(name), scan.get(name), task)
            seconds[name] = time.perf_counter() - begin
    return found, seconds


def _methods(methods: Unfold | Mapping[str, Unfold]) -> dict[str, Method]:
    given = methods if isinstance(methods, Mapping) else {_name(methods): methods}
    if not given:
        raise SettingError("methods is empty; expected a callable, or one or more by name")
    return {str(name): Method(str(name), unfold) for name, unfold in given.items()}


def _name(method: Unfold) -> str:
    name = getattr(method, "__name__", "method")
    return "method" if name.startswith("<") else name


def _call(
    response: Response | ArrayLike,
    truth: ArrayLike,
    counts: ArrayLike | None,
    alternatives: Mapping[str, ArrayLike] | None,
    criteria: Criteria | None,
    n_toys: int,
    seed: int,
) -> "_Call":
    resp = as_response(response)
    limits = Criteria() if criteria is None else criteria
    if not isinstance(limits, Criteria):
        raise SettingError(f"criteria is a {type(criteria).__name__}; expected Criteria(...)")
    nature = _check_truth("truth", truth, resp)
    given = default_alternatives(nature) if alternatives is None else alternatives
    return _Call(
        response=resp,
        truth=nature,
        counts=None if counts is None else check_counts(counts, resp.n_reco, resp.reco_edges),
        others={str(name): _check_truth(f"alternative {name!r}", other, resp) for name, other in given.items()},
        criteria=limits,
        n_toys=require_int("n_toys", n_toys, low=20),
        seed=require_int("seed", seed, low=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """The arguments of one call, which every method gets."""

    response: Response
    truth: Array
    counts: Array | None
    others: dict[str, Array]
    criteria: Criteria
    n_toys: int
    seed: int

    def test(
        self, method: Method, priors: Mapping[str, Unfold] | None, scan: Mapping[float, Unfold] | None, task: Task
    ) -> MethodValidation:
        """Run all tests of one method."""
        resp, criteria = self.response, self.criteria
        first = closure(method, resp, self.truth, "the folded truth")
        stress = {name: closure(method, resp, other, f"the folded alternative {name!r}") for name, other in self.others.items()}
        lines = {name: bottom_line(method, resp, first, other, f"hypothesis {name!r}") for name, other in self.others.items()}
        rough = waves(self.truth)
        lines |= {name: bottom_line(method, resp, first, w, f"hypothesis {name!r}", FAR_WAVE) for name, w in rough.items()}
        toys = run_toys(method, resp, self.truth, first.errors, self.n_toys, self.seed, task)
        observed = None
        if self.counts is not None:
            answer = method.ask(self.counts, resp, "the measured counts")
            observed = distance(self.counts, resp.fold(answer.counts))
        checks = noiseless_checks(first, stress, lines, criteria, resp) + toy_checks(toys, criteria, resp, observed)
        compared = None
        if priors is not None:
            compared = compare_priors(priors, self.counts if self.counts is not None else resp.fold(self.truth), resp)
            checks.append(prior_check(compared, criteria, resp))
        scanned = None
        if scan is not None:
            scanned = scan_strengths(scan, resp, self.truth, self.others, min(self.n_toys, SCAN_TOYS), self.seed, task)
        return MethodValidation(
            name=method.name,
            checks=tuple(checks),
            closure=first,
            stress=stress,
            bottom_lines=lines,
            toys=toys,
            priors=compared,
            scan=scanned,
            warned=method.warned,
        )


def _check_truth(name: str, value: ArrayLike, response: Response) -> Array:
    truth = check_nonnegative(name, value, (response.n_truth,), "truth", response.truth_edges)
    empty = np.flatnonzero(truth == 0)
    if empty.size:
        place = bin_name("truth", int(empty[0]), response.truth_edges)
        raise DataError(f"{name} is 0 at {place}; expected > 0 everywhere: an empty bin has no pull and no coverage")
    return truth


def _by_method(what: str, value: Mapping[Any, Any] | None, methods: Mapping[str, Method]) -> dict[str, Mapping[Any, Unfold]]:
    """Variants by method; a flat mapping is allowed with a single method."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not value:
        raise SettingError(f"{what} is {value!r}; expected a mapping of variants (counts, response) -> result")
    if all(isinstance(v, Mapping) for v in value.values()):
        unknown = [name for name in value if name not in methods]
        if unknown:
            raise SettingError(f"{what} has method {unknown[0]!r}; expected some of {', '.join(methods)}")
        return dict(value)
    if len(methods) > 1:
        raise SettingError(
            f"{what} does not name the method of its variants; expected {{method: {{...}}}} for some of {', '.join(methods)}"
        )
    return {next(iter(methods)): value}
