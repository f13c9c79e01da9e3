r"""Hamiltonian Monte Carlo: all chains in one vectorised batch, run until they have converged; otherwise the error says why not.

With the covariance Sigma = L L^T of the draws so far, a position u and a momentum p ~ N(0, I) per chain follow

    du/dt = L p,   dp/dt = L^T grad log p(u)      (Hamilton's equations for the mass matrix Sigma^-1)

by n leapfrog steps of size e, and the end is accepted with probability min(1, exp(-dH)), H = |p|^2 / 2 - log p(u).

- The step e is adapted in warm-up by dual averaging towards an acceptance of 0.8, averaged over all chains; higher if that leaves
  divergences (below), since one step must serve the bulk and the tails.
- The path n e is drawn anew for each transition, uniform on (0, pi), because a fixed path can end where it began. e is varied too.
- Warm-up goes in blocks that double; after each, the covariance (dense or diagonal) is that of the latest half of all chains. It ends when
  the chains of a block agree (split R-hat) without divergences, or its share of the steps is used up. Production adapts nothing.
- A transition whose energy error exceeds 1000 has diverged: the density is too curved for the step there (or has an edge), and the
  chain avoids a part of it. With a share of more than `max_divergent` the chains have not converged.

This sampler is written here because no library fits: Pyro brings a modelling language and runs chains one by one, BlackJAX and NumPyro
need JAX.

Source: Neal 2011, arXiv:1206.1901; dual averaging: Hoffman & Gelman 2014, arXiv:1111.4246; divergences: Betancourt, arXiv:1701.02434.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import as_array, require_choice, require_int, require_number
from sbi_phys.core.errors import ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.results import Result, Rows, draws_rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.samplers.density import CheckedGradient, LogDensityAndGrad, require_positive
from sbi_phys.samplers.diagnostics import Verdict, judge, require_converged, run_until_converged, split_r_hat, thinned

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["HMCResult", "run_hmc"]

R_HAT_WARM = 1.1  # of a block of warm-up, which is too short for 1.01
# R-hat - 1 of slow chains halves when their steps double; of chains in separate modes it stays. Over three doublings:
STUCK_BLOCKS, STUCK_SHARE = 3, 0.7
ACCEPTANCE, HIGHEST_ACCEPTANCE = 0.8, 0.99
MAX_ENERGY_ERROR = 1000.0
MAX_LEAPFROG = 256
FIRST_BLOCK, LEAST = 50, 100  # steps
_FARTHEST = 1e8  # a chain beyond this distance has diverged


@dataclass(frozen=True, kw_only=True, slots=True)
class HMCResult(Result):
    r"""Draws of Hamiltonian chains and the evidence for their convergence, returned by `run_hmc`.

    samples (n, d), about independent, in random order (fewer than asked for only if not converged); log_prob (n,) at them.
    chains (n_chains, n_steps, d), production only. autocorr_time (d,), steps. n_effective, chains x steps / largest tau. r_hat (d,),
    split R-hat between single chains. acceptance, mean probability of acceptance. step_size, in units of the posterior's own width.
    covariance (d, d), inverse mass matrix. n_divergent, transitions of production that diverged. n_burn, steps dropped.
    n_evaluations, points at which density and gradient were evaluated. converged; message says why or why not.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> start = np.random.default_rng(0).standard_normal((8, 2))
    >>> result = sp.samplers.run_hmc(lambda u: (-0.5 * (u**2).sum(axis=1), -u), start, n_draws=500)
    >>> result.summary().startswith("HMC, 8 chains"), result.n_divergent
    (True, 0)
    """

    samples: Array
    log_prob: Array
    chains: Array
    autocorr_time: Array
    n_effective: float
    r_hat: Array
    acceptance: float
    step_size: float
    covariance: Array
    n_divergent: int
    n_burn: int
    n_evaluations: int
    converged: bool
    message: str

    def rows(self) -> Rows:
        """Return the table: one row for each column of the draws, with mean, sd, intervals and the numbers of convergence."""
        names = [f"u_{j}" for j in range(self.samples.shape[1])]
        return draws_rows(self.samples, names, further={"r_hat": self.r_hat, "autocorr_time": self.autocorr_time})

    def summary(self) -> str:
        """Return the result in words."""
        verdict = "converged" if self.converged else "NOT converged"
        return (
            f"HMC, {self.chains.shape[0]} chains x {self.chains.shape[1]} steps after {self.n_burn} of warm-up: {verdict}, {self.message};"
            f" acceptance {self.acceptance:.2f}, step {self.step_size:.2g}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the means of groups of chains along the steps.   Read: no trends, and lines that cross = converged."""
        return figures.results.chains(self.chains, None, ax)


