"""Size and power of every calibration test on posteriors whose exact form is known, and the coverage after each repair.

    python benchmarks/calibration_power.py [--workers 2] [--repetitions 400] [--quick]

Prints Markdown, writes benchmarks/results/calibration_power.json and fills the marked block of docs/calibration.md (--quick writes
neither). Exits with 1 if a size is off by more than three standard errors, or a power is below its requirement. Every repetition has
its own seed, so that the result does not depend on the number of workers.
"""

import argparse
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread per worker: for the processes that are started
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the oracles are the tests' own

# ruff: noqa: E402
from sbi_phys.calibration.conformal import conformal_regions, hpd_content
from sbi_phys.calibration.coverage import coverage
from sbi_phys.calibration.lc2st import lc2st
from sbi_phys.calibration.local import local_coverage
from sbi_phys.calibration.pit import pit_regression
from sbi_phys.calibration.pulls import pulls
from sbi_phys.calibration.recalibration import recalibrate_ranks, temper
from sbi_phys.calibration.sbc import sbc
from sbi_phys.calibration.tarp import tarp
from sbi_phys.core.files import write_aside
from sbi_phys.core.rng import rng_for
from tests.oracles import ORACLES, WRONG, Pairs

Rates = dict[str, dict[str, dict[str, tuple[int, int]]]]  # test, oracle, wrong -> rejections, repetitions

Job = tuple[str, str, str, int, int, int]  # kind, oracle, wrong, first, last, seed

ALPHA = 0.05
N, N_DRAWS = 500, 100
CHUNK = 5
JOINT = ("SBC", "coverage (HPD)", "TARP")
LOCAL_TESTS = ("local coverage", "PIT regression")
TESTS: dict[str, Callable[[Pairs, int], float]] = {
    "SBC": lambda p, seed: sbc(p.theta, p.draws, seed=seed).pvalue,
    "coverage (HPD)": lambda p, seed: coverage(p.theta, p.draws, p.log_prob_theta, p.log_prob_draws, seed=seed).pvalue,
    "coverage (central)": lambda p, seed: coverage(p.theta, p.draws, seed=seed).pvalue,
    "TARP": lambda p, seed: tarp(p.theta, p.draws, p.x, seed=seed).pvalue,
    "pulls": lambda p, seed: pulls(p.theta, p.draws, seed=seed).pvalue,
    "local coverage": lambda p, seed: local_coverage(p.theta, p.draws, p.x[:, 0], seed=seed).pvalue,
    "PIT regression": lambda p, seed: pit_regression(p.theta, p.draws, p.x, seed=seed).pvalue,
}
TOGETHER = "SBC + coverage + TARP"
LC2ST = "L-C2ST"
TOO_SLOW = ("Gaussian, d = 10",)  # for L-C2ST: tens of seconds each
MARKS = re.compile(r"(<!-- power: begin[^\n]*-->\n).*?(<!-- power: end -->)", flags=re.DOTALL)


def one(oracle: str, wrong: str, index: int, seed: int) -> dict[str, float]:
    """p-values of all tests in one repetition."""
    p = ORACLES[oracle](rng_for(seed, oracle, wrong, index), n=N, n_draws=N_DRAWS, **WRONG[wrong])
    return {name: test(p, index) for name, test in TESTS.items()}


def one_lc2st(oracle: str, wrong: str, index: int, seed: int) -> dict[str, float]:
    """p-value of L-C2ST at an observation of its own, drawn from the prior predictive."""
    p = ORACLES[oracle](rng_for(seed, "lc2st", oracle, wrong, index), n=2 * N + 1, n_draws=N_DRAWS, **WRONG[wrong])
    return {LC2ST: lc2st(p.theta[1:], p.draws[1:], p.x[1:], p.x[0], draws_obs=p.draws[0], seed=index).pvalue}


