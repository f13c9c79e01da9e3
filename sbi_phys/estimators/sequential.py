r"""Truncated sequential rounds: simulations concentrated on the region of parameters that one observation allows.

The posterior of x_obs fills a small part R of the prior. Simulations drawn from the prior *restricted to R*,
p_R(theta) ~ p(theta) 1[theta in R], train the next network with the plain NPE loss and no correction: within R the
restricted prior is proportional to the prior, so the optimum at x_obs is the posterior up to the mass outside R.

R is an ellipsoid in the prior's whitened space (`TruncatedPrior`). Unlike a region above a threshold of the network's density, an
ellipsoid can be sampled exactly, at a rate that does not depend on its size, and it does not follow the errors of a density that is not
yet accurate. The network of a round is valid for x_obs alone.

Source: Deistler, Goncalves & Macke 2022, arXiv:2210.04815 (truncated proposals; regions by density threshold there).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.stats import chi2

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.estimators.npe import NPE
from sbi_phys.simulation.campaign import simulate
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.training.failures import warn_of_failures
from sbi_phys.training.loop import TrainConfig

__all__ = ["TruncatedPrior", "truncated_rounds"]


class TruncatedPrior:
    r"""The prior in whitened space, N(0, I), restricted to an ellipsoid around draws u (m, d) of a posterior.

    With the draws' mean m and covariance S, H = S^-1 - I is the curvature that the data have added to the prior's own
    (eigenvalues below zero are set to zero). The region

        R = {u: (u - m)^T H (u - m) <= r^2},   r^2 = margin^2 * chi2_d quantile of 1 - epsilon

    bounds only what the data have measured; along the rest the prior stays whole. Candidates from the Gaussian with
    precision I + b H, mean b (I + b H)^-1 H m, are accepted with probability exp(b (q - r^2) / 2), q the quadratic form:
    exact draws, with a rate that does not fall as R gets smaller within the prior.

    Raises: ShapeError, NonFiniteError, SettingError, DataError for fewer draws than 10 d.
    """

    def __init__(self, draws: Array, *, epsilon: float = 1e-4, margin: float = 1.25) -> None:
        require_number("epsilon", epsilon, low=0, high=0.5, open_low=True)
        require_number("margin", margin, low=1)
        draws = as_array("draws", draws, (None, None))
        m, self.dim = draws.shape
        if m < 10 * self.dim:
            raise DataError(f"{m} posterior draws in {self.dim} dimensions; expected at least {10 * self.dim}")
        self.mean = draws.mean(axis=0)
        width, axes = np.linalg.eigh(np.atleast_2d(np.cov(draws.T)))
        curvature = np.maximum(1 / np.maximum(width, 1e-12) - 1, 0.0)
        self.curvature = (axes * curvature) @ axes.T
        self.radius2 = margin**2 * float(chi2.isf(epsilon, self.dim))
        # the share of the prior's width that each direction has lost counts the directions that are bounded
        self._tempering = max((curvature / (1 + curvature)).sum(), 0.5) / self.radius2
        precision = 1 + self._tempering * curvature
        self._scaled_axes = axes / np.sqrt(precision)
        self._centre = axes @ (self._tempering * curvature / precision * (axes.T @ self.mean))

    def _form(self, u: Array) -> Array:
        delta = u - self.mean
        return np.einsum("ni,ij,nj->n", delta, self.curvature, delta)

    def contains(self, u: Array) -> Mask:
        """Whether each row of u (n, d) lies in the region -> (n,)."""
        return self._form(u) <= self.radius2

    def sample(self, n: int, rng: np.random.Generator, *, within: Sequence["TruncatedPrior"] = ()) -> Array:
        """Draw u (n, d) from the prior restricted to this region and to those in `within`.

        Raises: DataError if fewer than one in 10 000 candidates is accepted (the regions hardly overlap).
        """
        require_int("n", n, low=1)
        parts: list[Array] = []
        n_accepted = n_tried = 0
        while n_accepted < n:
            u = self._centre + rng.standard_normal((max(10_000, 4 * n), self.dim)) @ self._scaled_axes.T
            form = self._form(u)
            keep = (form <= self.radius2) & (np.log(rng.random(len(u))) < 0.5 * self._tempering * (form - self.radius2))
            for region in within:
                keep &= region.contains(u)
            parts.append(u[keep])
            n_accepted, n_tried = n_accepted + int(keep.sum()), n_tried + len(u)
            if n_tried > 1e6 and n_accepted < 1e-4 * n_tried:
                raise DataError(f"{n_accepted} of {n_tried} candidates lie in the truncated regions of all rounds; expected more than 1e-4")
        return np.concatenate(parts)[:n]


def truncated_rounds(
    npe: NPE,
    simulator: Simulator,
    x_obs: ArrayLike,
    folder: str | Path,
    *,
    n_rounds: int = 1,
    n_simulations: int = 20_000,
    epsilon: float = 1e-4,
    config: TrainConfig | None = None,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> NPE:
    """Train further networks for one observation, each on simulations from the prior truncated to where the last one is.

    Args: npe: trained on the whole prior. simulator, x_obs (k,). folder: of the rounds' stores and checkpoints, from which
    an interrupted call continues. n_simulations: of each round. config: default the one of `npe`.
    Returns: a new NPE, valid at x_obs alone; its density is normalised over the whole prior.
    Raises: SettingError, DataError, StoreError, TrainingError.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, quick, rng = sp.NormalPrior([sp.Parameter("mu")]), sp.TrainConfig(max_epochs=1), np.random.default_rng(0)
    >>> theta = prior.sample(200, rng)
    >>> x = theta + rng.standard_normal((200, 1))
    >>> npe, simulator = sp.NPE(prior, config=quick).fit(theta, x), sp.NLE(prior, config=quick).fit(theta, x).as_simulator()
    >>> local = sp.truncated_rounds(npe, simulator, [0.4], "rounds", n_simulations=100, workers=1)
    >>> local.sample([0.4], 5).shape
    (5, 1)
    """
    require_int("n_rounds", n_rounds, low=1)
    require_int("n_simulations", n_simulations, low=20)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = config or npe.config
    regions: list[TruncatedPrior] = []
    theta, x = np.empty((0, npe.prior.dim)), np.empty((0, sum(o.size for o in simulator.observables)))
    for k in range(n_rounds):
        draws = npe.sample(x_obs, 10_000, seed=seed_for(seed, "draws", k))
        if draws.ndim != 2:
            raise SettingError(f"x_obs holds {len(draws)} observations; expected one, a round serves a single observation")
        region = TruncatedPrior(npe.prior.to_unbounded(draws), epsilon=epsilon)
        u = region.sample(n_simulations, rng_for(seed, "round", k), within=regions)
        store = simulate(
            simulator, None, folder / f"round-{k + 1}", theta=npe.prior.from_unbounded(u), seed=seed_for(seed, "x", k),
            workers=workers, progress=progress,
        )  # fmt: skip
        warn_of_failures([store], npe.prior.names, stacklevel=3)
        fresh_theta, fresh_x = store.read()
        # simulations of earlier rounds that lie in the new region are draws of the same restricted prior: they stay
        keep = region.contains(npe.prior.to_unbounded(theta)) if len(theta) else np.zeros(0, dtype=bool)
        theta, x = np.concatenate([theta[keep], fresh_theta]), np.concatenate([x[keep], fresh_x])
        regions.append(region)
        own = {"seed": seed_for(seed, "network", k), "config": config, "device": npe.device}
        following = NPE(**npe.settings | own)
        following.identity = npe.identity
        # within the regions the density of theta is the prior's, up to a constant, so that no weights are needed
        npe = following.fit(theta, x, proposal=npe.prior, checkpoint=folder / f"round-{k + 1}.ckpt", progress=progress)
    return npe
