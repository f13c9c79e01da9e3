"""The stages of an inference run and the runner that executes them.

simulate -> train -> infer -> rounds -> refine -> reference -> compare -> calibrate -> check -> report

On request: simulate -> train_nle -> infer_nle, simulate -> train_nre -> infer_nre, and `methods`, which compares the methods. Each stage
writes its files and then a record; it is skipped if both exist.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Self

from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from sbi_phys.core.checks import require_choice
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import RunFolderError, SettingError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.simulation.processes import available_cores, start_worker
from sbi_phys.simulation.protocol import check_simulator
from sbi_phys.training.ranks import process_group
from sbi_phys.workflow import inference, methods
from sbi_phys.workflow.inference_page import report
from sbi_phys.workflow.run import Run
from sbi_phys.workflow.settings import Config

__all__ = ["DEFAULT", "STAGES", "ConcurrentStages", "Stage", "run_stages", "train_distributed"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run.

    work: function of the run and a dict that it fills with its numbers. needs: stages that must be finished first. optional: stages whose
    files it reads if they exist; it is out of date when they run again. outputs: its files. concurrent: whether it may run in a separate
    process while the caller runs other stages.
    """

    work: Callable[[Run, dict[str, Any]], None]
    needs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    concurrent: bool = False


# in the order of execution
STAGES: dict[str, Stage] = {
    "simulate": Stage(inference.simulate, outputs=("simulations",)),
    "train": Stage(inference.train, needs=("simulate",), outputs=("model.pt",)),
    "infer": Stage(inference.infer, needs=("train",), outputs=("posterior_amortised.nc",)),
    "rounds": Stage(inference.rounds, needs=("infer",)),
    "refine": Stage(inference.refine, needs=("rounds",), outputs=("posterior.nc",)),
    "reference": Stage(inference.reference, needs=("infer",), concurrent=True),
    "compare": Stage(inference.compare, needs=("refine", "reference")),
    "calibrate": Stage(inference.calibrate, needs=("train",)),
    "check": Stage(inference.check, needs=("refine",)),
    "train_nle": Stage(methods.train_nle, needs=("simulate",), outputs=("model_nle.pt",)),
    "infer_nle": Stage(methods.infer_nle, needs=("train_nle",), outputs=("posterior_nle.nc",)),
    "train_nre": Stage(methods.train_nre, needs=("simulate",), outputs=("model_nre.pt",)),
    "infer_nre": Stage(methods.infer_nre, needs=("train_nre",), outputs=("posterior_nre.nc",)),
    "methods": Stage(methods.methods, optional=("infer", "infer_nle", "infer_nre", "reference")),
    "report": Stage(report, needs=("compare", "calibrate", "check"), outputs=("summary.json", "report.html"), optional=("methods",)),
}
# the stages that `report` needs; the others run on request
DEFAULT = ("simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check", "report")


def run_stages(config: Config, folder: str | Path, until: Iterable[str] = ("report",), *, progress: Progress | None = None) -> Run:
    """Run the stages named in `until` and all stages that they need, skipping those that the folder has finished.

    Args: config. folder: created if missing; one with other settings is refused. until: names of stages.
    Returns: the run, whose files are complete up to these stages.
    Raises: SettingError, RunFolderError, SimulatorMismatchError, StoreError, DataError, TrainingError, ConvergenceError.

    >>> import sbi_phys as sp
    >>> sp.workflow.run_stages(sp.workflow.Config(), "runs/new")
    Traceback (most recent call last):
    ...
    sbi_phys.core.errors.SettingError: simulator.spec is empty; expected 'package.module:Class'
    """
    run = Run(Path(folder), config, or_none(progress))
    wanted = _with_needs([require_choice("stage", name, STAGES) for name in until])
    if "report" in wanted and run.record("methods") is None and any(run.record(name) for name in ("infer_nle", "infer_nre")):
        wanted = _with_needs([*wanted, "methods"])  # the comparison is out of date, and the page shows it
    _check_inputs(run, wanted)
    run.begin()
    # one BLAS thread: the matrices are small, and the numbers must not depend on the number of cores
    with threadpool_limits(limits=1, user_api="blas"), ConcurrentStages(run.folder, config) as concurrent:
        for i, name in enumerate(wanted):
            for other in wanted[i + 1 :]:
                if STAGES[other].concurrent and not _finished(run, other) and all(_finished(run, need) for need in STAGES[other].needs):
                    _forget_dependents(run, other)
                    concurrent.begin(other)
            if _finished(run, name):
                continue
            with run.progress.task(f"[{i + 1}/{len(wanted)}] {name}", None) as task:
                if name in concurrent:
                    task.advance(0, "in a separate process")
                    begin = time.perf_counter()
                    concurrent.wait(name)
                    run.note(name, {"waited": round(time.perf_counter() - begin, 3)})
                    task.advance(0, inference.news(name, run.numbers(name)))
                    continue
                _forget_dependents(run, name)
                _execute(run, name)
                task.advance(0, inference.news(name, run.numbers(name)))
    return run


