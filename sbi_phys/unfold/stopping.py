r"""When to stop iterating: on toys drawn from what the data say, at the first iteration whose errors mean what they claim.

Few iterations leave the prior in the answer with an error bar that does not know of it; many leave noise. On a steep spectrum a fixed
number or "the answer moves less than x" stops far too early. So we look at what counts: toys with a known truth, their bias and coverage.

The truth of the toys is the smoothest spectrum that the data allow: prior x exp(polynomial in the bin number), fitted to the counts
through the response, no more degrees than they call for; where no degree describes the data, a late iterate. Were it the iterate under
test it would already lean towards the prior and hide the bias. The toys are unfolded from the prior in use *and* from that truth tilted
by a factor `tilt` from the first bin to the last, up and down: data that happen to agree with the prior must not stop at iteration one.

A step or a line narrower than the resolution is beyond any number of iterations: then the rule is not met, and a warning names the bin.
"""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, Integers
from sbi_phys.unfold.ibu_steps import bayes_step, iterations, scaled_prior, smoothing_kernel
from sbi_phys.unfold.inputs import bin_name
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.smooth_truth import smooth_truth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Stopping", "StoppingRule", "choose"]


GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoppingRule:
    """What is asked of the number of iterations.

    coverage: least coverage of the 68.3 % interval in the worst bin. bias: largest |mean pull| in the worst bin. tilt: factor, first
    to last bin, by which the priors of the toys are tilted either way, 1 = only the prior in use. n_toys per prior. max_iterations.
    """

    coverage: float = 0.60
    bias: float = 0.3
    tilt: float = 4.0
    n_toys: int = 300
    max_iterations: int = 128

    def __post_init__(self) -> None:
        require_number("coverage", self.coverage, low=0, high=0.68, open_low=True)
        require_number("bias", self.bias, low=0, open_low=True)
        require_number("tilt", self.tilt, low=1)
        require_int("n_toys", self.n_toys, low=50)
        require_int("max_iterations", self.max_iterations, low=1, high=GRID[-1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Stopping:
    r"""What the toys said: the scan over iterations and the choice.

    kind, "coverage" or "bias". chosen, iterations; met, False if even the last did not do. iterations (k,). coverage (k, n_truth) and
    mean_pull (k, n_truth) of the worst of the priors in each bin. truth (n_truth,), of the toys. bias (n_truth,), unfolded expectation
    minus truth of the prior in use, counts; spread (n_truth,), half the difference between the two tilted priors, counts.
    """

    kind: str
    rule: StoppingRule
    chosen: int
    met: bool
    iterations: Integers
    coverage: Array
    mean_pull: Array
    truth: Array
    bias: Array
    spread: Array

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw worst-bin coverage and |mean pull| against iterations.   Read: the dashed line is where it stopped."""
        return figures.unfold_classical.stopping(self, ax)


def choose(
    kind: str,
    rule: StoppingRule,
    counts: Array,
    response: Response,
    prior: Array,
    covariance: Array | None,
    smoothing: float,
    seed: int,
    at_expectation: bool = False,
) -> Stopping:
    """Scan the iterations on toys and stop at the first that meets the rule, or at the last with a warning.

    Args: kind "coverage" (coverage and bias) or "bias" (bias alone). covariance (n_reco, n_reco) of the counts, None = Poisson.
        at_expectation: every toy quotes the errors of the expectation, not of its own counts.
    """
    require_choice("n_iterations", kind, ("coverage", "bias"))
    truth = smooth_truth(counts, response, prior)
    expected = response.fold(truth)
    rng = rng_for(seed, "ibu stopping toys")
    toys = _toys(expected, covariance, rule.n_toys, rng)
    ramp = np.linspace(-0.5, 0.5, response.n_truth)
    priors = [prior] + ([truth * rule.tilt**ramp, truth * rule.tilt**-ramp] if rule.tilt > 1 else [])
    runs = [_Run(toys, expected, response, p, covariance, smoothing, truth, at_expectation) for p in priors]
    rows: list[tuple[int, Array, Array]] = []
    met = False
    for k in range(1, rule.max_iterations + 1):
        for run in runs:
            run.advance()
        if k not in GRID and k != rule.max_iterations:
            continue
        found = [run.pulls() for run in runs]
        coverage = np.min([_coverage(m, s) for m, s in found], axis=0)
        pull = np.array([m for m, _ in found])
        worst = np.take_along_axis(pull, np.abs(pull).argmax(axis=0)[None], axis=0)[0]
        rows.append((k, coverage, worst))
        met = bool(np.abs(worst).max() <= rule.bias) and (kind == "bias" or bool(coverage.min() >= rule.coverage))
        if met:
            break
    steps, coverages, worst_pulls = zip(*rows, strict=True)
    if not met:
        _warn(kind, rule, coverages[-1], worst_pulls[-1], response)
    spread = (runs[1].expectation - runs[2].expectation) / 2 if len(runs) > 1 else np.zeros(response.n_truth)
    return Stopping(
        kind=kind,
        rule=rule,
        chosen=steps[-1],
        met=met,
        iterations=np.array(steps),
        coverage=np.array(coverages),
        mean_pull=np.array(worst_pulls),
        truth=truth,
        bias=runs[0].expectation - truth,
        spread=spread,
    )


def _toys(expected: Array, covariance: Array | None, n: int, rng: np.random.Generator) -> Array:
    if covariance is None:
        return rng.poisson(expected, size=(n, expected.size)).astype(np.float64)
    values, vectors = np.linalg.eigh(covariance)
    noise = rng.standard_normal((n, expected.size)) * np.sqrt(np.maximum(values, 0))
    return np.maximum(expected + noise @ vectors.T, 0)


class _Run:
    """All toys, unfolded from one prior, with the errors that each would quote."""

    def __init__(
        self,
        toys: Array,
        expected: Array,
        response: Response,
        prior: Array,
        covariance: Array | None,
        smoothing: float,
        truth: Array,
        at_expectation: bool,
    ) -> None:
        self.at_expectation = at_expectation
        self.toys, self.expected, self.response, self.prior, self.covariance, self.truth = (
            toys,
            expected,
            response,
            prior,
            covariance,
            truth,
        )
        self.current = scaled_prior(toys, prior, response)
        self.linear = iterations(expected, response, prior, smoothing)
        self.kernel = smoothing_kernel(response.n_truth, smoothing)
        self.smoothing, self.first = smoothing, True
        self.expectation, self.jacobian = truth, np.zeros((response.n_truth, response.n_reco))

    def advance(self) -> None:
        if self.smoothing > 0 and not self.first:
            self.current = (self.current / self.prior) @ self.kernel.T * self.prior
        self.first = False
        self.current = bayes_step(self.toys, self.current, self.response)
        step = next(self.linear)
        self.expectation, self.jacobian = step.counts, step.by_data

    def pulls(self) -> tuple[Array, Array]:
        # each toy would quote J diag(N) J^T; J of the expectation is near enough and 300 times cheaper
        j, moved = self.jacobian, self.toys - self.expected
        if self.covariance is None:
            exact = self.expected @ (j**2).T
            variance = exact if self.at_expectation else self.toys @ (j**2).T
        else:
            variance = exact = np.einsum("ti,ij,tj->t", j, self.covariance, j)
        pull = (self.current - self.truth) / np.sqrt(np.maximum(variance, 1e-300))
        # the linear answer has mean 0 and variance 1: what these toys make of it is noise, and nearly the same noise as in the pulls
        linear = moved @ j.T / np.sqrt(np.maximum(exact, 1e-300))
        spread = pull.var(axis=0, ddof=1) - linear.var(axis=0, ddof=1) + 1
        return pull.mean(axis=0) - linear.mean(axis=0), np.sqrt(np.maximum(spread, 0.01))


def _coverage(mean: Array, spread: Array) -> Array:
    # of +-1 sigma for Gaussian pulls: far less noise than counting toys
    return np.asarray(ndtr((1 - mean) / spread) - ndtr((-1 - mean) / spread))


def _warn(kind: str, rule: StoppingRule, coverage: Array, pull: Array, response: Response) -> None:
    low, far = int(coverage.argmin()), int(np.abs(pull).argmax())
    words = (
        f"after {rule.max_iterations} iterations |mean pull| is {abs(pull[far]):.2f} in {bin_name('truth', far, response.truth_edges)}"
        f" and coverage {coverage[low]:.2f} in {bin_name('truth', low, response.truth_edges)}; "
        f"expected at most {rule.bias:g}" + (f" and at least {rule.coverage:g}" if kind == "coverage" else "")
    )
    warnings.warn(f"{words}: use wider bins there or quote the prior as a systematic", UserWarning, stacklevel=4)
