"""Classical unfolding against its requirements: oracles, coverage on a steep spectrum, covariance, background, Auger's corrections.

    python benchmarks/unfolding_classical.py [--toys 500] [--out benchmarks/results/unfolding_classical.json]

Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met.
"""

import csv
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the toys are the tests' own

# ruff: noqa: E402
from benchmarks.suite.table import Numbers, Part, arguments, run
from sbi_phys.core.rng import rng_for
from sbi_phys.unfold import IBU, Response, forward_fold, ibu, tikhonov
from sbi_phys.unfold.folding import bin_integral, broken_power_law
from tests.unfold import steep_toy

Array = NDArray[np.float64]

GAUSSIANS = {
    "OmniFold": (-8, 8, (0, 1), (0.2, 0.8), 0.5, 0),
    "IcINN": (-30, 38, (4, 4), (10, 3.8), 3, -6),
    "biased": (-10, 10, (0, 1), (-0.3, 1.2), 1, 0.5),
}
# arXiv:2008.06486: J0 = 1.315e-18, indices, breaks at 5.0, 13 and 46 EeV
AUGER_FLUX = np.array([np.log10(1.315e-18), 3.29, 2.51, 3.05, 5.1, np.log10(5.0e18), np.log10(13e18), np.log10(46e18)])


def gaussian() -> Numbers:
    """Largest deviation from the Gaussian recursion, k = 1 to 10, 600 bins."""
    worst_mean = worst_sd = 0.0
    for low, high, prior, data, sigma, bias in GAUSSIANS.values():
        edges = np.linspace(low, high, 601)
        centre = (edges[1:] + edges[:-1]) / 2
        response = Response.from_resolution(edges, edges + bias, sigma, bias)
        start, truth = (np.diff(norm.cdf(edges, *p)) for p in (prior, data))
        found = ibu(response.fold(truth), response, 10, start + 1e-30)
        m, v = float(prior[0]), float(prior[1] ** 2)
        for n in found.history[1:]:
            g = v / (v + sigma**2)
            m, v = m + g * (data[0] - m), g**2 * (data[1] ** 2 + sigma**2) + g * sigma**2
            mean = n @ centre / n.sum()
            worst_mean = max(worst_mean, abs(mean - m))
            worst_sd = max(worst_sd, abs(np.sqrt(n @ (centre - mean) ** 2 / n.sum()) - np.sqrt(v)))
    return {"Gaussian recursion |dm|": (worst_mean, "<=", 1e-3), "Gaussian recursion |ds|": (worst_sd, "<=", 1e-3)}


def jacobians() -> Numbers:
    """Largest relative deviation of the derivatives from central differences, with fakes and background, k = 1 to 10."""
    rng = rng_for(5, "jacobians")
    matrix = rng.dirichlet(np.ones(6), size=5).T * rng.uniform(0.5, 0.9, 5)
    extra: dict[str, Any] = {"fakes": rng.uniform(0, 0.3, 6), "background": rng.uniform(0, 30, 6)}
    counts, prior = rng.uniform(50, 400, 6), rng.uniform(1, 9, 5)
    response = Response(matrix, n_simulated=np.full(5, 100.0), **extra)
    worst = dict.fromkeys(("data", "prior", "response"), 0.0)
    for k in range(1, 11):
        found = ibu(counts, response, k, prior)
        pairs = {
            "data": (found.jacobian, _differences(lambda c, k=k: ibu(c, response, k, prior).counts, counts)),  # type: ignore[misc]
            "prior": (found.prior_jacobian, _differences(lambda p, k=k: ibu(counts, response, k, p).counts, prior)),  # type: ignore[misc]
            "response": (
                found.response_jacobian,
                _differences(lambda a, k=k: ibu(counts, Response(a, **extra), k, prior).counts, matrix),  # type: ignore[misc]
            ),
        }
        for name, (exact, difference) in pairs.items():
            assert exact is not None
            worst[name] = max(worst[name], float(np.abs(exact - difference).max() / np.abs(exact).max()))
    return {f"Jacobian by {name} against differences": (value, "<=", 1e-6) for name, value in worst.items()}


