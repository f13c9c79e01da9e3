r"""Chains for the posterior of a spectrum: Hamiltonian moves, exact draws of sigma, and independent proposals from a Laplace mixture.

Each step of each chain leaves p(z, log sigma | N) invariant, whatever the approximations are like:

1. z given sigma by Hamiltonian Monte Carlo, in coordinates that the Laplace approximation at the nearest sigma of a grid makes round.
2. sigma given z by Gibbs: with nu auxiliary, the half-Cauchy prior is sigma^2 | nu ~ IG(1/2, 1/nu), nu ~ IG(1/2, 1/s^2), hence
   nu | sigma ~ IG(1, 1/s^2 + 1/sigma^2),   sigma^2 | nu, z ~ IG((m + 1)/2, 1/nu + |D x|^2 / 2); a draw outside of the range is refused.
   Student's t of k degrees is a Gaussian with l_i ~ IG(k/2, k/2) as factor of sigma^2; drawn first, as l_i | sigma, z ~ IG((k + 1)/2,
   (k + (D x)_i^2 / sigma^2) / 2), they divide the squares in |D x|^2.
3. Both at once, from the mixture over the grid of multivariate t around the modes, weighted by the Laplace evidence: Metropolis with
   independent proposals, which crosses between rough and smooth solutions where steps 1 and 2 would have to crawl.

Chains start from widened draws of the mixture. They run until, for z, log sigma and log p, split R-hat is at most 1.01 and draws / tau
reach what was asked for.

Source: Neal 2011, arXiv:1206.1901 (HMC); Rue+ 2009, J. R. Stat. Soc. B 71, 319 (grid of Laplace approximations); Makalic & Schmidt 2016,
arXiv:1508.03884 (half-Cauchy by inverse gammas); Tierney 1994, Ann. Statist. 22, 1701 (mixtures of kernels).
"""

import math
from dataclasses import dataclass

import numpy as np

from sbi_phys.core.progress import Task
from sbi_phys.core.types import Array, Integers
from sbi_phys.samplers.diagnostics import R_HAT_MAX, Verdict, autocorrelation_time, require_converged, run_until_converged, split_r_hat
from sbi_phys.unfold.spectrum_posterior import Laplace, LogPosterior

__all__ = ["Chains", "LaplaceGrid", "run_chains"]


N_CELLS = 36  # of the grid in log sigma: a third of a unit each
N_CHAINS = 16
DOF = 30.0  # of the t, heavier in the tails than the posterior
SCALES, SHARES = np.array([1.0, 3.0]), np.array([0.85, 0.15])  # a part is wider, for bins with few counts
WIDER = 1.3  # by this much chains start farther out than the mixture
ANGLE = 1.8  # length of a trajectory; pi / 2 makes a Gaussian independent
BURN_BLOCK, BURN_BLOCKS = 25, 8


