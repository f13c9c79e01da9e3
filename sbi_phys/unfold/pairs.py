"""Pairs (truth, reco) from a simulation store: read whole, or filled into a response shard by shard.

The columns of a store have names: those of its parameters (theta) and of its observables (blocks of x). Either may be the truth of an
event or its reconstruction.

Rows whose simulation failed are events too, and leaving them out changes the efficiency. `failed` therefore says how to treat them:
"missed" counts rows with a non-finite x as events that are not reconstructed, "drop" leaves all failed rows out, "error" refuses them.
"""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import require_choice, require_finite
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.store.store import Store
from sbi_phys.unfold._inputs import check_edges, check_mask, check_nonnegative
from sbi_phys.unfold.response import PairHistograms, Response

__all__ = ["Pairs", "read_pairs", "response_from_store"]

Names = str | Sequence[str]

FAILED = ("error", "missed", "drop")
_NOT_FINITE = 1  # status of a row whose x is not finite


class Pairs(NamedTuple):
    """truth (n, d), reco (n, k), in the store's units; weights (n,); reco_pass (n,): where False, reco has no meaning and is 0.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> energy = np.linspace(0.01, 3.99, 400)
    >>> np.savez("pairs.npz", energy=energy, signal=energy + np.random.default_rng(1).normal(0, 0.3, 400))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0.0, 4.0)])
    >>> store = sp.store.import_store("pairs.npz", "pairs", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> truth, reco, weights, reco_pass = sp.unfold.read_pairs(store, "energy", "signal")
    >>> bool(reco_pass.all()), float(weights.sum())
    (True, 400.0)
    """

    truth: Array
    reco: Array
    weights: Array
    reco_pass: Mask


