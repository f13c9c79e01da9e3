"""Making one shard, in a worker process or in the caller: draw theta, simulate, find the rows that fail, write the file.

The shard is the unit of work, of retry and of seeding. Its theta come from the generator (seed, "theta", shard) and its x from
(seed, "x", shard); rows a to b that are simulated again after a failure come from (seed, "x", shard, a, b). The bytes of a shard
therefore depend on the settings alone, not on the worker or the time.

A worker that has access to the store's folder writes the shard there. Otherwise it writes the same file to a temporary folder and sends
the bytes back. The worker has access if it finds a file of a random name that the campaign placed in the folder; the path alone could
exist on another machine as well.
"""

import errno
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.errors import DataError, StoreError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array
from sbi_phys.priors import prior_from_dict
from sbi_phys.priors.blocks import column_name, failed_rows
from sbi_phys.simulation._sandbox import Sandbox
from sbi_phys.simulation.processes import limit_threads_for_good, unpickle_simulator
from sbi_phys.simulation.protocol import Simulator, check_output
from sbi_phys.simulation.rows import non_finite_reason, simulate_parts
from sbi_phys.store.identity import class_path
from sbi_phys.store.shards import NON_FINITE, OK, RAISED, Header, ShardData, shard_name, write_shard

__all__ = ["ShardResult", "ShardTask", "close_sandboxes", "make_rows", "name_disk", "run_shard"]

# If all rows of a shard fail and there are at least this many, the simulator is considered broken and the shard is not written.
BROKEN_ROWS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker needs to make a shard.

    Args: folder, index, rows: of the shard. header: of the store. simulator: the object or its pickle. theta (rows, d): if given.
    only: whether the store has a single shard. isolate: run the simulator in a separate process; always so with a timeout
    (seconds per row). parent: host and process that sent the task. token: name of a file in the folder; a worker that does not
    find it sends the shard back. send_back: always send the shard back.
    """

    folder: str
    index: int
    rows: int
    header: Header
    simulator: Simulator | bytes
    theta: Array | None
    only: bool
    isolate: bool = False
    timeout: float | None = None
    parent: tuple[str, int] = field(default_factory=lambda: (os.uname().nodename, os.getpid()))
    token: str = ""
    send_back: bool = False


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a worker returns: shard number, rows, failed rows, and the file's bytes unless the worker wrote the file."""

    index: int
    rows: int
    n_failed: int
    file: bytes | None = field(default=None, repr=False)


def run_shard(task: ShardTask, apart: bytes | None = None) -> ShardResult:
    """Make one shard and write it, or return it if the folder is not accessible.   apart: the simulator's pickle, if sent separately.

    Raises: StoreError (the file cannot be written), SimulatorMismatchError (wrong output), DataError (all rows fail, or float32 is
    too narrow), SettingError (the simulator cannot be unpickled).
    """
    if apart is not None:
        task = replace(task, simulator=apart)
    if task.parent != (os.uname().nodename, os.getpid()):
        limit_threads_for_good()
    simulator = unpickle_simulator(task.simulator) if isinstance(task.simulator, bytes) else task.simulator
    header = task.header
    theta = task.theta
    if theta is None:
        theta = prior_from_dict(header.prior, allow_import=True).sample(task.rows, rng_for(header.seed, "theta", task.index))
    call = _sandbox(task.simulator, task.timeout).simulate if isinstance(task.simulator, bytes) and task.isolate else None
    data = make_rows(simulator, theta, header, "x", task.index, call=call)
    failed = int(np.count_nonzero(data.status))
    if failed == task.rows and (task.only or failed >= BROKEN_ROWS):
        first = next(iter(data.reasons.values()))
        raise DataError(
            f"all {failed} rows of shard {task.index} failed in {class_path(simulator)}: {first}; expected at least one good row"
        )
    if task.send_back or (task.token and not os.path.exists(os.path.join(task.folder, task.token))):
        return ShardResult(task.index, task.rows, failed, _as_file(header, task.index, data))
    path = Path(task.folder) / shard_name(task.index)
    try:
        write_shard(path, header, task.index, data)
    except StoreError as err:
        raise name_disk(err, path) from err.__cause__
    return ShardResult(task.index, task.rows, failed)


def _as_file(header: Header, index: int, data: ShardData) -> bytes:
    """Return the bytes of the file that `write_shard` writes."""
    with tempfile.TemporaryDirectory(prefix="sbi_phys_shard_") as folder:
        path = Path(folder) / shard_name(index)
        try:
            write_shard(path, header, index, data)
        except StoreError as err:
            raise name_disk(err, path) from err.__cause__
        return path.read_bytes()


def name_disk(err: StoreError, path: Path) -> StoreError:
    """Add the name and the free space of the disk to an error about a full disk; return other errors unchanged."""
    cause = err.__cause__
    if not isinstance(cause, OSError) or cause.errno not in _FULL:
        return err
    mount = path.parent.resolve()
    while not os.path.ismount(mount):
        mount = mount.parent
    usage = shutil.disk_usage(mount)
    what = f"the disk mounted at {mount} is full" if cause.errno == errno.ENOSPC else f"the quota on the disk mounted at {mount} is used up"
    return StoreError(f"{what}, {usage.free / 1e6:.1f} of {usage.total / 1e6:.1f} MB free: {err}")


