r"""Amortised posterior of sets of ten to thousands of events, learned in two stages.

    1. scores     f(e, u) ~ log p(e | theta(u)) up to a(e), from small sets S with their parameters u, batch by batch:
                  minimise  -mean_i log [ exp L_i(u_i) / sum_j exp L_i(u_j) ],      L_i(u) = sum_{e in S_i} f(e, u)
    2. posterior  q(theta | S) on sets of all sizes, the scores held fixed: a flow in units of the Gaussian posterior that the scores give

The other rows of a batch are draws of the prior; at the minimum L_i(u) = log p(S_i | u) + a(S_i) for every set. Small sets determine
the same f as large ones and cost less. The number of events of a set may depend on theta: a term c(u) per event learns this dependence as
far as it is linear in the number. In the second stage the scores are fixed: each set is summarised once, in about a hundred numbers that
every epoch uses again, at a tenth of the cost. The flow corrects errors of the scores and learns shapes that are not Gaussian; its loss
is that of `npe`.

    scores = likelihood_embedding(prior, simulator=small_sets, n=1_000_000)
    npe = SetNPE(prior, embedding=scores).fit(simulator=sets_of_all_sizes, online=True, n=200_000)

Source: see `nets.embedding_set_likelihood`.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from sbi_phys.core.checks import require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import seed_for, torch_rng_for, torch_seeded
from sbi_phys.core.types import ArrayLike
from sbi_phys.estimators.npe import NPE
from sbi_phys.nets.embedding_set import padded
from sbi_phys.nets.embedding_set_likelihood import AnchoredFlow, LikelihoodSet, contrastive_loss
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet
from sbi_phys.priors import Prior
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.training.batches import Batches
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.training.online import OnlineBatches
from sbi_phys.training.sources import Rows, Settings, from_arrays, from_simulator

__all__ = ["SetNPE", "likelihood_embedding"]

_SUMMARISED = 512  # sets at a time


class _AnchoredNet(PosteriorNet):
    """Embedding with an anchor, and the flow in its units."""

    def __init__(self, dim: int, x_shape: tuple[int, ...], flow: FlowConfig, embedding: LikelihoodSet, *, seed: int) -> None:
        super().__init__(dim, x_shape, flow, embedding, seed=seed)
        with torch_seeded(seed_for(seed, "anchored flow")):
            self.flow = AnchoredFlow(dim, self.n_features, flow, rng=torch_rng_for(seed, "splits"))

    def start_at(self, u: Tensor) -> None:
        """The anchor says where to begin."""


class _Summarised:
    """Batches of parameters and summaries of sets, each set summarised once: rows for any number of epochs.

    Args: batches: of sets. embedding. stretches: epochs of `batches` to take, more than one where their rows never come again.
    seed: of the order. progress.
    """

    def __init__(self, batches: Batches, embedding: LikelihoodSet, stretches: int, seed: int, progress: Progress) -> None:
        self._batches, self._stretches, self._seed = batches, stretches, seed
        parts: list[tuple[Tensor, ...]] = []
        with progress.task("summaries of sets", total=stretches) as task:
            for k in range(stretches):
                for u, x, *rest in batches.epoch(k, max(1, batches.n // _SUMMARISED)):
                    parts.append((u, embedding.summarise(x), *rest))
                task.advance(1)
        self._rows = [torch.cat(columns) for columns in zip(*parts, strict=True)]
        u, x, *rest = batches.validation
        self.validation: tuple[Tensor, ...] = (u, torch.cat([embedding.summarise(part) for part in x.split(_SUMMARISED)]), *rest)

    @property
    def n(self) -> int:
        """Training rows, over all ranks."""
        return self._batches.n * self._stretches

    def epoch(self, epoch: int, n_batches: int) -> Iterator[tuple[Tensor, ...]]:
        """This rank's rows in a fresh order."""
        order = torch.randperm(len(self._rows[0]), generator=torch_rng_for(self._seed, "order", epoch)).to(self._rows[0].device)
        for rows in order.tensor_split(n_batches):
            yield tuple(t.index_select(0, rows) for t in self._rows)

    def fingerprint(self) -> Any:
        """That of the sets, and how many were taken."""
        return [self._batches.fingerprint(), self._stretches]


