"""The folder of an unfolding, and its numbers as a table, as JSON and as an ArviZ file.

settings.json   problem and settings; a folder with others is refused         spectrum.csv    every method, bin by bin
methods/        one .npz and one .json a method: not repeated by a rerun        unfolding.json  every number, seeds, versions, seconds
figures/        PNG and PDF                                                      unfolding.nc    spectra as an ArviZ file
validation.json tests on toys                                                    report.html     the page
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.errors import RunFolderError
from sbi_phys.core.files import open_aside
from sbi_phys.core.progress import Progress
from sbi_phys.core.types import Array
from sbi_phys.report.arviz import spectra_to_inference_data, write_netcdf
from sbi_phys.unfold.folding import bin_integral, broken_power_law
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.workflow.run import RunFolder, null_safe, versions
from sbi_phys.workflow.settings import UnfoldSettings
from sbi_phys.workflow.unfold_methods import TITLES, Answer, chi2_of

__all__ = ["COLUMNS", "MethodResult", "UnfoldRun", "deviations", "summary", "table_rows", "write_spectra"]


COLUMNS = (
    "method", "lg_e_low", "lg_e_high", "counts", "unfolded", "error", "error_low", "error_high", "refolded", "flux", "flux_error",
    "flux_error_low", "flux_error_high", "correction", "published_flux", "published_correction",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MethodResult:
    """Result of one method, read from the folder: its arrays (see `Answer`) and its record."""

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


class UnfoldRun(RunFolder):
    """The folder of an unfolding: a measurement, its settings and the results of the methods so far.

    Args: folder. measurement. settings. source: how the measurement was named, kept with the settings. progress.
    Raises: RunFolderError.
    """

    SETTINGS_FILE = "settings.json"
    RECORDS = "methods"

    def __init__(
        self,
        folder: str | Path,
        measurement: Measurement,
        settings: UnfoldSettings,
        source: dict[str, Any],
        progress: Progress | None = None,
    ) -> None:
        self.measurement, self.settings, self.source = measurement, settings, source
        self.found: dict[str, MethodResult] = {}
        self.failed: dict[str, str] = {}
        self.validation: dict[str, Any] = {}
        super().__init__(folder, progress)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on."""
        m = self.measurement
        made: dict[str, Any] = null_safe(
            {**self.source, **self.settings.to_dict(), "counts": m.counts, "reco_edges": m.reco_edges, "truth_edges": m.truth_edges}
        )
        return made

    def _require_same_settings(self, path: Path) -> None:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            raise RunFolderError(f"{path} is not JSON: {err}; take another folder") from err
        mine = json.loads(json.dumps(self.identity))
        for key in dict.fromkeys([*mine, *stored]):
            if mine.get(key) != stored.get(key):
                self._refuse(key, str(stored.get(key))[:60], str(mine.get(key))[:60])

    def _settings_text(self) -> str:
        return json.dumps(self.identity, indent=1, ensure_ascii=False) + "\n"

    def read_method(self, name: str) -> MethodResult | None:
        """The result of a method in the folder, None if it has not finished.   Raises: RunFolderError."""
        record, arrays = self.record(name), self.path("methods", f"{name}.npz")
        if record is None or not arrays.is_file():
            return None
        try:
            with np.load(arrays, allow_pickle=False) as file:
                return MethodResult(name=name, arrays={key: np.asarray(file[key]) for key in file.files}, record=record)
        except (OSError, ValueError, KeyError) as err:
            raise RunFolderError(f"{arrays} cannot be read: {err}; delete it to run the method again") from err

    def write_method(self, name: str, answer: Answer, seconds: float, warned: list[str]) -> MethodResult:
        """Write the result of a method: figures, arrays, and last its record."""
        for title, axes in answer.figures.items():
            self.save_figure(axes.figure, f"{name}_{title}")
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
        self.write_record(name, record)
        return MethodResult(name=name, arrays=arrays, record=record)

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


def table_rows(run: UnfoldRun) -> list[list[Any]]:
    """Rows of spectrum.csv (see COLUMNS), one for each method and bin; what is not known stays empty."""
    m, out = run.measurement, []
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
            out.append([name, *("" if not np.isfinite(v) else repr(float(v)) for v in row)])
    return out


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