def run_hmc(
    log_prob_and_grad: LogDensityAndGrad,
    start: ArrayLike,
    *,
    n_draws: int = 10_000,
    max_steps: int = 20_000,
    seed: int = 0,
    metric: str = "dense",
    max_divergent: float = 1e-3,
    raise_on_failure: bool = True,
    progress: Progress | None = None,
) -> HMCResult:
    r"""Draw from exp(log_prob) by Hamiltonian Monte Carlo until the chains agree and hold n_draws effectively independent draws.

    Args:
        log_prob_and_grad: u (m, d) -> log density (m,), unnormalised, and its gradient (m, d); -inf outside the support.
        start: (n_chains, d), 4 chains at least, places of positive density, spread wider than the target (see `spread_start`).
        n_draws: effectively independent draws to return.
        max_steps: most transitions of a chain, warm-up included.
        seed: same seed, same chains.
        metric: 'dense' or 'diagonal', the covariance that the momenta use.
        max_divergent: largest share of divergent transitions in production.
        raise_on_failure: False returns an unconverged result (`converged`, `message`) instead of raising.
        progress: shows steps, tau and R-hat.

    Returns: HMCResult.
    Raises: ShapeError, NonFiniteError (NaN or +inf, naming the point), DataError (start), SettingError, ConvergenceError.
    Source: Neal 2011, arXiv:1206.1901; Hoffman & Gelman 2014, arXiv:1111.4246.
    Read: r_hat <= 1.01 and no divergences = converged as far as any chain has reached; chains that sit in different modes do not agree,
        and the run ends once more steps do not lower R-hat.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> start = np.random.default_rng(0).standard_normal((8, 2))
    >>> result = sp.samplers.run_hmc(lambda u: (-0.5 * (u**2).sum(axis=1), -u), start, n_draws=500)
    >>> result.converged, result.samples.shape
    (True, (500, 2))
    """
    at = as_array("start", start, (None, None))
    if at.shape[0] < 4 or at.shape[1] < 1:
        raise ShapeError(f"start has shape {at.shape}; expected (n_chains >= 4, d >= 1)")
    n_draws, max_steps = require_int("n_draws", n_draws, low=1), require_int("max_steps", max_steps, low=2 * LEAST)
    dense = require_choice("metric", metric, ("dense", "diagonal")) == "dense"
    most = require_number("max_divergent", max_divergent, low=0, high=1)
    chains = _Chains(CheckedGradient(log_prob_and_grad, at.shape[1]), at, rng_for(seed, "hmc"))
    with or_none(progress).task("HMC", total=1.0) as task:
        n_burn, stuck = _warm_up(chains, max_steps // 2, dense, most, task)
        verdict = run_until_converged(
            chains.run,
            lambda: _judge(chains, n_draws, most, stuck),
            task,
            first=max(LEAST, math.ceil(1.5 * n_draws / len(at))),
            max_steps=LEAST if stuck else max_steps - n_burn,
        )
    if raise_on_failure:
        require_converged("HMC", verdict, max_steps)
    history = chains.history()
    samples, values = thinned(history, chains.values(), n_draws, rng_for(seed, "hmc draws"))
    return HMCResult(
        samples=samples,
        log_prob=values,
        chains=history,
        autocorr_time=verdict.autocorr_time,
        n_effective=verdict.n_effective,
        r_hat=verdict.r_hat,
        acceptance=chains.acceptance(),
        step_size=chains.step,
        covariance=chains.factor @ chains.factor.T,
        n_divergent=chains.n_divergent(),
        n_burn=n_burn,
        n_evaluations=chains.target.n_evaluations,
        converged=verdict.converged,
        message=verdict.message,
    )


@dataclass(slots=True)
class _State:
    """Positions (m, d) of all chains, with density (m,) and gradient (m, d)."""

    u: Array
    value: Array
    gradient: Array


class _Chains:
    """All chains, their step and metric, and their history since `forget`."""

    def __init__(self, target: CheckedGradient, start: Array, rng: np.random.Generator) -> None:
        self.target, self.rng = target, rng
        value, gradient = target(start)
        require_positive(value, start, "chain")
        self.state = _State(start, value, gradient)
        spread = start.std(axis=0)
        self.factor = np.diag(np.where(spread > 0, spread, 1.0))
        self.step = 1.0
        self.forget()

    def forget(self) -> None:
        self._u: list[Array] = []
        self._value: list[Array] = []
        self._accept: list[float] = []
        self._divergent = 0

    def history(self, last: int = 0) -> Array:
        return np.stack(self._u[-last:], axis=1)

    def values(self) -> Array:
        return np.stack(self._value, axis=1)

    def acceptance(self) -> float:
        return float(np.mean(self._accept))

    def n_divergent(self) -> int:
        return self._divergent

    def run(self, n_steps: int) -> None:
        for _ in range(n_steps):
            self.transition()

    def transition(self) -> float:
        """Move every chain once -> mean probability of acceptance."""
        path = math.pi * self.rng.random()
        step = self.step * (0.8 + 0.4 * self.rng.random())
        n_steps = int(min(max(1, math.ceil(path / step)), MAX_LEAPFROG))
        p = self.rng.standard_normal(self.state.u.shape)
        proposal, error = self._leapfrog(p, step, n_steps)
        with np.errstate(over="ignore"):
            probability = np.exp(np.minimum(0.0, -error))
        accepted = self.rng.random(probability.size) < probability
        old = self.state
        self.state = _State(
            np.where(accepted[:, None], proposal.u, old.u),
            np.where(accepted, proposal.value, old.value),
            np.where(accepted[:, None], proposal.gradient, old.gradient),
        )
        self._divergent += int((error > MAX_ENERGY_ERROR).sum())
        self._u.append(self.state.u)
        self._value.append(self.state.value)
        self._accept.append(float(probability.mean()))
        return self._accept[-1]

    def _leapfrog(self, p: Array, step: float, n_steps: int) -> tuple[_State, Array]:
        """Follow the equations of motion -> (end, energy error (m,), inf where a chain has diverged)."""
        energy = 0.5 * (p**2).sum(axis=1) - self.state.value
        error = np.zeros(len(energy))
        u, value, gradient = self.state.u, self.state.value, self.state.gradient
        alive = np.ones(len(u), dtype=bool)
        for _ in range(n_steps):
            p = p + 0.5 * step * gradient @ self.factor
            moved = u + step * p @ self.factor.T
            # a chain that has diverged stands still: its transition is rejected, and its density is not evaluated
            alive &= np.isfinite(moved).all(axis=1) & (np.abs(moved).max(axis=1) < _FARTHEST)
            u = np.where(alive[:, None], moved, self.state.u)
            value, gradient = self.target(u)
            p = p + 0.5 * step * gradient @ self.factor
            error = 0.5 * (p**2).sum(axis=1) - value - energy
            alive &= error <= MAX_ENERGY_ERROR
            p = np.where(alive[:, None], p, 0.0)
            if not alive.any():
                break
        return _State(u, value, gradient), np.where(alive, error, np.inf)

    def find_step(self) -> None:
        """Double or halve the step until one leapfrog step is accepted with a probability near 1/2."""
        p = self.rng.standard_normal(self.state.u.shape)
        direction = 0
        for _ in range(60):
            _, error = self._leapfrog(p, self.step, 1)
            mean = float(np.exp(np.minimum(0.0, -error)).mean())
            wanted = 1 if mean > 0.5 else -1
            if direction and wanted != direction:
                return
            direction = wanted
            self.step *= 2.0**direction

    def adapt_metric(self, last: int, dense: bool) -> None:
        """Take the covariance of the last steps of all chains, shrunk a little towards its diagonal."""
        draws = self.history(last).reshape(-1, self.state.u.shape[1])
        covariance = np.atleast_2d(np.cov(draws.T))
        diagonal = np.maximum(np.diag(covariance), 1e-20)
        if dense:
            share = len(draws) / (len(draws) + 5.0 * len(diagonal))
            covariance = share * covariance + (1 - share) * np.diag(diagonal) + 1e-12 * np.diag(diagonal)
            self.factor = np.linalg.cholesky(covariance)
        else:
            self.factor = np.diag(np.sqrt(diagonal))


class _DualAveraging:
    """Nesterov's dual averaging of log step towards a mean acceptance.   Source: arXiv:1111.4246, section 3.2."""

    def __init__(self, step: float, wanted: float) -> None:
        self.centre, self.total, self.count, self.log_mean, self.wanted = math.log(10 * step), 0.0, 0, 0.0, wanted

    def update(self, acceptance: float) -> float:
        """Add the acceptance of one transition -> the next step."""
        self.count += 1
        t = self.count
        self.total += (self.wanted - acceptance - self.total) / (t + 10)
        log_step = self.centre - math.sqrt(t) / 0.05 * self.total
        weight = t**-0.75
        self.log_mean = weight * log_step + (1 - weight) * self.log_mean
        return math.exp(min(log_step, 5.0))


def _warm_up(chains: _Chains, max_steps: int, dense: bool, most: float, task: Task) -> tuple[int, str]:
    """Adapt step and metric in blocks that double, then drop the steps -> number of steps, and why more would not help, if so."""
    done, block, wanted = 0, FIRST_BLOCK, ACCEPTANCE
    excess: list[float] = []
    while True:
        size = min(block, max_steps - done)
        chains.find_step()
        average = _DualAveraging(chains.step, wanted)
        half = max(size // 2, 4)
        before = 0
        for i in range(size):
            before = chains.n_divergent() if i == size - half else before
            chains.step = average.update(chains.transition())
        done += size
        chains.step = math.exp(average.log_mean)
        r_hat = float(split_r_hat(chains.history(half)).max())
        divergent = (chains.n_divergent() - before) / (half * len(chains.state.u))
        task.update(0.0, text=f"warm-up, {done} steps, R-hat {r_hat:.2f}")
        calm = divergent <= most or wanted >= HIGHEST_ACCEPTANCE
        # two blocks at least, so that the metric comes from draws that agreed nearly as well
        if (r_hat < R_HAT_WARM and calm and done > FIRST_BLOCK) or done + block >= max_steps:
            chains.forget()
            return done, ""
        excess.append(r_hat - 1)
        if len(excess) > STUCK_BLOCKS and excess[-1] > max(STUCK_SHARE * excess[-1 - STUCK_BLOCKS], R_HAT_WARM - 1):
            chains.forget()
            times = 2**STUCK_BLOCKS
            return done, f"R-hat has stayed at {r_hat:.2f} while the steps became {times} times as many: the chains sit in separate modes"
        if not calm:
            wanted = min(1 - (1 - wanted) / 2, HIGHEST_ACCEPTANCE)
        chains.adapt_metric(half, dense)
        chains.forget()
        block *= 2


def _judge(chains: _Chains, n_draws: int, most: float, stuck: str) -> Verdict:
    history = chains.history()
    found = judge(history, n_draws, split_r_hat(history), "chains")
    divergent = chains.n_divergent() / (history.shape[0] * history.shape[1])
    text = f"{found.message}, {chains.n_divergent()} divergent transitions ({100 * divergent:.2g} %, <= {100 * most:.2g} %)"
    good = found.converged and divergent <= most and not stuck
    return replace(found, converged=good, message=f"{stuck}; {text}" if stuck else text)
