"""Validation of the unfolding methods: validate() on the steep toy, background and fakes over toys, two dimensions, event-wise ranks.

    python benchmarks/unfolding_validation.py [--toys 200] [--events 100000] [--figures FOLDER]
        [--out benchmarks/results/unfolding_validation.json]

Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met. It takes half an hour
on a quiet core, half of it for "learned extras"; --only selects a part.
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm, wasserstein_distance

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the toys are the tests' own

# ruff: noqa: E402
from benchmarks.suite.table import Numbers, Part, arguments, run
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import FlowUnfolder, ibu, omnifold, tikhonov
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.validation import Validation, event_pit, validate
from tests.unfold import omnifold_oracle, steep_toy

Array = NDArray[np.float64]
Unfold = Callable[[Array, Response], Any]

# lgE and Xmax [g cm^-2]: mean, sd, correlation of simulation and data; sd and correlation of what the detector adds
SIMULATION = ((18.90, 750.0), (0.25, 60.0), 0.24)
DATA = ((18.98, 735.0), (0.22, 50.0), 0.10)
SMEARING = ((0.08, 20.0), 0.5)
NAMES = ("lgE", "Xmax")
# the IcINN toy: simulation N(4, 4), data N(10, 3.8), reco = truth + N(-6, 3)
BIAS, SMEAR = -6.0, 3.0


def steep(n_toys: int, figures: Path | None) -> Numbers:
    """validate() on the steep toy from a wrong prior: the default rule of iterative Bayes, and Tikhonov."""
    response, truth, prior = steep_toy.response(), steep_toy.power_law(2.7), steep_toy.power_law(3.0)
    counts = rng_for(7, "steep counts").poisson(response.fold(truth))

    def by_rule(index: float) -> Unfold:
        return lambda c, r: ibu(c, r, "coverage", steep_toy.power_law(index))

    scan: dict[str, dict[float, Unfold]] = {
        "IBU, rule": {k: lambda c, r, k=k: ibu(c, r, k, prior) for k in (1, 2, 4, 8, 16, 32, 64)},  # type: ignore[misc]
        "Tikhonov": {t: lambda c, r, t=t: tikhonov(c, r, t, prior) for t in (1e-1, 1.0, 1e1, 1e2, 1e3)},  # type: ignore[misc]
    }
    report = validate(
        {"IBU, rule": by_rule(3.0), "Tikhonov": lambda c, r: tikhonov(c, r, prior=prior)},
        response,
        truth,
        counts=counts,
        priors={"IBU, rule": {f"index {g}": by_rule(g) for g in (2.4, 2.7, 3.0)}},
        scan=scan,
        n_toys=n_toys,
    )
    print(report.summary())
    if figures is not None:
        report.write(figures / "steep")
    return _rows("steep", report)


def _rows(where: str, report: Validation) -> Numbers:
    """Requirements on the worst bins, as numbers, and the number of tests that fail, for information."""
    numbers: Numbers = {}
    for name, found in report.methods.items():
        values = {row.name: row.value for row in found.decisions}
        numbers[f"{where}, {name}: largest |mean pull|"] = (values["mean pull"], "<=", 0.5)
        numbers[f"{where}, {name}: worst-bin 68 % coverage"] = (values["coverage of 68 % intervals"], ">=", 0.60)
        numbers[f"{where}, {name}: mean 68 % coverage"] = (values["coverage of 68 % intervals, mean of bins"], "", None)
        numbers[f"{where}, {name}: worst-bin 95 % coverage"] = (values["coverage of 95 % intervals"], "", None)
        lines = [line.ratio for line in found.bottom_lines.values() if np.isfinite(line.ratio)]
        numbers[f"{where}, {name}: bottom line, worst ratio"] = (max(lines), "<=", 1.02)
        if found.priors is not None:
            numbers[f"{where}, {name}: priors apart [sigma]"] = (values["priors apart"], "<=", 0.6)
        worst = max(v for k, v in values.items() if k.startswith("stress"))
        numbers[f"{where}, {name}: stress, worst bias [sigma]"] = (worst, "", None)
        numbers[f"{where}, {name}: tests failed"] = (float(len(found.failed)), "", None)
        numbers[f"{where}, {name}: seconds"] = (report.seconds[name], "<=", 300)
    return numbers


def extras(n_toys: int) -> Numbers:
    """A tenth of background and a tenth of fakes together, from a wrong prior."""
    plain, truth, prior = steep_toy.response(), steep_toy.power_law(2.7), steep_toy.power_law(3.0)
    response = steep_toy.response(background=0.1 * plain.fold(truth), fakes=np.full(20, 0.1))
    report = validate(
        {"IBU, rule": lambda c, r: ibu(c, r, "coverage", prior), "Tikhonov": lambda c, r: tikhonov(c, r, prior=prior)},
        response,
        truth,
        n_toys=n_toys,
        seed=1,
    )
    return _rows("10 % background and fakes", report)


def learned_extras(n_toys: int) -> Numbers:
    """OmniFold on toys with a tenth of background and of fakes: mean bias of binned counts in units of their spread over toys.

    The exact method's own bias, with infinitely many events, is given as well: the influence of the simulation that four iterations leave.
    """
    n, edges = 5000, np.linspace(-1.4, 1.8, 6)
    true = n * np.diff(norm.cdf(edges, omnifold_oracle.MEAN, omnifold_oracle.SD))
    counts = []
    for i in range(n_toys):
        t = omnifold_oracle.toy(n, 1000 + i, fakes=0.1, background=0.1)
        half = np.full(len(t.background), 0.5)  # twice the data's share is simulated
        found = omnifold(t.truth, t.reco, t.data, 4, t.reco_pass, t.truth_pass, background=t.background, background_weights=half, seed=i)
        counts.append(np.histogram(found.truth[:, 0][t.truth_pass], edges, weights=found.weights[t.truth_pass])[0])
    values = np.array(counts)
    spread = values.std(axis=0, ddof=1)
    pull = (values.mean(axis=0) - true) / spread
    print(f"OmniFold, {n_toys} toys of {n}: mean pull by bin {np.round(pull, 2)} +- {1 / np.sqrt(n_toys):.2f}, relative spread", end=" ")
    print(np.round(spread / true, 3))
    left = {fit: n * omnifold_oracle.exact_counts(edges, 4, fakes=0.1, background=0.1, fit_fakes=fit) - true for fit in (False, True)}
    print(f"four exact iterations: {np.round(left[False] / spread, 2)}, with fitted fakes {np.round(left[True] / spread, 2)}")
    name = "10 % background and fakes, OmniFold"
    return {
        f"{name}: largest |mean pull|": (float(np.abs(pull).max()), "<=", 0.5),
        f"{name}: its error": (float(1 / np.sqrt(n_toys)), "", None),
        f"{name}: largest |mean pull| of four exact iterations": (float(np.abs(left[False] / spread).max()), "", None),
        f"{name}: toys": (float(n_toys), "", None),
    }


def smallest_errors(n: int, degree: int) -> tuple[float, float]:
    """Smallest errors of mean and sd of the turn-on toy's truth for an unbiased estimate, if log(true / simulated) is a polynomial."""
    t, r = np.linspace(-6, 6, 241), np.linspace(-7, 7, 281)
    kernel = np.diff(norm.cdf(r[:, None], t, omnifold_oracle.SMEAR), axis=0) * omnifold_oracle.turn_on(t)
    truth = n * norm.pdf(t, omnifold_oracle.MEAN, omnifold_oracle.SD) * (t[1] - t[0])
    z = (t - omnifold_oracle.MEAN) / omnifold_oracle.SD
    powers = z ** np.arange(degree + 1)[:, None]
    change = kernel @ (powers * truth).T  # of the expected data with each coefficient
    covariance = np.linalg.pinv(change.T @ (change / np.maximum(kernel @ truth, 1e-30)[:, None]), rcond=1e-14)
    gradients = [powers @ (truth * z) / n * omnifold_oracle.SD, powers @ (truth * (z**2 - 1)) / n * omnifold_oracle.SD / 2]
    mean, sd = (float(np.sqrt(g @ covariance @ g)) for g in gradients)
    return mean, sd


