r"""The training loop of all networks.

    minimise  (1/n) sum_i L_i,   L_i = loss(module, *row_i)

`fit` yields one record per epoch; the caller prints, plots or stops. Within an epoch:

- rows come from `batches.Batches`: tensors in memory, shards streamed from disk, or new simulations. Their order depends on
  (seed, epoch), so a resumed training needs no generator state;
- the optimiser is AdamW on all weights as one vector (`_optimizer`), with gradients clipped by norm, warm-up and cosine decay;
- after each epoch the loss of the validation rows is computed with averaged weights (EMA). The best weights are kept, and
  training stops `patience` epochs after the best;
- the losses stay on the device until the epoch ends, so that a step needs no synchronisation;
- a checkpoint holds the complete state, so that a resumed training ends with the same weights;
- under torchrun each rank takes its share of every batch, and the gradients are averaged (`ranks`);
- denormal numbers are flushed to zero. torch sets this flag for the calling thread only, not for a running thread pool. The
  epochs therefore run in a separate thread, which sets the flag before its pool starts; the caller's threads are not changed;
- on a CPU, steps of less than 2 GFLOP use one thread, because synchronising several costs about as much as it saves.
"""

import json
import math
import sys
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
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.training._optimizer import FlatAdamW, cosine_rate
from sbi_phys.training.batches import Batches, MemoryBatches
from sbi_phys.training.checkpoint import read_file, write_file
from sbi_phys.training.ranks import Ranks, current_ranks

__all__ = ["EpochRecord", "TrainConfig", "fit"]

Loss = Callable[..., Tensor]
_CHECKPOINT = ("checkpoint", 2)
_VALID_ROWS = 8192
# mean |log q in bfloat16 - log q in float32| above which training continues in float32
_BF16_LIMIT = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Settings of the training loop.

    Args:
        learning_rate: largest learning rate.
        batch_size, max_epochs: 0 chooses them from the number of training rows.
        patience: epochs without a smaller validation loss before training stops.
        validation_fraction: share of the rows held out for validation.
        warmup: share of all steps in which the learning rate rises.
        schedule: 'cosine' or 'constant'.
        clip_norm: largest norm of the gradient.
        weight_decay: of AdamW, applied to matrices only.
        ema_decay: decay per step of the averaged weights; 0 switches averaging off.
        compile: compile the step with torch.compile (needs a C++ compiler on a CPU): slow to start, then faster.
        precision: 'float32', or 'bf16' for matrix products on CUDA; training continues in float32, with a warning, if bf16 changes
            the log density of the validation rows by more than 0.01 on average.
    Raises: SettingError.

    >>> import sbi_phys as sp
    >>> config = sp.TrainConfig(max_epochs=2)
    >>> config.for_rows(3000)  # batch size and number of epochs
    (128, 2)
    >>> sp.TrainConfig(learning_rate=-1)
    Traceback (most recent call last):
    ...
    sbi_phys.core.errors.SettingError: learning_rate is -1; expected a finite number > 0
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
    """Result of one epoch: mean losses per row, learning rate at its end, duration, milliseconds per step, and whether it is the best.

    arithmetic: what computed the network's layers, 'kernels' in C or 'torch', where the caller of `fit` says so.

    >>> from sbi_phys.training import EpochRecord
    >>> record = EpochRecord(0, 2, train=1.3, valid=1.2, learning_rate=5e-3, seconds=0.4, step_ms=2.0, best=True)
    >>> f"epoch {record.epoch + 1} of {record.max_epochs}: validation loss {record.valid}"
    'epoch 1 of 2: validation loss 1.2'
    """

    epoch: int
    max_epochs: int
    train: float
    valid: float
    learning_rate: float
    seconds: float
    step_ms: float
    best: bool
    arithmetic: str = ""


@dataclass
class _State:
    """State of a training, apart from weights and optimiser; part of a checkpoint."""

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
    arithmetic: str = "",
) -> Iterator[EpochRecord]:
    """Train `module` in place and yield a record per epoch; at the end the module has the best weights.

    Args: loss: loss(module, *batch) -> (b,), one value per row. train, valid: tensors with equal rows, on the module's device; or
    train is a `Batches`, which has its own validation rows, and valid is None. seed: of the order and of random layers.
    checkpoint: path; written after every epoch, and training continues from it if it exists. arithmetic: kept in every record.
    Raises: DataError (a batch larger than the data), TrainingError (a loss that is not finite, out of memory; the last
    checkpoint is kept), ModelFileError (a checkpoint of another training).

    >>> import torch
    >>> from sbi_phys.training.loop import TrainConfig, fit
    >>> line = torch.nn.Linear(1, 1)
    >>> x = torch.linspace(0, 1, 200)[:, None]
    >>> def loss(module, x, y):
    ...     return ((module(x) - y) ** 2).sum(dim=1)
    >>> records = list(fit(loss, line, (x[::2], 2 * x[::2]), (x[1::2], 2 * x[1::2]), TrainConfig(max_epochs=2), seed=0))
    >>> len(records), records[1].valid < records[0].valid
    (2, True)
    """
    ranks = current_ranks()
    batches = train if valid is None else MemoryBatches(cast(Sequence[Tensor], train), valid, seed=seed, ranks=ranks)
    trainer = _Trainer(loss, module, cast(Batches, batches), config, seed, ranks)
    trainer.arithmetic = arithmetic
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
                trainer.stop.set()  # if the caller is interrupted, the epoch ends after the current batch
    finally:
        torch.set_num_threads(threads)  # the default of threads started later
        trainer.restore_best()


