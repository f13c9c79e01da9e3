"""The stages of an inference run and the runner that executes them.

simulate -> train -> infer -> rounds -> refine -> reference -> compare -> calibrate -> check -> report

On request: simulate -> train_nle -> infer_nle, simulate -> train_nre -> infer_nre, and `methods`, which compares the methods. Each stage
writes its files and then a record; it is skipped if both exist.
"""

import hashlib
import itertools
import json
import shutil
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
from sbi_phys.store.identity import code_fingerprint
from sbi_phys.training.ranks import process_group
from sbi_phys.workflow import inference, methods
from sbi_phys.workflow.inference import observation_of, rows_used
from sbi_phys.workflow.inference_page import report
from sbi_phys.workflow.run import Run, null_safe
from sbi_phys.workflow.settings import Config
from sbi_phys.workflow.staleness import changes, digest_of, digest_of_array, store_digest

__all__ = ["DEFAULT", "STAGES", "ConcurrentStages", "Stage", "inputs_of", "outdated", "run_stages", "train_distributed"]


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of a run.

    work: the function that does it, with the run and a dict for its numbers. needs: stages that must be finished before. reads: stages
    whose files or numbers it uses, if they exist. settings: tables or keys that its result depends on, besides run.seed. observation, code:
    whether it depends on the observation and on the simulator's code. outputs: files that must exist. files: others that it may write.
    working: files that an interrupted run continues from. concurrent: whether it is to run in a process of its own beside other stages.
    """

    work: Callable[[Run, dict[str, Any]], None]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    observation: bool = False
    code: bool = False
    outputs: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    working: tuple[str, ...] = ()
    concurrent: Callable[[Run], bool] | None = None


# in the order of execution
_NETWORK = ("estimator", "embedding", "train")
_RESULTS = ("posterior_amortised.nc", "posterior_rounds.nc", "posterior.nc", "reference.nc")
STAGES: dict[str, Stage] = {
    "simulate": Stage(
        inference.simulate,
        settings=("simulator", "simulate"),
        code=True,
        outputs=("simulations",),
    ),
    "train": Stage(
        inference.train,
        needs=("simulate",),
        reads=("simulate",),
        settings=(*_NETWORK, "flow"),
        outputs=("model.pt",),
        working=("training/amortised*",),
    ),
    "infer": Stage(
        inference.infer,
        needs=("train",),
        reads=("train",),
        settings=("infer.n_draws",),
        observation=True,
        outputs=("posterior_amortised.nc",),
    ),
    "rounds": Stage(
        inference.rounds,
        needs=("infer",),
        reads=("train",),
        settings=("rounds", "train", "infer.n_draws"),
        observation=True,
        code=True,
        files=("model_rounds.pt", "posterior_rounds.nc"),
        working=("rounds",),
    ),
    "refine": Stage(
        inference.refine,
        needs=("rounds",),
        reads=("train", "rounds"),
        settings=("infer",),
        observation=True,
        code=True,
        outputs=("posterior.nc",),
        files=("weights.npy",),
    ),
    "reference": Stage(
        inference.reference,
        needs=("infer",),
        reads=("infer",),
        settings=("reference",),
        observation=True,
        code=True,
        files=("reference.nc",),
        concurrent=inference.has_reference,
    ),
    "compare": Stage(inference.compare, needs=("refine", "reference"), reads=("infer", "rounds", "refine", "reference")),
    "calibrate": Stage(
        inference.calibrate,
        needs=("train",),
        reads=("train",),
        settings=("calibrate", "simulate.dtype", "simulate.dtypes"),
        observation=True,
        code=True,
        files=("calibration.json",),
    ),
    "check": Stage(
        inference.check,
        needs=("refine",),
        reads=("simulate", "train", "refine"),
        settings=("check",),
        observation=True,
        code=True,
    ),
    "train_nle": Stage(
        methods.train_nle,
        needs=("simulate",),
        reads=("simulate",),
        settings=(*_NETWORK, "methods.nle_layers"),
        outputs=("model_nle.pt",),
        working=("training/nle*",),
    ),
    "infer_nle": Stage(
        methods.infer_nle,
        needs=("train_nle",),
        reads=("train_nle",),
        settings=("infer.n_draws", "methods.sampler"),
        observation=True,
        outputs=("posterior_nle.nc",),
    ),
    "train_nre": Stage(
        methods.train_nre,
        needs=("simulate",),
        reads=("simulate",),
        settings=(*_NETWORK, "methods.nre_loss"),
        outputs=("model_nre.pt",),
        working=("training/nre*",),
    ),
    "infer_nre": Stage(
        methods.infer_nre,
        needs=("train_nre",),
        reads=("train_nre",),
        settings=("infer.n_draws", "methods.sampler"),
        observation=True,
        outputs=("posterior_nre.nc",),
    ),
    "methods": Stage(
        methods.methods,
        reads=("infer", "train_nle", "infer_nle", "train_nre", "infer_nre", "reference"),
        settings=("methods.n_pairs", "calibrate.n", "infer.n_draws"),
        observation=True,
        code=True,
        files=("posterior_exact.nc",),
    ),
    "report": Stage(
        report,
        needs=("compare", "calibrate", "check"),
        reads=("simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check", "methods"),
        settings=tuple(table for table in Config.__dataclass_fields__ if table not in ("networks", "observations")),
        observation=True,
        code=True,
        outputs=("summary.json", "report.html"),
        files=("posterior.csv",),
    ),
}
# the stages that `report` needs; the others run on request
_ABOVE = ("simulate", "train", "train_nle", "train_nre")  # stages of the project or of a network
DEFAULT = ("simulate", "train", "infer", "rounds", "refine", "reference", "compare", "calibrate", "check", "report")


def run_stages(
    config: Config,
    folder: str | Path,
    until: Iterable[str] = ("report",),
    *,
    network: str = "",
    observation_name: str = "",
    accept_code_change: bool = False,
    new_simulations: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
) -> Run:
    """Run the stages named in `until` and all stages that they need, skipping those that are finished and whose inputs are the same.

    Args: config: of the whole project. folder: created if missing. until: names of stages. network, observation_name: names from config, ''
    for those of its tables. accept_code_change: keep simulations although the simulator's code has changed. new_simulations: keep them as
    simulations-old-1 and simulate again where code or settings have changed. say: gets a line for each stage that runs again, with why.
    Returns: the run, whose files are complete up to these stages.
    Raises: SettingError, RunFolderError (in use; simulations of other code or settings), SimulatorMismatchError, StoreError, DataError,
    TrainingError, ConvergenceError.

    >>> import sbi_phys as sp
    >>> sp.workflow.run_stages(sp.workflow.Config(), "runs/new")
    Traceback (most recent call last):
    ...
    sbi_phys.core.errors.SettingError: simulator.spec is empty; expected 'package.module:Class'
    """
    run = Run(Path(folder), config, or_none(progress), network=network, observation_name=observation_name)
    run.accept_code_change = accept_code_change
    wanted = _with_needs([require_choice("stage", name, STAGES) for name in until])
    if "report" in wanted and any(run.record(name) for name in ("infer_nle", "infer_nre")):
        wanted = _with_needs([*wanted, "methods"])  # the page shows the comparison
    _check_inputs(run, wanted)
    with run.locked():
        if "simulate" in wanted:
            _keep_or_replace_simulations(run, new_simulations)
        run.begin()
        _run_wanted(run, wanted, say or _silent)
    if say is not None and Config.read(run.path("config.toml")) != config:
        say(f"{run.path('config.toml')} was edited meanwhile: the same command applies the edit")
    return run


def _silent(text: str) -> None:
    """Say nothing."""


def _run_wanted(run: Run, wanted: list[str], say: Callable[[str], None]) -> None:
    # one BLAS thread: the matrices are small, and the numbers must not depend on the number of cores
    with threadpool_limits(limits=1, user_api="blas"), ConcurrentStages(run) as concurrent:
        for i, name in enumerate(wanted):
            for other in wanted[i + 1 :]:
                needs = [need for need in STAGES[other].needs if need in wanted]
                beside = STAGES[other].concurrent
                if beside is None or not beside(run) or any(outdated(run, need) != [] for need in needs):
                    continue
                why = outdated(run, other)
                if why != [] and concurrent.begin(other) and why:
                    say(f"{other} runs again: {'; '.join(why)}")
            reasons = outdated(run, name) if name not in concurrent else []
            if reasons == [] and name not in concurrent:
                continue
            with run.progress.task(f"[{i + 1}/{len(wanted)}] {name}", None) as task:
                if name in concurrent:
                    task.advance(0, "in a process of its own")
                    begin = time.perf_counter()
                    concurrent.wait(name)
                    task.advance(0, inference.news(name, run.numbers(name)))
                    run.note(name, {"waited": round(time.perf_counter() - begin, 3)})
                    continue
                if reasons:
                    say(f"{name} runs again: {'; '.join(reasons)}")
                _execute(run, name)
                task.advance(0, inference.news(name, run.numbers(name)))


def _execute(run: Run, name: str) -> None:
    stage, inputs = STAGES[name], inputs_of(run, name)
    record = run.record(name)
    _continue_or_clear(run, name, inputs)
    if record is None or changes(record.get("inputs") or {}, inputs):  # else the same files are made again
        _remove_reports(run, name)
    with run.recording(name, inputs, (*stage.outputs, *stage.files)) as numbers:
        stage.work(run, numbers)
    run.path(run.RECORDS, f"{name}.begun.json").unlink(missing_ok=True)


def run_in_process(folder: Path, config: Config, network: str, observation_name: str, name: str) -> None:
    """Run one stage in a process of its own."""
    _execute(Run(folder, config, network=network, observation_name=observation_name), name)


def inputs_of(run: Run, name: str) -> dict[str, Any]:
    """What a stage is made from: settings, observation, code, and the files and numbers of the stages that it reads."""
    stage, flat = STAGES[name], run.config.flat()
    prefixes = ("run.seed", *stage.settings)
    settings = {
        key: value
        for key, value in flat.items()
        if key not in Config.FREE and any(key == p or key.startswith(f"{p}.") for p in prefixes)
    }  # fmt: skip
    out: dict[str, Any] = {"settings": settings}
    if stage.observation:
        x = observation_of(run)
        out["observation"] = {} if x is None else {"source": run.config.infer.observation, "sha256": digest_of_array(x)}
    if stage.code:
        out["code"] = code_fingerprint(run.simulator)
    files: dict[str, str] = {}
    for other in stage.reads:
        source = STAGES[other]
        for file in (*source.outputs, *source.files):
            files[file] = store_digest(run.path(file), rows_used(run)) if file == "simulations" else digest_of(run.path(file))
        if name == "report" or not (source.outputs or source.files):
            numbers = json.dumps(null_safe(run.numbers(other)), sort_keys=True)
            files[f"numbers of {other}"] = hashlib.sha256(numbers.encode()).hexdigest() if run.record(other) else "absent"
    if name == "report":
        files["limits.json"] = digest_of(run.path("limits.json"))
    return out | {"files": files}


def outdated(run: Run, name: str) -> list[str] | None:
    """Why a finished stage has to run again, [] if it is current, None if it has not run or its files are missing."""
    record, stage = run.record(name), STAGES[name]
    if record is None or not all(run.path(file).exists() for file in stage.outputs):
        return None
    if not record.get("inputs"):
        return ["it was made by an earlier version"]
    written = record.get("files", {})
    edited = [file for file, digest in written.items() if digest_of(run.path(file)) != digest]
    if name == "simulate":  # the store checks its own files, and may hold more rows than are asked for
        edited = []
    return [f"{file} is not as it was written" for file in edited] + changes(record["inputs"], inputs_of(run, name))


def _continue_or_clear(run: Run, name: str, inputs: dict[str, Any]) -> None:
    """Note what a stage begins from, and remove what an interrupted run left if that began from something else."""
    begun = f"{run.RECORDS}/{name}.begun.json"
    former: dict[str, Any] | None = None
    for file in (run.path(begun), run.path(run.RECORDS, f"{name}.json")):
        if former is None and file.is_file():
            try:
                content = json.loads(file.read_text(encoding="utf-8"))
                former = content["inputs"] if isinstance(content, dict) and isinstance(content.get("inputs"), dict) else None
            except ValueError:
                former = None
    if former is None or changes(former, inputs):
        for pattern in STAGES[name].working:
            for path in sorted(run.path(Path(pattern).parts[0]).parent.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    run.path(run.RECORDS).mkdir(parents=True, exist_ok=True)
    run.write_json(begun, {"inputs": inputs})


def _remove_reports(run: Run, name: str) -> None:
    """Remove the reports that show what a stage is about to replace."""
    if "report" not in _dependents(name):
        return
    above = run.path(run.RECORDS, f"{name}.json").parent.parent
    # a stage of the project or of a network is shown by the reports of all observations below
    pages = [run.path("report.html")] if above == run.result_folder and name not in _ABOVE else sorted(above.rglob("report.html"))
    for page in pages:
        page.unlink(missing_ok=True)
        page.with_name("summary.json").unlink(missing_ok=True)


def _keep_or_replace_simulations(run: Run, new: bool) -> None:
    """Refuse simulations of other settings or code, or move them away.   Raises: RunFolderError."""
    record = run.record("simulate")
    if record is None or not record.get("inputs") or not run.path("simulations").exists():
        return
    now = inputs_of(run, "simulate")
    for inputs in (record["inputs"], now):
        inputs["settings"].pop("simulate.n", None)  # more rows are added, fewer are kept
    found = changes(record["inputs"], now)
    only_code = not changes(record["inputs"] | {"code": {}}, now | {"code": {}})
    if not found or (only_code and run.accept_code_change):
        return
    if not new:
        keep = "--accept-code-change keeps them and records both versions, " if only_code else ""
        raise RunFolderError(
            f"{run.path('simulations')} was made with another simulator or other settings: {'; '.join(found)}. Expected the same; "
            f"{keep}--new-simulations keeps the old ones in a folder of their own and simulates again"
        )
    number = next(i for i in itertools.count(1) if not run.folder.joinpath(f"simulations-old-{i}").exists())
    for name in ("simulations", "held_out"):
        if run.path(name).exists():
            run.path(name).rename(run.folder / f"{name}-old-{number}")
    run.forget("simulate")


class ConcurrentStages:
    """Stages that run in separate processes while the caller continues: at most one per further core.

    An error or Ctrl-C within the context terminates them; an interrupted stage has no record and runs again.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
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

    def begin(self, name: str) -> bool:
        """Start a stage if a core is free and the stage is not running; return whether it was started."""
        run = self._run
        cores = run.config.run.workers or available_cores()
        if name in self._pools or len(self._pools) + 1 >= cores:
            return False
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start_worker)
        self._pools[name] = pool, pool.submit(run_in_process, run.folder, run.project, run.network, run.observation_name, name)
        return True

    def wait(self, name: str) -> None:
        """Return when a stage is finished.   Raises: the error of the stage; RunFolderError if its process died."""
        try:
            self._pools[name][1].result()
        except BrokenExecutor as err:
            raise RunFolderError(f"the process of stage {name} died ({err}); run the same command again to repeat it") from err


