"""The folders of projects and runs: settings, records of finished stages, and files that are complete or absent.

A project (`Run`) has one set of simulations, any number of networks and any number of observations. The network and the observation of the
settings' own tables lie in the project's folder, named ones below it:

config.toml       settings                                  networks/NAME/                    the same for a named network
simulations/      the store                                 observations/NAME/                the same for a named observation
held_out/         the store for calibration                 networks/NAME/observations/NAME/
stages/           one record for each stage: inputs, hashes of its files, seconds, versions, numbers

of a network:     model.pt  training/ (checkpoints)  model_nle.pt  model_nre.pt
of a result:      posterior.nc (final draws)  posterior_amortised.nc (before rounds and refinement)  rounds/  reference.nc (exact MCMC)
                  calibration.json  figures/  summary.json  report.html
                  posterior_nle.nc  posterior_nre.nc  posterior_exact.nc  limits/  limits.json  limits.csv, on request

Each file is written under a temporary name and renamed, so that an interrupted run continues with the next stage, shard or epoch. A stage
whose inputs have changed runs again (`staleness`). `unfold_run` does the same for unfolding.
"""

import csv
import fcntl
import io
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from sbi_phys.core.checksums import append_trailer, has_trailer, require_seal, seal
from sbi_phys.core.errors import DataError, RunFolderError, SbiPhysError, SettingError
from sbi_phys.core.files import is_unfinished, open_aside, remove_unfinished, write_aside
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array
from sbi_phys.core.version import __version__
from sbi_phys.nets.flow_own import require_flow
from sbi_phys.plotting.style import save_figure
from sbi_phys.priors.blocks import failed_rows
from sbi_phys.report.arviz import attributes, chains_to_dict, group, read_netcdf, to_inference_data, write_netcdf
from sbi_phys.report.html import FigureBlock
from sbi_phys.simulation.protocol import Simulator, check_output, load_simulator
from sbi_phys.workflow.observations import check_row, parse_source, read_file
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.staleness import digest_of

__all__ = ["Draws", "Run", "RunFolder", "null_safe", "versions"]

