r"""A measured spectrum to be unfolded, with its response: loaded by name or from a CSV file, and checked once.

Fine true bins (at most 0.02 wide in lg E) have the response P(j | f). With a spectrum s_f within them, wide true bins have

    P[j, mu] = sum_{f in mu} P(j | f) s_f / sum_{f in mu} s_f .

The true bins reach below and above the measured ones, because a steep spectrum moves many events from below into the first measured bin.
Two responses follow:

extended   the outer bins are true bins like the others; for methods with more unknowns than measurements, or with a parametric flux.
inner      true bins = measured bins; the events that migrate in from outside are a share phi_j of bin j, given by the spectrum,
           phi_j = sum_{f outside} P(j | f) s_f / sum_f P(j | f) s_f ; these are the fakes of `response`.
"""

import csv
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.core.checks import as_array, did_you_mean, require_int, require_known, require_number
from sbi_phys.core.errors import DataError, SbiPhysError, SettingError
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.simulation.protocol import require_foreign
from sbi_phys.unfold._inputs import check_counts, check_edges, check_nonnegative
from sbi_phys.unfold.response import Response

__all__ = ["NAMED", "Measurement", "load_measurement", "read_measurement"]

Matrix = Callable[[Array], ArrayLike]

# named problems; the package imports one only when it is requested
NAMED = {"auger": "simulators.auger_unfolding:Auger2020"}
FINE = 0.02  # lg(E): widest true bin in which the spectrum may count as flat
_COLUMNS = ("lg_e_low", "lg_e_high", "counts")
_PUBLISHED = ("flux", "flux_error_low", "flux_error_high", "correction")
_REACH = 4.0  # resolutions below the first and above the last measured edge


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurement:
    """Counts in bins of lg(E/eV) with the response, checked.

    name, title, source, unit (of the flux): words. counts (r,), whole numbers. reco_edges (r + 1,), among truth_edges (t + 1,).
    matrix(edges (n + 1,)) -> (r, n): P(measured bin | true bin) for fine bins. exposure, km2 sr yr. start, n_breaks: of a fit's flux,
    None without. published: 'flux', 'flux_error_low', 'flux_error_high', 'correction', (r,) each, where published. target: lg(E) from,
    to, tolerance, or None. alternatives: name -> measurement with another detector, for its corrections alone; note: words on them.
    variations: words -> measurement with a constant of the detector changed by its uncertainty.

    Raises: ShapeError, NonFiniteError, DataError, SettingError.

    >>> from pathlib import Path
    >>> from sbi_phys.unfold import read_measurement
    >>> rows = ["lg_e_low,lg_e_high,counts", "18.5,18.6,400", "18.6,18.7,250", "18.7,18.8,160"]
    >>> _ = Path("counts.csv").write_text(chr(10).join(rows))
    >>> measurement = read_measurement("counts.csv", resolution=0.1)
    >>> import numpy as np
    >>> measurement.within(np.ones(measurement.fine_edges.size - 1)).matrix.shape
    (3, 3)
    """

    name: str
    title: str
    source: str
    unit: str
    counts: Array
    reco_edges: Array
    truth_edges: Array
    matrix: Matrix
    exposure: float = 1.0
    n_breaks: int = 0
    start: Array | None = None
    published: Mapping[str, Array] = field(default_factory=dict)
    target: tuple[float, float, float] | None = None
    alternatives: Mapping[str, "Measurement"] = field(default_factory=dict)
    note: str = ""
    variations: Mapping[str, "Measurement"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        reco = check_edges("reco_edges", self.reco_edges)
        truth = check_edges("truth_edges", self.truth_edges)
        counts = check_counts(self.counts, reco.size - 1, reco)
        if not np.array_equal(counts, np.rint(counts)):
            j = int(np.flatnonzero(counts != np.rint(counts))[0])
            raise DataError(f"counts is {counts[j]:g} in bin {j} [{reco[j]:g}, {reco[j + 1]:g}); expected whole numbers of events")
        first = int(np.abs(truth - reco[0]).argmin())
        part = truth[first : first + reco.size]
        if part.size < reco.size or not np.allclose(part, reco, rtol=0, atol=1e-6):
            raise DataError(
                f"truth_edges run from {truth[0]:g} to {truth[-1]:g} in {truth.size - 1} bins; expected all measured edges"
                f" {reco[0]:g} to {reco[-1]:g} among them, and bins beyond both ends"
            )
        require_number("exposure", self.exposure, low=0, open_low=True)
        require_int("n_breaks", self.n_breaks, low=0, high=10)
        require_known("published", self.published, _PUBLISHED)
        published = {key: as_array(f"published {key}", value, (counts.size,)) for key, value in self.published.items()}
        values = {"counts": counts, "reco_edges": reco, "truth_edges": truth, "published": published}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def centres(self) -> Array:
        """Middles of the measured bins (r,), lg(E/eV)."""
        return (self.reco_edges[1:] + self.reco_edges[:-1]) / 2

    @property
    def inner(self) -> slice:
        """Slice of the true bins that are measured bins."""
        first = int(np.abs(self.truth_edges - self.reco_edges[0]).argmin())
        return slice(first, first + self.counts.size)

    @property
    def per_flux(self) -> Array:
        """exposure x bin width in eV, (r,): counts over this are a flux."""
        return self.exposure * np.diff(10.0**self.reco_edges)

    @cached_property
    def _grid(self) -> tuple[Array, NDArray[np.intp]]:
        parts = np.ceil(np.diff(self.truth_edges) / FINE - 1e-9).astype(int)
        pieces = [np.linspace(a, b, n, endpoint=False) for a, b, n in zip(self.truth_edges[:-1], self.truth_edges[1:], parts, strict=True)]
        return np.append(np.concatenate(pieces), self.truth_edges[-1]), np.repeat(np.arange(parts.size), parts)

    @property
    def fine_edges(self) -> Array:
        """Edges of the fine true bins (f + 1,), lg(E/eV)."""
        return self._grid[0]

    @cached_property
    def fine(self) -> Response:
        """Response of the fine true bins.   Raises: ShapeError, NonFiniteError, DataError (errors of the given matrix)."""
        edges = self.fine_edges
        given = np.asarray(self.matrix(edges), dtype=np.float64)
        # differences of distribution functions may round to just below zero
        matrix = check_nonnegative("response", np.where(np.abs(given) < 1e-12, 0.0, given), (self.counts.size, edges.size - 1))
        # true bins that do not reach a measured bin (below 1e-12) get a negligible column instead of zeros, which Response refuses
        return Response(np.maximum(matrix, 1e-30), edges, self.reco_edges, exposure=self.exposure)

    def coarse(self, fine_counts: ArrayLike) -> Array:
        """Sum fine true bins (..., f) to the true bins (..., t)."""
        n = np.asarray(fine_counts, dtype=np.float64)
        starts = np.flatnonzero(np.diff(self._grid[1], prepend=-1))
        return np.asarray(np.add.reduceat(n, starts, axis=-1))

    def extended(self, spectrum: ArrayLike) -> Response:
        """Response of all true bins, for a spectrum (f,) > 0 within them.   Raises: ShapeError, DataError."""
        s = self._spectrum(spectrum)
        folded = self.coarse(self.fine.matrix * s)
        return Response(folded / self.coarse(s), self.truth_edges, self.reco_edges, truth=self.coarse(s), exposure=self.exposure)

    def within(self, spectrum: ArrayLike) -> Response:
        """Response of the true bins that are measured; events from outside are a share of each bin (fakes).

        Raises: ShapeError, DataError.
        """
        s = self._spectrum(spectrum)
        folded, wide = self.coarse(self.fine.matrix * s), self.coarse(s)
        inner = self.inner
        outside = 1 - folded[:, inner].sum(axis=1) / folded.sum(axis=1)
        return Response(
            folded[:, inner] / wide[inner],
            self.reco_edges,
            self.reco_edges,
            truth=wide[inner],
            fakes=np.maximum(outside, 0),
            exposure=self.exposure,
        )

    def _spectrum(self, spectrum: ArrayLike) -> Array:
        s = check_nonnegative("spectrum", spectrum, (self.fine_edges.size - 1,))
        if (s <= 0).any():
            raise DataError(f"spectrum is 0 in fine true bin {int(np.flatnonzero(s <= 0)[0])}; expected > 0 everywhere")
        return s


def load_measurement(spec: str, settings: Mapping[str, Any] | None = None) -> Measurement:
    """Build the problem of that name, or of 'package.module:Class', with settings.

    A class needs counts, reco_edges, truth_edges and response(edges) -> (r, n); exposure, title, source, unit, start, n_breaks, published,
    target, alternatives, variations and note are optional.
    Raises: SettingError (unknown name, module, class or setting), DataError, ShapeError.

    >>> from sbi_phys.unfold import load_measurement
    >>> auger = load_measurement("auger")
    >>> auger.counts.shape == auger.centres.shape, "Auger" in auger.title
    (True, True)
    """
    path = NAMED.get(spec, spec)
    module_name, colon, class_name = path.partition(":")
    if not (colon and module_name and class_name):
        known = ", ".join(NAMED)
        hint = did_you_mean(spec, NAMED)
        raise SettingError(f"unfolding problem {spec!r} is not known; expected one of {known}, or package.module:Class{hint}")
    kind = _find(module_name, class_name)
    chosen = dict(settings or {})
    require_known(f"settings of {spec}", chosen, inspect.signature(kind).parameters)
    try:
        problem = kind(**chosen)
    except SbiPhysError:
        raise
    except (TypeError, ValueError) as err:  # the module of a problem does not use this package's errors
        raise SettingError(f"{spec} cannot be built with settings {chosen}: {err}") from err
    for name in ("counts", "reco_edges", "truth_edges", "response"):
        if not hasattr(problem, name):
            raise SettingError(f"{path} has no {name!r}; expected counts, reco_edges, truth_edges and response(truth_edges)")
    others, varied = (
        {name: load_measurement(spec, other) for name, other in getattr(problem, kind_of, {}).items()}
        for kind_of in ("alternatives", "variations")
    )
    start = getattr(problem, "start", None)
    return Measurement(
        name=str(getattr(problem, "name", class_name)),
        title=str(getattr(problem, "title", class_name)),
        source=str(getattr(problem, "source", "")),
        unit=str(getattr(problem, "unit", "")),
        counts=problem.counts,
        reco_edges=problem.reco_edges,
        truth_edges=problem.truth_edges,
        matrix=problem.response,
        exposure=float(getattr(problem, "exposure", 1.0)),
        n_breaks=int(getattr(problem, "n_breaks", 0)),
        start=None if start is None else as_array("start", start, (None,)),
        published=dict(getattr(problem, "published", {})),
        target=getattr(problem, "target", None),
        alternatives=others,
        variations=varied,
        note=str(getattr(problem, "note", "")),
    )


def _find(module_name: str, class_name: str) -> type:
    require_foreign(f"unfolding problem {module_name}:{class_name}", module_name)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as err:
        where = "; searched in the working directory and what is installed"
        raise SettingError(f"module {module_name!r} of the unfolding problem was not found: {err}{where}") from err
    except (TypeError, ValueError) as err:
        raise SettingError(f"module {module_name!r} of the unfolding problem cannot be imported: {err}") from err
    kind = getattr(module, class_name, None)
    if not isinstance(kind, type):
        classes = [name for name, value in vars(module).items() if isinstance(value, type) and hasattr(value, "response")]
        hint = did_you_mean(class_name, classes)
        raise SettingError(f"module {module_name} has no class {class_name!r}; it has {', '.join(classes) or 'no problems'}{hint}")
    # it is called next, and the name may come from a file
    require_foreign(f"unfolding problem {module_name}:{class_name}", kind.__module__)
    if not hasattr(kind, "response"):
        raise SettingError(f"{module_name}:{class_name} has no 'response'; expected counts, edges and response(truth_edges)")
    return kind


def read_measurement(path: str | Path, resolution: str | float, exposure: float = 1.0) -> Measurement:
    """Read counts from a CSV file with columns lg_e_low, lg_e_high, counts; lines that begin with '#' are skipped.

    Args: resolution, sigma(E)/E of the true energy: a number, or a CSV with columns lg_e, sigma (linear in between, flat outside).
    exposure, km2 sr yr.   Raises: DataError (file, columns, rows: named), SettingError, ShapeError.

    >>> from pathlib import Path
    >>> from sbi_phys.unfold import read_measurement
    >>> rows = ["lg_e_low,lg_e_high,counts", "18.5,18.6,400", "18.6,18.7,250", "18.7,18.8,160"]
    >>> _ = Path("counts.csv").write_text(chr(10).join(rows))
    >>> measurement = read_measurement("counts.csv", resolution=0.1)
    >>> measurement.counts, measurement.truth_edges.size > 4
    (array([400., 250., 160.]), True)
    """
    file = Path(path)
    table = _table(file, _COLUMNS)
    low, high, counts = (table[name] for name in _COLUMNS)
    gap = np.flatnonzero(np.abs(low[1:] - high[:-1]) > 1e-6)
    if gap.size:
        i = int(gap[0])
        raise DataError(
            f"{file}: row {i + 2} begins at {low[i + 1]:g} where the one before ends at {high[i]:g}; expected no gap between bins"
        )
    edges = np.append(low, high[-1])
    sigma = _resolution(resolution)
    widths = np.diff(check_edges(f"{file}: bin edges", edges))
    below = int(np.ceil(_REACH * float(sigma(edges[:1])[0]) / np.log(10) / widths[0]))
    above = int(np.ceil(_REACH / 2 * float(sigma(edges[-1:])[0]) / np.log(10) / widths[-1]))
    truth = np.concatenate([edges[0] - widths[0] * np.arange(below, 0, -1), edges, edges[-1] + widths[-1] * np.arange(1, above + 1)])

    def matrix(fine: Array) -> Array:
        # Gaussian in E: integrated on that axis, in units that keep the numbers near 1
        unit = edges[0]
        return Response.from_resolution(10.0 ** (fine - unit), 10.0 ** (edges - unit), lambda e: sigma(np.log10(e) + unit) * e).matrix

    return Measurement(
        name=file.stem,
        title=f"The spectrum in {file.name}",
        source=str(file),
        unit="",
        counts=counts,
        reco_edges=edges,
        truth_edges=truth,
        matrix=matrix,
        exposure=exposure,
    )


def _resolution(resolution: str | float) -> Callable[[Array], Array]:
    try:
        number = float(resolution)
    except ValueError:
        table = _table(Path(str(resolution)), ("lg_e", "sigma"))
        x, y = table["lg_e"], table["sigma"]
        if (np.diff(x) <= 0).any() or (y <= 0).any() or (y >= 1).any():
            raise DataError(f"{resolution}: expected increasing lg_e and 0 < sigma < 1, relative to the energy") from None
        return lambda lg: np.interp(lg, x, y)
    value = require_number("resolution", number, low=0, high=1, open_low=True, open_high=True)
    return lambda lg: np.full(np.shape(lg), value)


def _table(path: Path, columns: tuple[str, ...]) -> dict[str, Array]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as err:
        reason = err.strerror if isinstance(err, OSError) else "it is not UTF-8 text"
        raise DataError(f"{path} cannot be read: {reason}; expected a CSV file with columns {', '.join(columns)}") from err
    rows = list(csv.DictReader(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")))
    if not rows:
        raise DataError(f"{path} has no rows; expected a line with {','.join(columns)} and one line a bin")
    missing = [name for name in columns if name not in rows[0]]
    if missing:
        raise DataError(f"{path} has columns {', '.join(map(str, rows[0]))}; expected {', '.join(columns)}, {missing[0]} is missing")
    out = {}
    for name in columns:
        try:
            out[name] = as_array(f"{path}: {name}", [float(row[name]) for row in rows], (len(rows),))
        except (TypeError, ValueError) as err:
            if isinstance(err, SbiPhysError):
                raise
            bad = next(i for i, row in enumerate(rows) if not _is_number(row[name]))
            raise DataError(f"{path}: {name} is {rows[bad][name]!r} in row {bad + 1}; expected a number") from err
    return out


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return True