def band(oracle: str, wrong: str, index: int, seed: int) -> dict[str, float]:
    """Whether the whole ECDF of a calibrated posterior's ranks lies in its 95 % band."""
    p = ORACLES[oracle](rng_for(seed, "band", index), n=N, n_draws=N_DRAWS, **WRONG[wrong])
    result = sbc(p.theta, p.draws)
    ecdf = result.ecdf[:, 0]
    return {"held": float(np.all((ecdf >= result.band[:, 0] - 1e-12) & (ecdf <= result.band[:, 1] + 1e-12)))}


def repairs(oracle: str, wrong: str, index: int, seed: int) -> dict[str, float]:
    """Coverage of 90 % regions on fresh data, raw and repaired: 2000 held out, 2000 fresh."""
    rng, level = rng_for(seed, "repair", oracle, wrong, index), 0.9
    old, new = (ORACLES[oracle](rng, n=2000, n_draws=N_DRAWS, scale=0.6) for _ in range(2))
    density = conformal_regions(old.log_prob_theta, level=level)
    content = conformal_regions(old.log_prob_theta, old.log_prob_draws, level=level, score="hpd")
    learned = conformal_regions(old.log_prob_theta, old.log_prob_draws, level=level, score="hpd", features=old.x, seed=index)
    ranks, width = recalibrate_ranks(old.theta, old.draws), temper(old.theta, old.draws)
    return {
        "raw, HPD": float((hpd_content(new.log_prob_theta[:, None], new.log_prob_draws) <= level).mean()),
        "conformal, density": float(density.contains(new.log_prob_theta).mean()),
        "conformal, HPD content": float(content.contains(new.log_prob_theta, new.log_prob_draws).mean()),
        "conformal, HPD content, learned on x": float(learned.contains(new.log_prob_theta, new.log_prob_draws, new.x).mean()),
        "raw, central": central(new.theta, new.draws, level),
        "recalibrated ranks, central": central(new.theta, ranks.apply(new.draws), level),
        "widened, central": central(new.theta, width.apply(new.draws), level),
    }


def central(theta: NDArray[np.float64], draws: NDArray[np.float64], level: float) -> float:
    """Coverage of central intervals, mean over parameters, interpolated between the two nearest contents."""
    result = coverage(theta, draws)
    return float(np.mean([np.interp(level, result.level, curve) for curve in np.atleast_2d(result.observed.T)]))


KINDS: dict[str, Callable[[str, str, int, int], dict[str, float]]] = {"all": one, "lc2st": one_lc2st, "band": band, "repair": repairs}


def _chunk(job: Job) -> list[dict[str, float]]:
    kind, oracle, wrong, first, last, seed = job
    return [KINDS[kind](oracle, wrong, i, seed) for i in range(first, last)]


class Runner:
    """Maps over a pool, or in this process with one worker; keeps finished jobs in a file of JSON lines, where one is named."""

    def __init__(self, workers: int, cache: Path | None) -> None:
        self.pool = ProcessPoolExecutor(workers) if workers > 1 else None
        self.cache = cache
        self.done: dict[Job, list[dict[str, float]]] = {}
        for line in cache.read_text(encoding="utf-8").splitlines() if cache and cache.exists() else []:
            try:
                job, rows = json.loads(line)
            except ValueError:  # a line that was interrupted by a kill: the job is repeated
                continue
            self.done[tuple(job)] = rows

    def jobs(self, jobs: list[Job]) -> list[dict[str, float]]:
        """Rows of all jobs, in their order."""
        new = [job for job in jobs if job not in self.done]
        for job, rows in zip(new, map(_chunk, new) if self.pool is None else self.pool.map(_chunk, new), strict=True):
            self.done[job] = rows
            if self.cache:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                with self.cache.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([job, rows]) + "\n")
        return [row for job in jobs for row in self.done[job]]


def run(runner: Runner, kind: str, sizes: dict[str, int], seed: int) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """Yield (oracle, wrong, p-values of each repetition) in a fixed order."""
    for oracle in ORACLES:
        if kind == "lc2st" and oracle in TOO_SLOW:
            continue
        for wrong, n in sizes.items():
            if n:
                yield oracle, wrong, runner.jobs([(kind, oracle, wrong, i, min(i + CHUNK, n), seed) for i in range(0, n, CHUNK)])


