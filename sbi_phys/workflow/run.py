"""Run folders: settings, records of finished stages, and files that are complete or absent.

Files of an inference run (`Run`); `unfold_run` has the analogue for unfolding:

config.toml     settings; other settings raise an error     posterior.nc            final posterior draws
simulations/    the store                                   posterior_amortised.nc  before rounds and refinement
rounds/         stores of the truncated rounds              reference.nc            exact MCMC
training/       checkpoints of the training                 calibration.json  figures/  summary.json  report.html
model.pt        the amortised network                       stages/  a record of each stage: seconds, versions, numbers
model_nle.pt, model_nre.pt, posterior_nle.nc, posterior_nre.nc, posterior_exact.nc, limits/, limits.json, limits.csv  on request

A file is written under a temporary name and renamed: an interrupted run continues with the next stage, shard or epoch.
"""

import csv
import hashlib
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sbi_phys.core.checks import as_real
from sbi_phys.core.errors import DataError, RunFolderError, SbiPhysError, SettingError
from sbi_phys.core.files import open_aside, write_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array
from sbi_phys.core.version import __version__
from sbi_phys.plotting.style import save_figure
from sbi_phys.report.arviz import attributes, chains_to_dict, group, read_netcdf, to_inference_data, write_netcdf
from sbi_phys.report.html import FigureBlock
from sbi_phys.simulation.protocol import Simulator, load_simulator
from sbi_phys.workflow.settings import Config

__all__ = ["Draws", "Run", "RunFolder", "null_safe", "versions"]

_PACKAGES = ("torch", "nflows", "numpy", "scipy", "h5py", "arviz", "emcee", "scikit-learn", "matplotlib")


@dataclass(frozen=True, slots=True)
class Draws:
    """Draws of one posterior, read from a NetCDF file: theta (chains, n, d) in the parameters' units, and the notes of the file."""

    chains: Array
    notes: dict[str, Any]

    @property
    def flat(self) -> Array:
        """The draws of all chains (chains * n, d)."""
        return self.chains.reshape(-1, self.chains.shape[-1])


