r"""Hamiltonian Monte Carlo: all chains in one vectorised batch, run until they have converged, or an error that says why not.

With the covariance Sigma = L L^T of the draws so far, a position u and a momentum p ~ N(0, I) per chain follow

    du/dt = L p,   dp/dt = L^T grad log p(u)      (Hamilton's equations for the mass matrix Sigma^-1)

by n leapfrog steps of size e, and the end is accepted with probability min(1, exp(-dH)), H = |p|^2 / 2 - log p(u).

- The step e is adapted in warm-up by dual averaging, on the acceptance of all chains together, towards 0.8; higher where that leaves
  divergences (below), since one step must serve the bulk and the tails.
- The path n e is drawn anew for each transition, uniform on (0, pi): a fixed one can return to where it began. e is jittered too.
- Warm-up goes in blocks that double; after each the covariance (dense or diagonal) is that of all chains' latest half. It ends when the
  chains of a block agree (split R-hat) without divergences, or its share of the steps is used up. Production changes nothing any more.
- A transition whose energy error exceeds 1000 has diverged: the density is too curved for the step there (or has a wall), and the
  chain keeps away from a part of it. A share of more than `max_divergent` is no convergence.

Written here, since no library fits: Pyro brings a modelling language and runs chains one by one, BlackJAX and NumPyro need JAX.

Source: Neal 2011, arXiv:1206.1901; dual averaging: Hoffman & Gelman 2014, arXiv:1111.4246; divergences: Betancourt, arXiv:1701.02434.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sbi_phys.core.checks import as_array, require_choice, require_int, require_number
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError, ShapeError
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.samplers.diagnostics import autocorrelation_time, split_r_hat

__all__ = ["HMCResult", "LogDensityAndGrad", "run_hmc"]

LogDensityAndGrad = Callable[[Array], tuple[Array, Array]]

R_HAT_MAX = 1.01
R_HAT_WARM = 1.1  # of a block of warm-up, which is short: agreement, not yet precision
# R-hat - 1 of slow chains halves when their steps double; of chains in separate modes it stays. Over three doublings:
STUCK_BLOCKS, STUCK_SHARE = 3, 0.7
LENGTH_IN_TAU = 50
ACCEPTANCE, HIGHEST_ACCEPTANCE = 0.8, 0.99
MAX_ENERGY_ERROR = 1000.0
MAX_LEAPFROG = 256
FIRST_BLOCK, LEAST = 50, 100  # steps
_FARTHEST = 1e8  # a position beyond has left for good


@dataclass(frozen=True, kw_only=True, slots=True)
class HMCResult:
    r"""Draws of Hamiltonian chains and the evidence for their convergence.

    samples (n, d), about independent, in random order (fewer than asked for only if not converged); log_prob (n,) at them.
    chains (n_chains, n_steps, d), production only. autocorr_time (d,), steps. n_effective, chains x steps / largest tau. r_hat (d,),
    split R-hat between single chains. acceptance, mean probability of acceptance. step_size, in units of the posterior's own width.
    covariance (d, d), inverse mass matrix. n_divergent, transitions of production that diverged. n_burn, steps dropped.
    n_evaluations, points at which density and gradient were asked for. converged; message says why or why not.
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

    def summary(self) -> str:
        """Return the result in words."""
        verdict = "converged" if self.converged else "NOT converged"
        return (
            f"HMC, {self.chains.shape[0]} chains x {self.chains.shape[1]} steps after {self.n_burn} of warm-up: {verdict}, {self.message};"
            f" acceptance {self.acceptance:.2f}, step {self.step_size:.2g}"
        )