def count(rates: Rates, oracle: str, wrong: str, rows: list[dict[str, float]]) -> None:
    """Add the rejections of some repetitions; the joint test is corrected by Bonferroni for its three members."""
    names = list(rows[0])
    values = {name: np.array([row[name] for row in rows]) for name in names}
    if set(JOINT) <= set(names):
        values[TOGETHER] = np.minimum(1.0, len(JOINT) * np.min([values[name] for name in JOINT], axis=0))
    for name, p in values.items():
        rates.setdefault(name, {}).setdefault(oracle, {})[wrong] = (int((p <= ALPHA).sum()), len(rows))


def error(rate: float, n: int) -> float:
    """Binomial standard error; for a rate of 0 or 1 that of one count."""
    return float(np.sqrt(max(rate * (1 - rate), 1 / n) / n))


def failures(rates: Rates, in_band: tuple[int, int]) -> list[str]:
    """The requirements that are not met, in words."""
    found = []
    for name, by_oracle in rates.items():
        for oracle, by_wrong in by_oracle.items():
            rejected, n = by_wrong["exact"]
            if abs(rejected / n - ALPHA) > 3 * np.sqrt(ALPHA * (1 - ALPHA) / n):
                # a joint test by Bonferroni may reject too rarely, never too often
                if name == TOGETHER and rejected / n < ALPHA:
                    continue
                found.append(f"size of {name} on {oracle}: {100 * rejected / n:.1f} %")
            for wrong, (rejected, n) in by_wrong.items():
                joint = name == TOGETHER and wrong not in ("exact", "local")
                if (joint or (name in LOCAL_TESTS and wrong == "local")) and rejected / n < 0.95:
                    found.append(f"power of {name} on {oracle}, {wrong}: {100 * rejected / n:.0f} %")
    held, n = in_band
    if abs(held / n - 0.95) > 3 * np.sqrt(0.95 * 0.05 / n):
        found.append(f"95 % band holds {100 * held / n:.1f} % of whole curves")
    return found


