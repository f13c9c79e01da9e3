"""Errors name the thing, what was got and what was expected."""

import numpy as np
import pytest
import torch

from sbi_phys.core import checks
from sbi_phys.core.errors import DataError, NonFiniteError, SbiPhysError, SettingError, ShapeError


def test_as_matrix_takes_lists_tensors_and_a_single_row() -> None:
    assert checks.as_matrix("theta", [1, 2], 2).shape == (1, 2)
    assert checks.as_matrix("theta", torch.ones(3, 2, requires_grad=True), 2).tolist() == [[1.0, 1.0]] * 3
    assert checks.as_matrix("theta", np.ones((3, 2), dtype=np.int8), 2).dtype == np.float64


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.ones((3, 4)), ShapeError, r"theta has shape \(3, 4\); expected \(n, 2\) = columns \('a', 'b'\)"),
        (np.ones(3), ShapeError, r"theta has shape \(3,\)"),
        ([[1.0, np.nan]], NonFiniteError, r"theta has NaN or Inf in 1 of 1 rows, first nan at index \(0, 1\)"),
        ([[1.0, 1j]], DataError, "dtype complex128"),
        ([["a", "b"]], DataError, "expected real numbers"),
        ([[1.0], [1.0, 2.0]], DataError, "cannot read as an array"),
    ],
)
def test_as_matrix_refuses(value: object, error: type[SbiPhysError], words: str) -> None:
    with pytest.raises(error, match=words):
        checks.as_matrix("theta", value, 2, ("a", "b"))


def test_require_same_rows() -> None:
    assert checks.require_same_rows(a=np.ones((3, 1)), b=np.ones(3)) == 3
    with pytest.raises(ShapeError, match="a has 3, b has 2"):
        checks.require_same_rows(a=np.ones(3), b=np.ones(2))
    with pytest.raises(DataError, match="no rows"):
        checks.require_same_rows(a=np.ones(0))


@pytest.mark.parametrize("value", [True, 1.5, "3", None, -1, 11])
def test_require_int_refuses(value: object) -> None:
    with pytest.raises(SettingError, match="n is"):
        checks.require_int("n", value, low=0, high=10)


@pytest.mark.parametrize("value", [True, "3", np.nan, np.inf, 0.0, 1.0, -1])
def test_require_number_refuses_outside_an_open_range(value: object) -> None:
    with pytest.raises(SettingError, match="fraction is"):
        checks.require_number("fraction", value, low=0, high=1, open_low=True, open_high=True)


def test_misspelt_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(SettingError, match="did you mean 'learning_rate'"):
        checks.require_known("[train]", ["learning_rat"], ["learning_rate", "patience"])
    with pytest.raises(SettingError, match="did you mean 'spline'"):
        checks.require_choice("flow", "splin", ("spline", "maf"))
    assert checks.did_you_mean("zzz", ("spline",)) == ""


class Quantity(np.ndarray):
    """An array with a unit, as astropy's."""

    unit = "km"


def masked(n: int = 5) -> np.ma.MaskedArray:
    return np.ma.array(np.arange(n, dtype=np.float32), mask=[i == 2 for i in range(n)])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (masked(), "x has 1 masked values of 5; expected an array without a mask"),
        ([masked(3), masked(3)], r"x\[0\] has 1 masked values of 3"),
        (np.arange(4.0).view(Quantity), "x has the unit 'km'; expected plain numbers"),
        ([np.arange(4.0).view(Quantity)], r"x\[0\] has the unit 'km'"),
        ([[1.0, 2.0], [3.0], [4.0, 5.0]], r"row 0 has length 2, row 1 1; expected rows of one length \(sets of events: sp.pad_sets\)"),
        (np.array([2**53 + 1, 5]), "x has 1 whole numbers beyond 2.53 that float64 rounds, first 9007199254740993"),
        (torch.eye(3).to_sparse(), "x is a torch.sparse_coo tensor of torch.float32 that numpy cannot read"),
    ],
)
def test_what_a_plain_array_would_lose_is_refused(value: object, words: str) -> None:
    for read in (checks.as_real, checks.as_floating):
        with pytest.raises(DataError, match=words):
            read("x", value)


def test_masks_and_units_without_content_are_taken() -> None:
    assert checks.as_real("x", np.ma.array([1.0, 2.0], mask=[False, False])).tolist() == [1.0, 2.0]
    plain = np.arange(2.0).view(Quantity)
    plain.unit = ""
    assert checks.as_real("x", plain).tolist() == [0.0, 1.0]


def test_half_precision_is_widened() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e5m2):
        assert checks.as_real("x", torch.tensor([[0.5, -2.0]], dtype=dtype, requires_grad=False)).tolist() == [[0.5, -2.0]]


def test_tables_are_read_by_the_names_of_their_columns() -> None:
    pandas = pytest.importorskip("pandas")
    data = {"c": [5.0, 6.0], "a": [1.0, 2.0], "b": [3.0, 4.0]}
    record = np.zeros(2, dtype=[("b", "f4"), ("c", "i8"), ("a", "f8")])
    for key in data:
        record[key] = data[key]
    for table in (pandas.DataFrame(data), record):
        assert checks.as_matrix("theta", table, 3, ("a", "b", "c")).tolist() == [[1.0, 3.0, 5.0], [2.0, 4.0, 6.0]]
        with pytest.raises(DataError, match=r"columns .*; expected a, b, mass in any order \(unknown: c; missing: mass\)"):
            checks.as_matrix("theta", table, 3, ("a", "b", "mass"))
    assert checks.as_real("x", pandas.DataFrame(data)).tolist() == [[5.0, 1.0, 3.0], [6.0, 2.0, 4.0]]
    assert checks.as_matrix("x", pandas.DataFrame(np.eye(2)), 2, ("a", "b")).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(DataError, match="several columns with the name 'a'"):
        checks.as_real("x", pandas.DataFrame(np.eye(2), columns=["a", "a"]))
    assert np.isnan(checks.as_real("x", pandas.DataFrame({"a": pandas.array([1.0, None], dtype="Float64")}))[1, 0])


def test_long_text_is_shortened_to_its_ends():
    from sbi_phys.core.checks import shortened

    assert shortened("a\n b") == "a b" and shortened("x" * 200) == "x" * 200
    text = shortened("begin" + "x" * 500 + "end")
    assert len(text) == 200 and text.startswith("begin") and text.endswith("end") and "..." in text
