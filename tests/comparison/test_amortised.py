"""Amortised Bayes factors against the closed form of conjugate models."""

import numpy as np
import pytest
from scipy.special import gammaln
from scipy.stats import multivariate_normal

from sbi_phys.comparison import ModelComparison, model_comparison
from sbi_phys.core.errors import DataError, ModelFileError, NonFiniteError, SettingError, ShapeError, SimulatorMismatchError
from sbi_phys.core.rng import rng_for
from sbi_phys.nets.embedding_set import DeepSet
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.loop import TrainConfig
from simulators import LineSearch, OnOff
from tests.toys import LinearGaussian

SMALL = EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)
QUICK = TrainConfig(batch_size=256, max_epochs=8, patience=8)


def gaussian(prior_sd):
    return LinearGaussian(dim=2, n_columns=4, noise=1.0, prior_sd=prior_sd)


def log_evidence(sim, x):
    k = len(sim.matrix)
    covariance = sim.settings["prior_sd"] ** 2 * sim.matrix @ sim.matrix.T + sim.noise**2 * np.eye(k)
    return multivariate_normal.logpdf(x, np.zeros(k), covariance)


MODELS = {"narrow": gaussian(0.3), "wide": gaussian(1.0)}


@pytest.fixture(scope="module")
def trained():
    return model_comparison(
        MODELS,
        [0.3, 0.1, -0.2, 1.0],
        n_simulations=10_000,
        n_ensemble=1,
        embedding=SMALL,
        config=QUICK,
        n_check=1000,
        prior={"narrow": 1, "wide": 2},
    )


def data(n, seed=7):
    rng = rng_for(seed)
    return np.concatenate([m.simulate(m.prior.sample(n, rng), rng) for m in MODELS.values()])


def test_bayes_factors_are_the_closed_form(trained):
    x = data(50)
    want = log_evidence(MODELS["wide"], x) - log_evidence(MODELS["narrow"], x)
    got = trained.log_bayes_factor(x, "wide", "narrow")
    assert want.std() > 0.5
    assert np.sqrt(np.mean((got - want) ** 2)) < 0.1
    np.testing.assert_allclose(trained.log_bayes_factor(x, "narrow", "wide"), -got)
    assert isinstance(trained.log_bayes_factor(x[0], "wide", "narrow"), float)


def test_probabilities_follow_the_prior_odds(trained):
    x = data(5)
    p = trained.probabilities(x)
    np.testing.assert_allclose(p.sum(axis=1), 1)
    np.testing.assert_allclose(np.log(p[:, 1] / p[:, 0]), trained.log_bayes_factor(x, "wide", "narrow") + np.log(2), atol=1e-9)
    equal = trained.probabilities(x, {"narrow": 1, "wide": 1})
    np.testing.assert_allclose(p[:, 1] / p[:, 0], 2 * equal[:, 1] / equal[:, 0])
    np.testing.assert_allclose(trained.probability, trained.probabilities(trained.x_obs))


def test_the_calibration_is_part_of_the_result(trained):
    assert trained.calibration.n == 2000
    assert trained.calibration.pvalue > 0.01
    assert "calibrated" in trained.summary()
    assert trained.plot().get_xlabel() == "predicted probability"


def test_the_same_seed_gives_the_same_numbers():
    settings = {
        "n_simulations": 500,
        "n_check": 0,
        "n_ensemble": 2,
        "embedding": SMALL,
        "config": TrainConfig(batch_size=128, max_epochs=2),
    }
    first, again, other = (model_comparison(MODELS, seed=s, **settings) for s in (1, 1, 2))
    x = data(5)
    np.testing.assert_array_equal(first.probabilities(x), again.probabilities(x))
    assert (first.probabilities(x) != other.probabilities(x)).any()
    with pytest.raises(SettingError, match="n_check was 0"):
        first.plot()


def test_three_models_handed_in_as_simulations():
    """Normals of width 1, 2 and 4: the classifier is quadratic in x, which the last layer holds exactly."""
    rng = rng_for(3)
    x = {f"sd {s}": s * rng.standard_normal((8000, 1)) for s in (1, 2, 4)}
    got = model_comparison(x, n_check=500, n_ensemble=1, embedding=SMALL, config=QUICK)
    at = np.array([[0.0], [2.0], [5.0]])
    for s in (2, 4):
        want = -np.log(s) + 0.5 * at[:, 0] ** 2 * (1 - s**-2)
        np.testing.assert_allclose(got.log_bayes_factor(at, f"sd {s}", "sd 1"), want, atol=0.25)
    assert got.calibration.pvalue > 0.01


