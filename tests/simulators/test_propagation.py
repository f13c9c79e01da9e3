import hashlib
import json
import shutil

import numpy as np
import pytest
from scipy.integrate import quad

from simulators.auger import DATA_FOLDER, load_auger
from simulators.errors import SimulatorSettingError, TableError
from simulators.propagation import CHARGES, EBL_MODELS, MASSES, energy_weights, injection, load_propagation


@pytest.mark.parametrize("ebl", EBL_MODELS)
def test_shipped_file_is_the_recorded_one(ebl):
    name = f"propagation_{ebl}.npz"
    recorded = json.loads((DATA_FOLDER / "propagation.json").read_text())[name]
    blob = (DATA_FOLDER / name).read_bytes()
    assert hashlib.sha256(blob).hexdigest() == recorded["sha256"]
    assert len(blob) == recorded["bytes"] < 1_000_000
    provenance = load_propagation(ebl).provenance
    assert provenance["licence"] == "MIT"
    assert provenance["source_sha256"] == recorded["source_sha256"]


@pytest.mark.parametrize("ebl", EBL_MODELS)
def test_a_nucleus_leaves_at_most_its_nucleons(ebl):
    p = load_propagation(ebl, 0.0, n_below=0)
    distance = 1500 - 1.0  # sum of d dln(d), nearly the integral over d
    fragments = p.matrix.sum(axis=(2, 3)) / distance
    for a, mass in enumerate(MASSES):
        assert 0.6 * mass < fragments[a].max() <= mass * 1.05  # the factor (1+z)^-1 takes some
        assert not p.matrix[a, :, a + 1 :].any()  # no fragment is heavier than its parent
    # no particle gains energy, but for the width of a bin
    assert np.triu(p.matrix.sum(axis=(0, 2)), 2).sum() < 1e-9 * p.matrix.sum()


def test_evolution_raises_distant_sources():
    weak, strong = (load_propagation("Gilmore12", m, n_below=0).matrix.sum(axis=(0, 1, 2)) for m in (0.0, 5.0))
    assert np.all(strong >= weak)
    ratio = strong / weak
    assert ratio[0] > 1.1  # low energies come from far away
    assert ratio[100] < 1.02  # 10^20.5 eV do not


def test_continuation_below_the_grid_is_smooth_and_leaves_the_grid_alone():
    plain, more = load_propagation(n_below=0), load_propagation(n_below=20)
    np.testing.assert_array_equal(more.matrix[:, 20:, :, 20:], plain.matrix)
    np.testing.assert_allclose(more.lg_edges[20:], plain.lg_edges)
    injected = injection(2.0, 18.7, more.lg_centres) * np.array([0.2, 0.2, 0.2, 0.2, 0.2])[:, None]
    flux = more.arrive(injected)[0].sum(axis=0)
    slope = np.diff(np.log(flux))
    assert np.abs(slope[:40] - slope[:40].mean()).max() < 0.12  # no step at the join, bin 20; Monte Carlo noise of K


def test_injection_is_the_formula():
    lg = np.array([18.5, 19.0, 20.0])
    got = injection(np.array([1.5]), np.array([18.6]), lg)[0]
    for a, z in enumerate(CHARGES):
        for i, e in enumerate(10.0 ** (lg - 18)):
            cut = z * 10**0.6
            want = e**-0.5 * (1.0 if e < cut else np.exp(1 - e / cut))
            assert got[a, i] == pytest.approx(want, rel=1e-12)


def test_arrival_is_linear_in_the_injection():
    p = load_propagation()
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 1, 5, p.lg_centres.size))
    np.testing.assert_allclose(p.arrive(2 * a + 3 * b), 2 * p.arrive(a) + 3 * p.arrive(b), rtol=1e-10)


@pytest.mark.parametrize("gamma", [-3.0, -1.03, 0.96, 2.0, 2.5])
def test_energy_weights_against_quadrature(gamma):
    got = energy_weights(gamma, 18.3, 17.8)[0]
    for weight, z in zip(got, CHARGES, strict=True):
        cut = z * 10**0.3
        below = quad(lambda e: e ** (1 - gamma), 10**-0.2, cut, epsrel=1e-11)[0]
        above = quad(lambda e, cut=cut: e ** (1 - gamma) * np.exp(1 - e / cut), cut, 80 * cut, epsrel=1e-11)[0]
        assert weight == pytest.approx(below + above, rel=1e-6)


def test_ctg_fit_describes_the_spectrum():
    """The published CTG fit, made with the same ingredients, against the unfolded flux; one common normalisation."""
    data = load_auger()
    p = load_propagation("Gilmore12", 0.0)
    injected = injection(-1.03, 18.21, p.lg_centres) * np.array([0.6794, 0.31, 0.01, 0.0006, 0.0])[:, None]
    cumulative = np.append(0, np.cumsum(p.arrive(injected)[0].sum(axis=0)))
    flux = np.diff(np.interp(data.spectrum_edges, p.lg_edges, cumulative)) / np.diff(10.0**data.spectrum_edges)
    centres = 0.5 * (data.spectrum_edges[1:] + data.spectrum_edges[:-1])
    fitted = (centres > 18.6) & (centres < 19.6)
    ratio = flux / data.flux
    ratio /= ratio[fitted].mean()
    assert ratio[fitted].min() > 0.94
    assert ratio[fitted].max() < 1.07
    assert ratio[np.isclose(centres, 19.85)][0] == pytest.approx(0.78, abs=0.03)
    assert ratio[np.isclose(centres, 20.05)][0] == pytest.approx(0.49, abs=0.03)


def test_bad_input_names_what_is_stored(tmp_path):
    with pytest.raises(SimulatorSettingError, match=r"evolution is 4; expected one of -3, 0, 3, 5.*--evolution -3 0 3 5 4"):
        load_propagation("Gilmore12", 4.0)
    with pytest.raises(SimulatorSettingError, match="did you mean 'Gilmore12'"):
        load_propagation("Gilmore2012")
    for name in ("propagation.json", "propagation_Gilmore12.npz"):
        shutil.copy(DATA_FOLDER / name, tmp_path)
    path = tmp_path / "propagation_Gilmore12.npz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(TableError, match="altered or truncated"):
        load_propagation("Gilmore12", folder=tmp_path)
    with pytest.raises(TableError, match="propagation_Kneiske04"):
        load_propagation("Kneiske04", folder=tmp_path)
