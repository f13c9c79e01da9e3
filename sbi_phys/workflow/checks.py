r"""Stage `check`: the observation among simulations of the prior, and among replicas of the final posterior.

    prior predictive       x ~ int p(x | theta) p(theta) dtheta            the stored simulations
    posterior predictive   x ~ int p(x | theta) p(theta | x_o) dtheta      new simulations at draws of the final posterior

Each block of observables is drawn by its kind against both (`plotting.predictive_figure`). The first says whether the network has seen
such data: columns outside all simulations, the Mahalanobis distance of the features, and p-values. The second says whether the model
describes the data: p = P(D(x_rep, theta) >= D(x_o, theta)), D the deviance of the simulator or chi-square, and the pulls. Rows that fail
are counted and left out.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbi_phys.calibration import predictive_pvalue
from sbi_phys.calibration.misspecification import feature_space
from sbi_phys.calibration.predictive import predictive_checks, prior_predictive_check
from sbi_phys.core.errors import DataError
from sbi_phys.core.types import Array, Mask
from sbi_phys.estimators.base import load
from sbi_phys.plotting.observables import MIN_ROWS, block_kind, features_figure, predictive_figure, prior_predictive_figure
from sbi_phys.plotting.posterior import misfit_figure, panels_figure
from sbi_phys.priors import Observable
from sbi_phys.priors.blocks import column_name, columns
from sbi_phys.simulation.rows import simulate_rows
from sbi_phys.store.store import Store
from sbi_phys.workflow.run import Run

__all__ = ["FIGURES", "check", "predictive"]

FIGURES = 12  # blocks that are drawn
_MAX_ROWS = 20_000  # simulations whose features are compared
_MAX_VALUES = 100_000_000  # numbers of x that are held at once
_DRAWN_ROWS = 4000  # simulations whose quantiles are drawn
_NAMED = 20  # columns outside the simulations that are named


def check(run: Run, numbers: dict[str, Any]) -> None:
    """Compare the observation with the stored simulations and with replicas of the final posterior, in numbers and figures."""
    observables, x = run.simulator.observables, run.observation
    rows = _stored_rows(Store(run.path("simulations")), int(np.clip(_MAX_VALUES // x.size, 100, _MAX_ROWS)))
    names = _figure_names(observables)
    numbers["blocks"] = {
        o.name: {"kind": block_kind(o, rows[:200, c]), "size": o.size, "figure": names[o.name]} for o, c in _drawn(observables)
    }
    _check_prior(run, numbers, x, rows, names)
    _check_features(run, numbers, x, rows)
    _check_posterior(run, numbers, x, names)


def _drawn(observables: Sequence[Observable]) -> list[tuple[Observable, slice]]:
    cuts = columns(observables)
    return [(o, cuts[o.name]) for o in observables][:FIGURES]


def _figure_names(observables: Sequence[Observable]) -> dict[str, str]:
    """Part of a file's name for each block: letters and digits of its name, with its number where two are alike."""
    plain = {o.name: re.sub(r"[^A-Za-z0-9]+", "_", o.name).strip("_") or "block" for o in observables}
    alike = [name for name in plain.values() if list(plain.values()).count(name) > 1]
    return {name: f"{part}_{i}" if part in alike else part for i, (name, part) in enumerate(plain.items())}


def _stored_rows(store: Store, n: int) -> Array:
    """x (m, k) of the first n rows of a store that have not failed."""
    parts: list[Array] = []
    for _, x, _ in store.shards(valid_only=True):
        parts.append(np.asarray(x[: n - sum(map(len, parts))], dtype=np.float64))
        if sum(map(len, parts)) >= n:
            break
    return np.concatenate(parts)


def _check_prior(run: Run, numbers: dict[str, Any], x: Array, rows: Array, names: dict[str, str]) -> None:
    observables = run.simulator.observables
    held = np.isfinite(rows).all(axis=0) & np.isfinite(x)  # p-values need numbers; columns with missing values are drawn alone
    with np.errstate(invalid="ignore"):
        below, equal = (rows < x).sum(axis=0), (rows == x).sum(axis=0)
    out = np.isfinite(x) & (equal == 0) & ((below == 0) | (below == np.isfinite(rows).sum(axis=0)))
    numbers["prior_predictive"] = {
        "n": len(rows),
        "n_columns": int(x.size),
        "n_outside": int(out.sum()),
        "n_expected": float(2 * x.size / (len(rows) + 1)),
        "outside": [column_name(observables, int(j)) for j in np.flatnonzero(out)[:_NAMED]],
    }
    if held.any() and len(rows) >= MIN_ROWS:
        found = prior_predictive_check(rows[:, held], x[held])
        numbers["prior_predictive"] |= {"pvalue": found.pvalue, "joint": found.joint}
    if len(rows) < MIN_ROWS:
        return
    for o, block in _drawn(observables):
        run.save_figure(prior_predictive_figure(o, x[block], rows[:_DRAWN_ROWS, block]), f"prior_{names[o.name]}")


