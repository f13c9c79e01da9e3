r"""The training loop: one, for every estimator, readable from top to bottom.

    minimise  (1/n) sum_i L_i,   L_i = loss(module, *row_i)

`fit` is a generator of epoch records: the caller prints, plots or stops. What happens within:

- batches are index tensors, a permutation keyed by (seed, epoch): no loader, and resuming needs no generator state;
- AdamW (one fused kernel), gradients clipped by norm, warm-up and cosine decay over all steps;
- validation in large batches after each epoch, on averaged weights (EMA) where asked for; the best weights are kept,
  and training stops `patience` epochs after the best;
- the loss of each batch stays on the device until the epoch ends: the step has no synchronisation;
- a checkpoint after an epoch holds everything that follows from the past, so a resumed run ends with the same weights;
- denormal numbers are flushed to zero. The flag belongs to a thread and its pool, and torch sets it for the calling
  thread alone: with a pool already running, half of the work stays slow. So the epochs run in a thread of their own,
  which sets the flag before its pool starts; the caller's threads are never changed.
"""

import json
import math
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sbi_phys.checkpoint import read_file, write_file
from sbi_phys.checks import require_choice, require_int, require_number
from sbi_phys.errors import DataError, ModelFileError, TrainingError
from sbi_phys.rng import seed_for, torch_rng_for

__all__ = ["EpochRecord", "TrainConfig", "fit"]

