"""Ratios of two hypotheses against Gaussians whose ratio is known, what holds by construction, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import sbi_phys as sp
from sbi_phys.core.errors import DataError, ModelFileError, NonFiniteError, SettingError, ShapeError, SimulatorMismatchError, SupportError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.hypotheses import TwoHypotheses
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from tests.toys import LinearGaussian

SMALL = {
    "network": ClassifierConfig(hidden=32, n_features=16, rank=16),
    "embedding": EmbeddingConfig(hidden=16, n_blocks=1, n_features=16),
    "device": "cpu",
}
QUICK = sp.TrainConfig(max_epochs=2, batch_size=64)
VARIANCE = 5.0  # of x about theta


def exact(x: np.ndarray, theta0: np.ndarray, theta1: np.ndarray) -> np.ndarray:
    return ((x - theta1) ** 2 - (x - theta0) ** 2) / (2 * VARIANCE)


def events(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    rng = rng_for(seed, "events")
    theta0, theta1 = rng.uniform(-2, 2, (2, n, 1))
    x0, x1 = (t + np.sqrt(VARIANCE) * rng.standard_normal((n, 1)) for t in (theta0, theta1))
    return theta0, x0, theta1, x1


@pytest.fixture(scope="module")
def parametrised() -> TwoHypotheses:
    return TwoHypotheses(seed=0, config=sp.TrainConfig(max_epochs=15, batch_size=256), **SMALL).fit(*events(10_000, 0))


def test_parametrised_ratio_of_gaussians(parametrised: TwoHypotheses) -> None:
    theta0, x0, theta1, x1 = events(3000, 1)
    x, a, b = np.concatenate([x0, x1]), np.concatenate([theta0, theta0]), np.concatenate([theta1, theta1])
    truth = exact(x, a, b)[:, 0]
    assert ((parametrised.log_ratio(x, a, b) - truth) ** 2).mean() < 0.02
    assert truth.var() > 0.4


def test_the_ratio_is_a_difference(parametrised: TwoHypotheses) -> None:
    theta0, x, theta1, _ = events(50, 2)
    theta2 = np.flip(theta0, axis=0)
    r = parametrised.log_ratio
    np.testing.assert_allclose(r(x, theta0, theta1), -r(x, theta1, theta0), atol=1e-6)
    np.testing.assert_allclose(r(x, theta0, theta1) + r(x, theta1, theta2), r(x, theta0, theta2), atol=1e-5)
    assert (r(x, theta0, theta0) == 0).all()


def test_rows_are_broadcast(parametrised: TwoHypotheses) -> None:
    theta0, x, theta1, _ = events(6, 2)
    full = parametrised.log_ratio(x, np.tile(theta0[0], (6, 1)), np.tile(theta1[0], (6, 1)))
    np.testing.assert_allclose(parametrised.log_ratio(x, theta0[0], theta1[0]), full, atol=1e-6)
    assert parametrised.log_ratio(x[0], theta0, theta1[0]).shape == (6,)
    assert parametrised.log_ratio(x[0], theta0[0], theta1[0]).shape == (1,)


def test_two_fixed_hypotheses_of_unequal_numbers() -> None:
    """1 : 3 in number, but the ratio is that of densities; the checks of the mean ratio hold."""
    rng = rng_for(3)
    x0, x1 = 0.8 + rng.standard_normal((4000, 1)), rng.standard_normal((12_000, 1))
    ratio = TwoHypotheses(seed=0, config=sp.TrainConfig(max_epochs=8, batch_size=256), **SMALL).fit(None, x0, None, x1)
    grid = np.linspace(-2, 2.5, 40)
    assert np.abs(ratio.log_ratio(grid[:, None]) - (0.8 * grid - 0.32)).max() < 0.2
    assert np.exp(ratio.log_ratio(rng.standard_normal((20_000, 1)))).mean() == pytest.approx(1, abs=0.04)


def test_one_fixed_hypothesis_gives_the_ratio_of_any_two() -> None:
    """Trained with theta1 = 0 only; asked for pairs that never met."""
    rng = rng_for(4)
    theta0 = rng.uniform(-2, 2, (8000, 1))
    x0 = theta0 + np.sqrt(VARIANCE) * rng.standard_normal((8000, 1))
    x1 = np.sqrt(VARIANCE) * rng.standard_normal((5000, 1))
    ratio = TwoHypotheses(seed=0, config=sp.TrainConfig(max_epochs=15, batch_size=256), **SMALL).fit(theta0, x0, [0.0], x1)
    _, x, _, _ = events(500, 5)
    a, b = rng_for(6).uniform(-1.8, 1.8, (2, 500, 1))
    truth = exact(x, a, b)[:, 0]
    assert ((ratio.log_ratio(x, a, b) - truth) ** 2).mean() < 0.1 * truth.var()


def test_varying_theta_is_given_to_the_events_of_the_fixed_one() -> None:
    ratio = TwoHypotheses(seed=0)
    theta0 = np.arange(6.0)[:, None]
    a, b = ratio._thetas(theta0, [9.0], 6, 9)
    np.testing.assert_array_equal(a[:6], theta0)
    assert sorted(a[6:12, 0]) == list(range(6)) and set(a[12:, 0]) <= set(range(6))
    assert (b == 9).all() and b.shape == (15, 1)
    a, b = ratio._thetas([9.0], theta0, 9, 6)
    assert (a == 9).all() and a.shape == (15, 1)
    np.testing.assert_array_equal(b[9:], theta0)
    assert sorted(b[:6, 0]) == list(range(6))


def test_ensemble_seed_and_global_generator() -> None:
    before = torch.random.get_rng_state()
    data = events(300, 0)
    one, again = (TwoHypotheses(seed=7, n_ensemble=2, config=QUICK, **SMALL).fit(*data) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    theta0, x, theta1, _ = events(10, 2)
    theta0, theta1 = 0.9 * theta0, 0.9 * theta1
    np.testing.assert_array_equal(one.log_ratio(x, theta0, theta1), again.log_ratio(x, theta0, theta1))
    members = []
    for net in one._nets:
        single = TwoHypotheses(seed=7, **SMALL)
        single._scaler, single._boxes, single._centre, single._width, single._nets = one._scaler, one._boxes, one._centre, one._width, [net]
        members.append(single.log_ratio(x, theta0, theta1))
    np.testing.assert_allclose(np.mean(members, axis=0), one.log_ratio(x, theta0, theta1), atol=1e-6)


# stores and simulators


TOY = LinearGaussian(dim=1, n_columns=2, noise=2.0)


def toy_error(ratio: TwoHypotheses, a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error over the variance of log r of 4000 events of a."""
    x = TOY.simulate(a, rng_for(9))
    truth = TOY.log_likelihood(x, a) - TOY.log_likelihood(x, b)
    return float(((ratio.log_ratio(x, a, b) - truth) ** 2).mean() / truth.var())


