r"""`sbi-phys limits RUN`: confidence sets with frequentist coverage for the parameters of a trained run.

    theta_i ~ prior, x_i ~ p(x | theta_i)   ->   q_i = q(x_i; theta_i)   ->   C_level(theta) by quantile regression   ->   {q(x_o) <= C}

The simulations are new, because a network performs better on its training simulations. A quarter of them is reserved for the
coverage of the sets, which is compared with that of sets by Wilks' theorem (chi-square critical values). Nuisance parameters are
profiled: C is taken at their best-fit values. With more than three parameters in total, C is learned as a function of the parameters
of interest only, and the sets have their coverage on average over the prior of the nuisance parameters.

limits/            simulations, and one .json for each call, named by parameters and statistic
limits.json, .csv  the results of all calls                             figures/limits_*, figures/coverage_*
"""

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.special import chdtri, ndtri
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from sbi_phys.confidence import LF2I, CoverageMap, RefinedLRT, coverage_map, lf2i, posterior_moments, waldo
from sbi_phys.confidence.sets import require_within
from sbi_phys.core.checks import find_name
from sbi_phys.core.errors import SettingError, SupportError
from sbi_phys.core.types import Array, Integers
from sbi_phys.estimators.base import load
from sbi_phys.plotting.confidence import coverage_figure, limits_figure
from sbi_phys.workflow.inference import simulations
from sbi_phys.workflow.run import Run, versions
from sbi_phys.workflow.settings import STATISTICS, LimitsSettings

__all__ = ["COLUMNS", "LimitsResult", "Scan", "find_limits"]


COLUMNS = (
    "parameters", "statistic", "kind", "level", "parameter", "low", "high", "wilks_low", "wilks_high",
    "coverage", "coverage_error", "coverage_pvalue", "wilks_coverage", "n_simulations",
)  # fmt: skip
POINTS = 200  # of a scan of one parameter
PLANE = 60  # along each axis of a scan of two parameters
BLOCK = 500  # data sets per step of the progress display
TESTED = 4  # every fourth simulation is reserved for the coverage
ALL_PROFILED = 3  # largest number of parameters for which critical values are a function of all of them
DRAWS = 400  # posterior draws for the mean and covariance


def require_model(run: Run, settings: LimitsSettings) -> None:
    """Check that the folder, the simulator and the parameters allow the statistic.   Raises: SettingError."""
    if settings.statistic == "exact":
        if not callable(getattr(run.simulator, "log_likelihood", None)):
            raise SettingError(f"--statistic is 'exact', but {run.config.simulator.spec} has no log_likelihood; expected waldo, nre or nle")
    else:
        file, method = {"waldo": ("model.pt", "npe")}.get(settings.statistic, (f"model_{settings.statistic}.pt", settings.statistic))
        if not run.path(file).is_file():
            raise SettingError(
                f"--statistic is {settings.statistic!r}, but {run.path(file)} does not exist; train it first: "
                f"sbi-phys train --method {method} --out {run.folder}"
            )
    if settings.statistic != "waldo" and run.simulator.prior.free_dim != len(run.names):
        raise SettingError(
            f"--statistic is {settings.statistic!r} with the parameters {', '.join(run.names)}, some of which are functions of the others; "
            "expected waldo: the likelihood is maximised over independent parameters"
        )


class PosteriorWaldo:
    """WALDO of the parameters of interest from an amortised posterior; nuisances at E[nu | x, psi] of its Gaussian approximation."""

    def __init__(self, run: Run, order: list[int], interest: int, low: Array, high: Array, kind: str) -> None:
        self.npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
        self.seed, self.order, self.interest = run.seed("limits", "waldo"), order, interest
        self.low, self.high, self.kind = low, high, kind

    def prepare(self, data: Any) -> tuple[Array, Array]:
        """Posterior mean (n, d) and covariance (n, d, d), reused for any number of psi."""
        return posterior_moments(self.npe.sample(np.asarray(data), DRAWS, seed=self.seed)[..., self.order])

    def __call__(self, psi: Any, data: Any) -> Array:
        """Values (n,) at psi (interest,) or (n, interest); further columns of psi are ignored."""
        mean, spread = data if isinstance(data, tuple) else self.prepare(data)
        k = self.interest
        return waldo(mean[:, :k], spread[:, :k, :k], np.atleast_1d(psi)[..., :k], self.kind)

    def repeated(self, data: Any, m: int) -> tuple[Array, Array]:
        """Moments of one data set, repeated m times."""
        mean, spread = self.prepare(data)
        return np.repeat(mean, m, axis=0), np.repeat(spread, m, axis=0)

    def nuisance(self, psi: Any, data: Any) -> Array:
        """E[nu | x, psi] (n, d - interest) of the Gaussian approximation, clipped to the box."""
        mean, spread = data if isinstance(data, tuple) else self.prepare(data)
        k = self.interest
        gain = np.linalg.solve(spread[:, :k, :k], (np.atleast_1d(psi)[..., :k] - mean[:, :k])[..., None])
        best = mean[:, k:] + (spread[:, k:, :k] @ gain)[..., 0]
        return np.clip(best, self.low[k:], self.high[k:])


