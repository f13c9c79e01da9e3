r"""Stages of a learned likelihood (NLE) and ratio (NRE), and their comparison with the posterior network on one observation.

train_nle, train_nre    store  ->  q(x | theta) or r(x | theta)
infer_nle, infer_nre    theta ~ q(x_o | theta) p(theta), or r(x_o | theta) p(theta)
methods                 each posterior is compared with the exact one where it is known: by a grid for one or two free parameters, else
                        by the MCMC of stage `reference`. Learned log r = log p(x | theta) - log p(x) is compared with the exact one at
                        held-out pairs, with p(x) by a grid. With more than two free parameters the difference of ln L between the true
                        theta and one at a posterior width from it is compared, which does not need p(x).

These stages run on request and do not change the files of the posterior network.
"""

from typing import Any

import numpy as np

from sbi_phys.calibration import c2st
from sbi_phys.calibration.ratios import reliability
from sbi_phys.core.errors import ConvergenceError, DataError, NonFiniteError
from sbi_phys.core.types import Array
from sbi_phys.estimators.base import load
from sbi_phys.estimators.density_sampling import PosteriorDraws
from sbi_phys.estimators.nle import NLE
from sbi_phys.estimators.nre import NRE
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.plotting.posterior import PairRatios, methods_figure, ratios_figure
from sbi_phys.report.tables import shift_table
from sbi_phys.samplers.diagnostics import split_r_hat
from sbi_phys.samplers.grid import grid_posterior
from sbi_phys.workflow.inference import LogTarget, estimator_settings, log_names, log_target, simulations, training_rows
from sbi_phys.workflow.run import Run

__all__ = [
    "METHODS", "TITLES", "exact_draws", "infer_nle", "infer_nre", "methods", "require_converged", "train_nle", "train_nre",
]  # fmt: skip

# method -> the file with its draws
METHODS = {"npe": "posterior_amortised.nc", "nle": "posterior_nle.nc", "nre": "posterior_nre.nc"}
TITLES = {"npe": "NPE, posterior", "nle": "NLE, likelihood", "nre": "NRE, ratio"}

MOST_R_HAT, LEAST_EFFECTIVE = 1.02, 100  # largest R-hat of converged chains, and smallest effective number of draws
_PARTS = 4  # parts of independent draws, for which R-hat is computed as for chains
_EDGE = 8.0  # in u: the prior mass beyond is negligible
_C2ST_DRAWS = 2000
_CELLS = (1_600, 5_000, 40_000)  # of the grid for one p(x), by level of refinement; a narrow posterior needs more
_LEAST_CURVE = 40  # smallest number of pairs of each kind for a reliability curve


def train_nle(run: Run, numbers: dict[str, Any]) -> None:
    """Train the likelihood on the store; an interrupted training continues from its checkpoint."""
    layers = run.config.methods.nle_layers
    flow: Any = "auto" if layers is None else FlowConfig(n_layers=layers, hidden=32)
    nle = NLE(run.simulator.prior, seed=run.seed("train_nle"), flow=flow, **estimator_settings(run) | {"standardise": "column"})
    _train(run, nle, "nle")
    numbers |= _training(nle) | {"n_layers": nle.flow.n_layers}


def train_nre(run: Run, numbers: dict[str, Any]) -> None:
    """Train the ratio on the store; an interrupted training continues from its checkpoint."""
    nre = NRE(run.simulator.prior, seed=run.seed("train_nre"), loss=run.config.methods.nre_loss, **estimator_settings(run))
    _train(run, nre, "nre")
    numbers |= _training(nre) | {"loss": nre.loss}


def _train(run: Run, model: NLE | NRE, name: str) -> None:
    run.path("training").mkdir(exist_ok=True)
    model.fit(*training_rows(run), memory=run.config.run.memory or None, checkpoint=run.path("training", name), progress=run.progress)
    model.save(run.path(f"model_{name}.pt"))


def _training(model: NLE | NRE) -> dict[str, Any]:
    return {
        "validation_loss": [min(record["valid"] for record in member) for member in model.history],
        "epochs": [len(member) for member in model.history],
        "device": str(model.device),
    }


def infer_nle(run: Run, numbers: dict[str, Any]) -> None:
    """Draw from the posterior of the observation with the learned likelihood."""
    _infer(run, "nle", numbers)


def infer_nre(run: Run, numbers: dict[str, Any]) -> None:
    """Draw from the posterior of the observation with the learned ratio."""
    _infer(run, "nre", numbers)


def _infer(run: Run, method: str, numbers: dict[str, Any]) -> None:
    model = load(run.path(f"model_{method}.pt"), simulator=run.simulator, device=run.config.run.device)
    sampler, title = run.config.methods.sampler, method.upper()
    try:
        found = model.posterior(
            run.observation, run.config.infer.n_draws, seed=run.seed(f"infer_{method}"), method=sampler, progress=run.progress
        )
    except ConvergenceError as err:
        others = "hmc" if sampler != "hmc" else "emcee"
        raise ConvergenceError(f"the posterior by {title} was not sampled: {err}; try --set methods.sampler={others}") from err
    numbers |= require_converged(title, found)
    run.write_draws(METHODS[method], found.theta, {"method": TITLES[method], **numbers})