@pytest.mark.parametrize("source", ["memory", "streamed", "online"])
def test_rows_of_a_store_or_simulator_become_pairs(source: str, tmp_path: Path) -> None:
    fresh = TwoHypotheses(seed=0, config=sp.TrainConfig(max_epochs=6, batch_size=128), **SMALL)
    if source == "online":
        ratio = fresh.fit(simulator=TOY, online=True, n=24_000, workers=0)
    else:
        store = sp.simulate(TOY, 4000, tmp_path / "store", seed=0, workers=1, shard_size=500)
        ratio = fresh.fit(store, memory=100_000 if source == "streamed" else None)
        assert ratio.identity == store.identity
    a, b = TOY.prior.sample(4000, rng_for(1)).clip(-2, 2), TOY.prior.sample(4000, rng_for(2)).clip(-2, 2)
    assert toy_error(ratio, a, b) < 0.05
    ratio.save(tmp_path / "ratio.pt")
    again = sp.load(tmp_path / "ratio.pt", device="cpu")
    x = TOY.simulate(a[:5], rng_for(3))
    np.testing.assert_array_equal(again.log_ratio(x, a[:5], b[:5]), ratio.log_ratio(x, a[:5], b[:5]))
    with pytest.raises(SupportError, match="outside what was trained on"):
        again.log_ratio(x, [50.0], [0.0])


@pytest.mark.parametrize("memory", [None, 100_000])
def test_two_stores_at_fixed_theta(memory: int | None, tmp_path: Path) -> None:
    """3 : 1 in number, and the ratio is that of densities."""
    stores = [
        sp.simulate(TOY, None, tmp_path / str(n), theta=np.full((n, 1), theta), seed=n, workers=1, shard_size=500)
        for theta, n in ((0.5, 6000), (-0.5, 2000))
    ]
    ratio = TwoHypotheses(seed=0, config=sp.TrainConfig(max_epochs=6, batch_size=128), **SMALL).fit(*stores, memory=memory)
    assert toy_error(ratio, np.full((4000, 1), 0.5), np.full((4000, 1), -0.5)) < 0.05
    with pytest.raises(SupportError, match=r"expected \[0.5\] to \[0.5\] or \[-0.5\] to \[-0.5\]"):
        ratio.log_ratio([0.0, 0.0], [0.0], [0.5])


def test_stores_that_do_not_belong_together(tmp_path: Path) -> None:
    first = sp.simulate(TOY, 30, tmp_path / "first", seed=0, workers=1)
    other = sp.simulate(LinearGaussian(dim=1, n_columns=2, noise=0.2), 30, tmp_path / "other", seed=0, workers=1)
    fit = TwoHypotheses(config=QUICK, **SMALL).fit
    with pytest.raises(SimulatorMismatchError, match=r"another simulator or prior.*or arrays: fit\(None, x0, None, x1\)"):
        fit(first, other)
    with pytest.raises(DataError, match="x1 is missing; expected fit"):
        fit(first, np.zeros((30, 2)))
    with pytest.raises(DataError, match="x0 is missing; expected fit"):
        fit()