def make_statistic(run: Run, settings: LimitsSettings, order: list[int], low: Array, high: Array) -> Any:
    """The test statistic over the box low..high (d,); `order` has the parameters of interest first."""
    k = len(settings.parameters)
    kind = settings.kind
    if settings.statistic == "waldo":
        return PosteriorWaldo(run, order, k, low, high, kind)
    back = np.argsort(order)
    if settings.statistic == "exact":
        density: Any = run.simulator.log_likelihood  # type: ignore[attr-defined]
    else:
        model = load(run.path(f"model_{settings.statistic}.pt"), simulator=run.simulator, device=run.config.run.device)
        density = model.log_likelihood if settings.statistic == "nle" else model.log_ratio
    rows = partial(_rows, density, back)
    names = tuple(run.names[i] for i in order)
    return RefinedLRT(log_likelihood=rows, low=low, high=high, names=names, interest=k, kind=kind)


def _rows(density: Any, back: Integers, theta: Array, x: Array) -> Array:
    return np.asarray(density(x, theta[:, back]), dtype=np.float64)


@dataclass(frozen=True, kw_only=True, eq=False)
class Scan:
    """The observation's statistic q over axes of the parameters of interest, and critical values {level} on the same axes."""

    axes: tuple[Array, ...]
    q: Array
    critical: dict[float, Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class LimitsResult:
    """Sets, the scan of the observation, Wilks' critical values, the coverage of both by level; and the numbers of the file."""

    settings: LimitsSettings
    sets: LF2I
    scan: Scan
    wilks: dict[float, float]
    coverage: dict[float, CoverageMap]
    wilks_coverage: dict[float, CoverageMap]
    numbers: dict[str, Any]


def find_limits(run: Run, settings: LimitsSettings) -> LimitsResult:
    """Simulate, learn critical values, find the sets of the observation, test their coverage; write files and figures.

    Raises: SettingError (unknown parameter, model missing in the folder), SupportError (a set that reaches an end of the simulated
    range, a value outside it), StoreError, DataError.
    """
    begin = time.perf_counter()
    order = [find_name(name, run.names) for name in settings.parameters]
    order += [i for i in range(len(run.names)) if i not in order]
    require_model(run, settings)
    observed = run.observation[None]
    store = simulations(run, f"limits/simulations-{settings.n}", settings.n, "limits", settings.n)
    theta, x = (np.asarray(a, dtype=np.float64) for a in store.read())
    theta = theta[:, order]
    learned = np.arange(len(theta)) % TESTED != 0
    low, high = theta[learned].min(axis=0), theta[learned].max(axis=0)
    bounds = _bounds(run, settings, order, low, high)
    if settings.value is not None:
        require_within("--value", np.array([[settings.value]]), low[:1], high[:1], settings.parameters)
    statistic = make_statistic(run, settings, order, low, high)
    # critical values are not extrapolated: test simulations outside the box of the others are removed
    kept = ((theta >= low) & (theta <= high)).all(axis=1)
    theta, x, learned, tested = theta[kept], x[kept], learned[kept], ~learned[kept]
    q, best = _evaluate(run, statistic, x, theta, len(order) - len(settings.parameters))
    found = _sets(run, settings, statistic, order, (theta[learned], q[learned], best[learned]), bounds)
    names = [run.simulator.parameters[i] for i in order[: found.dim]]
    coverage, wilks_coverage, wilks = _coverage(settings, found, names, theta[tested], q[tested], best[tested])
    highest = max(*wilks.values(), *(float(found.critical(theta[tested][:, : found.dim], level).max()) for level in settings.levels))
    scan = _scan(found, observed, settings.levels, highest)
    numbers = _numbers(run, settings, found, scan, (coverage, wilks_coverage), wilks)
    numbers["seconds"] = round(time.perf_counter() - begin, 3)
    result = LimitsResult(
        settings=settings, sets=found, scan=scan, wilks=wilks, coverage=coverage, wilks_coverage=wilks_coverage, numbers=numbers
    )
    _write(run, result)
    return result


def _bounds(run: Run, settings: LimitsSettings, order: list[int], low: Array, high: Array) -> tuple[tuple[float | None, float | None], ...]:
    """Physical bounds of each parameter; widens the box (in place) to a bound that the sample nearly reaches."""
    first = run.simulator.parameters[order[0]]
    left = first.low if settings.physical in ("low", "both") else None
    right = first.high if settings.physical in ("high", "both") else None
    for end in (left, right):
        if end is not None and not np.isfinite(end):
            raise SettingError(
                f"--physical is {settings.physical!r}, but {first.name} has no bound there; expected a finite end of its range"
            )
    near = 0.01 * (high[0] - low[0])
    low[0] = left if left is not None and low[0] - left <= near else low[0]
    high[0] = right if right is not None and right - high[0] <= near else high[0]
    return ((left, right), *((None, None) for _ in order[1:]))


def _evaluate(run: Run, statistic: Any, x: Array, theta: Array, nuisances: int) -> tuple[Array, Array]:
    """q_i (n,) of the simulations at their true theta, and the best-fit nuisances (n, j)."""
    q, best = np.empty(len(x)), np.empty((len(x), nuisances))
    with run.progress.task("test statistic", len(x)) as task:
        for start in range(0, len(x), BLOCK):
            rows = slice(start, start + BLOCK)
            prepared = statistic.prepare(x[rows])
            q[rows] = statistic(theta[rows], prepared)
            if nuisances:
                best[rows] = statistic.nuisance(theta[rows], prepared)
            task.advance(len(q[rows]))
    return q, best


def _sets(run: Run, settings: LimitsSettings, statistic: Any, order: list[int], sample: tuple[Array, Array, Array], bounds: Any) -> LF2I:
    k = len(settings.parameters)
    dim = len(order) if len(order) <= ALL_PROFILED else k
    # for a few thousand rows, boosted trees are slower on several threads than on one
    with run.progress.task("critical values", None), threadpool_limits(limits=1, user_api="openmp"):
        return lf2i(
            sample[0][:, :dim],
            sample[1],
            statistic,
            settings.levels,
            names=[run.simulator.parameters[i] for i in order[:dim]],
            interest=k,
            profile=statistic.nuisance if dim > k else None,
            bounds=bounds[:dim],
            model=settings.critical,
            pvalues=settings.value is not None,
            profiled=sample[2] if dim > k else None,
            seed=run.seed("limits", "regression"),
        )


def _coverage(
    settings: LimitsSettings, sets: LF2I, names: list[Any], theta: Array, q: Array, best: Array
) -> tuple[dict[float, CoverageMap], dict[float, CoverageMap], dict[float, float]]:
    """Coverage maps of the learned sets and of Wilks' by level, and Wilks' critical values."""
    k, dim = len(settings.parameters), sets.dim
    at = np.concatenate([theta[:, :k], best], axis=1)[:, :dim]
    own, theirs, wilks = {}, {}, {}
    for level in settings.levels:
        wilks[level] = float(chdtri(k, 1 - level)) if settings.kind == "interval" else float(ndtri(level)) ** 2
        own[level] = coverage_map(theta[:, :dim], q <= sets.critical(at, level), level, names=names)
        theirs[level] = coverage_map(theta[:, :dim], q <= wilks[level], level, names=names)
    return own, theirs, wilks


def _scan(sets: LF2I, observed: Array, levels: tuple[float, ...], highest: float) -> Scan:
    """Scan the simulated box on a coarse grid, then on a fine one where q is near the critical values."""
    k = sets.interest
    low, high = sets.low[:k], sets.high[:k]
    statistic: Any = sets.statistic
    axes = tuple(np.linspace(a, b, POINTS if k == 1 else PLANE) for a, b in zip(low, high, strict=True))
    coarse = _mesh(axes)
    q = statistic(coarse, statistic.repeated(observed, len(coarse))).reshape([a.size for a in axes])
    near = q <= max(2.5 * highest, float(q.min()) + highest)
    closer = []
    for i, axis in enumerate(axes):
        held, step = axis[near.any(axis=tuple(j for j in range(k) if j != i))], axis[1] - axis[0]
        closer.append(np.linspace(max(low[i], held.min() - step), min(high[i], held.max() + step), axis.size))
    axes = (np.unique(np.concatenate([axes[0], closer[0]])),) if k == 1 else tuple(closer)
    points = _mesh(axes)
    prepared = statistic.repeated(observed, len(points))
    full = points if sets.profile is None else np.concatenate([points, statistic.nuisance(points, prepared)], axis=1)
    shape = [a.size for a in axes]
    critical = {level: sets.critical(full, level).reshape(shape) for level in levels}
    return Scan(axes=axes, q=statistic(points, prepared).reshape(shape), critical=critical)


def _mesh(axes: tuple[Array, ...]) -> Array:
    return np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=-1)