def _differences(function: Callable[[Array], Array], at: Array) -> Array:
    columns = []
    for i in range(at.size):
        step = np.zeros(at.size)
        step[i] = 1e-4 * max(abs(at.flat[i]), 1e-2)
        move = step.reshape(at.shape)
        columns.append((function(at + move) - function(at - move)) / (2 * step[i]))
    return np.stack(columns, axis=-1).reshape(-1, *at.shape)


def steep(n_toys: int) -> Numbers:
    """Coverage and bias of the rule on the steep toy, from three priors, and how far they are apart."""
    response = steep_toy.response()
    expected = response.fold(steep_toy.power_law(2.7))
    numbers: Numbers = {}
    found: dict[float, list[IBU]] = {}
    for index in (2.4, 2.7, 3.0):
        prior = steep_toy.power_law(index)
        pulls, found[index] = steep_toy.toys(n_toys, expected, 2, lambda c, p=prior: ibu(c, response, "coverage", p))  # type: ignore[misc]
        only = np.array([(r.counts - steep_toy.power_law(2.7)) / np.sqrt(np.diag(r.covariance_data)) for r in found[index]])
        name = f"steep, rule, prior {index}"
        numbers[f"{name}: worst-bin coverage"] = (float(steep_toy.coverage(pulls).min()), ">=", 0.60)
        numbers[f"{name}: largest |mean pull|"] = (float(np.abs(pulls.mean(axis=0)).max()), "<=", 0.5)
        numbers[f"{name}: worst-bin coverage, errors of the data alone"] = (float(steep_toy.coverage(only).min()), "", None)
        numbers[f"{name}: largest |mean pull|, errors of the data alone"] = (float(np.abs(only.mean(axis=0)).max()), "", None)
        ks = [r.n_iterations for r in found[index]]
        numbers[f"{name}: median iterations"] = (float(np.median(ks)), "", None)
        numbers[f"{name}: most iterations"] = (float(max(ks)), "", None)
        numbers[f"{name}: rule not met, share of toys"] = (
            float(np.mean([r.stopping is None or not r.stopping.met for r in found[index]])),
            "",
            None,
        )
    numbers |= _apart(found)
    prior = steep_toy.power_law(3.0)
    for k in (4, 20):
        pulls, _ = steep_toy.toys(n_toys, expected, 2, lambda c, k=k: ibu(c, response, k, prior))  # type: ignore[misc]
        numbers[f"steep, {k} iterations, prior 3.0: worst-bin coverage"] = (float(steep_toy.coverage(pulls).min()), "", None)
    pulls, _ = steep_toy.toys(min(n_toys, 200), expected, 2, lambda c: tikhonov(c, response, prior=prior))
    numbers["steep, Tikhonov, prior 3.0: worst-bin coverage"] = (float(steep_toy.coverage(pulls).min()), "", None)
    numbers["steep, Tikhonov, prior 3.0: largest |mean pull|"] = (float(np.abs(pulls.mean(axis=0)).max()), "", None)
    return numbers


def _apart(found: dict[float, list[IBU]]) -> Numbers:
    # largest difference between priors in a bin, in the error that is quoted: on average over toys, and in a typical toy
    counts = np.array([[r.counts for r in runs] for runs in found.values()])
    errors = np.array([[r.errors for r in runs] for runs in found.values()]).mean(axis=0)
    mean = np.ptp(counts.mean(axis=1), axis=0) / errors.mean(axis=0)
    each = (np.ptp(counts, axis=0) / errors).max(axis=1)
    return {
        "steep, rule: priors 2.4, 2.7, 3.0 apart, worst bin, mean of toys [sigma]": (float(mean.max()), "<=", 0.6),
        "steep, rule: priors apart, worst bin, median toy [sigma]": (float(np.median(each)), "", None),
    }


def bottom_line() -> Numbers:
    """chi2 between index 2.70 and 2.72, unfolded with full covariance over measured."""
    response = steep_toy.response()
    one, two = (response.fold(steep_toy.power_law(g)) for g in (2.70, 2.72))
    measured = float(((one - two) ** 2 / one).sum())
    numbers: Numbers = {"bottom line: chi2 measured": (measured, "", None)}
    for k in (1, 4, 20, 50):
        a, b = (ibu(c, response, k, steep_toy.power_law(3.0)) for c in (one, two))
        difference = (a.counts - b.counts) / a.errors
        ratio = float(difference @ np.linalg.solve(a.correlation, difference)) / measured
        numbers[f"bottom line: unfolded / measured, {k} iterations"] = (ratio, "<=" if k >= 4 else "", 1.02 if k >= 4 else None)
    return numbers


