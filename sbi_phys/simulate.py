r"""Simulations on disk: theta_i ~ p(theta), x_i ~ p(x | theta_i), in shards, over any `concurrent.futures.Executor`.

    store = simulate(simulator, 100_000, "runs/spectra", seed=0, workers=2)
    theta, x = store.read()

Every shard follows from (seed, shard), so the bytes on disk are those of an undisturbed run with one worker, whatever
happened: several workers, a kill, a full disk, a power cut. The same call again continues, and a larger n adds rows.
"""

import hashlib
import os
from collections import deque
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbi_phys.checks import as_matrix, require_choice, require_int, require_number
from sbi_phys.dispatch import Campaign, complete
from sbi_phys.errors import DataError, SettingError, ShapeError, SimulatorMismatchError, StoreError
from sbi_phys.priors import Prior, prior_from_dict
from sbi_phys.progress import Progress, or_none
from sbi_phys.protocol import Simulator, check_simulator, load_simulator, observables_to_dicts, simulator_identity
from sbi_phys.shards import Header, open_shard, read_facts, shard_name
from sbi_phys.store import MANIFEST, Manifest, Store, StoreLock, list_shards, read_manifest, remove_litter, write_manifest
from sbi_phys.workers import close_sandboxes

__all__ = ["Simulator", "check_simulator", "load_simulator", "simulate", "simulator_identity"]

# Rows of a shard unless asked otherwise. Not a function of n: asking for more rows later must lead to the same folder.
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
    shard_size: int | None = None,
    dtype: str = "float32",
    timeout: float | None = None,
    isolate: bool = False,
    progress: Progress | None = None,
) -> Store:
    r"""Draw n rows theta ~ p(theta), x ~ p(x | theta) and keep them in the store at `path`, continuing what is there.

    Rows that fail (the simulator raises, or x is not finite) are kept and flagged with the reason, never dropped.
    A script that uses workers needs the usual guard `if __name__ == "__main__":`, as each worker imports it.

    Args:
        simulator: a `Simulator`; with workers, of a class at the top of a module that they can import.
        n: rows of the finished store, those already there included; a store that holds more keeps them.
            None: as many as `theta` has.
        path: folder of the store, made if it is not there.
        prior: p(theta), default `simulator.prior`; another prior must have the same parameters.
        theta: (n, d), parameters' units, within the prior: simulate there instead of drawing. Then the seed drives x
            alone; give each round of a sequence another seed, else row i of every round has the same noise.
        seed: integer >= 0. Theta of shard i come from the generator (seed, "theta", i), x from (seed, "x", i).
        workers: processes; default one a core, or none if the rest takes under 3 s. 1: in this process.
            With an executor: how many tasks it takes at once, to bound what is in flight.
        executor: any `concurrent.futures.Executor` whose workers see the folder; it is not shut down.
        shard_size: rows of a file, default 4096 (fewer if a file would pass 64 MiB), or that of the store at `path`.
            A shard is what is lost by a kill and what a worker takes at once: choose seconds to minutes of work.
        dtype: of x on disk, 'float32' or 'float64'. Counts above 2^24 that float32 would change are refused.
        timeout: seconds that one row may take alone; then the simulator runs in a process of its own, which is ended and replaced.
        isolate: run the simulator in a process of its own without a time limit. A row at which it crashes or exits is flagged.
            Shards whose worker died twice are always tried so before the call gives up.
        progress: default none.

    Returns: the store, complete.
    Raises: SettingError (out of range, or a simulator that can not be sent to workers), SimulatorMismatchError (it breaks the protocol, or
        has other parameters than the prior), ShapeError, NonFiniteError, SupportError (theta), DataError (all rows of a shard fail, or
        float32 can not hold x), StoreError (a folder of other settings, locked or read-only, or workers that die whatever they get).
    """
    check_simulator(simulator)
    prior = _check_prior(simulator, prior)
    n, given = _check_rows(prior, n, theta)
    workers, progress = _check_workers(workers, executor), or_none(progress)
    folder = Path(path)
    _make_folder(folder)
    with StoreLock(folder), ExitStack() as on_exit:
        remove_litter(folder)
        on_exit.callback(remove_litter, folder)
        header = _header(simulator, prior, seed, shard_size, dtype, given, folder)
        manifest, todo = _plan(folder, header, n, given)
        run = Campaign(folder, manifest, simulator, given, todo, timeout=_check_timeout(timeout), isolate=isolate or timeout is not None)
        on_exit.callback(close_sandboxes)
        complete(run, workers, executor, progress)
    return Store(folder)


