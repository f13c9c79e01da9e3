"""`sbi-phys unfold`: unfold a measured spectrum by every method in one folder, which the same command continues.

The binned methods are tested on toys with a known truth: the fitted spectrum, folded with the response of the real data. The settings
that the data chose (iterations, strength) are fixed for the toys, and so is the prior's share of the covariance, scaled with the counts:
the tests describe the choice of this run.
"""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sbi_phys.core.errors import ConvergenceError, DataError, TrainingError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array
from sbi_phys.plotting.style import house_style
from sbi_phys.unfold import ibu, tikhonov
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.validation import validate
from sbi_phys.workflow.settings import UnfoldSettings
from sbi_phys.workflow.unfold_methods import METHODS, TITLES, Task, require_methods
from sbi_phys.workflow.unfold_page import write_page
from sbi_phys.workflow.unfold_run import COLUMNS, MethodResult, UnfoldRun, summary, table_rows, write_spectra

__all__ = ["unfold_spectrum", "validate_on_toys"]


def unfold_spectrum(
    measurement: Measurement,
    folder: str | Path,
    settings: UnfoldSettings | None = None,
    methods: tuple[str, ...] = tuple(METHODS),
    *,
    source: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> UnfoldRun:
    """Unfold by every method asked for, test the binned ones on toys, and write tables, figures and the page.

    Args: measurement. folder: created if missing, continued if it exists. settings. methods: names of METHODS; 'folding' always runs.
    source: how the measurement was named, kept with the settings.
    Returns: the run, whose files are complete; `failed` has the methods without a result.
    Raises: SettingError, RunFolderError, DataError, ConvergenceError (forward folding failed, which the other methods need).
    """
    wanted = require_methods(methods)
    run = UnfoldRun(Path(folder), measurement, settings or UnfoldSettings(), dict(source or {"problem": measurement.name}), progress)
    # methods that an earlier run has finished stay on the page
    names = [name for name in METHODS if name in wanted or run.path("methods", f"{name}.json").is_file()]
    _ = measurement.fine  # an invalid response is found before anything is written
    run.begin()
    for i, name in enumerate(names):
        with run.progress.task(f"[{i + 1}/{len(names)}] {TITLES[name]}", None):
            known = run.read_method(name)
            if known is not None:
                run.found[name] = known
                continue
            _run_method(run, name)
    if run.settings.validate_toys:
        with run.progress.task("tests on toys", None):
            run.validation = _validation(run)
    with run.progress.task("tables, figures, page", None):
        run.write_csv("spectrum.csv", COLUMNS, table_rows(run))
        run.write_json("unfolding.json", summary(run))
        write_spectra(run)
        write_page(run)
    return run


def _run_method(run: UnfoldRun, name: str) -> None:
    flat = np.ones(run.measurement.fine_edges.size - 1)
    spectrum, prior = (flat, flat) if name == "folding" else (run.spectrum(), run.spectrum("power_law"))
    theta = np.zeros(0) if name == "folding" else run.found["folding"].arrays["parameters"]
    task = Task(measurement=run.measurement, settings=run.settings, spectrum=spectrum, prior=prior, theta=theta, progress=run.progress)
    begin = time.perf_counter()
    try:
        with warnings.catch_warnings(record=True) as caught, house_style():
            warnings.simplefilter("always")
            answer = METHODS[name](task)
    except (ConvergenceError, DataError, TrainingError) as err:
        if name == "folding":
            raise
        run.failed[name] = f"{type(err).__name__}: {err}"
        return
    words = list(dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning | RuntimeWarning)))
    run.found[name] = run.write_method(name, answer, time.perf_counter() - begin, words)


def _validation(run: UnfoldRun) -> dict[str, Any]:
    """Tests of the binned methods on toys of the fitted spectrum, read from validation.json if they were made before."""
    path = run.path("validation.json")
    wanted: list[str] = [name for name in ("ibu", "tikhonov") if name in run.found]
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("methods") == wanted:
            return kept
    if not wanted:
        return {}
    begin = time.perf_counter()
    found = validate_on_toys(run, wanted)
    found["seconds"] = round(time.perf_counter() - begin, 3)
    run.write_json("validation.json", found)
    return found


Unfold = Callable[[Array, Response], Any]


class _Result(NamedTuple):
    """What a test needs of a method."""

    counts: Array
    covariance: Array


def validate_on_toys(run: UnfoldRun, names: list[str]) -> dict[str, Any]:
    """Test the methods by name -> verdict, rows and words, with the figures saved as validate_<name>."""
    m = run.measurement
    response, truth = m.within(run.spectrum()), m.coarse(run.spectrum())[m.inner]
    prior = m.coarse(run.spectrum("power_law"))[m.inner]
    found = validate(
        {run.found[name].title: _AT_FIXED_SETTINGS[name](run.found[name], prior) for name in names},
        response,
        truth,
        counts=m.counts,
        n_toys=run.settings.validate_toys,
        seed=seed_for(run.settings.seed, "unfold", "validate"),
        progress=run.progress,
    )
    with house_style():
        figures = found.figures()
    for name, figure in figures.items():
        run.save_figure(figure, f"validate_{name}")
    return {
        "methods": names,
        "n_toys": run.settings.validate_toys,
        "verdict": found.verdict,
        "passed": found.passed,
        "failed": list(found.failed),
        "summary": found.summary(),
        "rows": [
            {"name": r.name, "value": r.value, "criterion": r.criterion, "passed": r.passed, "words": r.words, "pvalue": r.pvalue}
            for r in found.decisions
        ],
        "figures": [f"validate_{name}" for name in figures],
    }


def _ibu(found: MethodResult, prior: Array) -> Unfold:
    k = int(found.record["numbers"]["n_iterations"])
    relative = found.arrays["covariance_prior"] / np.outer(found.counts, found.counts)

    def unfold(counts: Array, response: Response) -> _Result:
        answer = ibu(counts, response, k, prior, errors="expected")
        return _Result(answer.counts, answer.covariance + relative * np.outer(answer.counts, answer.counts))

    return unfold


def _tikhonov(found: MethodResult, prior: Array) -> Unfold:
    strength = float(found.record["numbers"]["strength"])

    def unfold(counts: Array, response: Response) -> _Result:
        answer = tikhonov(counts, response, strength, prior)
        return _Result(answer.counts, answer.covariance)

    return unfold


_AT_FIXED_SETTINGS: dict[str, Callable[[MethodResult, Array], Unfold]] = {"ibu": _ibu, "tikhonov": _tikhonov}
