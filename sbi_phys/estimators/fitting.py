"""What the `fit` of all estimators shares: which simulations were handed in, the members of an ensemble, one training with its history."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import nn

from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.priors import Observable, Prior
from sbi_phys.store.store import Store
from sbi_phys.training.batches import Batches
from sbi_phys.training.loop import Loss, TrainConfig, fit
from sbi_phys.training.sources import Rows, Settings, from_arrays, from_stores, stores_of

__all__ = ["History", "fit_ensemble", "require_prior", "rows_of", "stores_or_data", "train_member"]

History = list[dict[str, Any]]  # of one training, a dictionary per epoch
Net = TypeVar("Net", bound=nn.Module)


class _Estimator(Protocol):
    prior: Prior
    observables: tuple[Observable, ...] | None
    simulator: dict[str, Any] | None


def require_prior(prior: Any) -> Prior:
    """Return the prior.   Raises: SettingError for anything else."""
    if not isinstance(prior, Prior):
        raise SettingError(f"prior is a {type(prior).__name__}; expected a prior, e.g. BoxPrior([Parameter(...)])")
    return prior


def stores_or_data(model: _Estimator, theta: Any, x: Any, *, ways: str = "fit(theta, x) or fit(store)") -> list[Store] | None:
    """Stores, if theta is one, a path or several; None where theta and x are data.

    What the first store says of its simulator and its columns is noted in the model, unless that knows better.
    Raises: DataError (one of the two is missing, or x beside a store), SimulatorMismatchError, StoreError.
    """
    stores = stores_of(theta, model.prior)
    if stores is None:
        if theta is None or x is None:
            raise DataError(f"{'theta' if theta is None else 'x'} is missing; expected {ways}")
        return None
    if x is not None:
        raise DataError("x was given beside a store; expected fit(store) or fit(theta, x)")
    model.simulator = model.simulator or stores[0].identity
    model.observables = model.observables or stores[0].observables
    return stores


def rows_of(
    model: _Estimator,
    theta: Any,
    x: Any,
    settings: Callable[[], Settings],
    memory: int | None,
    progress: Progress,
    *,
    ways: str = "fit(theta, x) or fit(store)",
) -> Rows:
    """Training rows of arrays or stores; `settings` is asked after a store has been looked at.   Raises: as `stores_or_data`."""
    stores = stores_or_data(model, theta, x, ways=ways)
    return from_arrays(theta, x, settings()) if stores is None else from_stores(stores, settings(), memory, progress)


def fit_ensemble(n: int, member: Callable[[int], tuple[Net, History]]) -> tuple[list[Net], list[History]]:
    """Networks and histories of members 0 .. n - 1."""
    trained = [member(k) for k in range(n)]
    return [net for net, _ in trained], [history for _, history in trained]


def train_member(
    loss: Loss,
    net: nn.Module,
    batches: Batches,
    config: TrainConfig,
    *,
    seed: int,
    member: tuple[int, int],
    progress: Progress,
    checkpoint: str | Path | None = None,
) -> History:
    """Train the network of member (k, of n) on its batches; the records of all epochs.

    Args: seed: of the estimator. checkpoint: path prefix; member k goes on from the file <prefix>.k.   Raises: as `train.fit`.
    """
    k, n = member
    path = None if checkpoint is None else Path(f"{checkpoint}.{k}")
    records: History = []
    with progress.task("train" if n == 1 else f"train {k + 1}/{n}", config.for_rows(batches.n)[1]) as task:
        for record in fit(loss, net, batches, None, config, seed=seed_for(seed, "member", k), checkpoint=path):
            records.append(asdict(record))
            task.advance(1, text=f"loss {record.train:.3f} validation {record.valid:.3f}{' *' if record.best else ''}")
    return records