class SetNPE(NPE):
    """Amortised posterior of padded sets of events, in units of the Gaussian that a learned likelihood of events gives.

    Args: as `NPE`; embedding: of `likelihood_embedding`, or a `LikelihoodSet` of the same shape to load weights into.
    `fit`, `sample`, `log_prob` and the rest are those of `NPE`; online, each of the n sets is simulated and summarised once, and the
    summaries serve config.max_epochs epochs (default: by their number).   Raises: SettingError (another embedding).

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.NormalPrior([sp.Parameter("mu")]), np.random.default_rng(0)
    >>> theta = prior.sample(100, rng)
    >>> x = sp.pad_sets([t + rng.standard_normal(4) for t in theta[:, 0]], n_max=4)
    >>> quick = sp.TrainConfig(max_epochs=1)
    >>> scores = sp.likelihood_embedding(prior, theta, x, hidden=8, rank=4, config=quick)
    >>> npe = sp.SetNPE(prior, embedding=scores, config=quick).fit(theta, x)
    >>> npe.sample(x[0], 5).shape
    (5, 1)
    """

    def build(self, scaler: Any, seed: int) -> PosteriorNet:
        """Embedding with an anchor, and the flow in its units."""
        if not isinstance(self.embedding, LikelihoodSet):
            raise SettingError(f"embedding is a {type(self.embedding).__name__}; expected what likelihood_embedding(...) returns")
        if not isinstance(self.flow, FlowConfig) or self.flow.spec:
            raise SettingError("flow is one of your own; expected a kind of FlowConfig, whose units SetNPE sets itself")
        return _AnchoredNet(self.prior.free_dim, scaler.shape, self.flow, self.embedding, seed=seed)

    def member_batches(
        self, net: PosteriorNet, batches: Batches, config: TrainConfig, seed: int, progress: Progress
    ) -> tuple[Batches, TrainConfig]:
        """Summaries of the sets, trained on with the settings of the estimator."""
        stretches = config.max_epochs if isinstance(getattr(batches, "source", None), OnlineBatches) else 1
        return _Summarised(batches, cast(LikelihoodSet, net.embedding), stretches, seed, progress), self.config

    def row_loss(self, net: nn.Module, u: Tensor, summary: Tensor) -> Tensor:
        """-log q(u | summary)."""
        assert isinstance(net, _AnchoredNet)
        assert isinstance(net.embedding, LikelihoodSet)
        return -net.flow.log_prob(u, net.embedding.read(summary))


def likelihood_embedding(
    prior: Prior,
    theta: ArrayLike | None = None,
    x: ArrayLike | None = None,
    *,
    simulator: Simulator | None = None,
    n: int | None = None,
    n_columns: int = 1,
    hidden: int = 64,
    rank: int = 48,
    embedding: EmbeddingConfig | None = None,
    config: TrainConfig | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> LikelihoodSet:
    """Learn the scores of events and return the embedding that uses them, for `SetNPE(prior, embedding=...)`.

    Args: prior: over theta. theta, x: (n, d) draws of it and padded sets (n, n_max, k + 1) or (n, n_max (k + 1)), mask in the last column,
    or a list of arrays (m_i, k);
    or simulator, n: so many sets are drawn while it learns, each used once. Sets of some tens of events are best.
    n_columns: k, of an event. hidden, rank: of the scores. embedding: shape of the perceptron that the second stage trains.
    config: of the training; large batches are good, as the other rows of a batch are the contrast.

    Raises: DataError (neither or both sources), ShapeError, NonFiniteError, SupportError, SettingError, TrainingError.
    Source: arXiv:1807.03748, arXiv:1805.12244.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.NormalPrior([sp.Parameter("mu")]), np.random.default_rng(0)
    >>> theta = prior.sample(100, rng)
    >>> x = sp.pad_sets([t + rng.standard_normal(4) for t in theta[:, 0]], n_max=4)
    >>> scores = sp.likelihood_embedding(prior, theta, x, hidden=8, rank=4, config=sp.TrainConfig(max_epochs=1))
    >>> type(scores).__name__
    'LikelihoodSet'
    """
    config = config or TrainConfig(batch_size=512, max_epochs=20, patience=20, learning_rate=4e-3, weight_decay=0.0)
    settings = Settings(prior, require_int("seed", seed, low=0), config, resolve_device(device), "real", None)
    with _rows(theta, x, simulator, n, settings, n_columns) as rows:
        if rows.scaler.shape[-1] % (n_columns + 1):
            raise ShapeError(f"x has rows of shape {rows.scaler.shape}; expected slots of {n_columns + 1} columns, n_columns and a mask")
        net = LikelihoodSet(n_columns, prior.free_dim, hidden=hidden, rank=rank, config=embedding, seed=seed).to(settings.device)
        net.standardise_events(rows.scaler)
        net.learn_scores(True)
        batches, _ = rows.member(0)
        with or_none(progress).task("event scores", total=rows.config.for_rows(batches.n)[1]) as task:
            for record in fit(contrastive_loss, net, batches, None, rows.config, seed=seed_for(seed, "event scores")):
                task.advance(1, text=f"loss {record.train:.4f} validation {record.valid:.4f}{' *' if record.best else ''}")
    net.learn_scores(False)
    net.forget_scaling()
    return net.eval()


def _rows(theta: Any, x: Any, simulator: Simulator | None, n: int | None, settings: Settings, n_columns: int) -> Rows:
    if (simulator is None) == (theta is None or x is None):
        raise DataError("expected either theta and x, or simulator=... with n=...")
    if simulator is None:
        return from_arrays(theta, padded("x", x, n_columns)[0], settings)
    share = min(settings.config.validation_fraction, 2048 / max(n or 1, 2048))
    return from_simulator(simulator, n, replace(settings, config=replace(settings.config, validation_fraction=share)), 0)
