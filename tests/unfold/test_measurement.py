import numpy as np
import pytest

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError
from sbi_phys.unfold import Response
from sbi_phys.unfold.measurement import load_measurement, read_measurement
from tests.unfold.toy_problem import EDGES, TRUTH, Toy, true_counts

TOY = "tests.unfold.toy_problem:Toy"


@pytest.fixture(scope="module")
def toy():
    return load_measurement(TOY)


def spectrum(m):
    return true_counts(m.fine_edges)


def test_fine_bins_divide_the_true_ones(toy):
    assert np.diff(toy.fine_edges).max() <= 0.02 + 1e-9
    assert np.isin(np.round(TRUTH, 6), np.round(toy.fine_edges, 6)).all()
    np.testing.assert_allclose(toy.coarse(spectrum(toy)), true_counts(TRUTH), rtol=1e-10)
    np.testing.assert_allclose(TRUTH[toy.inner], EDGES[:-1])


def test_both_responses_fold_the_spectrum_that_made_them_to_the_same_counts(toy):
    s = spectrum(toy)
    folded = toy.fine.fold(s)
    np.testing.assert_allclose(toy.extended(s).fold(toy.coarse(s)), folded, rtol=1e-10)
    np.testing.assert_allclose(toy.within(s).fold(toy.coarse(s)[toy.inner]), folded, rtol=1e-10)
    # and these are the true ones: far more is poured into the first bin from below than lost from it
    assert toy.within(s).fakes[0] > 0.1 > 0.01 > toy.within(s).fakes[5]
    np.testing.assert_allclose(
        folded, Toy(noise=False).response(np.linspace(17.9, 19.8, 381)) @ true_counts(np.linspace(17.9, 19.8, 381)), rtol=3e-3
    )


def test_auger_is_known_by_name():
    m = load_measurement("auger")
    assert m.counts.sum() == 215030 and m.counts.size == 18
    assert m.truth_edges[0] < m.reco_edges[0] and m.truth_edges[-1] > m.reco_edges[-1]
    assert set(m.alternatives) == {"with the resolution alone"} and len(m.variations) == 3
    assert load_measurement("auger", {"detector": "resolution"}).alternatives == {}


@pytest.mark.parametrize(
    ("spec", "settings", "complaint"),
    [
        ("augr", {}, "'augr' is not known; expected one of auger.*did you mean 'auger'"),
        ("nowhere.at_all:Toy", {}, "module 'nowhere.at_all'.* was not found"),
        ("tests.unfold.toy_problem:Tou", {}, "no class 'Tou'.*did you mean 'Toy'"),
        ("tests.unfold.toy_problem:NoResponse", {}, "has no 'response'"),
        (TOY, {"sead": 3}, "unknown key 'sead'.*did you mean 'seed'"),
        ("auger", {"detector": "perfect"}, "detector is 'perfect'"),
        ("auger", {"lg_below": 0.25}, "lg_below is 0.25; expected a multiple of 0.1"),
    ],
)
def test_a_wrong_name_or_setting_is_said(spec, settings, complaint):
    with pytest.raises(SettingError, match=complaint):
        load_measurement(spec, settings)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("Negative", "counts is -"), ("Fractions", "expected whole numbers"), ("Elsewhere", "expected all measured edges")],
)
def test_wrong_data_are_refused(name, complaint):
    with pytest.raises(DataError, match=complaint):
        load_measurement(f"tests.unfold.toy_problem:{name}")


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


ROWS = ("# a comment", "lg_e_low,lg_e_high,counts", "18.4,18.5,900", "18.5,18.6,500", "18.6,18.7,240", "18.7,18.8,130")


def test_a_file_of_counts_with_a_resolution(tmp_path):
    m = read_measurement(write(tmp_path / "counts.csv", *ROWS), "0.15", 2.0)
    np.testing.assert_allclose(m.counts, [900, 500, 240, 130])
    np.testing.assert_allclose(m.reco_edges, [18.4, 18.5, 18.6, 18.7, 18.8])
    assert m.truth_edges[0] < 18.4 - 3 * 0.15 / np.log(10) and m.truth_edges[-1] > 18.8 and m.exposure == 2.0
    direct = Response.from_resolution(10.0 ** (m.fine_edges - 18), 10.0 ** (m.reco_edges - 18), lambda e: 0.15 * e).matrix
    np.testing.assert_allclose(m.fine.matrix, direct, rtol=1e-6, atol=1e-12)
    curve = write(tmp_path / "sigma.csv", "lg_e,sigma", "18,0.15", "19,0.15")
    np.testing.assert_allclose(read_measurement(tmp_path / "counts.csv", str(curve)).fine.matrix, m.fine.matrix, rtol=1e-9)


@pytest.mark.parametrize(
    ("lines", "resolution", "error", "complaint"),
    [
        (("lg_e_low,lg_e_high,n", "18.4,18.5,9"), "0.1", DataError, "counts is missing"),
        (("lg_e_low,lg_e_high,counts",), "0.1", DataError, "no rows"),
        (("lg_e_low,lg_e_high,counts", "18.4,18.5,many"), "0.1", DataError, "counts is 'many' in row 1"),
        (("lg_e_low,lg_e_high,counts", "18.4,18.5"), "0.1", DataError, "counts is None in row 1"),
        (
            ("lg_e_low,lg_e_high,counts", "18.4,18.5,9", "18.6,18.7,5"),
            "0.1",
            DataError,
            "row 2 begins at 18.6 where the one before ends at 18.5",
        ),
        (("lg_e_low,lg_e_high,counts", "18.4,18.5,-3", "18.5,18.6,5"), "0.1", DataError, "counts is -3 at reco bin 0"),
        (("lg_e_low,lg_e_high,counts", "18.4,18.5,1.5", "18.5,18.6,5"), "0.1", DataError, "counts is 1.5 in bin 0"),
        (("lg_e_low,lg_e_high,counts", "18.4,18.5,nan", "18.5,18.6,5"), "0.1", NonFiniteError, "counts"),
        (ROWS, "1.5", SettingError, "resolution is 1.5"),
        (ROWS, "absent.csv", DataError, "absent.csv cannot be read: No such file"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, lines, resolution, error, complaint):
    with pytest.raises(error, match=complaint):
        read_measurement(write(tmp_path / "counts.csv", *lines), resolution)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv cannot be read: No such file"):
        read_measurement(tmp_path / "none.csv", "0.1")
