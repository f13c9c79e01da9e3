"""Published data of the Pierre Auger Observatory in `simulators/data`, read and checked by `load_auger`.

Every file begins with its source, DOI and licence in lines that start with '#', followed by one line of column names and the numbers. A
file that is truncated, reordered or altered is refused with an error that names the file, the line, what was got and expected.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simulators.errors import TableError

__all__ = ["DATA_FOLDER", "AugerData", "load_auger"]

Array = NDArray[np.float64]
DATA_FOLDER = Path(__file__).resolve().parent / "data"

_FLUX = ("flux", "flux_err_low", "flux_err_high", "unfolding_correction", "unfolding_correction_err")
_SPECTRUM = ("lg_energy", "lg_half_width", "raw_counts", "exposure", *_FLUX)
_BIN = ("lg_energy_low", "lg_energy_high")
_RESOLUTION = (*_BIN, "sigma1", "sigma1_err", "sigma2", "sigma2_err", "k")
_ACCEPTANCE = (*_BIN, "x1", "x1_err", "x2", "x2_err", "l1", "l1_err", "l2", "l2_err")
_SYSTEMATICS = (*_BIN, "sigma_up", "sigma_low")
_HISTOGRAMS = (*_BIN, "n_events", *(f"n_{low}_{low + 20}" for low in range(0, 2000, 20)))
_SPECTRUM_EVENTS = 215030  # vertical events above 10^18.4 eV, Phys. Rev. D 102, 062005


@dataclass(frozen=True, eq=False)
class AugerData:
    """Spectrum (18 energy bins) and Xmax distributions (18 energy bins) as published.

    Args: spectrum_edges (19,), lg(E/eV). spectrum_counts (18,), events. exposure, km2 sr yr. flux, flux_err_low,
    flux_err_high (18,), km-2 sr-1 yr-1 eV-1, unfolded. unfolding_correction (18,), unfolded / raw.
    xmax_lg_edges (19,), lg(E/eV). xmax_edges (101,), g/cm2. xmax_counts (18, 100), events.
    resolution (18, 3): sigma1, sigma2 in g/cm2 and the weight k of the first Gaussian.
    acceptance (18, 4): x1, x2, l1, l2 in g/cm2, of true Xmax. systematics (18, 2): up, low in g/cm2.
    Source: Phys. Rev. D 102, 062005 (2020), arXiv:2008.06486; Phys. Rev. D 90, 122005 (2014), arXiv:1409.4809.

    >>> from simulators import load_auger
    >>> data = load_auger()
    >>> data.xmax_counts.shape, int(data.xmax_counts.sum())
    ((18, 100), 19759)
    """

    spectrum_edges: Array
    spectrum_counts: NDArray[np.int64]
    exposure: float
    flux: Array
    flux_err_low: Array
    flux_err_high: Array
    unfolding_correction: Array
    xmax_lg_edges: Array
    xmax_edges: Array
    xmax_counts: NDArray[np.int64]
    resolution: Array
    acceptance: Array
    systematics: Array


@dataclass(frozen=True, eq=False)
class _Table:
    path: Path
    columns: tuple[str, ...]
    values: Array  # (rows, columns)
    lines: tuple[int, ...]  # line number of each row, from 1

    def __getitem__(self, name: str) -> Array:
        return self.values[:, self.columns.index(name)]

    def refuse(self, row: int, got: str, expected: str) -> TableError:
        return TableError(f"{self.path}, line {self.lines[row]}: got {got}; expected {expected}")

    def require(self, ok: NDArray[np.bool_], name: str, expected: str) -> None:
        """Refuse the first row in which `ok` is false."""
        if not ok.all():
            row = int(np.flatnonzero(~ok)[0])
            raise self.refuse(row, f"{name} = {self[name][row]:g}", expected)


def load_auger(folder: Path | str | None = None) -> AugerData:
    """Read and check the five Auger tables -> `AugerData`, from `folder` or from the files of this package.

    Raises: TableError (file, line, got, expected) for a missing, truncated or altered file.

    >>> from simulators import load_auger
    >>> int(load_auger().spectrum_counts.sum())  # events above 10^18.4 eV
    215030
    """
    base = DATA_FOLDER if folder is None else Path(folder)
    spectrum = _read(base / "auger_2020_vertical_spectrum.csv", _SPECTRUM, 18)
    edges = _check_spectrum(spectrum)
    histograms = _read(base / "auger_2014_xmax_histograms.csv", _HISTOGRAMS, 18)
    lg_edges = _bin_edges(histograms)
    counts = _check_histograms(histograms)
    tables = {
        name: _read(base / f"auger_2014_xmax_{name}.csv", columns, 18)
        for name, columns in (("resolution", _RESOLUTION), ("acceptance", _ACCEPTANCE), ("systematics", _SYSTEMATICS))
    }
    for table in tables.values():
        _same_bins(table, lg_edges)
        for name in table.columns[2:]:
            table.require(table[name] > 0, name, "a positive number")
    resolution, acceptance = tables["resolution"], tables["acceptance"]
    resolution.require(resolution["k"] <= 1, "k", "a weight within (0, 1]")
    resolution.require(resolution["sigma2"] > resolution["sigma1"], "sigma2", "sigma2 > sigma1")
    acceptance.require(acceptance["x2"] > acceptance["x1"], "x2", "x2 > x1")
    return AugerData(
        spectrum_edges=edges,
        spectrum_counts=spectrum["raw_counts"].astype(np.int64),
        exposure=float(spectrum["exposure"][0]),
        flux=spectrum["flux"].copy(),
        flux_err_low=spectrum["flux_err_low"].copy(),
        flux_err_high=spectrum["flux_err_high"].copy(),
        unfolding_correction=spectrum["unfolding_correction"].copy(),
        xmax_lg_edges=lg_edges,
        xmax_edges=np.arange(0.0, 2001.0, 20.0),
        xmax_counts=counts,
        resolution=np.stack([resolution[c] for c in ("sigma1", "sigma2", "k")], axis=1),
        acceptance=np.stack([acceptance[c] for c in ("x1", "x2", "l1", "l2")], axis=1),
        systematics=np.stack([tables["systematics"][c] for c in ("sigma_up", "sigma_low")], axis=1),
    )


def _read(path: Path, columns: tuple[str, ...], n_rows: int) -> _Table:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise TableError(f"{path}: cannot be read ({err.strerror}); expected the shipped table, see simulators/data/README.md") from err
    except UnicodeDecodeError as err:
        raise TableError(f"{path}: byte {err.start} is no UTF-8; expected a text file") from err
    lines = text.split("\n")
    if not text.endswith("\n"):
        raise TableError(
            f"{path}, line {len(lines)}: got {lines[-1][-40:]!r} and the end of the file; expected a complete last line (is it truncated?)"
        )
    numbered = [(i, line) for i, line in enumerate(lines, start=1) if line.strip() and not line.startswith("#")]
    if not any(line.startswith("# Source:") and "doi:" in line for line in lines):
        raise TableError(f"{path}: got no line '# Source: ... doi:...'; expected the provenance of the numbers")
    if not numbered:
        raise TableError(f"{path}: got no table; expected the columns {', '.join(columns[:4])}, ...")
    (first, header), rows = numbered[0], numbered[1:]
    if tuple(header.split(",")) != columns:
        raise TableError(f"{path}, line {first}: got columns {header[:80]!r}; expected {','.join(columns)[:80]!r}")
    if len(rows) != n_rows:
        raise TableError(f"{path}: got {len(rows)} rows; expected {n_rows} (is it truncated?)")
    values = np.array([_numbers(path, i, line, columns) for i, line in rows])
    return _Table(path, columns, values, tuple(i for i, _ in rows))


def _numbers(path: Path, line_number: int, line: str, columns: tuple[str, ...]) -> list[float]:
    cells = line.split(",")
    if len(cells) != len(columns):
        raise TableError(f"{path}, line {line_number}: got {len(cells)} cells; expected {len(columns)}")
    out = []
    for name, cell in zip(columns, cells, strict=True):
        try:
            number = float(cell)
        except ValueError:
            number = np.nan
        if not np.isfinite(number):
            raise TableError(f"{path}, line {line_number}: got {name} = {cell!r}; expected a finite number")
        out.append(number)
    return out


def _contiguous(table: _Table, low: Array, high: Array, name: str) -> Array:
    table.require(high > low, name, "a bin of positive width")
    gap = np.abs(low[1:] - high[:-1]) > 1e-6
    if gap.any():
        row = int(np.flatnonzero(gap)[0]) + 1
        raise table.refuse(row, f"a bin that begins at {low[row]:g}", f"{high[row - 1]:g}, where the bin before ends")
    return np.round(np.append(low, high[-1]), 6)


def _bin_edges(table: _Table) -> Array:
    return _contiguous(table, table["lg_energy_low"], table["lg_energy_high"], "lg_energy_high")


def _same_bins(table: _Table, lg_edges: Array) -> None:
    differs = np.abs(_bin_edges(table) - lg_edges) > 1e-6
    if differs.any():
        row = min(int(np.flatnonzero(differs)[0]), len(table.lines) - 1)
        raise table.refuse(row, f"a bin at {table['lg_energy_low'][row]:g}", "the energy bins of the Xmax histograms")


def _whole(table: _Table, name: str) -> None:
    values = table[name]
    table.require((values >= 0) & (values == np.round(values)), name, "a whole number >= 0")


def _check_spectrum(table: _Table) -> Array:
    centre, half = table["lg_energy"], table["lg_half_width"]
    table.require(half > 0, "lg_half_width", "a positive number")
    edges = _contiguous(table, centre - half, centre + half, "lg_energy")
    _whole(table, "raw_counts")
    for name in ("exposure", "flux", "flux_err_low", "flux_err_high", "unfolding_correction"):
        table.require(table[name] > 0, name, "a positive number")
    table.require(table["exposure"] == table["exposure"][0], "exposure", f"one exposure for all bins, {table['exposure'][0]:g}")
    total = int(table["raw_counts"].sum())
    if total != _SPECTRUM_EVENTS:
        raise TableError(f"{table.path}: raw_counts sum to {total}; expected {_SPECTRUM_EVENTS}, the number of vertical events")
    return edges


def _check_histograms(table: _Table) -> NDArray[np.int64]:
    for name in table.columns[2:]:
        _whole(table, name)
    counts = table.values[:, 3:].astype(np.int64)
    wrong = counts.sum(axis=1) != table["n_events"]
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise table.refuse(row, f"counts that sum to {counts[row].sum()}", f"n_events = {table['n_events'][row]:g}")
    return counts