def _execute(run: Run, name: str) -> None:
    with run.recording(name) as numbers:
        STAGES[name].work(run, numbers)


def run_in_process(folder: Path, config: Config, name: str) -> None:
    """Run one stage; called in a separate process."""
    _execute(Run(folder, config), name)


def _forget_dependents(run: Run, name: str) -> None:
    """Delete the records of stages that depend on this one: their files are out of date, also if this run is interrupted."""
    for later in _dependents(name):
        run.forget(later)


class ConcurrentStages:
    """Stages that run in separate processes while the caller continues: at most one per further core.

    An error or Ctrl-C within the context terminates them; an interrupted stage has no record and runs again.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self._folder, self._config = folder, config
        self._pools: dict[str, tuple[ProcessPoolExecutor, Future[None]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for pool, _future in self._pools.values():
            for process in list((getattr(pool, "_processes", None) or {}).values()) if kind is not None else ():
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)

    def __contains__(self, name: str) -> bool:
        return name in self._pools

    def begin(self, name: str) -> None:
        """Start a stage if a core is free and the stage is not running."""
        cores = self._config.run.workers or available_cores()
        if name in self._pools or len(self._pools) + 1 >= cores:
            return
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_worker)
        self._pools[name] = pool, pool.submit(run_in_process, self._folder, self._config, name)

    def wait(self, name: str) -> None:
        """Return when a stage is finished.   Raises: the error of the stage; RunFolderError if its process died."""
        try:
            self._pools[name][1].result()
        except BrokenExecutor as err:
            raise RunFolderError(f"the process of stage {name} died ({err}); run the same command again to repeat it") from err


def train_distributed(config: Config, folder: str | Path, until: str = "train", *, progress: Progress | None = None) -> None:
    """Run stage `train` in every process that torchrun started; the first process also simulates and writes the files.

    Raises: SettingError for another stage, which several processes do not speed up; and as `run_stages`.
    """
    if until != "train":
        raise SettingError(f"the stage is {until!r} under torchrun; expected 'train'; the other stages run in a single process")
    with process_group(config.run.device) as ranks:
        if ranks.first:
            run_stages(config, folder, ["simulate"], progress=progress)
        ranks.wait()
        run = Run(Path(folder), config)
        done = _finished(run, "train")
        ranks.wait()  # every process has checked before the first one writes
        if ranks.first:
            run_stages(config, folder, ["train"], progress=progress)
        elif not done:
            with threadpool_limits(limits=1, user_api="blas"):
                inference.fit_network(run)


def _check_inputs(run: Run, wanted: list[str]) -> None:
    """Raise errors of the simulator, device and observation before any file is written."""
    check_simulator(run.simulator)
    if {"train", "train_nle", "train_nre"} & set(wanted):
        resolve_device(run.config.run.device)
    if {"infer", "infer_nle", "infer_nre"} & set(wanted):
        _ = run.observation


def _finished(run: Run, name: str) -> bool:
    return run.record(name) is not None and all(run.path(file).exists() for file in STAGES[name].outputs)


def _with_needs(names: Iterable[str]) -> list[str]:
    needed: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        needed.add(name)
        todo += STAGES[name].needs
    return [name for name in STAGES if name in needed]


def _dependents(name: str) -> list[str]:
    """Stages that depend on this one, directly or indirectly."""
    found: set[str] = set()
    todo = [name]
    while todo:
        now = todo.pop()
        new = {other for other, stage in STAGES.items() if now in (*stage.needs, *stage.optional)} - found
        found |= new
        todo += new
    return [other for other in STAGES if other in found]
