r"""Markov chain Monte Carlo with emcee, run until it has converged; otherwise the error says how far it is from convergence.

The walkers form several groups. Each group is an ensemble of its own whose walkers are helped by no others, so that agreement between
groups is evidence of convergence. A run has two parts:

1. Burn-in, in blocks of growing length. A walker whose best log density of a block's second half lies more than `stuck_below` under the
   group's median is stuck in a negligible mode: it is moved to a place that another walker of its group visited in that half. Such a
   mode could only matter if its volume were exp(stuck_below) times larger. Burn-in ends with a block that is 10 autocorrelation times
   long, has no stuck walker, and whose halves agree in mean log density, means and mean squares. Unless the caller gives `moves`, a
   mixture is fitted to the draws after each block (`mixture.fit_mixture`), and the next steps propose independent draws from it beside
   the local moves: a single step can then cross a curved posterior on which local moves are slow. A mixture that is too narrow in the
   tails makes walkers stick there, so burn-in starts with the flattened densities p^0.2 and p^0.5, at least 500 steps each, whose draws
   reach farther, and the mixture covers these too. They are left out if they do not settle, for instance because p^0.2 has no integral;
   then, and on very thin curved targets, compare several seeds.
2. Production, in which nothing is reset or fitted. The last mixture is kept, so every step is Markov and leaves the target invariant,
   however good the fit (Tierney 1994, Ann. Statist. 22, 1701). No draw of burn-in is kept. Production ends when, for every parameter, the
   chain is longer than 50 tau (`diagnostics`), walkers x steps / tau >= n_draws, split R-hat between groups <= 1.01, and R-hat between
   single walkers is no larger than chains of that length give by chance.

A mode is sampled with its right weight only if walkers travel between modes. The mode jump (below) does that if both modes hold walkers of
a group, see `spread_start`; the mixture carries walkers between all modes that any group has found. If walkers do not travel, R-hat
between walkers and tau show it. Groups share nothing in production but the fixed mixture.

Moves: a walker x moves with the help of walkers z, z1, z2 of the other half of its group, which stand still meanwhile:

- differential evolution: x' = x + g (z1 - z2), g = 2.38 / sqrt(2 d), the best scale for a Gaussian;
- mode jump: the same with g = 1, which carries a walker from one mode to the corresponding place of another;
- snooker: along the line through z, x' = x + 1.7 e (e . (z1 - z2)), e = (x - z) / |x - z|, accepted with the Jacobian
  of radial moves, (|x' - z| / |x - z|)^(d - 1);
- stretch: x' = z + s (x - z), affine-invariant;
- independence: x' is drawn from a fixed density q, and accepted with probability min(1, p(x') q(x) / (p(x) q(x'))).

The snooker move is written here because that of emcee 3.1.6 does not leave the target invariant: it divides by sqrt(|x - z|) and takes half
of the Jacobian's exponent, so that a standard normal in 8 dimensions has E[x^2] = 0.63 instead of 1 (corrected after that release in
emcee's pull request 531).

Source: Foreman-Mackey et al. 2013, arXiv:1202.3665; R-hat: Vehtari et al. 2021, arXiv:1903.08008; moves: ter Braak & Vrugt 2008, Stat.
Comput. 18, 435; Nelson et al. 2014, arXiv:1311.5229; Goodman & Weare 2010.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import chdtri

from sbi_phys.core.checks import as_array, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.results import Result, Rows, draws_rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask
from sbi_phys.samplers.density import CheckedDensity, LogDensity, require_positive
from sbi_phys.samplers.diagnostics import Verdict, autocorrelation_time, judge, require_converged, run_until_converged, split_r_hat, thinned
from sbi_phys.samplers.mixture import Mixture, fit_mixture

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MCMCResult", "default_moves", "run_emcee"]


INDEPENDENCE_SHARE = 0.7
LEAST_HOT, LEAST = 500, 1000  # fewest steps of each flattened part of burn-in, and of production before it is judged
SETTLED_IN_TAU = 10
HOT = (0.2, 0.5)  # powers of the density in the first parts of burn-in, 5 and 2 the temperatures
GROWTH = 1.5  # of the blocks of burn-in


@dataclass(frozen=True, kw_only=True, slots=True)
class MCMCResult(Result):
    r"""Draws of a Markov chain and the evidence for their convergence, returned by `run_emcee`.

    samples (n, d), thinned to about one per autocorrelation time, in random order (fewer than asked for only if not converged);
    log_prob (n,) at them.
    chains (n_walkers, n_steps, d), production only, all steps; group (n_walkers,), the ensemble that a walker belongs to.
    autocorr_time (d,), steps. n_effective, walkers x steps / largest tau. acceptance, mean share of accepted moves;
    acceptance_independence, that of the proposals from the mixture, and n_components, its Gaussians (NaN and 0 without a mixture).
    r_hat (d,), between groups; r_hat_walkers (d,), between single walkers. n_burn, steps dropped; n_reset, walkers put back in burn-in.
    n_evaluations of the log density. converged; message says why or why not.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> start = np.random.default_rng(0).standard_normal((16, 1))
    >>> result = sp.samplers.run_emcee(lambda u: -0.5 * u[:, 0] ** 2, start, n_draws=500, independence=False)
    >>> result.summary().startswith("MCMC, 16 walkers in 2 groups"), result.chains.shape
    (True, (16, 1000, 1))
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

    def rows(self) -> Rows:
        """Return the table: one row for each column of the draws, with mean, sd, intervals and the numbers of convergence."""
        names = [f"u_{j}" for j in range(self.samples.shape[1])]
        found = {"r_hat": self.r_hat, "r_hat_walkers": self.r_hat_walkers, "autocorr_time": self.autocorr_time}
        return draws_rows(self.samples, names, further=found)

    def summary(self) -> str:
        """Return the result in words."""
        size = f"{self.chains.shape[0]} walkers in {self.group.max() + 1} groups x {self.chains.shape[1]} steps"
        burn = f"after {self.n_burn} of burn-in ({self.n_reset} walkers put back)"
        mixture = f" ({self.acceptance_independence:.2f} from a mixture of {self.n_components})" if self.n_components else ""
        verdict = "converged" if self.converged else "NOT converged"
        return f"MCMC, {size} {burn}: {verdict}, {self.message}; acceptance {self.acceptance:.2f}{mixture}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the means of the groups along the chain.   Read: no trends, and lines that cross = converged."""
        return figures.results.chains(self.chains, self.group, ax)