def make_rows(simulator: Simulator, theta: Array, header: Header, *key: int | str, call: Callable[..., Any] | None = None) -> ShardData:
    """Simulate theta (n, d) and return the rows with their status; a batch that raises is divided until the failing rows are alone.

    A simulator that knows which of its rows failed raises RowsFailedError with the other rows; then nothing is simulated twice.

    Args: key: of the random generator, in addition to the header's seed. call: function used in place of simulator.simulate.
    Raises: SimulatorMismatchError, DataError, StoreError (out of memory).
    """
    n = theta.shape[0]
    parts: list[tuple[int, NDArray[np.floating]]] = []
    status = np.zeros(n, dtype=np.uint8)
    reasons: dict[int, str] = {}

    def rng_of(start: int, stop: int) -> np.random.Generator:
        return rng_for(header.seed, *key) if stop - start == n else rng_for(header.seed, *key, start, stop)

    try:
        for start, stop, got, failed in simulate_parts(call or simulator.simulate, theta, rng_of):
            reasons |= failed
            if got is not None:
                good = _as_stored(simulator, check_output(simulator, got, stop - start), header.dtype)
                # copied, because a simulator may reuse its output buffer in the next call
                parts.append((start, good if stop - start == n else good.copy()))
    except MemoryError as err:
        # depends on the machine and not on the row: a flag would make the data depend on where it was simulated
        raise StoreError(f"memory ran out in a batch of {n} rows; expected a smaller shard_size (now {n})") from err
    status[list(reasons)] = RAISED
    if len(parts) == 1 and parts[0][1].shape[0] == n:
        x = parts[0][1]  # the usual case needs no further copy
    else:
        x = np.full((n, header.n_columns), np.nan, dtype=header.dtype)
        for start, good in parts:
            x[start : start + good.shape[0]] = good
    bad = failed_rows(x, simulator.observables)
    for row in map(int, np.flatnonzero((status == OK) & bad)):
        status[row] = NON_FINITE
        reasons[row] = non_finite_reason(simulator, x[row])
    return ShardData(theta, x, status, dict(sorted(reasons.items())))


_SANDBOXES: dict[int, tuple[bytes, float | None, Sandbox]] = {}


def _sandbox(simulator: bytes, timeout: float | None) -> Sandbox:
    """Return the sandbox of this thread, which is kept between shards because starting one takes about a second."""
    thread = threading.get_ident()
    known = _SANDBOXES.get(thread)
    if known is None or known[:2] != (simulator, timeout):
        if known is not None:
            known[2].close()
        known = _SANDBOXES[thread] = simulator, timeout, Sandbox(simulator, timeout)
    return known[2]


def close_sandboxes() -> None:
    """End the sandboxes of this process."""
    while _SANDBOXES:
        _SANDBOXES.popitem()[1][2].close()


_QUARTILE_ROWS = 20


def _as_stored(simulator: Simulator, x: AnyArray, dtype: str) -> NDArray[np.floating]:
    """Cast x to the dtype of the store.   Raises: DataError for values that the dtype cannot hold."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        out = x.astype(dtype)
    finite = np.isfinite(out)
    lost = np.zeros_like(finite) if finite.all() else ~finite & np.isfinite(x)
    faint = (out == 0) & (x != 0)
    if faint.any():  # a tail may end in 0, but a column whose values mostly do has lost its meaning
        lost |= faint & (2 * np.count_nonzero(faint, axis=0) > np.count_nonzero(x, axis=0))
    start = 0
    for o in simulator.observables:
        block = slice(start, start + o.size)
        if o.kind == "counts" and np.abs(out[:, block]).max() >= 2**24:
            lost[:, block] |= finite[:, block] & (out[:, block].astype(np.float64) != x[:, block])
        start += o.size
    if lost.any():
        row, column = (int(i) for i in np.argwhere(lost)[0])
        raise DataError(
            f"x of {class_path(simulator)} has {x[row, column]!r} in {column_name(simulator.observables, column)}, which {dtype} "
            'cannot hold; expected dtype="float64" for this store'
        )
    _require_digits(simulator, x, out)
    return out


def _require_digits(simulator: Simulator, x: AnyArray, out: NDArray[np.floating]) -> None:
    """Raise DataError for a column that loses its differences on a large offset: rounded by over 5 % of its interquartile range."""
    if len(x) < _QUARTILE_ROWS:
        return
    bounded = np.abs(x) < np.finfo(out.dtype).max
    moved = np.abs(np.where(bounded, out, 0.0) - np.where(bounded, x, 0.0)).max(axis=0)
    suspect = np.flatnonzero(moved > 1e-9 * np.ptp(np.where(bounded, x, 0.0), axis=0))  # most columns need no quartiles
    for j in suspect:
        if not bounded[:, j].any():
            continue
        low, high = map(float, np.quantile(x[bounded[:, j], j], [0.25, 0.75]))
        middle = bounded[:, j] & (x[:, j] >= low) & (x[:, j] <= high)  # of values over decades the largest move most
        lost = float(np.abs(out[middle, j] - x[middle, j]).max(initial=0.0))
        if lost > 0.05 * (high - low) > 0:
            raise DataError(
                f"x of {class_path(simulator)} has {column_name(simulator.observables, int(j))} of about {low!r}, half of the values within"
                f" {high - low:.2g}, which {out.dtype} rounds by up to {lost:.2g}; expected"
                ' dtype="float64" for this store, or the values without their offset'
            )
