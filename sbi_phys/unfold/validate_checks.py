r"""What can be asked of an unfolding without noise: closure, stress, the bottom line, its prior, and its regularisation.

Closure        n = method(f(n*)) against n*, in quoted errors; no noise, so that what is left is bias.
Stress         the same for other truths n', with the method (and the prior in it) as it is. Closure alone is passed by any method
               whose prior is the truth, stress only by one that listens to the data.
Bottom line    for two hypotheses n1, n2:   chi2_unfolded / chi2_reco <= 1,
                   chi2_reco = (f1 - f2)^T diag(f1)^-1 (f1 - f2),    chi2_unfolded = (u1 - u2)^T V_u^-1 (u1 - u2),
               no analysis of the unfolded result can know more than the measurement does; a covariance that is too small, or whose
               correlations have been left out, says that it can. With V_u = J diag(f1) J^T it holds exactly for a linear method, so
               hypotheses far apart are moved together until chi2_reco <= 25. Asked along with these are waves of 2 to 6 bins, so
               small (chi2_reco <= 0.01) that the method is linear: with correlations left out smooth hypotheses come out too good
               if neighbours are correlated, and one of the waves if they are anticorrelated.
Prior          spread of the answers to the same counts between priors, in quoted errors.
Scan           bias of the worst of all truths, and spread over toys, for every strength of the regularisation.

Source: bottom line: Cousins, May & Sun 2016, arXiv:1607.07038.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_number
from sbi_phys.core.errors import DataError
from sbi_phys.core.progress import Task
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.validate_toys import Answer, Method, in_errors

__all__ = ["BottomLine", "Closure", "Priors", "Scan", "bottom_line", "closure", "compare_priors", "default_alternatives", "scan_strengths"]


TILT, BUMP = 2.0, 0.2  # factor from the first to the last bin; height over the spectrum
WAVES = (2, 3, 4, 6)  # lengths in bins
FAR, FAR_WAVE = 25.0, 0.01  # chi2_reco above which hypotheses are moved together
NEAR = 1e-6  # below which the data do not tell them apart
CUT = 1e-10  # eigenvalues of a correlation matrix, over the largest, that are rounding


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
    """chi2 between two hypotheses, measured and unfolded.   Read: a ratio above 1 = the unfolded result claims more than was measured."""

    reco: float
    unfolded: float

    @property
    def ratio(self) -> float:
        """chi2_unfolded / chi2_reco; NaN where the data do not tell the two apart."""
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
    """Truths (t,) for the stress closure: tilted by a factor 2 from end to end, either way, and with a bump of 20 %, t/10 bins wide."""
    ramp = np.linspace(-0.5, 0.5, truth.size)
    at = np.arange(truth.size) - (truth.size - 1) / 2
    bump = np.exp(-0.5 * (at / max(1.0, truth.size / 10)) ** 2)
    return {"tilt up": truth * TILT**ramp, "tilt down": truth * TILT**-ramp, "bump": truth * (1 + BUMP * bump)}


def waves(truth: Array) -> dict[str, Array]:
    """Truths (t,) with waves of 2, 3, 4 and 6 bins, equally significant in every bin: three Poisson errors high, half the bin at most."""
    height = np.minimum(0.5 * truth, 3 * np.sqrt(truth))
    at = np.arange(truth.size)
    return {f"wave of {k} bins": truth + height * np.cos(2 * np.pi * at / k) for k in WAVES if k <= truth.size}


def closure(method: Method, response: Response, truth: Array, place: str) -> Closure:
    """Unfold the folded truth without noise."""
    answer = method.ask(response.fold(truth), response, place)
    return Closure(truth=truth, counts=answer.counts, errors=answer.errors, covariance=answer.covariance)


def bottom_line(method: Method, response: Response, first: Closure, other: Array, place: str, far: float = FAR) -> BottomLine:
    """chi2 between the truth of `first` and another (t,), moved towards it until chi2_reco <= far, and between what is unfolded."""
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
    # of several rows, per column, the entry that is largest in size
    return np.take_along_axis(values, np.abs(values).argmax(axis=0)[None], axis=0)[0]
