"""Confidence sets against their requirements: Feldman-Cousins endpoints, and the coverage of toy, learned and Wilks' constructions.

    python benchmarks/confidence_coverage.py [--toys 4000] [--out benchmarks/results/confidence_coverage.json]

Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2, poisson

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the toys are the tests' own

# ruff: noqa: E402
from benchmarks.suite.table import Numbers, arguments, run
from sbi_phys.confidence import LRT, Construction, coverage_map, expected_limits, feldman_cousins, feldman_cousins_gaussian, lf2i, neyman
from sbi_phys.core.rng import rng_for
from tests.confidence import on_off_toy as toy
from tests.confidence.test_counting import PUBLISHED

Array = NDArray[np.float64]

LEVELS = (0.683, 0.9)
N_LEARN = 20_000  # simulations that critical values are learned from; the other construction has 900 000 toys or more
MUS = np.array([0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0])  # 10 signal strengths x 3 backgrounds
NUS = np.array([0.8, 1.0, 1.2])


def endpoints() -> Numbers:
    """Largest deviation from the published table, and exact coverage of the belt."""
    n, b = np.array(list(PUBLISHED)).T
    low, high = feldman_cousins(n, b)
    wanted = np.array(list(PUBLISHED.values()))
    print("n, b: published, here\n" + "\n".join(
        f"  {int(k)}, {x:g}: [{w[0]:.2f}, {w[1]:.2f}]  [{a:.3f}, {c:.3f}]" for k, x, w, a, c in zip(n, b, wanted, low, high, strict=True)
    ))  # fmt: skip
    counts = np.arange(80)
    numbers: Numbers = {f"Feldman-Cousins: {n.size} published intervals, largest deviation": (
        float(np.abs(np.stack([low, high], axis=1) - wanted).max()), "<=", 0.02)}  # fmt: skip
    for mean in (0.0, 3.0):
        ends = feldman_cousins(counts, mean, monotone=False)
        mu = np.linspace(0, 15, 601)
        covered = [(poisson.pmf(counts, m + mean) * ((ends[0] <= m + 1e-9) & (m - 1e-9 <= ends[1]))).sum() for m in mu]
        numbers[f"Feldman-Cousins: lowest exact coverage at 90 %, b = {mean:g}"] = (float(min(covered)), ">=", 0.9 - 1e-6)
    mu = np.array([0.0, 0.1, 0.5, 1.0, 2.0, 4.0])
    x = np.linspace(-8, 12, 400_001)
    low, high = feldman_cousins_gaussian(x)
    density = np.exp(-0.5 * (x[None] - mu[:, None]) ** 2) / np.sqrt(2 * np.pi)
    covered = np.trapezoid(density * ((low <= mu[:, None]) & (mu[:, None] <= high)), x, axis=1)
    numbers["Feldman-Cousins, bounded Gaussian: largest |coverage - .9|, exact"] = (float(np.abs(covered - 0.9).max()), "<=", 1e-3)
    return numbers


def _gaussian_ratio() -> LRT:
    def log_likelihood(theta: Array, data: Array) -> Array:
        return np.asarray(-0.5 * (data[:, None] - theta[None, :, 0]) ** 2)

    def maximum(data: Array) -> tuple[Array, Array]:
        best = np.maximum(data, 0.0)
        return best[:, None], -0.5 * (data - best) ** 2

    return LRT(log_likelihood=log_likelihood, maximum=maximum)


def bounded(n_toys: int) -> Numbers:
    """Coverage for x ~ N(mu, 1) with mu >= 0: exact toys, learned critical values, Wilks."""
    statistic = _gaussian_ratio()
    grid = np.concatenate([np.linspace(0, 2, 17), np.linspace(2.25, 9, 28)])
    toys = neyman(lambda t, n, rng: rng.normal(t[0], 1, n), statistic, {"mu": grid}, LEVELS, n_toys=20_000, bounds=[(0, None)])
    print(toys.summary())
    rng = rng_for(1, "learned")
    theta = 9 * rng.uniform(0, 1, (N_LEARN, 1)) ** 2  # more of them where critical values change
    x = rng.normal(theta[:, 0], 1)
    learned = lf2i(theta, statistic(theta, x), statistic, LEVELS, names=["mu"], bounds=[(0, None)])
    print(learned.summary())
    mus = np.array([0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0, 6.0])
    data = [rng_for(2, "cover", i).normal(mu, 1, n_toys) for i, mu in enumerate(mus)]
    rows = [(np.array([mu]), d) for mu, d in zip(mus, data, strict=True)]
    numbers = _coverage("bounded Gaussian", rows, statistic, {"toys": toys, "learned": learned})
    check = rng.uniform(0, 8.5, (20_000, 1))
    found = coverage_map(check, learned.contains_each(rng.normal(check[:, 0], 1), check, 0.9), 0.9, names=["mu"])
    print(found.summary())
    numbers["bounded Gaussian, learned, 90 %: p of coverage = level everywhere, 20 000 simulations"] = (found.pvalue, "", None)
    return numbers


def on_off(n_toys: int) -> Numbers:
    """Coverage for on/off counting over MUS x NUS with nu profiled: exact toys, learned critical values, Wilks."""
    statistic = LRT(log_likelihood=toy.profiled, maximum=toy.maximum)
    grid = {"mu": np.concatenate([[0, 0.1, 0.2, 0.35, 0.5, 0.7], np.arange(1, 9.1, 0.5)]), "nu": np.linspace(0.4, 1.7, 7)}
    bounds = [(0, None), (0, None)]
    toys = neyman(toy.simulate, statistic, grid, LEVELS, n_toys=20_000, interest=1, profile=toy.nu_hat, bounds=bounds)
    again = neyman(
        toy.simulate, statistic, grid, LEVELS, n_toys=20_000, interest=1, profile=toy.nu_hat, nuisance="prepivoted", bounds=bounds
    )
    print(toys.summary(), again.summary(), sep="\n")
    rng = rng_for(3, "learned")
    theta = np.column_stack([9 * rng.uniform(0, 1, N_LEARN) ** 2, rng.uniform(0.4, 1.7, N_LEARN)])
    means = np.stack([theta[:, 0] * toy.S + theta[:, 1] * toy.B, toy.TAU * theta[:, 1] * toy.B], axis=1)
    counts = rng.poisson(means).astype(float)
    q = statistic(theta[:, :1], counts)
    learned = lf2i(theta, q, statistic, LEVELS, names=["mu", "nu"], interest=1, profile=toy.nu_hat, bounds=bounds, model="splines-6")
    best = np.array([toy.nu_hat(t[:1], c[None])[0] for c, t in zip(counts, theta, strict=True)])
    corrected = lf2i(
        theta, q, statistic, LEVELS, names=["mu", "nu"], interest=1, profile=toy.nu_hat, bounds=bounds, model="splines-6", profiled=best
    )
    print(learned.summary())
    truths = [(mu, nu) for mu in MUS for nu in NUS]
    rows = [(np.array(t), toy.simulate(t, n_toys, rng_for(4, "cover", i))) for i, t in enumerate(truths)]
    sets = {"toys": toys, "prepivoted": again, "learned": learned, "learned and corrected": corrected}
    numbers = _coverage("on/off", rows, statistic, sets)
    limits = expected_limits(toys, toy.simulate((0.0, 1.0), 1000, rng_for(5, "background")), kind="upper", level=0.9)
    print(limits.summary())
    numbers["on/off: median expected upper end at 90 % without signal, toys [mu]"] = (limits.median, "", None)
    return numbers


def _coverage(what: str, rows: list[tuple[Array, Array]], statistic: LRT, sets: Mapping[str, Construction]) -> Numbers:
    numbers: Numbers = {}
    for level in LEVELS:
        table: dict[str, list[float]] = {name: [] for name in (*sets, "Wilks")}
        for theta, data in rows:
            for name, construction in sets.items():
                table[name].append(float(construction.contains(data, theta[:1], level).mean()))
            table["Wilks"].append(float((statistic(theta[:1], data) <= chi2.ppf(level, 1)).mean()))
        print(f"{what}, {100 * level:.4g} %: " + ", ".join(table))
        for i, (theta, _) in enumerate(rows):
            print(f"  {np.array2string(theta, precision=3):<14}" + "  ".join(f"{column[i]:.4f}" for column in table.values()))
        # required at 90 % only; at 68.3 % the largest of 30 deviations of 4000 toys reaches .02 by chance in one run of five
        asked: tuple[str, float | None] = ("<=", 0.02) if level == 0.9 else ("", None)
        for name in sets:
            worst = float(np.abs(np.array(table[name]) - level).max())
            numbers[f"{what}, {name}, {100 * level:.4g} %: largest |coverage - level|, {len(rows)} points"] = (worst, *asked)
        at_zero = [c for (t, _), c in zip(rows, table["Wilks"], strict=True) if t[0] == 0]
        wanted = (1 + level) / 2
        numbers[f"{what}, Wilks, {100 * level:.4g} %: coverage at mu = 0"] = (float(np.mean(at_zero)), "", None)
        numbers[f"{what}, Wilks, {100 * level:.4g} %: |coverage at mu = 0 - {wanted:.3g}|"] = (
            float(abs(np.mean(at_zero) - wanted)), "<=", 0.02)  # fmt: skip
        half = [c for (t, _), c in zip(rows, table["Wilks"], strict=True) if t[0] == 0.5]
        numbers[f"{what}, Wilks, {100 * level:.4g} %: coverage at mu = 0.5"] = (float(np.mean(half)), "", None)
    return numbers


def main() -> None:
    parser = arguments(__doc__, "confidence_coverage")
    parser.add_argument("--toys", type=int, default=4000, help="data sets at each point where coverage is counted")
    options = parser.parse_args()
    parts = {"endpoints": endpoints, "bounded Gaussian": lambda: bounded(options.toys), "on/off": lambda: on_off(options.toys)}
    sys.exit(run(parts, options, {"toys": options.toys}))


if __name__ == "__main__":
    main()
