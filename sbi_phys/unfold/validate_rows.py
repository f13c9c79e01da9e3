r"""What is asked of each test of an unfolding, and the p-values of those that toys decide.

Regularised unfolding is biased by design, so "the mean pull is zero" is the wrong hypothesis: with enough toys every useful method
fails it. The hypotheses are the criteria themselves (`Criteria`), and a p-value is that of being within them:

    mean pull       |E z_mu| <= 0.5 in every bin            one-sided t test at the bound, times the number of bins
    coverage        P(|z_mu| <= 1) >= 0.60 in every bin     binomial at the bound, times the number of bins; likewise 0.90 for 95 %
    on average      mean over bins of the coverage >= 0.65  one-sided t test over toys: each toy gives one share of covered bins, so that
                                                            correlations between bins do not matter
    refolded        E D(N, f(n)) <= E D(N, f(n*))           paired t test: an answer that has been fitted to the data lies no further
                                                            from them than the truth does (D: Poisson deviance)
    refolded data   D of the measured counts among the toys', p = (1 + #{D_i >= D}) / (m + 1); beyond all of them, that of a scaled
                    chi-square with their mean and variance

Tests without noise have a criterion and nothing random in them: they are met or not.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, chdtrc, ndtr, ndtri, stdtr

from sbi_phys.calibration.montecarlo import smallest_pvalue
from sbi_phys.core.checks import require_number
from sbi_phys.core.types import Array
from sbi_phys.unfold.inputs import bin_name
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.validate_checks import BottomLine, Closure, Priors
from sbi_phys.unfold.validate_toys import Toys

__all__ = ["Check", "Criteria", "noiseless_checks", "prior_check", "toy_checks"]


ONE_SIGMA = float(2 * ndtr(1.0) - 1)
TWO_SIGMA = float(-ndtri(0.025))


@dataclass(frozen=True, kw_only=True, slots=True)
class Criteria:
    """What is asked of an unfolding. Biases in units of the quoted error, coverages as probabilities.

    bias: of closure, and of the mean pull over toys, worst bin. stress: bias for other truths, worst bin. coverage, coverage_95: of
    the intervals of 68.3 and 95 %, worst bin. average: of those of 68.3 %, mean over bins. prior: spread between priors, worst bin.
    bottom_line: chi2 unfolded over measured. degenerate: share of toys with a quoted error near 0, worst bin.
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
    """One test: its number, what is asked of it, whether that is met (None: a p-value decides, or it is for information), in words."""

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
    first: Closure, stress: Mapping[str, Closure], lines: Mapping[str, BottomLine], asked: Criteria, response: Response
) -> list[Check]:
    """Closure, stress closures and bottom lines."""
    checks = []
    for name, found, bound in [("closure", first, asked.bias)] + [(f"stress: {k}", c, asked.stress) for k, c in stress.items()]:
        at, value, place = _worst(found.pull, response)
        words = f"largest bias {found.pull[at]:+.2f} sigma in {place}"
        checks.append(Check(name=name, value=value, criterion=f"|bias| <= {bound:g} sigma in every bin", met=value <= bound, words=words))
    for name, line in lines.items():
        told = np.isfinite(line.ratio) or line.unfolded == np.inf
        words = f"chi2 measured {line.reco:.4g}, unfolded {line.unfolded:.4g}" if told else "the data do not tell the two apart"
        checks.append(
            Check(
                name=f"bottom line: {name}",
                value=line.ratio,
                criterion=f"chi2 unfolded / measured <= {asked.bottom_line:g}",
                met=bool(line.ratio <= asked.bottom_line) if told else None,
                words=words,
            )
        )
    return checks


def toy_checks(toys: Toys, asked: Criteria, response: Response, observed: float | None) -> list[Check]:
    """Mean pull, coverages, errors near zero, refolded deviances; `observed`: that of the measured counts."""
    n, n_bins = toys.n, toys.truth.size
    pull, error = toys.mean_pull, toys.mean_pull_err
    at, value, place = _worst(pull, response)
    tails = [_t_tail(abs(m) - asked.bias, e, n) for m, e in zip(pull, error, strict=True)]
    checks = [
        Check(
            name="mean pull",
            value=value,
            criterion=f"|mean pull| <= {asked.bias:g} in every bin",
            pvalue=min(1.0, n_bins * min(tails)),
            words=f"largest {pull[at]:+.2f} +- {error[at]:.2f} in {place}",
        )
    ]
    for name, width, bound in (("68", 1.0, asked.coverage), ("95", TWO_SIGMA, asked.coverage_95)):
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
            criterion=f">= {asked.average:g}",
            pvalue=_t_tail(asked.average - float(each.mean()), error_each, n),
            words=f"{each.mean():.3f} +- {error_each:.3f}; {ONE_SIGMA:.3f} is meant",
        )
    )
    return [*checks, *_spread_checks(toys, asked, response), *_refolded_checks(toys, response, observed)]


def _spread_checks(toys: Toys, asked: Criteria, response: Response) -> list[Check]:
    _, value, place = _worst(toys.degenerate, response)
    words = f"{100 * value:.1f} % of toys in {place}: no counts reach it; merge bins there" if value > 0 else "none"
    quoted = np.sqrt(np.mean(toys.errors**2, axis=0))
    ratio = np.divide(toys.sd, quoted, out=np.ones_like(quoted), where=quoted > 0)
    far = int(np.abs(np.log(np.maximum(ratio, 1e-300))).argmax())
    return [
        Check(
            name="quoted errors near zero",
            value=value,
            criterion=f"share of toys <= {asked.degenerate:g} in every bin",
            met=value <= asked.degenerate,
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
        # exact fits are equal but for rounding
        p = smallest_pvalue(np.round([observed], 6), np.round(toys.refolded, 6)[:, None], _chi2_tail(observed, toys.refolded))
        words = f"{observed:.4g} for {response.n_reco} bins; toys {toys.refolded.mean():.4g} +- {toys.refolded.std(ddof=1):.2g}"
        checks.append(
            Check(name="refolded chi2 of the counts", value=observed, criterion="like that of toys, p > 0.05", pvalue=p, words=words)
        )
    return checks


def prior_check(found: Priors, asked: Criteria, response: Response) -> Check:
    """Spread between priors."""
    _, value, place = _worst(found.spread, response)
    words = f"{', '.join(found.names)}: furthest apart in {place}"
    return Check(
        name="priors apart", value=value, criterion=f"<= {asked.prior:g} sigma in every bin", met=value <= asked.prior, words=words
    )


def _chi2_tail(value: float, sample: Array) -> float:
    """P(more than value) of the multiple of a chi-square with the mean and variance of a sample."""
    mean, variance = float(sample.mean()), float(sample.var(ddof=1))
    if mean <= 0 or variance <= 0:
        return 1.0
    return float(chdtrc(2 * mean**2 / variance, max(value, 0.0) * 2 * mean / variance))


def _t_tail(above: float, error: float, n: int) -> float:
    """P-value of 'the mean is not above the bound' from how far above it came out."""
    if error <= 0:
        return 1.0 if above <= 0 else 1e-300
    return float(max(stdtr(n - 1, -above / error), 1e-300))
