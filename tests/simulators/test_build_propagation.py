import importlib.util
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "scripts" / "build_propagation.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("build_propagation", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy_tensors():
    out = {}
    for g, (name, mass) in enumerate((("h", 1), ("he", 4), ("n", 14), ("si", 28), ("fe", 56))):
        tensor = np.zeros((125, 100, 5, 125))
        tensor[:, :, g, 0] = 1e-4
        tensor[124, 0] = 0.0
        tensor[124, 0, 0, 0] = mass * 1e-4  # one complete break-up
        out[name] = tensor
    return out


def test_collapse_is_the_sum_over_distance(script):
    distances = np.geomspace(1, 1500, 100)
    got = script.collapse(toy_tensors(), distances, 1e4, (0.0, 3.0))
    z, step = script.redshift(distances), np.log(1500) / 99
    for k, m in enumerate((0.0, 3.0)):
        np.testing.assert_allclose(got[k, 2, 7, 2, 0], (distances * step * (1 + z) ** (m - 1)).sum(), rtol=1e-6)
    assert got[0, 2, 7].sum() == got[0, 2, 7, 2, 0]


def test_wrong_unit_is_refused(script):
    with pytest.raises(SystemExit, match="leaves up to 10.0000 fragments; expected 1"):
        script.collapse(toy_tensors(), np.geomspace(1, 1500, 100), 1e5, (0.0,))


def test_redshift_of_a_near_source_is_hubbles_law(script):
    assert script.redshift(np.array([10.0]))[0] == pytest.approx(67.3 * 10 / 299792.458, rel=2e-3)
    assert 0.35 < script.redshift(np.array([1500.0]))[0] < 0.40


def test_bytes_are_deterministic_and_written_aside(script, tmp_path):
    arrays = {"b": np.arange(5.0), "a": np.eye(3, dtype=np.float32)}
    script.write_npz(tmp_path / "one.npz", arrays)
    script.write_npz(tmp_path / "two.npz", dict(reversed(arrays.items())))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one.npz", "two.npz"]
    with np.load(tmp_path / "one.npz", allow_pickle=False) as data:
        np.testing.assert_array_equal(data["a"], arrays["a"])
    assert script.content_sha256(arrays) != script.content_sha256({**arrays, "b": np.arange(5.0) + 1e-9})


def test_unpickler_builds_arrays_only(script):
    plain = pickle.dumps({"h": np.arange(3.0)})
    np.testing.assert_array_equal(script._ArraysOnly(io.BytesIO(plain)).load()["h"], np.arange(3.0))
    with pytest.raises(pickle.UnpicklingError, match="expected numpy arrays only"):
        script._ArraysOnly(io.BytesIO(pickle.dumps(os.system))).load()


def test_foreign_wheel_is_refused(script, tmp_path, capsys):
    wheel = tmp_path / "astrotools-1.5.0-py2.py3-none-any.whl"
    wheel.write_bytes(b"no wheel")
    with pytest.raises(SystemExit):
        script.main([str(wheel), "--out", str(tmp_path)])
    assert "expected 960d4171" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script.main([str(tmp_path / "absent.whl")])
    assert "is no file" in capsys.readouterr().err
