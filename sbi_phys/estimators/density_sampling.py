r"""Posterior draws from a likelihood, learned or exact, that can be evaluated: one function, four samplers with convergence criteria.

All work in the prior's whitened space u, where the target is

    log L(theta(u)) + log N(u; 0, I)                  (priors: |du/dtheta| = p(theta) / N(u; 0, I))

so that no draw leaves the support and no scale has to be known.

- 'importance': independent draws of a proposal, an NPE's (`NPE.proposal(x)`) or a mixture found by tempering (`samplers.tempering`),
  resampled by weight. Large batches, no burn-in, the evidence at no extra cost; accepted only if Pareto k < 0.7.
- 'emcee': an ensemble of walkers (`samplers.mcmc`). It makes many short calls, which is slow for networks, but needs no proposal and no
  gradient.
- 'hmc': with the gradient of log L (`samplers.hmc`); for many parameters.
- 'grid': one or two degrees of freedom (`samplers.grid`); the reference.
- 'auto': importance sampling, with the proposal first if one is given; if its weights cannot be trusted, the grid for one or two
  degrees of freedom, else hmc where there is a gradient, else emcee, started from the points that the tempering has found.

A sampler that has not converged raises ConvergenceError; the diagnostics are part of the result.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import as_array, require_choice, require_int
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows, draws_rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array
from sbi_phys.priors import Parameter, Prior, standard_normal_log_prob
from sbi_phys.samplers.grid import grid_posterior
from sbi_phys.samplers.hmc import run_hmc
from sbi_phys.samplers.importance import Proposal, importance_sample, resample_indices
from sbi_phys.samplers.mcmc import run_emcee
from sbi_phys.samplers.tempering import spread_start, temper

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["METHODS", "LogLikelihood", "PosteriorDraws", "sample_posterior"]

LogLikelihood = Callable[[Array], Array]
Gradient = Callable[[Array], tuple[Array, Array]]

METHODS = ("auto", "importance", "emcee", "hmc", "grid")
_REACH = 10.0  # in u: beyond, the prior's density is below e^-50 of its peak, and a network has seen nothing
_MOST_MIXTURE = 12  # degrees of freedom up to which a mixture of Gaussians is tried as a proposal
_OVERSAMPLE = 1.5  # effective draws per draw returned: with equal weights hardly a row then comes twice
_TRIES = 40  # most evaluations per draw of importance sampling
_GRID_REACH, _GRID_CELLS = 8.2, 12_000
_CHUNK = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class PosteriorDraws(Result):
    r"""Draws of p(theta | x), with the numbers by which the sampler is judged.

    theta (n, d), prior units, in random order. log_prob (n,) = log L(theta) + log p(theta), not normalised; less log_evidence it is.
    method that made them. r_hat (d',), split R-hat of the chains in u; NaN for draws that are no chain. n_effective, independent draws
    that they are worth. evaluations of the likelihood (with the gradient, for hmc). pareto_k of the weights, NaN without weights.
    log_evidence, log of the integral of L p, nats; NaN where the sampler does not know it. message: the sampler's judgement in words.
    parameters (d,), names and units of the columns of theta, where they are known.
    Of an NPE (`NPE.posterior`) log_prob is log q(theta | x), normalised.

    >>> import numpy as np, sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("mu")])
    >>> found = sp.estimators.sample_posterior(lambda theta: -0.5 * (theta[:, 0] - 1.0) ** 2, prior, 100, method="grid")
    >>> found.theta.shape, found.log_prob.shape, found.method
    ((100, 1), (100,), 'grid')
    """

    theta: Array
    log_prob: Array
    method: str
    r_hat: Array
    n_effective: float
    evaluations: int
    pareto_k: float
    log_evidence: float
    message: str
    parameters: tuple[Parameter, ...] = ()

    def rows(self) -> Rows:
        """Return the table: one row for each parameter, with mean, sd, median and central intervals, in prior units."""
        names = [p.name for p in self.parameters] or [f"theta_{j}" for j in range(self.theta.shape[1])]
        return draws_rows(self.theta, names, units=[p.unit for p in self.parameters])

    def summary(self) -> str:
        """Return the result in words."""
        return f"{len(self.theta)} draws by {self.method}, {self.evaluations} evaluations: {self.message}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the marginals, in sd from their means; `plotting.corner_figure` draws them in their units."""
        return figures.results.marginals(self.theta, self.rows().column("name"), None, ax)