_LOCK = ".lock"
_TRIES = 100  # draws of a simulated observation
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
        elif self.folder.exists() and (foreign := sorted(p.name for p in self.folder.iterdir() if not self._begun(p))):
            shown = ", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else "")
            raise RunFolderError(
                f"{self.folder} holds {shown} and no {self.SETTINGS_FILE}; expected an empty folder or one of an earlier run"
            )

    def _begun(self, path: Path) -> bool:
        """Whether a run that was killed while it made its folder may have left this file."""
        return (
            path.name == _LOCK
            or is_unfinished(path)
            or (path.name == self.RECORDS and path.is_dir() and all(map(is_unfinished, path.iterdir())))
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
        """Create the folder, write the settings into it, and remove what a killed run left half written.   Raises: RunFolderError."""
        try:
            remove_unfinished(self.folder)
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
        except (OSError, ValueError, RecursionError) as err:
            raise RunFolderError(f"{path} is not JSON: {err}; delete it to run the stage again") from err
        if not isinstance(content, dict):
            raise RunFolderError(f"{path} holds a {type(content).__name__}; expected a record of a stage: delete it to run the stage again")
        require_seal(content, str(path), error=RunFolderError, advice="; delete it to run the stage again")
        del content["checksum"]
        return content

    def write_record(self, stage: str, content: dict[str, Any]) -> None:
        """Write the record of a stage. It is the last file of a stage and marks it as finished."""
        self.write_json(f"{self.RECORDS}/{stage}.json", seal(null_safe(content)))

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
        """Write a .npy file, with a checksum behind the array."""
        with open_aside(self.path(name), make_folder=True) as file:
            np.save(file, array, allow_pickle=False)
            append_trailer(file)
        return self.path(name)

    def read_array(self, name: str) -> Array:
        """Read what `write_array` wrote.   Raises: RunFolderError for a missing or damaged file."""
        try:
            if not has_trailer(self.path(name)):
                raise ValueError("the checksum at its end is missing")
            array: Array = np.load(self.path(name), allow_pickle=False)
        except (OSError, ValueError, EOFError) as err:
            raise RunFolderError(f"{self.path(name)} cannot be read: {err}; delete the record of its stage to run it again") from err
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


_PROJECT = {"config.toml", "simulations", "held_out"}  # files of the project
_NETWORK = {"model.pt", "model_nle.pt", "model_nre.pt", "training"}  # files of a network; all others are of a result
_STAGES_ABOVE = {"simulate": _PROJECT, "train": _NETWORK, "train_nle": _NETWORK, "train_nre": _NETWORK}


class Run(RunFolder):
    """A project's folder seen from one network and one observation: their settings, simulator and files, as every stage gets them.

    Args: folder: made by `begin` if missing. config: of the whole project. network, observation_name: names from config, '' for those of
    its tables.
    Raises: RunFolderError (not the folder of a run), SettingError, SimulatorMismatchError.

    >>> import sbi_phys as sp
    >>> config = sp.workflow.Config(networks={"wide": {"flow": {"hidden": 128}}})
    >>> run = sp.workflow.Run("runs/new", config, network="wide")
    >>> run.config.flow.hidden, run.record("train") is None
    (128, True)
    >>> run.path("model.pt").as_posix(), run.path("simulations").as_posix()
    ('runs/new/networks/wide/model.pt', 'runs/new/simulations')
    """

    SETTINGS_FILE = "config.toml"
    RECORDS = "stages"

    def __init__(
        self, folder: str | Path, config: Config, progress: Progress | None = None, *, network: str = "", observation_name: str = ""
    ) -> None:
        self.project, self.config = config, config.view(network, observation_name)
        self.network, self.observation_name = network, observation_name
        self.accept_code_change = False
        super().__init__(folder, progress)

    @classmethod
    def open(cls, folder: str | Path, progress: Progress | None = None, *, network: str = "", observation_name: str = "") -> Self:
        """The run in a folder, with the settings of its config.toml.   Raises: RunFolderError if there is none."""
        folder = Path(folder)
        if not (folder / cls.SETTINGS_FILE).is_file():
            raise RunFolderError(f"{folder} has no config.toml; expected the folder of a run, which sbi-phys train --out {folder} creates")
        return cls(folder, Config.read(folder / cls.SETTINGS_FILE), progress, network=network, observation_name=observation_name)

    def path(self, *parts: str) -> Path:
        """A path in the folder of the project, of the network or of the result, whichever the file belongs to."""
        names = Path(*parts).parts
        owner = _PROJECT if names and names[0] in _PROJECT else _NETWORK if names and names[0] in _NETWORK else None
        if len(names) == 2 and names[0] == self.RECORDS:
            owner = _STAGES_ABOVE.get(names[1].split(".")[0])
        base = self.folder if owner is _PROJECT else self.network_folder if owner is _NETWORK else self.result_folder
        return base.joinpath(*parts)

    @property
    def network_folder(self) -> Path:
        """Folder of the network: the project's own, or networks/NAME."""
        return self.folder / "networks" / self.network if self.network else self.folder

    @property
    def result_folder(self) -> Path:
        """Folder of the results for the observation: the network's own, or observations/NAME in it."""
        return self.network_folder / "observations" / self.observation_name if self.observation_name else self.network_folder

    @property
    def title(self) -> str:
        """What the run is called on its report: the title of the settings, with the names of observation and network."""
        names = [name for name in (self.observation_name, self.network and f"network {self.network}") if name]
        return ": ".join([self.config.run.title, ", ".join(names)]) if names else self.config.run.title

    def begin(self) -> None:
        """Make the folders and write the settings, if they have changed.   Raises: RunFolderError."""
        path = self.path(self.SETTINGS_FILE)
        changed = path.exists() and Config.read(path).first_difference(self.project) is not None
        super().begin()
        if changed:
            self.write_text(self.SETTINGS_FILE, self._settings_text())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the project's lock: two processes do not write into one project.   Raises: RunFolderError naming the holder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as err:
            raise RunFolderError(f"{self.folder} cannot be written: {err.strerror}; expected a folder to write to") from err
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as err:
                holder = os.pread(handle, 200, 0).decode("utf-8", "replace") or "another process"
                raise RunFolderError(f"{self.folder} is in use by {holder}; expected one command at a time: wait until it ends") from err
            except OSError:  # a file system without locks
                pass
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
            os.ftruncate(handle, 0)
        finally:
            os.close(handle)

    def _require_same_settings(self, path: Path) -> None:
        """Settings may change: the stages that depend on them run again."""

    def _settings_text(self) -> str:
        return self.project.to_toml()

    @cached_property
    def simulator(self) -> Simulator:
        """The simulator of the settings; the class of an embedding of the user's own is checked with it, before any work."""
        chosen = self.config.simulator
        self.config.embedding.require_class()
        require_flow(self.config.flow)
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
        """The observation x (k,), checked for shape, finiteness and whole counts.   Raises: DataError, SettingError."""
        source = parse_source(self.config.infer.observation)
        if source.kind == "file":
            x = read_file(source, self.simulator.observables)
        elif source.kind == "simulated":
            x = self._simulated[1]
        else:
            observed = getattr(self.simulator, "observed", None)
            if observed is None:
                raise SettingError(
                    f"infer.observation is 'observed', but {self.config.simulator.spec} has no observed(); "
                    "expected 'simulated' or a file: sbi-phys infer FILE"
                )
            x = observed()
        return check_row(x, self.simulator.observables)

    @property
    def truth(self) -> Array | None:
        """The parameters (d,) behind a simulated observation, None for real data."""
        return self._simulated[0] if parse_source(self.config.infer.observation).kind == "simulated" else None

    @cached_property
    def _simulated(self) -> tuple[Array, Array]:
        """Theta and x of a simulated observation: the first draw that does not fail."""
        seed = parse_source(self.config.infer.observation).seed
        keys = ("observation",) if seed is None else ("observation", seed)
        of_theta, of_x = self.rng(*keys, "theta"), self.rng(*keys, "x")
        for _ in range(_TRIES):
            theta = self.simulator.prior.sample(1, of_theta)
            try:
                x = check_output(self.simulator, self.simulator.simulate(theta, of_x), 1)[0]
            except Exception as err:  # simulators may raise anything; a failed row is not an observation
                failure: object = err
                continue
            if not failed_rows(x[None], self.simulator.observables).any():
                return theta[0], x
            failure = "x is not finite"
        raise DataError(f"{_TRIES} simulated observations failed, the last one with {failure}; expected one that does not")

    def numbers(self, stage: str) -> dict[str, Any]:
        """The numbers of a finished stage, {} if it has not run."""
        return dict((self.record(stage) or {}).get("numbers", {}))

    def forget(self, stage: str) -> None:
        """Delete the record of a stage, so that it runs again."""
        self.path(self.RECORDS, f"{stage}.json").unlink(missing_ok=True)

    @contextmanager
    def recording(self, stage: str, inputs: Mapping[str, Any] | None = None, files: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Time a stage and write its record with the numbers of the yielded dict; an error leaves no record.

        Args: inputs: what the stage is made from. files: what it writes, whose hashes are recorded.
        """
        numbers: dict[str, Any] = {}
        begin = time.perf_counter()
        yield numbers
        self.write_record(
            stage,
            {
                "stage": stage,
                "seconds": round(time.perf_counter() - begin, 3),
                "inputs": inputs or {},
                "files": {name: digest_of(self.path(name)) for name in files},
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
    """Versions of Python, of this package and of the packages that its numbers depend on, and what computes the layers of networks."""
    found = {"python": platform.python_version(), "sbi_phys": __version__}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    spline: Any = sys.modules.get("sbi_phys.nets.spline")  # a stage without networks does not load torch
    if spline is not None:
        found["layers"] = spline.arithmetic()
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
