"""A steep spectrum with a known truth, as a problem of unfolding that a user might write."""

import numpy as np
from scipy.special import ndtr

EDGES = np.round(np.arange(18.4, 19.41, 0.1), 6)
TRUTH = np.round(np.arange(18.1, 19.61, 0.1), 6)
EXPOSURE, LG_J0, INDEX, SIGMA = 5e3, -17.9, 3.0, 0.05


def true_counts(edges):
    """Exposure times the integral of J0 (E / 10^18.5 eV)^-3 over bins."""
    low, high = 10.0 ** (edges[:-1] - 18.5), 10.0 ** (edges[1:] - 18.5)
    return EXPOSURE * 10.0 ** (LG_J0 + 18.5) * (low**-2 - high**-2) / 2


class Toy:
    title, unit, n_breaks, exposure = "A toy", "1", 0, EXPOSURE
    reco_edges, truth_edges = EDGES, TRUTH
    target = (18.5, 19.2, 0.02)

    def __init__(self, seed: int = 0, noise: bool = True, seen: float = 1.0):
        fine = np.linspace(17.9, 19.8, 381)
        self.seen = 1.0
        expected = self.response(fine) @ true_counts(fine)
        self.seen = seen  # what the analyst believes
        self.variations = {"nine of ten are seen": {"seed": seed, "noise": noise, "seen": 0.9}} if seen == 1 else {}
        self.counts = np.random.default_rng(seed).poisson(expected) if noise else np.rint(expected)
        self.published = {"flux": self.truth / (EXPOSURE * np.diff(10.0**EDGES)), "correction": self.truth / expected}

    @property
    def truth(self):
        return true_counts(EDGES)

    def response(self, edges):
        middle = (edges[1:] + edges[:-1]) / 2
        return self.seen * np.diff(ndtr((EDGES[:, None] - middle) / SIGMA), axis=0)


class Negative(Toy):
    def __init__(self):
        super().__init__()
        self.counts = self.counts - 10 * self.counts[-1]
        self.variations = {}


class Fractions(Toy):
    def __init__(self):
        super().__init__()
        self.counts = self.counts + 0.5
        self.variations = {}


class Elsewhere(Toy):
    truth_edges = TRUTH + 0.03


class NoResponse:
    counts, reco_edges, truth_edges = np.ones(2), np.arange(3.0), np.arange(3.0)
