"""Distance of the learned posterior from the exact one, computed on a fine grid, for the two-parameter source spectrum.

    python benchmarks/two_parameters.py --n 20000 --threads 2
    python benchmarks/two_parameters.py --n 20000 --emulated 4000000 --threads 2

Prints and writes as JSON: expected divergence E[log p(theta|x) - log q(theta|x)] in nats over fresh pairs (validation
loss minus its exact optimum, by grid), mean C2ST over 20 observations for the amortised posterior and after importance
refinement with the exact likelihood, training seconds, and the step time over the training. With --emulated the n simulations
train a likelihood (NLE), and the posterior is trained on that many pairs drawn from it: a further row of the results.
"""

import argparse
import json
import time
from pathlib import Path
from typing import cast

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import sbi_phys as sp
from sbi_phys.calibration import c2st
from sbi_phys.core.rng import rng_for
from sbi_phys.priors import standard_normal_log_prob
from sbi_phys.samplers.grid import grid_posterior
from sbi_phys.samplers.importance import importance_sample
from simulators import SourceSpectrum

PLAIN, EMULATED = "NPE on the simulations", "NPE on pairs emulated by an NLE of the simulations"


def train(n: int, config: sp.TrainConfig, n_ensemble: int, seed: int) -> dict[str, object]:
    """NPE on n simulations."""
    simulator, theta, x = simulations(n, seed)
    npe = sp.NPE(simulator.prior, seed=seed, observables=simulator.observables, n_ensemble=n_ensemble, config=config)
    begin = time.perf_counter()
    npe.fit(theta, x)
    return {"npe": npe, "method": PLAIN, "training_seconds": time.perf_counter() - begin}


def train_emulated(n: int, n_emulated: int, config: sp.TrainConfig, seed: int, model: Path | None) -> dict[str, object]:
    """NLE on n simulations, then NPE on pairs that it emulates; an interrupted training continues from files next to `model`."""
    simulator, theta, x = simulations(n, seed)
    nle = sp.NLE(simulator.prior, seed=seed, observables=simulator.observables)
    nle.fit(theta, x, checkpoint=model and f"{model}.nle")
    npe = sp.NPE(simulator.prior, seed=seed, observables=simulator.observables, config=config)
    if model is not None and model.exists():
        npe = sp.load(model)
    else:
        npe.fit(simulator=nle.as_simulator(), online=True, n=n_emulated, checkpoint=model and f"{model}.npe")
        if model is not None:
            npe.save(model)
    nle_seconds = sum(row["seconds"] for row in nle.history[0])
    seconds = nle_seconds + sum(row["seconds"] for row in npe.history[0])
    return {"npe": npe, "method": EMULATED, "n_emulated": n_emulated, "training_seconds": seconds, "nle_training_seconds": nle_seconds}


def simulations(n: int, seed: int) -> tuple[SourceSpectrum, np.ndarray, np.ndarray]:
    """Simulator and training pairs."""
    simulator = SourceSpectrum(composition="fixed")
    rng = rng_for(seed, "training")
    theta = simulator.prior.sample(n, rng)
    return simulator, theta, simulator.simulate(theta, rng)


