"""All calibration tests in one call: draw from the posterior, run the tests, correct for their number, and report the result in words.

    report = sp.calibrate(npe, simulator, n=1000, x_obs=x_obs)     # or a store, or (theta, x) that was not used in training
    print(report.summary())
    report = sp.calibrate(draws, (theta, x))                       # draws (n, l, d) of any other tool, or an ArviZ object of them

`adjusted` holds the p-values of all tests after Holm's correction: an exact posterior fails any of them in at most 5 % of calls. The check
of whether the observation resembles the simulations is reported separately from the tests of the posterior.
"""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.coverage import coverage
from sbi_phys.calibration.inputs import check_pairs, draws_from_arviz, wrong_order
from sbi_phys.calibration.lc2st import train_lc2st
from sbi_phys.calibration.local import local_coverage
from sbi_phys.calibration.misspecification import misspecification
from sbi_phys.calibration.pit import pit_regression
from sbi_phys.calibration.posterior_sbc import posterior_sbc
from sbi_phys.calibration.pulls import pulls
from sbi_phys.calibration.pvalues import ALPHA, holm
from sbi_phys.calibration.sbc import sbc
from sbi_phys.calibration.tarp import tarp
from sbi_phys.core.checks import as_real, column_labels, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.files import write_aside
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.results import Result, Rows, plain
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Observable, Parameter
from sbi_phys.priors.blocks import column_name, missing_columns, to_rows
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.simulation.rows import simulate_rows
from sbi_phys.store.identity import class_path
from sbi_phys.store.store import Store

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Calibration", "calibrate"]
_CHUNK_DRAWS = 200_000  # posterior draws in one batch
_REPLICAS, _REPLICA_DRAWS = 200, 1000  # of posterior SBC
_FEATURE_ROWS = 5000
# the title of each test, in the order of the report page
TITLES = {
    "sbc": "Ranks of single parameters (SBC)",
    "coverage": "Coverage of joint credible regions",
    "intervals": "Coverage of single intervals",
    "tarp": "Regions about random points (TARP)",
    "pulls": "Pulls: mean and width",
    "pit_regression": "Ranks against x (PIT regression)",
    "local_coverage": "Local coverage",
    "lc2st": "At the observation: L-C2ST",
    "posterior_sbc": "At the observation: posterior SBC",
    "misspecification": "Is the observation like the simulations?",
}
OF_THE_DATA = ("misspecification",)
AT_THE_OBSERVATION = frozenset({"lc2st", "posterior_sbc"})  # a fault at the observation may cancel on average in the other tests


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration(Result):
    """Results of `calibrate`.

    results: by name of the test, each with .pvalue, .summary() and .plot(). skipped: name -> reason. n simulations, n_draws each.
    seconds: of the draws and of each test. names: of the parameters. hint: what the shapes of the input may have wrong, or ''.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> found = sp.calibrate(rng.normal(size=(100, 20, 1)), (rng.normal(size=(100, 1)), None), names=["energy"])
    >>> sorted(found.pvalues), found.names
    (['intervals', 'local_coverage', 'pulls', 'sbc', 'tarp'], ('energy',))
    """

    names: tuple[str, ...]
    n: int
    n_draws: int
    results: Mapping[str, Any]
    skipped: Mapping[str, str]
    seconds: Mapping[str, float] = field(compare=False)
    hint: str = ""

    @property
    def pvalues(self) -> dict[str, float]:
        """p-value of each test of calibration, not corrected for their number."""
        return {name: float(r.pvalue) for name, r in self.results.items() if name not in OF_THE_DATA}

    @property
    def adjusted(self) -> dict[str, float]:
        """p-values of the tests of calibration after Holm's correction."""
        return holm(self.pvalues)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of tests that reject at 5 % after the correction."""
        return tuple(name for name, p in self.adjusted.items() if p <= ALPHA)

    @property
    def passed(self) -> bool:
        """Whether no test rejects; the check of the observation against the simulations is not included."""
        return not self.failed

    @property
    def verdict(self) -> str:
        """The result of the tests of calibration in one sentence."""
        n_tests = len(self.pvalues)
        if self.passed:
            smallest = min(self.adjusted.values())
            return f"No test of {n_tests} finds the posterior wrong (smallest p = {smallest:.3g} after correction for {n_tests} tests)."
        worst = min(self.failed, key=lambda name: self.adjusted[name])
        return (
            f"{len(self.failed)} of {n_tests} tests find the posterior wrong: {', '.join(self.failed)}; "
            f"smallest p = {self.adjusted[worst]:.2g} after correction ({worst})."
        )

    @property
    def likeness(self) -> str:
        """Whether the observation is like the simulations, in one sentence, or ''."""
        found = self.results.get("misspecification")
        if found is None:
            return ""
        words = "is like the simulations" if found.pvalue > ALPHA else "is unlike the simulations: the network extrapolates there"
        return f"The observation {words} (p = {found.pvalue:.3g})."

    def rows(self) -> Rows:
        """Return the table: one row for each test, with its p-value and that after Holm's correction."""
        p, adjusted = self.pvalues, self.adjusted
        found = {"name": list(p), "title": [TITLES[n] for n in p], "pvalue": list(p.values()), "adjusted": [adjusted[n] for n in p]}
        return Rows.of(found | {"passed": [adjusted[n] > ALPHA for n in p]})

    def summary(self) -> str:
        """Return all results in words, the verdict first."""
        lines = [self.verdict, *(line for line in (self.hint, self.likeness) if line), ""]
        for name, result in self.results.items():
            lines += [f"{TITLES[name]} [{name}]", result.summary(), ""]
        lines += [f"skipped: {name}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines).rstrip()

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the p-values of all tests after the correction.   Read: in the grey area = rejected."""
        return figures.results.pvalue_rows(self.adjusted, ax, alpha=ALPHA, xlabel="p-value, corrected")

    def figures(self) -> "dict[str, Figure]":
        """Return one figure for each result, by name."""
        from matplotlib.figure import Figure

        made = {}
        for name, result in self.results.items():
            figure = Figure(figsize=(6.2, 4.4), layout="constrained")
            result.plot(figure.add_subplot())
            made[name] = figure
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return p-values, verdicts and words as JSON values."""
        return plain({
            "verdict": self.verdict, "likeness": self.likeness, "passed": self.passed, "failed": list(self.failed), "n": self.n,
            "n_draws": self.n_draws, "parameters": list(self.names), "pvalues": self.pvalues, "adjusted": self.adjusted,
            "misspecification_pvalue": float(self.results["misspecification"].pvalue) if "misspecification" in self.results else None,
            "skipped": dict(self.skipped), "seconds": dict(self.seconds), "words": {k: r.summary() for k, r in self.results.items()},
        })  # fmt: skip

    def write(self, path: str | Path) -> None:
        """Write `to_dict` as JSON.   Raises: WriteError."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"
        write_aside(path, text, sync=True)


def calibrate(
    posterior: Any,
    simulations: Simulator | Store | str | Path | tuple[ArrayLike, ArrayLike],
    n: int = 1000,
    *,
    n_draws: int = 1000,
    x_obs: ArrayLike | None = None,
    simulator: Simulator | None = None,
    by: Sequence[str] | None = None,
    names: Sequence[str | Parameter] | None = None,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> Calibration:
    r"""Run all calibration tests for which the inputs suffice.

    Args:
        posterior: an estimator with `sample(x, n, seed)` (its `log_prob_draws`, `latent`, `embed` and `prior` are used if present);
            or draws (n, l, d) of another tool, in the order of `simulations`; or an ArviZ object whose posterior group has a
            variable for each parameter, with a dimension for simulations in addition to chain and draw.
        simulations: a simulator, to draw n new simulations; or a store, or (theta (n, d), x (n, ...)), not used in training.
        n: number of simulations; of those given, at most so many are used.
        n_draws: posterior draws for each simulation (of an estimator).
        x_obs: the observation, for the tests at the observation; like x, in rows, in its shape, or as a dictionary of blocks.
        simulator: for the tests at the observation that need new simulations, if `simulations` is not a simulator.
        by: one or two parameters for the map of local coverage; default the first two.
        names: of the parameters, if only arrays are given.
        seed: of all random numbers.
        workers: processes for L-C2ST.
        progress: default none.

    Returns: Calibration.
    Raises: ShapeError, NonFiniteError, DataError (too few simulations), SettingError, StoreError.
    Read: `.verdict` first, then the summary of the first failed test.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> x, noise = rng.normal(size=(2, 200, 1))
    >>> found = sp.calibrate(x[:, None] + 0.5 * rng.normal(size=(200, 50, 1)), (x + noise, x))  # sd 0.5 in place of 1
    >>> found.passed, found.results["sbc"].verdicts
    (False, {'theta_0': 'overconfident'})
    """
    draw = _Drawn(posterior, simulations, n, n_draws, x_obs, names, seed)
    draw.simulator = simulator or draw.simulator
    with or_none(progress).task("calibrate", 1 + len(TITLES)) as task:
        with draw.timed("draws", task):
            draw.make()
        results = _run_tests(draw, by, workers, task)
    return Calibration(
        names=tuple(p.name if isinstance(p, Parameter) else p for p in draw.names or [f"theta_{i}" for i in range(draw.theta.shape[1])]),
        n=len(draw.theta),
        n_draws=draw.draws.shape[1],
        results=results,
        skipped=draw.skipped,
        seconds=draw.seconds,
        hint=wrong_order(draw.theta, draw.draws),
    )


class _Drawn:
    """True parameters, observations, draws and log densities of one call."""

    def __init__(self, posterior: Any, simulations: Any, n: int, n_draws: int, x_obs: Any, names: Any, seed: int) -> None:
        self.posterior, self.simulations, self.seed = posterior, simulations, require_int("seed", seed, low=0)
        self.n, self.n_draws = require_int("n", n, low=10), require_int("n_draws", n_draws, low=10)
        self.is_estimator = hasattr(posterior, "sample") and callable(posterior.sample)
        prior = getattr(posterior, "prior", None)
        self.names = names if names is not None else getattr(prior, "parameters", getattr(simulations, "parameters", None))
        self.simulator: Any = simulations if hasattr(simulations, "simulate") else None
        self.observables = getattr(posterior, "observables", None) or getattr(simulations, "observables", None)
        self.x_obs = None if x_obs is None else _one(x_obs, self.observables)
        self.skipped: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.log_theta: Array | None = None
        self.log_draws: Array | None = None

    @contextmanager
    def timed(self, name: str, task: Task) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - begin
        task.advance(1, name)

    def make(self) -> None:
        """Simulate or read theta and x, then draw from the posterior in batches, then evaluate densities."""
        self.theta, self.x = self._pairs()
        if not self.is_estimator:
            draws = draws_from_arviz(self.posterior, self.names) if hasattr(self.posterior, "posterior") else self.posterior
            self.theta, self.draws = check_pairs(self.theta, draws)
            return
        if self.x is None:
            raise DataError("x is missing; expected simulations = (theta, x), a simulator or a store, for an estimator to draw from")
        step = max(1, _CHUNK_DRAWS // self.n_draws)
        parts, densities = [], []
        for k, start in enumerate(range(0, len(self.theta), step)):
            x = self.x[start : start + step]
            parts.append(np.asarray(self.posterior.sample(x, self.n_draws, seed=seed_for(self.seed, "calibrate", k))))
            if hasattr(self.posterior, "log_prob_draws"):
                densities.append(self.posterior.log_prob_draws(parts[-1], x))
        self.theta, self.draws = check_pairs(self.theta, np.concatenate(parts))
        if densities:
            self.log_draws = np.concatenate(densities)
            self.log_theta = np.asarray(self.posterior.log_prob(self.theta, self.x))

    def _pairs(self) -> tuple[Array, Array | None]:
        given = self.simulations
        if isinstance(given, str | Path):
            given = Store(given)
        if isinstance(given, Store):
            theta, x = given.read()
            return theta[: self.n], x[: self.n].astype(np.float64)
        if isinstance(given, tuple | list) and len(given) == 2:
            theta = as_real("theta", given[0], _plain_names(self.names))[: self.n]
            return theta, None if given[1] is None else _rows("x", given[1], self.observables)[: self.n]
        if hasattr(given, "simulate") and hasattr(given, "prior"):
            if not self.is_estimator:
                raise SettingError("draws were given with a simulator; expected the (theta, x) that they are draws for")
            theta = given.prior.sample(self.n, rng_for(self.seed, "calibrate theta"))
            return _simulated(given, theta, rng_for(self.seed, "calibrate x"))
        raise SettingError(f"simulations is a {type(given).__name__}; expected a simulator, a store, its path, or (theta, x)")


def _plain_names(names: Any) -> tuple[str, ...]:
    """Names of parameters that are given as text or as Parameter; () if none are."""
    several = () if names is None else (names,) if isinstance(names, str | Parameter) else names
    return tuple(p.name if isinstance(p, Parameter) else str(p) for p in several)


def _simulated(simulator: Simulator, theta: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Theta and x of the simulations that succeed.   Warns: if some fail, for which no posterior is tested.   Raises: DataError."""
    x, reasons = simulate_rows(simulator, theta, rng)
    if reasons:
        row, reason = next(iter(reasons.items()))
        warnings.warn(
            f"{len(reasons)} of {len(theta)} simulations of {class_path(simulator)} failed and are left out; the calibration holds for "
            f"simulations that succeed. Row {row}: {reason:.200}",
            RuntimeWarning,
            stacklevel=2,
        )
    good = np.setdiff1d(np.arange(len(theta)), list(reasons))
    return theta[good], x[good]


def _rows(name: str, x: Any, observables: Sequence[Observable] | None) -> Array:
    """Observations (n, ...) as an array: rows (n, k) where the observables are known."""
    array = x if isinstance(x, Mapping) or (observables is not None and column_labels(x)) else as_real(name, x)
    if observables is None or (isinstance(array, np.ndarray) and array.ndim == 1):
        return as_real(name, array)
    return np.asarray(to_rows(array, observables, name=name)[0], dtype=np.float64)


def _one(x_obs: Any, observables: Sequence[Observable] | None) -> Array:
    """The observation as an array, (k,) where the observables are known.   Raises: ShapeError."""
    if observables is None:
        return as_real("x_obs", x_obs)
    rows, single = to_rows(x_obs, observables, name="x_obs")
    if not single and len(rows) != 1:
        raise ShapeError(f"x_obs holds {len(rows)} observations; expected one")
    return np.asarray(rows[0], dtype=np.float64)


def _without_gaps(draw: _Drawn, x: Array | None) -> Array | None:
    """Rows x for tests that take numbers: missing values are 0, and a column for each that may be missing says whether it is there."""
    if x is None or draw.observables is None or not (missing := missing_columns(draw.observables)).any():
        return x
    return np.concatenate([np.nan_to_num(x, nan=0.0), (~np.isnan(x[:, missing])).astype(np.float64)], axis=1)


def _run_tests(draw: _Drawn, by: Sequence[str] | None, workers: int, task: Task) -> dict[str, Any]:
    theta, draws, seed, names = draw.theta, draw.draws, draw.seed, draw.names
    x = _without_gaps(draw, draw.x)
    chosen: Any = list(by) if by is not None else list(range(min(2, theta.shape[1])))
    tests: dict[str, Callable[[], Any]] = {
        "sbc": lambda: sbc(theta, draws, names, _densities(draw), seed=seed),
        "coverage": lambda: coverage(theta, draws, draw.log_theta, draw.log_draws, seed=seed),
        "intervals": lambda: coverage(theta, draws, names=names, seed=seed),
        "tarp": lambda: tarp(theta, draws, x, seed=seed),
        "pulls": lambda: pulls(theta, draws, names, seed=seed),
        "pit_regression": lambda: pit_regression(theta, draws, np.asarray(x), names=names, x_names=_column_names(draw), seed=seed),
        "local_coverage": lambda: local_coverage(
            theta, draws, chosen, names=names, seed=seed, log_prob_theta=draw.log_theta, log_prob_draws=draw.log_draws
        ),
        "lc2st": lambda: _lc2st(draw, workers),
        "posterior_sbc": lambda: _posterior_sbc(draw),
        "misspecification": lambda: _misspecification(draw),
    }
    needs = {
        "coverage": (draw.log_draws, "the posterior has no log_prob_draws: joint regions need densities"),
        "pit_regression": (x, "x is not known"),
        "lc2st": (x if draw.x_obs is not None else None, "x or x_obs is not known"),
        "posterior_sbc": (
            draw.x_obs if draw.simulator is not None and draw.log_draws is not None else None,
            "needs x_obs, a simulator and an estimator with densities",
        ),
        "misspecification": (x if draw.x_obs is not None else None, "x or x_obs is not known"),
    }
    results = {}
    for name, test in tests.items():
        needed, why = needs.get(name, (True, ""))
        if needed is None:
            draw.skipped[name] = why
            task.advance(1)
            continue
        with draw.timed(name, task):
            results[name] = test()
    return results


def _column_names(draw: _Drawn) -> list[str] | None:
    """Names of the columns of x, from the observables of the posterior or the simulator."""
    observables = draw.observables
    if observables is None or draw.x is None or draw.x.ndim != 2 or draw.x.shape[1] != sum(o.size for o in observables):
        return None
    names = [f"{o.name}[{i}]" if o.size > 1 else o.name for o in observables for i in range(o.size)]
    return names + [f"{column_name(observables, int(i))} present" for i in np.flatnonzero(missing_columns(observables))]


def _densities(draw: _Drawn) -> dict[str, tuple[Array, Array]] | None:
    if draw.log_theta is None or draw.log_draws is None:
        return None
    return {"log density": (draw.log_theta, draw.log_draws)}


def _features(draw: _Drawn, x: Array) -> Array:
    """Features of x from the network's embedding, or x itself: both are functions of x alone."""
    embed = getattr(draw.posterior, "embed", None)
    found: Array = np.asarray(embed(x)) if embed is not None else np.asarray(_without_gaps(draw, x)).reshape(len(x), -1)
    return found


def _lc2st(draw: _Drawn, workers: int) -> Any:
    assert draw.x is not None
    assert draw.x_obs is not None
    rows, observed = _features(draw, draw.x), _features(draw, draw.x_obs[None])[0]
    latent = draw.posterior.latent(draw.theta, draw.x) if hasattr(draw.posterior, "latent") else None
    at_obs = None
    if draw.is_estimator:
        at_obs = np.asarray(draw.posterior.sample(draw.x_obs, 1000, seed=seed_for(draw.seed, "lc2st")))
    if latent is not None and at_obs is not None:
        at_latent = draw.posterior.latent(at_obs, np.repeat(draw.x_obs[None], len(at_obs), axis=0))
        model = train_lc2st(None, None, rows, latent_theta=latent, names=_free_names(draw, latent), seed=draw.seed, workers=workers)
        return model.at(observed, at_obs if at_obs.shape == at_latent.shape else None, latent_obs=at_latent)
    if at_obs is None:
        raise SettingError("x_obs was given with arrays of draws; expected an estimator, which can draw at x_obs")
    return train_lc2st(draw.theta, draw.draws, rows, names=draw.names, seed=draw.seed, workers=workers).at(observed, at_obs)


def _free_names(draw: _Drawn, latent: Array) -> Any:
    return draw.names if draw.names is not None and len(draw.names) == latent.shape[1] else None


def _posterior_sbc(draw: _Drawn) -> Any:
    """Posterior SBC with theta' from the posterior of the observation and x' from the simulator."""
    assert draw.x_obs is not None
    posterior, rng = draw.posterior, rng_for(draw.seed, "posterior sbc")
    draws = np.asarray(posterior.sample(draw.x_obs, _REPLICA_DRAWS, seed=seed_for(draw.seed, "posterior sbc")))
    theta = draws[rng.integers(len(draws), size=_REPLICAS)]
    theta, x = _simulated(draw.simulator, theta, rng)
    log_prior = draw.simulator.prior.log_prob(draws)
    log_q = posterior.log_prob_draws(np.broadcast_to(draws, (len(x), *draws.shape)), x)
    return posterior_sbc(theta, draws, log_q - log_prior, draw.names, seed=draw.seed)


def _misspecification(draw: _Drawn) -> Any:
    assert draw.x is not None
    assert draw.x_obs is not None
    rows = draw.x
    if draw.simulator is not None:
        theta = draw.simulator.prior.sample(_FEATURE_ROWS, rng_for(draw.seed, "features theta"))
        _, rows = _simulated(draw.simulator, theta, rng_for(draw.seed, "features x"))
    return misspecification(_features(draw, rows), _features(draw, draw.x_obs[None])[0], seed=draw.seed)
