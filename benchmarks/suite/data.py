"""The data that all tools learn from: the source spectrum with fixed composition, two parameters and 15 counts.

Written once as .npz and read by every process. `z` are the counts after Anscombe's root, standardised: this scaling of
sbi_phys is given to the other tools too, so that all networks have the same inputs. The held-out pairs are fresh
simulations: mean -log q(theta | x) over them, in the parameters' own units, is the loss that tools are compared by.
"""

from pathlib import Path

import numpy as np

from sbi_phys.core.rng import rng_for
from simulators import SourceSpectrum

__all__ = ["N_HELD_OUT", "write_toy"]

N_HELD_OUT = 4000


def write_toy(path: Path, n: int, *, seed: int = 0) -> Path:
    """Simulate n pairs and N_HELD_OUT held-out ones: theta, x (counts), z (n, 15), *_test, low and high of the prior."""
    simulator = SourceSpectrum(composition="fixed")
    prior, rng = simulator.prior, rng_for(seed, "benchmark")
    theta, theta_test = prior.sample(n, rng), prior.sample(N_HELD_OUT, rng)
    x, x_test = simulator.simulate(theta, rng), simulator.simulate(theta_test, rng)
    root, root_test = (2 * np.sqrt(counts + 0.375) for counts in (x, x_test))
    mean, scale = root.mean(axis=0), np.maximum(root.std(axis=0), 1.0)
    z, z_test = (((r - mean) / scale).astype(np.float32) for r in (root, root_test))
    bounds = [(p.low, p.high) for p in simulator.parameters]
    low, high = np.array(bounds, dtype=np.float64).T
    with path.open("wb") as file:
        np.savez(file, theta=theta, x=x, z=z, theta_test=theta_test, x_test=x_test, z_test=z_test, low=low, high=high)
    return path
