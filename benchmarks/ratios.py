"""Learned ratios against their requirements: a toy with an exact ratio, and posteriors of the two-parameter source spectrum.

    python benchmarks/ratios.py [--n 20000] [--observations 8] [--threads 2] [--no-peer] [--only toy|source]

Toy: z ~ N(theta, 1), x ~ N(z, 2), theta in [-4, 4] against theta = 0; log r = (x theta - theta^2 / 2) / 5, score (x - theta) / 5. Learned
from 1e5 events by labels (CARL), joint ratios (ALICE) and joint scores (SALLY); ratios recalibrated per theta on 1e5 + 1e5 further
events and checked on as many again; the reweighting area with a standard error of 0.002, compared with that of the exact ratio on the
same events. Source spectrum: NRE's and sbi's posteriors against the exact ones by grid, and NRE's ratio, as learned and divided by its
mean over the prior, against the exact one, with p(x) by grid. Prints each number with its required value, writes JSON and
exits with 1 if a requirement is not met.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from benchmarks.suite.table import Numbers, arguments, run
from benchmarks.suite.workers import Worker, WorkerError
from sbi_phys.calibration import c2st
from sbi_phys.calibration.ratios import RatioCalibration, ReweightingAUC, check_ratio, recalibrate_ratio, reweighting_auc
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.base import load
from sbi_phys.estimators.hypotheses import HypothesisRatio, TwoHypotheses
from sbi_phys.estimators.mined import SALLY, MinedRatio
from sbi_phys.estimators.nre import NRE
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.grid import grid_posterior
from simulators import SourceSpectrum

Array = NDArray[np.float64]

PEERS = ROOT / ".venv-bench/bin/python"
N_DRAWS, N_JUDGED = 10_000, 2_000
N_EVENTS, N_CHECK, N_AREA = 100_000, 100_000, 160_000
REACH = 4.0
N_EXACT = 100
THETAS = (-4.0, -2.0, -1.0, 1.0, 2.0, 4.0)


def latent(theta: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """z and x of the toy, (n, 1) each."""
    z = theta + rng.standard_normal(theta.shape)
    return z, z + 2 * rng.standard_normal(theta.shape)


def exact_log_ratio(x: Array, theta: Array) -> Array:
    """log p(x | theta) - log p(x | 0), (n,)."""
    return ((x * theta - theta**2 / 2) / 5)[:, 0]


def toy(seed: int) -> Numbers:
    """CARL, ALICE and SALLY on the toy."""
    rng = rng_for(seed, "toy")
    half = N_EVENTS // 2
    theta0 = rng.uniform(-REACH, REACH, (N_EVENTS, 1))
    y = np.repeat([1, 0], half)
    z, x = latent(theta0 * y[:, None], rng)
    zero = np.zeros((N_EVENTS, 1))
    # fresh pairs, half of either kind
    theta_test = rng.uniform(-REACH, REACH, (40_000, 1))
    _, x_test = latent(theta_test * (np.arange(40_000)[:, None] % 2), rng)
    truth = exact_log_ratio(x_test, theta_test)

    numbers: Numbers = {"toy: variance of the exact log r": (float(truth.var()), "", None)}
    begin = time.perf_counter()
    carl = TwoHypotheses(seed=seed, device="cpu").fit(theta0[:half], x[:half], [0.0], x[half:])
    numbers["CARL: seconds"] = (time.perf_counter() - begin, "", None)
    begin = time.perf_counter()
    alice = MinedRatio(seed=seed, loss="alice", device="cpu").fit(theta0, zero, x, y, ((z - theta0 / 2) * theta0)[:, 0])
    numbers["ALICE: seconds"] = (time.perf_counter() - begin, "", None)
    for name, ratio, bound in (("CARL", carl, 0.06), ("ALICE", alice, 0.025)):
        error = ratio.log_ratio(x_test, theta_test, [0.0]) - truth
        numbers[f"{name}: MSE(log r)"] = (float((error**2).mean()), "<=", bound)
        numbers |= calibrated(name, ratio, seed)
        print(f"{name} done", flush=True)
    return numbers | sally(seed)


def areas(ratio: HypothesisRatio, repair: RatioCalibration, theta: float, seed: int, rng: np.random.Generator) -> list[ReweightingAUC]:
    """Reweighting areas at theta of the ratio as learned, recalibrated and exact, on the same events: errors of .002 or less.

    Weights r have a variance that grows like exp(theta^2 / 5), and the number of reference events with it.
    """
    x1, x0 = (latent(np.full((n, 1), t), rng)[1] for n, t in ((N_AREA, theta), (int(N_AREA * np.exp(0.8 * theta**2 / 5)), 0.0)))
    learned = ratio.log_ratio(x0, [theta], [0.0])
    logs = (learned, repair.apply(learned), exact_log_ratio(x0, np.array([[theta]])))
    return [reweighting_auc(x1, x0, log_r, seed=seed) for log_r in logs]


def calibrated(name: str, ratio: HypothesisRatio, seed: int) -> Numbers:
    """Mean ratio and reweighting AUC per theta, after recalibration on events of their own."""
    near, far, raw, found, failed = 0.0, 0.0, 0.0, [], 0
    for theta in THETAS:
        rng = rng_for(seed, "check", name, str(theta))
        samples = [[latent(np.full((N_CHECK, 1), t), rng)[1] for t in (theta, 0.0)] for _ in range(2)]
        (num_a, ref_a), (num_b, ref_b) = [[ratio.log_ratio(x, [theta], [0.0]) for x in pair] for pair in samples]
        repair = recalibrate_ratio(num_a, ref_a)
        checks = check_ratio(repair.apply(num_b), repair.apply(ref_b), *samples[1], seed=seed)
        deviation = abs(float(checks.mean.mean["E_ref[r]"][0]) - 1)
        raw = max(raw, abs(float(np.exp(ref_b).mean()) - 1))
        near, far = (max(near, deviation), far) if abs(theta) <= 2 else (near, max(far, deviation))
        failed += checks.pvalue < 0.01
        print(f"{name}, theta = {theta}: {repair.summary()}\n{checks.summary()}", flush=True)
        found.append(areas(ratio, repair, theta, seed, rng))
        for what, area in zip(("as learned", "calibrated", "exact"), found[-1], strict=True):
            print(f"  {what}: {area.summary()}", flush=True)
    learned, mended, exact = zip(*found, strict=True)
    return {
        f"{name}: |E[r] - 1|, |theta| <= 2, calibrated": (near, "<=", 0.03),
        f"{name}: |E[r] - 1|, |theta| = 4, calibrated": (far, "<=", 0.10),
        f"{name}: |E[r] - 1|, largest, before calibration": (raw, "", None),
        f"{name}: largest reweighting AUC, calibrated": (max(map(float, mended)), "<=", 0.51),
        f"{name}: largest reweighting AUC, as learned": (max(map(float, learned)), "", None),
        f"{name}: largest reweighting AUC of the exact ratio on the same events": (max(map(float, exact)), "", None),
        f"{name}: largest error of a reweighting AUC": (max(area.error for area in mended), "<=", 0.002),
        f"{name}: thetas of {len(THETAS)} whose checks together give p < 0.01": (float(failed), "", None),
    }


def sally(seed: int) -> Numbers:
    """Slope of the score at theta_ref = 0.5."""
    rng = rng_for(seed, "sally")
    reference = np.full((N_EVENTS, 1), 0.5)
    z, x = latent(reference, rng)
    begin = time.perf_counter()
    found = SALLY(seed=seed, device="cpu").fit(x, z - reference)
    seconds = time.perf_counter() - begin
    _, fresh = latent(reference, rng)
    slope = float(np.polyfit(fresh[:, 0] - 0.5, found.score(fresh)[:, 0], 1)[0])
    return {
        "SALLY: seconds": (seconds, "", None),
        "SALLY: score slope": (slope, "", None),
        "SALLY: |slope - 0.2|": (abs(slope - 0.2), "<=", 0.01),
        "SALLY: information, exact 0.2": (float(found.information(fresh)[0, 0]), "", None),
    }


def simulate(n: int, seed: int) -> tuple[SourceSpectrum, Array, Array, Array, Array]:
    """Simulator, training pairs and 2000 fresh pairs."""
    simulator = SourceSpectrum(composition="fixed")
    rng, fresh = rng_for(seed, "training"), rng_for(seed, "test")
    theta, theta_test = simulator.prior.sample(n, rng), simulator.prior.sample(2000, fresh)
    return simulator, theta, simulator.simulate(theta, rng), theta_test, simulator.simulate(theta_test, fresh)


def exact_draws(simulator: SourceSpectrum, x: Array, seed: int) -> Array:
    """Draws of the exact posterior by grid (N_JUDGED, 2)."""
    prior = simulator.prior

    def log_target(u: Array) -> Array:
        return simulator.log_likelihood(x, prior.from_unbounded(u)) + standard_normal_log_prob(u)

    return prior.from_unbounded(grid_posterior(log_target, [-8, -8], [8, 8]).sample(N_JUDGED, rng_for(seed, "exact")))


def exact_evidence(simulator: SourceSpectrum, x: Array) -> float:
    """log p(x) by grid."""

    def log_target(u: Array) -> Array:
        return simulator.log_likelihood(x, simulator.prior.from_unbounded(u)) + standard_normal_log_prob(u)

    # a tenth of the mass in a cell leaves half a percent
    return grid_posterior(log_target, [-8, -8], [8, 8], n_cells=20_000, max_cell_mass=0.2).log_evidence


def ratio_itself(simulator: SourceSpectrum, nre: NRE, theta: Array, x: Array) -> Numbers:
    """Checks of r on held-out pairs, and its error where the evidence is known, as learned and divided by its mean over the prior."""
    joint, marginal = nre.log_ratio_pairs(theta, x)
    begin = time.perf_counter()
    mean = nre.prior_mean(x)
    seconds = time.perf_counter() - begin
    print(f"{mean.summary()}; {seconds:.1f} s", flush=True)
    exact = np.array([simulator.log_likelihood(x[i], theta[i : i + 1])[0] - exact_evidence(simulator, x[i]) for i in range(N_EXACT)])
    columns = np.sqrt(x)
    pairs = np.column_stack([columns, theta]), np.column_stack([columns, np.roll(theta, -1, axis=0)])
    numbers: Numbers = {
        "NRE: mean log r of held-out pairs, normalised, nats": (float((joint - mean.log_mean).mean()), "", None),
        "NRE: seconds for 2000 means over the prior": (seconds, "", None),
        "NRE: fewest effective draws of a mean over the prior": (float(mean.n_effective.min()), ">=", 50),
    }
    for what, shift, sign, bound in (("as learned", 0.0, "", None), ("normalised", mean.log_mean, ">=", 0.01)):
        checks = check_ratio(joint - shift, marginal - shift, *pairs)
        print(f"{what}: {checks.summary()}", flush=True)
        error = (joint - shift)[:N_EXACT] - exact
        numbers |= {
            f"NRE: p-value of the checks on 2000 held-out pairs, {what}": (checks.pvalue, sign, bound),
            f"NRE: E_num[d] + E_ref[d], {what}": (float(checks.mean.mean["E_num[d] + E_ref[d]"][0]), "", None),
            f"NRE: rms of log r - exact over {N_EXACT} pairs, {what}, nats": (float(np.sqrt((error**2).mean())), "", None),
            f"NRE: median |log r - exact|, {what}, nats": (float(np.median(np.abs(error))), "", None),
        }
    return numbers


def source(
    n: int, n_observations: int, threads: int, seed: int, peer: bool, loss: str, peer_epochs: int, model: Path | None = None
) -> Numbers:
    """NRE on the source spectrum, against the grid, compared with sbi."""
    simulator, theta, x, theta_test, x_test = simulate(n, seed)
    if model is not None and model.exists():
        found = load(model)
        assert isinstance(found, NRE)
        nre = found
    else:
        nre = NRE(simulator.prior, seed=seed, loss=loss, observables=simulator.observables)
        nre.fit(theta, x, checkpoint=None if model is None else model.with_suffix(".training"))
        if model is not None:
            nre.save(model)
    training = sum(record["seconds"] for record in nre.history[0])
    print(f"trained on {n} simulations in {training:.1f} s, {len(nre.history[0])} epochs", flush=True)
    itself = ratio_itself(simulator, nre, theta_test, x_test)
    scores, seconds = [], []
    exact = [exact_draws(simulator, x_test[i], i) for i in range(n_observations)]
    for i in range(n_observations):
        begin = time.perf_counter()
        draws = nre.posterior(x_test[i], N_DRAWS, seed=i)
        seconds.append(time.perf_counter() - begin)
        with threadpool_limits(1, "blas"):
            scores.append(c2st(draws.theta[:N_JUDGED], exact[i], workers=threads).accuracy)
        print(f"observation {i + 1}: C2ST {scores[-1]:.3f}, {seconds[-1]:.1f} s; {draws.summary()}", flush=True)
    numbers: Numbers = {
        "NRE: training seconds": (training, "", None),
        **itself,
        f"NRE: mean C2ST over {n_observations} observations": (float(np.mean(scores)), "<=", 0.60),
        "NRE: largest C2ST": (float(np.max(scores)), "", None),
        "NRE: longest time for 1e4 draws, s": (float(np.max(seconds)), "<=", 10.0),
    }
    if peer and PEERS.exists():
        try:
            numbers |= sbi_numbers(simulator, theta, x, x_test, exact, threads, seed, peer_epochs)
        except WorkerError as err:
            print(f"sbi could not be measured: {err}", flush=True)
    return numbers


def sbi_numbers(
    simulator: SourceSpectrum, theta: Array, x: Array, x_test: Array, exact: list[Array], threads: int, seed: int, max_epochs: int
) -> Numbers:
    """sbi's NRE-C with its defaults on the same simulations, the counts after Anscombe's root and standardised."""
    root, root_test = 2 * np.sqrt(x + 0.375), 2 * np.sqrt(x_test + 0.375)
    mean, scale = root.mean(axis=0), np.maximum(root.std(axis=0), 1.0)
    low, high = np.array([(p.low, p.high) for p in simulator.parameters], dtype=np.float64).T
    scores, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "toy.npz", Path(folder) / "draws.npy"
        np.savez(data, theta=theta, z=(root - mean) / scale, z_test=(root_test[:100] - mean) / scale, low=low, high=high)
        worker = Worker(PEERS, "benchmarks.peers.sbi_nre_worker", threads=threads, log=Path(folder) / "sbi.log")
        try:
            print(f"sbi: {worker.call('info')}", flush=True)
            trained = worker.call("train", data=str(data), key="nre-c", seed=seed, max_epochs=max_epochs, timeout=1200.0)
            print(f"sbi: trained in {trained['seconds']:.1f} s, {trained['epochs']} epochs", flush=True)
            for i in range(min(3, len(exact))):
                question = {"data": str(data), "key": "nre-c", "observation": i, "n_draws": N_DRAWS, "seed": i, "out": str(out)}
                seconds.append(worker.call("sample", **question, timeout=600.0))
                with threadpool_limits(1, "blas"):
                    scores.append(c2st(np.load(out).astype(np.float64)[rng_for(i).permutation(N_DRAWS)[:N_JUDGED]], exact[i]).accuracy)
                print(f"sbi, observation {i + 1}: C2ST {scores[-1]:.3f}, {seconds[-1]:.1f} s", flush=True)
        finally:
            worker.close()
    return {
        "sbi NRE-C: training seconds": (float(trained["seconds"]), "", None),
        "sbi NRE-C: epochs": (float(trained["epochs"]), "", None),
        f"sbi NRE-C: mean C2ST over the first {len(scores)} observations": (float(np.mean(scores)), "", None),
        "sbi NRE-C: shortest time for 1e4 draws, s": (float(np.min(seconds)), "", None),
    }


def main() -> None:
    parser = arguments(__doc__, "ratios")
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--observations", type=int, default=8)
    parser.add_argument("--loss", default="nre-c")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-epochs", type=int, default=0, help="most epochs of sbi's training; 0: until its own stopping rule ends it")
    parser.add_argument("--model", type=Path, help="the source spectrum's NRE: read if it is there, else trained and written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def spectrum() -> Numbers:
        o = options
        return source(o.n, o.observations, o.threads, o.seed, not o.no_peer, o.loss, o.peer_epochs, o.model)

    facts = {"n_simulations": options.n, "threads": options.threads}
    sys.exit(run({"toy": lambda: toy(options.seed), "source": spectrum}, options, facts))


if __name__ == "__main__":
    main()
