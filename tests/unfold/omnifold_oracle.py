"""Expectation maximisation on a grid with exact densities: what OmniFold gives with infinitely many events. And the toy it is for."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from sbi_phys.core.rng import rng_for

Array = NDArray[np.float64]

SMEAR, MEAN, SD = 0.5, 0.2, 0.8
FAKE_SD = 1.5  # fakes at reco: N(0, 1.5)
BACKGROUND = (1.5, 0.4)  # background at reco: N(1.5, 0.4)


def gaussian_recursion(m: float, v: float, m_d: float, v_d: float, s2: float, n_iterations: int) -> tuple[float, float]:
    """Mean and sd after n iterations, prior N(m, v), smearing variance s2, truth N(m_d, v_d)."""
    for _ in range(n_iterations):
        g = v / (v + s2)
        m, v = m + g * (m_d - m), g**2 * (v_d + s2) + g * s2
    return m, float(np.sqrt(v))


def full(t: Array) -> Array:
    return np.ones_like(t)


def flat(t: Array) -> Array:
    return np.full_like(t, 0.9)


def turn_on(t: Array) -> Array:
    return 1 / (1 + np.exp(-(t + 0.2) / 0.3))


def density(
    n_iterations: int,
    efficiency: Callable[[Array], Array] = full,
    *,
    fakes: float = 0.0,
    background: float = 0.0,
    missed: str = "mean",
    fit_fakes: bool = False,
) -> tuple[Array, Array, float]:
    """Points (g,), unfolded events at them (g,; all data: 1) and the fakes' weight over the nominal one, from densities.

    missed: 'mean' is the method; 'one' gives missed events the nominal weight, as some codes do.
    """
    t, r = np.linspace(-6, 6, 401), np.linspace(-9, 9, 601)
    dt, dr = t[1] - t[0], r[1] - r[0]
    eff = efficiency(t)
    kernel = norm.pdf(r[None, :], t[:, None], SMEAR) * dr
    sim, target = norm.pdf(t) * dt, norm.pdf(t, MEAN, SD) * dt
    fake, extra = fakes * norm.pdf(r, 0, FAKE_SD) * dr, background * norm.pdf(r, *BACKGROUND) * dr
    data = (target * eff) @ kernel + fake + extra
    scale = (data.sum() - extra.sum()) / ((sim * eff).sum() + fake.sum())
    nu, c = np.ones_like(t), 1.0
    for _ in range(n_iterations):
        ratio = data / (scale * (sim * nu * eff) @ kernel + scale * c * fake + extra + 1e-300)
        pulled = nu * (kernel @ ratio) / kernel.sum(axis=1)
        nu = pulled if missed == "mean" else eff * pulled + (1 - eff)
        c *= float((fake * ratio).sum() / fake.sum()) if fakes and fit_fakes else 1.0
    return t, scale * sim * nu, scale * c


def exact(n_iterations: int, efficiency: Callable[[Array], Array] = full, **settings: Any) -> tuple[float, float, float, float]:
    """Mean, sd and total of the unfolded truth (data: 1) and the fakes' weight over the nominal one; settings of `density`."""
    t, w, scale = density(n_iterations, efficiency, **settings)
    mean = float((w * t).sum() / w.sum())
    return mean, float(np.sqrt((w * (t - mean) ** 2).sum() / w.sum())), float(w.sum()), scale


def exact_counts(edges: Array, n_iterations: int, efficiency: Callable[[Array], Array] = full, **settings: Any) -> Array:
    """Unfolded events in bins (q + 1,), all data: 1; settings of `density`."""
    t, w, _ = density(n_iterations, efficiency, **settings)
    # events up to the middle between two points
    return np.asarray(np.diff(np.interp(edges, (t[1:] + t[:-1]) / 2, np.cumsum(w)[:-1])))


@dataclass(frozen=True)
class Toy:
    truth: Array
    reco: Array
    reco_pass: NDArray[np.bool_]
    truth_pass: NDArray[np.bool_]
    data: Array
    background: Array


def toy(n: int, seed: int, efficiency: Callable[[Array], Array] = full, *, fakes: float = 0.0, background: float = 0.0) -> Toy:
    """Simulation N(0, 1), data N(0.2, 0.8), n true events each; what has no meaning is NaN; background has twice the data's share."""
    rng = rng_for(seed, "toy")
    truth, measured = rng.standard_normal(n), MEAN + SD * rng.standard_normal(n)
    seen, found = rng.random(n) < efficiency(truth), rng.random(n) < efficiency(measured)
    n_fakes, n_extra = round(fakes * n), round(background * n)
    reco = np.where(seen, truth + SMEAR * rng.standard_normal(n), np.nan)
    data = (measured + SMEAR * rng.standard_normal(n))[found]
    return Toy(
        truth=np.concatenate([truth, np.full(n_fakes, np.nan)]),
        reco=np.concatenate([reco, FAKE_SD * rng.standard_normal(n_fakes)]),
        reco_pass=np.concatenate([seen, np.ones(n_fakes, dtype=np.bool_)]),
        truth_pass=np.arange(n + n_fakes) < n,
        data=np.concatenate([data, FAKE_SD * rng.standard_normal(n_fakes), BACKGROUND[0] + BACKGROUND[1] * rng.standard_normal(n_extra)]),
        background=BACKGROUND[0] + BACKGROUND[1] * rng.standard_normal(2 * n_extra),
    )


def moments(values: Array, weights: Array) -> tuple[float, float]:
    """Weighted mean and sd over the rows with weight."""
    keep = weights > 0
    mean = np.average(values[keep], weights=weights[keep])
    return float(mean), float(np.sqrt(np.average((values[keep] - mean) ** 2, weights=weights[keep])))


def triangular(values: Array, weights: Array, bins: int = 30) -> float:
    """Triangular discriminator of the weighted histogram against the true density N(0.2, 0.8) on [-3, 3], times 1000."""
    edges = np.linspace(-3, 3, bins + 1)
    p = np.histogram(values, edges, weights=weights / weights.sum())[0]
    q = np.diff(norm.cdf(edges, MEAN, SD))
    return float(500 * ((p - q) ** 2 / (p + q + 1e-300)).sum())