class LaplaceGrid:
    """Laplace approximations on a grid of log sigma, as one density of (z, log sigma).

    Args: posterior. start (t,): where the search for modes begins.   Raises: ConvergenceError.
    """

    def __init__(self, posterior: LogPosterior, start: Array) -> None:
        low, high = posterior.prior.range
        self.hierarchical = posterior.prior.hierarchical
        self.edges = np.linspace(low, high, N_CELLS + 1) if self.hierarchical else np.array([low - 0.5, low + 0.5])
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        cells: list[Laplace] = []
        for log_sigma in centres[::-1]:  # from rough to smooth: the data lead, the prior straightens
            start = start if not cells else cells[-1].mode
            cells.append(posterior.laplace(float(log_sigma), start))
        self.cells = cells[::-1]
        self.modes = np.array([c.mode for c in self.cells])
        self.factors = np.array([c.factor for c in self.cells])
        self._inverse = np.linalg.inv(self.factors)
        self._log_det = np.log(np.abs(np.einsum("kii->ki", self.factors))).sum(axis=1)
        evidence = np.array([c.log_evidence for c in self.cells])
        self.log_weights = evidence - np.logaddexp.reduce(evidence)
        # a cell that the evidence makes nothing of is still tried now and then
        self.log_weights = np.logaddexp(self.log_weights + math.log(0.98), math.log(0.02 / len(cells)))

    @property
    def best(self) -> Laplace:
        """The cell of largest evidence."""
        return self.cells[int(np.argmax([c.log_evidence for c in self.cells]))]

    def cell(self, log_sigma: Array) -> Integers:
        """Index of the cell of each log sigma (c,)."""
        return np.clip(np.searchsorted(self.edges, log_sigma, side="right") - 1, 0, len(self.cells) - 1)

    def sample(self, n: int, rng: np.random.Generator, wider: float = 1.0) -> tuple[Array, Array]:
        """Draw z (n, t) and log sigma (n,)."""
        k = rng.choice(len(self.cells), n, p=np.exp(self.log_weights))
        share = rng.random(n) if self.hierarchical else np.full(n, 0.5)
        log_sigma = self.edges[k] + share * (self.edges[k + 1] - self.edges[k])
        scale = wider * rng.choice(SCALES, n, p=SHARES) / np.sqrt(rng.chisquare(DOF, n) / DOF)
        y = rng.standard_normal((n, self.modes.shape[1])) * scale[:, None]
        return self.modes[k] + np.einsum("cij,cj->ci", self.factors[k], y), log_sigma

    def log_prob(self, z: Array, log_sigma: Array) -> Array:
        """Log density (c,), up to a constant."""
        k = self.cell(log_sigma)
        y = np.einsum("cij,cj->ci", self._inverse[k], z - self.modes[k])
        d, squared = z.shape[-1], (y**2).sum(axis=-1)[..., None]
        tails = np.log(SHARES) - d * np.log(SCALES) - (DOF + d) / 2 * np.log1p(squared / (DOF * SCALES**2))
        return np.asarray(self.log_weights[k] - self._log_det[k] + np.logaddexp.reduce(tails, axis=-1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Chains:
    """z (c, s, t), log_sigma (c, s) of production; verdict on z, log sigma if it varies, and log p; acceptances."""

    z: Array
    log_sigma: Array
    verdict: Verdict
    acceptance: float
    acceptance_independence: float
    n_burn: int


@dataclass(slots=True)
class _State:
    z: Array
    log_sigma: Array
    value: Array  # log p(z | sigma) of the chains
    gradient: Array


class _Kernel:
    """The three moves, for all chains at once, with what they have accepted."""

    def __init__(self, posterior: LogPosterior, mixture: LaplaceGrid, rng: np.random.Generator) -> None:
        self.posterior, self.mixture, self.rng = posterior, mixture, rng
        self.step_size = 0.45
        self.forget()

    def forget(self) -> None:
        self.accepted, self.independent, self.n_steps = 0.0, 0.0, 0

    def start(self) -> _State:
        z, log_sigma = self.mixture.sample(N_CHAINS, self.rng, wider=WIDER)
        return _State(z, log_sigma, *self.posterior.given_sigma(z, log_sigma))

    def step(self, state: _State) -> None:
        """One step of every chain, in place."""
        self.accepted += self._hamiltonian(state)
        if self.mixture.hierarchical:
            self._gibbs(state)
        self.independent += self._independent(state)
        self.n_steps += 1

    def _hamiltonian(self, state: _State) -> float:
        rng, c = self.rng, len(state.z)
        factor = self.mixture.factors[self.mixture.cell(state.log_sigma)]
        step = (self.step_size * rng.uniform(0.8, 1.2, c))[:, None]
        n_leaps = int(rng.integers(1, 2 * max(1, round(ANGLE / self.step_size))))
        p0 = rng.standard_normal(state.z.shape)
        z, value, gradient = state.z, state.value, state.gradient
        p = p0 + 0.5 * step * np.einsum("cij,ci->cj", factor, gradient)
        for leap in range(n_leaps):
            z = z + step * np.einsum("cij,cj->ci", factor, p)
            value, gradient = self.posterior.given_sigma(z, state.log_sigma)
            p = p + (1.0 if leap < n_leaps - 1 else 0.5) * step * np.einsum("cij,ci->cj", factor, gradient)
        energy = value - state.value - 0.5 * ((p**2).sum(axis=1) - (p0**2).sum(axis=1))
        return self._keep(state, np.where(np.isfinite(energy), energy, -np.inf), z, state.log_sigma, value, gradient)

    def _gibbs(self, state: _State) -> None:
        rng, prior = self.rng, self.posterior.prior
        m, c = prior.curvature.shape[0], len(state.z)
        nu = (1 / prior.hyper_scale**2 + np.exp(-2 * state.log_sigma)) / rng.standard_gamma(1.0, c)
        squared = self.posterior.bent(state.z) ** 2
        if not math.isinf(prior.dof):
            scaled = squared * np.exp(-2 * state.log_sigma)[:, None]
            squared = squared * rng.standard_gamma((prior.dof + 1) / 2, (c, m)) * 2 / (prior.dof + scaled)
        variance = (1 / nu + squared.sum(axis=1) / 2) / rng.standard_gamma((m + 1) / 2, c)
        drawn = 0.5 * np.log(variance)
        low, high = prior.range
        state.log_sigma = np.where((drawn >= low) & (drawn <= high), drawn, state.log_sigma)
        state.value, state.gradient = self.posterior.given_sigma(state.z, state.log_sigma)

    def _independent(self, state: _State) -> float:
        z, log_sigma = self.mixture.sample(len(state.z), self.rng)
        value, gradient = self.posterior.given_sigma(z, log_sigma)
        gain = value + self.posterior.log_hyper(log_sigma) - self.mixture.log_prob(z, log_sigma)
        had = state.value + self.posterior.log_hyper(state.log_sigma) - self.mixture.log_prob(state.z, state.log_sigma)
        ratio = np.where(np.isfinite(gain), gain, -np.inf) - had
        return self._keep(state, ratio, z, log_sigma, value, gradient)

    def _keep(self, state: _State, log_ratio: Array, z: Array, log_sigma: Array, value: Array, gradient: Array) -> float:
        yes = np.log(self.rng.random(len(z))) < log_ratio
        state.z, state.gradient = np.where(yes[:, None], z, state.z), np.where(yes[:, None], gradient, state.gradient)
        state.log_sigma, state.value = np.where(yes, log_sigma, state.log_sigma), np.where(yes, value, state.value)
        return float(yes.mean())


def run_chains(
    posterior: LogPosterior,
    mixture: LaplaceGrid,
    *,
    n_draws: int,
    max_steps: int,
    rng: np.random.Generator,
    raise_on_failure: bool,
    task: Task,
) -> Chains:
    """Run until converged, with n_draws effectively independent draws.   Raises: ConvergenceError."""
    kernel = _Kernel(posterior, mixture, rng)
    stored: list[tuple[Array, Array, Array]] = []

    def advance(n: int) -> None:
        for _ in range(n):
            kernel.step(state)
            stored.append((state.z, state.log_sigma, state.value + posterior.log_hyper(state.log_sigma)))

    def history() -> list[Array]:
        return [np.swapaxes(np.array(part), 0, 1) for part in zip(*stored, strict=True)]

    def verdict() -> Verdict:
        z, log_sigma, value = history()
        watched = [z, log_sigma[:, :, None], value[:, :, None]] if mixture.hierarchical else [z, value[:, :, None]]
        numbers = np.concatenate(watched, axis=2)
        r_hat, tau = split_r_hat(numbers), autocorrelation_time(numbers)
        size = N_CHAINS * len(stored) / float(tau.max())
        message = (
            f"R-hat {r_hat.max():.4f} (<= {R_HAT_MAX}), {size:.0f} effective draws of {n_draws} wanted in {N_CHAINS} x {len(stored)} steps"
        )
        good = bool(r_hat.max() <= R_HAT_MAX) and size >= n_draws
        # n_needed 0: chains that have not converged are made half as long again
        return Verdict(autocorr_time=tau, r_hat=r_hat, n_effective=size, n_needed=0.0, converged=good, message=message)

    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # trajectories that diverge are refused
        state = kernel.start()
        n_burn = _burn_in(kernel, state)
        first = max(100, math.ceil(1.2 * n_draws / N_CHAINS))
        found = run_until_converged(advance, verdict, task, first=first, max_steps=max_steps)
    if raise_on_failure:
        require_converged("bayesian_unfold", found, max_steps)
    z, log_sigma, _ = history()
    return Chains(
        z=z,
        log_sigma=log_sigma,
        verdict=found,
        acceptance=kernel.accepted / kernel.n_steps,
        acceptance_independence=kernel.independent / kernel.n_steps,
        n_burn=n_burn,
    )


def _burn_in(kernel: _Kernel, state: _State) -> int:
    """Blocks with the step size made smaller until 3 of 4 trajectories are accepted; one more block with what is left fixed."""
    for block in range(BURN_BLOCKS):
        kernel.forget()
        for _ in range(BURN_BLOCK):
            kernel.step(state)
        if kernel.accepted / kernel.n_steps >= 0.75 and block > 0:
            break
        if kernel.accepted / kernel.n_steps < 0.75:
            kernel.step_size *= 0.7
    kernel.forget()
    return (block + 1) * BURN_BLOCK
