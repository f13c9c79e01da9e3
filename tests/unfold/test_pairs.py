"""Pairs from a store on disk: the same numbers as from memory, whatever the shards are, and failures that are not forgotten."""

from pathlib import Path

import numpy as np
import pytest

from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.priors import BoxPrior, Observable, Parameter
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.store import Store
from sbi_phys.unfold import Response
from sbi_phys.unfold.pairs import read_pairs, response_from_store

TRUTH_EDGES, RECO_EDGES = np.linspace(18.6, 19.8, 7), np.linspace(18.5, 19.9, 8)


class Events:
    """One event a row: true lg E is the parameter; measured lg E, zenith, weight and a trigger flag are observables."""

    prior = BoxPrior([Parameter("lg_energy", 18.5, 20.0, unit="lg eV"), Parameter("zenith", 0, 60, unit="deg")])
    parameters = prior.parameters
    observables = (Observable("reco", 1), Observable("stations", 2), Observable("weight", 1), Observable("seen", 1))

    def __init__(self, nan: float = 0.0) -> None:
        self.settings = {"nan": nan}
        self.nan = nan

    def simulate(self, theta, rng):
        n = len(theta)
        reco = theta[:, 0] + 0.1 * rng.standard_normal(n)
        out = np.column_stack([reco, rng.poisson(5, (n, 2)), rng.uniform(0.5, 2, n), rng.random(n) < 0.8])
        out[rng.random(n) < self.nan, 0] = np.nan
        return out


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return simulate(Events(), 5000, tmp_path / "events", seed=3, workers=1, shard_size=700, dtype="float64")


@pytest.fixture
def failing(tmp_path: Path) -> Store:
    return simulate(Events(0.2), 4000, tmp_path / "failing", seed=4, workers=1, shard_size=1500, dtype="float64")


def test_columns_by_name(store):
    theta, x = store.read()
    pairs = read_pairs(store, "lg_energy", "reco", weights="weight", reco_pass="seen")
    np.testing.assert_array_equal(pairs.truth, theta[:, :1])
    np.testing.assert_array_equal(pairs.reco_pass, x[:, 4] == 1)
    np.testing.assert_array_equal(pairs.reco[:, 0], np.where(pairs.reco_pass, x[:, 0], 0))
    np.testing.assert_array_equal(pairs.weights, x[:, 3])
    several = read_pairs(store.path, ["lg_energy", "zenith"], ("reco", "stations"))
    np.testing.assert_array_equal(several.truth, theta)
    np.testing.assert_array_equal(several.reco, x[:, :3])
    assert several.reco_pass.all() and (several.weights == 1).all()


def test_streamed_response_is_that_of_the_arrays(store):
    p = read_pairs(store, "lg_energy", "reco", weights="weight", reco_pass="seen")
    whole = Response.from_pairs(p.truth[:, 0], p.reco[:, 0], TRUTH_EDGES, RECO_EDGES, p.weights, p.reco_pass, exposure=3.0)
    streamed = response_from_store(
        store, "lg_energy", "reco", TRUTH_EDGES, RECO_EDGES, weights="weight", reco_pass="seen", exposure=3.0, background=np.ones(7)
    )
    for name in ("matrix", "n_simulated", "truth", "fakes"):
        np.testing.assert_allclose(getattr(streamed, name), getattr(whole, name), rtol=1e-12)
    assert streamed.exposure == 3.0 and (streamed.background == 1).all()
    assert (whole.fakes > 0).any()  # truths outside of the edges: the test sees them


def test_failed_rows_have_to_be_spoken_of(failing):
    with pytest.raises(DataError, match=rf"has {failing.n_failed} failed rows, first row .*failed='missed'"):
        read_pairs(failing, "lg_energy", "reco")
    missed = read_pairs(failing, "lg_energy", "reco", failed="missed")
    assert len(missed.truth) == 4000 and (~missed.reco_pass).sum() == failing.n_failed
    assert (missed.reco[~missed.reco_pass] == 0).all()
    dropped = read_pairs(failing, "lg_energy", "reco", failed="drop")
    assert len(dropped.truth) == failing.n_ok and dropped.reco_pass.all()
    # leaving them out is an efficiency of one
    efficiency = [
        response_from_store(failing, "lg_energy", "reco", TRUTH_EDGES, RECO_EDGES, failed=how).efficiency for how in ("missed", "drop")
    ]
    assert efficiency[0].mean() == pytest.approx(0.8 * efficiency[1].mean(), abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"truth": "energy"}, SettingError, "truth names 'energy', which is not in the store; expected some of lg_energy, zenith, reco"),
        ({"reco": []}, SettingError, "reco is empty"),
        ({"weights": "stations"}, ShapeError, "weights names 2 columns; expected 1"),
        ({"reco_pass": "weight"}, DataError, "reco_pass has values other than 0 and 1"),
        ({"failed": "ignore"}, SettingError, "failed is 'ignore'; expected one of error, missed, drop"),
    ],
)
def test_bad_names(store, arguments, error, message):
    with pytest.raises(error, match=message):
        read_pairs(store, **({"truth": "lg_energy", "reco": "reco"} | arguments))


def test_bad_bins(store):
    with pytest.raises(ShapeError, match="reco has 2 columns; expected 1 for a matrix"):
        response_from_store(store, "lg_energy", "stations", TRUTH_EDGES, RECO_EDGES)
    with pytest.raises(DataError, match="no overlap: of 5000 events"):
        response_from_store(store, "lg_energy", "reco", 10**TRUTH_EDGES, RECO_EDGES)
    with pytest.raises(DataError, match=r"no simulated events in truth bin 2 \[20, 20.5\)"):
        response_from_store(store, "lg_energy", "reco", [19, 19.5, 20, 20.5, 21], RECO_EDGES)