def sample_posterior(
    log_likelihood: LogLikelihood,
    prior: Prior,
    n: int,
    *,
    seed: int = 0,
    method: str = "auto",
    proposal: Proposal | None = None,
    gradient: Gradient | None = None,
    progress: Progress | None = None,
) -> PosteriorDraws:
    r"""Draw theta (n, d) from p(theta | x) proportional to exp(log_likelihood(theta)) p(theta).

    Args:
        log_likelihood: theta (m, d), in the prior's support -> log L (m,), up to a constant; -inf allowed.
        prior: over theta.
        n: draws.
        seed: same seed, same draws.
        method: 'auto', 'importance', 'emcee', 'hmc' or 'grid', see the module.
        proposal: density over u = prior.to_unbounded(theta), e.g. `NPE.proposal(x)`; also tells chains where to start.
        gradient: u (m, d') -> log L (m,) and its gradient with respect to u (m, d'); 'hmc' needs it.
        progress: shows what the sampler does.

    Returns: PosteriorDraws.
    Raises: SettingError, ShapeError, NonFiniteError (NaN or +inf, naming theta), DataError (zero likelihood everywhere),
    ConvergenceError.
    Read: r_hat <= 1.01 or pareto_k < 0.7, and n_effective >= n.

    >>> import numpy as np, sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("mu")])
    >>> found = sp.estimators.sample_posterior(lambda theta: -0.5 * (theta[:, 0] - 1.0) ** 2, prior, 2000, seed=0)
    >>> bool(abs(found.theta.mean() - 0.5) < 0.1)  # the exact mean is 1/2
    True
    """
    require_int("n", n, low=1)
    require_choice("method", method, METHODS)
    if not isinstance(prior, Prior):
        raise SettingError(f"prior is a {type(prior).__name__}; expected a prior, e.g. BoxPrior([Parameter(...)])")
    if method == "hmc" and gradient is None:
        raise SettingError("method is 'hmc' and gradient is None; expected a function that gives log L and its gradient in u")
    if method == "grid" and prior.free_dim > 2:
        raise SettingError(f"method is 'grid' for {prior.free_dim} degrees of freedom; expected one or two")
    job = _Job(_Target(log_likelihood, prior, gradient), n, seed, proposal, or_none(progress))
    makers = {"importance": _importance, "emcee": _emcee, "hmc": _hmc, "grid": _grid, "auto": _auto}
    return makers[method](job)


class _Target:
    """The posterior in u, checked and counted."""

    def __init__(self, log_likelihood: LogLikelihood, prior: Prior, gradient: Gradient | None) -> None:
        self.function, self.prior, self.gradient, self.evaluations = log_likelihood, prior, gradient, 0

    def log_likelihood(self, u: Array) -> Array:
        """Log L (m,) at u (m, d'); -inf where u is out of reach."""
        out = np.full(len(u), -np.inf)
        near = np.flatnonzero((np.abs(u) < _REACH).all(axis=1))
        for rows in np.split(near, np.arange(_CHUNK, len(near), _CHUNK)):
            if len(rows):
                theta = self.prior.from_unbounded(u[rows])
                out[rows] = self._checked(as_array("log_likelihood(theta)", self.function(theta), (len(rows),), finite=False), theta)
        self.evaluations += len(near)
        return out

    def _checked(self, values: Array, theta: Array) -> Array:
        bad = np.isnan(values) | np.isposinf(values)
        if bad.any():
            i = int(np.argmax(bad))
            where = dict(zip(self.prior.names, theta[i].tolist(), strict=True))
            raise NonFiniteError(f"the log likelihood is {values[i]} at {where}; expected a finite number or -inf")
        return values

    def log_prob(self, u: Array) -> Array:
        """Log L + log N(u; 0, I)."""
        return self.log_likelihood(u) + standard_normal_log_prob(u)

    def log_prob_and_grad(self, u: Array) -> tuple[Array, Array]:
        """The same, with its gradient (m, d')."""
        near = (np.abs(u) < _REACH).all(axis=1)
        value, slope = np.full(len(u), -np.inf), np.zeros_like(u)
        if near.any():
            assert self.gradient is not None
            found, by_u = self.gradient(u[near])
            found = self._checked(as_array("gradient(u)[0]", found, (int(near.sum()),), finite=False), self.prior.from_unbounded(u[near]))
            value[near] = found + standard_normal_log_prob(u[near])
            slope[near] = as_array("gradient(u)[1]", by_u, u[near].shape, finite=False) - u[near]
        self.evaluations += int(near.sum())
        return value, slope


@dataclass(slots=True)
class _Job:
    target: _Target
    n: int
    seed: int
    proposal: Proposal | None
    progress: Progress
    start: Array | None = None  # places where chains may start, once they are known

    @property
    def dim(self) -> int:
        return self.target.prior.free_dim

    def draws(
        self,
        u: Array,
        log_target: Array,
        *,
        method: str,
        message: str,
        n_effective: float,
        r_hat: Array | None = None,
        pareto_k: float = math.nan,
        log_evidence: float = math.nan,
    ) -> PosteriorDraws:
        """Back to theta, in random order; log_target = log L + log N(u) (n,)."""
        theta = self.target.prior.from_unbounded(u)
        return PosteriorDraws(
            theta=theta,
            log_prob=log_target - standard_normal_log_prob(u) + self.target.prior.log_prob(theta),
            method=method,
            r_hat=np.full(self.dim, np.nan) if r_hat is None else r_hat,
            n_effective=n_effective,
            evaluations=self.target.evaluations,
            pareto_k=pareto_k,
            log_evidence=log_evidence,
            message=message,
            parameters=self.target.prior.parameters,
        )