# what is refused


def test_theta_that_was_not_trained_on_is_refused(parametrised: TwoHypotheses) -> None:
    with pytest.raises(SupportError, match=r"theta1 has 1 of 2 rows outside what was trained on; the first is row 1: \[2.5\]"):
        parametrised.log_ratio([[0.0], [0.0]], [[0.0], [1.0]], [[0.0], [2.5]])


def test_bad_questions_are_refused(parametrised: TwoHypotheses) -> None:
    with pytest.raises(SettingError, match="theta1 is None; expected an array of 1 columns"):
        parametrised.log_ratio([0.0], [0.0])
    with pytest.raises(ShapeError, match="rows differ: x has 3, theta0 has 2, theta1 has 1"):
        parametrised.log_ratio(np.zeros((3, 1)), np.zeros((2, 1)), [0.0])
    with pytest.raises(DataError, match="x has 0 rows"):
        parametrised.log_ratio(np.zeros((0, 1)), [0.0], [0.0])
    with pytest.raises(NonFiniteError):
        parametrised.log_ratio([[np.inf]], [0.0], [0.0])
    with pytest.raises(SettingError, match="this TwoHypotheses is not trained"):
        TwoHypotheses().log_ratio([0.0])
    fixed = TwoHypotheses(config=QUICK, **SMALL).fit(None, np.zeros(40), None, np.ones(40))
    with pytest.raises(SettingError, match="theta0 is given; expected none"):
        fixed.log_ratio([0.0], [1.0], [0.0])


def test_bad_training_data_are_refused() -> None:
    theta, x = np.zeros((30, 1)), np.zeros((30, 1))
    fit = TwoHypotheses(config=QUICK, **SMALL).fit
    with pytest.raises(DataError, match="theta1 is None and the other is not"):
        fit(theta, x, None, x)
    with pytest.raises(ShapeError, match="theta0 has 30 rows and theta1 has 40; expected the same number where both vary"):
        fit(theta, x, np.zeros((40, 1)), np.zeros((40, 1)))
    with pytest.raises(ShapeError, match=r"x0 has rows of shape \(1,\), x1 of \(2,\)"):
        fit(None, x, None, np.zeros((30, 2)))
    with pytest.raises(ShapeError, match="theta0 has 1 columns and theta1 has 2"):
        fit(theta, x, [0.0, 1.0], x)
    with pytest.raises(DataError, match="x1 has 5 events; expected at least 20"):
        fit(None, x, None, x[:5])
    with pytest.raises(NonFiniteError, match="x0 has NaN"):
        fit(None, np.full((30, 1), np.nan), None, x)
    with pytest.raises(ShapeError, match=r"theta0 has shape \(7, 1\); expected \(30, d\)"):
        fit(np.zeros((7, 1)), x, theta, x)


def test_saved_and_loaded(parametrised: TwoHypotheses, tmp_path: Path) -> None:
    parametrised.save(tmp_path / "ratio.pt")
    again = sp.load(tmp_path / "ratio.pt", device="cpu")
    assert isinstance(again, TwoHypotheses)
    x, theta = np.array([[0.3], [-2.0]]), np.array([[0.5], [1.0]])
    np.testing.assert_array_equal(again.log_ratio(x, theta, [0.0]), parametrised.log_ratio(x, theta, [0.0]))
    assert (again.network, again.config, again.history) == (parametrised.network, parametrised.config, parametrised.history)
    with pytest.raises(SupportError, match="outside what was trained on"):
        again.log_ratio(x, [50.0], [0.0])
    with pytest.raises(ModelFileError, match="without an embedding"):
        sp.load(tmp_path / "ratio.pt", embedding=nn.Identity())


def test_two_fixed_hypotheses_with_an_embedding_of_ones_own_are_saved(tmp_path: Path) -> None:
    rng = rng_for(0)
    ratio = TwoHypotheses(embedding=nn.Linear(2, 8), device="cpu", config=sp.TrainConfig(max_epochs=1, batch_size=50))
    with pytest.raises(SettingError, match="this TwoHypotheses is not trained"):
        ratio.save(tmp_path / "ratio.pt")
    ratio.fit(None, rng.normal(0, 1, (100, 2)), None, rng.normal(1, 1, (100, 2))).save(tmp_path / "ratio.pt")
    with pytest.raises(ModelFileError, match="class Linear"):
        sp.load(tmp_path / "ratio.pt")
    again = sp.load(tmp_path / "ratio.pt", embedding=nn.Linear(2, 8), device="cpu")
    np.testing.assert_array_equal(again.log_ratio([0.1, 0.2]), ratio.log_ratio([0.1, 0.2]))