def read_pairs(
    store: Store | str | PathLike[str],
    truth: Names,
    reco: Names,
    *,
    weights: str | None = None,
    reco_pass: str | None = None,
    failed: str = "error",
) -> Pairs:
    """Read the pairs of a store into memory.

    Args: store: a Store or its folder. truth, reco: name or names of parameters or observables; a block of columns stays one. weights,
        reco_pass: names of single columns (>= 0; 0 or 1), None = 1 everywhere. failed: treatment of rows whose simulation failed,
        "error", "missed" or "drop" (see the module).
    Returns: Pairs: `FlowUnfolder().fit(p.truth, p.reco, weights=p.weights, reco_pass=p.reco_pass)`.
    Raises: SettingError (a name that is not in the store), DataError (failed rows, negative weights), NonFiniteError,
        StoreError.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> energy = np.linspace(0.01, 3.99, 400)
    >>> np.savez("pairs.npz", energy=energy, signal=energy + np.random.default_rng(1).normal(0, 0.3, 400))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0.0, 4.0)])
    >>> store = sp.store.import_store("pairs.npz", "pairs", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> pairs = sp.unfold.read_pairs(store, "energy", "signal")
    >>> pairs.truth.shape, pairs.reco.shape
    ((400, 1), (400, 1))
    """
    parts = list(_parts(store, truth, reco, weights, reco_pass, failed))
    if not parts:
        raise DataError("the store has no rows left after the selection; expected at least one")
    return Pairs(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def response_from_store(
    store: Store | str | PathLike[str],
    truth: str,
    reco: str,
    truth_edges: ArrayLike,
    reco_edges: ArrayLike,
    *,
    weights: str | None = None,
    reco_pass: str | None = None,
    failed: str = "error",
    background: ArrayLike | None = None,
    exposure: float | None = None,
    progress: Progress | None = None,
) -> Response:
    """Fill a response from a store of any size: one shard is in memory at a time. The result is that of `Response.from_pairs`.

    Args: names as in `read_pairs`, of one truth and one reco column. truth_edges, reco_edges in their units. background (n_reco,), counts.
        exposure, km2 sr yr.
    Returns: Response with n_simulated, truth and fakes.
    Raises: as `read_pairs`; ShapeError (more than one column), DataError (no overlap, empty bins: named).

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> energy = np.linspace(0.01, 3.99, 400)
    >>> np.savez("pairs.npz", energy=energy, signal=energy + np.random.default_rng(1).normal(0, 0.3, 400))
    >>> prior = sp.BoxPrior([sp.Parameter("energy", 0.0, 4.0)])
    >>> store = sp.store.import_store("pairs.npz", "pairs", prior=prior, observables=[sp.Observable("signal", 1)])
    >>> sp.unfold.response_from_store(store, "energy", "signal", [0, 2, 4], [-1, 1, 3, 5]).matrix.shape
    (3, 2)
    """
    source = store if isinstance(store, Store) else Store(store)
    edges_t, edges_r = check_edges("truth_edges", truth_edges), check_edges("reco_edges", reco_edges)
    sums = PairHistograms(edges_t, edges_r)
    with or_none(progress).task("response", source.n_rows) as task:
        for part in _parts(source, truth, reco, weights, reco_pass, failed):
            for name, block in (("truth", part.truth), ("reco", part.reco)):
                if block.shape[1] != 1:
                    raise ShapeError(f"{name} has {block.shape[1]} columns; expected 1 for a matrix, use read_pairs and an unbinned method")
            sums.add(part.truth[:, 0], part.reco[:, 0], part.weights, part.reco_pass)
            task.advance(len(part.truth))
    return sums.response(background, exposure)


def _parts(
    store: Store | str | PathLike[str], truth: Names, reco: Names, weights: str | None, reco_pass: str | None, failed: str
) -> Iterator[Pairs]:
    """Yield the pairs of each shard in turn."""
    source = store if isinstance(store, Store) else Store(store)
    require_choice("failed", failed, FAILED)
    columns = _columns(source)
    pick_t, pick_r = _pick("truth", truth, columns), _pick("reco", reco, columns)
    single = {
        name: _pick(name, column, columns, 1) for name, column in (("weights", weights), ("reco_pass", reco_pass)) if column is not None
    }
    first = 0
    for theta, x, status in source.shards():
        table = np.hstack([theta, x.astype(np.float64)])
        lost = status != 0
        if lost.any() and failed == "error":
            raise DataError(
                f"{source.path} has {source.n_failed} failed rows, first row {first + int(np.argmax(lost))}; expected none, or"
                " failed='missed' (rows whose x is not finite are events without reconstruction) or failed='drop'"
            )
        keep = ~lost | (status == _NOT_FINITE) if failed == "missed" else ~lost
        first += len(table)
        if keep.any():
            yield _part(table[keep], ~lost[keep], pick_t, pick_r, single)


def _part(table: Array, found: Mask, pick_t: NDArray[np.intp], pick_r: NDArray[np.intp], single: dict[str, NDArray[np.intp]]) -> Pairs:
    n = len(table)
    passed = found.copy()
    if "reco_pass" in single:
        mask = table[:, single["reco_pass"][0]]
        passed &= check_mask("reco_pass", np.where(found, mask, 0.0), n)
    w = np.ones(n) if "weights" not in single else check_nonnegative("weights", table[:, single["weights"][0]], (n,))
    truth = table[:, pick_t]
    require_finite("truth", truth)
    return Pairs(truth, np.where(passed[:, None], table[:, pick_r], 0.0), w, passed)


def _columns(store: Store) -> dict[str, NDArray[np.intp]]:
    """Name -> its columns in [theta, x]; an observable of a parameter's name is found as "x.name"."""
    columns = {p.name: np.array([i], dtype=np.intp) for i, p in enumerate(store.parameters)}
    start = len(columns)
    for o in store.observables:
        columns["x." + o.name if o.name in columns else o.name] = np.arange(start, start + o.size, dtype=np.intp)
        start += o.size
    return columns


def _pick(what: str, names: Names, columns: dict[str, NDArray[np.intp]], size: int | None = None) -> NDArray[np.intp]:
    wanted = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in wanted if name not in columns]
    if unknown or not wanted:
        got = f"names {unknown[0]!r}, which is not in the store" if unknown else "is empty"
        raise SettingError(f"{what} {got}; expected some of {', '.join(columns)}")
    picked = np.concatenate([columns[name] for name in wanted])
    if size is not None and picked.size != size:
        raise ShapeError(f"{what} names {picked.size} columns; expected {size}")
    return picked
