r"""Markov chain Monte Carlo with emcee, run until it has converged, or an error that says how far it is from that.

The walkers form several groups, each an ensemble of its own whose walkers are helped by no others, so that agreement between
groups is evidence. A run has two parts:

1. Burn-in, in blocks of growing length. After a block, walkers stuck in a negligible mode are put back: a walker whose best log
   density of the block's second half lies more than `stuck_below` under the group's median is moved to a place that a healthy walker
   of its group visited in that half. A mode so far below could only matter if its volume were exp(stuck_below) times larger. Burn-in ends
   with a block that is 10 autocorrelation times long, has no stuck walker, and whose halves agree in mean log density.
   Unless the caller brings moves of his own, a mixture is fitted after each block to the draws of all groups (`moves.fit_mixture`), and
   the next steps propose independent draws from it beside the local moves: a curved posterior, slow for local moves alone, is then
   crossed in one step. Such draws are only as good as the mixture is in the tails, where a walker would stick if the mixture held
   too little, and the mixture hides what no walker has reached. So burn-in first runs on the flattened densities p^0.2 and p^0.5, at
   least 500 steps each, whose draws reach farther, and the mixture covers these too (left out if they do not settle, e.g. have no
   integral; then, and on very thin curved targets, compare several seeds).
2. Production, where nothing is ever reset or fitted: the last mixture stays as it is, so every step is Markov and leaves the target alone
   whatever the fit is like (Tierney 1994, Ann. Statist. 22, 1701); no draw of burn-in is kept. It ends when, for every parameter, the
   chain is longer than 50 tau (`diagnostics`), walkers x steps / tau >= n_samples, split R-hat between groups <= 1.01, and R-hat between
   single walkers is no larger than chains of that length give by chance.

Several modes: a mode is sampled with its right weight only if walkers travel. The mode jump (`moves`) does that when both modes hold
walkers of a group, which is the business of the start: `spread_start`; the mixture carries walkers between all modes that any group
has found. If walkers do not travel, R-hat between walkers and tau say so. In production groups share nothing but the fixed mixture.

Source: Foreman-Mackey et al. 2013, arXiv:1202.3665; R-hat: Vehtari et al. 2021, arXiv:1903.08008.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import chdtri

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import ConvergenceError, DataError, ShapeError
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.samplers.diagnostics import autocorrelation_time, split_r_hat
from sbi_phys.samplers.moves import Independence, Mixture, default_moves, fit_mixture, in_groups
from sbi_phys.samplers.start import Checked, LogDensity, spread_start

__all__ = ["MCMCResult", "run_emcee", "spread_start"]


LENGTH_IN_TAU = 50
R_HAT_MAX = 1.01
INDEPENDENCE_SHARE = 0.7
LEAST_HOT, LEAST = 500, 1000  # steps of exploration by local moves, before and after the mixture is fixed
SETTLED_IN_TAU = 10
HOT = (0.2, 0.5)  # powers of the density in the first parts of burn-in, 5 and 2 the temperatures
GROWTH = 1.5  # of the blocks of burn-in


@dataclass(frozen=True, kw_only=True, slots=True)
class MCMCResult:
    r"""Draws of a Markov chain and the evidence for their convergence.

    samples (n, d), thinned to about one per autocorrelation time, in random order (fewer than asked for only if not converged);
    log_prob (n,) at them.
    chains (n_walkers, n_steps, d), production only, all steps; group (n_walkers,), the ensemble that a walker belongs to.
    autocorr_time (d,), steps. n_effective, walkers x steps / largest tau. acceptance, mean share of accepted moves;
    acceptance_independence, that of the proposals from the mixture, and n_components, its Gaussians (NaN and 0 without a mixture).
    r_hat (d,), between groups; r_hat_walkers (d,), between single walkers. n_burn, steps dropped; n_reset, walkers put back in burn-in.
    n_evaluations of the log density. converged; message says why or why not.
    """

    samples: Array
    log_prob: Array
    chains: Array
    group: Integers
    autocorr_time: Array
    n_effective: float
    acceptance: float
    acceptance_independence: float
    n_components: int
    r_hat: Array
    r_hat_walkers: Array
    n_burn: int
    n_reset: int
    n_evaluations: int
    converged: bool
    message: str

    def summary(self) -> str:
        """Return the result in words."""
        size = f"{self.chains.shape[0]} walkers in {self.group.max() + 1} groups x {self.chains.shape[1]} steps"
        burn = f"after {self.n_burn} of burn-in ({self.n_reset} walkers put back)"
        mixture = f" ({self.acceptance_independence:.2f} from a mixture of {self.n_components})" if self.n_components else ""
        verdict = "converged" if self.converged else "NOT converged"
        return f"MCMC, {size} {burn}: {verdict}, {self.message}; acceptance {self.acceptance:.2f}{mixture}"


def run_emcee(
    log_prob: LogDensity,
    start: ArrayLike,
    *,
    n_samples: int = 10_000,
    max_steps: int = 50_000,
    seed: int = 0,
    n_groups: int | None = None,
    moves: list[tuple[Any, float]] | None = None,
    independence: bool | None = None,
    stuck_below: float | None = None,
    raise_on_failure: bool = True,
    progress: Progress | None = None,
) -> MCMCResult:
    r"""Draw from exp(log_prob) with emcee until the chain has converged and holds n_samples effectively independent draws.

    Args:
        log_prob: (m, d) -> (m,), unnormalised log density, vectorised; -inf outside the support.
        start: (n_walkers, d), places of positive density, all different (see `spread_start`); at least max(2 d + 2, 8) walkers a group.
        n_samples: effectively independent draws to return.
        max_steps: most steps of a walker, burn-in included.
        seed: same seed, same chain; numpy's global generator is left alone.
        n_groups: independent ensembles; default 4, or fewer where there are too few walkers. Walker i starts in group i modulo n_groups.
        moves: emcee moves with weights; default `moves.default_moves()`.
        independence: propose a share of 0.7 of the steps from a mixture fitted in burn-in and fixed afterwards; default only if no
            `moves` are given.
        stuck_below: nats, see the module; default 5 more than a Gaussian's far tail, chi2_d.isf(1e-6) / 2 + 5, 26 for d = 8.
        raise_on_failure: False returns an unconverged result (`converged`, `message`) instead of raising.
        progress: shows the share of the length needed, tau and R-hat.

    Returns: MCMCResult.
    Raises: ShapeError, NonFiniteError (NaN or +inf, naming the point), DataError (start), SettingError, ConvergenceError.
    Source: Foreman-Mackey et al. 2013, arXiv:1202.3665.
    Read: r_hat <= 1.01 and chain longer than 50 tau = converged as far as the places that any walker has reached.
    """
    walkers = as_array("start", start, (None, None))
    n_walkers, dim = walkers.shape
    n_samples, max_steps = require_int("n_samples", n_samples, low=1), require_int("max_steps", max_steps, low=100)
    n_groups = _group_number(n_groups, n_walkers, dim)
    depth = float(chdtri(dim, 1e-6)) / 2 + 5 if stuck_below is None else require_number("stuck_below", stuck_below, low=0, open_low=True)
    density = Checked(log_prob, dim)
    ensemble = _Ensemble(density, walkers, n_groups, default_moves() if moves is None else moves, seed)
    with or_none(progress).task("MCMC", total=1.0) as task:
        n_burn, n_reset, settled = _warm_up(ensemble, max_steps, depth, seed, moves is None if independence is None else independence, task)
        verdict = _produce(ensemble, n_samples, max_steps - n_burn, task)
    converged = verdict.good and settled
    message = verdict.text if settled else f"burn-in did not settle in {n_burn} steps; {verdict.text}"
    if not converged and raise_on_failure:
        raise ConvergenceError(f"MCMC did not converge: {message}; expected convergence within max_steps = {max_steps}")
    counts = {"n_burn": n_burn, "n_reset": n_reset, "n_evaluations": density.n_evaluations}
    return _collect(ensemble, verdict, n_samples, rng_for(seed, "mcmc draws"), converged, message, counts)


def _collect(
    ensemble: "_Ensemble",
    verdict: "_Verdict",
    n_samples: int,
    rng: np.random.Generator,
    converged: bool,
    message: str,
    counts: dict[str, int],
) -> MCMCResult:
    chains, free = ensemble.chain(), ensemble.independence
    samples, values = _thinned(chains, ensemble.log_prob(), n_samples, rng)
    return MCMCResult(
        samples=samples,
        log_prob=values,
        chains=chains,
        group=ensemble.group,
        autocorr_time=verdict.tau,
        n_effective=verdict.n_effective,
        acceptance=float(np.mean(ensemble.sampler.acceptance_fraction)),
        acceptance_independence=math.nan if free is None else free.n_accepted / max(free.n_tried, 1),
        n_components=0 if free is None else free.mixture.n_components,
        r_hat=verdict.r_hat,
        r_hat_walkers=verdict.r_hat_walkers,
        converged=converged,
        message=message,
        **counts,
    )


def _group_number(n_groups: int | None, n_walkers: int, dim: int) -> int:
    least = max(2 * dim + 2, 8)  # emcee's own limit and a little, and three helpers in each half of a group
    if n_groups is None:
        n_groups = max(1, min(4, n_walkers // least))
    n_groups = require_int("n_groups", n_groups, low=1)
    if n_walkers // n_groups < least:
        raise ShapeError(f"start has {n_walkers} walkers for {n_groups} groups in {dim} dimensions; expected at least {n_groups * least}")
    return n_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict:
    """What the convergence criteria say of a chain."""

    tau: Array
    n_effective: float
    r_hat: Array
    r_hat_walkers: Array
    needed: float
    good: bool
    text: str


class _Ensemble:
    """All walkers, group by group, in one emcee sampler with its own generator, whose moves keep to the groups."""

    def __init__(self, density: Checked, start: Array, n_groups: int, moves: list[tuple[Any, float]], seed: int) -> None:
        import emcee

        group = np.arange(start.shape[0]) % n_groups
        order = np.argsort(group, kind="stable")
        start, self.group = start[order], group[order]
        values = density(start)
        if np.isneginf(values).any():
            i = int(np.argmax(np.isneginf(values)))
            raise DataError(f"start has log_prob -inf at walker {start[i].tolist()}; expected places of positive density, see spread_start")
        for g in range(n_groups):
            spread = start[self.group == g] - start[self.group == g].mean(axis=0)
            scale = np.where(spread.std(axis=0) > 0, spread.std(axis=0), 1.0)
            if np.linalg.matrix_rank(spread / scale, tol=1e-9) < start.shape[1]:
                raise DataError(f"start of group {g} spans fewer than {start.shape[1]} dimensions; expected walkers at different places")
        self.density = density
        total = sum(weight for _, weight in moves)
        self.moves = [(in_groups(move, self.group), weight / total) for move, weight in moves]
        self.renew(None)
        random = np.random.RandomState(seed_for(seed, "mcmc") % 2**32)
        self.state = emcee.State(start, log_prob=values, random_state=random.get_state())

    def temper(self, power: float) -> None:
        """Go on with the density to this power, from where the walkers stand."""
        self.density.power = power
        self.state.log_prob = self.density(self.state.coords)

    def renew(self, mixture: Mixture | None) -> None:
        """Forget the chain, not where walkers stand, and go on with the local moves and, if given, draws from the mixture."""
        import emcee

        self.independence = None if mixture is None else Independence(mixture)
        moves = self.moves
        if self.independence is not None:
            moves = [(m, (1 - INDEPENDENCE_SHARE) * w) for m, w in moves] + [(self.independence, INDEPENDENCE_SHARE)]
        self.sampler = emcee.EnsembleSampler(self.group.size, self.density.dim, self.density, moves=moves, vectorize=True)
        self.sampler.log_prob_fn = self.density  # emcee's own wrapper prints every exception to the screen

    def run(self, n_steps: int) -> None:
        self.state = self.sampler.run_mcmc(self.state, n_steps, skip_initial_state_check=True)

    def chain(self, last: int = 0) -> Array:
        return np.swapaxes(self.sampler.get_chain()[-last:], 0, 1)

    def log_prob(self, last: int = 0) -> Array:
        return np.swapaxes(self.sampler.get_log_prob()[-last:], 0, 1)

    def by_group(self, chain: Array) -> list[Array]:
        return [chain[self.group == g] for g in range(self.group.max() + 1)]

    def put_back(self, depth: float, last: int, rng: np.random.Generator) -> int:
        """Move stuck walkers to places that healthy ones of their group visited lately; return how many."""
        values, chain, n_stuck = self.log_prob(last), self.chain(last), 0
        for g in range(self.group.max() + 1):
            mine = np.flatnonzero(self.group == g)
            low = values[mine].max(axis=1) < np.median(values[mine]) - depth
            for walker in mine[low]:
                donor, step = rng.choice(mine[~low]), rng.integers(last)
                self.state.coords[walker], self.state.log_prob[walker] = chain[donor, step], values[donor, step]
            n_stuck += int(low.sum())
        return n_stuck


def _warm_up(ensemble: _Ensemble, max_steps: int, depth: float, seed: int, independence: bool, task: Task) -> tuple[int, int, bool]:
    """Burn in, the flattened target first if there is to be a mixture -> (steps, walkers put back, settled)."""
    reset_rng, fit_rng = rng_for(seed, "mcmc resets"), rng_for(seed, "mcmc mixture")
    if not independence:
        return _burn_in(ensemble, max_steps // 2, depth, reset_rng, None, None, task)[:3]
    start, done, n_reset, tails = ensemble.state, 0, 0, None
    for power in HOT:
        ensemble.temper(power)
        steps, n, settled, draws = _burn_in(ensemble, max_steps // 8, depth, reset_rng, fit_rng, tails, task)
        done += steps
        if not settled:  # tails so heavy that their power has no integral, or too few steps
            ensemble.state, n_reset, tails = start, 0, None
            ensemble.renew(None)
            break
        n_reset, tails = n_reset + n, draws
    ensemble.temper(1.0)
    cold, n, settled, _ = _burn_in(ensemble, max_steps // 2 - done, depth, reset_rng, fit_rng, tails, task)
    return done + cold, n_reset + n, settled


def _burn_in(
    ensemble: _Ensemble,
    max_steps: int,
    depth: float,
    rng: np.random.Generator,
    fit_rng: np.random.Generator | None,
    tails: Array | None,
    task: Task,
) -> tuple[int, int, bool, Array]:
    """Run until settled, leave the walkers ready -> (steps, walkers put back, settled, draws); no fit_rng, no mixture."""
    done, n_reset, block, settled = 0, 0, 100, False
    longest = max(100, max_steps // 3)
    # draws of the flattened target are only a guide, but a mixture that fits what has been explored hides what has not
    needed, least = (SETTLED_IN_TAU, 0) if ensemble.density.power == 1 else (SETTLED_IN_TAU / 2, LEAST_HOT)
    lately = [ensemble.state.coords]
    while done + block <= max_steps and not settled:
        ensemble.run(block)
        done += block
        half = block // 2
        n_stuck = ensemble.put_back(depth, half, rng)
        n_reset += n_stuck
        tau = float(autocorrelation_time(ensemble.chain(block)).max())
        values = ensemble.log_prob(block)
        drift = _drift(ensemble.chain(block), values, tau)
        task.update(0.0, text=f"burn-in, {done} steps, tau {tau:.0f}")
        settled = n_stuck == 0 and block >= needed * tau and drift < 4 and done >= least
        lately = [c.reshape(-1, c.shape[2]) for c in ensemble.by_group(ensemble.chain(block if settled else half))]
        ensemble.renew(None if fit_rng is None else fit_mixture(lately, fit_rng, tails))
        block = min(math.ceil(GROWTH * block), longest)
    return done, n_reset, settled, np.concatenate(lately)


def _drift(chain: Array, values: Array, tau: float) -> float:
    """Largest difference of halves, in units of its error for draws correlated over tau: log density, means, mean squares."""
    centred = chain - chain.mean(axis=(0, 1))
    x = np.concatenate([values[..., None], centred, centred**2], axis=2)
    half = x.shape[1] // 2
    error = x.std(axis=(0, 1)) * math.sqrt(4 * max(tau, 1.0) / values.size)
    return float((np.abs(x[:, :half].mean(axis=(0, 1)) - x[:, half:].mean(axis=(0, 1))) / np.maximum(error, 1e-300)).max())


def _produce(ensemble: _Ensemble, n_samples: int, max_steps: int, task: Task) -> _Verdict:
    done, target = 0, LEAST
    while True:
        target = min(target, max_steps)
        while done < target:  # in pieces, so that progress moves and Ctrl-C is heard
            step = min(200, target - done)
            ensemble.run(step)
            done += step
            task.update(0.99 * done / target, text=f"{done} of about {target} steps")
        verdict = _judge(ensemble.by_group(ensemble.chain()), n_samples)
        if verdict.good or done >= max_steps:
            task.update(1.0, text=f"{done} steps, tau {verdict.tau.max():.0f}")
            return verdict
        longer = 1.1 * verdict.needed if done <= verdict.needed else 1.5 * done
        # short chains underestimate tau and a small gain is not worth a look: between 1.3 and 3 times as long
        target = math.ceil(min(max(longer, 1.3 * done), 3 * done))


def _judge(chains: list[Array], n_samples: int) -> _Verdict:
    walkers = np.concatenate(chains)
    n_walkers, n_steps, _ = walkers.shape
    tau = autocorrelation_time(walkers)
    longest = float(tau.max())
    n_effective = n_walkers * n_steps / longest
    needed = max(LENGTH_IN_TAU * longest, n_samples * longest / n_walkers)
    r_hat, r_hat_walkers = split_r_hat(_end_to_end(chains)), split_r_hat(walkers)
    # halves of a walker's chain have n_steps / 2 steps, their means a variance of tau / (n_steps / 2): twice that is not chance
    limit = math.sqrt(1 + 2 * longest / (n_steps / 2))
    good = n_steps > needed and r_hat.max() <= R_HAT_MAX and r_hat_walkers.max() <= limit
    text = (
        f"{n_steps} steps are {n_steps / longest:.0f} tau (tau = {longest:.1f}, {LENGTH_IN_TAU} tau wanted),"
        f" {n_effective:.0f} effective draws ({n_samples} wanted), R-hat {r_hat.max():.4f} between groups (<= {R_HAT_MAX}),"
        f" {r_hat_walkers.max():.3f} between walkers (<= {limit:.3f})"
    )
    return _Verdict(tau=tau, n_effective=n_effective, r_hat=r_hat, r_hat_walkers=r_hat_walkers, needed=needed, good=bool(good), text=text)


def _end_to_end(chains: list[Array]) -> Array:
    """One chain per group (and half): walkers' first halves, then their second halves, so that R-hat's split is one in time."""
    parts = chains if len(chains) > 1 else [chains[0][0::2], chains[0][1::2]]
    size = min(c.shape[0] for c in parts)
    return np.stack([np.swapaxes(c[:size], 0, 1).reshape(-1, c.shape[2]) for c in parts])


def _thinned(chains: Array, values: Array, n_samples: int, rng: np.random.Generator) -> tuple[Array, Array]:
    n_walkers, n_steps, dim = chains.shape
    thin = max(1, n_steps // math.ceil(n_samples / n_walkers))
    x, v = chains[:, thin - 1 :: thin].reshape(-1, dim), values[:, thin - 1 :: thin].reshape(-1)
    order = rng.permutation(x.shape[0])[:n_samples]
    return x[order], v[order]
