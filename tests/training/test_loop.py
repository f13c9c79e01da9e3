"""The training loop: it finds a known optimum, resumes exactly, stops, and changes nothing global."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sbi_phys.core.errors import DataError, ModelFileError, SettingError, TrainingError
from sbi_phys.core.rng import torch_rng_for
from sbi_phys.training.checkpoint import write_file
from sbi_phys.training.loop import TrainConfig, fit


class Line(nn.Module):
    """Linear regression, with optional dropout to use the random generator."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.drop = nn.Dropout(dropout)
        with torch.no_grad():
            self.layer.weight.zero_()
            self.layer.bias.zero_()


def squared(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (module.layer(module.drop(x))[:, 0] - y) ** 2


def data(n: int = 2000, noise: float = 0.1) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    rng = torch_rng_for(0)
    x = torch.randn(n, 3, generator=rng)
    y = x @ torch.tensor([1.0, -2.0, 0.5]) + 3 + noise * torch.randn(n, generator=rng)
    cut = n // 5
    return (x[cut:], y[cut:]), (x[:cut], y[:cut])


def test_finds_the_least_squares_solution() -> None:
    train, valid = data()
    module = Line()
    config = TrainConfig(learning_rate=0.05, max_epochs=40, batch_size=128, weight_decay=0.0, patience=40)
    records = list(fit(squared, module, train, valid, config, seed=0))
    design = torch.cat([train[0], torch.ones(len(train[0]), 1)], dim=1)
    exact = torch.linalg.lstsq(design, train[1][:, None]).solution[:, 0]
    got = torch.cat([module.layer.weight[0], module.layer.bias]).detach()
    assert (got - exact).abs().max() < 5e-3
    assert records[-1].valid == pytest.approx(0.01, rel=0.25)
    assert [r.epoch for r in records] == list(range(len(records)))
    assert records[-1].learning_rate < 0.05 * 2e-3 < records[5].learning_rate


def test_the_best_weights_are_kept_and_patience_stops() -> None:
    train, valid = data(60, noise=3.0)
    module = Line()
    config = TrainConfig(learning_rate=1.0, schedule="constant", max_epochs=200, patience=3, ema_decay=0.0, batch_size=8)
    records = list(fit(squared, module, train, valid, config, seed=0))
    best = min(range(len(records)), key=lambda i: records[i].valid)
    assert len(records) < 200
    assert len(records) - 1 - best == 3
    with torch.no_grad():
        assert squared(module, *valid).mean().item() == pytest.approx(records[best].valid, rel=1e-5)


@pytest.mark.parametrize("stop_after", [1, 4])
def test_resume_gives_the_same_weights(tmp_path: Path, stop_after: int) -> None:
    train, valid = data(300)
    config = TrainConfig(max_epochs=8, batch_size=32)
    whole, broken = Line(dropout=0.3), Line(dropout=0.3)
    full = list(fit(squared, whole, train, valid, config, seed=5))
    for record in fit(squared, broken, train, valid, config, seed=5, checkpoint=tmp_path / "c"):
        if record.epoch + 1 == stop_after:
            break
    resumed = Line(dropout=0.3)
    again = list(fit(squared, resumed, train, valid, config, seed=5, checkpoint=tmp_path / "c"))
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    assert [(r.train, r.valid) for r in again] == [(r.train, r.valid) for r in full]
    finished = list(fit(squared, Line(dropout=0.3), train, valid, config, seed=5, checkpoint=tmp_path / "c"))
    assert finished == again  # nothing left to do


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    train, valid = data(300)
    list(fit(squared, Line(), train, valid, TrainConfig(max_epochs=2), seed=5, checkpoint=tmp_path / "c"))
    for words, config, seed, rows in [
        ("config", TrainConfig(max_epochs=3), 5, train),
        ("seed", TrainConfig(max_epochs=2), 6, train),
        ("data", TrainConfig(max_epochs=2), 5, (train[0] + 1, train[1])),
    ]:
        with pytest.raises(ModelFileError, match=f"another training: {words}"):
            list(fit(squared, Line(), rows, valid, config, seed=seed, checkpoint=tmp_path / "c"))


def test_a_loss_that_is_not_finite_stops_with_the_last_good_checkpoint(tmp_path: Path) -> None:
    train, valid = data(300)
    calls = 0

    def breaks(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += module.training
        return squared(module, x, y) * (float("nan") if calls > 12 else 1.0)

    config = TrainConfig(max_epochs=5, batch_size=24)
    with pytest.raises(TrainingError, match=r"the loss became nan in epoch 1, batch 2 of 10; lower learning_rate"):
        list(fit(breaks, Line(), train, valid, config, seed=0, checkpoint=tmp_path / "c"))
    good = next(iter(fit(squared, Line(), train, valid, config, seed=0, checkpoint=tmp_path / "c")))
    assert good.epoch == 0


def test_nothing_global_changes() -> None:
    """The denormal flag of the caller's threads, the generator and the number of threads stay; inside they are flushed."""
    small, module = torch.full((200_000,), 1e-38), Line(dropout=0.5)
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    seen = []

    def watches(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        seen.append(((small * 1e-2) != 0).float().mean().item())
        return squared(module, x, y)

    train, valid = data(300)
    list(fit(watches, module, train, valid, TrainConfig(max_epochs=2), seed=0))
    assert set(seen) == {0.0}
    assert ((small * 1e-2) != 0).all()
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.get_num_threads() == threads


def test_batches_and_epochs_follow_the_data() -> None:
    assert TrainConfig().for_rows(20)[0] == 20
    assert TrainConfig().for_rows(18_000) == (256, 54)
    assert TrainConfig().for_rows(10**6) == (256, 7)
    assert TrainConfig(batch_size=7, max_epochs=3).for_rows(10) == (7, 3)
    with pytest.raises(DataError, match="6 training rows; expected at least batch_size = 7"):
        TrainConfig(batch_size=7).for_rows(6)
    for bad in ({"learning_rate": 0.0}, {"schedule": "cosin"}, {"ema_decay": 1.0}, {"patience": 0}, {"batch_size": -1}):
        with pytest.raises(SettingError, match=next(iter(bad))):
            TrainConfig(**bad)


def test_each_row_is_used_once_an_epoch() -> None:
    rows = torch.arange(103.0)
    seen: list[Tensor] = []

    def records(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if module.training:
            seen.append(y.clone())
        return squared(module, x, y)

    x = torch.zeros(103, 3)
    list(fit(records, Line(), (x, rows), (x[:5], rows[:5]), TrainConfig(max_epochs=2, batch_size=10), seed=0))
    first, second = torch.cat(seen[:10]), torch.cat(seen[10:])
    assert first.sort().values.tolist() == rows.tolist()
    assert second.sort().values.tolist() == rows.tolist()
    assert first.tolist() != second.tolist()


def test_bf16_is_given_up_where_it_moves_the_loss() -> None:
    train, valid = data()
    config = TrainConfig(max_epochs=3, precision="bf16", learning_rate=0.05)
    with pytest.warns(RuntimeWarning, match="bf16 changes the log density by"):
        records = list(fit(lambda m, x, y: 100 * squared(m, x, y), Line(), train, valid, config, seed=0))
    assert records[-1].valid < records[0].valid
    quiet = list(fit(lambda m, x, y: 1e-3 * squared(m, x, y), Line(), train, valid, config, seed=0))
    assert len(quiet) == 3


def test_memory_that_runs_out_names_the_setting(tmp_path: Path) -> None:
    train, valid = data(300)

    def greedy(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(TrainingError, match="batches of 24 rows: CUDA out of memory.*expected a smaller batch_size"):
        list(fit(greedy, Line(), train, valid, TrainConfig(batch_size=24), seed=0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's compiler uses what torch deprecates
def test_compiled_training_gives_the_same_losses() -> None:
    """Slow: the compiler takes about a minute."""
    train, valid = data(500)
    plain = list(fit(squared, Line(), train, valid, TrainConfig(max_epochs=3, batch_size=64), seed=0))
    fused = list(fit(squared, Line(), train, valid, TrainConfig(max_epochs=3, batch_size=64, compile=True), seed=0))
    assert [r.valid for r in fused] == pytest.approx([r.valid for r in plain], rel=1e-4)


def test_records_that_come_from_a_checkpoint_are_written_with_the_same_bytes(tmp_path: Path) -> None:
    x, config = torch.linspace(-1, 1, 100)[:, None], TrainConfig(max_epochs=3)
    written = []
    for name, stops in (("whole", (3,)), ("parts", (1, 3))):
        for stop in stops:
            torch.manual_seed(0)
            records = []
            for record in fit(
                lambda m, a: m(a).square().sum(dim=1), torch.nn.Linear(1, 1), (x[::2],), (x[1::2],), config, seed=0,
                checkpoint=tmp_path / name, arithmetic="kernels",
            ):  # fmt: skip
                records.append(replace(record, seconds=0.0, step_ms=0.0))
                if len(records) == stop:
                    break
        write_file(tmp_path / "history", "history", 1, {"history": [asdict(r) for r in records]})
        written.append((tmp_path / "history").read_bytes())
    assert written[0] == written[1]