def test_models_of_event_sets():
    models = {shape: LineSearch(n_events=[5, 20], background=shape, f_max=0.05) for shape in ("exponential", "power")}
    settings = {"n_simulations": 3000, "n_check": 500, "n_ensemble": 1, "config": TrainConfig(batch_size=128, max_epochs=6)}
    got = model_comparison(models, embedding=DeepSet(1, hidden=16, n_pooled=16, config=SMALL), **settings)
    x = models["power"].simulate(models["power"].prior.sample(4, rng_for(0)), rng_for(1))
    slots = x.reshape(4, 20, 2)
    turned = slots.copy()
    for row in turned:
        m = int(row[:, 1].sum())
        row[:m] = row[:m][::-1]
    np.testing.assert_allclose(got.probabilities(turned.reshape(4, 40)), got.probabilities(x), atol=1e-5)
    assert got.calibration.log_score < np.log(2)


def test_counts_are_compared_by_their_total():
    """Poisson counts of one rate, gamma priors: the closed form depends on the total alone, and so does what is learned."""
    rng = rng_for(4)
    priors = {"wide": (2.0, 0.5), "narrow": (4.0, 1.0)}
    x = {k: rng.poisson(rng.gamma(a, 1 / b, 20_000)[:, None], (20_000, 4)).astype(float) for k, (a, b) in priors.items()}
    got = model_comparison(x, n_check=500, n_ensemble=1, embedding=SMALL, config=QUICK, device="cpu")
    at = np.array([[0.0, 0, 1, 3], [2, 2, 0, 0], [4, 3, 3, 5], [12, 10, 22, 7], [30, 10, 5, 6]])
    total = at.sum(axis=1)
    evidence = {k: a * np.log(b) - gammaln(a) + gammaln(a + total) - (a + total) * np.log(b + 4) for k, (a, b) in priors.items()}
    found = got.log_bayes_factor(at, "narrow", "wide")
    np.testing.assert_allclose(found, evidence["narrow"] - evidence["wide"], atol=0.15)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_a_saved_comparison_comes_back(trained, tmp_path):
    x = data(5)
    trained.save(tmp_path / "c.pt")
    again = ModelComparison.load(tmp_path / "c.pt", device="cpu")
    np.testing.assert_array_equal(again.probabilities(x), trained.probabilities(x))
    assert again.names == trained.names
    assert again.calibration.summary() == trained.calibration.summary()
    np.testing.assert_array_equal(again.calibration.band, trained.calibration.band)
    with pytest.raises(ModelFileError, match="without an embedding"):
        ModelComparison.load(tmp_path / "c.pt", embedding=DeepSet(1))
    (tmp_path / "other.pt").write_bytes((tmp_path / "c.pt").read_bytes()[:-200])
    with pytest.raises(ModelFileError, match="truncated"):
        ModelComparison.load(tmp_path / "other.pt")


@pytest.mark.parametrize(
    ("models", "error", "words"),
    [
        ({"one": gaussian(1.0)}, SettingError, "at least two"),
        ([gaussian(1.0), gaussian(2.0)], SettingError, "expected {name: simulator}"),
        ({"a": gaussian(1.0), "b": OnOff()}, SimulatorMismatchError, "b has observables"),
        ({"a": np.ones((300, 2)), "b": np.ones((300, 3))}, ShapeError, r"simulations of b have shape \(150, 3\)"),
        ({"a": np.ones((300, 2)), "b": np.ones((200, 2))}, DataError, "b has 50 simulations"),
        ({"a": np.ones((300, 2)), "b": np.full((300, 2), np.inf)}, NonFiniteError, "simulations of b"),
    ],
)
def test_bad_models(models, error, words):
    with pytest.raises(error, match=words):
        model_comparison(models, n_simulations=100, n_check=150)


def test_bad_data_and_names(trained):
    with pytest.raises(ShapeError, match=r"x has shape \(3,\); expected \(4,\)"):
        trained.probabilities([1.0, 2.0, 3.0])
    with pytest.raises(NonFiniteError):
        trained.probabilities([np.nan] * 4)
    with pytest.raises(SettingError, match="did you mean 'narrow'"):
        trained.log_bayes_factor([0.0] * 4, "narow", "wide")
    with pytest.raises(SettingError, match="prior"):
        trained.probabilities([0.0] * 4, {"narrow": -1, "wide": 1})
