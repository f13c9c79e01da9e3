r"""Networks compared by their log score on held-out simulations: the same pairs (theta, x) for all.

The mean log score S_k = mean_i log q_k(theta_i | x_i) estimates -E_x[ H(p(.|x)) + KL(p(.|x) || q_k(.|x)) ]: the entropy H is the same for
all, so differences of scores are differences of the mean KL divergence from the exact posterior, whatever that is. The score is proper:
only the exact posterior has the largest expected score.

The scores of a row depend on the row much more than on the network, so that the difference is taken row by row:

    D_k = S_k - S_best,     error^2 = Var_i[log q_k - log q_best] / n

p-values are those of the two-sided paired t-test, times the number of pairs of networks, because the best one was found with the
same rows. A network that gives no density to a true value has the score -inf.

Source: Gneiting & Raftery 2007, J. Am. Stat. Assoc. 102, 359 (proper scores); Lueckmann et al. 2021, arXiv:2101.04653 (its use here).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import t as student

from sbi_phys.calibration.coverage import coverage
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.calibration.sbc import sbc
from sbi_phys.calibration.two_sample import c2st
from sbi_phys.comparison._held_out import Simulations, log_score, read_pairs
from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, Integers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["NetworkComparison", "compare_networks"]

MIN_ROWS = 50  # of held-out simulations
_CHUNK_DRAWS = 200_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NetworkComparison(Result):
    """Result of `compare_networks`: K networks on n held-out simulations; nats.

    names (K,). score (K,), mean log q(theta | x), with score_err, its error from the number of rows. best, the name with the largest.
    difference (K,) to the best, row by row, with difference_err; pvalues {name: p}, that it is zero, corrected (1 for the best).
    n_zero (K,), rows in which a network has no density. n_draws for each row; pvalues_sbc and pvalues_coverage {name: p}, empty without
    draws. c2st (K, K), accuracy of separating joint draws (theta, x) of two networks, NaN on the diagonal; None if not asked for.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng, prior = np.random.default_rng(0), sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(300, rng)
    >>> x = theta + rng.normal(size=(300, 1))
    >>> short, long = (sp.NPE(prior, config=sp.TrainConfig(max_epochs=k)).fit(theta[:200], x[:200]) for k in (1, 3))
    >>> found = sp.comparison.compare_networks({"short": short, "long": long}, (theta[200:], x[200:]), n_draws=0)
    >>> found.score.shape, found.names
    ((2,), ('short', 'long'))
    """

    names: tuple[str, ...]
    n: int
    score: Array
    score_err: Array
    best: str
    difference: Array
    difference_err: Array
    pvalues: dict[str, float]
    n_zero: Integers
    n_draws: int
    pvalues_sbc: dict[str, float]
    pvalues_coverage: dict[str, float]
    c2st: Array | None

    @property
    def as_good(self) -> tuple[str, ...]:
        """Names whose score does not differ from the best at 5 %, the best included."""
        return tuple(name for name in self.names if self.pvalues[name] > ALPHA)

    def rows(self) -> Rows:
        """Return the table: one row for each network."""
        found = {"name": self.names, "score": self.score, "score_err": self.score_err, "difference": self.difference}
        found |= {"difference_err": self.difference_err, "pvalue": [self.pvalues[n] for n in self.names], "n_zero": self.n_zero}
        for title, values in (("pvalue_sbc", self.pvalues_sbc), ("pvalue_coverage", self.pvalues_coverage)):
            found |= {title: [values[n] for n in self.names]} if values else {}
        if self.c2st is not None:
            found |= {f"c2st to {name}": self.c2st[:, j] for j, name in enumerate(self.names)}
        return Rows.of(found, dict.fromkeys(("score", "score_err", "difference", "difference_err"), "nats"))

    def summary(self) -> str:
        """Return the result in words: the best network first, then one line for each in the order of the scores."""
        others = [name for name in self.as_good if name != self.best]
        equal = f"; as good within errors: {', '.join(others)}" if others else ""
        lines = [f"Log score of {self.n} held-out simulations: best {self.best}{equal}"]
        pad = max(map(len, self.names))
        for k in np.argsort(-self.score, kind="stable"):
            name = self.names[k]
            line = f"  {name:<{pad}}  {self.score[k]:.4f} +- {self.score_err[k]:.4f} nats"
            if name != self.best:
                line += f"  {self.difference[k]:+.4f} +- {self.difference_err[k]:.4f} to the best (p = {self.pvalues[name]:.2g})"
            if self.n_zero[k]:
                line += f"  NO density at {self.n_zero[k]} true values"
            tests = {"SBC": self.pvalues_sbc, "coverage": self.pvalues_coverage}
            line += "".join(f"  {title} p = {values[name]:.2g}" for title, values in tests.items() if values)
            if self.c2st is not None and name != self.best:
                line += f"  C2ST to the best {self.c2st[k, self.names.index(self.best)]:.3f}"
            lines.append(line)
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the difference of each network to the best one with its error.   Read: within two errors of 0 = as good."""
        shown = np.where(np.isfinite(self.difference), self.difference, np.nan)
        label = f"log score - that of {self.best} [nats]"
        return figures.results.forest(self.names, shown, self.difference_err, ax, line=0.0, xlabel=label)


