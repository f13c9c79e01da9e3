"""The main job as a row of stages over a run folder; each leaves its files and a record, and is skipped when both are there.

simulate -> train -> infer -> rounds -> refine -> reference -> compare -> calibrate -> check -> report

Beside them, when they are asked for: simulate -> train_nle -> infer_nle, simulate -> train_nre -> infer_nre, and methods, which compares.
"""

import os
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
from sbi_phys.simulation.processes import start_worker
from sbi_phys.simulation.protocol import check_simulator
from sbi_phys.training.ranks import process_group
from sbi_phys.workflow.infer import infer, refine, rounds
from sbi_phys.workflow.learn import simulate, train, train_along
from sbi_phys.workflow.likelihoods import infer_nle, infer_nre, train_nle, train_nre
from sbi_phys.workflow.methods import methods
from sbi_phys.workflow.page import report
from sbi_phys.workflow.proof import calibrate, check
from sbi_phys.workflow.reference import compare, reference
from sbi_phys.workflow.run import Run
from sbi_phys.workflow.settings import Config

__all__ = ["ALL", "FURTHER", "STAGES", "Run", "Stage", "run_stages", "train_together"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage: what it does, the stages whose files it reads, the files it leaves, and whether it may run beside others.

    sees: stages whose files it reads where they are there: it does not wait for them, and is out of date when they run again.
    """

    work: Callable[[Run, dict[str, Any]], None]
    needs: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    beside: bool = False
    sees: tuple[str, ...] = ()


STAGES: dict[str, Stage] = {
    "simulate": Stage(simulate, leaves=("simulations",)),
    "train": Stage(train, needs=("simulate",), leaves=("model.pt",)),
    "infer": Stage(infer, needs=("train",), leaves=("posterior_amortised.nc",)),
    "rounds": Stage(rounds, needs=("infer",)),
    "refine": Stage(refine, needs=("rounds",), leaves=("posterior.nc",)),
    "reference": Stage(reference, needs=("infer",), beside=True),
    "compare": Stage(compare, needs=("refine", "reference")),
    "calibrate": Stage(calibrate, needs=("train",)),
    "check": Stage(check, needs=("refine",)),
    "report": Stage(report, needs=("compare", "calibrate", "check"), leaves=("summary.json", "report.html"), sees=("methods",)),
}
# what runs only when it is asked for, or was run before
FURTHER: dict[str, Stage] = {
    "train_nle": Stage(train_nle, needs=("simulate",), leaves=("model_nle.pt",)),
    "infer_nle": Stage(infer_nle, needs=("train_nle",), leaves=("posterior_nle.nc",)),
    "train_nre": Stage(train_nre, needs=("simulate",), leaves=("model_nre.pt",)),
    "infer_nre": Stage(infer_nre, needs=("train_nre",), leaves=("posterior_nre.nc",)),
    "methods": Stage(methods, sees=("infer", "infer_nle", "infer_nre", "reference")),
}
ALL = {**{name: stage for name, stage in STAGES.items() if name != "report"}, **FURTHER, "report": STAGES["report"]}


def run_stages(config: Config, folder: str | Path, until: Iterable[str] = ("report",), *, progress: Progress | None = None) -> Run:
    """Run the stages that `until` names and all that they need, skipping those already finished in the folder.

    Args: config. folder: made if missing; one made with other settings is refused. until: names of stages.
    Returns: the run, whose files are complete up to there.
    Raises: SettingError, RunFolderError, SimulatorMismatchError, StoreError, DataError, TrainingError, ConvergenceError.
    """
    run = Run(Path(folder), config, or_none(progress))
    wanted = _with_needs([require_choice("stage", name, ALL) for name in until])
    if "report" in wanted and run.record("methods") is None and any(run.record(name) for name in ("infer_nle", "infer_nre")):
        wanted = _with_needs([*wanted, "methods"])  # out of date, and the page has a place for it
    _foresee(run, wanted)
    run.begin()
    # one BLAS thread: the matrices are small, and the numbers must not depend on the number of cores
    with threadpool_limits(limits=1, user_api="blas"), Beside(run.folder, config) as beside:
        for i, name in enumerate(wanted):
            for other in wanted[i + 1 :]:
                if ALL[other].beside and not _finished(run, other) and all(_finished(run, need) for need in ALL[other].needs):
                    _forget_dependents(run, other)
                    beside.begin(other)
            if _finished(run, name):
                continue
            with run.progress.task(f"[{i + 1}/{len(wanted)}] {name}", None) as task:
                if name in beside:
                    task.advance(0, "in a process of its own")
                    begin = time.perf_counter()
                    beside.wait(name)
                    run.note(name, {"waited": round(time.perf_counter() - begin, 3)})
                    continue
                _forget_dependents(run, name)
                _work(run, name)
    return run


def _work(run: Run, name: str) -> None:
    with run.recording(name) as numbers:
        ALL[name].work(run, numbers)


def work_alone(folder: Path, config: Config, name: str) -> None:
    """One stage of a run, in a process that has nothing else to do."""
    _work(Run(folder, config), name)


def _forget_dependents(run: Run, name: str) -> None:
    """What was made from this stage's former files is out of date, also if this run is cut short."""
    for later in _dependents(name):
        run.forget(later)


class Beside:
    """Stages at work in processes of their own, while the caller goes on: at most one for each further core.

    Leaving the context by an error or Ctrl-C ends them; a stage that was cut short left no record and is done again.
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
        """Start a stage, if there is a core for it and it is not at work already."""
        cores = self._config.run.workers or len(os.sched_getaffinity(0))
        if name in self._pools or len(self._pools) + 1 >= cores:
            return
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_worker)
        self._pools[name] = pool, pool.submit(work_alone, self._folder, self._config, name)

    def wait(self, name: str) -> None:
        """Return when a stage is finished.   Raises: what it raised; RunFolderError if its process died."""
        try:
            self._pools[name][1].result()
        except BrokenExecutor as err:
            raise RunFolderError(f"the process of stage {name} died ({err}); the same command does it again") from err


def train_together(config: Config, folder: str | Path, until: str = "train", *, progress: Progress | None = None) -> None:
    """Stage `train` in every process that torchrun started; the first simulates before and writes the files.

    Raises: SettingError for another stage (the others gain nothing from more processes), and as `run_stages`.
    """
    if until != "train":
        raise SettingError(f"the stage is {until!r} under torchrun; expected 'train': run the others in a single process")
    with process_group(config.run.device) as ranks:
        if ranks.first:
            run_stages(config, folder, ["simulate"], progress=progress)
        ranks.wait()
        run = Run(Path(folder), config)
        done = _finished(run, "train")
        ranks.wait()  # all have looked before the first writes
        if ranks.first:
            run_stages(config, folder, ["train"], progress=progress)
        elif not done:
            with threadpool_limits(limits=1, user_api="blas"):
                train_along(run)


def _foresee(run: Run, wanted: list[str]) -> None:
    """Meet now what would otherwise go wrong minutes later, before anything is written."""
    check_simulator(run.simulator)
    if {"train", "train_nle", "train_nre"} & set(wanted):
        resolve_device(run.config.run.device)
    if {"infer", "infer_nle", "infer_nre"} & set(wanted):
        _ = run.observation


def _finished(run: Run, name: str) -> bool:
    return run.record(name) is not None and all(run.path(file).exists() for file in ALL[name].leaves)


def _with_needs(names: Iterable[str]) -> list[str]:
    needed: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        needed.add(name)
        todo += ALL[name].needs
    return [name for name in ALL if name in needed]


def _dependents(name: str) -> list[str]:
    """Stages whose files follow from this one's, by what they need or see."""
    found: set[str] = set()
    todo = [name]
    while todo:
        now = todo.pop()
        new = {other for other, stage in ALL.items() if now in (*stage.needs, *stage.sees)} - found
        found |= new
        todo += new
    return [other for other in ALL if other in found]
