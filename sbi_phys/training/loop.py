r"""The training loop: one, for every estimator, readable from top to bottom.

    minimise  (1/n) sum_i L_i,   L_i = loss(module, *row_i)

`fit` is a generator of epoch records: the caller prints, plots or stops. What happens within:

- rows come from a `batches.Batches`: tensors in memory, shards streamed from disk, or fresh simulations; its order follows
  from (seed, epoch), so resuming needs no generator state;
- AdamW on all weights as one vector (`optimize`), gradients clipped by norm, warm-up and cosine decay over all steps;
- validation in large batches after each epoch, on averaged weights (EMA) where asked for; the best weights are kept,
  and training stops `patience` epochs after the best;
- the loss of each batch stays on the device until the epoch ends: the step has no synchronisation;
- a checkpoint after an epoch holds everything that follows from the past, so a resumed run ends with the same weights;
- under torchrun each rank takes its share of every batch and the gradients are averaged (`parallel`);
- denormal numbers are flushed to zero. The flag belongs to a thread and its pool, and torch sets it for the calling
  thread alone: with a pool already running, half of the work stays slow. So the epochs run in a thread of their own,
  which sets the flag before its pool starts; the caller's threads are never changed;
- on CPU a step of less than 2 GFLOP runs on one thread: waiting for others costs about what it saves, and several times
  that on a machine that is not quiet.
"""

import json
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.errors import DataError, ModelFileError, SettingError, TrainingError
from sbi_phys.core.rng import seed_for
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.checkpoint import read_file, write_file
from sbi_phys.training.optimizer import FlatAdamW, cosine_rate
from sbi_phys.training.ranks import Ranks, current_ranks

__all__ = ["EpochRecord", "TrainConfig", "fit"]

Loss = Callable[..., Tensor]
_CHECKPOINT = ("checkpoint", 2)
_VALID_ROWS = 8192
# mean |log q in bfloat16 - log q in float32| above which bfloat16 is given up
_BF16_LIMIT = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of the training loop.   Raises: SettingError.

    Args: learning_rate: peak. batch_size, max_epochs: 0 chooses from the number of training rows.
    patience: epochs without a better validation loss before stopping. warmup: share of all steps with rising rate.
    schedule: 'cosine' or 'constant'. clip_norm: gradient norm limit. weight_decay: of AdamW, on matrices alone.
    ema_decay: per step, 0 switches weight averaging off. validation_fraction: rows held out.
    compile: fuse the step with torch.compile (a C++ compiler on CPU; CUDA graphs on CUDA): slow to start, then faster.
    precision: 'float32', or 'bf16' for the matrix products on CUDA; given up, with a warning, where it moves the log density
    of the validation rows by more than 0.01 on average.
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
    compile: bool = False
    precision: str = "float32"

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
        if not isinstance(self.compile, bool):
            raise SettingError(f"compile is {self.compile!r}; expected true or false")
        require_choice("precision", self.precision, ("float32", "bf16"))

    def for_rows(self, n: int) -> tuple[int, int]:
        """Batch size and number of epochs for n training rows.   Raises: DataError if a batch is larger than n."""
        if self.batch_size > n:
            raise DataError(f"{n} training rows; expected at least batch_size = {self.batch_size}")
        batch = self.batch_size or min(n, max(32, min(256, 2 ** round(math.log2(max(n, 2) / 30)))))
        return batch, self.max_epochs or max(5, min(150, round(7200 / math.sqrt(n))))


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
    train: Sequence[Tensor] | Batches,
    valid: Sequence[Tensor] | None,
    config: TrainConfig,
    *,
    seed: int,
    checkpoint: str | Path | None = None,
) -> Iterator[EpochRecord]:
    """Train `module` in place and yield a record per epoch; when the generator ends it holds the best weights.

    Args: loss: loss(module, *batch) -> (b,), one value per row. train, valid: tensors with equal rows, on the module's
    device; or train a `Batches`, which has its own validation rows, and valid None.
    checkpoint: path; written after every epoch, and training goes on from it if it exists.
    Raises: DataError (a batch larger than the data), TrainingError (a loss that is not finite, memory that runs out;
    the last good checkpoint stays), ModelFileError (a checkpoint of another run).
    """
    ranks = current_ranks()
    batches = train if valid is None else MemoryBatches(cast(Sequence[Tensor], train), valid, seed=seed, ranks=ranks)
    trainer = _Trainer(loss, module, cast(Batches, batches), config, seed, ranks)
    threads = torch.get_num_threads()
    try:
        if checkpoint is not None:
            yield from trainer.resume(Path(checkpoint))
        with ThreadPoolExecutor(1, "train", initializer=_start_thread, initargs=(trainer.threads,)) as thread:
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
        torch.set_num_threads(threads)  # the number that threads to come start with
        trainer.restore_best()


