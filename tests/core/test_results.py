"""The protocol of results: every public result has it, and tables, CSV, LaTeX and JSON hold what the result holds."""

import csv
import dataclasses
import doctest
import functools
import inspect
import json
import math
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sbi_phys.core.errors import SbiPhysError, ShapeError, WriteError
from sbi_phys.core.results import Result, Rows, bin_columns, draws_rows, latex_text, plain
from tests.test_examples import OBJECTS, OPTIONS, example_of

RESULTS = {
    name: thing
    for name, thing in OBJECTS.items()
    if inspect.isclass(thing) and (callable(getattr(thing, "summary", None)) or callable(getattr(thing, "plot", None)))
}


def instance_of(cls, monkeypatch):
    """The last instance of a class that the example in its docstring makes."""
    made, init = [], cls.__init__

    @functools.wraps(init)
    def keep(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(cls, "__init__", keep)
    doctest.DocTestRunner(optionflags=OPTIONS).run(example_of(cls), out=lambda text: None, clear_globs=False)
    return made[-1]


def test_the_walk_finds_the_results():
    assert len(RESULTS) > 60
    assert {"calibration.SBC", "unfold.IBU", "confidence.Limits", "samplers.MCMCResult", "store.Info"} <= set(RESULTS)


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_a_public_result_has_the_protocol(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert issubclass(RESULTS[name], Result)
    check(instance_of(RESULTS[name], monkeypatch), tmp_path)


def check(result: Result, folder):
    assert isinstance(result.summary(), str) and result.summary()
    content = result.to_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content and content
    if "to_dict" not in vars(type(result)) and dataclasses.is_dataclass(result):
        assert list(content) == [f.name for f in dataclasses.fields(result)]
    rows = result.rows()
    assert rows.columns and len(set(rows.columns)) == len(rows.columns)
    assert set(rows.units) <= set(rows.columns)
    assert all(set((value, *errors)) <= set(rows.columns) for value, errors in rows.errors.items())
    assert all(v is None or isinstance(v, bool | int | float | str) for row in rows.rows for v in row)
    frame = result.to_frame()
    assert tuple(frame.columns) == rows.columns and len(frame) == len(rows.rows) and frame.attrs["units"] == dict(rows.units)
    check_csv(result.to_csv(folder / "deep" / "result.csv"), rows)
    text = result.to_latex(caption="All rows", label="tab:rows")
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    shown = len(rows.columns) - len({e for errors in rows.errors.values() for e in errors})
    assert len(lines) == 1 + len(rows.rows) and {line.replace(r"\&", "").count("&") for line in lines} == {shown - 1}
    assert r"\caption{All rows}" in text and "nan" not in text.lower().replace("nano", "")
    check_plot(result)


def check_csv(path, rows):
    with path.open(newline="", encoding="utf-8") as file:
        header, *read = csv.reader(file)
    assert tuple(header) == rows.header and len(read) == len(rows.rows)
    for got, row in zip(read, rows.rows, strict=True):
        for cell, value in zip(got, row, strict=True):
            if isinstance(value, float):
                assert float(cell) == value or (math.isnan(float(cell)) and math.isnan(value))
            else:
                assert cell == ("" if value is None else str(value))


def check_plot(result):
    ax = result.plot()
    assert isinstance(ax, Axes)
    ax.figure.draw_without_rendering()
    mine = Figure().add_subplot()
    assert result.plot(mine) is mine
    assert mine.has_data() or mine.images or mine.collections


def test_a_class_without_the_protocol_is_found():
    class Bare:
        def summary(self):
            return "words"

    assert not issubclass(Bare, Result)
    with pytest.raises(NotImplementedError, match="has no summary"):
        Result().summary()
    with pytest.raises(NotImplementedError, match="has no plot"):
        Result().plot()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Mass(Result):
    value: float
    error: np.float64
    draws: np.ndarray
    model: object = None


def test_default_rows_are_the_single_values():
    found = Mass(value=math.nan, error=np.float64(0.5), draws=np.array([[1.0, math.inf]]), model=np.linalg.norm)
    assert found.rows().columns == ("value", "error")
    assert found.to_dict() == {"value": None, "error": 0.5, "draws": [[1.0, None]], "model": "norm"}


def test_plain_values():
    given = {
        1: np.arange(3),
        "set": {2, 1},
        "pair": (np.bool_(True), np.float32(0.5)),
        "none": None,
        "inf": -math.inf,
        "zero": np.array(math.nan),
    }
    assert plain(given) == {"1": [0, 1, 2], "set": [1, 2], "pair": [True, 0.5], "none": None, "inf": None, "zero": None}


def test_rows_repeat_single_values_and_refuse_other_lengths():
    rows = Rows.of({"name": ["a", "b"], "level": 0.9, "x": np.array([1.0, 2.0])}, {"x": "EeV"})
    assert rows.rows == (("a", 0.9, 1.0), ("b", 0.9, 2.0)) and rows.header == ("name", "level", "x [EeV]")
    assert rows.column("x") == [1.0, 2.0]
    with pytest.raises(ShapeError, match="lengths"):
        Rows.of({"a": [1, 2], "b": [1, 2, 3]})
    with pytest.raises(ShapeError, match="row 1 has 1 values; expected 2"):
        Rows(("a", "b"), ((1, 2), (3,)))
    with pytest.raises(ShapeError, match="no column 'y'"):
        rows.column("y")
    assert Rows.of({"a": []}).rows == ()


def test_latex_is_rounded_to_the_errors():
    """The digits are those of the Particle Data Group: 0.827 +- 0.119 -> 0.83 +- 0.12, 0.827 +- 0.367 -> 0.8 +- 0.4."""
    numbers = {"mass": [0.827, 0.827, -1234.5], "mass_err": [0.119, 0.367, 21.0]}
    interval = {"median": [1.0, 2.0, 0.5], "low": [0.9, math.nan, 0.48], "high": [1.2, 3.0, 0.52]}
    rows = Rows.of({"f_1 & more": ["50 %", "$x_1$", "c"]} | numbers | interval, {"mass": "km^2"}, {"median": ("low", "high")})
    lines = rows.latex().splitlines()
    assert lines[:2] == [r"\begin{tabular}{lrr}", r"\toprule"] and lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert lines[2] == r"f 1 \& more & mass [km\textasciicircum{}2] & median \\"
    assert lines[4] == r"50 \% & $0.83 \pm 0.12$ & $1.00^{+0.20}_{-0.10}$ \\"
    assert lines[5] == r"$x_1$ & $0.8 \pm 0.4$ & $2$ \\"
    assert lines[6] == r"c & $-1234 \pm 21$ & $0.500^{+0.020}_{-0.020}$ \\"


def test_latex_of_numbers_without_errors():
    rows = Rows.of({"v": [1.23456e-7, math.inf, -math.inf, math.nan, None, True, 12, 3.0]})
    cells = [line.removesuffix(r" \\") for line in rows.latex().splitlines()[4:-2]]
    assert cells == [r"$1.235 \times 10^{-7}$", r"$\infty$", r"$-\infty$", "--", "--", "yes", "$12$", "$3$"]


def test_latex_text_escapes_all_but_mathematics():
    assert latex_text(r"a_b $c_d$ 5 %") == r"a\_b $c_d$ 5 \%"
    assert latex_text("cost 5$") == r"cost 5\$"


def test_weighted_draws_have_the_moments_of_repeated_ones():
    rng = np.random.default_rng(1)
    theta, counts = rng.normal(size=(2000, 2)), rng.integers(1, 6, 2000)
    weighted = draws_rows(theta, ["a", "b"], counts / counts.sum(), units=["m", ""])
    repeated = draws_rows(np.repeat(theta, counts, axis=0), ["a", "b"], units=["m", ""])
    assert weighted.columns == repeated.columns == ("name", "unit", "mean", "sd", "q025", "q16", "median", "q84", "q975")
    for got, wanted in zip(weighted.rows, repeated.rows, strict=True):
        np.testing.assert_allclose(got[2:], wanted[2:], atol=0.01)
    np.testing.assert_allclose(weighted.column("mean"), counts @ theta / counts.sum(), rtol=1e-12)


def test_bins_have_edges_or_numbers():
    assert list(bin_columns(None, 2)) == ["bin"]
    assert {k: v.tolist() for k, v in bin_columns([0, 1, 3], 2).items()} == {"low": [0, 1], "high": [1, 3]}


def test_without_pandas_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SbiPhysError, match="pip install pandas"):
        Rows.of({"a": [1]}).to_frame()


def test_csv_that_cannot_be_written_leaves_the_former_file(tmp_path):
    found = Mass(value=1 / 3, error=np.float64(0.5), draws=np.zeros(1))
    (tmp_path / "folder").mkdir()
    with pytest.raises(WriteError):
        found.to_csv(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]
    assert found.to_csv(tmp_path / "x.csv").read_text() == "value,error\n0.3333333333333333,0.5\n"