def _numbers(run: Run, settings: LimitsSettings, sets: LF2I, scan: Scan, coverage: Any, wilks: dict[float, float]) -> dict[str, Any]:
    out: dict[str, Any] = {
        "parameters": list(settings.parameters),
        "statistic": settings.statistic,
        "title": STATISTICS[settings.statistic],
        "kind": settings.kind,
        "n_simulations": settings.n,
        "seed": run.config.run.seed,
        "nuisances": _nuisances(run, sets),
        "critical_values": sets.summary(),
        "levels": [],
    }
    if settings.value is not None:
        p = sets.pvalue(run.observation[None], [settings.value])
        out["value"] = {"at": settings.value, "pvalue": float(p[0])}
    for level in settings.levels:
        own, theirs = coverage[0][level], coverage[1][level]
        row: dict[str, Any] = {
            "level": level,
            "coverage": own.overall,
            "coverage_error": float(np.sqrt(level * (1 - level) / own.n)),
            "coverage_pvalue": own.pvalue,
            "words": own.summary(),
            "wilks_coverage": theirs.overall,
            "wilks_words": theirs.summary(),
        }
        ends = _interval if sets.interest == 1 else _region
        out["levels"].append(row | ends(settings, sets, scan, level, wilks[level]))
    return out


def _nuisances(run: Run, sets: LF2I) -> str:
    if len(run.names) == sets.interest:
        return "none"
    return "profiled" if sets.dim == len(run.names) else "averaged over their prior"


