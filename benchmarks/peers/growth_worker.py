"""One training of a given size in a separate process: seconds and peak memory (run as `python -m benchmarks.peers.growth_worker`).

theta ~ U(-1, 1)^d, x = A theta + 0.3 noise in 18 dimensions, float32.
"""

import resource
import time

import numpy as np

import sbi_phys as sp
from benchmarks.peers.worker import serve
from sbi_phys.core.rng import rng_for

N_X = 18


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def growth(*, n: int, dim: int, epochs: int) -> dict[str, float]:
    """Train on n rows for some epochs: seconds in total and of an epoch; peak memory, and memory before the training [MiB]."""
    rng = rng_for(0, "growth", n, dim)
    theta = rng.uniform(-1, 1, (n, dim)).astype(np.float32)
    x = theta @ (rng.standard_normal((dim, N_X)) / np.sqrt(dim)).astype(np.float32)
    for rows in np.array_split(x, max(1, n // 65536)):
        rows += 0.3 * rng.standard_normal(rows.shape, dtype=np.float32)
    prior = sp.BoxPrior([sp.Parameter(f"t{k}", -1.0, 1.0) for k in range(dim)])
    npe = sp.NPE(prior, seed=0, config=sp.TrainConfig(max_epochs=epochs))
    before, begin = _peak_mib(), time.perf_counter()
    npe.fit(theta, x)
    seconds = time.perf_counter() - begin
    epochs_taken = [r["seconds"] for r in npe.history[0]]
    epoch = float(np.median(epochs_taken[1:] or epochs_taken))
    return {"seconds": seconds, "epoch_seconds": epoch, "peak_mib": _peak_mib(), "before_mib": before}


if __name__ == "__main__":
    serve({"growth": growth})
