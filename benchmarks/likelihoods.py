"""Learned likelihoods against their requirements on the two-parameter source spectrum, compared with sbi in the same run.

    python benchmarks/likelihoods.py [--n 20000] [--layers N] [--observations 8] [--threads 2] [--no-peer] [--only source|sets]

The flow is the default one, for columns of counts a conditional Gaussian with full covariance over the stabilised, dequantised counts;
`--layers` adds spline couplings after it (its numbers are written under another name, without a requirement).
Posteriors by NLE against the exact ones by grid: mean C2ST; the divergence E[log p(x | theta) - log q(x | theta)] per data set over fresh
pairs; seconds for 1e4 posterior draws. Then the extended likelihood of a million events. Prints each number with its required value,
writes JSON and exits with 1 if a requirement is not met.
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
from threadpoolctl import threadpool_limits

from benchmarks.suite.table import Numbers, arguments, run
from benchmarks.suite.workers import Worker, WorkerError
from sbi_phys.calibration import c2st
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.extended_likelihood import ExtendedLikelihood
from sbi_phys.estimators.nle import NLE
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.priors import BoxPrior, Parameter, standard_normal_log_prob
from sbi_phys.samplers.grid import grid_posterior
from sbi_phys.training.loop import TrainConfig
from simulators import SourceSpectrum

Array = NDArray[np.float64]

PEERS = ROOT / ".venv-bench/bin/python"
N_DRAWS, N_JUDGED = 10_000, 2_000


def simulate(n: int, seed: int) -> tuple[SourceSpectrum, Array, Array, Array, Array]:
    """Simulator, training pairs and 500 fresh pairs."""
    simulator = SourceSpectrum(composition="fixed")
    rng, fresh = rng_for(seed, "training"), rng_for(seed, "test")
    theta, theta_test = simulator.prior.sample(n, rng), simulator.prior.sample(500, fresh)
    return simulator, theta, simulator.simulate(theta, rng), theta_test, simulator.simulate(theta_test, fresh)


def exact_draws(simulator: SourceSpectrum, x: Array, seed: int) -> Array:
    """Draws of the exact posterior by grid (N_JUDGED, 2)."""
    prior = simulator.prior

    def log_target(u: Array) -> Array:
        return simulator.log_likelihood(x, prior.from_unbounded(u)) + standard_normal_log_prob(u)

    return prior.from_unbounded(grid_posterior(log_target, [-8, -8], [8, 8]).sample(N_JUDGED, rng_for(seed, "exact")))


def source(n: int, layers: int | None, n_observations: int, threads: int, seed: int, peer: bool, peer_epochs: int) -> Numbers:
    """NLE on the source spectrum, against the grid, compared with sbi."""
    simulator, theta, x, theta_test, x_test = simulate(n, seed)
    begin = time.perf_counter()
    flow = "auto" if layers is None else FlowConfig(n_layers=layers, hidden=32)
    nle = NLE(simulator.prior, seed=seed, flow=flow, observables=simulator.observables).fit(theta, x)
    training = time.perf_counter() - begin
    print(f"trained on {n} simulations in {training:.1f} s, {len(nle.history[0])} epochs", flush=True)
    gain = simulator.log_likelihood(x_test, theta_test) - nle.log_likelihood(x_test, theta_test)
    scores, seconds = [], []
    exact = [exact_draws(simulator, x_test[i], i) for i in range(n_observations)]
    for i in range(n_observations):
        begin = time.perf_counter()
        found = nle.posterior(x_test[i], N_DRAWS, seed=i)
        seconds.append(time.perf_counter() - begin)
        with threadpool_limits(1, "blas"):
            scores.append(c2st(found.theta[:N_JUDGED], exact[i], workers=threads).accuracy)
        print(f"observation {i + 1}: C2ST {scores[-1]:.3f}, {seconds[-1]:.1f} s; {found.summary()}", flush=True)
    numbers: Numbers = {
        "NLE: training seconds": (training, "", None),
        "NLE: E[log p(x|theta) - log q(x|theta)], nats": (float(gain.mean()), "", None),
        "NLE: its error, nats": (float(gain.std() / np.sqrt(len(gain))), "", None),
        f"NLE: mean C2ST over {n_observations} observations": (float(np.mean(scores)), "<=", 0.56),
        "NLE: largest C2ST": (float(np.max(scores)), "", None),
        "NLE: longest time for 1e4 draws, s": (float(np.max(seconds)), "<=", 10.0),
    }
    if layers is not None:
        numbers = {name.replace("NLE:", f"NLE, {layers} couplings:"): (value, "", None) for name, (value, _, _) in numbers.items()}
    if peer and PEERS.exists():
        try:
            numbers |= sbi_numbers(simulator, theta, x, x_test, exact, threads, seed, peer_epochs)
        except WorkerError as err:
            print(f"sbi could not be measured: {err}", flush=True)
    return numbers


def sbi_numbers(
    simulator: SourceSpectrum, theta: Array, x: Array, x_test: Array, exact: list[Array], threads: int, seed: int, max_epochs: int
) -> Numbers:
    """sbi's NLE with its defaults on the same simulations, the counts after Anscombe's root and standardised."""
    root, root_test = 2 * np.sqrt(x + 0.375), 2 * np.sqrt(x_test + 0.375)
    mean, scale = root.mean(axis=0), np.maximum(root.std(axis=0), 1.0)
    low, high = np.array([(p.low, p.high) for p in simulator.parameters], dtype=np.float64).T
    scores, seconds = [], []
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder) / "toy.npz", Path(folder) / "draws.npy"
        np.savez(data, theta=theta, z=(root - mean) / scale, z_test=(root_test - mean) / scale, low=low, high=high)
        worker = Worker(PEERS, "benchmarks.peers.sbi_nle_worker", threads=threads, log=Path(folder) / "sbi.log")
        try:
            print(f"sbi: {worker.call('info')}", flush=True)
            trained = worker.call("train", data=str(data), key="nle", seed=seed, max_epochs=max_epochs)
            print(f"sbi: trained in {trained['seconds']:.1f} s, {trained['epochs']} epochs", flush=True)
            for i in range(min(3, len(exact))):
                seconds.append(
                    worker.call("sample", data=str(data), key="nle", observation=i, n_draws=N_DRAWS, seed=i, out=str(out), timeout=600.0)
                )
                with threadpool_limits(1, "blas"):
                    scores.append(c2st(np.load(out).astype(np.float64)[rng_for(i).permutation(N_DRAWS)[:N_JUDGED]], exact[i]).accuracy)
                print(f"sbi, observation {i + 1}: C2ST {scores[-1]:.3f}, {seconds[-1]:.1f} s", flush=True)
        finally:
            worker.close()
    return {
        "sbi NLE: training seconds": (float(trained["seconds"]), "", None),
        "sbi NLE: epochs": (float(trained["epochs"]), "", None),
        f"sbi NLE: mean C2ST over the first {len(scores)} observations": (float(np.mean(scores)), "", None),
        "sbi NLE: shortest time for 1e4 draws, s": (float(np.min(seconds)), "", None),
    }


def sets() -> Numbers:
    """Extended likelihood of a million events: against the closed form with the exact density, and the time of a learned one."""
    prior = BoxPrior([Parameter("rate", 1e5, 1e7), Parameter("decay", 0.5, 2.0)])
    events = rng_for(0, "events").exponential(1.0, (10**6, 1))
    theta = np.array([[1e6, 1.0], [1.1e6, 0.99]])
    exact = ExtendedLikelihood(lambda x, t: np.log(t[:, 1]) - t[:, 1] * x[:, 0], lambda t: t[:, 0])
    begin = time.perf_counter()
    found = exact.log_likelihood(events, theta)
    seconds = time.perf_counter() - begin
    closed = len(events) * np.log(theta.prod(axis=1)) - theta[:, 0] - theta[:, 1] * events.sum()
    train = prior.sample(20_000, rng_for(1))
    x = rng_for(2).exponential(1 / train[:, 1])[:, None]
    nle = NLE(prior, x_transform="log", config=TrainConfig(max_epochs=10)).fit(train, x)
    learned = ExtendedLikelihood(nle, lambda t: t[:, 0])
    begin = time.perf_counter()
    nle_value = learned.log_likelihood(events, theta[:1])
    nle_seconds = time.perf_counter() - begin
    return {
        "sets: 1e6 events, relative error with the exact density": (float(np.abs(found / closed - 1).max()), "<=", 1e-10),
        "sets: 1e6 events, exact density, s per theta": (seconds / 2, "", None),
        "sets: 1e6 events, NLE, s per theta": (nle_seconds, "<=", 30.0),
        "sets: 1e6 events, NLE, error of log L per event, nats": (float(abs(nle_value[0] - closed[0]) / len(events)), "<=", 0.02),
    }


def main() -> None:
    parser = arguments(__doc__, "likelihoods")
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--observations", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--peer-epochs", type=int, default=0, help="most epochs of sbi's training; 0: until its own stopping rule ends it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def spectrum() -> Numbers:
        o = options
        return source(o.n, o.layers, o.observations, o.threads, o.seed, not o.no_peer, o.peer_epochs)

    sys.exit(run({"source": spectrum, "sets": sets}, options, {"n_simulations": options.n, "threads": options.threads}))


if __name__ == "__main__":
    main()