def require_converged(title: str, found: PosteriorDraws) -> dict[str, Any]:
    """Return the convergence diagnostics of draws: split R-hat by free parameter, effective number of draws, Pareto k.

    For independent draws (importance sampling, a grid) R-hat compares four parts of them.   Raises: ConvergenceError.
    """
    r_hat, chains = np.asarray(found.r_hat), True
    if not np.isfinite(r_hat).all():
        n, chains = len(found.theta) // _PARTS, False
        r_hat = split_r_hat(found.theta[: n * _PARTS].reshape(_PARTS, n, -1))
    # R-hat of independent draws only reflects chance; for them the effective number of draws decides
    if (chains and r_hat.max() > MOST_R_HAT) or found.n_effective < LEAST_EFFECTIVE:
        raise ConvergenceError(
            f"the posterior by {title} is not reliable: split R-hat {r_hat.max():.3f}, {found.n_effective:.0f} effective draws; "
            f"expected at most {MOST_R_HAT} and at least {LEAST_EFFECTIVE}. {found.message}"
        )
    return {
        "n_draws": len(found.theta),
        "sampler": found.method,
        "r_hat": r_hat,
        "n_effective": found.n_effective,
        "pareto_k": found.pareto_k,
        "evaluations": found.evaluations,
        "log_evidence": found.log_evidence,
        "words": found.summary(),
    }


def methods(run: Run, numbers: dict[str, Any]) -> None:
    """Compare the posteriors of the methods in numbers and in a figure, and learned ratios with exact ones."""
    found = {name: run.read_draws(file).flat for name, file in METHODS.items() if run.path(file).exists()}
    exact, name = exact_draws(run)
    numbers["exact"] = name
    with run.progress.task("two-sample tests", len(found)) as task:
        for method, theta in found.items():
            numbers[method] = _one(run, method, theta, exact)
            task.advance(1, text=method)
    numbers["exact_posterior"] = None if exact is None else _moments(run, exact)
    label = None if exact is None else (f"exact ({name})", exact)
    draws, log = {TITLES[m]: theta for m, theta in found.items()}, log_names(run.simulator.prior)
    figure = methods_figure(draws, run.simulator.parameters, label, truth=run.truth, log=log)
    run.save_figure(figure, "methods")
    numbers["ratios"] = _ratios(run)


def exact_draws(run: Run) -> tuple[Array | None, str]:
    """Draws (n, d) of the exact posterior and the method that made them; None and the reason where there are none."""
    target, prior = log_target(run), run.simulator.prior
    if target is not None and prior.free_dim <= 2:
        edge = np.full(prior.free_dim, _EDGE)
        try:
            grid = grid_posterior(target, -edge, edge, n_cells=10_000)
        except ConvergenceError:  # the posterior is narrower than these cells
            grid = grid_posterior(target, -edge, edge)
        theta = prior.from_unbounded(grid.sample(run.config.infer.n_draws, run.rng("methods", "exact")))
        run.write_draws("posterior_exact.nc", theta, {"method": "exact, by grid"})
        return theta, "grid"
    if run.path("reference.nc").exists() and run.record("reference") is not None:
        return run.read_draws("reference.nc").flat, "Markov chains"
    return None, "no exact likelihood" if target is None else "no exact MCMC yet: run sbi-phys infer"


def _moments(run: Run, theta: Array) -> dict[str, Any]:
    columns = zip(run.names, np.median(theta, axis=0), theta.std(axis=0), strict=True)
    return {name: {"median": median, "sd": sd} for name, median, sd in columns}


def _one(run: Run, method: str, theta: Array, exact: Array | None) -> dict[str, Any]:
    """Medians, sd, seconds and convergence of one method; C2ST and shifts against the exact draws."""
    training, drawing = ("train", "infer") if method == "npe" else (f"train_{method}", f"infer_{method}")
    out: dict[str, Any] = {
        "posterior": _moments(run, theta),
        "train_seconds": (run.record(training) or {}).get("seconds"),
        "draw_seconds": (run.record(drawing) or {}).get("seconds"),
        **{key: run.numbers(drawing).get(key) for key in ("sampler", "n_effective", "r_hat", "pareto_k")},
    }
    if exact is None:
        return out
    out["median_shift_sd"] = {row.name: row.shift for row in shift_table(theta, exact, run.simulator.parameters)}
    try:
        test = c2st(theta, exact, seed=run.seed("methods", "c2st"), max_draws=_C2ST_DRAWS, workers=run.config.run.workers or 2)
    except DataError as err:
        return out | {"c2st": None, "c2st_failed": str(err)}
    return out | {"c2st": test.accuracy, "c2st_err": test.standard_error, "c2st_n": test.n}