def run_emcee(
    log_prob: LogDensity,
    start: ArrayLike,
    *,
    n_draws: int = 10_000,
    max_steps: int = 50_000,
    seed: int = 0,
    n_groups: int | None = None,
    moves: list[tuple[Any, float]] | None = None,
    independence: bool | None = None,
    stuck_below: float | None = None,
    raise_on_failure: bool = True,
    progress: Progress | None = None,
) -> MCMCResult:
    r"""Draw from exp(log_prob) with emcee until the chain has converged and holds n_draws effectively independent draws.

    Args:
        log_prob: (m, d) -> (m,), unnormalised log density, vectorised; -inf outside the support.
        start: (n_walkers, d), places of positive density, all different (see `spread_start`); at least max(2 d + 2, 8) walkers a group.
        n_draws: effectively independent draws to return.
        max_steps: most steps of a walker, burn-in included.
        seed: same seed, same chain; numpy's global generator is left alone.
        n_groups: independent ensembles; default 4, or fewer where there are too few walkers. Walker i starts in group i modulo n_groups.
        moves: emcee moves with weights; default `default_moves()`.
        independence: propose a share of 0.7 of the steps from a mixture fitted in burn-in and fixed afterwards; default only if no
            `moves` are given.
        stuck_below: nats, see the module; default 5 more than a Gaussian's far tail, chi2_d.isf(1e-6) / 2 + 5, 26 for d = 8.
        raise_on_failure: False returns an unconverged result (`converged`, `message`) instead of raising.
        progress: shows the share of the length needed, tau and R-hat.

    Returns: MCMCResult.
    Raises: ShapeError, NonFiniteError (NaN or +inf, naming the point), DataError (start), SettingError, ConvergenceError.
    Source: Foreman-Mackey et al. 2013, arXiv:1202.3665.
    Read: r_hat <= 1.01 and chain longer than 50 tau = converged as far as the places that any walker has reached.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> start = np.random.default_rng(0).standard_normal((16, 1))
    >>> result = sp.samplers.run_emcee(lambda u: -0.5 * u[:, 0] ** 2, start, n_draws=500, independence=False)
    >>> result.converged, result.samples.shape, bool(abs(result.samples.std() - 1) < 0.2)
    (True, (500, 1), True)
    """
    walkers = as_array("start", start, (None, None))
    n_walkers, dim = walkers.shape
    n_draws, max_steps = require_int("n_draws", n_draws, low=1), require_int("max_steps", max_steps, low=100)
    n_groups = _group_number(n_groups, n_walkers, dim)
    depth = float(chdtri(dim, 1e-6)) / 2 + 5 if stuck_below is None else require_number("stuck_below", stuck_below, low=0, open_low=True)
    density = CheckedDensity(log_prob, dim)
    ensemble = _Ensemble(density, walkers, n_groups, default_moves() if moves is None else moves, seed)
    with or_none(progress).task("MCMC", total=1.0) as task:
        n_burn, n_reset, settled = _warm_up(ensemble, max_steps, depth, seed, moves is None if independence is None else independence, task)
        verdict = run_until_converged(
            ensemble.run, lambda: _judge(ensemble, n_draws), task, first=LEAST, max_steps=max_steps - n_burn, piece=200
        )
    if not settled:
        verdict = replace(verdict, converged=False, message=f"burn-in did not settle in {n_burn} steps; {verdict.message}")
    if raise_on_failure:
        require_converged("MCMC", verdict, max_steps)
    chains, free = ensemble.chain(), ensemble.independence
    samples, values = thinned(chains, ensemble.log_prob(), n_draws, rng_for(seed, "mcmc draws"))
    return MCMCResult(
        samples=samples,
        log_prob=values,
        chains=chains,
        group=ensemble.group,
        autocorr_time=verdict.autocorr_time,
        n_effective=verdict.n_effective,
        acceptance=float(np.mean(ensemble.sampler.acceptance_fraction)),
        acceptance_independence=math.nan if free is None else free.n_accepted / max(free.n_tried, 1),
        n_components=0 if free is None else free.mixture.n_gaussians,
        r_hat=verdict.r_hat,
        r_hat_walkers=verdict.r_hat_walkers,
        n_burn=n_burn,
        n_reset=n_reset,
        n_evaluations=density.n_evaluations,
        converged=verdict.converged,
        message=verdict.message,
    )


