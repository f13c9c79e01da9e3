r"""The campaign: draw theta_i ~ p(theta) and x_i ~ p(x | theta_i) into the shards of a store, on one machine or many.

    store = simulate(simulator, 100_000, "runs/spectra", seed=0, workers=2)
    theta, x = store.read()

Each shard depends on (seed, shard) alone, so the files have the same bytes for any number of workers and after any interruption (a killed
process, a full disk, a power cut). The same call continues an interrupted campaign, and a larger n adds rows.

    simulate(simulator, 100_000, "/shared/spectra", seed=0, shards="3/25")      one of 25 array jobs on the same folder

Reading order: `protocol` (what a simulator is), this file, `_dispatch` (shards to workers), `workers` (one shard), `_sandbox` (isolating
crashes), `processes` (worker processes), `clusters` (batch systems). `external` makes simulators of functions and programs.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_matrix, require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, SettingError, ShapeError, SimulatorMismatchError, StoreError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Prior, prior_from_dict
from sbi_phys.priors.parameters import observables_to_dicts
from sbi_phys.simulation._dispatch import Campaign, complete
from sbi_phys.simulation.protocol import Simulator, check_simulator
from sbi_phys.simulation.workers import close_sandboxes
from sbi_phys.store.identity import code_fingerprint, simulator_identity
from sbi_phys.store.layout import Layout
from sbi_phys.store.locks import ArrayLock, StoreLock
from sbi_phys.store.manifest import Plan, existing_header, plan_store, remove_litter
from sbi_phys.store.shards import Header
from sbi_phys.store.store import Store

__all__ = ["simulate"]

# Default rows per shard. Not a function of n, so that a later call with a larger n extends the same store.
_SHARD_ROWS, _SHARD_BYTES = 4096, 64 * 2**20


def simulate(
    simulator: Simulator,
    n: int | None,
    path: str | os.PathLike[str],
    *,
    prior: Prior | None = None,
    theta: ArrayLike | None = None,
    seed: int = 0,
    workers: int | None = None,
    executor: Executor | None = None,
    send_back: bool | None = None,
    shard_size: int | None = None,
    dtype: str = "float32",
    layout: Layout | None = None,
    shards: range | str | int | None = None,
    timeout: float | None = None,
    isolate: bool = False,
    accept_code_change: bool = False,
    progress: Progress | None = None,
) -> Store:
    r"""Draw n rows theta ~ p(theta), x ~ p(x | theta) into the store at `path`, or continue the store that exists there.

    Rows that fail (the simulator raises, or x is not finite) are kept and flagged with the reason. Workers do not import the
    calling script: it needs no guard `if __name__ == "__main__":`, and its classes and functions reach them by their code.

    Args:
        simulator: a `Simulator`, of a module, a script or a notebook; with workers, one that can be pickled.
        n: rows of the finished store, including existing ones; a store that has more keeps them. None: the rows of theta.
        path: folder of the store, created if missing.
        prior: p(theta), default `simulator.prior`; another prior must have the same parameters.
        theta: (n, d), in the parameters' units and within the prior: simulate at these values instead of drawing them. The seed
            then determines x alone; use another seed in each round of a sequence, else row i has the same noise in every round.
        seed: integer >= 0. Theta of shard i come from the generator (seed, "theta", i), x from (seed, "x", i).
        workers: processes; default one per core, or none if the work takes less than 3 s. With an executor: its parallel tasks.
        executor: any `concurrent.futures.Executor`; it is not shut down.
        send_back: whether its workers send shards back instead of writing them; None: those without access to the folder do.
        shard_size: rows per file, the unit of work and of loss after a kill; default 4096, at most 64 MiB.
        dtype: of x on disk, 'float32' or 'float64'. Counts above 2^24 that float32 would change are refused.
        layout: compression, chunks, dtypes and shapes of single observables; default that of the existing store, else none.
        shards: make only these, in parallel with other such calls: a range, '0:64', '7' or '3/100'.
        timeout: seconds allowed per row; the simulator then runs in a separate process, which is killed and replaced.
        isolate: run the simulator in a separate process without time limit; a row that crashes it is flagged.
        accept_code_change: continue a store although the simulator's code differs from that of its rows; both fingerprints
            are kept (`Store.code`). Right where the change does not alter the simulations.
        progress: display; default none.

    Returns: the store, complete unless `shards` selects some.
    Raises: SettingError, SimulatorMismatchError, ShapeError, NonFiniteError, SupportError (theta), DataError (all rows of a shard fail,
        x does not fit the dtype), StoreError (store of other settings or of other code, locked or read-only, shards of another job,
        crashing workers).

    >>> import sbi_phys as sp
    >>> from simulators import OnOff
    >>> store = sp.simulate(OnOff(), 500, "on_off", seed=1)
    >>> theta, x = store.read()
    >>> theta.shape, x.shape
    ((500, 2), (500, 2))
    """
    check_simulator(simulator)
    prior = _check_prior(simulator, prior)
    n, given = _check_rows(prior, n, theta)
    workers, progress = _check_workers(workers, executor), or_none(progress)
    timeout = None if timeout is None else require_number("timeout", timeout, low=0, open_low=True)
    folder, code = Path(path), code_fingerprint(simulator)
    _make_folder(folder)
    with ExitStack() as on_exit:
        header = partial(_header, simulator, prior, seed, shard_size, dtype, layout, given, folder)
        found = _enter(
            folder,
            lambda: plan_store(folder, header(), n, given, shards, code=code, accept_code_change=accept_code_change),
            shards,
            on_exit,
        )
        part = None if shards is None else found.shards
        isolate = isolate or timeout is not None
        run = Campaign(
            folder, found.manifest, simulator, given, found.todo, timeout=timeout, isolate=isolate, send_back=send_back, shards=part
        )
        on_exit.callback(close_sandboxes)
        complete(run, workers, executor, progress)
    return Store(folder)


def _enter(folder: Path, plan: Callable[[], Plan], shards: object, on_exit: ExitStack) -> Plan:
    """Lock the whole folder or the shards of an array job, remove files left by killed runs, and plan the work."""
    if shards is None:
        on_exit.enter_context(StoreLock(folder))
        remove_litter(folder)
        on_exit.callback(remove_litter, folder)
        return plan()
    lock = on_exit.enter_context(ArrayLock(folder))
    with lock.planning():
        found = plan()
        lock.claim(found.shards)
    remove_litter(folder, found.shards)
    on_exit.callback(remove_litter, folder, found.shards)
    return found


def _check_workers(workers: int | None, executor: Executor | None) -> int | None:
    if executor is not None and not isinstance(executor, Executor):
        raise SettingError(f"executor is {executor!r}; expected a concurrent.futures.Executor or None")
    return None if workers is None else require_int("workers", workers, low=1)


def _check_prior(simulator: Simulator, prior: Prior | None) -> Prior:
    if prior is None:
        return simulator.prior
    if not isinstance(prior, Prior):
        raise SettingError(f"prior is {prior!r}; expected a Prior or None")
    if prior.names != simulator.prior.names:
        raise SimulatorMismatchError(f"prior has parameters {prior.names}; expected those of the simulator, {simulator.prior.names}")
    return prior


def _check_rows(prior: Prior, n: int | None, theta: ArrayLike | None) -> tuple[int, Array | None]:
    if theta is None:
        if n is None:
            raise SettingError("n is None; expected the number of rows, or theta")
        return require_int("n", n, low=1), None
    given = as_matrix("theta", theta, prior.dim, prior.names)
    if given.shape[0] == 0:
        raise DataError("theta has no rows; expected at least one")
    if n is not None and require_int("n", n, low=1) != given.shape[0]:
        raise ShapeError(f"theta has {given.shape[0]} rows and n is {n}; expected the same, or n=None")
    prior.require_contains(given)
    return given.shape[0], given


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"{folder} cannot be created: {err.strerror}; expected a path where a folder can be created") from err


def _header(
    simulator: Simulator,
    prior: Prior,
    seed: int,
    shard_size: int | None,
    dtype: str,
    layout: Layout | None,
    given: Array | None,
    folder: Path,
) -> Header:
    """Return the header of the store; shard size and layout default to those of an existing store."""
    require_choice("dtype", dtype, ("float32", "float64"))
    description = prior.to_dict()
    try:
        same = prior_from_dict(description) == prior
    except DataError:
        same = False
    if not same:
        raise SettingError(f"prior {prior!r} cannot be rebuilt from its to_dict(); expected one of the priors of sbi_phys.priors")
    observables = observables_to_dicts(simulator.observables)
    existing = existing_header(folder) if shard_size is None or layout is None else None
    if shard_size is None:
        row_bytes = 8 * prior.dim + np.dtype(dtype).itemsize * sum(o.size for o in simulator.observables)
        shard_size = existing.shard_size if existing is not None else max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    return Header(
        simulator=simulator_identity(simulator),
        prior=description,
        observables=observables,
        seed=require_int("seed", seed, low=0, high=2**63 - 1),
        shard_size=require_int("shard_size", shard_size, low=1),
        dtype=dtype,
        theta="prior" if given is None else "given",
        layout=_check_layout(layout, observables, dtype) if layout is not None or existing is None else existing.layout,
    )


def _check_layout(layout: Layout | None, observables: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    if layout is None:
        return {}
    if not isinstance(layout, Layout):
        raise SettingError(f"layout is {layout!r}; expected a sbi_phys.store.layout.Layout or None")
    if layout.sets:
        raise SettingError(
            f"layout has the ragged sets {sorted(layout.sets)}; expected none: simulators return one row of x for each theta"
        )
    return layout.check(observables, dtype).plain()
