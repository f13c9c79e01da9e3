r"""Learning curve: the log score on held-out simulations against the number of simulations trained on. Would more help?

Networks are trained on random subsets of n_1 < ... < n_m simulations and scored on the same held-out pairs. The mean score S(n) is
modelled as

    S(n) = a - b n^-c,          gain of a doubling of the largest n:  g = S(2 n_m) - S(n_m) = b n_m^-c (1 - 2^-c),

where a is the score of the network of this kind with unlimited simulations: minus the mean entropy of the posterior, if the network can
represent it. The scores y_j, one for each training j, have the covariance

    C = Cov_rows(y) / n_held + diag( tau^2 n_m / n_j ):

the first term from the held-out rows, which are the same for all trainings, so that differences are far better known than the scores;
the second from the scatter between trainings, which falls as the distance from a does. a and the total gain are linear parameters with
flat priors; log c, flat in c = 0.2 to 1.5, and log tau are integrated on a grid, so that the error of the gain includes that of c.
c = 1 is the rate of a parametric model, smaller c that of one whose error is limited by its flexibility.

Source: Hestness et al. 2017, arXiv:1712.00409; Viering & Loog 2021, arXiv:2103.10948 (power laws of learning curves).
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.comparison._held_out import Simulations, log_score, read_pairs
from sbi_phys.core.checks import require_int, require_number
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.files import open_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import AnyArray, Array, ArrayLike, Integers
from sbi_phys.core.version import __version__
from sbi_phys.store.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LearningCurve", "learning_curve"]

MIN_HELD_OUT, MIN_SIZES = 50, 3
TOLERANCE = 0.02  # nats: a gain below this is not worth twice the simulations
_EXPONENTS = np.geomspace(0.2, 1.5, 30)
_SCATTERS = np.geomspace(1e-4, 1.0, 25)  # nats, of trainings at the largest size


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LearningCurve(Result):
    """Result of `learning_curve`: m sizes, r trainings of each, n_held_out pairs; scores in nats.

    sizes (m,). score (m, r), mean log q(theta | x) of each training. mean (m,) over trainings, with error (m,), that of the
    held-out rows and of the trainings. asymptote a with asymptote_err, exponent c with exponent_err, scatter between trainings at
    the largest size. gain of doubling the largest size, with gain_err. tolerance: a smaller gain is not worth it.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng, prior = np.random.default_rng(0), sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(400, rng)
    >>> make = lambda seed: sp.NPE(prior, seed=seed, config=sp.TrainConfig(max_epochs=1))
    >>> found = sp.comparison.learning_curve(make, (theta, theta + rng.normal(size=(400, 1))), [50, 100, 200], n_held_out=100, n_repeats=1)
    >>> found.score.shape, found.answer in ("yes", "no", "cannot tell")
    ((3, 1), True)
    """

    sizes: Integers
    score: Array
    mean: Array
    error: Array
    n_held_out: int
    asymptote: float
    asymptote_err: float
    exponent: float
    exponent_err: float
    scatter: float
    gain: float
    gain_err: float
    tolerance: float

    @property
    def answer(self) -> str:
        """Whether more simulations would help: 'yes', 'no' or 'cannot tell'.

        'yes': the gain of doubling exceeds twice its error and the tolerance. 'no': gain and twice its error are below the tolerance.
        """
        if self.gain > 2 * self.gain_err and self.gain >= self.tolerance:
            return "yes"
        return "no" if self.gain + 2 * self.gain_err < self.tolerance else "cannot tell"

    def rows(self) -> Rows:
        """Return the table: one row for each size."""
        found = {"n": self.sizes, "n_trainings": self.score.shape[1], "score": self.mean, "score_err": self.error}
        found |= {"lowest": self.score.min(axis=1), "highest": self.score.max(axis=1)}
        return Rows.of(found, dict.fromkeys(("score", "score_err", "lowest", "highest"), "nats"))

    def summary(self) -> str:
        """Return the result in words: the answer first."""
        n = int(self.sizes[-1])
        why = {
            "yes": "more simulations would help",
            "no": f"more simulations would not help: the gain is below {self.tolerance:g} nats",
            "cannot tell": "the error is too large for an answer; take more held-out rows or more trainings",
        }[self.answer]
        lines = [
            f"Would more simulations help? {self.answer.capitalize()}: doubling {n} to {2 * n} simulations is expected to raise the log "
            f"score by {self.gain:.4f} +- {self.gain_err:.4f} nats; {why}",
            f"  score with unlimited simulations {self.asymptote:.4f} +- {self.asymptote_err:.4f} nats, "
            f"approached as n^-{self.exponent:.2f} (+- {self.exponent_err:.2f})",
        ]
        lines += [f"  n = {k:<9} {s:.4f} +- {e:.4f} nats" for k, s, e in zip(self.sizes, self.mean, self.error, strict=True)]
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw scores with errors, the fit up to the doubled size, and its asymptote.   Read: flat at the end = more will not help."""
        return figures.results.learning_curve(self, ax)

    def fitted(self, n: ArrayLike) -> Array:
        """Score of the fit at n simulations: S(n_m) + (a - S(n_m)) (1 - (n / n_m)^-c)."""
        last = self.asymptote - self.gain / (1 - 2**-self.exponent)
        ratio = np.asarray(n, dtype=np.float64) / self.sizes[-1]
        return np.asarray(self.asymptote - (self.asymptote - last) * ratio**-self.exponent)


