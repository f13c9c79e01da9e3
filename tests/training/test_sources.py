"""Sources of rows: what goes to memory, to a stream and to a simulator, how members divide it, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError, SimulatorMismatchError
from sbi_phys.core.progress import or_none
from sbi_phys.priors import NormalPrior, Parameter
from sbi_phys.training import sources
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.sources import InMemory, Rows, Settings, from_arrays, from_simulator, from_stores, needs_streaming, stores_of
from tests.toys import LinearGaussian
from tests.training.stream_helpers import OBSERVABLES, PRIOR, make_store

QUIET = or_none(None)
SIM = LinearGaussian()
CPU = torch.device("cpu")


def settings(**changes: Any) -> Settings:
    plain = {"prior": PRIOR, "seed": 1, "config": TrainConfig(), "device": CPU, "x_transform": "real", "observables": None}
    return Settings(**(plain | changes))


def simulations(n: int = 100) -> tuple[np.ndarray, np.ndarray]:
    theta = PRIOR.sample(n, np.random.default_rng(0))
    return theta, np.column_stack([np.arange(n), theta[:, 0]])


def left_out() -> Any:
    """The warning of a store in which two rows failed."""
    return pytest.warns(RuntimeWarning, match="2 of .* simulations failed and are left out")


class Halved:
    """A scaling of an estimator's own: x / 2."""

    def __init__(self, x: np.ndarray, rows: Any) -> None:
        self.seen, self.rows, self.shape = x, rows, x.shape[1:]

    def apply(self, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.asarray(x, dtype=np.float32) / 2)


# ---- memory


def test_rows_are_divided_anew_for_each_member() -> None:
    index = torch.arange(40.0)
    rows = InMemory((index, 2 * index), None, TrainConfig(validation_fraction=0.25), seed=5, device="cpu")
    held_out = []
    for k in (0, 1):
        batches, start = rows.member(k)
        (u, x), (valid, _) = batches.train, batches.validation
        assert len(u) == 30 and torch.equal(x, 2 * u) and torch.equal(start[0], u)
        assert sorted(torch.cat([u, valid]).tolist()) == index.tolist()
        held_out.append(valid.tolist())
        assert rows.member(k)[0].fingerprint() == batches.fingerprint()
    assert held_out[0] != held_out[1]


def test_weights_have_mean_one_in_each_part() -> None:
    theta, x = simulations()
    weights = np.random.default_rng(2).gamma(2.0, 50.0, len(x))
    rows = from_arrays(theta, x, settings(), weights)
    batches, _ = rows.member(0)
    assert rows.weighted and not from_arrays(theta, x, settings()).weighted
    number = {}
    for part in (batches.train, batches.validation):
        assert float(part[2].double().mean()) == pytest.approx(1, abs=1e-6)
        number[len(part[2])] = np.round(part[1][:, 0].double().numpy() * rows.scaler.scale[0] + rows.scaler.mean[0]).astype(int)
        own = weights[number[len(part[2])]]
        assert part[2].numpy() == pytest.approx(own / own.mean(), rel=1e-5)


def test_arrays_are_whitened_and_scaled_by_the_training_rows_of_the_first_member() -> None:
    theta, x = simulations()
    rows = from_arrays(theta, x, settings())
    batches, _ = rows.member(0)
    number = np.round(batches.train[1][:, 0].double().numpy() * rows.scaler.scale[0] + rows.scaler.mean[0]).astype(int)
    assert len(set(number)) == 90
    assert rows.scaler.mean == pytest.approx(x[number].mean(axis=0)) and rows.scaler.scale == pytest.approx(x[number].std(axis=0))
    assert rows.scaler.mean != pytest.approx(x.mean(axis=0))
    assert batches.train[0].numpy() == pytest.approx((theta[number] - [1.0, -2.0]) / [0.5, 3.0], abs=1e-5)


def test_a_scaling_of_the_estimators_own_gets_the_data_and_the_training_rows() -> None:
    theta, x = simulations()
    rows = from_arrays(theta, x, settings(scaling=Halved))
    batches, _ = rows.member(0)
    assert np.array_equal(rows.scaler.seen, x)
    assert np.array_equal(batches.train[1].numpy()[:, 0], rows.scaler.rows / 2)


