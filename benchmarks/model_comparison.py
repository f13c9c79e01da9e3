"""Comparison of models against closed forms: amortised Bayes factors, importance-sampled evidence, toys, and the test of calibration.

    python benchmarks/model_comparison.py [--n 200000] [--only gaussian] [--out benchmarks/results/model_comparison.json]

gaussian    two conjugate linear Gaussian models, 4 correlated numbers, 2 parameters: 100 data sets
poisson     two Poisson models with gamma priors of one mean on the rate, 4 counts each: 100 data sets
evidence    evidence by importance sampling from an NPE of the same Gaussian models: 20 data sets
test        size and power of the test of calibrated probabilities, 1000 repetitions
toys        p-value of a signal in an on/off experiment against the sum over all counts
Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met.
"""

import os
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, gammaln
from scipy.stats import multivariate_normal

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the toys are the tests' own

# ruff: noqa: E402
import sbi_phys as sp
from benchmarks.suite.table import Numbers, Part, arguments, run
from sbi_phys.comparison import ModelComparison, check_probabilities, compare_evidence, model_comparison, nested_test
from sbi_phys.core.rng import rng_for
from sbi_phys.training.loop import TrainConfig
from simulators import OnOff
from tests.toys import LinearGaussian

Array = NDArray[np.float64]
GAUSSIAN = {sd: LinearGaussian(dim=2, n_columns=4, noise=1.0, prior_sd=sd) for sd in (0.5, 1.0)}
# shape and rate of the gamma priors on the rate, and the number of counts
GAMMA = {"wide": (2.0, 0.5), "narrow": (4.0, 1.0)}
N_COUNTS = 4


def gaussian_log_evidence(sim: LinearGaussian, x: Array) -> Array:
    """log N(x; 0, s^2 A A^T + noise^2 I)."""
    covariance = sim.settings["prior_sd"] ** 2 * sim.matrix @ sim.matrix.T + sim.noise**2 * np.eye(len(sim.matrix))
    return np.asarray(multivariate_normal.logpdf(x, np.zeros(len(covariance)), covariance))


def gamma_log_evidence(shape: float, rate: float, x: Array) -> Array:
    """Counts Pois(r), r ~ Gamma(shape, rate), integrated over r, up to the product of factorials."""
    total = x.sum(axis=-1)
    return np.asarray(shape * np.log(rate) - gammaln(shape) + gammaln(shape + total) - (shape + total) * np.log(rate + N_COUNTS))


def draw_gamma(shape: float, rate: float, n: int, rng: np.random.Generator) -> Array:
    return rng.poisson(rng.gamma(shape, 1 / rate, n)[:, None], (n, N_COUNTS)).astype(np.float64)


def compared(name: str, got: Array, want: Array) -> Numbers:
    error = np.abs(got - want)
    return {
        f"{name}: largest error of the log Bayes factor, 100 data sets": (float(error.max()), "<=", 0.1),
        f"{name}: root mean square error": (float(np.sqrt((error**2).mean())), "", None),
        f"{name}: median |log Bayes factor|": (float(np.median(np.abs(want))), "", None),
        f"{name}: largest |log Bayes factor|": (float(np.abs(want).max()), "", None),
    }


def calibration(name: str, result: ModelComparison) -> Numbers:
    check = result.calibration
    assert check is not None
    print(check.summary(), flush=True)
    return {
        f"{name}: p-value of the calibration, {check.n} data sets": (check.pvalue, ">=", 0.05),
        f"{name}: calibration error over that of perfect probabilities": (check.ece / check.null_ece, "", None),
    }


def gaussian(n: int) -> Numbers:
    models = {f"prior sd {sd}": sim for sd, sim in GAUSSIAN.items()}
    result = model_comparison(models, n_simulations=n, n_ensemble=2, n_check=5000, device="cpu")
    rng = rng_for(31)
    x = np.concatenate([s.simulate(s.prior.sample(50, rng), rng) for s in GAUSSIAN.values()])
    want = gaussian_log_evidence(GAUSSIAN[1.0], x) - gaussian_log_evidence(GAUSSIAN[0.5], x)
    got = result.log_bayes_factor(x, "prior sd 1.0", "prior sd 0.5")
    return compared("Gaussian", got, want) | calibration("Gaussian", result)


