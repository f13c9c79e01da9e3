r"""What is done with a whole project: its networks and observations compared, its learning curve, systematic shifts, exports.

Each function first runs the stages that it needs, so that what it shows belongs to the settings, data and code of now.

Systematic shifts: for theta_i from the final posterior and x_i from the variant simulator, x'_i from the nominal one with the same random
numbers, the shift of parameter j is the mean over i of [median q(theta_j | x_i) - median q(theta_j | x'_i)] / sd q(theta_j | x'_i),
in posterior standard deviations; its error is the standard deviation over i divided by the square root of their number.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.comparison import compare_networks, compare_posteriors, learning_curve
from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.estimators.base import load
from sbi_phys.estimators.npe import NPE
from sbi_phys.plotting.style import save_figure
from sbi_phys.report import export_draws
from sbi_phys.simulation.protocol import load_simulator
from sbi_phys.store.store import Store
from sbi_phys.workflow.inference import estimator_settings, rows_used, simulations, training_rows
from sbi_phys.workflow.run import Run, versions
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.stages import outdated, run_stages

__all__ = ["compare_project", "export_results", "project_learning_curve", "systematic_shifts"]

_C2ST_DRAWS = 1000


def compare_project(config: Config, folder: str | Path, n: int = 1000, *, progress: Progress | None = None) -> list[str]:
    """Compare all networks of a project on n held-out simulations, and the posteriors of all observations -> texts of the tables.

    Writes compare_networks.csv and .json, compare_observations.csv, and figures, into the project's folder. A network or an observation
    that has not been trained or inferred is left out and named.
    """
    folder, out = Path(folder), []
    runs = {name: Run(folder, config, or_none(progress), network=name) for name in ("", *config.networks)}
    trained = {name or "default": run for name, run in runs.items() if outdated(run, "train") == []}
    idle = [name or "default" for name, run in runs.items() if (name or "default") not in trained]
    if not trained:
        raise DataError(f"{folder} has no trained network; expected one or more: sbi-phys train --out {folder}")
    if len(trained) > 1:
        out.append(_compare_networks(trained, folder, n, progress))
    else:
        out.append(f"one trained network; expected two or more to compare: sbi-phys train --name wide --set flow.hidden=128 --out {folder}")
    out += [f"not compared, because they are not trained or out of date: {', '.join(idle)}"] if idle else []
    return out + _compare_observations(config, folder, progress)


def _save(result: Any, folder: Path, name: str) -> None:
    """Write the plot of a result as PNG and PDF."""
    save_figure(result.plot().figure, folder, name)


def _compare_networks(trained: Mapping[str, Run], folder: Path, n: int, progress: Progress | None) -> str:
    first = next(iter(trained.values()))
    held_out = simulations(first, "held_out", n, "held out")
    networks = {name: load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device) for name, run in trained.items()}
    n_c2st = min(_C2ST_DRAWS, n // 2)
    found = compare_networks(networks, held_out, n, n_c2st=n_c2st, seed=first.seed("compare networks"), progress=progress)
    found.to_csv(folder / "compare_networks.csv")
    first.write_json("compare_networks.json", found.to_dict())
    _save(found, folder / "figures", "compare_networks")
    return found.summary()


def _compare_observations(config: Config, folder: Path, progress: Progress | None) -> list[str]:
    found, idle = {}, []
    for name in config.observations:
        run = Run(folder, config, or_none(progress), observation_name=name)
        if outdated(run, "refine") == []:
            found[name] = run.read_draws("posterior.nc").flat
        else:
            idle.append(name)
    out = [f"observations without a posterior of the default network, or with one that is out of date: {', '.join(idle)}"] if idle else []
    if len(found) < 2:
        return out
    result = compare_posteriors(found, run.simulator.parameters)
    result.to_csv(folder / "compare_observations.csv")
    _save(result, folder / "figures", "compare_observations")
    return [result.summary(), *out]


def project_learning_curve(
    config: Config,
    folder: str | Path,
    network: str = "",
    sizes: list[int] | None = None,
    n_repeats: int = 1,
    n_held_out: int = 1000,
    *,
    progress: Progress | None = None,
) -> str:
    """The held-out log score of a network against the number of simulations -> the text that says whether more would help."""
    run = run_stages(config, folder, ["simulate"], network=network, progress=progress)

    def make(seed: int) -> NPE:
        return NPE(run.simulator.prior, seed=seed, flow=run.config.flow, **estimator_settings(run))

    rows = training_rows(run)
    theta, x = rows if len(rows) == 2 else Store(run.path("simulations")).read()
    cache = run.network_folder / "learning_curve"
    found = learning_curve(
        make, (theta, x), sizes, n_held_out=n_held_out, n_repeats=n_repeats, cache=cache, seed=run.seed("learning curve"), progress=progress
    )
    found.to_csv(run.network_folder / "learning_curve.csv")
    _save(found, run.network_folder / "figures", "learning_curve")
    return f"{found.summary()}\nfigure: {run.network_folder / 'figures' / 'learning_curve.png'}; {rows_used(run)} simulations in all"


def export_results(
    config: Config,
    folder: str | Path,
    network: str,
    observation: str,
    formats: Mapping[str, str],
    to: Path | None = None,
    *,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the final draws of one observation in each format {format: suffix} -> the files."""
    run = run_stages(config, folder, ["refine"], network=network, observation_name=observation, progress=progress)
    draws = run.read_draws("posterior.nc")
    target = to if to is not None else run.result_folder / "export"
    target.mkdir(parents=True, exist_ok=True)
    stem = "_".join(["posterior", *(name for name in (observation, network) if name)])
    attrs = {
        "simulator": run.config.simulator.spec,
        "observation": run.config.infer.observation,
        "network": network or "default",
        "method": str(draws.notes.get("method", "")),
        "seed": run.config.run.seed,
        "versions": versions(),
    }
    return [export_draws(draws.flat, run.simulator.parameters, target / f"{stem}{suffix}", kind, attrs=attrs)
            for kind, suffix in formats.items()]  # fmt: skip


