import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simulators.auger import DATA_FOLDER, load_auger
from simulators.errors import TableError

FILES = sorted(p.name for p in DATA_FOLDER.glob("auger_*.csv"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copy(DATA_FOLDER / name, tmp_path / name)
    return tmp_path


def edit(path: Path, old: str, new: str) -> int:
    text = path.read_text()
    assert text.count(old) >= 1
    path.write_text(text.replace(old, new, 1))
    return text[: text.index(old)].count("\n") + 1


def test_published_totals():
    data = load_auger()
    assert data.spectrum_counts.sum() == 215030
    assert data.spectrum_counts[data.spectrum_edges[:-1] > 18.69].sum() == 55730
    assert data.xmax_counts.sum(axis=1)[9:].tolist() == [413, 297, 230, 165, 114, 87, 63, 40, 37]
    assert data.exposure == 60425.7
    np.testing.assert_allclose(data.spectrum_edges, np.arange(18.4, 20.25, 0.1), atol=1e-9)


def test_flux_follows_from_counts_exposure_and_correction():
    data = load_auger()
    flux = data.spectrum_counts / (data.exposure * np.diff(10.0**data.spectrum_edges)) * data.unfolding_correction
    np.testing.assert_allclose(flux, data.flux, rtol=6e-4)  # the tables are rounded to three decimals


@pytest.mark.parametrize("name", FILES)
def test_provenance_in_every_file(name):
    head = [line for line in (DATA_FOLDER / name).read_text().splitlines() if line.startswith("#")]
    assert any("doi:10.1103" in line for line in head)
    assert any("MIT licence" in line for line in head)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("auger_2020_vertical_spectrum.csv", "17843,", "17844,", "sum to 215031; expected 215030"),
        ("auger_2020_vertical_spectrum.csv", "17843,", "17843.5,", "raw_counts = 17843.5; expected a whole number"),
        ("auger_2020_vertical_spectrum.csv", "2.1639e-19", "-2.1639e-19", "flux = -2.1639e-19; expected a positive number"),
        ("auger_2020_vertical_spectrum.csv", "18.75,", "18.76,", "expected 18.7, where the bin before ends"),
        ("auger_2020_vertical_spectrum.csv", "raw_counts,exposure", "counts,exposure", "got columns"),
        ("auger_2020_vertical_spectrum.csv", "# Source:", "# From:", "expected the provenance"),
        ("auger_2014_xmax_histograms.csv", "18.7,18.8,413", "18.7,18.8,414", "counts that sum to 413; expected n_events = 414"),
        ("auger_2014_xmax_resolution.csv", "1.198e+01", "nan", "got sigma1 = 'nan'; expected a finite number"),
        ("auger_2014_xmax_resolution.csv", "1.198e+01", "-1.198e+01", "sigma1 = -11.98; expected a positive number"),
        ("auger_2014_xmax_resolution.csv", "1.198e+01", "1.198e+01,7", "got 8 cells; expected 7"),
        ("auger_2014_xmax_acceptance.csv", "8.976e+02", "1.0", "x2 = 1; expected x2 > x1"),
        ("auger_2014_xmax_systematics.csv", "18.7,18.8", "18.7,18.85", "expected 18.85, where the bin before ends"),
        ("auger_2014_xmax_systematics.csv", "17.8,17.9", "17.7,17.9", "the energy bins of the Xmax histograms"),
    ],
)
def test_altered_table_is_refused_with_file_line_and_expectation(folder, name, old, new, message):
    line = edit(folder / name, old, new)
    with pytest.raises(TableError) as caught:
        load_auger(folder)
    text = str(caught.value)
    assert name in text
    assert message in text
    if ", line " in text and "where the bin before" not in message:
        assert f"line {line}:" in text


def test_missing_and_binary_files(folder):
    (folder / FILES[0]).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match="expected a text file"):
        load_auger(folder)
    (folder / FILES[0]).unlink()
    with pytest.raises(TableError, match="cannot be read"):
        load_auger(folder)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(FILES), share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_never_passes(folder, name, share):
    whole = (DATA_FOLDER / name).read_bytes()
    (folder / name).write_bytes(whole[: int(share * len(whole))])
    try:
        with pytest.raises(TableError, match=name):
            load_auger(folder)
    finally:
        (folder / name).write_bytes(whole)
    assert load_auger(folder).exposure == 60425.7
