"""Posterior draws for other programs: CSV, NumPy, NetCDF (ArviZ), a LaTeX table or a corner plot, each with the origin of the draws.

The origin is a dictionary of JSON values: what the caller gives, and version and commit of this package. It is written

    CSV, LaTeX     as comment lines at the top, beginning with '#' and '%'
    .npz           as the array `attrs`, JSON text
    .npy           into a second file beside it, NAME.npy.json
    NetCDF         as the attribute `sbi_phys` of the root
    PNG, PDF, SVG  as metadata

Files are complete or not there at all, and hold no date: the same draws give the same bytes.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sbi_phys.core.checks import as_array, as_matrix, did_you_mean
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.files import open_aside, write_aside
from sbi_phys.core.provenance import git_commit
from sbi_phys.core.results import Rows, plain
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.core.version import __version__
from sbi_phys.priors import Parameter
from sbi_phys.report.arviz import chains_to_dict, to_inference_data, write_netcdf
from sbi_phys.report.tables import posterior_table

__all__ = ["FORMATS", "export_draws"]

_SUFFIXES = {
    ".csv": "csv", ".npz": "npz", ".npy": "npy", ".nc": "netcdf", ".tex": "latex", ".pdf": "corner", ".png": "corner", ".svg": "corner",
}  # fmt: skip
FORMATS = tuple(dict.fromkeys(_SUFFIXES.values()))
_PICTURES = tuple(suffix for suffix, name in _SUFFIXES.items() if name == "corner")


def export_draws(
    theta: ArrayLike,
    parameters: Sequence[Parameter],
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    log_prob: ArrayLike | None = None,
    attrs: Mapping[str, Any] | None = None,
) -> Path:
    """Write posterior draws to one file -> its path.

    Args:
        theta: (n, d), in the parameters' units; n >= 2.
        parameters: of the d columns.
        path: of the file; missing folders are made.
        format: 'csv', 'npz', 'npy', 'netcdf', 'latex' (table of medians, intervals and means, rounded to the errors) or 'corner'
            (a figure, .pdf, .png or .svg); None: by the suffix of the path (.csv, .npz, .npy, .nc, .tex, .pdf, .png, .svg).
        log_prob: (n,), log density of the draws; a further column `log_prob`, or `lp` of the group sample_stats of NetCDF.
        attrs: origin of the draws, JSON values: observation, network, seed, ...

    Raises: SettingError (format or suffix), ShapeError, NonFiniteError, DataError (too few draws, attrs that are no JSON), WriteError.
    Read back: `pandas.read_csv(path, comment="#")`, `np.load(path)["theta"]`, `read_netcdf(path)`.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> draws = np.array([[1.0], [2.0], [4.0]])
    >>> path = sp.report.export_draws(draws, [sp.Parameter("mass", 0, 10, unit="kg")], "draws.csv", attrs={"observation": "crab"})
    >>> print(path.read_text().splitlines()[1:3])
    ['mass [kg]', '1.0']
    """
    names = [p.name for p in parameters]
    if len(set(names)) < len(names):
        raise SettingError(f"parameters have the names {names}; expected different ones")
    draws = as_matrix("theta", theta, len(names), names)
    if len(draws) < 2:
        raise DataError(f"theta has {len(draws)} rows; expected at least 2 draws")
    density = None if log_prob is None else as_array("log_prob", log_prob, (len(draws),), note="one per draw")
    if density is not None and "log_prob" in names:
        raise SettingError("a parameter is called log_prob and log_prob was given; expected another name of the parameter")
    target = Path(path)
    writers: dict[str, Callable[[Path, Array, Sequence[Parameter], Array | None, dict[str, Any]], None]] = {
        "csv": _csv, "npz": _npz, "npy": _npy, "netcdf": _netcdf, "latex": _latex, "corner": _corner,
    }  # fmt: skip
    writers[_format(target, format)](target, draws, parameters, density, _origin(attrs))
    return target


def _format(path: Path, format: str | None) -> str:
    suffix = path.suffix.lower()
    if format is None:
        if suffix not in _SUFFIXES:
            raise SettingError(f"path is {str(path)!r}; expected a suffix of {', '.join(_SUFFIXES)}, or format=...")
        return _SUFFIXES[suffix]
    if format not in FORMATS:
        raise SettingError(f"format is {format!r}{did_you_mean(str(format), FORMATS)}; expected one of {', '.join(FORMATS)}")
    if format == "corner" and suffix not in _PICTURES:
        raise SettingError(f"path is {str(path)!r}; expected a suffix of {', '.join(_PICTURES)} for a corner plot")
    return format


def _origin(attrs: Mapping[str, Any] | None) -> dict[str, Any]:
    origin = {"sbi_phys": __version__, "commit": git_commit()} | dict(attrs or {})
    try:
        json.dumps(origin, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise DataError(f"attrs cannot be written as JSON: {err}; expected numbers, text, lists and dicts") from err
    return dict(plain(origin))


def _text(origin: dict[str, Any]) -> str:
    return json.dumps(origin, sort_keys=True, ensure_ascii=True)


def _csv(path: Path, theta: Array, parameters: Sequence[Parameter], log_prob: Array | None, origin: dict[str, Any]) -> None:
    header = [f"{p.name} [{p.unit}]" if p.unit else p.name for p in parameters]
    table = theta
    if log_prob is not None:
        header, table = [*header, "log_prob"], np.column_stack([theta, log_prob])
    out = io.StringIO()
    out.write(f"# {_text(origin)}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(table.tolist())
    write_aside(path, out.getvalue(), make_folder=True)


def _npz(path: Path, theta: Array, parameters: Sequence[Parameter], log_prob: Array | None, origin: dict[str, Any]) -> None:
    arrays: dict[str, Any] = {"theta": theta, "names": [p.name for p in parameters], "units": [p.unit for p in parameters]}
    arrays |= {"attrs": _text(origin)} | ({} if log_prob is None else {"log_prob": log_prob})
    with open_aside(path, make_folder=True) as file:
        np.savez(file, **arrays)


def _npy(path: Path, theta: Array, parameters: Sequence[Parameter], log_prob: Array | None, origin: dict[str, Any]) -> None:
    columns = [{"name": p.name, "unit": p.unit} for p in parameters]
    if log_prob is not None:
        columns, theta = [*columns, {"name": "log_prob", "unit": "nats"}], np.column_stack([theta, log_prob])
    beside = path.with_name(path.name + ".json")
    write_aside(beside, _text({"columns": columns, "attrs": origin}) + "\n", make_folder=True)
    with open_aside(path) as file:
        np.save(file, theta)


def _netcdf(path: Path, theta: Array, parameters: Sequence[Parameter], log_prob: Array | None, origin: dict[str, Any]) -> None:
    chain = chains_to_dict(theta, [p.name for p in parameters])
    stats = None if log_prob is None else {"lp": log_prob[None]}
    write_netcdf(path, to_inference_data(chain, sample_stats=stats, attrs=origin, parameters=parameters))


def _latex(path: Path, theta: Array, parameters: Sequence[Parameter], log_prob: Array | None, origin: dict[str, Any]) -> None:
    found = posterior_table(theta, parameters)
    columns: dict[str, Any] = {"parameter": [row.label for row in found]}
    if any(row.unit for row in found):
        columns["unit"] = [row.unit for row in found]
    columns |= {name: [getattr(row, name) for row in found] for name in ("q50", "q16", "q84", "q025", "q975", "mean", "sd")}
    columns = {{"q50": "median", "q025": "2.5 %", "q975": "97.5 %"}.get(name, name): values for name, values in columns.items()}
    rows = Rows.of(columns, errors={"median": ("q16", "q84"), "mean": ("sd",)})
    note = "% median with the central 68 % interval, ends of the central 95 % interval, mean and standard deviation; package booktabs\n"
    write_aside(path, f"% {_text(origin)}\n{note}{rows.latex()}", make_folder=True)


def _corner(path: Path, theta: Array, parameters: Sequence[Parameter], log_prob: Array | None, origin: dict[str, Any]) -> None:
    from sbi_phys.plotting.corner import corner_figure
    from sbi_phys.plotting.style import house_style

    figure, kind = corner_figure({"posterior": theta}, parameters), path.suffix.lower()[1:]
    metadata: dict[str, Any] = {
        "png": {"Software": None, "Comment": _text(origin)},
        "pdf": {"CreationDate": None, "Creator": None, "Producer": None, "Keywords": _text(origin)},
        "svg": {"Date": None, "Creator": None, "Description": _text(origin)},
    }[kind]
    with house_style(), open_aside(path, make_folder=True) as file:
        figure.savefig(file, format=kind, dpi=150, metadata=metadata)
