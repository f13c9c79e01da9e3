"""Exported draws: every format reads back, says where the draws come from, and is whole or not there."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from sbi_phys.core import files
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, WriteError
from sbi_phys.core.version import __version__
from sbi_phys.priors import Parameter
from sbi_phys.report import export_draws, group, read_netcdf
from sbi_phys.report.arviz import attributes

PARAMETERS = [Parameter("lg_rcut", 17, 20, unit="lg V", latex=r"\lg R"), Parameter("f_he", 0, 1)]
DRAWS = np.random.default_rng(0).normal([18.2, 0.5], [0.04, 0.1], (500, 2))
LOG_PROB = np.arange(500.0)
ATTRS = {"observation": "crab", "seed": 7}
ORIGIN = ATTRS | {"sbi_phys": __version__}


def holds_origin(text):
    found = json.loads(text)
    return ORIGIN.items() <= found.items() and "commit" in found


def test_csv_has_full_precision_units_and_origin(tmp_path):
    path = export_draws(DRAWS, PARAMETERS, tmp_path / "deep" / "draws.csv", log_prob=LOG_PROB, attrs=ATTRS)
    first, *rest = path.read_text().splitlines()
    assert first.startswith("# {") and holds_origin(first[2:])
    header, *rows = csv.reader(rest)
    assert header == ["lg_rcut [lg V]", "f_he", "log_prob"]
    np.testing.assert_array_equal(np.array(rows, dtype=float), np.column_stack([DRAWS, LOG_PROB]))
    import pandas

    np.testing.assert_allclose(pandas.read_csv(path, comment="#").to_numpy()[:, :2], DRAWS, rtol=1e-14)


def test_npz_and_npy(tmp_path):
    with np.load(export_draws(DRAWS, PARAMETERS, tmp_path / "draws.npz", log_prob=LOG_PROB, attrs=ATTRS)) as found:
        np.testing.assert_array_equal(found["theta"], DRAWS)
        np.testing.assert_array_equal(found["log_prob"], LOG_PROB)
        assert found["names"].tolist() == ["lg_rcut", "f_he"] and found["units"].tolist() == ["lg V", ""]
        assert holds_origin(str(found["attrs"]))
    np.testing.assert_array_equal(np.load(export_draws(DRAWS, PARAMETERS, tmp_path / "draws.npy", attrs=ATTRS)), DRAWS)
    beside = json.loads((tmp_path / "draws.npy.json").read_text())
    assert beside["columns"] == [{"name": "lg_rcut", "unit": "lg V"}, {"name": "f_he", "unit": ""}]
    assert holds_origin(json.dumps(beside["attrs"]))
    assert np.load(export_draws(DRAWS, PARAMETERS, tmp_path / "more.npy", log_prob=LOG_PROB)).shape == (500, 3)


def test_netcdf(tmp_path):
    data = read_netcdf(export_draws(DRAWS, PARAMETERS, tmp_path / "draws.nc", log_prob=LOG_PROB, attrs=ATTRS))
    np.testing.assert_array_equal(group(data, "posterior")["f_he"], DRAWS[None, :, 1])
    np.testing.assert_array_equal(group(data, "sample_stats")["lp"], LOG_PROB[None])
    assert ORIGIN.items() <= attributes(data).items()


def test_latex_is_rounded_to_the_errors(tmp_path):
    theta = np.column_stack([18.2 + 0.04 * np.linspace(-2, 2, 1001), np.linspace(0, 1, 1001)])
    lines = export_draws(theta, PARAMETERS, tmp_path / "table.tex", attrs=ATTRS).read_text().splitlines()
    assert lines[0].startswith("% {") and holds_origin(lines[0][2:]) and lines[1].startswith("% median")
    # the 68 % interval of a uniform column of half width 0.08 is +- 0.0544, its sd 0.0462
    assert lines[6] == r"$\lg R$ & lg V & $18.20^{+0.05}_{-0.05}$ & $18.12$ & $18.28$ & $18.20 \pm 0.05$ \\"
    assert lines[7].startswith(r"f\_he &  & $0.50^{+0.34}_{-0.34}$ & $0.025$ & $0.975$ & $0.50 \pm 0.29$")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_corner_plots_hold_the_origin_and_no_date(tmp_path, suffix):
    first, again = (export_draws(DRAWS, PARAMETERS, tmp_path / f"{k}.{suffix}", attrs=ATTRS).read_bytes() for k in "ab")
    assert first == again and len(first) > 10_000
    if suffix == "png":
        with Image.open(tmp_path / "a.png") as image:
            assert holds_origin(image.info["Comment"])
    else:
        assert b"crab" in first


def test_the_format_overrides_the_suffix(tmp_path):
    path = export_draws(DRAWS, PARAMETERS, tmp_path / "draws.txt", "csv")
    assert path.read_text().startswith("# {") and path.name == "draws.txt"
    assert export_draws(DRAWS, PARAMETERS, tmp_path / "DRAWS.CSV").read_text() == path.read_text()


def test_bad_input(tmp_path):
    def export(name="draws.csv", theta=DRAWS, parameters=PARAMETERS, **more):
        return export_draws(theta, parameters, tmp_path / name, **more)

    with pytest.raises(SettingError, match=r"expected a suffix of \.csv"):
        export("draws.xlsx")
    with pytest.raises(SettingError, match="format is 'netcdf4'; did you mean 'netcdf'|format is 'netcdf4'.*netcdf"):
        export(format="netcdf4")
    with pytest.raises(SettingError, match="for a corner plot"):
        export(format="corner")
    with pytest.raises(SettingError, match="expected different ones"):
        export(parameters=[PARAMETERS[0]] * 2)
    with pytest.raises(SettingError, match="called log_prob"):
        export(theta=DRAWS[:, :1], parameters=[Parameter("log_prob")], log_prob=LOG_PROB)
    with pytest.raises(ShapeError, match="theta"):
        export(theta=DRAWS[:, :1])
    with pytest.raises(NonFiniteError, match="theta"):
        export(theta=np.full((3, 2), np.nan))
    with pytest.raises(DataError, match="at least 2 draws"):
        export(theta=DRAWS[:1])
    with pytest.raises(ShapeError, match="log_prob"):
        export(log_prob=LOG_PROB[:-1])
    with pytest.raises(DataError, match="attrs cannot be written as JSON"):
        export(attrs={"x": np.nan})
    with pytest.raises(DataError, match="attrs cannot be written as JSON"):
        export(attrs={"x": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["draws.csv", "draws.npz", "draws.npy", "draws.nc", "draws.tex", "draws.png"])
def test_a_failed_write_leaves_the_former_file(tmp_path, name, monkeypatch):
    path = export_draws(DRAWS, PARAMETERS, tmp_path / name)
    before = path.read_bytes()

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(WriteError, match="No space left"):
        export_draws(DRAWS + 0.01, PARAMETERS, path)
    assert path.read_bytes() == before and not list(tmp_path.glob(".*tmp"))