def _group_number(n_groups: int | None, n_walkers: int, dim: int) -> int:
    least = max(2 * dim + 2, 8)  # above emcee's own limit, and three helpers in each half of a group
    if n_groups is None:
        n_groups = max(1, min(4, n_walkers // least))
    n_groups = require_int("n_groups", n_groups, low=1)
    if n_walkers // n_groups < least:
        raise ShapeError(f"start has {n_walkers} walkers for {n_groups} groups in {dim} dimensions; expected at least {n_groups * least}")
    return n_groups


@dataclass(frozen=True, kw_only=True, slots=True)
class _Verdict(Verdict):
    """Verdict with R-hat (d,) between single walkers."""

    r_hat_walkers: Array


class _Ensemble:
    """All walkers, group by group, in one emcee sampler with its own generator and moves within the groups."""

    def __init__(self, density: CheckedDensity, start: Array, n_groups: int, moves: list[tuple[Any, float]], seed: int) -> None:
        import emcee

        group = np.arange(start.shape[0]) % n_groups
        order = np.argsort(group, kind="stable")
        start, self.group = start[order], group[order]
        values = density(start)
        require_positive(values, start, "walker")
        for g in range(n_groups):
            spread = start[self.group == g] - start[self.group == g].mean(axis=0)
            scale = np.where(spread.std(axis=0) > 0, spread.std(axis=0), 1.0)
            if np.linalg.matrix_rank(spread / scale, tol=1e-9) < start.shape[1]:
                raise DataError(f"start of group {g} spans fewer than {start.shape[1]} dimensions; expected walkers at different places")
        self.density = density
        total = sum(weight for _, weight in moves)
        self.moves = [(_in_groups(move, self.group), weight / total) for move, weight in moves]
        self.renew(None)
        random = np.random.RandomState(seed_for(seed, "mcmc") % 2**32)
        self.state = emcee.State(start, log_prob=values, random_state=random.get_state())

    def temper(self, power: float) -> None:
        """Continue with the density to this power from the present places of the walkers."""
        self.density.power = power
        self.state.log_prob = self.density(self.state.coords)

    def renew(self, mixture: Mixture | None) -> None:
        """Drop the chain, keep the places of the walkers; continue with the local moves and, if given, draws from the mixture."""
        import emcee

        self.independence = None if mixture is None else _Independence(mixture)
        moves = self.moves
        if self.independence is not None:
            moves = [(m, (1 - INDEPENDENCE_SHARE) * w) for m, w in moves] + [(self.independence, INDEPENDENCE_SHARE)]
        self.sampler = emcee.EnsembleSampler(self.group.size, self.density.dim, self.density, moves=moves, vectorize=True)
        self.sampler.log_prob_fn = self.density  # emcee's own wrapper prints exceptions

    def run(self, n_steps: int) -> None:
        self.state = self.sampler.run_mcmc(self.state, n_steps, skip_initial_state_check=True)

    def chain(self, last: int = 0) -> Array:
        return np.swapaxes(self.sampler.get_chain()[-last:], 0, 1)

    def log_prob(self, last: int = 0) -> Array:
        return np.swapaxes(self.sampler.get_log_prob()[-last:], 0, 1)

    def by_group(self, chain: Array) -> list[Array]:
        return [chain[self.group == g] for g in range(self.group.max() + 1)]

    def put_back(self, depth: float, last: int, rng: np.random.Generator) -> int:
        """Move stuck walkers to places that other walkers of their group visited in the last steps; return how many."""
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
    """Burn in, with the flattened targets first if a mixture is used -> (steps, walkers put back, settled)."""
    reset_rng, fit_rng = rng_for(seed, "mcmc resets"), rng_for(seed, "mcmc mixture")
    if not independence:
        return _burn_in(ensemble, max_steps // 2, depth, reset_rng, None, None, task)[:3]
    start, done, n_reset, tails = ensemble.state, 0, 0, None
    for power in HOT:
        ensemble.temper(power)
        steps, n, settled, draws = _burn_in(ensemble, max_steps // 8, depth, reset_rng, fit_rng, tails, task)
        done += steps
        if not settled:  # the power of a heavy tail has no integral, or max_steps is too small
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
    """Run until settled -> (steps, walkers put back, settled, draws); without fit_rng no mixture is fitted."""
    done, n_reset, block, settled = 0, 0, 100, False
    longest = max(100, max_steps // 3)
    # draws of a flattened target need not be exact, but must reach far: the mixture cannot cover what no walker has visited
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


def _judge(ensemble: "_Ensemble", n_draws: int) -> _Verdict:
    groups = ensemble.by_group(ensemble.chain())
    walkers = np.concatenate(groups)
    found = judge(walkers, n_draws, split_r_hat(_end_to_end(groups)), "groups")
    r_hat = split_r_hat(walkers)
    # the means of half chains have a variance of tau / (n_steps / 2); twice that is more than chance
    limit = math.sqrt(1 + 2 * float(found.autocorr_time.max()) / (walkers.shape[1] / 2))
    return _Verdict(
        autocorr_time=found.autocorr_time,
        r_hat=found.r_hat,
        n_effective=found.n_effective,
        n_needed=found.n_needed,
        converged=found.converged and bool(r_hat.max() <= limit),
        message=f"{found.message}, {r_hat.max():.3f} between walkers (<= {limit:.3f})",
        r_hat_walkers=r_hat,
    )


def _end_to_end(chains: list[Array]) -> Array:
    """One chain per group (or half of one): the walkers step by step, so that the split of R-hat is a split in time."""
    parts = chains if len(chains) > 1 else [chains[0][0::2], chains[0][1::2]]
    size = min(c.shape[0] for c in parts)
    return np.stack([np.swapaxes(c[:size], 0, 1).reshape(-1, c.shape[2]) for c in parts])


def _snooker_proposal(x: Array, others: Array, rng: Any, gamma: float = 1.7) -> tuple[Array, Array]:
    """Propose along the lines through other walkers -> (x' (n, d), log acceptance factor (n,)).

    Args: x (n, d). others (m >= 3, d). rng: a numpy RandomState, emcee's.   Source: ter Braak & Vrugt 2008.
    """
    # three different helpers each: the first three places of sorted random keys
    picks = np.argsort(rng.rand(x.shape[0], others.shape[0]), axis=1)[:, :3]
    z, z1, z2 = others[picks[:, 0]], others[picks[:, 1]], others[picks[:, 2]]
    away = x - z
    distance = np.maximum(np.linalg.norm(away, axis=1), 1e-300)
    direction = away / distance[:, None]
    moved = x + gamma * direction * ((z1 - z2) * direction).sum(axis=1, keepdims=True)
    after = np.maximum(np.linalg.norm(moved - z, axis=1), 1e-300)
    return moved, (x.shape[1] - 1.0) * (np.log(after) - np.log(distance))


def default_moves() -> list[tuple[Any, float]]:
    """Return emcee moves with their probabilities: 0.65 differential evolution, 0.1 mode jump, 0.1 snooker, 0.15 stretch.

    >>> import sbi_phys as sp
    >>> [weight for _, weight in sp.samplers.default_moves()]
    [0.65, 0.1, 0.1, 0.15]
    """
    from emcee import moves

    class Snooker(moves.RedBlueMove):
        """Snooker move with two halves (vectorised)."""

        def get_proposal(self, sample: Array, complement: list[Array], random: Any) -> tuple[Array, Array]:
            """Propose for one half of the walkers with the help of the other."""
            return _snooker_proposal(sample, np.concatenate(complement), random)

    return [(moves.DEMove(), 0.65), (moves.DEMove(gamma0=1.0), 0.1), (Snooker(), 0.1), (moves.StretchMove(), 0.15)]


def _in_groups(move: Any, group: Integers) -> Any:
    """Return an emcee move that works within groups of walkers, group (n_walkers,), and evaluates the density of all groups in one call.

    Each group is split into halves of its own, and a walker is helped by its own group only, so groups are independent chains.
    One call instead of one for each group is several times faster if a call is expensive beside a row.
    A move without helpers (MHMove, _Independence) is returned unchanged.   Raises: SettingError for any other move.
    """
    from emcee import State, moves

    if isinstance(move, moves.MHMove | _Independence):
        return move
    if not isinstance(move, moves.RedBlueMove):
        raise SettingError(f"moves has {move!r}; expected emcee's RedBlueMove or MHMove, or a class derived from them")
    members = [np.flatnonzero(group == g) for g in np.unique(group)]

    class InGroups(moves.Move):
        """The move applied to halves of each group."""

        def propose(self, model: Any, state: Any) -> tuple[Any, Mask]:
            """Move the first halves of all groups, then the second ones."""
            accepted = np.zeros(group.size, dtype=bool)
            move.setup(state.coords)
            halves = [np.array_split(model.random.permutation(m), 2) for m in members]
            for first in (0, 1):
                made = [move.get_proposal(state.coords[h[first]], [state.coords[h[1 - first]]], model.random) for h in halves]
                rows, factor = np.concatenate([h[first] for h in halves]), np.concatenate([f for _, f in made])
                order = np.argsort(rows)  # emcee updates by a mask, in the order of walkers
                rows, moved = rows[order], np.concatenate([q for q, _ in made])[order]
                values, blobs = model.compute_log_prob_fn(moved)
                log_ratio = factor[order] + values - state.log_prob[rows]
                accepted[rows] = np.log(model.random.rand(rows.size)) < log_ratio
                mask = np.zeros(group.size, dtype=bool)
                mask[rows] = True
                state = self.update(state, State(moved, log_prob=values, blobs=blobs), accepted, mask)
            return state, accepted

    return InGroups()


class _Independence:
    """Metropolis-Hastings move whose proposals are draws of a fixed mixture, whatever the place of the walker; it counts its steps.

    The mixture is fixed, so the chain is Markov with the target as its stationary distribution.   Source: Tierney 1994.
    """

    def __init__(self, mixture: Mixture) -> None:
        """Take the mixture."""
        from emcee import moves

        self.mixture, self.n_tried, self.n_accepted = mixture, 0, 0
        self._rule = moves.MHMove(self.proposal)

    def proposal(self, x: Array, random: Any) -> tuple[Array, Array]:
        """Propose from x (n, d) -> (x' (n, d), log q(x) - log q(x') (n,))."""
        moved = self.mixture.sample(x.shape[0], random)
        log_q = self.mixture.log_prob(np.concatenate([x, moved]))
        return moved, log_q[: x.shape[0]] - log_q[x.shape[0] :]

    def propose(self, model: Any, state: Any) -> tuple[Any, Mask]:
        """Move all walkers at once (emcee calls this) -> (state, accepted (n,))."""
        state, accepted = self._rule.propose(model, state)
        self.n_tried, self.n_accepted = self.n_tried + accepted.size, self.n_accepted + int(accepted.sum())
        return state, accepted

    def tune(self, state: Any, accepted: Mask) -> None:
        """Do nothing: emcee calls this so that a move can adapt, and this one must not."""
