"""Observations: their sources, names, files of every form, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.priors import Observable
from sbi_phys.workflow.observations import check_row, expand, parse_source, read_file

TWO = (Observable("n", 2, kind="counts"), Observable("y", 1))


def read(path, observables=TWO, row=""):
    return read_file(parse_source(f"{path}{row}"), observables)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("observed", "observed"),
        ("simulated", "simulated"),
        ("simulated:7", "simulated-7"),
        ("data/crab.csv", "crab"),
        ("data/crab.csv#12", "crab-12"),
        ("my data (1).txt", "my_data_1"),
        ("...csv", "observation"),
    ],
)
def test_a_source_has_a_name(text, name):
    assert parse_source(text).name == name


@given(st.text(max_size=30))
def test_any_text_is_a_source_or_a_clear_error(text):
    try:
        source = parse_source(text)
    except SettingError:
        return
    assert source.kind in ("observed", "simulated", "file") and source.name and "/" not in source.name and " " not in source.name


@pytest.mark.parametrize("text", ["simulated:x", "simulated:-1", "", "a.csv#0"])
def test_what_is_no_source(text):
    with pytest.raises(SettingError, match="expected"):
        parse_source(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("row.csv", "1,2,3.5\n"),
        ("spaces.txt", "  1 2   3.5  \n"),
        ("column.csv", "1\n2\n3.5\n"),
        ("comment.csv", "# n, n, y\n1, 2, 3.5  # measured\n\n"),
        ("named.csv", "n[0],n[1],y\n1,2,3.5\n"),
        ("reordered.csv", "y,n[1],n[0]\n3.5,2,1\n"),
    ],
)
def test_text_files_of_one_observation(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read(tmp_path / name).tolist() == [1, 2, 3.5]


def test_arrays_of_one_observation(tmp_path):
    np.save(tmp_path / "flat.npy", np.array([1, 2, 3.5]))
    np.save(tmp_path / "row.npy", np.array([[1, 2, 3.5]]))
    np.savez(tmp_path / "blocks.npz", n=np.array([1, 2]), y=np.array(3.5))
    for name in ("flat.npy", "row.npy", "blocks.npz"):
        assert read(tmp_path / name).tolist() == [1, 2, 3.5]


def test_rows_of_a_file_with_several(tmp_path):
    path = tmp_path / "many.csv"
    path.write_text("n[0],n[1],y\n1,2,3\n4,5,6\n")
    assert expand(f"{path}#all") == [f"{path}#1", f"{path}#2"] and expand(str(path)) == [str(path)]
    assert [read(path, row=f"#{i}").tolist() for i in (1, 2)] == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(DataError, match="has 2 rows; expected row 3 among them"):
        read(path, row="#3")
    with pytest.raises(DataError, match=r"has shape \(2, 3\); expected \(3,\) = n: 2, y: 1; .*#1 is its first row, .*#all every row"):
        read(path)


def test_an_image_keeps_its_shape(tmp_path):
    image = np.arange(6.0).reshape(2, 3)
    np.save(tmp_path / "image.npy", image)
    np.save(tmp_path / "turned.npy", image.T)
    observable = (Observable("image", 6, shape=(2, 3)),)
    assert read(tmp_path / "image.npy", observable).tolist() == image.ravel().tolist()
    with pytest.raises(DataError, match=r"has shape \(3, 2\)"):
        read(tmp_path / "turned.npy", observable)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1,2\n3,4\n5,6\n", r"shape \(3, 2\); expected \(3,\)"),  # two columns, which must not be read row by row
        ("1,2,3,4\n", r"shape \(4,\); expected \(3,\) = n: 2, y: 1"),
        ("1,2\n", r"shape \(2,\)"),
        ("1,2,3.5 TeV\n", "'3.5 TeV'; expected a number without a unit"),
        ("1,2\n3\n", r"rows of \[1, 2\] values"),
        ("", "has no values"),
        ("n[0],n[1],y\n", "no numbers"),
        ("n[0],n[1],z\n1,2,3\n", "no column 'y'; expected the columns n\\[0\\], n\\[1\\], y"),
        ("n[0],n[1],y,z\n1,2,3,4\n", "a column 'z' that is not known"),
        ("n[0],n[0],y\n1,2,3\n", "no column"),
    ],
)
def test_what_a_text_file_may_not_hold(tmp_path, text, complaint):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=complaint):
        read(tmp_path / "x.csv")


def test_blocks_that_do_not_fit_are_named(tmp_path):
    np.savez(tmp_path / "other.npz", n=np.zeros(2), z=np.zeros(1))
    with pytest.raises(DataError, match=r"holds the arrays \['n', 'z'\]; expected one for each observable, \['n', 'y'\]"):
        read(tmp_path / "other.npz")
    np.savez(tmp_path / "long.npz", n=np.zeros(3), y=np.zeros(1))
    with pytest.raises(DataError, match=r"\['n'\] has shape \(3,\); expected \(2,\)"):
        read(tmp_path / "long.npz")


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        ([1, 2], r"shape \(2,\); expected \(3,\)"),
        ([1, np.nan, 0], r"nan in column 1 \(n\[1\]\)"),
        ([1, 2, np.inf], r"inf in column 2 \(y\)"),
        ([1, 2.5, 0], r"2.5 in column 1 \(n\[1\]\); expected whole counts"),
        ([-1, 2, 0], "-1 in column 0"),
    ],
)
def test_a_row_that_no_observation_can_be(x, complaint):
    with pytest.raises(DataError, match=complaint):
        check_row(np.array(x), TWO)


def test_missing_values_where_they_are_declared():
    observables = (Observable("y", 2, missing=True), Observable("z", 1))
    assert np.isnan(check_row(np.array([np.nan, 1, 2]), observables)[0])
    with pytest.raises(DataError, match=r"nan in column 2 \(z\)"):
        check_row(np.array([1, 2, np.nan]), observables)