def _interval(settings: LimitsSettings, sets: LF2I, scan: Scan, level: float, wilks: float) -> dict[str, Any]:
    """Ends of the set and of the one by Wilks; None for an empty set. Infinite ends become null in the file."""
    name, axis = settings.parameters[0], scan.axes[0]
    margin = (scan.q - scan.critical[level])[None]
    try:
        found = sets.interval_of(axis, margin, level, on_edge="open" if settings.open_ends else "raise")
    except SupportError as err:
        raise SupportError(f"{err} (--physical declares an end a physical bound, --open makes it infinite)") from err
    theirs = sets.interval_of(axis, (scan.q - wilks)[None], level, on_edge="open")
    return {
        key: {name: None if one.empty[0] else [float(one.low[0]), float(one.high[0])]} for key, one in (("set", found), ("wilks", theirs))
    }


def _region(settings: LimitsSettings, sets: LF2I, scan: Scan, level: float, wilks: float) -> dict[str, Any]:
    """Extent of the joint set, and of the one by Wilks, along both parameters.   Raises: SupportError at an end of the simulated range."""
    held = scan.q <= scan.critical[level]
    out: dict[str, Any] = {"set": {}, "wilks": {}}
    for i, name in enumerate(settings.parameters):
        axis = scan.axes[i]
        mine: Any = held.any(axis=1 - i)
        for end, place, bound in ((sets.low[i], 0, sets.bounds[i][0]), (sets.high[i], -1, sets.bounds[i][1])):
            if mine[place] and axis[place] == end and bound is None and not settings.open_ends:
                raise SupportError(
                    f"the set reaches the end of the simulated range at {name} = {end:g}; critical values are not extrapolated: "
                    "expected a wider prior, --physical where it is a physical bound, or --open"
                )
        out["set"][name] = _extent(axis, mine)
        out["wilks"][name] = _extent(axis, (scan.q <= wilks).any(axis=1 - i))
    return out


def _extent(axis: Array, inside: Any) -> list[float] | None:
    return [float(axis[inside].min()), float(axis[inside].max())] if inside.any() else None


def _write(run: Run, found: LimitsResult) -> None:
    name = found.settings.name
    labels = [run.simulator.parameters[find_name(p, run.names)].label for p in found.settings.parameters]
    figure = limits_figure(
        found.scan.axes, found.scan.q, found.scan.critical, found.wilks, labels, title=STATISTICS[found.settings.statistic]
    )
    run.save_figure(figure, f"limits_{name}")
    run.save_figure(coverage_figure(found.coverage, found.wilks_coverage), f"coverage_{name}")
    run.write_json(f"limits/{name}.json", found.numbers | {"versions": versions()})
    every = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(run.path("limits").glob("*.json"))]
    run.write_json("limits.json", {"limits": every})
    run.write_csv("limits.csv", COLUMNS, _rows_of(every))
    run.forget("report")


def _rows_of(every: list[dict[str, Any]]) -> list[list[Any]]:
    """Rows of limits.csv by call, level and parameter; cells of an empty set or an infinite end are empty."""
    rows = []
    for one in every:
        for row in one["levels"]:
            for parameter in one["parameters"]:
                ends, wilks = (row[key][parameter] or ["", ""] for key in ("set", "wilks"))
                rows.append(
                    [" ".join(one["parameters"]), one["statistic"], one["kind"], row["level"], parameter, *ends, *wilks]
                    + [row[key] for key in ("coverage", "coverage_error", "coverage_pvalue", "wilks_coverage")]
                    + [one["n_simulations"]]
                )
    return rows