def turn_on(n: int, n_seeds: int = 5) -> Numbers:
    """OmniFold, 10 iterations with the turn-on efficiency, over seeds; the same toys by binned iterations with the exact response."""
    grid = np.linspace(-4, 4, 81)
    t, wide = (grid[1:] + grid[:-1]) / 2, np.linspace(-6, 6, 121)
    matrix = np.diff(norm.cdf(wide[:, None], t, omnifold_oracle.SMEAR), axis=0) * omnifold_oracle.turn_on(t)
    prior = np.diff(norm.cdf(grid))
    moments: dict[str, list[tuple[float, float]]] = {"OmniFold": [], "exact response": []}
    for seed in range(12, 12 + n_seeds):
        toy = omnifold_oracle.toy(n, seed, omnifold_oracle.turn_on)
        found = omnifold(toy.truth, toy.reco, toy.data, 10, toy.reco_pass, seed=seed)
        moments["OmniFold"].append(omnifold_oracle.moments(found.truth[:, 0], found.weights))
        moments["exact response"].append(omnifold_oracle.moments(t, ibu(np.histogram(toy.data, wide)[0], matrix, 10, prior).counts))
    numbers: Numbers = {}
    for degree, words in ((2, "quadratic"), (3, "cubic"), (4, "quartic")):
        for what, error in zip(("mean", "sd"), smallest_errors(n, degree), strict=True):
            numbers[f"turn-on, least error of the {what}, log ratio {words}"] = (error, "", None)
    off = np.abs(np.array(moments["OmniFold"]) - (omnifold_oracle.MEAN, omnifold_oracle.SD))
    numbers["turn-on, OmniFold: seeds with mean and sd within 0.015"] = (float((off <= 0.015).all(axis=1).sum()), "", None)
    for name, rows in moments.items():
        values = np.array(rows)
        for j, (what, target) in enumerate((("mean", omnifold_oracle.MEAN), ("sd", omnifold_oracle.SD))):
            print(f"turn-on, {name}, {what} by seed: {np.round(values[:, j], 4)}")
            numbers[f"turn-on, {name}: {what}, average of seeds"] = (float(values[:, j].mean()), "", None)
            numbers[f"turn-on, {name}: {what}, scatter of seeds"] = (float(values[:, j].std(ddof=1)), "", None)
            if name == "OmniFold":
                numbers[f"turn-on, {name}: |average {what} - {target}|"] = (abs(float(values[:, j].mean()) - target), "<=", 0.015)
    return numbers


