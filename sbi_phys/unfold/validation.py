r"""Proof of an unfolding in one call: closure, stress, toys, bottom line, prior, regularisation, event posteriors.

    methods = {"IBU": lambda c, r: sp.unfold.ibu(c, r, "coverage"), "Tikhonov": sp.unfold.tikhonov}
    report = sp.unfold.validate(methods, response, truth)
    print(report.summary())
    report.write("proof")                                      # validation.json and figures

Each method is asked the same questions with the same toys (`validate_checks`, `validate_toys`); what is asked of each is in `Criteria`
and `validate_rows`. Tests that toys decide have p-values, corrected for their number within a method by Holm's rule: a method that
meets all criteria fails one of them, whichever, in at most 5 % of calls. Tests without noise are met or not.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.unfold.inputs import bin_name, check_counts, check_nonnegative
from sbi_phys.unfold.response import Response, as_response
from sbi_phys.unfold.validate_checks import (
    FAR_WAVE,
    bottom_line,
    closure,
    compare_priors,
    default_alternatives,
    scan_strengths,
    waves,
)
from sbi_phys.unfold.validate_pit import EventPIT
from sbi_phys.unfold.validate_result import MethodValidation, Validation
from sbi_phys.unfold.validate_rows import Criteria, noiseless_checks, prior_check, toy_checks
from sbi_phys.unfold.validate_toys import Method, distance, run_toys

__all__ = ["Validation", "validate"]

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
    asked: Criteria | None = None,
    n_toys: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Validation:
    r"""Test unfoldings n = method(N, P) where the truth n* is known: bias, coverage, information, prior and regularisation.

    Args:
        methods: (counts (r,), response) -> result with .counts (t,) and .covariance (t, t), such as `ibu`; or several, by name.
        response: Response or matrix (r, t). With `n_simulated` every toy has a matrix of its own.
        truth: (t,), expected true counts, > 0: what nature might be like; best a smooth spectrum that describes the data.
        counts: (r,), measured, for their refolded chi2 and the comparison of priors; None = the folded truth for the latter.
        alternatives: other truths (t,) by name, for stress and bottom line; None = tilts by 2 from end to end and a bump of 20 %.
        priors: variants of the method by the name of their prior; with several methods, one such mapping by the name of each method.
        scan: variants by strength of the regularisation (iterations, tau), likewise.
        events: result of `event_pit` for a method that works event by event.
        asked: the criteria; Criteria() by default.
        n_toys: at least 20; 200 see a coverage to 0.03.
        seed: of the toys.
        progress: default none.

    Returns: Validation.
    Raises: ShapeError (a method with other bins), NonFiniteError, DataError, SettingError; a method's own errors, with a note of the place.
    Source: Cousins, May & Sun 2016, arXiv:1607.07038 (bottom line); the others are common practice.
    Read: `.verdict`, then the rows that fail. A method that passes closure and fails stress repeats its prior.
    """
    named = _methods(methods)
    call = _call(response, truth, counts, alternatives, asked, n_toys, seed)
    if events is not None and not isinstance(events, EventPIT):
        raise SettingError(f"events is a {type(events).__name__}; expected what event_pit(truth, draws) returns")
    found, seconds = _test_all(call, named, _by_method("priors", priors, named), _by_method("scan", scan, named), progress)
    return Validation(
        methods=found, response=call.response, truth=call.truth, n_toys=call.n_toys, asked=call.asked, events=events, seconds=seconds
    )


def _test_all(
    call: "_Call",
    methods: Mapping[str, Method],
    priors: Mapping[str, Mapping[str, Unfold]],
    scan: Mapping[str, Mapping[float, Unfold]],
    progress: Progress | None,
) -> tuple[dict[str, MethodValidation], dict[str, float]]:
    """Every method with the seconds that it took."""
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
    asked: Criteria | None,
    n_toys: int,
    seed: int,
) -> "_Call":
    resp, criteria = as_response(response), asked or Criteria()
    if not isinstance(criteria, Criteria):
        raise SettingError(f"asked is a {type(asked).__name__}; expected Criteria(...)")
    nature = _check_truth("truth", truth, resp)
    given = default_alternatives(nature) if alternatives is None else alternatives
    return _Call(
        response=resp,
        truth=nature,
        counts=None if counts is None else check_counts(counts, resp.n_reco, resp.reco_edges),
        others={str(name): _check_truth(f"alternative {name!r}", other, resp) for name, other in given.items()},
        asked=criteria,
        n_toys=require_int("n_toys", n_toys, low=20),
        seed=require_int("seed", seed, low=0),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Call:
    """What one call gives to every method."""

    response: Response
    truth: Array
    counts: Array | None
    others: dict[str, Array]
    asked: Criteria
    n_toys: int
    seed: int

    def test(
        self, method: Method, priors: Mapping[str, Unfold] | None, scan: Mapping[float, Unfold] | None, task: Task
    ) -> MethodValidation:
        """Ask one method everything."""
        resp, asked = self.response, self.asked
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
        checks = noiseless_checks(first, stress, lines, asked, resp) + toy_checks(toys, asked, resp, observed)
        compared = None
        if priors is not None:
            compared = compare_priors(priors, self.counts if self.counts is not None else resp.fold(self.truth), resp)
            checks.append(prior_check(compared, asked, resp))
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
        raise DataError(f"{name} is 0 at {place}; expected > 0 everywhere: pulls and coverage of an empty bin mean nothing")
    return truth


def _by_method(what: str, value: Mapping[Any, Any] | None, methods: Mapping[str, Method]) -> dict[str, Mapping[Any, Unfold]]:
    """Variants by method; a flat mapping belongs to the only one."""
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
            f"{what} does not say of which method its variants are; expected {{method: {{...}}}} for some of {', '.join(methods)}"
        )
    return {next(iter(methods)): value}
