"""Making one shard: draw theta, simulate, isolate the rows that fail, write. This runs in a worker, or in the caller.

The shard is the unit of work, of retry and of seeding. Its theta come from the generator (seed, "theta", shard), its x from
(seed, "x", shard); rows a to b that are simulated again after a failure come from (seed, "x", shard, a, b). So the bytes of a
shard follow from the settings alone, whichever worker makes it, and when.

A worker that sees the store's folder writes the shard there. One that does not makes the same file in a temporary place and sends its
bytes back. It sees the folder if it finds there the file of a random name that the campaign has put there: a path alone may
be another machine's own.
"""

import errno
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.errors import DataError, StoreError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array, Mask
from sbi_phys.priors import prior_from_dict
from sbi_phys.simulation.processes import limit_threads_for_good, unpickle_simulator
from sbi_phys.simulation.protocol import RowsFailedError, Simulator, check_output
from sbi_phys.simulation.sandbox import Sandbox
from sbi_phys.store.identity import class_path
from sbi_phys.store.shards import NON_FINITE, OK, RAISED, Header, ShardData, shard_name, write_shard

__all__ = ["ShardResult", "ShardTask", "close_sandboxes", "make_rows", "name_disk", "run_shard"]

# A shard in which at least this many rows fail, all of them, is a broken simulator and is not written.
BROKEN_ROWS = 16
# Parts that a batch which failed is divided into. Two would be the fewest calls; with more, fewer rows are simulated twice, and fewer
# processes die: with one bad row in a hundred, half as much time as with halves.
_PARTS = 16
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ADDRESS = re.compile(r"\b0x[0-9a-fA-F]{6,}\b")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker needs: the folder, the shard's number and rows, the header, and the simulator.

    Fields: simulator, the object, or its pickle as bytes where a process pool would choke on it; theta (rows, d) if given;
    only, whether the store has no other shard; isolate, whether the simulator runs in a process of its own, as it always does
    with a timeout (seconds of a row); parent, the process that asked; token, name of a file in the folder, which a worker that
    does not find it there does not share; send_back, whether the worker sends the file's bytes back without looking.
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
    """What a worker sends back: the shard's number, its rows, how many of them failed, and the file's bytes if it could not write it."""

    index: int
    rows: int
    n_failed: int
    file: bytes | None = field(default=None, repr=False)


def run_shard(task: ShardTask, apart: bytes | None = None) -> ShardResult:
    """Make one shard and write it, or return it where the folder is not to be seen.   apart: the simulator, if it came by itself.

    Raises: StoreError (cannot write), SimulatorMismatchError (wrong output), DataError (all rows fail, or float32 is too
    narrow), SettingError (the simulator can not be unpickled here).
    """
    if apart is not None:
        task = replace(task, simulator=apart)
    if task.parent != (os.uname().nodename, os.getpid()):
        limit_threads_for_good()
    simulator = unpickle_simulator(task.simulator) if isinstance(task.simulator, bytes) else task.simulator
    header = task.header
    theta = task.theta
    if theta is None:
        theta = prior_from_dict(header.prior).sample(task.rows, rng_for(header.seed, "theta", task.index))
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
    """The bytes of the file that `write_shard` makes."""
    with tempfile.TemporaryDirectory(prefix="sbi_phys_shard_") as folder:
        path = Path(folder) / shard_name(index)
        try:
            write_shard(path, header, index, data)
        except StoreError as err:
            raise name_disk(err, path) from err.__cause__
        return path.read_bytes()