def _check_features(run: Run, numbers: dict[str, Any], x: Array, rows: Array) -> None:
    npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    features, observed = npe.embed(rows), npe.embed(x)
    half = len(features) // 2  # mean and covariance come from one half of the simulations, the distances from the other
    space = feature_space(features[:half])
    distances, distance = space.mahalanobis(features[half:]), float(space.mahalanobis(np.atleast_2d(observed))[0])
    label = "distance of the network's features from the mean of the simulations [sd]"
    if len(distances) >= 10:
        run.save_figure(misfit_figure(distances, distance, label=label), "misfit")
    numbers |= {"distance": distance, "distance_quantile": float((distances < distance).mean())}
    if len(rows) >= MIN_ROWS:
        shown = rows[:_DRAWN_ROWS]
        inputs, own = npe.inputs(shown).reshape(len(shown), -1), npe.inputs(x).reshape(-1)
        marks = [(o.name, block.start) for o, block in _drawn(run.simulator.observables)]
        panels = {"scaled inputs of the network": (own, inputs), "features, outputs of the embedding": (observed, features[:_DRAWN_ROWS])}
        aligned = own.size == x.size and len(marks) > 1
        run.save_figure(features_figure(panels, {next(iter(panels)): marks} if aligned else None), "features")


def _check_posterior(run: Run, numbers: dict[str, Any], x: Array, names: dict[str, str]) -> None:
    try:
        theta, replicas, (t_rep, t_obs), reasons = predictive(run)
    except DataError as err:  # every row failed, which the report says
        numbers |= {"n": 0, "skipped": str(err)}
        return
    n_failed = sum(reasons.values())
    numbers |= {"n": len(theta), "n_failed": n_failed, "failures": dict(list(reasons.items())[:5])}
    if len(theta) < MIN_ROWS:
        numbers["skipped"] = (
            f"{n_failed} of {n_failed + len(theta)} predictive simulations failed; expected at least {MIN_ROWS} that do not"
        )
        return
    result = predictive_pvalue(t_rep, t_obs)
    run.save_figure(panels_figure({"": result}, columns=1, width=5.0, height=3.8), "predictive")
    pulls, constant = _pulls(x, replicas)
    numbers |= {
        "statistic": "deviance" if hasattr(run.simulator, "deviance") else "chi-square about the predictive mean",
        "pvalue": result.pvalue,
        "pvalue_err": result.error,
        "pulls": {name: pulls[block] for name, block in columns(run.simulator.observables).items()},
        "constant": [column_name(run.simulator.observables, int(j)) for j in np.flatnonzero(constant)[:_NAMED]],
    }
    if np.isfinite(replicas).all() and np.isfinite(x).all():
        numbers["statistics"] = predictive_checks(replicas, x).pvalues
    for o, block in _drawn(run.simulator.observables):
        run.save_figure(predictive_figure(o, x[block], replicas[:_DRAWN_ROWS, block]), f"predictive_{names[o.name]}")


def _pulls(x: Array, replicas: Array) -> tuple[Array, Mask]:
    """(x - mean) / sd (k,) and whether a column is constant in the replicas and another number in the data; NaN without a value."""
    with np.errstate(invalid="ignore"):
        held = np.isfinite(replicas)
        n = held.sum(axis=0)
        mean = np.where(held, replicas, 0.0).sum(axis=0) / np.maximum(n, 1)
        sd = np.sqrt((np.where(held, replicas - mean, 0.0) ** 2).sum(axis=0) / np.maximum(n, 1))
        away = np.where(n > 0, x - mean, np.nan)
        fixed = (sd <= 1e-12 * np.abs(mean)) & (n > 0)
        different = np.abs(away) > 1e-9 * np.abs(mean)
        pulls = np.divide(away, sd, out=np.where(np.isfinite(away), 0.0, np.nan), where=~fixed & (n > 0))
    return np.where(fixed & different, np.nan, pulls), fixed & different


def predictive(run: Run) -> tuple[Array, Array, tuple[Array, Any], dict[str, int]]:
    """Replicas at draws of the final posterior.

    Returns: theta (n, d), replicas (n, k), the statistic of replicas (n,) and of the observation (n,) or a number, and the number of rows
    that failed, {reason: rows}.   Raises: DataError (all rows fail).
    """
    final = run.read_draws("posterior.nc").flat
    rng = run.rng("check")
    theta = final[rng.choice(len(final), min(run.config.check.n, len(final)), replace=False)]
    replicas, reasons = simulate_rows(run.simulator, theta, rng)
    failed = list(reasons)
    theta, replicas = np.delete(theta, failed, axis=0), np.delete(replicas, failed, axis=0)
    counted = dict(Counter(reasons.values()).most_common())
    deviance = getattr(run.simulator, "deviance", None)
    if deviance is not None:
        return theta, replicas, (np.asarray(deviance(replicas, theta)), np.asarray(deviance(run.observation, theta))), counted
    held = np.isfinite(replicas)
    mean = np.where(held, replicas, 0.0).sum(axis=0) / np.maximum(held.sum(axis=0), 1)
    variance = (np.where(held, replicas - mean, 0.0) ** 2).sum(axis=0) / np.maximum(held.sum(axis=0), 1)
    scale = np.where(variance > 0, variance, 1.0)
    t_rep, t_obs = (np.nansum((x - mean) ** 2 / scale, axis=-1) for x in (replicas, run.observation))
    return theta, replicas, (t_rep, float(t_obs)), counted
