import numpy as np
import pytest
import torch

from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.priors.blocks import column_name, columns, failed_rows, fractional, missing_columns, to_blocks, to_rows
from sbi_phys.priors.parameters import Observable, observables_from_dicts, observables_to_dicts

IMAGE, TRACE = Observable("image", shape=(2, 3), missing=True), Observable("trace", 4, kind="counts")
BOTH = (IMAGE, TRACE)


def test_size_and_shape_follow_from_each_other_and_must_agree():
    assert (IMAGE.size, TRACE.shape) == (6, (4,))
    assert Observable("a", 6, shape=(2, 3)) == Observable("a", shape=[2, 3])
    with pytest.raises(ShapeError, match=r"shape \(2, 3\), 6 values; expected size = 5"):
        Observable("a", 5, shape=(2, 3))
    for bad in ((0,), (2.0,), "ab", (True,)):
        with pytest.raises(SettingError, match="shape of observable a"):
            Observable("a", shape=bad)
    with pytest.raises(SettingError, match="size of observable a is 0"):
        Observable("a")
    with pytest.raises(SettingError, match="missing"):
        Observable("a", 2, missing="yes")


def test_descriptions_keep_shape_and_missing_and_leave_out_what_says_nothing():
    assert observables_from_dicts(observables_to_dicts(BOTH)) == BOTH
    plain = observables_to_dicts(BOTH)
    assert (plain[0]["shape"], plain[0]["missing"]) == ([2, 3], True)
    assert "shape" not in plain[1]
    assert "missing" not in plain[1]


def test_rows_and_blocks_are_inverse_of_each_other():
    x = np.arange(50.0).reshape(5, 10)
    blocks = to_blocks(x, BOTH)
    assert {k: v.shape for k, v in blocks.items()} == {"image": (5, 2, 3), "trace": (5, 4)}
    assert blocks["image"][1, 1, 2] == 15  # row 1, column 5: C order
    rows, single = to_rows(blocks, BOTH)
    np.testing.assert_array_equal(rows, x)
    assert not single
    one = to_blocks(x[3], BOTH)
    assert one["image"].shape == (2, 3)
    rows, single = to_rows(one, BOTH)
    np.testing.assert_array_equal(rows, x[3:4])
    assert single
    assert columns(BOTH) == {"image": slice(0, 6), "trace": slice(6, 10)}


def test_a_single_observable_may_come_in_its_shape_and_float32_stays():
    x = np.arange(30, dtype=np.float32).reshape(5, 2, 3)
    rows, single = to_rows(x, (IMAGE,))
    assert (rows.shape, rows.dtype, single) == ((5, 6), np.float32, False)
    assert to_rows(x[0], (IMAGE,))[1]
    assert to_rows(x.reshape(5, 6), (IMAGE,))[0].shape == (5, 6)
    assert to_rows(torch.from_numpy(x), (IMAGE,))[0].shape == (5, 6)
    assert to_blocks(torch.zeros(5, 6), (IMAGE,))["image"].shape == (5, 2, 3)


@pytest.mark.parametrize("shape", [(6, 2), (2, 5), (11,), (5, 2, 5), (5, 1, 10), (2, 3), ()])
def test_an_array_is_never_read_in_another_shape(shape):
    with pytest.raises(ShapeError, match=r"expected \(10,\) for one observation, \(n, 10\) for several.*image: \(2, 3\), trace: 4"):
        to_rows(np.zeros(shape), BOTH)


def test_a_transposed_image_is_refused():
    with pytest.raises(ShapeError, match=r"shape \(3, 2\); expected .*\(2, 3\), \(n, 2, 3\)"):
        to_rows(np.zeros((3, 2)), (IMAGE,))
    with pytest.raises(ShapeError, match=r"x\['image'\] has shape \(5, 3, 2\)"):
        to_rows({"image": np.zeros((5, 3, 2)), "trace": np.zeros((5, 4))}, BOTH)


def test_blocks_that_do_not_fit_are_named():
    with pytest.raises(DataError, match="block 'imag'; did you mean 'image'"):
        to_rows({"imag": np.zeros((2, 3)), "trace": np.zeros(4)}, BOTH)
    with pytest.raises(DataError, match="no block 'trace'"):
        to_rows({"image": np.zeros((2, 3))}, BOTH)
    with pytest.raises(ShapeError, match="'image': '5 rows', 'trace': '4 rows'"):
        to_rows({"image": np.zeros((5, 2, 3)), "trace": np.zeros((4, 4))}, BOTH)
    with pytest.raises(ShapeError, match="one observation"):
        to_rows({"image": np.zeros((2, 3)), "trace": np.zeros((1, 4))}, BOTH)


def test_a_missing_value_is_no_failure_but_a_row_without_values_is():
    x = np.ones((5, 10))
    x[1, 2] = np.nan  # in the image, where values may be missing
    x[2, 2] = np.inf
    x[3, 7] = np.nan  # in the trace
    x[4] = np.nan
    assert failed_rows(x, BOTH).tolist() == [False, False, True, True, True]
    assert failed_rows(np.full((2, 6), np.nan), (IMAGE,)).all()
    assert missing_columns(BOTH).tolist() == [True] * 6 + [False] * 4


def test_fractions_are_found_in_counts_alone():
    x = np.full((3, 10), 2.0)
    x[0, 0], x[1, 1] = 0.5, np.nan
    assert fractional(x, BOTH) is None
    x[2, 8] = 3.5
    assert fractional(x, BOTH) == (2, 8)
    assert [column_name(BOTH, i) for i in (4, 8)] == ["image[1, 1]", "trace[2]"]