@pytest.mark.parametrize(
    ("weights", "error", "words"),
    [
        (np.ones(99), ShapeError, r"weights has shape \(99,\); expected \(100,\) = one weight per row"),
        (np.r_[np.ones(50), 0.0, -1.0, np.ones(48)], DataError, "weights has 2 of 100 values that are not > 0, the first is 0 in row 50"),
        (np.r_[np.ones(99), np.nan], NonFiniteError, "weights has NaN or Inf in 1 of 100 rows"),
    ],
)
def test_bad_weights(weights: np.ndarray, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        from_arrays(*simulations(), settings(), weights)


def test_too_few_rows_and_negative_counts() -> None:
    theta, x = simulations(20)
    assert from_arrays(theta, x, settings()).member(0)[0].n == 18
    with pytest.raises(DataError, match="^19 simulations; expected at least 20"):
        from_arrays(theta[:19], x[:19], settings())
    counts = np.column_stack([x[:, 0], np.arange(20), np.arange(20)])
    counts[3, 1] = -1
    with pytest.raises(DataError, match="negative values in columns declared as counts"):
        from_arrays(theta, counts, settings(x_transform="auto", observables=OBSERVABLES))


def test_rows_need_a_kind() -> None:
    with Rows(None, TrainConfig()) as rows, pytest.raises(NotImplementedError):
        rows.member(0)


# ---- stores


def test_what_is_a_store_and_what_is_data(tmp_path: Path) -> None:
    a, b = make_store(tmp_path / "a", 20), make_store(tmp_path / "b", 20, first=20)
    for value in (a, str(tmp_path / "a"), tmp_path / "a", [a], (tmp_path / "a",)):
        found = stores_of(value, PRIOR)
        assert found is not None and [s.path for s in found] == [a.path]
    found = stores_of([a, str(tmp_path / "b")])
    assert found is not None and [s.path for s in found] == [a.path, b.path]
    for data in (np.zeros((3, 2)), [[0.0, 1.0]], [], [a, 1.0], None, {"a": a}):
        assert stores_of(data) is None
    other = NormalPrior([Parameter("a"), Parameter("c")])
    with pytest.raises(SimulatorMismatchError, match=r"has parameters .*'a', 'b'.*; expected .*'a', 'c'"):
        stores_of(a, other)
    make_store(tmp_path / "c", 20, prior=other)
    with pytest.raises(SimulatorMismatchError, match=r"has parameters .*'a', 'c'.*; expected .*'a', 'b'"):
        stores_of([a, tmp_path / "c"])


@pytest.mark.parametrize(("dtype", "row"), [("float64", 24 * 2 + 3 * 16), ("float32", 24 * 2 + 3 * 12)])
def test_rows_are_streamed_when_they_need_more_than_the_memory(tmp_path: Path, dtype: str, row: int) -> None:
    one = make_store(tmp_path / "a", 50, dtype=dtype)
    two = make_store(tmp_path / "b", 30, dtype=dtype, first=50)
    assert not needs_streaming([one], 50 * row) and needs_streaming([one], 50 * row - 1)
    assert not needs_streaming([one, two], 80 * row) and needs_streaming([one, two], 80 * row - 1)
    assert not needs_streaming([one], None)
    with pytest.raises(SettingError, match="memory is 0; expected a finite number >= 1"):
        needs_streaming([one], 0)


def test_a_small_store_is_read_as_arrays_without_its_failed_rows(tmp_path: Path) -> None:
    store = make_store(tmp_path / "a", 60, failed=(3, 50))
    with (
        left_out(),
        from_stores([store], settings(observables=OBSERVABLES), None, QUIET) as rows,
    ):
        assert isinstance(rows, InMemory)
        expected = from_arrays(*store.read(), settings(observables=OBSERVABLES))
        assert rows.member(0)[0].fingerprint() == expected.member(0)[0].fingerprint()
        assert rows.member(0)[0].n == 52  # 90 % of 58


def test_members_of_a_stream_share_the_validation_rows_and_differ_in_their_order(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", 300), make_store(tmp_path / "b", 300, first=300)]
    with from_stores(stores, settings(observables=OBSERVABLES, x_transform="auto"), None, QUIET) as rows:
        first, second = rows.member(0)[0], rows.member(1)[0]
        assert first.n == second.n and torch.equal(first.validation[1], second.validation[1])
        a, b = (torch.cat([x for _, x in batches.epoch(0, 4)]) for batches in (first, second))
        assert not torch.equal(a, b) and torch.equal(a[:, 0].sort().values, b[:, 0].sort().values)
        assert first.fingerprint() != second.fingerprint() and first.fingerprint()[0] == second.fingerprint()[0]
        start = rows.member(0)[1]
        assert torch.equal(start[0], first.validation[0])
    with pytest.raises(SettingError, match="this stream is closed"):
        list(first.epoch(0, 4))


def test_a_stream_is_mapped_to_the_scaling_of_the_estimator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PILOT_ROWS", 250)
    stores = [make_store(tmp_path / "a", 300, failed=(0, 1)), make_store(tmp_path / "b", 300, first=300)]
    weights = np.arange(1.0, 599.0)  # of the rows 2 to 599
    with (
        left_out(),
        from_stores(stores, settings(scaling=Halved), None, QUIET, weights) as rows,
    ):
        # the same number of rows of every store
        assert rows.scaler.seen[:, 0].tolist() == [*range(2, 127), *range(300, 425)]
        assert rows.weighted
        batches, _ = rows.member(0)
        number = 2 * torch.cat([batches.validation[1], *(x for _, x, _ in batches.epoch(0, 4))])[:, 0].double()
        assert (number - number.round()).abs().max() < 0.05
        assert sorted(number.round().int().tolist()) == list(range(2, 600))
        u, x, w = next(iter(batches.epoch(0, 4)))
        row = (2 * x[:, 0].double()).round().numpy()
        assert (w.double().numpy() / (row - 1)) == pytest.approx(np.full(len(row), float(w[0]) / (row[0] - 1)), rel=1e-4)
        theta = np.concatenate([store.read(valid_only=False)[0] for store in stores])[row.astype(int)]
        assert u.numpy() == pytest.approx((theta - [1.0, -2.0]) / [0.5, 3.0], abs=1e-4)


def test_weights_of_a_stream_are_one_per_successful_row(tmp_path: Path) -> None:
    stores = [make_store(tmp_path / "a", 300, failed=(0, 1)), make_store(tmp_path / "b", 300, first=300)]
    with (
        left_out(),
        pytest.raises(ShapeError, match=r"weights has shape \(600,\); expected \(598,\)"),
    ):
        from_stores(stores, settings(), None, QUIET, np.ones(600))


# ---- simulators


@pytest.mark.parametrize(
    ("config", "epochs"),
    [
        (TrainConfig(), 31),  # batches of 32
        (TrainConfig(max_epochs=4), 4),
        (TrainConfig(max_epochs=100), 31),
        (TrainConfig(batch_size=400, max_epochs=10), 2),
        (TrainConfig(batch_size=1000), 1),
    ],
)
def test_no_more_rows_are_simulated_than_asked_for(config: TrainConfig, epochs: int) -> None:
    with from_simulator(SIM, 1000, settings(prior=SIM.prior, config=config), 0) as rows:
        made = rows.config
        n = rows.member(0)[0].n
        assert made.max_epochs == made.patience == epochs  # no row is repeated, so training does not stop early
        assert made.batch_size <= n and 1000 - epochs < n * made.max_epochs <= 1000
        assert made.learning_rate == config.learning_rate and made.for_rows(n) == (made.batch_size, epochs)
        assert len(rows.member(0)[0].validation[0]) == 100


def test_a_network_simulates_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "default_workers", lambda: 7)
    assert sources._workers(SIM) == 7
    monkeypatch.setattr(SIM, "in_process", True, raising=False)
    assert sources._workers(SIM) == 0


@pytest.mark.parametrize(
    ("n", "prior", "error", "words"),
    [
        (None, SIM.prior, SettingError, "n is None; expected the number of simulations to train on"),
        (19, SIM.prior, SettingError, "n is 19; expected a finite number >= 20"),
        (1000, PRIOR, SimulatorMismatchError, r"the simulator has parameters .*'t0'.*; expected .*'a'"),
    ],
)
def test_bad_settings_of_a_simulator(n: int | None, prior: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        from_simulator(SIM, n, settings(prior=prior), 0)


def test_a_batch_larger_than_all_rows() -> None:
    with pytest.raises(DataError, match="100 training rows; expected at least batch_size = 128"):
        from_simulator(SIM, 100, settings(prior=SIM.prior, config=TrainConfig(batch_size=128)), 0)