def train_distributed(
    config: Config, folder: str | Path, until: str = "train", *, network: str = "", progress: Progress | None = None
) -> None:
    """Run stage `train` in every process that torchrun started; the first one also simulates and writes the files.

    Raises: SettingError for another stage (more processes do not speed it up), and as `run_stages`.
    """
    if until != "train":
        raise SettingError(f"the stage is {until!r} under torchrun; expected 'train'; the other stages run in a single process")
    with process_group(config.run.device) as ranks:
        if ranks.first:
            run_stages(config, folder, ["simulate"], network=network, progress=progress)
        ranks.wait()
        run = Run(Path(folder), config, network=network)
        done = outdated(run, "train") == []
        ranks.wait()  # every process has checked before the first one writes
        if ranks.first:
            run_stages(config, folder, ["train"], network=network, progress=progress)
        elif not done:
            with threadpool_limits(limits=1, user_api="blas"):
                inference.fit_network(run)


def _check_inputs(run: Run, wanted: list[str]) -> None:
    """Raise errors of simulator, device and observation before anything is written."""
    check_simulator(run.simulator)
    if {"train", "train_nle", "train_nre"} & set(wanted):
        resolve_device(run.config.run.device)
    if {"infer", "infer_nle", "infer_nre"} & set(wanted):
        _ = run.observation


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
        new = {other for other, stage in STAGES.items() if now in (*stage.needs, *stage.reads)} - found
        found |= new
        todo += new
    return [other for other in STAGES if other in found]