def _auto(job: _Job) -> PosteriorDraws:
    reasons = []
    if job.proposal is not None:
        try:
            return _by_importance(job, job.proposal, "the proposal given")
        except (ConvergenceError, DataError) as err:
            reasons.append(str(err))
    if job.dim <= _MOST_MIXTURE:
        try:
            return _by_importance(job, _explored(job), "a mixture found by tempering")
        except ConvergenceError as err:
            reasons.append(str(err))
    if job.dim <= 2:
        try:
            return _grid(job)
        except ConvergenceError as err:
            reasons.append(str(err))
    try:
        return _hmc(job) if job.target.gradient is not None else _emcee(job)
    except ConvergenceError as err:
        raise ConvergenceError("; ".join([str(err), *reasons])) from err


def _importance(job: _Job) -> PosteriorDraws:
    if job.proposal is not None:
        return _by_importance(job, job.proposal, "the proposal given")
    return _by_importance(job, _explored(job), "a mixture found by tempering")


def _explored(job: _Job) -> Proposal:
    found = temper(job.target.log_likelihood, job.dim, rng_for(job.seed, "explore"), progress=job.progress)
    job.start = found.u
    if found.power < 1:
        raise ConvergenceError(
            f"tempering stopped at power {found.power:.2g} of the likelihood after {found.n_rounds} rounds;"
            " expected to reach 1: a mixture of Gaussians does not follow this posterior"
        )
    return found.proposal


def _by_importance(job: _Job, proposal: Proposal, name: str) -> PosteriorDraws:
    n, most = job.n, _TRIES * job.n + 10 * _CHUNK
    wanted = _OVERSAMPLE * n
    result = importance_sample(
        job.target.log_prob,
        proposal,
        most,
        seed=seed_for(job.seed, "importance"),
        chunk=int(min(2 * _CHUNK, max(500, wanted))),
        target_ess=max(wanted, 200.0),
        progress=job.progress,
    )
    if not result.reliable or result.ess < n:
        raise ConvergenceError(
            f"importance sampling from {name} did not converge: {result.log_weights.size} draws are worth {result.ess:.0f}, Pareto k"
            f" {result.pareto_k:.2f}; expected at least {n} and k < 0.7: another proposal, or another method"
        )
    rows = resample_indices(result.weights, n, rng_for(job.seed, "resample"))
    u = result.samples[rows]
    log_target = result.log_weights[rows] + proposal.log_prob(u)
    message = f"importance sampling from {name}: {result.summary()}; {len(np.unique(rows))} of {n} draws differ"
    k, z = result.pareto_k, result.log_evidence
    return job.draws(u, log_target, method="importance", message=message, n_effective=result.ess, pareto_k=k, log_evidence=z)


def _places(job: _Job, n_chains: int, rng: np.random.Generator) -> Array:
    """Starting places (n_chains, d') in u: from where the proposal or the tempering has led."""
    if job.proposal is not None and job.start is None:
        from_prior = rng.standard_normal((10 * n_chains, job.dim))
        job.start = np.concatenate([job.proposal.sample(20 * n_chains, rng), from_prior])
    if job.start is None:
        job.start = temper(job.target.log_likelihood, job.dim, rng_for(job.seed, "explore"), progress=job.progress).u
    return spread_start(job.target.log_prob, job.start, n_chains, rng)


def _emcee(job: _Job) -> PosteriorDraws:
    n_walkers = max(64, 4 * (2 * job.dim + 2))
    start = _places(job, n_walkers, rng_for(job.seed, "start"))
    result = run_emcee(job.target.log_prob, start, n_draws=job.n, seed=seed_for(job.seed, "emcee"), progress=job.progress)
    return job.draws(
        result.samples,
        result.log_prob,
        method="emcee",
        message=result.summary(),
        n_effective=result.n_effective,
        r_hat=result.r_hat,
    )


def _hmc(job: _Job) -> PosteriorDraws:
    start = _places(job, 64, rng_for(job.seed, "start"))
    result = run_hmc(job.target.log_prob_and_grad, start, n_draws=job.n, seed=seed_for(job.seed, "hmc"), progress=job.progress)
    return job.draws(
        result.samples, result.log_prob, method="hmc", message=result.summary(), n_effective=result.n_effective, r_hat=result.r_hat
    )


def _grid(job: _Job) -> PosteriorDraws:
    edge = np.full(job.dim, _GRID_REACH)
    grid = grid_posterior(job.target.log_prob, -edge, edge, n_cells=_GRID_CELLS)
    u = grid.sample(job.n, rng_for(job.seed, "grid"))
    message = f"{len(grid.centres)} cells, the heaviest with {grid.max_cell_mass:.2g} of the mass, log evidence {grid.log_evidence:.4f}"
    log_target = job.target.log_prob(u)
    return job.draws(u, log_target, method="grid", message=message, n_effective=float(job.n), log_evidence=grid.log_evidence)