def name_disk(err: StoreError, path: Path) -> StoreError:
    """The same error, with the disk's name and its room where that is what was missing."""
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
    """Simulate theta (n, d) -> rows with their status; a call that raises is divided until the rows at fault are alone.

    A simulator that knows which of its rows failed raises RowsFailedError with the others: nothing is simulated twice then.

    Args: key: what the generator is keyed by, beside the header's seed. call: in place of simulator.simulate.

    Raises: SimulatorMismatchError, DataError, StoreError when memory runs out.
    """
    n = theta.shape[0]
    parts: list[tuple[int, NDArray[np.floating]]] = []
    status = np.full(n, RAISED, dtype=np.uint8)
    reasons: dict[int, str] = {}
    todo, call = [(0, n)], call or simulator.simulate
    while todo:
        start, stop = todo.pop()
        rng = rng_for(header.seed, *key) if stop - start == n else rng_for(header.seed, *key, start, stop)
        try:
            # a copy: a simulator that works in place must not change the theta that is stored
            got, failed = call(theta[start:stop].copy(), rng), {}
        except RowsFailedError as err:
            got, failed = err.x, err.reasons
        except MemoryError as err:
            # says something about the machine, nothing about a row: flagged, it would change the data from place to place
            raise StoreError(f"memory ran out in a batch of {stop - start} rows; expected a smaller shard_size (now {n})") from err
        except StoreError:
            raise  # of the sandbox: nothing works
        except (Exception, SystemExit) as err:
            if stop - start == 1:
                reasons[start] = _reason(err)
            else:
                n_parts = min(_PARTS, stop - start)
                edges = [start + (stop - start) * i // n_parts for i in range(n_parts + 1)]
                todo += reversed(list(pairwise(edges)))
            continue
        good = _as_stored(simulator, check_output(simulator, got, stop - start), header.dtype)
        status[start:stop] = OK
        for row, text in failed.items():
            status[start + row], reasons[start + row] = RAISED, _ADDRESS.sub("0x...", text)
        # a part waits until the others are there: copied, in case the simulator fills one buffer again and again
        parts.append((start, good if stop - start == n else good.copy()))
    if len(parts) == 1 and parts[0][1].shape[0] == n:
        x = parts[0][1]  # the usual case, without another copy
    else:
        x = np.full((n, header.n_columns), np.nan, dtype=header.dtype)
        for start, good in parts:
            x[start : start + good.shape[0]] = good
    finite = np.isfinite(x)
    if not finite.all():
        for row in map(int, np.flatnonzero((status == OK) & ~finite.all(axis=1))):
            status[row] = NON_FINITE
            reasons[row] = _non_finite_reason(simulator, finite[row], x[row])
    return ShardData(theta, x, status, dict(sorted(reasons.items())))


_SANDBOXES: dict[int, tuple[bytes, float | None, Sandbox]] = {}


def _sandbox(simulator: bytes, timeout: float | None) -> Sandbox:
    """Return the sandbox of this thread, kept from shard to shard: starting one takes about a second. It answers one call at a time."""
    thread = threading.get_ident()
    known = _SANDBOXES.get(thread)
    if known is None or known[:2] != (simulator, timeout):
        if known is not None:
            known[2].close()
        known = _SANDBOXES[thread] = simulator, timeout, Sandbox(simulator, timeout)
    return known[2]


def close_sandboxes() -> None:
    """End the sandboxes of this process, if it has some."""
    while _SANDBOXES:
        _SANDBOXES.popitem()[1][2].close()


def _as_stored(simulator: Simulator, x: AnyArray, dtype: str) -> NDArray[np.floating]:
    """Cast x to the dtype of the store, refusing what it can not hold.   Raises: DataError."""
    if x.dtype == dtype:
        return x
    with np.errstate(over="ignore"):
        out = x.astype(dtype)
    finite = np.isfinite(out)
    lost = np.zeros_like(finite) if finite.all() else ~finite & np.isfinite(x)
    start = 0
    for o in simulator.observables:
        block = slice(start, start + o.size)
        if o.kind == "counts" and np.abs(out[:, block]).max() >= 2**24:
            lost[:, block] |= finite[:, block] & (out[:, block].astype(np.float64) != x[:, block])
        start += o.size
    if lost.any():
        row, column = (int(i) for i in np.argwhere(lost)[0])
        raise DataError(
            f"x of {class_path(simulator)} has {x[row, column]!r} in {_column_name(simulator, column)}, which {dtype} can not hold; "
            'expected dtype="float64" for this store'
        )
    return out


def _reason(err: BaseException) -> str:
    # an address in memory differs from run to run, and with it the bytes of the file would
    return _ADDRESS.sub("0x...", f"{type(err).__name__}: {err}")


def _non_finite_reason(simulator: Simulator, finite: Mask, x: NDArray[np.floating]) -> str:
    bad = np.flatnonzero(~finite)
    return f"non-finite x in {bad.size} of {finite.size} columns, first {x[bad[0]]} in {_column_name(simulator, int(bad[0]))}"


def _column_name(simulator: Simulator, column: int) -> str:
    start = 0
    for o in simulator.observables:
        if column < start + o.size:
            return f"{o.name}[{column - start}]"
        start += o.size
    return f"column {column}"