def _check_timeout(timeout: float | None) -> float | None:
    return None if timeout is None else require_number("timeout", timeout, low=0, open_low=True)


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


def _check_rows(prior: Prior, n: int | None, theta: ArrayLike | None) -> tuple[int, NDArray[np.float64] | None]:
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
        raise StoreError(f"{folder} can not be made: {err.strerror}; expected a path where a folder may be made") from err


def _header(
    simulator: Simulator, prior: Prior, seed: int, shard_size: int | None, dtype: str, given: NDArray[np.float64] | None, folder: Path
) -> Header:
    """Header of the store this call is about; a shard size that is not asked for is that of the store that is there."""
    require_choice("dtype", dtype, ("float32", "float64"))
    description = prior.to_dict()
    try:
        same = prior_from_dict(description) == prior
    except DataError:
        same = False
    if not same:
        raise SettingError(f"prior {prior!r} can not be rebuilt from its to_dict(); expected one of the priors of sbi_phys.priors")
    if shard_size is None:
        there = _existing_header(folder)
        row_bytes = 8 * prior.dim + np.dtype(dtype).itemsize * sum(o.size for o in simulator.observables)
        shard_size = there.shard_size if there is not None else max(1, min(_SHARD_ROWS, _SHARD_BYTES // row_bytes))
    return Header(
        simulator=simulator_identity(simulator),
        prior=description,
        observables=observables_to_dicts(simulator.observables),
        seed=require_int("seed", seed, low=0, high=2**63 - 1),
        shard_size=require_int("shard_size", shard_size, low=1),
        dtype=dtype,
        theta="prior" if given is None else "given",
    )


def _existing_header(folder: Path) -> Header | None:
    if (folder / MANIFEST).exists():
        return read_manifest(folder).header
    shards = list_shards(folder)
    if not shards:
        return None
    path = folder / shard_name(shards[0])
    with open_shard(path) as file:
        return read_facts(file, path)[0]


def _plan(folder: Path, header: Header, n: int, given: NDArray[np.float64] | None) -> tuple[Manifest, deque[int]]:
    """Compare what is in the folder with what is asked for; return the manifest, now on disk, and the shards to make.

    Raises: StoreError for a shard of other settings, or one that can not be read.
    """
    before = read_manifest(folder) if (folder / MANIFEST).exists() else None
    if before is not None:
        header.require_equal(before.header, str(folder / MANIFEST))
    rows = {index: _rows_there(folder / shard_name(index), header, index, given) for index in list_shards(folder)}
    last = max(rows, default=-1)
    n_there = last * header.shard_size + rows[last] if rows else 0
    if given is not None and n_there > n:
        raise StoreError(f"{folder} holds {n_there} rows; expected at most the {n} rows of theta")
    sha256 = "" if given is None else hashlib.sha256(np.ascontiguousarray(given, dtype="<f8").tobytes()).hexdigest()
    manifest = Manifest(header, max(n, n_there), sha256)
    for index, got in rows.items():
        if got != manifest.rows(index):
            (folder / shard_name(index)).unlink()  # was the last and shorter than shard_size; first of all, so that no reader meets it
    if manifest != before:
        write_manifest(folder, manifest)
    return manifest, deque(i for i in range(manifest.n_shards) if rows.get(i) != manifest.rows(i))


def _rows_there(path: Path, header: Header, index: int, given: NDArray[np.float64] | None) -> int:
    """Return the rows of a shard in the folder, once it is sure that it belongs there.   Raises: StoreError."""
    with open_shard(path) as file:
        got, facts = read_facts(file, path)
        header.require_equal(got, str(path))
        rows = int(facts["rows"])
        if facts["shard"] != index or not 1 <= rows <= header.shard_size:
            raise StoreError(
                f"{path} holds shard {facts['shard']} with {rows} rows; expected shard {index}, at most {header.shard_size} rows"
            )
        if given is not None:
            first = index * header.shard_size
            mine = given[first : first + rows]
            if not np.array_equal(file["theta"][: mine.shape[0]], mine):
                raise StoreError(f"{path} was made at other theta; expected rows {first} to {first + rows} of the theta that is given")
        return rows
