"""Speed of the source-spectrum simulator: full observations and likelihoods per second, printed and written as JSON.

python benchmarks/simulator_speed.py [--out simulator_speed.json] [--workers 2] [--rows 20000]
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import numpy as np

# one thread per process: what a worker of a pool gets; set before numpy starts its BLAS threads in the children
os.environ.setdefault("OMP_NUM_THREADS", "1")

from sbi_phys.core.files import write_aside
from simulators import SourceSpectrum


def _simulate(settings: dict[str, Any], rows: int, seed: int) -> tuple[float, float]:
    simulator = SourceSpectrum(**settings)
    rng = np.random.default_rng(seed)
    theta = simulator.prior.sample(rows, rng)
    simulator.simulate(theta[:500], rng)
    start, cpu = time.perf_counter(), time.process_time()
    simulator.simulate(theta, rng)
    return time.perf_counter() - start, time.process_time() - cpu


def _best(function: Callable[[], Any], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(settings: dict[str, Any], rows: int, workers: int) -> dict[str, float]:
    """Rates of one form of the simulator."""
    simulator = SourceSpectrum(**settings)
    theta = simulator.prior.sample(256, np.random.default_rng(0))
    x = simulator.observed()
    with ProcessPoolExecutor(workers) as pool:
        seconds = list(pool.map(_simulate, [settings] * workers, [rows] * workers, range(workers)))
    wall, cpu = _simulate(settings, rows, 0)
    out = {
        "simulations_per_second_one_process": rows / wall,
        "simulations_per_cpu_second": rows / cpu,  # rate of an idle core, independent of other programs
        f"simulations_per_second_{workers}_processes": workers * rows / max(wall for wall, _ in seconds),
    }
    for batch in (64, 128, 256):
        call = partial(simulator.log_likelihood, x, theta[:batch])
        out[f"log_likelihood_us_per_row_batch_{batch}"] = 1e6 / batch * _best(call, 40)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of the source-spectrum simulator.")
    parser.add_argument("--out", default="", help="JSON file to write")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rows", type=int, default=20_000)
    args = parser.parse_args()
    forms: dict[str, dict[str, Any]] = {
        "free": {},
        "free, no nuisances": {"energy_scale": False, "xmax_scale": False},
        "fixed": {"composition": "fixed"},
    }
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "cpu_count": os.cpu_count(),
        "load_average_before": os.getloadavg()[0],
        "numpy": np.__version__,
    }
    for name, settings in forms.items():
        result[name] = measure(settings, args.rows, args.workers)
        for key, value in result[name].items():
            print(f"{name:20s} {key:45s} {value:12.1f}")
    if args.out:
        write_aside(args.out, json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