def _covariance(sd: tuple[float, float], correlation: float) -> Array:
    scale = np.array(sd)
    return np.outer(scale, scale) * np.array([[1, correlation], [correlation, 1]])


def _pairs(n: int, which: tuple[tuple[float, float], tuple[float, float], float], seed: int) -> tuple[Array, Array]:
    rng = rng_for(seed, "lgE and Xmax")
    truth = rng.multivariate_normal(which[0], _covariance(*which[1:]), n)
    return truth, truth + rng.multivariate_normal((0, 0), _covariance(*SMEARING), n)


def two_dimensions(n: int) -> Numbers:
    """OmniFold and FlowUnfolder on energy and depth with correlated smearing: marginals, correlation, event posteriors, time."""
    (truth, reco), (nature, data) = _pairs(n, SIMULATION, 31), _pairs(n, DATA, 32)
    numbers: Numbers = {}
    begin = time.perf_counter()
    weighted = omnifold(truth, reco, data, 4, seed=0)
    seconds = time.perf_counter() - begin
    numbers |= _closure("2-D, OmniFold", truth, weighted.weights, nature)
    numbers |= {
        "2-D, OmniFold: seconds, 4 iterations": (seconds, "", None),
        "2-D, OmniFold: seconds per training": (seconds / 8, "<=", 120),
        "2-D, OmniFold: effective sample size": (weighted.effective_sample_size, "", None),
    }
    begin = time.perf_counter()
    unfolder = FlowUnfolder(seed=0, device="cpu").fit(truth, reco, data, n_iterations=3)
    seconds = time.perf_counter() - begin
    unfolded = unfolder.sample(data, 1, seed=5)[:, 0]
    numbers |= _closure("2-D, FlowUnfolder", unfolded, np.ones(n), nature)
    numbers |= {
        "2-D, FlowUnfolder: seconds, 3 iterations": (seconds, "", None),
        "2-D, FlowUnfolder: seconds per training": (seconds / 3, "<=", 120),
    }
    some = slice(0, 1000)
    ranks = event_pit(nature[some], unfolder.sample(data[some], 199, seed=6), data[some], NAMES)
    print(ranks.summary())
    numbers["2-D, FlowUnfolder: event-wise PIT, p"] = (ranks.pvalue, ">=", 0.01)
    return numbers