def _start_thread(threads: int) -> None:
    torch.set_flush_denormal(True)
    torch.set_num_threads(threads)


class _Trainer:
    """State and steps of one training, run by `fit`."""

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
        # two batch sizes occur; each is compiled for its own shape
        mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.mean_loss: Callable[..., Tensor] = torch.compile(step, dynamic=False, mode=mode) if config.compile else step
        self.best = _copy(module)
        self.state, self.history = _State(), list[EpochRecord]()
        self.stop = threading.Event()
        self.arithmetic, self._fingerprint = "", ""

    def rate(self, step: int) -> float:
        """Learning rate at a step."""
        total = self.max_epochs * self.n_batches
        return cosine_rate(step, total, peak=self.config.learning_rate, warmup=self.config.warmup, schedule=self.config.schedule)

    def run_epoch(self) -> EpochRecord:
        """Train for one epoch, validate, and keep the best weights."""
        begin, state = time.perf_counter(), self.state
        devices = [self.device] if self.device.type == "cuda" else []
        # seeds dropout and similar layers of a user's network; the global state is restored afterwards
        noise = torch_seeded(seed_for(self.seed, "noise", state.epoch, self.ranks.rank), devices, alone=False)
        with noise, _memory_errors(self.batch_size):
            train, step_ms = self._train_epoch()
            with self.optimizer.averaged():
                valid = self._validate()
                best = valid < state.best_valid
                if best:
                    state.best_valid, state.best_epoch = valid, state.epoch
                    self.best = _copy(self.module)
        record = EpochRecord(
            state.epoch, self.max_epochs, train, valid, self.rate(max(0, state.step - 1)), time.perf_counter() - begin, step_ms, best,
            self.arithmetic,
        )  # fmt: skip
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
        # all ranks must stop together, or the others wait forever
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
                f"bf16 changes the log density by {float(error):.3g} on average in epoch {self.state.epoch}, more than {_BF16_LIMIT}; "
                "training continues in float32",
                RuntimeWarning,
                stacklevel=2,
            )

    def restore_best(self) -> None:
        """Copy the best weights into the module, as separate tensors again."""
        self.module.load_state_dict(self.best)
        self.optimizer.release()
        self.module.eval()

    def fingerprint(self) -> str:
        """Text that identifies a training by settings, seed, data, network and ranks."""
        shapes = [list(p.shape) for p in self.optimizer.weights]
        parts = {"config": asdict(self.config), "seed": self.seed, "data": self.batches.fingerprint(), "weights": shapes}
        return json.dumps(parts | {"ranks": self.ranks.size})

    def save(self, path: Path) -> None:
        """Write the complete state; only the first rank writes."""
        if self.ranks.first:
            content = {
                "fingerprint": self._fingerprint, "state": asdict(self.state), "history": [asdict(r) for r in self.history],
                "module": self.module.state_dict(), "best": self.best, "optimizer": self.optimizer.state_dict(), "bf16": self.bf16,
            }  # fmt: skip
            write_file(path, *_CHECKPOINT, content)
        self.ranks.wait()

    def resume(self, path: Path) -> Iterator[EpochRecord]:
        """Load a checkpoint if it exists, and yield the records of its epochs."""
        self._fingerprint = self.fingerprint()
        if not path.exists():
            return
        content = read_file(path, *_CHECKPOINT)
        try:
            self._take(path, content)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, StopIteration, TypeError, ValueError) as err:
            what = (str(err).splitlines() or [type(err).__name__])[0]
            raise ModelFileError(f"{path} is no checkpoint that this version can continue: {what}; remove it to train anew") from err
        yield from self.history

    def _take(self, path: Path, content: dict[str, Any]) -> None:
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
        # equal texts are one object, as in a training without interruption: the bytes of a model file depend on that
        self.history = [EpochRecord(**r | {"arithmetic": sys.intern(r.get("arithmetic", ""))}) for r in content["history"]]


class _Step(nn.Module):
    """The mean loss of a batch as a module, so that it can be compiled."""

    def __init__(self, loss: Loss, module: nn.Module) -> None:
        super().__init__()
        self.loss, self.module = loss, module

    def forward(self, *batch: Tensor) -> Tensor:
        """Mean over the rows."""
        return self.loss(self.module, *batch).mean()


def _threads(module: nn.Module, batch: int) -> int:
    """Number of threads for a step: one if the matrix products are small, else torch's number."""
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
