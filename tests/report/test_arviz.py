import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.report import arviz as file
from tests.report.demo_data import PARAMETERS

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys
import numpy as np
from sbi_phys.report import arviz as file
from sbi_phys.priors import Parameter

theirs, mine = sys.argv[1:]
data = file.read_netcdf(theirs)
assert type(data).__name__ == "DataTree", type(data)
assert "torch" not in sys.modules
values = file.group(data, "posterior")
assert file.attributes(data)["seed"] == 7
attrs = {"read": {k: float(v.sum()) for k, v in values.items()}, "groups": list(file.groups(data)), "seed": 8}
stats = file.group(data, "sample_stats")
tree = file.to_inference_data(
    {k: 2 * v for k, v in values.items()}, sample_stats=stats, observed_data=file.group(data, "observed_data"),
    attrs=attrs, parameters=[Parameter("lg_rcut", 17.8, 20, "lg V", "R")],
)
file.write_netcdf(mine, tree)
import arviz
assert int(arviz.__version__.split(".")[0]) >= 1
print(arviz.__version__)
"""


def example(rng):
    posterior = {"gamma": rng.normal(size=(4, 50)), "lg_rcut": rng.normal(18, 1, size=(4, 50))}
    return file.to_inference_data(
        posterior,
        prior={"gamma": rng.normal(size=(1, 30))},
        sample_stats={"lp": rng.normal(size=(4, 50))},
        observed_data={"counts": np.arange(15)},
        posterior_predictive={"counts": rng.poisson(5, size=(1, 20, 15))},
        log_likelihood={"counts": rng.normal(size=(4, 50))},
        attrs={"seed": 7, "versions": {"numpy": np.__version__}},
        parameters=PARAMETERS,
    )


def test_round_trip_keeps_every_bit(tmp_path):
    data = example(np.random.default_rng(0))
    path = file.write_netcdf(tmp_path / "posterior.nc", data)
    back = file.read_netcdf(path)
    expected = {"posterior", "prior", "sample_stats", "observed_data", "posterior_predictive", "log_likelihood"}
    assert set(file.groups(back)) == expected == set(file.groups(data))
    for name in expected:
        for key, values in file.group(data, name).items():
            np.testing.assert_array_equal(file.group(back, name)[key], values)
    assert file.attributes(back) == {"seed": 7, "versions": {"numpy": np.__version__}}
    variable = back["posterior"]["lg_rcut"]
    assert variable.dims == ("chain", "draw") and variable.attrs == {"units": "lg V", "long_name": r"\lg R_\mathrm{cut}"}
    assert os.listdir(tmp_path) == ["posterior.nc"]


def test_a_file_read_can_be_replaced_and_has_the_same_bytes(tmp_path):
    path = file.write_netcdf(tmp_path / "p.nc", example(np.random.default_rng(0)))
    first, back = path.read_bytes(), file.read_netcdf(path)
    file.write_netcdf(path, example(np.random.default_rng(0)))
    assert path.read_bytes() == first
    path.unlink()
    assert file.group(back, "posterior")["gamma"].shape == (4, 50)  # in memory, not behind an open file


def test_plain_hdf5_reads_it(tmp_path):
    path = file.write_netcdf(tmp_path / "p.nc", example(np.random.default_rng(0)))
    with h5py.File(path) as h:
        assert h["posterior/gamma"].shape == (4, 50)
        assert json.loads(h.attrs["sbi_phys"])["seed"] == 7


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 20)),
    st.dictionaries(
        st.text(max_size=8),
        st.none() | st.integers(-(2**53), 2**53) | st.text() | st.floats(allow_nan=False, allow_infinity=False),
        max_size=4,
    ),
)
def test_any_shape_and_attributes_survive(tmp_path_factory, shape, attrs):
    values = np.random.default_rng(1).normal(size=shape)
    path = tmp_path_factory.mktemp("nc") / "p.nc"
    file.write_netcdf(path, file.to_inference_data({"a": values}, attrs=attrs))
    back = file.read_netcdf(path)
    np.testing.assert_array_equal(file.group(back, "posterior")["a"], values)
    assert file.attributes(back) == attrs


def test_draws_become_chains():
    draws = np.arange(12.0).reshape(4, 3)
    assert {k: v.tolist() for k, v in file.chains_to_dict(draws[:, :2], ["a", "b"]).items()} == {"a": [[0, 3, 6, 9]], "b": [[1, 4, 7, 10]]}
    assert file.chains_to_dict(np.zeros((2, 5, 1)), ["a"])["a"].shape == (2, 5)
    with pytest.raises(ShapeError, match=r"samples has shape \(4, 3\); expected \(n, 2\)"):
        file.chains_to_dict(draws, ["a", "b"])


def test_wrong_shapes_and_values_are_named():
    with pytest.raises(DataError, match="posterior is empty"):
        file.to_inference_data({})
    with pytest.raises(ShapeError, match=r"posterior\['a'\] has shape \(3,\)"):
        file.to_inference_data({"a": np.zeros(3)})
    with pytest.raises(ShapeError, match=r"posterior\['b'\] has shape \(2, 4\); expected \(2, 5\)"):
        file.to_inference_data({"a": np.zeros((2, 5)), "b": np.zeros((2, 4))})
    with pytest.raises(ShapeError, match=r"sample_stats\['lp'\]"):
        file.to_inference_data({"a": np.zeros((2, 5))}, sample_stats={"lp": np.zeros((2, 6))})
    with pytest.raises(NonFiniteError):
        file.to_inference_data({"a": np.full((2, 5), np.nan)})
    with pytest.raises(DataError, match="cannot be written as JSON"):
        file.to_inference_data({"a": np.zeros((2, 5))}, attrs={"x": object()})
    with pytest.raises(DataError, match="data is a dict"):
        file.write_netcdf("x.nc", {"posterior": 1})


@pytest.mark.parametrize("content", [None, b"", b"not a file", "truncated"])
def test_a_file_that_is_none_of_ours_is_refused(tmp_path, content):
    path = tmp_path / "p.nc"
    if content == "truncated":
        whole = file.write_netcdf(tmp_path / "q.nc", example(np.random.default_rng(0))).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"p\.nc (does not exist|is not a readable NetCDF file)"):
        file.read_netcdf(path)


def test_a_file_without_posterior_is_refused(tmp_path):
    with h5py.File(tmp_path / "p.nc", "w") as h:
        h.create_group("other")
    with pytest.raises(DataError, match="expected 'posterior' among them"):
        file.read_netcdf(tmp_path / "p.nc")


def other_python():
    """A Python 3.12 that has arviz 1.x: the variable SBI_PHYS_PY312, or .venv312 beside the package."""
    for candidate in (os.environ.get("SBI_PHYS_PY312"), ROOT / ".venv312" / "bin" / "python"):
        if candidate and Path(candidate).is_file():
            return str(candidate)
    return None


@pytest.mark.skipif(other_python() is None, reason="no Python with arviz 1.x: set SBI_PHYS_PY312 or make .venv312")
def test_arviz_1_reads_ours_and_we_read_its_file(tmp_path):
    ours, theirs = tmp_path / "ours.nc", tmp_path / "theirs.nc"
    data = example(np.random.default_rng(0))
    file.write_netcdf(ours, data)
    done = subprocess.run(
        [other_python(), "-W", "error", "-c", SCRIPT, str(ours), str(theirs)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    back = file.read_netcdf(theirs)
    mine = file.group(data, "posterior")
    for key, values in file.group(back, "posterior").items():
        np.testing.assert_array_equal(values, 2 * mine[key])
    np.testing.assert_array_equal(file.group(back, "observed_data")["counts"], np.arange(15))
    note = file.attributes(back)
    assert note["seed"] == 8 and note["read"] == {k: float(v.sum()) for k, v in mine.items()}
    assert set(note["groups"]) == set(file.groups(data))
    assert back["posterior"]["lg_rcut"].attrs["units"] == "lg V"


def test_import_needs_neither_arviz_nor_torch_nor_matplotlib():
    script = "import sys, sbi_phys.report.arviz; print(sorted({'arviz', 'torch', 'matplotlib', 'xarray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def small(path):
    return file.write_netcdf(path, file.to_inference_data({"mass": np.arange(50.0)[None]}, attrs={"seed": 3}))


def test_damage_is_refused_and_other_readers_do_not_mind_the_checksum(tmp_path):
    path = small(tmp_path / "p.nc")
    whole, rng = path.read_bytes(), np.random.default_rng(1)
    with h5py.File(path) as h:
        assert np.array_equal(h["posterior/mass"][0], np.arange(50.0))
    for at in rng.integers(len(whole) - 60, size=20):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"p\.nc is damaged: its \d+ bytes have checksum"):
            file.read_netcdf(path)
    path.write_bytes(whole[:-60] + bytes(60))  # the end of the file is lost, as after a power cut
    with pytest.raises(DataError, match="the checksum behind its content is missing"):
        file.read_netcdf(path)
    path.write_bytes(whole)
    assert np.array_equal(file.group(file.read_netcdf(path), "posterior")["mass"][0], np.arange(50.0))


def test_values_in_other_files_are_not_read(tmp_path):
    path = small(tmp_path / "p.nc")
    path.write_bytes(path.read_bytes().rpartition(b"\nsbi_phys")[0])
    (tmp_path / "secret").write_bytes(bytes(400))
    with h5py.File(path, "r+") as h:
        del h["posterior/mass"]
        h["posterior"].create_dataset("mass", (1, 50), "<f8", external=[(str(tmp_path / "secret"), 0, 400)])
    with pytest.raises(DataError, match="the values of posterior/mass lie in another file"):
        file.read_netcdf(path)


def test_files_of_other_programs_have_no_checksum_and_are_read(tmp_path):
    data = file.to_inference_data({"mass": np.arange(50.0)[None]})
    data.to_netcdf(str(tmp_path / "theirs.nc"), engine="h5netcdf")
    assert np.array_equal(file.group(file.read_netcdf(tmp_path / "theirs.nc"), "posterior")["mass"][0], np.arange(50.0))
    assert not data.attrs.get("sbi_phys_checksum")
