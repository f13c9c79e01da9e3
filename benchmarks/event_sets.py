"""Posteriors of sets of events of any size, from one training, against the exact ones; and fits to simulated sets of arrival directions.

    python benchmarks/event_sets.py [--scores 1800000] [--rows 300000] [--only posterior] [--out benchmarks/results/event_sets.json]

posterior    learned likelihood of events, then a SetNPE on sets of 8 to 1200 of the line simulator, sizes log-uniform, every set simulated
             and summarised once: C2ST against the grid, calibration at 10, 100, 1000 events, and the exact posterior's on the sets of 10
deep set     the same by a deep set alone, every set used once, for comparison
attention    the same by the small set transformer, a quarter of the sets
arrival      test statistic and fitted fraction of 1400 arrival directions, with and without sources
Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
import sbi_phys as sp
from benchmarks.suite.table import Numbers, Part, arguments, run
from sbi_phys.calibration import c2st, coverage, sbc
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.set_npe import SetNPE, likelihood_embedding
from sbi_phys.nets.embedding_set import DeepSet, SetAttention
from sbi_phys.nets.embedding_set_likelihood import LikelihoodSet
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.samplers.grid import grid_posterior
from sbi_phys.training.loop import TrainConfig
from simulators import ArrivalDirections, LineSearch

Array = NDArray[np.float64]
SIZES = (10, 100, 1000)
N_MAX = 1200  # training sizes extend beyond the tested ones, so that no test is at the edge
SUMMARY = EmbeddingConfig(hidden=128, n_blocks=2, n_features=64)


def simulator(n_events: Any) -> LineSearch:
    return LineSearch(n_events=n_events, n_max=N_MAX)


def train(embedding: Any, rows: int, seed: int = 0) -> sp.NPE:
    """Train an amortised posterior on fresh sets; all sizes have equal weight."""
    sim = simulator([8, N_MAX])
    kind, epochs, rate = (SetNPE, 5, 2e-3) if isinstance(embedding, LikelihoodSet) else (sp.NPE, 20, 3e-3)
    share = min(0.1, 2000 / rows)
    config = TrainConfig(batch_size=128, max_epochs=epochs, patience=epochs, learning_rate=rate, validation_fraction=share)
    begin = time.perf_counter()
    npe = kind(sim.prior, seed=seed, embedding=embedding, flow=FlowConfig(n_layers=6, n_bins=16), config=config, device="cpu")
    npe.fit(simulator=sim, online=True, n=rows, workers=0, progress=sp.RichProgress())
    print(f"[posterior: {time.perf_counter() - begin:.0f} s, {rows} sets]", flush=True)
    return npe


def scores(n: int) -> LikelihoodSet:
    """Scores of events from n sets of up to a hundred."""
    sim, begin = LineSearch(n_events=[1, 100]), time.perf_counter()
    out = likelihood_embedding(sim.prior, simulator=sim, n=n, embedding=SUMMARY, device="cpu", progress=sp.RichProgress())
    print(f"[scores: {time.perf_counter() - begin:.0f} s, {n} sets]", flush=True)
    return out


def against_grid(npe: sp.NPE, name: str, n_observations: int, bound: float | None) -> Numbers:
    """C2ST to the exact posterior, mean over observations drawn from the prior."""
    numbers: Numbers = {}
    for size in SIZES:
        sim = simulator(size)
        rng = rng_for(11, "observations", size)
        x = sim.simulate(sim.prior.sample(n_observations, rng), rng)
        low, high = (np.array([getattr(p, end) for p in sim.parameters]) for end in ("low", "high"))
        found, begin = [], time.perf_counter()
        for i, row in enumerate(x):
            exact = grid_posterior(lambda t, row=row, sim=sim: sim.log_likelihood(row, t), low, high, n_cells=4000)
            reference = exact.sample(2000, rng_for(12, size, i))
            draws = npe.sample(row, 2000, seed=i)
            found.append(c2st(draws, reference, seed=i).accuracy)
        asked = ("<=", bound) if bound is not None else ("", None)
        numbers[f"{name}, {size} events: mean C2ST to the exact posterior"] = (float(np.mean(found)), *asked)
        numbers[f"{name}, {size} events: largest C2ST of {n_observations}"] = (float(np.max(found)), "", None)
        print(f"[{name}, {size} events: {time.perf_counter() - begin:.0f} s, {np.round(found, 3).tolist()}]", flush=True)
    return numbers


def calibration_sets(size: int, n: int, seed: int = 13) -> tuple[LineSearch, Array, Array]:
    """Simulator, parameters and sets for the calibration tests."""
    sim = simulator(size)
    rng = rng_for(seed, "calibration", size)
    theta = sim.prior.sample(n, rng)
    return sim, theta, sim.simulate(theta, rng)


def exact_coverage(size: int, n: int) -> Numbers:
    """Coverage of the exact posterior's regions on the test sets of the learned one: the fluctuation of the curve for these sets."""
    sim, theta, x = calibration_sets(size, n)
    axes = [p.low + (p.high - p.low) * (np.arange(k) + 0.5) / k for p, k in zip(sim.parameters, (100, 180), strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    content = np.empty(n)  # content of the region whose border contains the truth
    for i, row in enumerate(x.reshape(n, -1, 2)[:, None, :size]):
        log_l, at_truth = sim.log_likelihood(row, grid), sim.log_likelihood(row, theta[i : i + 1])[0]
        mass = np.exp(log_l - log_l.max())
        content[i] = mass[log_l > at_truth].sum() / mass.sum()
    # those of the exact posterior's own draws are uniform
    uniform = rng_for(13, "contents", size).random((n, 199))
    found = coverage(theta, np.repeat(theta[:, None], 199, axis=1), -content, -uniform)
    print(f"exact posterior, {size} events:", found.summary(), sep="\n", flush=True)
    name = f"exact posterior, {size} events"
    numbers: Numbers = {f"{name}: p-value of the coverage curve's band": (found.pvalue, "", None)}
    return numbers | {f"{name}: coverage at {level}": (float(found.at(level)[0]), "", None) for level in (0.68, 0.9)}


def calibrated(npe: sp.NPE, name: str, n: int, seed: int = 13) -> Numbers:
    """SBC and coverage of highest-density regions at each size; with p-values at three sizes, each must exceed a third of 5 %."""
    numbers: Numbers = {}
    for size in SIZES:
        sim, theta, x = calibration_sets(size, n, seed)
        draws = npe.sample(x, 199, seed=size)
        at_truth, at_draws = npe.log_prob(theta, x), npe.log_prob_draws(draws, x)
        ranks = sbc(theta, draws, sim.parameters)
        regions = coverage(theta, draws, at_truth, at_draws)
        print(ranks.summary(), regions.summary(), sep="\n", flush=True)
        numbers[f"{name}, {size} events: p-value of SBC"] = (ranks.pvalue, ">=", 0.05 / 3)
        numbers[f"{name}, {size} events: p-value of the coverage curve's band"] = (regions.pvalue, ">=", 0.05 / 3)
        for level in (0.68, 0.9):
            numbers[f"{name}, {size} events: coverage at {level}"] = (float(regions.at(level)[0]), "", None)
    return numbers


def posterior(n_scores: int, rows: int, model: Path | None) -> Numbers:
    if model is not None and model.exists():
        npe: sp.NPE = SetNPE.load(model, embedding=LikelihoodSet(1, 2, config=SUMMARY), device="cpu")
    else:
        npe = train(scores(n_scores), rows)
        if model is not None:
            npe.save(model)
    x = simulator(1000).simulate(npe.prior.sample(1, rng_for(1)), rng_for(2))[0]
    begin = time.perf_counter()
    npe.sample(x, 10_000)
    name = "learned likelihood"
    numbers: Numbers = {f"{name}: seconds for 1e4 draws, 1000 events": (time.perf_counter() - begin, "<=", 10.0)}
    numbers |= calibrated(npe, name, 300) | exact_coverage(10, 300) | calibrated(npe, f"{name}, 2000 sets", 2000, seed=14)
    return numbers | against_grid(npe, name, 10, 0.60)


def plain(rows: int) -> Numbers:
    return against_grid(train(DeepSet(1, config=SUMMARY), rows), "deep set", 4, None)


def attention(rows: int) -> Numbers:
    embedding = SetAttention(1, hidden=32, n_heads=4, n_induced=4, n_seeds=2)
    return against_grid(train(embedding, rows // 4), "attention, a quarter of the sets", 4, None)


def arrival(n_toys: int = 200) -> Numbers:
    """Test statistic 2 log L / L(isotropy), maximised over f and delta0, and at the true delta0."""
    sim = ArrivalDirections(n_events=1400)
    f, delta = np.linspace(0, 0.4, 41), np.array([5.0, 7.5, 10.0, 12.5, 15.0, 20.0, 25.0, 30.0])
    numbers: Numbers = {}
    for name, truth in (("null", 0.0), ("f = 0.09, 15 deg", 0.09)):
        scans = np.array([sim.scan(sim.simulate([[truth, 15.0]], rng_for(21, name, i)), f, delta) for i in range(n_toys)])
        flat = scans.reshape(n_toys, -1)
        best = f[flat.argmax(axis=1) // delta.size]
        fixed = scans[:, :, 4]
        numbers[f"1400 arrival directions, {name}: mean TS"] = (float(flat.max(axis=1).mean()), "", None)
        numbers[f"1400 arrival directions, {name}: mean of the fitted fraction"] = (float(best.mean()), "", None)
        numbers[f"1400 arrival directions, {name}: sd of the fitted fraction"] = (float(best.std()), "", None)
        numbers[f"1400 arrival directions, {name}: mean TS at 15 deg"] = (float(fixed.max(axis=1).mean()), "", None)
        numbers[f"1400 arrival directions, {name}: mean fraction at 15 deg"] = (float(f[fixed.argmax(axis=1)].mean()), "", None)
        numbers[f"1400 arrival directions, {name}: sd of the fraction at 15 deg"] = (float(f[fixed.argmax(axis=1)].std()), "", None)
    x = sim.simulate([[0.09, 15.0]], rng_for(22))
    theta = sim.prior.sample(500, rng_for(22, "theta"))
    begin = time.perf_counter()
    sim.log_likelihood(x, theta)
    numbers["1400 arrival directions: seconds for 500 likelihoods"] = (time.perf_counter() - begin, "", None)
    return numbers


def main() -> None:
    parser = arguments(__doc__, "event_sets")
    parser.add_argument("--scores", type=int, default=1_800_000, help="sets to learn the likelihood of events from")
    parser.add_argument("--rows", type=int, default=300_000, help="sets to learn the posterior from")
    parser.add_argument("--model", type=Path, help="file of the trained posterior: read if it is there, else written")
    options = parser.parse_args()
    parts: dict[str, Part] = {
        "arrival": arrival,
        "posterior": lambda: posterior(options.scores, options.rows, options.model),
        "deep set": lambda: plain(options.rows),
        "attention": lambda: attention(options.rows),
    }
    sys.exit(run(parts, options, {"scores": options.scores, "sets": options.rows}))


if __name__ == "__main__":
    main()