def poisson(n: int) -> Numbers:
    x = {name: draw_gamma(*prior, n + 5000, rng_for(32, name)) for name, prior in GAMMA.items()}
    result = model_comparison(x, n_ensemble=2, n_check=5000, device="cpu")
    data = np.concatenate([draw_gamma(*prior, 50, rng_for(33, name)) for name, prior in GAMMA.items()])
    want = gamma_log_evidence(*GAMMA["narrow"], data) - gamma_log_evidence(*GAMMA["wide"], data)
    return compared("Poisson", result.log_bayes_factor(data, "narrow", "wide"), want) | calibration("Poisson", result)


def evidence() -> Numbers:
    rng, posteriors = rng_for(34), {}
    for sd, sim in GAUSSIAN.items():
        theta = sim.prior.sample(5000, rng)
        config = TrainConfig(max_epochs=15)
        posteriors[f"prior sd {sd}"] = (sim, sp.NPE(sim.prior, config=config, device="cpu").fit(theta, sim.simulate(theta, rng)))
    pulls, errors = [], []
    for i in range(20):
        source = GAUSSIAN[(0.5, 1.0)[i % 2]]
        x = source.simulate(source.prior.sample(1, rng), rng)[0]
        value, error = compare_evidence(posteriors, x, n_draws=5000, seed=i).log_bayes_factor("prior sd 1.0", "prior sd 0.5")
        want = float(gaussian_log_evidence(GAUSSIAN[1.0], x) - gaussian_log_evidence(GAUSSIAN[0.5], x))
        pulls.append((value - want) / error)
        errors.append(abs(value - want))
    return {
        "evidence: largest error of the log Bayes factor, 20 data sets": (float(np.max(errors)), "<=", 0.1),
        "evidence: largest |pull|": (float(np.abs(pulls).max()), "<=", 4.0),
        "evidence: sd of the pulls": (float(np.std(pulls)), "", None),
    }


def test() -> Numbers:
    def rejected(n_repeats: int, n: int, sharpen: float) -> float:
        count = 0
        for i in range(n_repeats):
            rng = rng_for(35, n, i)
            f = 2 * rng.standard_normal(n)
            label = (rng.random(n) < expit(f)).astype(int)
            p = expit(sharpen * f)
            count += check_probabilities(np.column_stack([1 - p, p]), label, n_toys=199, seed=i).pvalue <= 0.05
        return count / n_repeats

    return {
        "test of calibration: rejects right probabilities at 5 %, n = 500": (rejected(1000, 500, 1.0), "<=", 0.065),
        "test of calibration: finds scores x1.3, n = 2000": (rejected(100, 2000, 1.3), ">=", 0.9),
        "test of calibration: finds scores x0.75, n = 2000": (rejected(100, 2000, 0.75), ">=", 0.9),
    }


def toys() -> Numbers:
    sim = OnOff()
    x = np.array([105.0, 70.0])
    result = nested_test(sim, x, lambda c: sim.profile_ratio(c, 0.0), [0.0, 1.0], n_toys=20_000, dof=1)
    grid = np.stack(np.meshgrid(np.arange(200.0), np.arange(200.0), indexing="ij"), axis=-1).reshape(-1, 2)
    weight = np.exp(sim.log_likelihood(grid, np.tile([0.0, 1.0], (len(grid), 1))))
    exact = float(weight[sim.profile_ratio(grid, 0.0) >= result.statistic - 1e-9].sum())
    print(result.summary(), f"exact p = {exact:.5f}", flush=True)
    error = np.sqrt(exact * (1 - exact) / 20_000)
    return {
        "toys: p-value over the exact one": (result.pvalue / exact, "", None),
        "toys: |difference| in standard errors": (abs(result.pvalue - exact) / error, "<=", 3.0),
        "toys: Wilks' p-value over the exact one": (float(result.wilks or 0) / exact, "", None),
    }


def main() -> None:
    parser = arguments(__doc__, "model_comparison")
    parser.add_argument("--n", type=int, default=200_000, help="simulations a model")
    options = parser.parse_args()
    parts: dict[str, Part] = {
        "gaussian": lambda: gaussian(options.n), "poisson": lambda: poisson(options.n), "evidence": evidence, "test": test, "toys": toys,
    }  # fmt: skip
    sys.exit(run(parts, options, {"n": options.n}))


if __name__ == "__main__":
    main()
