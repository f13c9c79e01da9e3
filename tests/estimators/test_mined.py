"""Mined gold on the toy z ~ N(theta, 1), x ~ N(z, 2): the ratio is Gaussian with variance 5, the score t = (x - theta) / 5."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sbi_phys as sp
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.hypotheses import TwoHypotheses
from sbi_phys.estimators.mined import SALLY, MinedRatio, alice_loss, rolr_loss
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embedding_vector import EmbeddingConfig

NETWORK = {
    "network": ClassifierConfig(hidden=32, n_features=16, rank=16),
    "embedding": EmbeddingConfig(hidden=16, n_blocks=1, n_features=16),
    "device": "cpu",
}
CONFIG = sp.TrainConfig(max_epochs=15, batch_size=128)


def exact(x: np.ndarray, theta0: np.ndarray, theta1: np.ndarray) -> np.ndarray:
    return ((x - theta1) ** 2 - (x - theta0) ** 2)[:, 0] / 10


def gold(n: int, seed: int, width: float = 2.0) -> dict[str, np.ndarray]:
    """Events of both hypotheses, half each, with joint ratio and joint score."""
    rng = rng_for(seed, "gold")
    theta0, theta1 = rng.uniform(-width, width, (2, n, 1))
    y = np.arange(n) % 2
    own = np.where(y[:, None] == 1, theta0, theta1)
    z = own + rng.standard_normal((n, 1))
    x = z + 2 * rng.standard_normal((n, 1))
    log_r = ((z - theta1) ** 2 - (z - theta0) ** 2)[:, 0] / 2
    return {"theta0": theta0, "theta1": theta1, "x": x, "y": y, "log_r_joint": log_r, "score": z - own}


def error(ratio: object, width: float = 2.0) -> float:
    test = gold(4000, 9, 0.98 * width)
    args = test["x"], test["theta0"], test["theta1"]
    return float(((ratio.log_ratio(*args) - exact(*args)) ** 2).mean())  # type: ignore[attr-defined]


def test_the_joint_quantities_average_to_those_of_x() -> None:
    """E[r(x, z) | x, theta1] = r(x), E[t(x, z) | x, theta] = t(x): what every loss here relies on, by binned means."""
    rng = rng_for(0)
    n, theta0 = 400_000, 0.7
    z = rng.standard_normal(n)  # theta1 = 0
    x = z + 2 * rng.standard_normal(n)
    joint, score = np.exp(theta0 * z - theta0**2 / 2), z
    for low in (-2.0, 0.0, 1.5):
        chosen = (x > low) & (x < low + 0.2)
        centre, error_r, error_t = x[chosen].mean(), joint[chosen].std() / np.sqrt(chosen.sum()), 1 / np.sqrt(chosen.sum())
        assert joint[chosen].mean() == pytest.approx(np.exp((theta0 * centre - theta0**2 / 2) / 5), abs=4 * error_r)
        assert score[chosen].mean() == pytest.approx(centre / 5, abs=4 * error_t)


@pytest.mark.slow
def test_gold_beats_labels() -> None:
    """As many events, same network: soft labels cut the error, scores do not spoil it."""
    train = gold(6000, 0)
    one = train["y"] == 1
    labels = TwoHypotheses(seed=0, config=CONFIG, **NETWORK).fit(
        train["theta0"][one], train["x"][one], train["theta1"][one], _events_of(train["theta1"][one], 2)
    )
    alice = MinedRatio(seed=0, loss="alice", config=CONFIG, **NETWORK).fit(**train)
    alices = MinedRatio(seed=0, loss="alices", config=CONFIG, **NETWORK).fit(**train)
    assert error(alice) < 0.8 * error(labels)
    assert error(alice) < 0.02
    assert error(alices) < 0.02


def _events_of(theta: np.ndarray, seed: int) -> np.ndarray:
    return theta + np.sqrt(5) * rng_for(seed, "events").standard_normal(theta.shape)


@pytest.mark.parametrize("loss", ["rolr", "rascal"])
def test_regression_on_the_ratio(loss: str) -> None:
    ratio = MinedRatio(seed=0, loss=loss, config=CONFIG, **NETWORK).fit(**gold(6000, 0, 1.0))
    test = gold(2000, 9, 1.0)
    assert error(ratio, 1.0) < 0.15 * exact(test["x"], test["theta0"], test["theta1"]).var()


def test_scores_alone_carry_the_ratio() -> None:
    """With uninformative soft labels and a heavy weight on scores, the gradient is still learned from the scores."""
    train = gold(6000, 0)
    train["log_r_joint"] = np.zeros(6000)
    ratio = MinedRatio(seed=0, loss="alices", alpha=100.0, config=CONFIG, **NETWORK).fit(**train)
    test = gold(4000, 9, 1.9)
    args = test["x"], test["theta0"], test["theta1"]
    slope = np.polyfit(exact(*args), ratio.log_ratio(*args), 1)[0]
    assert slope == pytest.approx(1, abs=0.25)


def test_losses_by_hand() -> None:
    log_r, target, y = torch.tensor([0.5, -0.2]), torch.tensor([1.0, 0.3]), torch.tensor([0.0, 1.0])
    expected = [(np.exp(1.0) - np.exp(0.5)) ** 2, (np.exp(-0.3) - np.exp(0.2)) ** 2]
    np.testing.assert_allclose(rolr_loss(log_r, target, y).numpy(), expected, rtol=1e-5)
    s, p = 1 / (1 + np.exp(-np.array([1.0, 0.3]))), 1 / (1 + np.exp(-np.array([0.5, -0.2])))
    np.testing.assert_allclose(alice_loss(log_r, target).numpy(), -s * np.log(p) - (1 - s) * np.log(1 - p), rtol=1e-5)


def test_sally_regresses_the_score() -> None:
    rng = rng_for(2)
    theta = 0.5
    z = theta + rng.standard_normal(8000)
    x = z + 2 * rng.standard_normal(8000)
    sally = SALLY(seed=0, n_ensemble=2, device="cpu", config=sp.TrainConfig(max_epochs=10, batch_size=256)).fit(x, z - theta)
    fresh = theta + np.sqrt(5) * rng.standard_normal((20_000, 1))
    t = sally.score(fresh)
    assert t.shape == (20_000, 1)
    assert np.polyfit(fresh[:, 0] - theta, t[:, 0], 1)[0] == pytest.approx(0.2, abs=0.02)
    assert t.mean() == pytest.approx(0, abs=0.03)
    information = sally.information(fresh)
    assert information.shape == (1, 1) and information[0, 0] == pytest.approx(0.2, abs=0.03)
    assert sally.score(fresh[0]).shape == (1,)
    np.testing.assert_allclose(sally.score(fresh[0]), t[0], atol=1e-6)


def test_same_seed_same_result() -> None:
    quick = sp.TrainConfig(max_epochs=1, batch_size=64)
    train, test = gold(400, 0), gold(10, 9, 1.5)
    before = torch.random.get_rng_state()
    one, again = (MinedRatio(seed=3, loss="rascal", config=quick, **NETWORK).fit(**train) for _ in range(2))
    scores = [SALLY(seed=3, config=quick, device="cpu").fit(train["x"], train["score"]).score(test["x"]) for _ in range(2)]
    assert torch.equal(before, torch.random.get_rng_state())
    args = test["x"], test["theta0"], test["theta1"]
    np.testing.assert_array_equal(one.log_ratio(*args), again.log_ratio(*args))
    np.testing.assert_array_equal(*scores)


# what is refused


@pytest.mark.parametrize(
    ("change", "error_class", "complaint"),
    [
        ({"y": np.full(40, 2)}, DataError, "y has values .*; expected 0 and 1"),
        ({"y": np.ones(40)}, DataError, "expected 0 and 1, both of them"),
        ({"y": (np.arange(40) < 5) * 1}, DataError, "12 % of the events are from theta0; expected half"),
        ({"log_r_joint": np.full(40, np.inf)}, NonFiniteError, "log_r_joint has NaN or Inf"),
        ({"log_r_joint": np.zeros(39)}, ShapeError, r"log_r_joint has shape \(39,\)"),
        ({"score": None}, DataError, "score is None; expected"),
        ({"score": np.zeros((40, 2))}, ShapeError, r"score has shape \(40, 2\)"),
        ({"theta0": np.zeros((3, 1))}, ShapeError, r"theta0 has shape \(3, 1\)"),
    ],
)
def test_bad_gold_is_refused(change: dict[str, object], error_class: type[Exception], complaint: str) -> None:
    with pytest.raises(error_class, match=complaint):
        MinedRatio(loss="alices").fit(**{**gold(40, 0), **change})  # type: ignore[arg-type]


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingError, match="loss is 'alise'; expected one of alice, alices, rolr, rascal"):
        MinedRatio(loss="alise")
    with pytest.raises(SettingError, match="alpha is -1"):
        MinedRatio(alpha=-1)
    with pytest.raises(SettingError, match="this SALLY is not trained"):
        SALLY().score([0.0])
    with pytest.raises(SettingError, match="embedding is a Linear"):
        SALLY(embedding=torch.nn.Linear(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="score has shape"):
        SALLY().fit(np.zeros((30, 1)), np.zeros((29, 1)))


def test_saved_and_loaded(tmp_path: Path) -> None:
    data = gold(200, 0)
    quick = sp.TrainConfig(max_epochs=1, batch_size=50)
    ratio = MinedRatio(seed=3, loss="alices", alpha=0.5, n_ensemble=2, config=quick, **NETWORK).fit(**data)
    ratio.save(tmp_path / "ratio.pt")
    again = sp.load(tmp_path / "ratio.pt", device="cpu")
    assert isinstance(again, MinedRatio)
    assert (again.loss, again.alpha, again.seed, again.n_ensemble) == ("alices", 0.5, 3, 2)
    np.testing.assert_array_equal(again.log_ratio([0.3], [1.0], [0.0]), ratio.log_ratio([0.3], [1.0], [0.0]))
    sally = SALLY(seed=3, n_ensemble=2, device="cpu", config=quick)
    with pytest.raises(SettingError, match="this SALLY is not trained"):
        sally.save(tmp_path / "sally.pt")
    sally.fit(data["x"], data["score"]).save(tmp_path / "sally.pt")
    found = sp.load(tmp_path / "sally.pt", device="cpu")
    assert isinstance(found, SALLY)
    np.testing.assert_array_equal(found.score([0.3]), sally.score([0.3]))
    assert found.history == sally.history