class RunFolder:
    """A folder with settings, files that are complete or absent, records of finished stages, and figures.

    Args: folder: created by `begin` if missing. progress: display of the stages.
    Raises: RunFolderError for a path that is a file, or a folder with files but without settings.
    """

    SETTINGS_FILE: ClassVar[str]
    RECORDS: ClassVar[str]

    def __init__(self, folder: str | Path, progress: Progress | None = None) -> None:
        self.folder, self.progress = Path(folder), or_none(progress)
        if self.path(self.SETTINGS_FILE).exists():
            self._require_same_settings(self.path(self.SETTINGS_FILE))
        elif self.folder.exists() and not self.folder.is_dir():
            raise RunFolderError(f"{self.folder} is a file; expected a folder, new or of an earlier run")
        elif self.folder.exists() and (foreign := sorted(p.name for p in self.folder.iterdir())):
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise RunFolderError(
                f"{self.folder} holds {shown} and no {self.SETTINGS_FILE}; expected an empty folder or one of an earlier run"
            )

    def _require_same_settings(self, path: Path) -> None:
        """Raise RunFolderError if the settings in the folder differ from those of this run."""
        raise NotImplementedError

    def _settings_text(self) -> str:
        """The text of the settings file."""
        raise NotImplementedError

    def _refuse(self, key: str, got: str, expected: str) -> None:
        raise RunFolderError(
            f"{self.folder} was made with other settings: {key} is {got} there, expected {expected}; "
            f"use another folder, or the settings in its {self.SETTINGS_FILE}"
        )

    def begin(self) -> None:
        """Create the folder and write the settings into it.   Raises: RunFolderError."""
        try:
            self.path(self.RECORDS).mkdir(parents=True, exist_ok=True)
            if not self.path(self.SETTINGS_FILE).exists():
                self.write_text(self.SETTINGS_FILE, self._settings_text())
        except OSError as err:
            raise RunFolderError(f"{self.folder} cannot be made: {err.strerror}; expected a folder to write to") from err

    def path(self, *parts: str) -> Path:
        """A path in the folder."""
        return self.folder.joinpath(*parts)

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a stage, None if it has not finished.   Raises: RunFolderError."""
        path = self.path(self.RECORDS, f"{stage}.json")
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as err:
            raise RunFolderError(f"{path} is not JSON: {err}; delete it to run the stage again") from err
        if not isinstance(content, dict):
            raise RunFolderError(f"{path} holds a {type(content).__name__}; expected a record of a stage: delete it to run the stage again")
        return content

    def write_record(self, stage: str, content: dict[str, Any]) -> None:
        """Write the record of a stage. It is the last file of a stage and marks it as finished."""
        self.write_json(f"{self.RECORDS}/{stage}.json", content)

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file."""
        return write_aside(self.path(name), text, make_folder=True)

    def write_json(self, name: str, content: Any) -> Path:
        """Write JSON; values that are not finite become null."""
        return self.write_text(name, json.dumps(null_safe(content), indent=1, ensure_ascii=False) + "\n")

    def write_csv(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
        """Write a table as CSV."""
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([header, *rows])
        return self.write_text(name, out.getvalue())

    def write_array(self, name: str, array: Array) -> Path:
        """Write a plain .npy file."""
        with open_aside(self.path(name), make_folder=True) as file:
            np.save(file, array, allow_pickle=False)
        return self.path(name)

    def read_array(self, name: str) -> Array:
        """Read what `write_array` wrote."""
        array: Array = np.load(self.path(name), allow_pickle=False)
        return array

    def save_figure(self, figure: Any, name: str) -> None:
        """Write a matplotlib figure to figures/ as PNG and PDF."""
        save_figure(figure, self.path("figures"), name)

    def figure_block(self, name: str, caption: str, alt: str, width: int | None = None) -> FigureBlock:
        """A figure of figures/ as a block of the report page, `width` pixels wide at most."""
        return FigureBlock(self.path("figures", f"{name}.png"), caption, alt, pdf=f"figures/{name}.pdf", max_width=width)

    def draw(self, figure: Any, name: str, caption: str, alt: str, width: int | None = None) -> FigureBlock:
        """Write a figure and return its block."""
        self.save_figure(figure, name)
        return self.figure_block(name, caption, alt, width)


class Run(RunFolder):
    """The folder of an inference run, with its settings and simulator; the argument of every stage.

    Args: folder: created by `begin` if missing. config. progress.
    Raises: RunFolderError (other settings, or not the folder of a run), SettingError, SimulatorMismatchError.

    >>> import sbi_phys as sp
    >>> run = sp.workflow.Run("runs/new", sp.workflow.Config())
    >>> run.record("train") is None, run.path("model.pt").exists()
    (True, False)
    """

    SETTINGS_FILE = "config.toml"
    RECORDS = "stages"

    def __init__(self, folder: str | Path, config: Config, progress: Progress | None = None) -> None:
        self.config = config
        super().__init__(folder, progress)

    @classmethod
    def open(cls, folder: str | Path, progress: Progress | None = None) -> Self:
        """The run in a folder, with the settings of its config.toml.   Raises: RunFolderError if there is none."""
        folder = Path(folder)
        if not (folder / cls.SETTINGS_FILE).is_file():
            raise RunFolderError(f"{folder} has no config.toml; expected the folder of a run, which sbi-phys train --out {folder} creates")
        return cls(folder, Config.read(folder / cls.SETTINGS_FILE), progress)

    def _require_same_settings(self, path: Path) -> None:
        difference = self.config.first_difference(Config.read(path))
        if difference is not None:
            key, expected, got = difference
            self._refuse(key, repr(got), repr(expected))

    def _settings_text(self) -> str:
        return self.config.to_toml()

    @cached_property
    def simulator(self) -> Simulator:
        """The simulator of the settings; the class of an embedding of the user's own is checked with it, before any work."""
        chosen = self.config.simulator
        self.config.embedding.require_class()
        if not chosen.spec:
            raise SettingError("simulator.spec is empty; expected 'package.module:Class'")
        try:
            return load_simulator(chosen.spec, chosen.settings)
        except SbiPhysError:
            raise
        except ValueError as err:  # simulators may raise errors that are not of this package
            raise SettingError(f"[simulator.settings] of {chosen.spec}: {err}") from err

    @property
    def names(self) -> list[str]:
        """Parameter names, in the order of theta's columns."""
        return [p.name for p in self.simulator.parameters]

    def seed(self, *key: int | str) -> int:
        """The integer seed for `key`, from the seed of the run."""
        return seed_for(self.config.run.seed, *key)

    def rng(self, *key: int | str) -> np.random.Generator:
        """The random generator for `key`, from the seed of the run."""
        return rng_for(self.config.run.seed, *key)

    @cached_property
    def observation(self) -> Array:
        """The observation x (k,), checked for length and finiteness.   Raises: DataError, SettingError."""
        x = as_real("the observation", self._observation())
        size = sum(o.size for o in self.simulator.observables)
        if x.shape != (size,):
            blocks = ", ".join(f"{o.name}: {o.size}" for o in self.simulator.observables)
            raise DataError(f"the observation has shape {x.shape}; expected ({size},) = {blocks}")
        if not np.isfinite(x).all():
            raise DataError(
                f"the observation is {x[~np.isfinite(x)][0]} in column {int(np.argmin(np.isfinite(x)))}; expected finite values"
            )
        return x

    @property
    def truth(self) -> Array | None:
        """The parameters (d,) behind a simulated observation, None for real data."""
        return self._simulated_truth()[0] if self.config.infer.observation == "simulated" else None

    def _simulated_truth(self) -> Array:
        return self.simulator.prior.sample(1, self.rng("observation", "theta"))

    def _observation(self) -> Any:
        source = self.config.infer.observation
        if source == "observed":
            observed = getattr(self.simulator, "observed", None)
            if observed is None:
                raise SettingError(
                    f"infer.observation is 'observed', but {self.config.simulator.spec} has no observed(); expected 'simulated' or a file"
                )
            return observed()
        if source == "simulated":
            return self.simulator.simulate(self._simulated_truth(), self.rng("observation", "x"))[0]
        try:
            return np.load(source, allow_pickle=False) if source.endswith(".npy") else np.loadtxt(source, delimiter=",", ndmin=1).ravel()
        except (OSError, ValueError, EOFError) as err:
            raise DataError(f"infer.observation {source!r} cannot be read: {err}; expected a .npy, .csv or .txt file with one row") from err

    def numbers(self, stage: str) -> dict[str, Any]:
        """The numbers of a finished stage, {} if it has not run."""
        return dict((self.record(stage) or {}).get("numbers", {}))

    def forget(self, stage: str) -> None:
        """Delete the record of a stage, so that it runs again."""
        self.path(self.RECORDS, f"{stage}.json").unlink(missing_ok=True)

    @contextmanager
    def recording(self, stage: str) -> Iterator[dict[str, Any]]:
        """Time a stage and write its record with the numbers of the yielded dict; an error leaves no record."""
        numbers: dict[str, Any] = {}
        begin = time.perf_counter()
        yield numbers
        settings = json.dumps(null_safe(self.config.to_dict()), sort_keys=True)
        self.write_record(
            stage,
            {
                "stage": stage,
                "seconds": round(time.perf_counter() - begin, 3),
                "settings_sha256": hashlib.sha256(settings.encode()).hexdigest(),
                "versions": versions(),
                "numbers": numbers,
            },
        )

    def note(self, stage: str, facts: dict[str, Any]) -> None:
        """Add facts to the record of a finished stage.   Raises: RunFolderError for a stage without one."""
        record = self.record(stage)
        if record is None:
            raise RunFolderError(f"{self.folder} has no record of the stage {stage!r}; expected a finished stage")
        self.write_record(stage, record | facts)

    def write_draws(self, name: str, theta: Array, notes: dict[str, Any], **groups: dict[str, Any]) -> None:
        """Write draws (n, d) or chains (c, n, d) as an ArviZ file, together with the observation."""
        notes = {"seed": self.config.run.seed, "versions": versions(), **notes}
        data = to_inference_data(
            chains_to_dict(theta, self.names),
            observed_data={"x": self.observation},
            attrs=null_safe(notes),
            parameters=self.simulator.parameters,
            **groups,
        )
        write_netcdf(self.path(name), data)

    def read_draws(self, name: str) -> Draws:
        """Read what `write_draws` wrote.   Raises: DataError."""
        data = read_netcdf(self.path(name))
        posterior = group(data, "posterior")
        missing = [n for n in self.names if n not in posterior]
        if missing:
            raise DataError(f"{self.path(name)} has no parameter {missing[0]!r}, it has {list(posterior)}; expected {self.names}")
        return Draws(np.stack([posterior[n] for n in self.names], axis=-1), attributes(data))


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of the packages that its numbers depend on."""
    found = {"python": platform.python_version(), "sbi_phys": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def null_safe(value: Any) -> Any:
    """Nested dicts, lists, arrays and numbers as JSON values; NaN and infinities become None."""
    if isinstance(value, dict):
        return {str(k): null_safe(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return null_safe(value.tolist())
    if isinstance(value, list | tuple):
        return [null_safe(v) for v in value]
    if isinstance(value, np.generic):
        return null_safe(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value