def measure(
    n: int, trained: dict[str, object], *, seed: int = 0, n_observations: int = 20, n_pairs: int = 300, n_draws: int = 2000
) -> dict[str, object]:
    """Compare a trained network with the grid."""
    npe = cast(sp.NPE, trained.pop("npe"))
    print(f"{trained['method']}, {n} simulations: trained in {trained['training_seconds']:.1f} s", flush=True)
    # the evaluation's matrices are small: one BLAS thread, the other core is left to the classifiers
    with threadpool_limits(1, "blas"):
        found = evaluate(
            npe, SourceSpectrum(composition="fixed"), seed=seed, n_observations=n_observations, n_pairs=n_pairs, n_draws=n_draws
        )
    steps = [row["step_ms"] for row in npe.history[0]]
    return {
        "n_simulations": n, **trained, "epochs": [len(h) for h in npe.history], "threads": torch.get_num_threads(),
        "n_pairs": n_pairs, **found,
        "step_ms_first_tenth": float(np.median(steps[: max(1, len(steps) // 10)])),
        "step_ms_last_tenth": float(np.median(steps[-max(1, len(steps) // 10) :])),
    }  # fmt: skip


def evaluate(npe: sp.NPE, simulator: SourceSpectrum, *, seed: int, n_observations: int, n_pairs: int, n_draws: int) -> dict[str, object]:
    """Divergence over pairs, and two-sample tests at the first observations, against the grid."""
    prior = simulator.prior
    rng = rng_for(seed, "test")
    theta_test = prior.sample(n_pairs, rng)
    x_test = simulator.simulate(theta_test, rng)
    gain, amortised, refined, fractions = [], [], [], []
    log_q = npe.log_prob(theta_test, x_test)
    for i in range(n_pairs):

        def log_target(u: np.ndarray, x_i: np.ndarray = x_test[i]) -> np.ndarray:
            return simulator.log_likelihood(x_i, prior.from_unbounded(u)) + standard_normal_log_prob(u)

        grid = grid_posterior(log_target, [-8, -8], [8, 8], n_cells=12_000, max_cell_mass=0.05)
        u_i = prior.to_unbounded(theta_test[i])
        log_p = log_target(u_i)[0] - grid.log_evidence + prior.log_prob(theta_test[i])[0] - standard_normal_log_prob(u_i)[0]
        gain.append(log_p - log_q[i])
        if i < n_observations:
            fine = grid_posterior(log_target, [-8, -8], [8, 8])
            exact = prior.from_unbounded(fine.sample(n_draws, rng))
            amortised.append(c2st(npe.sample(x_test[i], n_draws, seed=i), exact, workers=2).accuracy)
            result = importance_sample(log_target, npe.proposal(x_test[i]), 40_000, seed=i)
            fractions.append(result.ess_fraction)
            refined.append(c2st(prior.from_unbounded(result.resample(n_draws, rng)), exact, workers=2).accuracy)
            print(f"observation {i + 1}: C2ST {amortised[-1]:.3f}, refined {refined[-1]:.3f}, ESS {fractions[-1]:.2f}", flush=True)
    return {
        "divergence_nats": float(np.mean(gain)), "divergence_error": float(np.std(gain) / np.sqrt(n_pairs)),
        "c2st_amortised": float(np.mean(amortised)), "c2st_refined": float(np.mean(refined)), "c2st_amortised_each": amortised,
        "ess_fraction_median": float(np.median(fractions)), "ess_fraction_min": float(np.min(fractions)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ensemble", type=int, default=1)
    parser.add_argument("--emulated", type=int, default=0, help="pairs for the posterior, drawn from a likelihood of the n simulations")
    parser.add_argument("--model", type=Path, help="with --emulated: keep the trained network there, or take it from there")
    parser.add_argument("--pairs", type=int, default=300, help="fresh pairs that the divergence is averaged over")
    parser.add_argument("--epochs", type=int, default=0)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--rate", type=float, default=sp.TrainConfig().learning_rate)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/two_parameters.json"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = sp.TrainConfig(max_epochs=options.epochs, learning_rate=options.rate, batch_size=options.batch)
    if options.emulated:
        trained = train_emulated(options.n, options.emulated, config, options.seed, options.model)
    else:
        trained = train(options.n, config, options.ensemble, options.seed)
    result = measure(options.n, trained, seed=options.seed, n_pairs=options.pairs)
    for name, value in result.items():
        print(f"{name:24s} {value if not isinstance(value, float) else round(value, 4)}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = json.loads(options.out.read_text()) if options.out.exists() else []
    same = [r for r in rows if (r["n_simulations"], r.get("method", PLAIN)) == (options.n, result["method"])]
    options.out.write_text(json.dumps([*[r for r in rows if r not in same], result], indent=1))


if __name__ == "__main__":
    main()