def compare_networks(
    networks: Mapping[str, Any],
    held_out: Simulations,
    n: int = 1000,
    *,
    n_draws: int = 200,
    n_c2st: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> NetworkComparison:
    r"""Compare posteriors by the log score of the true parameters of simulations that none of them was trained on.

    Args:
        networks: {name: estimator}, each with `log_prob(theta, x)`, normalised, and, for n_draws > 0, `sample(x, n, seed=...)`.
        held_out: a store, its path, or (theta (n, d), x (n, ...)), not used in any training.
        n: at most so many of its rows.
        n_draws: posterior draws for each row, for SBC and coverage; 0 leaves these tests out.
        n_c2st: joint draws (theta, x) of each network of a pair for the C2ST; 0 leaves it out. The two samples are of different rows.
        seed: of all draws.
        progress: default none.

    Returns: NetworkComparison.
    Raises: SettingError (fewer than two networks, no density), ShapeError, NonFiniteError, DataError (fewer than 50 rows), StoreError.
    Source: Gneiting & Raftery 2007, J. Am. Stat. Assoc. 102, 359.
    Read: a difference of d nats to the best is a mean KL divergence larger by d; below its two errors it means nothing. The score ranks
        networks, SBC and coverage say whether one is right.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng, prior = np.random.default_rng(0), sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(300, rng)
    >>> x = theta + rng.normal(size=(300, 1))
    >>> npe = sp.NPE(prior, config=sp.TrainConfig(max_epochs=1)).fit(theta[:200], x[:200])
    >>> found = sp.comparison.compare_networks({"a": npe, "b": npe}, (theta[200:], x[200:]), n_draws=0)
    >>> found.difference.tolist(), found.as_good
    ([0.0, 0.0], ('a', 'b'))
    """
    names = _names(networks)
    n, n_draws = require_int("n", n, low=MIN_ROWS), require_int("n_draws", n_draws, low=0)
    n_c2st = require_int("n_c2st", n_c2st, low=0)
    if 0 < n_draws < 10:
        raise SettingError(f"n_draws is {n_draws}; expected 0 for no calibration, or at least 10")
    observables = next((o for e in networks.values() if (o := getattr(e, "observables", None)) is not None), None)
    theta, x = read_pairs("held_out", held_out, n, observables)
    if len(theta) < MIN_ROWS:
        raise DataError(f"held_out has {len(theta)} rows; expected at least {MIN_ROWS}")
    if 2 * n_c2st > len(theta):
        raise DataError(
            f"n_c2st is {n_c2st} for {len(theta)} held-out rows; expected at most {len(theta) // 2}: samples have different rows"
        )
    n_pairs = len(names) * (len(names) - 1) // 2
    with or_none(progress).task("compare networks", total=len(names) + (n_pairs if n_c2st else 0)) as task:
        scores, tests = [], []
        for name in names:
            scores.append(log_score(name, networks[name], theta, x))
            tests.append(_calibration(networks[name], theta, x, scores[-1], n_draws, seed))
            task.advance(1, name)
        matrix = None
        if n_c2st:
            matrix = np.full((len(names), len(names)), np.nan)
            for i, j in zip(*np.triu_indices(len(names), 1), strict=True):
                pair = (networks[names[i]], networks[names[j]])
                matrix[i, j] = matrix[j, i] = _joint_c2st(pair, x, n_c2st, seed_for(seed, "c2st", int(i), int(j)))
                task.advance(1, f"C2ST {names[i]}, {names[j]}")
    return _result(names, np.stack(scores), tests, n_draws, matrix)


def _names(networks: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(networks, Mapping) or not all(isinstance(name, str) and name for name in networks):
        raise SettingError(f"networks is {networks!r}; expected {{name: estimator}}")
    if len(networks) < 2:
        raise SettingError(f"networks has {len(networks)} entries; expected at least two to compare")
    return tuple(networks)


def _calibration(network: Any, theta: Array, x: Array, at_theta: Array, n_draws: int, seed: int) -> tuple[float, float] | None:
    """P-values of SBC and of the coverage of joint regions, or of single intervals where draws have no density."""
    if not n_draws:
        return None
    step = max(1, _CHUNK_DRAWS // n_draws)
    parts, densities = [], []
    for k, start in enumerate(range(0, len(theta), step)):
        rows = x[start : start + step]
        parts.append(np.asarray(network.sample(rows, n_draws, seed=seed_for(seed, "calibrate", k))))
        if hasattr(network, "log_prob_draws"):
            densities.append(network.log_prob_draws(parts[-1], rows))
    draws = np.concatenate(parts)
    joint = (at_theta, np.concatenate(densities)) if densities else ()
    return sbc(theta, draws, seed=seed).pvalue, coverage(theta, draws, *joint, seed=seed).pvalue


def _joint_c2st(pair: tuple[Any, Any], x: Array, n: int, seed: int) -> float:
    order = rng_for(seed, "rows").permutation(len(x))
    samples = []
    for k, network in enumerate(pair):
        rows = x[order[k * n : (k + 1) * n]]
        draws = np.asarray(network.sample(rows, 1, seed=seed_for(seed, "draw", k)))[:, 0]
        samples.append(np.hstack([draws, np.nan_to_num(rows.reshape(n, -1))]))
    return float(c2st(*samples, seed=seed))


def _result(
    names: tuple[str, ...], scores: Array, tests: list[tuple[float, float] | None], n_draws: int, matrix: Array | None
) -> NetworkComparison:
    n = scores.shape[1]
    zero = np.isneginf(scores).sum(axis=1)
    mean = scores.mean(axis=1)
    best = int(np.argmax(mean))
    if zero.all():
        raise DataError(f"every network has no density at some true values ({min(zero)} rows at least); expected one with a finite score")
    with np.errstate(invalid="ignore"):
        finite = zero == 0
        each = np.where(finite[:, None], scores - scores[best], np.nan)
        score_err = np.where(finite, np.where(finite[:, None], scores, 0.0).std(axis=1, ddof=1) / np.sqrt(n), np.nan)
        difference = np.where(finite, each.mean(axis=1), -np.inf)
        difference_err = each.std(axis=1, ddof=1) / np.sqrt(n)
    n_pairs = len(names) * (len(names) - 1) // 2
    pvalues = [1.0 if k == best else min(1.0, n_pairs * _paired(difference[k], difference_err[k], n)) for k in range(len(names))]
    known = {name: test for name, test in zip(names, tests, strict=True) if test is not None}
    return NetworkComparison(
        names=names,
        n=n,
        score=mean,
        score_err=score_err,
        best=names[best],
        difference=difference,
        difference_err=difference_err,
        pvalues=dict(zip(names, pvalues, strict=True)),
        n_zero=zero.astype(np.int64),
        n_draws=n_draws,
        pvalues_sbc={name: test[0] for name, test in known.items()},
        pvalues_coverage={name: test[1] for name, test in known.items()},
        c2st=matrix,
    )


def _paired(difference: float, error: float, n: int) -> float:
    """Two-sided p-value of the paired t-test; 1 for equal scores in all rows, 0 for a score of -inf."""
    if np.isneginf(difference):
        return 0.0
    return 1.0 if error == 0 and difference == 0 else float(2 * student.sf(abs(difference) / max(error, 1e-300), n - 1))