def _closure(name: str, values: Array, weights: Array, nature: Array) -> Numbers:
    # against the truths of the same data, so that the fluctuation of the data cancels
    numbers: Numbers = {}
    moved = []
    for j, quantity in enumerate(NAMES):
        mean, sd = omnifold_oracle.moments(values[:, j], weights)
        true_mean, true_sd = nature[:, j].mean(), nature[:, j].std()
        edges = np.linspace(true_mean - 3.5 * true_sd, true_mean + 3.5 * true_sd, 31)
        p, q = np.histogram(values[:, j], edges, weights=weights / weights.sum())[0], np.histogram(nature[:, j], edges)[0] / len(nature)
        numbers |= {
            f"{name}: {quantity}, |mean - true| [sd]": (abs(mean - true_mean) / true_sd, "<=", 0.03),
            f"{name}: {quantity}, |sd / true - 1|": (abs(sd / true_sd - 1), "<=", 0.03),
            f"{name}: {quantity}, Delta x 1e3": (float(500 * ((p - q) ** 2 / (p + q + 1e-300)).sum()), "<=", 0.5),
        }
        moved.append((values[:, j] - mean) / sd)
    correlation, true = float(np.average(moved[0] * moved[1], weights=weights)), float(np.asarray(np.corrcoef(nature.T))[0, 1])
    print(f"{name}: correlation {correlation:.4f}, true {true:.4f}, simulated {SIMULATION[2]}")
    numbers[f"{name}: |correlation - true|"] = (abs(correlation - true), "<=", 0.02)
    return numbers


def event_wise(n: int) -> Numbers:
    """FlowUnfolder on the Gaussian oracle, 5 iterations: recursion, event posteriors against the exact ones, event-wise ranks."""

    def pairs(mean: float, sd: float, seed: int) -> tuple[Array, Array]:
        rng = rng_for(seed, "pairs")
        truth = mean + sd * rng.standard_normal(n)
        return truth, truth + BIAS + SMEAR * rng.standard_normal(n)

    (truth, reco), (nature, data) = pairs(4, 4, 21), pairs(10, 3.8, 22)
    begin = time.perf_counter()
    unfolder = FlowUnfolder(seed=0, device="cpu").fit(truth, reco, data, n_iterations=5)
    seconds = time.perf_counter() - begin
    last = unfolder.iterations[-1]
    mean, sd = omnifold_oracle.gaussian_recursion(4, 16, 10, 3.8**2, 9, 4)  # the prior that the fifth network was trained with
    y = np.quantile(data, [0.05, 0.25, 0.5, 0.75, 0.95])
    centre, width = (9 * mean + sd**2 * (y - BIAS)) / (sd**2 + 9), np.sqrt(9 * sd**2 / (sd**2 + 9))
    quantiles = norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    draws = unfolder.sample(y, 20_000, seed=3)[:, :, 0]
    distances = [wasserstein_distance(d, c + width * quantiles) for d, c in zip(draws, centre, strict=True)]
    ranks = event_pit(nature[:1000], unfolder.sample(data[:1000], 199, seed=4)[:, :, 0], data[:1000], ["truth"])
    print(ranks.summary())
    return {
        "IcINN toy: |mean - 9.957|": (abs(float(last.mean[0]) - 9.957), "<=", 0.10),
        "IcINN toy: |sd - 3.817|": (abs(float(last.sd[0]) - 3.817), "<=", 0.10),
        "IcINN toy: Wasserstein-1 of event posteriors, worst": (float(max(distances)), "<=", 0.15),
        "IcINN toy: event-wise PIT, p": (ranks.pvalue, ">=", 0.01),
        "IcINN toy: seconds per training": (seconds / 5, "<=", 120),
    }


def main() -> None:
    parser = arguments(__doc__, "unfolding_validation")
    parser.add_argument("--toys", type=int, default=200)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--learned-toys", type=int, default=160)
    parser.add_argument("--figures", type=Path, help="folder for the figures of validate()")
    options = parser.parse_args()
    parts: dict[str, Part] = {
        "steep": lambda: steep(options.toys, options.figures), "extras": lambda: extras(options.toys),
        "event-wise": lambda: event_wise(options.events), "two dimensions": lambda: two_dimensions(options.events),
        "learned extras": lambda: learned_extras(options.learned_toys), "turn-on": lambda: turn_on(options.events),
    }  # fmt: skip
    sys.exit(run(parts, options, {"toys": options.toys, "events": options.events}))


if __name__ == "__main__":
    main()