def learning_curve(
    make_estimator: Callable[[int], Any],
    simulations: Simulations,
    sizes: Sequence[int] | None = None,
    *,
    n_held_out: int = 1000,
    n_repeats: int = 2,
    tolerance: float = TOLERANCE,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> LearningCurve:
    r"""Train on subsets of growing size and predict what more simulations would bring.

    Args:
        make_estimator: seed -> a new, untrained estimator with `fit(theta, x)` and `log_prob(theta, x)`.
        simulations: a store, its path, or (theta (n, d), x (n, ...)); they must fit into memory.
        sizes: numbers of simulations to train on, at least three, rising; default n/32, n/16, .., n of what is not held out.
        n_held_out: simulations that score all trainings and are in none of them.
        n_repeats: trainings of each size, on other subsets with other seeds; the scatter between them is a part of the error.
        tolerance: nats; a smaller gain is not worth twice the simulations.
        cache: a folder in which the scores of each finished training are kept, under a hash of estimator, data, size and seed: the
            same call continues after the last one.
        seed: of the subsets and of the estimators' seeds.
        progress: default none.

    Returns: LearningCurve.
    Raises: SettingError, ShapeError, NonFiniteError, DataError (too few simulations, no density at a true value), StoreError, WriteError.
    Source: Hestness et al. 2017, arXiv:1712.00409.
    Read: `answer`, and the gain against its error. It is a statement on this network with these settings: a larger one may gain more.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng, prior = np.random.default_rng(0), sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(400, rng)
    >>> make = lambda seed: sp.NPE(prior, seed=seed, config=sp.TrainConfig(max_epochs=1))
    >>> pairs = (theta, theta + rng.normal(size=(400, 1)))
    >>> settings = dict(sizes=[50, 100, 200], n_held_out=100, n_repeats=1, cache="curve")
    >>> first, again = (sp.comparison.learning_curve(make, pairs, **settings) for _ in range(2))
    >>> first.gain == again.gain  # read from the folder
    True
    """
    if not callable(make_estimator):
        raise SettingError(
            f"make_estimator is a {type(make_estimator).__name__}; expected a function of the seed, lambda seed: sp.NPE(...)"
        )
    n_held_out, n_repeats = require_int("n_held_out", n_held_out, low=MIN_HELD_OUT), require_int("n_repeats", n_repeats, low=1)
    tolerance = require_number("tolerance", tolerance, low=0)
    if isinstance(simulations, str | os.PathLike):
        simulations = Store(Path(simulations))
    observables = simulations.observables if isinstance(simulations, Store) else None
    if isinstance(simulations, tuple) and isinstance(simulations[1], Mapping):
        observables = getattr(make_estimator(0), "observables", None)
    theta, x = read_pairs("simulations", simulations, None, observables)
    chosen = _sizes(sizes, len(theta) - n_held_out, len(theta), n_held_out)
    order = rng_for(seed, "held out").permutation(len(theta))
    held, pool = order[:n_held_out], order[n_held_out:]
    data = _digest(theta, x) if cache is not None else ""
    scores = np.empty((len(chosen), n_repeats, n_held_out))
    with or_none(progress).task("learning curve", total=len(chosen) * n_repeats) as task:
        for i, size in enumerate(chosen):
            for r in range(n_repeats):
                rows = pool[rng_for(seed, "subset", r).permutation(len(pool))[:size]]
                estimator = make_estimator(seed_for(seed, "estimator", r, size))
                if observables is not None and getattr(estimator, "observables", observables) is None:
                    estimator.observables = tuple(observables)
                place = None if cache is None else Path(cache) / f"{_key(estimator, data, rows, held)}.npy"
                scores[i, r] = _scores(estimator, (theta[rows], x[rows]), (theta[held], x[held]), place)
                task.advance(1, f"{size} simulations, score {scores[i, r].mean():.3f}")
    zero = np.isneginf(scores)
    if zero.any():
        i, r, row = np.argwhere(zero)[0]
        raise DataError(
            f"training {r} on {chosen[i]} simulations has no density at {int(zero[i, r].sum())} true values (first: held-out row {row}); "
            "expected a posterior with a density at all of them"
        )
    return _fit(chosen, scores, tolerance)


def _sizes(sizes: Sequence[int] | None, most: int, total: int, n_held_out: int) -> Integers:
    if most < 1:
        raise DataError(f"simulations has {total} rows and n_held_out is {n_held_out}; expected rows that are left to train on")
    if sizes is None:
        found = np.unique([most // 2**k for k in range(5, -1, -1) if most // 2**k >= 20])
        if len(found) < MIN_SIZES:
            raise DataError(f"{most} simulations are left to train on; expected at least 80, or sizes=[...]")
        return found.astype(np.int64)
    found = np.array([require_int("sizes", n, low=1) for n in sizes], dtype=np.int64)
    if len(found) < MIN_SIZES or (np.diff(found) <= 0).any():
        raise SettingError(f"sizes is {list(sizes)}; expected at least {MIN_SIZES} rising numbers")
    if found[-1] > most:
        raise DataError(f"sizes ends at {found[-1]}; expected at most {most}, the {total} simulations less n_held_out = {n_held_out}")
    return found


def _scores(estimator: Any, train: tuple[Array, Array], held: tuple[Array, Array], place: Path | None) -> Array:
    """Log score of each held-out row after training, from the cache if it is there."""
    if place is not None and place.is_file():
        try:
            kept = np.load(place, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            kept = np.empty(0)  # a damaged file is made again
        if kept.shape == (len(held[0]),) and kept.dtype == np.float64:
            return np.asarray(kept)
    trained = estimator.fit(*train)
    values = log_score("the estimator", estimator if trained is None else trained, *held)
    if place is not None:
        with open_aside(place, make_folder=True) as file:
            np.save(file, values)
    return values


def _digest(*arrays: AnyArray) -> str:
    found = hashlib.sha256()
    for array in arrays:
        found.update(str(array.shape).encode())
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()


def _key(estimator: Any, data: str, rows: Integers, held: Integers) -> str:
    """Hash of all that the scores of one training depend on.   Raises: SettingError for an estimator without settings or own repr."""
    settings = getattr(estimator, "settings", None)
    described = {k: _described(v) for k, v in settings.items()} if isinstance(settings, dict) else repr(estimator)
    if " at 0x" in str(described):
        raise SettingError(
            f"{type(estimator).__name__} is described by {str(described)[:100]}; expected, for a cache, `settings` or a repr that says "
            "what it is"
        )
    identity = {"class": f"{type(estimator).__module__}.{type(estimator).__qualname__}", "settings": described, "version": __version__}
    text = json.dumps([identity, data, _digest(rows, held)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _described(value: Any) -> str:
    """A setting in words; of a module its layers and weights."""
    state = getattr(value, "state_dict", None)
    if not callable(state):
        return repr(value)
    weights = [_digest(np.asarray(tensor.detach().cpu().numpy())) for tensor in state().values()]
    return f"{value!r} {weights}"


def _fit(sizes: Integers, scores: Array, tolerance: float) -> LearningCurve:
    """Integrate over exponent and scatter: a mixture of the Gaussian posteriors of asymptote and gain."""
    m, r, n_held = scores.shape
    flat = scores.reshape(m * r, n_held)
    y = flat.mean(axis=1)
    held = np.cov(flat).reshape(m * r, m * r) / n_held
    n = np.repeat(sizes, r).astype(np.float64)
    first, last = float(sizes[0]), float(sizes[-1])
    log_weight, means, variances = [], [], []
    for c in _EXPONENTS:
        fall = first**-c - last**-c
        design = np.column_stack([np.ones(m * r), -(n**-c - last**-c) / fall])  # score at the largest size, total gain up to it
        # gain of doubling, and asymptote
        wanted = np.array([[0.0, last**-c * (1 - 2**-c) / fall], [1.0, last**-c / fall]])
        for tau in _SCATTERS:
            inverse = np.linalg.inv(held + np.diag(tau**2 * last / n))
            information = design.T @ inverse @ design
            covariance = np.linalg.inv(information)
            best = covariance @ design.T @ inverse @ y
            residual = y - design @ best
            log_weight.append(0.5 * (np.linalg.slogdet(inverse)[1] - np.linalg.slogdet(information)[1] - residual @ inverse @ residual))
            means.append([*(wanted @ best), c, tau])
            variances.append([*np.diag(wanted @ covariance @ wanted.T), 0.0, 0.0])
    weight = np.exp(np.array(log_weight) - max(log_weight))
    weight /= weight.sum()
    values, spread = np.array(means), np.array(variances)
    mean = weight @ values
    sd = np.sqrt(weight @ (spread + (values - mean) ** 2))
    scatter = float(np.exp(weight @ np.log(values[:, 3])))
    average = scores.mean(axis=1)
    trainings = scatter**2 * last / sizes / r
    return LearningCurve(
        sizes=sizes,
        score=scores.mean(axis=2),
        mean=average.mean(axis=1),
        error=np.sqrt(average.var(axis=1, ddof=1) / n_held + trainings),
        n_held_out=n_held,
        asymptote=float(mean[1]),
        asymptote_err=float(sd[1]),
        exponent=float(mean[2]),
        exponent_err=float(sd[2]),
        scatter=scatter,
        gain=float(mean[0]),
        gain_err=float(sd[0]),
        tolerance=tolerance,
    )
