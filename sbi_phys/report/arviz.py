"""Posterior files that ArviZ reads: NetCDF groups, the same for arviz 0.2x (InferenceData) and 1.x (xarray DataTree).

Only this module imports arviz, and only when a function is called. The file is NetCDF 4 written by h5netcdf, which
xarray, h5py and other languages also read. Seeds and versions are stored as JSON in the attribute `sbi_phys` of the
file's root; units and labels are attributes of each variable.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from sbi_phys.core.checks import as_real, require_finite
from sbi_phys.core.checksums import append_trailer, has_trailer
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.files import open_aside
from sbi_phys.core.hdf5 import require_inside
from sbi_phys.core.types import AnyArray, Array, ArrayLike
from sbi_phys.priors import Parameter

__all__ = [
    "attributes", "chains_to_dict", "group", "groups", "read_netcdf", "spectra_to_inference_data", "to_inference_data", "write_netcdf",
]  # fmt: skip

Variables = Mapping[str, ArrayLike]
_NOTE = "sbi_phys"
_SEALED = "sbi_phys_checksum"  # where it stands; the file then ends with it


def to_inference_data(
    posterior: Variables,
    *,
    prior: Variables | None = None,
    sample_stats: Variables | None = None,
    observed_data: Variables | None = None,
    posterior_predictive: Variables | None = None,
    log_likelihood: Variables | None = None,
    attrs: Mapping[str, Any] | None = None,
    parameters: Sequence[Parameter] = (),
) -> Any:
    """arviz.InferenceData (arviz 0.2x) or xarray.DataTree (arviz 1.x) of named arrays.

    Args: posterior, {name: (chains, draws, ...)}; prior, sample_stats, posterior_predictive, log_likelihood likewise (the
    last three with the posterior's chains and draws, predictions may be fewer); observed_data, {name: (k, ...)};
    attrs, JSON-able, stored as one text: seeds, versions, settings; parameters, for unit and label of the variables with their names.
    Raises: ShapeError, NonFiniteError (posterior), DataError.   Source: ArviZ InferenceData schema, doi:10.21105/joss.01143.

    >>> import numpy as np
    >>> from sbi_phys.report import group, to_inference_data
    >>> data = to_inference_data({"mass": np.zeros((1, 50))})
    >>> group(data, "posterior")["mass"].shape
    (1, 50)
    """
    if not posterior:
        raise DataError("posterior is empty; expected {name: (chains, draws)}")
    data: dict[str, dict[str, Array]] = {"posterior": _sampled("posterior", posterior)}
    for array in data["posterior"].values():
        require_finite("posterior", array)
    shape = next(iter(data["posterior"].values())).shape[:2]
    optional = {
        "prior": prior,
        "posterior_predictive": posterior_predictive,
        "sample_stats": sample_stats,
        "log_likelihood": log_likelihood,
    }
    for name, variables in optional.items():
        if variables:
            data[name] = _sampled(name, variables, shape if name in ("sample_stats", "log_likelihood") else None)
    if observed_data:
        data["observed_data"] = {k: as_real(f"observed_data[{k!r}]", v) for k, v in observed_data.items()}
    tree = _convert(data)
    tree.attrs[_NOTE] = _to_json(attrs or {})
    units = {p.name: p for p in parameters}
    for name in ("posterior", "prior"):
        for key in data.get(name, {}):
            if key in units:
                tree[name][key].attrs.update(units=units[key].unit, long_name=units[key].latex or key)
    return tree


def spectra_to_inference_data(
    posterior: Variables, constants: Variables, observed_data: Variables, *, lg_energy: ArrayLike, attrs: Mapping[str, Any] | None = None
) -> Any:
    """Draws of binned spectra {name: (n, r)} as one chain, with the bin centres lg_energy (r,) as coordinate of each array.

    Args: constants, {name: (r,) or (r, r)}: point estimates, covariances, published values; observed_data, {name: (r,)}; attrs, JSON-able.
    Raises: ShapeError, NonFiniteError (posterior), DataError.
    """
    centres = as_real("lg_energy", lg_energy)
    r = centres.size
    draws = {k: as_real(f"posterior[{k!r}]", v) for k, v in posterior.items()}
    if not draws:
        raise DataError("posterior is empty; expected {name: (n, r)}")
    fixed = {k: as_real(f"constants[{k!r}]", v) for k, v in constants.items()}
    seen = {k: as_real(f"observed_data[{k!r}]", v) for k, v in observed_data.items()}
    if len(draws | fixed | seen) < len(draws) + len(fixed) + len(seen):
        raise DataError("posterior, constants and observed_data share a name; expected different names, each has its own dimensions")
    for name, array in (draws | fixed | seen).items():
        wanted = ((len(array), r),) if name in draws else ((r,),) if name in seen else ((r,), (r, r))
        if array.shape not in wanted:
            raise ShapeError(f"{name} has shape {array.shape}; expected {' or '.join(map(str, wanted))}, {r} bins")
    for name, array in draws.items():
        require_finite(name, array)
    axes = ("lg_energy", "lg_energy_other")
    dims = {k: list(axes[: a.ndim]) for k, a in (fixed | seen).items()} | {k: list(axes[:1]) for k in draws}
    data = {"posterior": {k: a[None] for k, a in draws.items()}, "observed_data": seen, "constant_data": fixed}
    tree = _convert(data, coords=dict.fromkeys(axes, centres), dims=dims)
    tree.attrs[_NOTE] = _to_json(attrs or {})
    return tree


def write_netcdf(path: str | os.PathLike[str], data: Any) -> Path:
    """Write the result of `to_inference_data` to `path` and return the path.   Raises: DataError for anything else.

    >>> import numpy as np
    >>> from sbi_phys.report import to_inference_data, write_netcdf
    >>> data = to_inference_data({"mass": np.zeros((1, 50))})
    >>> write_netcdf("posterior.nc", data).name
    'posterior.nc'
    """
    if not hasattr(data, "to_netcdf") or "posterior" not in groups(data):
        raise DataError(f"data is a {type(data).__name__}; expected an InferenceData or DataTree with a group 'posterior'")
    data.attrs[_SEALED] = "CRC-32 behind the content"
    try:
        with open_aside(path, make_folder=True) as file:
            data.to_netcdf(str(file.name), engine="h5netcdf")
            append_trailer(file)
    finally:
        del data.attrs[_SEALED]
    return Path(path)


def read_netcdf(path: str | os.PathLike[str]) -> Any:
    """Read a file into memory and close it -> InferenceData (arviz 0.2x) or DataTree (arviz 1.x), whichever version wrote it.

    A file that `write_netcdf` wrote is compared with its checksum before anything is read.
    Raises: DataError for a file that is missing, truncated, damaged, no NetCDF, without a group 'posterior', or with values that lie
    in other files.

    >>> import numpy as np
    >>> from sbi_phys.report import group, read_netcdf, to_inference_data, write_netcdf
    >>> data = to_inference_data({"mass": np.zeros((1, 50))})
    >>> group(read_netcdf(write_netcdf("posterior.nc", data)), "posterior")["mass"].shape
    (1, 50)
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a NetCDF file with a group 'posterior'")
    arviz = _import_arviz()
    try:
        sealed = has_trailer(path)
        with h5py.File(path, "r") as file:
            require_inside(file, path, kinds="fiuSOb", groups=True)
        if _old(arviz):
            with arviz.rc_context({"data.load": "eager"}):
                data = arviz.from_netcdf(str(path), engine="h5netcdf")
        else:
            with arviz.from_netcdf(str(path), engine="h5netcdf") as lazy:
                data = lazy.load().copy(deep=True)
    except DataError:
        raise
    except (OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, AssertionError, MemoryError, ArithmeticError) as err:
        raise DataError(f"{path} is not a readable NetCDF file (truncated, or written by something else): {err}") from err
    if not sealed and _SEALED in data.attrs:
        raise DataError(f"{path} is damaged: the checksum behind its content is missing; expected the file as it was written")
    data.attrs.pop(_SEALED, None)
    if "posterior" not in groups(data):
        raise DataError(f"{path} has groups {groups(data)}; expected 'posterior' among them")
    return data


def groups(data: Any) -> tuple[str, ...]:
    """Names of the groups of an InferenceData or DataTree."""
    if hasattr(data, "children"):
        return tuple(data.children)
    return tuple(data.groups()) if callable(getattr(data, "groups", None)) else ()


def group(data: Any, name: str) -> dict[str, AnyArray]:
    """One group of an InferenceData or DataTree as {variable: array}.   Raises: DataError.

    >>> import numpy as np
    >>> from sbi_phys.report import group, to_inference_data
    >>> data = to_inference_data({"mass": np.zeros((1, 50))})
    >>> list(group(data, "posterior"))
    ['mass']
    """
    if name not in groups(data):
        raise DataError(f"group {name!r} is missing; expected one of {groups(data)}")
    return {str(key): np.asarray(variable.values) for key, variable in data[name].data_vars.items()}


def attributes(data: Any) -> dict[str, Any]:
    """The `attrs` given to `to_inference_data`, or {} for a file without them."""
    try:
        out = json.loads(data.attrs.get(_NOTE, "{}"))
    except (TypeError, ValueError) as err:
        raise DataError(f"attribute {_NOTE!r} is not JSON: {err}") from err
    if not isinstance(out, dict):
        raise DataError(f"attribute {_NOTE!r} holds a {type(out).__name__}; expected a JSON object")
    return out


def chains_to_dict(samples: ArrayLike, names: Sequence[str]) -> dict[str, Array]:
    """Draws (n, d), taken as one chain, or chains (c, n, d) -> {name: (c, n)}.   Raises: ShapeError, DataError.

    >>> import numpy as np
    >>> from sbi_phys.report import chains_to_dict
    >>> chains_to_dict(np.zeros((50, 2)), ["mass", "rate"])["rate"].shape
    (1, 50)
    """
    array = as_real("samples", samples)
    if array.ndim not in (2, 3) or array.shape[-1] != len(names):
        raise ShapeError(f"samples has shape {array.shape}; expected (n, {len(names)}) or (chains, n, {len(names)}) = {tuple(names)}")
    array = array[None] if array.ndim == 2 else array
    return {name: array[:, :, k] for k, name in enumerate(names)}


def _sampled(name: str, variables: Variables, shape: tuple[int, ...] | None = None) -> dict[str, Array]:
    """The arrays, checked for equal leading dimensions (chains, draws)."""
    out = {key: as_real(f"{name}[{key!r}]", value) for key, value in variables.items()}
    for key, array in out.items():
        wanted = shape or next(iter(out.values())).shape[:2]
        if array.ndim < 2 or array.shape[:2] != wanted or not array.size:
            note = f"{wanted} + event shape" if len(wanted) == 2 else "(chains, draws, ...)"
            raise ShapeError(f"{name}[{key!r}] has shape {array.shape}; expected {note}")
    return out


def _import_arviz() -> Any:
    with warnings.catch_warnings():
        # 0.23 warns of the 1.x refactoring at each import; this module supports both
        warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
        warnings.filterwarnings("ignore", message=r"\s*ArviZ is undergoing", category=FutureWarning)
        import arviz
    return arviz


def _old(arviz: Any) -> bool:
    # not hasattr: 1.x warns on access to a missing name
    return "InferenceData" in vars(arviz)


def _convert(data: dict[str, dict[str, Array]], **named: Any) -> Any:
    arviz = _import_arviz()
    # arviz warns of more chains than draws, as for a transposed array; shapes were checked above
    if _old(arviz):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="More chains", category=UserWarning)
            tree = arviz.from_dict(**data, **named)
    else:
        tree = arviz.from_dict(data, check_conventions=False, **named)
    for name in groups(tree):
        tree[name].attrs.pop("created_at", None)  # the file must not depend on the time
    return tree


def _to_json(attrs: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(attrs), sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as err:
        raise DataError(f"attrs cannot be written as JSON: {err}; expected numbers, text, lists and dicts") from err
