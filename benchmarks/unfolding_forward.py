"""Bayesian unfolding and prior-free forward inference against their requirements.

    python benchmarks/unfolding_forward.py [--toys 150] [--only PART] [--out benchmarks/results/unfolding_forward.json]

Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import gamma, kstest, norm

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the toys are the tests' own

# ruff: noqa: E402
from benchmarks.suite.table import Numbers, Part, arguments, run
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import Response, ibu, tikhonov
from sbi_phys.unfold.bayes import BayesianUnfold, LaplaceGrid, bayesian_unfold
from sbi_phys.unfold.checks import ONE_SIGMA
from sbi_phys.unfold.forward import ForwardUnfolder
from sbi_phys.unfold.spectrum import LogPosterior, SpectrumPrior
from tests.unfold import steep_toy
from tests.unfold.omnifold_oracle import gaussian_recursion

Array = NDArray[np.float64]


def exact() -> Numbers:
    """Posteriors that are known: Gamma, two bins on a grid, Tikhonov's Gaussian limit."""
    numbers: Numbers = {}
    worst = 1.0
    for count, efficiency in ((0, 0.5), (1, 0.5), (7, 0.8), (400, 0.3)):
        response = Response(np.diag([efficiency, 0.9]))
        found = bayesian_unfold([count, 3.0], response, prior="flat", n_draws=8000, seed=1)
        worst = min(worst, float(kstest(found.samples[:, 0], gamma(count + 1, scale=1 / efficiency).cdf).pvalue))
    numbers["one bin: smallest KS p-value against Gamma(N + 1), N = 0, 1, 7, 400"] = (worst, ">=", 1e-3)
    counts, matrix = np.array([22.0, 14.0, 5.0]), np.array([[0.6, 0.2], [0.2, 0.5], [0.05, 0.1]])
    response = Response(matrix, background=np.array([1.0, 2.0, 0.5]))
    a = np.linspace(1e-3, 120, 800)
    n = np.stack([g.ravel() for g in np.meshgrid(a, a, indexing="ij")], axis=1)
    f = response.fold(n)
    p = np.exp((counts * np.log(f) - f).sum(axis=1) - counts @ np.log(counts) + counts.sum())
    p /= p.sum()
    mean, sd = p @ n, np.sqrt(p @ (n - p @ n) ** 2)
    for method in ("hmc", "emcee"):
        found = bayesian_unfold(counts, response, prior="flat", method=method, n_draws=20_000, max_steps=20_000, seed=4)
        numbers[f"two bins, {method}: |mean - grid| [sd]"] = (float(np.abs((found.counts - mean) / sd).max()), "<=", 0.03)
        numbers[f"two bins, {method}: |sd / grid - 1|"] = (float(np.abs(found.errors / sd - 1).max()), "<=", 0.03)
    edges = np.arange(9.0)
    response = Response.from_resolution(edges, edges, 0.7)
    truth = 1e8 * np.exp(-0.3 * np.arange(8.0))
    data = response.fold(truth) * (1 + 1e-5 * rng_for(1, "noise").standard_normal(8))
    found = bayesian_unfold(data, response, smoothness=3e3, reference=truth, level_sd=1e3, tilt_sd=1e3, n_draws=10_000, seed=6)
    limit = tikhonov(data, response, 3e3, prior=truth)
    numbers["Gaussian limit: |mean - Tikhonov| [sd]"] = (float(np.abs((found.counts - limit.counts) / found.errors).max()), "<=", 0.05)
    return numbers


def pulls_of(found: list[BayesianUnfold], truth: Array) -> Numbers:
    """Coverage of the central 68 % intervals, pulls of mean over sd, and the sampler's state."""
    pulls = np.array([(r.counts - truth) / r.errors for r in found])
    intervals = [r.intervals(ONE_SIGMA) for r in found]
    inside = np.array([(i[:, 0] <= truth) & (truth <= i[:, 1]) for i in intervals])
    return {
        "worst-bin coverage of 68 % intervals": (float(inside.mean(axis=0).min()), ">=", 0.60),
        "mean coverage of 68 % intervals": (float(inside.mean()), "", None),
        "largest |mean pull|": (float(np.abs(pulls.mean(axis=0)).max()), "<=", 0.5),
        "mean |mean pull|": (float(np.abs(pulls.mean(axis=0)).mean()), "", None),
        "median relative error": (float(np.median([r.errors / r.counts for r in found])), "", None),
        "largest R-hat": (float(max(r.r_hat.max() for r in found)), "<=", 1.01),
        "share of toys not converged": (float(np.mean([not r.converged for r in found])), "<=", 0.0),
        "predictive p-value below 0.05, share": (float(np.mean([r.predictive_pvalue < 0.05 for r in found])), "", None),
    }