def extras(n_toys: int) -> Numbers:
    """Largest |mean pull| with a tenth of background, and of fakes."""
    plain, truth = steep_toy.response(), steep_toy.power_law(2.7)
    numbers: Numbers = {}
    cases: dict[str, dict[str, Any]] = {"background": {"background": 0.1 * plain.fold(truth)}, "fakes": {"fakes": np.full(20, 0.1)}}
    for name, extra in cases.items():
        response = steep_toy.response(**extra)
        pulls, _ = steep_toy.toys(n_toys, response.fold(truth), 6, lambda c, r=response: ibu(c, r, 20, truth))  # type: ignore[misc]
        numbers[f"10 % {name}: largest |mean pull|"] = (float(np.abs(pulls.mean(axis=0)).max()), "<=", 0.5)
        numbers[f"10 % {name}: worst-bin coverage"] = (float(steep_toy.coverage(pulls).min()), "", None)
    return numbers


def auger() -> Numbers:
    """Forward folding of the 2020 counts with its resolution, Gaussian in E, against the published corrections."""
    if importlib.util.find_spec("iminuit") is None:
        return {}
    table = [
        line for line in (ROOT / "simulators/data/auger_2020_vertical_spectrum.csv").read_text().splitlines() if not line.startswith("#")
    ]
    rows = list(csv.DictReader(table))
    column = {name: np.array([float(r[name]) for r in rows]) for name in rows[0]}
    centre, half = column["lg_energy"], column["lg_half_width"]
    reco_edges = np.append(centre - half, centre[-1] + half[-1])
    truth_edges = np.arange(reco_edges[0] - 0.6, reco_edges[-1] + 0.301, 0.02)

    def sigma(energy_eev: Array) -> Array:
        return np.asarray((0.078 + 0.16 * np.exp(-energy_eev / 6.6)) * energy_eev)

    # Gaussian in E: integrated on that axis, in truth bins so narrow that the spectrum within does not matter
    on_energy = Response.from_resolution(10 ** (truth_edges - 18), 10 ** (reco_edges - 18), sigma)
    response = Response(on_energy.matrix, truth_edges, reco_edges, exposure=float(np.median(column["exposure"])))
    found = forward_fold(column["raw_counts"], response, n_breaks=3, start=AUGER_FLUX)
    print(found.summary())
    ratio = found.correction / column["unfolding_correction"]
    inside = (centre > 18.54) & (centre < 19.66)
    at_published = bin_integral(broken_power_law, reco_edges, AUGER_FLUX) / response.fold(
        bin_integral(broken_power_law, truth_edges, AUGER_FLUX)
    )
    print("lgE: correction, published, ratio\n" + "\n".join(f"  {x:.2f}: {c:.3f} {p:.3f} {r:.3f}" for x, c, p, r in zip(
        centre, found.correction, column["unfolding_correction"], ratio, strict=True)))  # fmt: skip
    return {
        "Auger: correction over published - 1, 18.55 to 19.65": (float(np.abs(ratio - 1)[inside].max()), "<=", 0.02),
        "Auger: the same over all bins": (float(np.abs(ratio - 1).max()), "", None),
        "Auger: the same for the published flux, not fitted, 18.55 to 19.65": (
            float(np.abs(at_published / column["unfolding_correction"] - 1)[inside].max()),
            "<=",
            0.02,
        ),
        "Auger: refolded chi2 / ndf": (found.chi2 / found.ndf, "", None),
    }


def main() -> None:
    parser = arguments(__doc__, "unfolding_classical")
    parser.add_argument("--toys", type=int, default=500)
    options = parser.parse_args()
    parts: dict[str, Part] = {
        "gaussian": gaussian, "jacobians": jacobians, "bottom line": bottom_line, "auger": auger,
        "extras": lambda: extras(options.toys), "steep": lambda: steep(options.toys),
    }  # fmt: skip
    sys.exit(run(parts, options, {"toys": options.toys}))


if __name__ == "__main__":
    main()