def _ratios(run: Run) -> dict[str, Any]:
    """Learned against exact log ratios at held-out pairs; the figure `ratios`."""
    models = {m: load(path, simulator=run.simulator, device=run.config.run.device)
              for m in ("nle", "nre") if (path := run.path(f"model_{m}.pt")).exists()}  # fmt: skip
    n = min(run.config.methods.n_pairs, run.config.calibrate.n)
    if not models or n < 2 or not callable(getattr(run.simulator, "log_likelihood", None)):
        why = "no learned likelihood or ratio" if not models else "calibrate.n or methods.n_pairs = 0" if n < 2 else "no exact likelihood"
        return {"skipped": why}
    theta, x = simulations(run, "held_out", run.config.calibrate.n, "held out").read()
    theta, x = np.asarray(theta, dtype=np.float64)[:n], np.asarray(x, dtype=np.float64)[:n]
    whole = run.simulator.prior.free_dim <= 2
    pairs = _whole(run, models, theta, x) if whole else _differences(run, models, theta, x)
    if not pairs:
        return {"skipped": "the learned densities are not finite at held-out pairs"}
    run.save_figure(ratios_figure({TITLES[m]: p for m, p in pairs.items()}, difference=not whole), "ratios")
    out: dict[str, Any] = {"n": n, "what": "log r" if whole else "difference of ln L"}
    for method, p in pairs.items():
        out[method] = {"rms": p.rms, "mean": float(np.mean(p.learned - p.exact)), "exact_sd": float(p.exact.std())}
        if p.reliability is not None:
            out[method] |= {"reliability_pvalue": p.reliability.pvalue, "words": p.reliability.summary()}
    return out


def _learned(model: NLE | NRE, x: Array, theta: Array) -> Array:
    """Learned ln L or ln r (n,), up to a function of x only."""
    return model.log_likelihood(x, theta) if isinstance(model, NLE) else model.log_ratio(x, theta)


def _whole(run: Run, models: dict[str, Any], theta: Array, x: Array) -> dict[str, PairRatios]:
    """Log r of joint and marginal pairs, with p(x) of each x by a grid."""
    prior, other = run.simulator.prior, np.roll(theta, -1, axis=0)
    edge, evidence = np.full(prior.free_dim, _EDGE), np.empty(len(x))
    with run.progress.task("evidence of held-out data", len(x)) as task:
        for i, row in enumerate(x):
            evidence[i] = _evidence(LogTarget(run.simulator, row), edge)
            task.advance(1)
    joint, marginal = (_exact(run, x, t) - evidence for t in (theta, other))
    out = {}
    for method, model in models.items():
        try:
            if isinstance(model, NLE):
                ours, theirs = (model.log_likelihood(x, t) - evidence for t in (theta, other))
            else:
                ours, theirs = model.log_ratio_pairs(theta, x, normalise=True)
        except (NonFiniteError, ConvergenceError):
            continue
        curve = reliability(ours, theirs, n_bins=int(np.clip(len(x) // 15, 4, 20))) if len(x) >= _LEAST_CURVE else None
        out[method] = PairRatios(joint, ours, marginal, theirs, curve)
    return out


def _evidence(target: LogTarget, edge: Array) -> float:
    """Log p(x).   Raises: ConvergenceError."""
    # with at most a tenth of the mass in a cell the sum is accurate to half a percent, also for a correlation of 0.98
    for cells in _CELLS[:-1]:
        try:
            return grid_posterior(target, -edge, edge, n_cells=cells, max_cell_mass=0.1).log_evidence
        except ConvergenceError:
            continue
    return grid_posterior(target, -edge, edge, n_cells=_CELLS[-1], max_cell_mass=0.1).log_evidence


def _differences(run: Run, models: dict[str, Any], theta: Array, x: Array) -> dict[str, PairRatios]:
    """Differences of ln L between the true theta and one at a distance of the posterior width, which is taken at the observation."""
    prior = run.simulator.prior
    u, none = prior.to_unbounded(theta), np.zeros(0)
    out = {}
    for method, model in models.items():
        if not run.path(METHODS[method]).exists():
            continue
        spread = np.cov(prior.to_unbounded(run.read_draws(METHODS[method]).flat), rowvar=False).reshape(prior.free_dim, prior.free_dim)
        step = run.rng("methods", "differences").standard_normal(u.shape) @ np.linalg.cholesky(spread).T
        other = prior.from_unbounded(u + step)
        try:
            learned = _learned(model, x, theta) - _learned(model, x, other)
        except NonFiniteError:
            continue
        out[method] = PairRatios(_exact(run, x, theta) - _exact(run, x, other), learned, none, none, _curve(model, theta, x))
    return out


def _curve(model: NLE | NRE, theta: Array, x: Array) -> Any:
    """Reliability curve of a ratio, which does not need p(x); None for NLE or too few pairs."""
    if not isinstance(model, NRE) or len(x) < _LEAST_CURVE:
        return None
    try:
        return reliability(*model.log_ratio_pairs(theta, x, normalise=True), n_bins=10)
    except ConvergenceError:
        return None


def _exact(run: Run, x: Array, theta: Array) -> Array:
    """ln p(x | theta) row by row (n,)."""
    likelihood: Any = run.simulator.log_likelihood  # type: ignore[attr-defined]
    return np.array([float(likelihood(row, t[None])[0]) for row, t in zip(x, theta, strict=True)])