Loss = Callable[..., Tensor]
_CHECKPOINT = ("checkpoint", 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of the training loop.   Raises: SettingError.

    Args: learning_rate: peak. batch_size, max_epochs: 0 chooses from the number of training rows.
    patience: epochs without a better validation loss before stopping. warmup: share of all steps with rising rate.
    schedule: 'cosine' or 'constant'. clip_norm: gradient norm limit. weight_decay: of AdamW, on matrices alone.
    ema_decay: per step, 0 switches weight averaging off. validation_fraction: rows held out.
    """

    learning_rate: float = 5e-3
    batch_size: int = 0
    max_epochs: int = 0
    patience: int = 20
    validation_fraction: float = 0.1
    warmup: float = 0.03
    schedule: str = "cosine"
    clip_norm: float = 5.0
    weight_decay: float = 1e-3
    ema_decay: float = 0.99

    def __post_init__(self) -> None:
        """Check ranges."""
        require_number("learning_rate", self.learning_rate, low=0, open_low=True)
        require_int("batch_size", self.batch_size, low=0)
        require_int("max_epochs", self.max_epochs, low=0)
        require_int("patience", self.patience, low=1)
        require_number("validation_fraction", self.validation_fraction, low=0, high=1, open_low=True, open_high=True)
        require_number("warmup", self.warmup, low=0, high=1)
        require_choice("schedule", self.schedule, ("cosine", "constant"))
        require_number("clip_norm", self.clip_norm, low=0, open_low=True)
        require_number("weight_decay", self.weight_decay, low=0)
        require_number("ema_decay", self.ema_decay, low=0, high=1, open_high=True)

    def for_rows(self, n: int) -> tuple[int, int]:
        """Batch size and number of epochs for n training rows.   Raises: DataError if a batch is larger than n."""
        if self.batch_size > n:
            raise DataError(f"{n} training rows; expected at least batch_size = {self.batch_size}")
        batch = self.batch_size or min(n, max(32, min(256, 2 ** round(math.log2(max(n, 2) / 80)))))
        return batch, self.max_epochs or max(5, min(150, round(9000 / math.sqrt(n))))


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """What one epoch did: mean losses per row, learning rate at its end, seconds, milliseconds a step, best so far."""

    epoch: int
    max_epochs: int
    train: float
    valid: float
    learning_rate: float
    seconds: float
    step_ms: float
    best: bool


@dataclass
class _State:
    """Everything that a checkpoint holds beside the weights and the optimiser."""

    epoch: int = 0
    step: int = 0
    best_valid: float = math.inf
    best_epoch: int = -1
    done: bool = False


def fit(
    loss: Loss,
    module: nn.Module,
    train: Sequence[Tensor],
    valid: Sequence[Tensor],
    config: TrainConfig,
    *,
    seed: int,
    checkpoint: str | Path | None = None,
) -> Iterator[EpochRecord]:
    """Train `module` in place and yield a record per epoch; when the generator ends it holds the best weights.

    Args: loss: loss(module, *batch) -> (b,), one value per row. train, valid: tensors with equal rows, on the module's
    device. checkpoint: path; written after every epoch, and training goes on from it if it exists.
    Raises: DataError (a batch larger than the data), TrainingError (a loss that is not finite; the last good
    checkpoint stays), ModelFileError (a checkpoint of another run).
    """
    trainer = _Trainer(loss, module, tuple(train), tuple(valid), config, seed)
    if checkpoint is not None:
        yield from trainer.resume(Path(checkpoint))
    try:
        with ThreadPoolExecutor(1, "train", initializer=torch.set_flush_denormal, initargs=(True,)) as thread:
            try:
                while not trainer.state.done:
                    record = thread.submit(trainer.run_epoch).result()
                    trainer.history.append(record)
                    if checkpoint is not None:
                        trainer.save(Path(checkpoint))
                    yield record
            finally:
                trainer.stop.set()  # an interrupt of the caller ends the epoch after the batch in work
    finally:
        trainer.restore_best()


class _Trainer:
    """State and steps of one training; `fit` drives it."""

    def __init__(self, loss: Loss, module: nn.Module, train: tuple[Tensor, ...], valid: tuple[Tensor, ...], config: TrainConfig, seed: int):
        self.loss, self.module, self.train, self.valid, self.config, self.seed = loss, module, train, valid, config, seed
        self.n = train[0].shape[0]
        batch, self.max_epochs = config.for_rows(self.n)
        self.n_batches = max(1, self.n // batch)
        self.weights = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in self.weights if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in self.weights if p.ndim <= 1], "weight_decay": 0.0},
        ]
        fused = {p.device.type for p in self.weights} <= {"cpu", "cuda"}
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
        self.average = [p.detach().clone() for p in self.weights] if config.ema_decay else None
        self.best = _copy(module)
        self.state, self.history = _State(), list[EpochRecord]()
        self.stop = threading.Event()
        self._fingerprint = ""

    def rate(self, step: int) -> float:
        """Learning rate at a step: linear warm-up, then cosine to 1e-3 of the peak, or constant."""
        total = self.max_epochs * self.n_batches
        warm = max(1, round(self.config.warmup * total))
        if step < warm:
            return self.config.learning_rate * (step + 1) / warm
        if self.config.schedule == "constant":
            return self.config.learning_rate
        progress = (step - warm) / max(1, total - warm)
        return self.config.learning_rate * (1e-3 + (1 - 1e-3) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def run_epoch(self) -> EpochRecord:
        """One pass over the training rows, validation, bookkeeping of the best."""
        begin, state = time.perf_counter(), self.state
        devices = [d for d in {p.device for p in self.weights} if d.type == "cuda"]
        with torch.random.fork_rng(devices):  # for dropout and the like in a user's network: keyed, and restored after
            torch.manual_seed(seed_for(self.seed, "noise", state.epoch))
            train, step_ms = self._train_epoch()
        valid = self._validate()
        best = valid < state.best_valid
        if best:
            state.best_valid, state.best_epoch = valid, state.epoch
            with self._averaged():
                self.best = _copy(self.module)
        record = EpochRecord(
            state.epoch, self.max_epochs, train, valid, self.rate(max(0, state.step - 1)), time.perf_counter() - begin, step_ms, best
        )
        state.epoch += 1
        state.done = state.epoch >= self.max_epochs or state.epoch - 1 - state.best_epoch >= self.config.patience
        return record

    def _train_epoch(self) -> tuple[float, float]:
        generator = torch_rng_for(self.seed, "order", self.state.epoch)
        order = torch.randperm(self.n, generator=generator).to(self.train[0].device)
        self.module.train()
        losses, sizes = [], []
        begin = time.perf_counter()
        for rows in order.tensor_split(self.n_batches):
            if self.stop.is_set():
                raise TrainingError("training was interrupted; the last checkpoint is complete")
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(self.state.step)
            self.optimizer.zero_grad(set_to_none=True)
            value = self.loss(self.module, *(t.index_select(0, rows) for t in self.train)).mean()
            value.backward()
            nn.utils.clip_grad_norm_(self.weights, self.config.clip_norm, foreach=True)
            self.optimizer.step()
            self.state.step += 1
            self._update_average()
            losses.append(value.detach())
            sizes.append(len(rows))
        batch_losses = torch.stack(losses).double().cpu()
        step_ms = 1e3 * (time.perf_counter() - begin) / self.n_batches
        bad = torch.nonzero(~torch.isfinite(batch_losses)).flatten()
        if len(bad):
            raise TrainingError(
                f"the loss became {batch_losses[bad[0]].item()} in epoch {self.state.epoch}, batch {int(bad[0])} of {self.n_batches}; "
                f"lower learning_rate (now {self.config.learning_rate}) or clip_norm (now {self.config.clip_norm}); "
                "the last checkpoint is from before this epoch"
            )
        return float((batch_losses * torch.tensor(sizes)).sum() / self.n), step_ms

    def _update_average(self) -> None:
        if self.average is None:
            return
        # while few steps are done the average forgets its start: decay (1 + step) / (10 + step), as in common practice
        decay = min(self.config.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.weights], 1 - decay)

    def _validate(self) -> float:
        rows = self.valid[0].shape[0]
        self.module.eval()
        with self._averaged(), torch.no_grad():
            parts = [self.loss(self.module, *(t[i : i + 8192] for t in self.valid)).double().sum() for i in range(0, rows, 8192)]
        value = float(torch.stack(parts).sum().cpu()) / rows
        if not math.isfinite(value):
            raise TrainingError(
                f"the validation loss became {value} in epoch {self.state.epoch}; lower learning_rate (now {self.config.learning_rate})"
            )
        return value

    def _averaged(self) -> "_Swap":
        return _Swap(self.weights, self.average)

    def restore_best(self) -> None:
        """Put the best weights into the module."""
        self.module.load_state_dict(self.best)
        self.module.eval()

    def fingerprint(self) -> str:
        """Text that differs between runs whose checkpoints must not be mixed: settings, seed, data, network."""
        data = [zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes()) for t in (*self.train, *self.valid)]
        shapes = [list(p.shape) for p in self.weights]
        return json.dumps({"config": asdict(self.config), "seed": self.seed, "data": data, "weights": shapes})

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on."""
        content = {
            "fingerprint": self._fingerprint, "state": asdict(self.state), "history": [asdict(r) for r in self.history],
            "module": self.module.state_dict(), "best": self.best, "average": self.average, "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        write_file(path, *_CHECKPOINT, content)

    def resume(self, path: Path) -> Iterator[EpochRecord]:
        """Take up a checkpoint if there is one, yielding the records of the epochs already done."""
        self._fingerprint = self.fingerprint()
        if not path.exists():
            return
        content = read_file(path, *_CHECKPOINT)
        if content["fingerprint"] != self._fingerprint:
            was, now = json.loads(content["fingerprint"]), json.loads(self._fingerprint)
            differs = next(k for k in now if now[k] != was[k])
            raise ModelFileError(
                f"{path} is the checkpoint of another training: {differs} is {_short(was[differs])}, expected {_short(now[differs])}; "
                "remove the file or use the same settings, seed and data"
            )
        self.module.load_state_dict(content["module"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.best = content["best"]
        if self.average is not None:
            torch._foreach_copy_(self.average, [t.to(a.device) for t, a in zip(content["average"], self.average, strict=True)])
        self.state = _State(**content["state"])
        self.history = [EpochRecord(**r) for r in content["history"]]
        yield from self.history


class _Swap:
    """Context in which the parameters hold the averaged weights."""

    def __init__(self, weights: Sequence[Tensor], average: Sequence[Tensor] | None) -> None:
        self.weights, self.average = weights, average

    def __enter__(self) -> None:
        if self.average is not None:
            self._exchange()

    def __exit__(self, *_: object) -> None:
        if self.average is not None:
            self._exchange()

    def _exchange(self) -> None:
        assert self.average is not None
        for weight, mean in zip(self.weights, self.average, strict=True):
            weight.data, mean.data = mean.data, weight.data


def _copy(module: nn.Module) -> dict[str, Any]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else text[:300] + "..."