def table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def markdown(result: dict[str, Any]) -> str:
    """Return the tables: size, then power for each fault."""
    rates, said = result["rates"], []
    for wrong in WRONG:
        rows = []
        for name, by_oracle in rates.items():
            cells = []
            for oracle in ORACLES:
                rejected, n = by_oracle.get(oracle, {}).get(wrong, (0, 0))
                cells.append("–" if n == 0 else f"{100 * rejected / n:.1f}" if wrong == "exact" else f"{100 * rejected / n:.0f}")
            rows.append([name, *cells])
        few = sorted({r[wrong][1] for name, o in rates.items() if name != LC2ST for r in o.values()})
        few_lc2st = sorted({r[wrong][1] for r in rates.get(LC2ST, {}).values() if wrong in r})
        n_said = f"{few[0]} repetitions" + (f", {few_lc2st[0]} of {LC2ST}" if few_lc2st else "")
        title = (
            f"Size: exact posterior, rejected [%] ({n_said})"
            if wrong == "exact"
            else f"Power: {wrong.replace('prior', 'posterior = prior')}, rejected [%] ({n_said})"
        )
        said.append(f"**{title}**\n\n{table(['test', *ORACLES], rows)}")
    size, n = ALPHA, next(iter(next(iter(rates.values())).values()))["exact"][1]
    held, n_band = result["band"]
    inside, inside_error = held / n_band, error(held / n_band, n_band)
    said.append(
        f"Standard error of a size: {100 * np.sqrt(size * (1 - size) / n):.1f} % ({n} repetitions). The 95 % band of the ECDF holds the "
        f"whole curve in {100 * inside:.1f} ± {100 * inside_error:.1f} % of {n_band} calibrated repetitions."
    )
    rows = [[k, *(f"{100 * np.mean(v):.1f} ± {100 * np.std(v):.1f}" for v in by.values())] for k, by in result["repairs"].items()]
    n_rep = len(next(iter(next(iter(result["repairs"].values())).values())))
    said.append(
        f"**Repair: coverage of 90 % regions on fresh data [%], posterior of width x0.6** (mean and scatter over {n_rep} repetitions of "
        f"2000 held-out and 2000 fresh simulations)\n\n{table(['regions', *ORACLES], rows)}"
    )
    # the time is not given for a run that continued from finished repetitions
    took = "" if result["cached"] else f", {result['seconds']:.0f} s with {result['workers']} workers"
    failed = "; ".join(result["failures"]) or "nothing"
    one_observation = f"; {LC2ST} at one observation, N = {2 * result['n']}" if LC2ST in rates else f"; {LC2ST} was not run"
    said.append(
        f"N = {result['n']}, L = {result['n_draws']}, level 5 %{one_observation}. Requirements not met: {failed}. "
        f"Seed {result['seed']}{took}."
    )
    return "\n\n".join(said) + "\n"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements."""
    begin, seed = time.perf_counter(), options.seed
    sizes = {wrong: options.repetitions if wrong == "exact" else options.power_repetitions for wrong in WRONG}
    fewer = {wrong: options.lc2st_repetitions * (3 if wrong == "exact" else 1) for wrong in WRONG}
    runner = Runner(options.workers, options.cache)
    rates: Rates = {}
    for kind, numbers in (("all", sizes), ("lc2st", fewer)):
        for oracle, wrong, rows in run(runner, kind, numbers, seed):
            count(rates, oracle, wrong, rows)
            print(f"{time.perf_counter() - begin:6.0f} s  {oracle}, {wrong}", file=sys.stderr, flush=True)
    n_band, step = options.band_repetitions, 50
    held = runner.jobs([("band", "Gaussian, d = 1", "exact", i, min(i + step, n_band), seed) for i in range(0, n_band, step)])
    repaired: dict[str, dict[str, list[float]]] = {}
    for oracle in ORACLES:
        for row in runner.jobs([("repair", oracle, "width x0.6", i, i + 1, seed) for i in range(options.repair_repetitions)]):
            for name, value in row.items():
                repaired.setdefault(name, {}).setdefault(oracle, []).append(value)
    in_band = (int(sum(row["held"] for row in held)), n_band)
    return {
        "n": N, "n_draws": N_DRAWS, "alpha": ALPHA, "seed": seed, "workers": options.workers, "rates": rates, "band": in_band,
        "repairs": repaired, "failures": failures(rates, in_band), "seconds": None if options.cache else time.perf_counter() - begin,
        "cached": bool(options.cache), "machine": platform.processor() or platform.machine(), "numpy": np.__version__,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=400, help="for the size")
    parser.add_argument("--power-repetitions", type=int, default=100)
    parser.add_argument(
        "--lc2st-repetitions", type=int, default=10, help="for its power; three times as many for its size; 0 leaves it out"
    )
    parser.add_argument("--band-repetitions", type=int, default=2000)
    parser.add_argument("--repair-repetitions", type=int, default=10)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="keep finished repetitions here, and go on from them; delete it when a test has changed")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything; writes no file")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/calibration_power.json")
    options = parser.parse_args()
    if options.quick:
        for name in ("repetitions", "power_repetitions", "lc2st_repetitions", "band_repetitions", "repair_repetitions"):
            setattr(options, name, -(-getattr(options, name) // 10))
    result = measure(options)
    text = markdown(result)
    print(text)
    if not options.quick:
        write_aside(options.out, json.dumps(result, indent=1) + "\n", make_folder=True)
        page = ROOT / "docs/calibration.md"
        write_aside(page, MARKS.sub(lambda m: m[1] + text + m[2], page.read_text(encoding="utf-8")), make_folder=True)
    sys.exit(bool(result["failures"]))


if __name__ == "__main__":
    main()
