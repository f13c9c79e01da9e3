"""`sbi-phys unfold`: a measured spectrum by every method, kept in a folder that the same command takes up again.

settings.json   problem and settings; a folder made with others is refused     spectrum.csv    every method, bin by bin
methods/        one .npz and one .json a method: what a rerun does not repeat    unfolding.json  every number, seeds, versions, seconds
figures/        PNG and PDF                                                      unfolding.nc    spectra as an ArviZ file
validation.json tests on toys                                                    report.html     the page

A file is written aside and renamed; a method's .json comes last, so that a method is done or is done again.
"""

import csv
import io
import json
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.errors import ConvergenceError, DataError, RunFolderError, TrainingError
from sbi_phys.core.files import open_aside, write_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.types import Array
from sbi_phys.plotting.figures import save_figure
from sbi_phys.plotting.style import house_style
from sbi_phys.unfold.folding import bin_integral, broken_power_law
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.workflow.run import null_safe, versions
from sbi_phys.workflow.unfold_methods import METHODS, chi2_of, require_methods
from sbi_phys.workflow.unfold_tasks import TITLES, Answer, Task, UnfoldSettings

__all__ = ["COLUMNS", "QUICK", "Found", "UnfoldRun", "unfold_spectrum"]


QUICK = {
    "n_simulated": 8_192,
    "omnifold_replicas": 2,
    "flow_iterations": 1,
    "flow_replicas": 2,
    "bayes_samples": 1_000,
    "validate_toys": 40,
}
COLUMNS = (
    "method", "lg_e_low", "lg_e_high", "counts", "unfolded", "error", "error_low", "error_high", "refolded", "flux", "flux_error",
    "flux_error_low", "flux_error_high", "correction", "published_flux", "published_correction",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Found:
    """Answer of one method as it stands in the folder: its arrays (see `Answer`), and its record."""

    name: str
    arrays: dict[str, Array]
    record: dict[str, Any]

    @property
    def title(self) -> str:
        """The method in words."""
        return TITLES[self.name]

    @property
    def counts(self) -> Array:
        """Unfolded counts (r,)."""
        return self.arrays["counts"]

    @property
    def covariance(self) -> Array:
        """Covariance (r, r)."""
        return self.arrays["covariance"]

    @property
    def errors(self) -> Array:
        """Errors below and above (2, r): of the central 68 % of the draws where there are any, else the standard error both ways."""
        if "samples" in self.arrays:
            low, high = np.quantile(self.arrays["samples"], [0.158655, 0.841345], axis=0)
            return np.maximum(np.stack([self.counts - low, high - self.counts]), 0.0)
        return np.stack([np.sqrt(np.diag(self.covariance))] * 2)

    @property
    def correlation(self) -> Array:
        """Correlation matrix (r, r); 0 where an error is 0."""
        sd = np.sqrt(np.diag(self.covariance))
        scale = np.outer(sd, sd)
        return np.divide(self.covariance, scale, out=np.zeros_like(scale), where=scale > 0)


@dataclass
class UnfoldRun:
    """A folder with a measurement, its settings and what the methods have said so far.   Raises: RunFolderError."""

    folder: Path
    measurement: Measurement
    settings: UnfoldSettings
    asked: dict[str, Any]
    found: dict[str, Found] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    validation: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a folder that was made with other settings, or by something else; nothing is written yet."""
        self.folder = Path(self.folder)
        path = self.path("settings.json")
        if path.is_file():
            self._require_same(path)
        elif self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"{self.folder} is a file; expected a folder, new or of an earlier unfolding")
        elif self.folder.exists() and (foreign := sorted(p.name for p in self.folder.iterdir())):
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise RunFolderError(
                f"{self.folder} holds {shown} and no settings.json; expected an empty folder or one of an earlier unfolding"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the answers depend on."""
        m = self.measurement
        made: dict[str, Any] = null_safe(
            {**self.asked, **asdict(self.settings), "counts": m.counts, "reco_edges": m.reco_edges, "truth_edges": m.truth_edges}
        )
        return made

    def _require_same(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            raise RunFolderError(f"{path} is not JSON: {err}; take another folder") from err
        mine = json.loads(json.dumps(self.identity))
        for key in dict.fromkeys([*mine, *stored]):
            if mine.get(key) != stored.get(key):
                got, expected = (str(value)[:60] for value in (stored.get(key), mine.get(key)))
                raise RunFolderError(
                    f"{self.folder} was made with other settings: {key} is {got} there, expected {expected}; take another folder"
                )

    def path(self, *parts: str) -> Path:
        """A path in the folder."""
        return self.folder.joinpath(*parts)

    def begin(self) -> None:
        """Make the folder and write the settings into it.   Raises: RunFolderError."""
        try:
            self.path("methods").mkdir(parents=True, exist_ok=True)
            self.write_json("settings.json", self.identity)
        except OSError as err:
            raise RunFolderError(f"{self.folder} can not be made: {err.strerror}; expected a place to write to") from err

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file aside and rename it."""
        return write_aside(self.path(name), text, make_folder=True)

    def write_json(self, name: str, content: Any) -> Path:
        """Write JSON; what is not finite becomes null."""
        return self.write_text(name, json.dumps(null_safe(content), indent=1, ensure_ascii=False) + "\n")

    def read(self, name: str) -> Found | None:
        """What a method left in the folder, None if it has not finished.   Raises: RunFolderError."""
        record, arrays = self.path("methods", f"{name}.json"), self.path("methods", f"{name}.npz")
        if not (record.is_file() and arrays.is_file()):
            return None
        try:
            with np.load(arrays, allow_pickle=False) as file:
                values = {key: np.asarray(file[key]) for key in file.files}
            return Found(name=name, arrays=values, record=json.loads(record.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as err:
            raise RunFolderError(f"{record} or {arrays.name} can not be read: {err}; delete both to run the method again") from err

    def keep(self, name: str, answer: Answer, seconds: float, warned: list[str]) -> Found:
        """Write what a method said: figures, arrays, and last its record."""
        for title, axes in answer.figures.items():
            save_figure(axes.figure, self.path("figures"), f"{name}_{title}")
        chi2, ndf = chi2_of(self.measurement, answer)
        arrays = {"counts": answer.counts, "covariance": answer.covariance, "refolded": answer.refolded, **answer.arrays}
        arrays |= {f"covariance_{part}": value for part, value in answer.parts.items()}
        if answer.samples is not None:
            arrays["samples"] = answer.samples
        record = {
            "method": name,
            "title": TITLES[name],
            "seconds": round(seconds, 3),
            "chi2": chi2,
            "ndf": ndf,
            "effective": answer.effective,
            "words": answer.words,
            "numbers": answer.numbers,
            "warnings": warned,
            "figures": [f"{name}_{title}" for title in answer.figures],
            "versions": versions(),
        }
        with open_aside(self.path("methods", f"{name}.npz"), make_folder=True) as file:
            np.savez(file, allow_pickle=False, **arrays)
        self.write_json(f"methods/{name}.json", record)
        found = self.read(name)
        if found is None:
            raise RunFolderError(f"{self.path('methods', f'{name}.json')} vanished while it was written")
        return found

    def spectrum(self, parameters: str = "parameters") -> Array:
        """Expected counts (f,) in fine true bins of the fitted flux, or of the best power law ("power_law")."""
        theta = self.found["folding"].arrays[parameters]
        return self.measurement.exposure * bin_integral(broken_power_law, self.measurement.fine_edges, theta)

    def flux(self, counts: Array) -> Array:
        """Flux of counts (..., r), 1/(km2 sr yr eV) for an exposure in km2 sr yr."""
        return counts / self.measurement.per_flux

    def correction(self, name: str) -> Array:
        """Unfolded over measured (r,); NaN where nothing was measured."""
        n = self.measurement.counts
        return np.divide(self.found[name].counts, n, out=np.full(n.size, np.nan), where=n > 0)

    @property
    def seconds(self) -> dict[str, float]:
        """Time of each method, and of the tests."""
        spent = {name: float(found.record["seconds"]) for name, found in self.found.items()}
        return spent | ({"validate": self.validation["seconds"]} if "seconds" in self.validation else {})


def unfold_spectrum(
    measurement: Measurement,
    folder: str | Path,
    settings: UnfoldSettings | None = None,
    methods: tuple[str, ...] = tuple(METHODS),
    *,
    asked: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> UnfoldRun:
    """Unfold by every method asked for, test the binned ones, and write tables, figures, files and the page.

    Args: measurement. folder: made if missing, taken up if begun. settings. methods: names out of METHODS; 'folding' is always done.
    asked: how the measurement was named, kept with the settings.
    Returns: the run, whose files are complete; `failed` has the methods that could not answer.
    Raises: SettingError, RunFolderError, DataError, ConvergenceError (forward folding failed: nothing else can begin).
    """
    from sbi_phys.workflow.unfold_page import write_page

    wanted = require_methods(methods)
    bars = or_none(progress)
    run = UnfoldRun(Path(folder), measurement, settings or UnfoldSettings(), dict(asked or {"problem": measurement.name}))
    # what an earlier run has finished stays on the page
    names = [name for name in METHODS if name in wanted or run.path("methods", f"{name}.json").is_file()]
    _ = measurement.fine  # a response that is none is found before anything is written
    run.begin()
    for i, name in enumerate(names):
        with bars.task(f"[{i + 1}/{len(names)}] {TITLES[name]}", None):
            known = run.read(name)
            if known is not None:
                run.found[name] = known
                continue
            _ask(run, name, progress)
    if run.settings.validate_toys:
        with bars.task("tests on toys", None):
            run.validation = _validated(run, progress)
    with bars.task("tables, figures, page", None):
        run.write_text("spectrum.csv", table(run))
        run.write_json("unfolding.json", summary(run))
        write_spectra(run)
        write_page(run)
    return run


def _ask(run: UnfoldRun, name: str, progress: Progress | None) -> None:
    flat = np.ones(run.measurement.fine_edges.size - 1)
    spectrum, prior = (flat, flat) if name == "folding" else (run.spectrum(), run.spectrum("power_law"))
    theta = np.zeros(0) if name == "folding" else run.found["folding"].arrays["parameters"]
    task = Task(measurement=run.measurement, settings=run.settings, spectrum=spectrum, prior=prior, theta=theta, progress=progress)
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
    run.found[name] = run.keep(name, answer, time.perf_counter() - begin, words)


def _validated(run: UnfoldRun, progress: Progress | None) -> dict[str, Any]:
    """Tests of the binned methods on toys of the fitted spectrum, once: kept in validation.json with their figures."""
    from sbi_phys.workflow.unfold_proof import prove

    path = run.path("validation.json")
    wanted: list[str] = [name for name in ("ibu", "tikhonov") if name in run.found]
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if kept.get("methods") == wanted:
            return kept
    if not wanted:
        return {}
    begin = time.perf_counter()
    found = prove(run, wanted, progress)
    found["seconds"] = round(time.perf_counter() - begin, 3)
    run.write_json("validation.json", found)
    return found


def table(run: UnfoldRun) -> str:
    """The CSV text: one line for each method and bin; what is not known stays empty."""
    m = run.measurement
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    nothing = np.full(m.counts.size, np.nan)
    for name, found in run.found.items():
        low, high = found.errors
        error = np.sqrt(np.diag(found.covariance))
        columns = (
            m.reco_edges[:-1], m.reco_edges[1:], m.counts, found.counts, error, low, high, found.arrays["refolded"],
            run.flux(found.counts), run.flux(error), run.flux(low), run.flux(high), run.correction(name),
            m.published.get("flux", nothing), m.published.get("correction", nothing),
        )  # fmt: skip
        for row in zip(*columns, strict=True):
            writer.writerow([name, *("" if not np.isfinite(v) else repr(float(v)) for v in row)])
    return out.getvalue()


def deviations(run: UnfoldRun) -> dict[str, dict[str, float]]:
    """Of every method: largest |correction / published - 1| within the target's range, and in which bin; {} without published ones."""
    m = run.measurement
    if "correction" not in m.published or m.target is None:
        return {}
    low, high, _ = m.target
    inside = (m.centres > low) & (m.centres < high)
    out = {}
    for name in run.found:
        away = np.where(inside, np.nan_to_num(np.abs(run.correction(name) / m.published["correction"] - 1)), 0.0)
        out[name] = {"worst": float(away.max()), "at": float(m.centres[int(away.argmax())])}
    return out


def summary(run: UnfoldRun) -> dict[str, Any]:
    """Every number, for unfolding.json."""
    m = run.measurement
    known = ("counts", "covariance", "refolded", "samples")
    methods = {
        name: {
            **found.record,
            "counts": found.counts,
            "errors": found.errors,
            "covariance": found.covariance,
            "correlation": found.correlation,
            "refolded": found.arrays["refolded"],
            "flux": run.flux(found.counts),
            "flux_errors": run.flux(found.errors),
            "correction": run.correction(name),
            "arrays": {key: value for key, value in found.arrays.items() if key not in known},
        }
        for name, found in run.found.items()
    }
    return {
        "title": m.title,
        "source": m.source,
        **run.identity,
        "exposure": m.exposure,
        "published": dict(m.published),
        "target": m.target,
        "methods": methods,
        "failed": run.failed,
        "corrections_against_published": deviations(run),
        "validation": run.validation,
        "seconds": run.seconds | {"total": sum(run.seconds.values())},
        "versions": versions(),
    }


def write_spectra(run: UnfoldRun) -> Path:
    """Write unfolding.nc: draws flux_<method> where a method has them; counts_, point_flux_ and covariance_<method> of every method.

    Without any draws the first method's Gaussian takes their place, which the attribute `gaussian` says.
    """
    from sbi_phys.report.arviz import spectra_to_inference_data, write_netcdf

    m = run.measurement
    draws = {name: found.arrays["samples"] for name, found in run.found.items() if "samples" in found.arrays}
    gaussian = []
    if not draws:
        name, found = next(iter(run.found.items()))
        rng = np.random.default_rng(np.random.SeedSequence(run.settings.seed))
        draws, gaussian = {name: rng.multivariate_normal(found.counts, found.covariance, 2000)}, [name]
    constants: dict[str, Array] = {"lg_e_low": m.reco_edges[:-1], "lg_e_high": m.reco_edges[1:]}
    for name, found in run.found.items():
        point = {"counts": found.counts, "point_flux": run.flux(found.counts), "covariance": found.covariance}
        constants |= {f"{key}_{name}": value for key, value in point.items()}
    constants |= {f"published_{key}": value for key, value in m.published.items()}
    data = spectra_to_inference_data(
        {f"flux_{name}": run.flux(value) for name, value in draws.items()},
        constants,
        {"counts": m.counts},
        lg_energy=m.centres,
        attrs=null_safe({"settings": run.identity, "versions": versions(), "gaussian": gaussian, "seconds": run.seconds}),
    )
    return write_netcdf(run.path("unfolding.nc"), data)