def run_hmc(
    log_prob_and_grad: LogDensityAndGrad,
    start: ArrayLike,
    *,
    n_samples: int = 10_000,
    max_steps: int = 20_000,
    seed: int = 0,
    metric: str = "dense",
    max_divergent: float = 1e-3,
    raise_on_failure: bool = True,
    progress: Progress | None = None,
) -> HMCResult:
    r"""Draw from exp(log_prob) by Hamiltonian Monte Carlo until the chains agree and hold n_samples effectively independent draws.

    Args:
        log_prob_and_grad: u (m, d) -> log density (m,), unnormalised, and its gradient (m, d); -inf outside the support.
        start: (n_chains, d), 4 chains at least, places of positive density, spread wider than the target (see `spread_start`).
        n_samples: effectively independent draws to return.
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
        and are given up once more steps bring R-hat no lower.
    """
    at = as_array("start", start, (None, None))
    if at.shape[0] < 4 or at.shape[1] < 1:
        raise ShapeError(f"start has shape {at.shape}; expected (n_chains >= 4, d >= 1)")
    n_samples, max_steps = require_int("n_samples", n_samples, low=1), require_int("max_steps", max_steps, low=2 * LEAST)
    dense = require_choice("metric", metric, ("dense", "diagonal")) == "dense"
    most = require_number("max_divergent", max_divergent, low=0, high=1)
    chains = _Chains(_Target(log_prob_and_grad, at.shape[1]), at, rng_for(seed, "hmc"))
    with or_none(progress).task("HMC", total=1.0) as task:
        n_burn, stuck = _warm_up(chains, max_steps // 2, dense, most, task)
        verdict = _produce(chains, n_samples, LEAST if stuck else max_steps - n_burn, most, task, stuck)
    if not verdict.good and raise_on_failure:
        raise ConvergenceError(f"HMC did not converge: {verdict.text}; expected convergence within max_steps = {max_steps}")
    return _result(chains, verdict, n_burn, n_samples, rng_for(seed, "hmc draws"))


def _result(chains: "_Chains", verdict: "_Verdict", n_burn: int, n_samples: int, rng: np.random.Generator) -> HMCResult:
    """Thin the chains to n_samples draws in random order."""
    history, values = chains.history(), chains.values()
    thin = max(1, history.shape[1] // math.ceil(n_samples / history.shape[0]))
    samples, log_prob = history[:, thin - 1 :: thin].reshape(-1, history.shape[-1]), values[:, thin - 1 :: thin].reshape(-1)
    order = rng.permutation(samples.shape[0])[:n_samples]
    return HMCResult(
        samples=samples[order],
        log_prob=log_prob[order],
        chains=history,
        autocorr_time=verdict.tau,
        n_effective=verdict.n_effective,
        r_hat=verdict.r_hat,
        acceptance=chains.acceptance(),
        step_size=chains.step,
        covariance=chains.factor @ chains.factor.T,
        n_divergent=chains.n_divergent(),
        n_burn=n_burn,
        n_evaluations=chains.target.n_evaluations,
        converged=verdict.good,
        message=verdict.text,
    )


class _Target:
    """The density and its gradient, checked and counted; an error names the point."""

    def __init__(self, function: LogDensityAndGrad, dim: int) -> None:
        self.function, self.dim, self.n_evaluations = function, dim, 0

    def __call__(self, u: Array) -> tuple[Array, Array]:
        found = self.function(u)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ShapeError(f"log_prob_and_grad(u) gave a {type(found).__name__}; expected (log_prob (m,), gradient (m, d))")
        values = as_array("log_prob_and_grad(u)[0]", found[0], (u.shape[0],), finite=False)
        gradient = as_array("log_prob_and_grad(u)[1]", found[1], u.shape, finite=False)
        zero = np.isneginf(values)
        bad = np.isnan(values) | np.isposinf(values) | (~np.isfinite(gradient).all(axis=1) & ~zero)
        if bad.any():
            i = int(np.argmax(bad))
            raise NonFiniteError(
                f"log_prob is {values[i]} with gradient {gradient[i].tolist()} at u = {u[i].tolist()};"
                " expected a finite number, or -inf, and a finite gradient"
            )
        self.n_evaluations += values.size
        return values, np.where(zero[:, None], 0.0, gradient)


@dataclass(slots=True)
class _State:
    """Positions (m, d) of all chains, with density (m,) and gradient (m, d)."""

    u: Array
    value: Array
    gradient: Array


class _Chains:
    """All chains, their step and metric, and what they have done since `forget`."""

    def __init__(self, target: _Target, start: Array, rng: np.random.Generator) -> None:
        self.target, self.rng = target, rng
        value, gradient = target(start)
        if np.isneginf(value).any():
            i = int(np.argmax(np.isneginf(value)))
            raise DataError(f"start has log_prob -inf at chain {start[i].tolist()}; expected places of positive density, see spread_start")
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
        """Follow the equations of motion -> (end, energy error (m,), inf where a chain has left)."""
        energy = 0.5 * (p**2).sum(axis=1) - self.state.value
        error = np.zeros(len(energy))
        u, value, gradient = self.state.u, self.state.value, self.state.gradient
        alive = np.ones(len(u), dtype=bool)
        for _ in range(n_steps):
            p = p + 0.5 * step * gradient @ self.factor
            moved = u + step * p @ self.factor.T
            # a chain that has left stands still: its transition is rejected anyway, and its density is never asked for
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
        """Take in one transition -> the step to try next."""
        self.count += 1
        t = self.count
        self.total += (self.wanted - acceptance - self.total) / (t + 10)
        log_step = self.centre - math.sqrt(t) / 0.05 * self.total
        weight = t**-0.75
        self.log_mean = weight * log_step + (1 - weight) * self.log_mean
        return math.exp(min(log_step, 5.0))


def _warm_up(chains: _Chains, max_steps: int, dense: bool, most: float, task: Task) -> tuple[int, str]:
    """Adapt step and metric in blocks that double, then forget -> steps done, and why more would be in vain, if so."""
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
        # the metric of the last block was made from draws that had agreed nearly as well: two blocks at least
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What the convergence criteria say."""

    tau: Array
    n_effective: float
    r_hat: Array
    needed: float
    good: bool
    text: str


def _produce(chains: _Chains, n_samples: int, max_steps: int, most: float, task: Task, stuck: str) -> _Verdict:
    done = 0
    target = max(LEAST, math.ceil(1.5 * n_samples / len(chains.state.u)))
    while True:
        target = min(target, max_steps)
        while done < target:
            chains.transition()
            done += 1
            if done % 20 == 0:
                task.update(0.99 * done / target, text=f"{done} of about {target} steps")
        verdict = _judge(chains, n_samples, most, stuck)
        if verdict.good or done >= max_steps:
            task.update(1.0, text=f"{done} steps, tau {verdict.tau.max():.1f}")
            return verdict
        longer = 1.1 * verdict.needed if done <= verdict.needed else 1.5 * done
        target = math.ceil(min(max(longer, 1.3 * done), 3 * done))


def _judge(chains: _Chains, n_samples: int, most: float, stuck: str) -> _Verdict:
    history = chains.history()
    n_chains, n_steps, _ = history.shape
    tau, r_hat = autocorrelation_time(history), split_r_hat(history)
    longest = float(tau.max())
    n_effective = n_chains * n_steps / longest
    needed = max(LENGTH_IN_TAU * longest, n_samples * longest / n_chains)
    divergent = chains.n_divergent() / (n_chains * n_steps)
    good = n_steps >= needed and r_hat.max() <= R_HAT_MAX and divergent <= most and not stuck
    text = (
        f"{n_steps} steps are {n_steps / longest:.0f} tau (tau = {longest:.1f}, {LENGTH_IN_TAU} tau wanted),"
        f" {n_effective:.0f} effective draws ({n_samples} wanted), R-hat {r_hat.max():.4f} between chains (<= {R_HAT_MAX}),"
        f" {chains.n_divergent()} divergent transitions ({100 * divergent:.2g} %, <= {100 * most:.2g} %)"
    )
    text = f"{stuck}; {text}" if stuck else text
    return _Verdict(tau=tau, n_effective=n_effective, r_hat=r_hat, needed=needed, good=bool(good), text=text)