def systematic_shifts(
    config: Config, folder: str | Path, network: str = "", observation: str = "", n: int = 500, *, progress: Progress | None = None
) -> str:
    """Mean shift of the posterior, in its standard deviations, for data of each variant that the simulator names -> a table as text.

    A simulator names variants by `variants`, {name: settings that differ}. Writes systematics.csv beside the posterior.
    Raises: SettingError if there are none, DataError if a variant has other parameters or data.
    """
    run = run_stages(config, folder, ["refine"], network=network, observation_name=observation, progress=progress)
    variants = getattr(run.simulator, "variants", None)
    if not isinstance(variants, Mapping) or not variants:
        raise SettingError(
            f"{run.config.simulator.spec} has no variants; expected an attribute such as "
            'variants = {"energy scale up": {"scale": 1.14}}: settings of the simulator by the name of the systematic'
        )
    require_int("n", n, low=10)
    final, rng = run.read_draws("posterior.nc").flat, run.rng("systematics")
    theta = final[rng.choice(len(final), n)]
    npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
    nominal = np.asarray(run.simulator.simulate(theta, run.rng("systematics", "x")))
    header = ["variant", *(f"{p.name} [sd]" for p in run.simulator.parameters)]
    rows: list[list[Any]] = []
    squares = np.zeros(len(run.names))
    median, sd = _moments(npe, nominal, run)
    with run.progress.task("systematics", len(variants)) as task:
        for name, settings in variants.items():
            simulator = load_simulator(run.config.simulator.spec, {**run.config.simulator.settings, **settings})
            if simulator.parameters != run.simulator.parameters or simulator.observables != run.simulator.observables:
                raise DataError(f"the variant {name!r} has other parameters or observables; expected those of the simulator")
            x = np.asarray(simulator.simulate(theta, run.rng("systematics", "x")))
            good = np.isfinite(x).all(axis=1) & np.isfinite(nominal).all(axis=1)
            shifts = (_moments(npe, x[good], run)[0] - median[good]) / sd[good]
            mean, error = shifts.mean(axis=0), shifts.std(axis=0, ddof=1) / np.sqrt(len(shifts))
            squares += mean**2
            rows.append([name, *(f"{m:+.3f} +- {e:.3f}" for m, e in zip(mean, error, strict=True))])
            task.advance(1)
    rows.append(["in quadrature", *(f"{value:.3f}" for value in np.sqrt(squares))])
    run.write_csv("systematics.csv", header, rows)
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join("  ".join(str(cell).ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows])


def _moments(npe: Any, x: np.ndarray[Any, Any], run: Run) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Posterior medians and standard deviations (n, d) for each row of x."""
    draws = npe.sample(x, 400, seed=run.seed("systematics"))
    return np.median(draws, axis=1), draws.std(axis=1)
