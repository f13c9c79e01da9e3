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