def _start_thread(threads: int) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


class _Trainer:
    """State and steps of one training; `fit` drives it."""

    def __init__(self, loss: Loss, module: nn.Module, batches: Batches, config: TrainConfig, seed: int, ranks: Ranks) -> None:
        self.loss, self.module, self.batches, self.config, self.seed, self.ranks = loss, module, batches, config, seed, ranks
        self.batch_size, self.max_epochs = config.for_rows(batches.n)
        self.n_batches = max(1, batches.n // self.batch_size)
        self.optimizer = FlatAdamW(
            module,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            clip_norm=config.clip_norm,
            ema_decay=config.ema_decay,
            ranks=ranks,
        )
        self.device = self.optimizer.flat.device
        self.bf16 = config.precision == "bf16"
        self.threads = _threads(module, self.batch_size // ranks.size)
        step = _Step(loss, module)
        # two sizes of batch occur: each gets its own code, without symbolic shapes
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.mean_loss: Callable[..., Tensor] = torch.compile(step, dynamic=False, mode=mode) if config.compile else step
        self.best = _copy(module)
        self.state, self.history = _State(), list[EpochRecord]()
        self.stop = threading.Event()
        self._fingerprint = ""

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        total = self.max_epochs * self.n_batches
        return cosine_rate(step, total, peak=self.config.learning_rate, warmup=self.config.warmup, schedule=self.config.schedule)

    def run_epoch(self) -> EpochRecord:
        """One pass over the training rows, validation, bookkeeping of the best."""
        begin, state = time.perf_counter(), self.state
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), _memory_errors(self.batch_size):
            # for dropout and the like in a user's network: keyed, and restored after
            torch.manual_seed(seed_for(self.seed, "noise", state.epoch, self.ranks.rank))
            train, step_ms = self._train_epoch()
            with self.optimizer.averaged():
                valid = self._validate()
                best = valid < state.best_valid
                if best:
                    state.best_valid, state.best_epoch = valid, state.epoch
                    self.best = _copy(self.module)
        record = EpochRecord(
            state.epoch, self.max_epochs, train, valid, self.rate(max(0, state.step - 1)), time.perf_counter() - begin, step_ms, best
        )
        state.epoch += 1
        state.done = state.epoch >= self.max_epochs or state.epoch - 1 - state.best_epoch >= self.config.patience
        return record

    def _train_epoch(self) -> tuple[float, float]:
        self.module.train()
        losses, sizes = [], []
        begin = time.perf_counter()
        for batch in self.batches.epoch(self.state.epoch, self.n_batches):
            if self.stop.is_set():
                raise TrainingError("training was interrupted; the last checkpoint is complete")
            self.optimizer.zero_grad()
            with self._precision():
                value = self.mean_loss(*batch)
            value.backward()
            self.optimizer.step(self.rate(self.state.step), self.state.step)
            self.state.step += 1
            losses.append(value.detach().clone() if self.config.compile else value.detach())
            sizes.append(len(batch[0]))
        own = torch.stack(losses).double().cpu()
        step_ms = 1e3 * (time.perf_counter() - begin) / self.n_batches
        self._require_finite(own)
        weights = torch.tensor(sizes, dtype=torch.float64)
        total = self.ranks.total(torch.stack([(own * weights).sum(), weights.sum()]).to(self.device))
        return float(total[0] / total[1]), step_ms

    def _require_finite(self, losses: Tensor) -> None:
        bad = torch.nonzero(~torch.isfinite(losses)).flatten()
        first = int(bad[0]) if len(bad) else -1
        # a rank whose losses are fine must not wait for one that has stopped
        if self.ranks.total(torch.tensor([float(len(bad))], device=self.device)).item() == 0:
            return
        what = f"{losses[first].item()} in epoch {self.state.epoch}, batch {first}" if len(bad) else "not finite on another rank, a batch"
        raise TrainingError(
            f"the loss became {what} of {self.n_batches}; "
            f"lower learning_rate (now {self.config.learning_rate}) or clip_norm (now {self.config.clip_norm}); "
            "the last checkpoint is from before this epoch"
        )

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self.bf16 else nullcontext()

    def _validate(self) -> float:
        rows = self.batches.validation
        self.module.eval()
        with torch.no_grad():
            parts = [self.loss(self.module, *(t[i : i + _VALID_ROWS] for t in rows)).double() for i in range(0, len(rows[0]), _VALID_ROWS)]
            if self.bf16:
                self._check_bf16(tuple(t[:_VALID_ROWS] for t in rows), parts[0])
        counts = torch.tensor([float(sum(len(p) for p in parts))], dtype=torch.float64, device=self.device)
        total = self.ranks.total(torch.cat([torch.stack([p.sum() for p in parts]).sum().reshape(1), counts]))
        value = float(total[0] / total[1])
        if not math.isfinite(value):
            raise TrainingError(
                f"the validation loss became {value} in epoch {self.state.epoch}; lower learning_rate (now {self.config.learning_rate})"
            )
        return value

    def _check_bf16(self, rows: tuple[Tensor, ...], exact: Tensor) -> None:
        with self._precision():
            error = self.ranks.average((self.loss(self.module, *rows).double() - exact).abs().mean())
        if not float(error) <= _BF16_LIMIT:
            self.bf16 = False
            warnings.warn(
                f"bf16 moves the log density by {float(error):.3g} on average in epoch {self.state.epoch}, more than {_BF16_LIMIT}; "
                "the training goes on in float32",
                RuntimeWarning,
                stacklevel=2,
            )

    def restore_best(self) -> None:
        """Put the best weights into the module, in tensors of its own."""
        self.module.load_state_dict(self.best)
        self.optimizer.release()
        self.module.eval()

    def fingerprint(self) -> str:
        """Text that differs between runs whose checkpoints must not be mixed: settings, seed, data, network, ranks."""
        shapes = [list(p.shape) for p in self.optimizer.weights]
        parts = {"config": asdict(self.config), "seed": self.seed, "data": self.batches.fingerprint(), "weights": shapes}
        return json.dumps(parts | {"ranks": self.ranks.size})

    def save(self, path: Path) -> None:
        """Write everything that the rest of the run depends on; the first rank does."""
        if self.ranks.first:
            content = {
                "fingerprint": self._fingerprint, "state": asdict(self.state), "history": [asdict(r) for r in self.history],
                "module": self.module.state_dict(), "best": self.best, "optimizer": self.optimizer.state_dict(), "bf16": self.bf16,
            }  # fmt: skip
            write_file(path, *_CHECKPOINT, content)
        self.ranks.wait()

    def resume(self, path: Path) -> Iterator[EpochRecord]:
        """Take up a checkpoint if there is one, yielding the records of the epochs already done."""
        self._fingerprint = self.fingerprint()
        if not path.exists():
            return
        content = read_file(path, *_CHECKPOINT)
        if content["fingerprint"] != self._fingerprint:
            was, now = json.loads(content["fingerprint"]), json.loads(self._fingerprint)
            differs = next(k for k in now if now[k] != was.get(k))
            raise ModelFileError(
                f"{path} is the checkpoint of another training: {differs} is {_short(was.get(differs))}, expected {_short(now[differs])}; "
                "remove the file or use the same settings, seed and data"
            )
        self.module.load_state_dict(content["module"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.best, self.bf16 = content["best"], content["bf16"]
        self.state = _State(**content["state"])
        self.history = [EpochRecord(**r) for r in content["history"]]
        yield from self.history


class _Step(nn.Module):
    """The mean loss of a batch as a module, so that it can be compiled."""

    def __init__(self, loss: Loss, module: nn.Module) -> None:
        super().__init__()
        self.loss, self.module = loss, module

    def forward(self, *batch: Tensor) -> Tensor:
        """Mean over the rows."""
        return self.loss(self.module, *batch).mean()


def _threads(module: nn.Module, batch: int) -> int:
    """Threads for a step: one where the products are small; as torch has it where they are not, or are convolutions."""
    weights = [p for p in module.parameters() if p.requires_grad]
    flops = 6 * batch * sum(p.numel() for p in weights if p.ndim == 2)
    return 1 if flops < 2e9 and all(p.ndim <= 2 for p in weights) else torch.get_num_threads()


@contextmanager
def _memory_errors(batch: int) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as err:
        raise TrainingError(
            f"the device ran out of memory with batches of {batch} rows: {str(err).splitlines()[0]}; expected a smaller batch_size; "
            "the last checkpoint is complete"
        ) from err


def _copy(module: nn.Module) -> dict[str, Any]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 300 else text[:300] + "..."
