r"""Stages `calibrate` and `check`: is the network honest on average, and is the observation one that it knows.

calibrate   every test of calibration on held-out simulations of the prior, and at the observation
check       p = P(D(x_rep, theta) >= D(x_o, theta)) over the final posterior, D the deviance; pulls of the data;
            Mahalanobis distance of the observation's features among those of the simulations
"""

from typing import Any

import numpy as np

from sbi_phys.calibration import predictive_pvalue
from sbi_phys.calibration.calibrate import calibrate as run_tests
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.types import Array
from sbi_phys.estimators.base import load
from sbi_phys.estimators.npe import NPE
from sbi_phys.plotting.figures import misfit_figure, panels_figure, save_figure
from sbi_phys.store.store import Store
from sbi_phys.workflow.learn import simulations
from sbi_phys.workflow.run import Run

__all__ = ["calibrate", "check", "feature_distances"]

_MAX_FEATURE_ROWS = 20_000


def calibrate(run: Run, numbers: dict[str, Any]) -> None:
    """Every test of calibration of the amortised network, on fresh simulations and at the observation."""
    settings = run.config.calibrate
    if not settings.n:
        numbers["skipped"] = "calibrate.n = 0"
        return
    npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    found = run_tests(
        npe,
        simulations(run, "held_out", settings.n, "held out"),
        settings.n,
        n_draws=settings.n_draws,
        x_obs=_observation(run),
        simulator=run.simulator,
        names=run.simulator.parameters,
        seed=run.seed("calibrate"),
        progress=run.progress,
    )
    ranks, regions = found.results["sbc"], found.results["coverage"]
    save_figure(panels_figure({"SBC ranks": ranks, "Expected coverage": regions}), run.path("figures"), "calibration")
    save_figure(ranks.figure(), run.path("figures"), "sbc_histograms")
    for name, figure in found.figures().items():
        save_figure(figure, run.path("figures"), f"calibration_{name}")
    numbers |= found.to_dict() | {
        "sbc_pvalue": ranks.pvalue,
        "sbc_pvalues": {name: p for name, p in ranks.pvalues.items() if name in run.names},
        "sbc_verdicts": ranks.verdicts,
        "coverage_pvalue": regions.pvalue,
        "coverage": {"level": regions.level, "observed": regions.observed, "band": regions.band},
    }
    run.write_json("calibration.json", numbers)


def _observation(run: Run) -> Array | None:
    """The observation, or None where the run has none: the tests at it are left out then."""
    try:
        return run.observation
    except (SettingError, DataError):
        return None


def check(run: Run, numbers: dict[str, Any]) -> None:
    """Posterior predictive p-value, pulls of every column, and the observation's distance from the simulations."""
    theta, replicas, statistics = predictive(run)
    t_rep, t_obs = statistics
    result = predictive_pvalue(t_rep, t_obs)
    mean, sd = replicas.mean(axis=0), replicas.std(axis=0)
    pulls = np.divide(run.observation - mean, sd, out=np.zeros_like(mean), where=sd > 0)
    npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    distances, observed = feature_distances(npe, Store(run.path("simulations")), run.observation)
    label = "distance of the network's features from the mean of the simulations [sd]"
    save_figure(misfit_figure(distances, observed, label=label), run.path("figures"), "misfit")
    save_figure(panels_figure({"": result}, columns=1, width=5.0, height=3.8), run.path("figures"), "predictive")
    numbers |= {
        "statistic": "deviance" if hasattr(run.simulator, "deviance") else "chi-square about the predictive mean",
        "n": len(theta),
        "pvalue": result.pvalue,
        "pvalue_err": result.error,
        "pulls": {o.name: pulls[block] for o, block in _blocks(run)},
        "distance": observed,
        "distance_quantile": float((distances < observed).mean()),
    }


def predictive(run: Run) -> tuple[Array, Array, tuple[Array, Array]]:
    """Draws theta (n, d) of the final posterior, replicas x (n, k), and the statistic of replicas and observation (n,)."""
    final = run.read_draws("posterior.nc").flat
    rng = run.rng("check")
    theta = final[rng.choice(len(final), min(run.config.check.n, len(final)), replace=False)]
    replicas = np.asarray(run.simulator.simulate(theta, rng), dtype=np.float64)
    good = np.isfinite(replicas).all(axis=1)
    theta, replicas = theta[good], replicas[good]
    deviance = getattr(run.simulator, "deviance", None)
    if deviance is not None:
        return theta, replicas, (np.asarray(deviance(replicas, theta)), np.asarray(deviance(run.observation, theta)))
    mean, variance = replicas.mean(axis=0), replicas.var(axis=0)
    scale = np.where(variance > 0, variance, 1.0)
    t_rep, t_obs = (((x - mean) ** 2 / scale).sum(axis=-1) for x in (replicas, run.observation))
    return theta, replicas, (t_rep, np.broadcast_to(t_obs, t_rep.shape))


def feature_distances(npe: NPE, store: Store, x: Array) -> tuple[Array, float]:
    """Mahalanobis distances of simulations' features, and of the observation's, from the mean of the simulations.

    Mean and covariance come from one half of the simulations, the distances from the other.
    Read: an observation beyond nearly all simulations is unlike what the network was trained on.
    """
    features = npe.embed(store.read()[1][:_MAX_FEATURE_ROWS])
    half = len(features) // 2
    mean = features[:half].mean(axis=0)
    # features may be collinear: directions without spread carry no distance
    values, vectors = np.linalg.eigh(np.cov(features[:half], rowvar=False).reshape(features.shape[1], -1))
    keep = values > 1e-9 * values.max()
    whiten = vectors[:, keep] / np.sqrt(values[keep])
    distances = np.linalg.norm((features[half:] - mean) @ whiten, axis=1)
    return distances, float(np.linalg.norm((npe.embed(x) - mean) @ whiten))


def _blocks(run: Run) -> list[tuple[Any, slice]]:
    ends = np.cumsum([o.size for o in run.simulator.observables]).tolist()
    return [(o, slice(end - o.size, end)) for o, end in zip(run.simulator.observables, ends, strict=True)]
