"""What an HDF5 file may hold: arrays whose values are in the file itself, of numbers and text, compressed by known methods.

HDF5 lets a dataset take its values from any other file (external storage, links, virtual datasets), declare a shape of any size
without values, and name a filter that is loaded as code. A file from elsewhere is therefore looked at before its values are read.
"""

import os
from pathlib import Path

import h5py

from sbi_phys.core.errors import DataError, SbiPhysError

__all__ = ["require_inside"]

_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_LZF, h5py.h5z.FILTER_FLETCHER32}
_SMALL = 2**20  # bytes that may be declared without values: dimensions of a NetCDF file have none
_MOST_EXPANSION = 1100  # bytes of values for one byte in the file; deflate reaches 1032


def require_inside(
    file: h5py.File,
    path: str | os.PathLike[str],
    *,
    kinds: str = "fiuS",
    groups: bool = False,
    error: type[SbiPhysError] = DataError,
    advice: str = "",
) -> None:
    """Raise `error` unless all arrays of an open file have their values in it.

    Args: kinds: of numpy's dtypes, that arrays may have. groups: whether the file may have groups. advice: last words of the message.

    >>> with h5py.File("a.h5", "w") as file:
    ...     file["x"] = [1.0, 2.0]
    ...     require_inside(file, "a.h5")
    ...     file["y"] = h5py.ExternalLink("b.h5", "x")
    ...     require_inside(file, "a.h5")
    Traceback (most recent call last):
    ...
    sbi_phys.core.errors.DataError: a.h5 is damaged: y is no array in this file; expected arrays of numbers and text
    """
    where, own = Path(path), {"."}
    todo: list[tuple[str, h5py.h5g.GroupID]] = [("", file.id)]
    seen = set()
    while todo:
        prefix, group = todo.pop()
        for raw in group:
            name = f"{prefix}{raw.decode('utf-8', 'replace')}"
            found = h5py.h5o.open(group, raw) if group.links.get_info(raw).type == h5py.h5l.TYPE_HARD else None
            if groups and isinstance(found, h5py.h5g.GroupID):
                address = h5py.h5o.get_info(found).addr
                if address in seen:
                    raise error(f"{where} is damaged: the group {name} holds itself; expected a tree of groups{advice}")
                seen.add(address)
                todo.append((f"{name}/", found))
            elif not isinstance(found, h5py.h5d.DatasetID) or found.dtype.kind not in kinds:
                raise error(f"{where} is damaged: {name:.100} is no array in this file; expected arrays of numbers and text{advice}")
            else:
                fault = _fault(found, own)
                if fault:
                    raise error(f"{where}: the values of {name:.100} {fault}{advice}")


def _fault(dataset: h5py.h5d.DatasetID, own: set[str]) -> str:
    """What is wrong with a dataset, '' if nothing is."""
    plan, n_bytes = dataset.get_create_plist(), dataset.dtype.itemsize
    for length in dataset.shape:
        n_bytes *= length
    if plan.get_external_count():
        return "lie in another file; expected all of them in this one"
    if plan.get_layout() == h5py.h5d.VIRTUAL:
        sources = {plan.get_virtual_filename(i) for i in range(plan.get_virtual_count())}
        if not sources <= own:
            return f"lie in {sorted(sources)}; expected all of them in this one"
    elif n_bytes > _MOST_EXPANSION * dataset.get_storage_size() and n_bytes > _SMALL:
        return f"have shape {dataset.shape} and {dataset.get_storage_size()} bytes in the file; expected about {n_bytes} bytes"
    if not {plan.get_filter(i)[0] for i in range(plan.get_nfilters())} <= _FILTERS:
        return "are compressed by an unknown method; expected gzip or lzf"
    return ""