def steep(n_toys: int) -> Numbers:
    """The steep toy with the default settings; then references of other indices; then a truth that bends."""
    response, truth = steep_toy.response(), steep_toy.power_law(2.7)
    numbers: Numbers = {}

    def toys(
        name: str, expected: Array, real: Array, n: int, make: Callable[[int], Response] | None = None, **settings: Any
    ) -> list[BayesianUnfold]:
        begin = time.perf_counter()
        found = []
        for i in range(n):
            counts, own = rng_for(2, "steep", i).poisson(expected), response if make is None else make(i)
            found.append(bayesian_unfold(counts, own, n_draws=1000, seed=i, raise_on_failure=False, **settings))
        numbers.update({f"{name}: {key}": value for key, value in pulls_of(found, real).items()})
        numbers[f"{name}: seconds a toy"] = ((time.perf_counter() - begin) / n, "", None)
        return found

    expected = response.fold(truth)
    own = toys("steep", expected, truth, n_toys)
    few = max(20, n_toys // 5)
    apart = []
    for index in (2.4, 3.0):
        other = toys(f"steep, reference {index}", expected, truth, few, reference=steep_toy.power_law(index))
        apart.append(np.mean([(o.counts - s.counts) / s.errors for o, s in zip(other, own, strict=False)], axis=0))
    numbers["steep: references of index 2.4, 3.0 against 2.7, worst bin, mean of toys [sigma]"] = (float(np.abs(apart).max()), "<=", 0.6)
    centre = (steep_toy.EDGES[1:] + steep_toy.EDGES[:-1]) / 2
    bent = truth * (1 + 10 ** ((centre - 19.3) / 0.1)) ** (-0.6 * 0.1)  # index 2.7 to 3.3 at lgE 19.3
    toys("steep with a break of 0.6", response.fold(bent), bent, n_toys)
    plain, n_events = response, 20_000  # simulated events of each truth bin: as many as the data have in the first of them

    def filled(i: int) -> Response:
        rng = rng_for(4, "matrix", i)
        shares = np.vstack([plain.matrix, 1 - plain.efficiency]).T
        drawn = np.array([rng.multinomial(n_events, s / s.sum()) for s in shares]).T[:-1] / n_events
        return Response(drawn, steep_toy.EDGES, steep_toy.EDGES, n_simulated=np.full(20, float(n_events)))

    toys("response of 2e4 simulated events a bin", expected, truth, n_toys, filled)
    for name, extra in (("10 % background", {"background": 0.1 * expected}), ("10 % fakes", {"fakes": np.full(20, 0.1)})):
        response = steep_toy.response(**extra)
        toys(name, response.fold(truth), truth, few)
    return numbers


def simulation(n: int, kind: str, seed: int) -> tuple[Array, Array, NDArray[np.bool_]]:
    """Truth, reco and what is reconstructed: smearing 0.5, efficiency sigmoid((t + 0.2) / 0.3)."""
    rng = rng_for(seed, "simulation")
    truth = {
        "flat": lambda: rng.uniform(-3.5, 4, n),
        "narrow": lambda: -0.6 + 1.15 * rng.standard_normal(n),
        "data": lambda: 0.2 + 0.8 * rng.standard_normal(n),
    }[kind]()
    seen = rng.random(n) < 1 / (1 + np.exp(-(truth + 0.2) / 0.3))
    return truth, np.where(seen, truth + 0.5 * rng.standard_normal(n), np.nan), seen


def density(t: Array, phi: Array) -> Array:
    return np.asarray(norm.pdf(t[:, 0], phi[0], abs(phi[1]) + 1e-9))


def forward() -> Numbers:
    """N(0.2, 0.8) behind a turn-on, from detectors learned with two spectra of 1e5 simulated events."""
    numbers: Numbers = {}
    _, reco, seen = simulation(100_000, "data", 9)
    data = reco[seen]
    edges, reco_edges = np.linspace(-1.8, 2.6, 12), np.linspace(-2.6, 3.4, 31)
    truth = 1e5 * np.diff(norm.cdf(edges, 0.2, 0.8))
    exact_matrix = Response.from_resolution(edges, reco_edges, 0.5, efficiency=lambda t: 1 / (1 + np.exp(-(t + 0.2) / 0.3))).matrix
    fits = []
    for seed, kind in enumerate(("flat", "narrow")):
        begin = time.perf_counter()
        unfolder = ForwardUnfolder(seed=seed, device="cpu").fit(*simulation(100_000, kind, seed))
        numbers[f"forward, {kind}: seconds to learn 1e5 events"] = (time.perf_counter() - begin, "<=", 120.0)
        fit = unfolder.fit_density(data, density, [0.0, 1.0], ("mu", "sigma"))
        fits.append(fit)
        numbers[f"forward, {kind}: |mu - 0.2|"] = (abs(float(fit.values[0]) - 0.2), "<=", 0.015)
        numbers[f"forward, {kind}: |sigma - 0.8|"] = (abs(float(fit.values[1]) - 0.8), "<=", 0.015)
        numbers[f"forward, {kind}: statistical error of mu"] = (float(fit.errors[0]), "", None)
        numbers[f"forward, {kind}: |total / 1e5 - 1|"] = (abs(fit.total / 1e5 - 1), "<=", 0.02)
        begin = time.perf_counter()
        weights = unfolder.unfold(data, n_replicas=20)
        numbers[f"forward, {kind}: seconds to unfold, 20 replicas"] = (time.perf_counter() - begin, "<=", 120.0)
        numbers[f"forward, {kind}: iterations of EM"] = (weights.n_iterations, "", None)
        spread = weights.statistic(lambda w: float(w @ weights.points[:, 0] / w.sum()))[1]  # noqa: B023
        numbers[f"forward, {kind}: statistical error of EM's mean"] = (float(np.sqrt(spread[0, 0])), "", None)
        numbers[f"forward, {kind}: EM |mean - 0.2|"] = (abs(float(weights.mean[0]) - 0.2), "<=", 0.015)
        numbers[f"forward, {kind}: EM |sd - 0.8|"] = (abs(float(weights.sd[0]) - 0.8), "<=", 0.015)
        matrix = unfolder.response(edges, reco_edges)
        numbers[f"forward, {kind}: learned matrix, largest error"] = (float(np.abs(matrix.matrix - exact_matrix).max()), "<=", 0.015)
        found = bayesian_unfold(np.histogram(data, reco_edges)[0], matrix, seed=1)
        pulls = (found.counts - truth) / found.errors
        numbers[f"forward, {kind}: Bayesian with the learned matrix, largest |pull|"] = (float(np.abs(pulls).max()), "<=", 3.5)
    apart = np.abs(fits[0].values - fits[1].values)
    numbers["forward: two simulations apart, mu and sigma"] = (float(apart.max()), "<=", 0.015)
    for k in (1, 2, 4):
        numbers[f"what {k} iterations of Bayes keep of N(-0.6, 1.15): |mean - 0.2|"] = (
            abs(gaussian_recursion(-0.6, 1.15**2, 0.2, 0.64, 0.25, k)[0] - 0.2), "", None,
        )  # fmt: skip
    return numbers


def methods() -> Numbers:
    """One histogram of the steep toy: chains against importance sampling, the hyperprior's scale, and the size of the errors."""
    response, truth = steep_toy.response(), steep_toy.power_law(2.7)
    counts = rng_for(3, "steep").poisson(response.fold(truth))
    found = bayesian_unfold(counts, response, seed=1)
    print(found.summary())
    posterior = LogPosterior(counts.astype(np.float64), response, SpectrumPrior.build(found.reference, steep_toy.EDGES))
    mixture = LaplaceGrid(posterior, np.log(found.map))
    z, log_sigma = mixture.sample(60_000, rng_for(5, "importance"))
    log_weight = posterior.joint(z, log_sigma) - mixture.log_prob(z, log_sigma)
    weight = np.exp(log_weight - log_weight.max())
    weight /= weight.sum()
    mean = weight @ np.exp(z)
    sd = np.sqrt(weight @ (np.exp(z) - mean) ** 2)
    scales = [bayesian_unfold(counts, response, seed=2, hyper_scale=s) for s in (0.03, 0.3)]
    moved = max(float(np.abs((s.counts - found.counts) / found.errors).max()) for s in scales)
    classic = ibu(counts, response, 20, steep_toy.power_law(2.7))
    return {
        "chains against importance sampling: |difference of means| [sd]": (float(np.abs((found.counts - mean) / sd).max()), "<=", 0.08),
        "chains against importance sampling: |ratio of errors - 1|": (float(np.abs(found.errors / sd - 1).max()), "<=", 0.08),
        "importance sampling: effective draws of 60000": (1 / float((weight**2).sum()), ">=", 2000.0),
        "half-Cauchy scale of 0.03, 0.3 for 0.1: |difference of means|, worst bin [sd]": (moved, "<=", 0.5),
        "IBU, 20 iterations from the truth: median error over that of Bayes": (float(np.median(classic.errors / found.errors)), "", None),
    }


def main() -> None:
    parser = arguments(__doc__, "unfolding_forward")
    parser.add_argument("--toys", type=int, default=150)
    options = parser.parse_args()
    parts: dict[str, Part] = {"exact": exact, "methods": methods, "steep": lambda: steep(options.toys), "forward": forward}
    sys.exit(run(parts, options, {"toys": options.toys}))


if __name__ == "__main__":
    main()
