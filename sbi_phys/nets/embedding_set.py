r"""Embeddings of sets of events, of any size and in any order: deep set and set attention.

    deep set      h(X) = rho( mean_e phi(e), log(1 + m) )                                          arXiv:1703.06114
    attention     h(X) = rho( pool(block(phi(X))), log(1 + m) ), softmax-weighted means over events  arXiv:1810.00825

A set of m events is a row of slots, x (n_max, k + 1) or flattened; the last column of a slot is 1 if it holds an event and 0 if it is
empty. The events of all sets of a batch are collected in one list, with the number of the set that each belongs to. So the cost of a
batch is that of its events, the result depends neither on the padding nor on the order, and a set may be empty. Events are averaged, not
summed: the network learns the spread of a mean, 1/sqrt(m), from log(1 + m), which also carries what the number of events says about theta.

Padded sets (n, n_max, k + 1) are standardised by one mean and width for all slots (`training.scaling.XScaler`). Flat rows, as a store keeps
them, are standardised column by column, which scales the slots differently and changes the mask: `take_scaling` tells the embedding
that scaling, so that it can be undone.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import as_real, require_finite, require_int
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP
from sbi_phys.nets.own import build_own
from sbi_phys.store.layout import Ragged
from sbi_phys.training.scaling import XScaler

__all__ = ["DeepSet", "SetAttention", "SetEmbedding", "event_columns", "pad_sets", "padded", "take_scaling"]

_EVENTS = 131_072  # events at a time where no gradient is needed: bounds the memory
_MASK = 1e-2  # by which a mask may differ from 0 and 1 after its scaling is undone
_COUNT_CENTRE, _COUNT_SPREAD = 4.0, 2.0  # of log(1 + m) for sets of one to some thousand events


def pad_sets(sets: Sequence[ArrayLike], n_max: int | None = None) -> Array:
    """Sets of events, each (m_i, k) or (m_i,) for k = 1, as one padded batch x (n, n_max, k + 1) with the mask in the last column.

    Args: n_max: slots; default those of the largest set, at least one.
    Raises: DataError (no sets, a set larger than n_max), ShapeError (sets of unequal width), NonFiniteError.

    >>> import sbi_phys as sp
    >>> sp.pad_sets([[0.3, 0.8], [0.5]])[:, :, -1].tolist()
    [[1.0, 1.0], [1.0, 0.0]]
    """
    arrays = [as_real(f"set {i}", s) for i, s in enumerate(sets)]
    if not arrays:
        raise DataError("sets is empty; expected at least one set of events (a set itself may have no events)")
    arrays = [a[:, None] if a.ndim == 1 else a for a in arrays]
    filled = [a for a in arrays if a.size] or arrays
    width = filled[0].shape[1] if filled[0].ndim == 2 else 0
    for i, a in enumerate(arrays):
        if a.ndim != 2 or (a.shape[1] != width and a.size):
            raise ShapeError(f"set {i} has shape {a.shape}; expected (m, {width}) as the first set with events")
        require_finite(f"set {i}", a)
    largest = max(len(a) for a in arrays)
    n_max = max(1, largest) if n_max is None else require_int("n_max", n_max, low=1)
    if largest > n_max:
        raise DataError(f"a set has {largest} events; expected at most n_max = {n_max}")
    out = np.zeros((len(arrays), n_max, width + 1))
    for row, a in zip(out, arrays, strict=True):
        row[: len(a), :width] = a.reshape(len(a), width)
        row[: len(a), width] = 1.0
    return out


def event_columns(module: Any) -> int | None:
    """Columns of an event of the first `SetEmbedding` within a module, given or named; None for anything else."""
    if isinstance(module, EmbeddingConfig) and module.spec:
        with torch.random.fork_rng([]):
            module = build_own("embedding", module.spec, module.settings)
    if not isinstance(module, nn.Module):
        return None
    return next((part.n_columns for part in module.modules() if isinstance(part, SetEmbedding)), None)


def padded(name: str, x: Any, n_columns: int, n_max: int | None = None) -> tuple[Any, bool]:
    """Padded sets (n, n_max, k + 1) of a list of arrays (m_i, k), or of one array (m, k), and whether x is one set; other x unchanged.

    Args: n_columns k. n_max: slots; None: those of the largest set, for a list alone.
    Raises: DataError (a set larger than n_max), ShapeError, NonFiniteError.
    """
    if isinstance(x, Ragged):
        x = [x.row(i) for i in range(len(x))]
    shapes = [_shape(s) for s in x] if isinstance(x, list | tuple) else []
    if shapes and all(len(shape) in (1, 2) for shape in shapes):
        if len(set(shapes)) == 1 and len(shapes[0]) == 2 and shapes[0][1] == n_columns + 1:
            return x, False  # padded already
        for i, shape in enumerate(shapes):
            if shape != (0,) and (shape[1] if len(shape) == 2 else 1) != n_columns:
                raise ShapeError(f"set {i} of {name} has shape {shape}; expected (m, {n_columns}), events without a mask")
        return pad_sets(x, n_max), False
    if n_max is not None and np.ndim(x) == 2 and np.shape(x)[1] == n_columns:
        return pad_sets([x], n_max)[0], True
    return x, False


def _shape(x: Any) -> tuple[int, ...]:
    """Shape of an array or list; (0, 0, 0) for lists that are no array."""
    try:
        return np.shape(x)
    except ValueError:
        return 0, 0, 0


def take_scaling(module: nn.Module, scaler: XScaler) -> None:
    """Tell every `SetEmbedding` within a module how its inputs were standardised; other modules are left alone.

    Raises: SettingError, ShapeError.
    """
    for part in module.modules():
        if isinstance(part, SetEmbedding):
            part.take_scaling(scaler)


class SetEmbedding(nn.Module):
    """Base of the embeddings of sets: finds the events in padded rows and undoes their standardisation.

    A subclass gives `pooled(events, owner, n)`: events (N, k), standardised, owner (N,), the set of each -> (n, n_pooled).

    Args: n_columns k, of an event, without the mask. n_pooled: length of what `pooled` returns. config: of the perceptron
    behind it, whose n_features is the length of the summary.   Raises: SettingError.

    >>> import sbi_phys as sp, torch
    >>> class CountsOnly(sp.nets.SetEmbedding):
    ...     def pooled(self, events, owner, n):
    ...         return torch.zeros(n, 1)
    >>> CountsOnly(1, 1, None)(torch.ones(4, 3, 2)).shape
    torch.Size([4, 64])
    """

    shift: Tensor
    factor: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, n_columns: int, n_pooled: int, config: EmbeddingConfig | None) -> None:
        super().__init__()
        self.n_columns = require_int("n_columns", n_columns, low=1)
        self.rho = ResidualMLP(n_pooled + 1, config or EmbeddingConfig())
        # shift and factor undo the estimator's scaling (as long as a row); centre and spread are those of all real events
        for name, value in {"shift": torch.zeros(0), "factor": torch.zeros(0)}.items():
            self.register_buffer(name, value.double())
        self.register_buffer("centre", torch.zeros(n_columns, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(n_columns, dtype=torch.float64))

    def pooled(self, events: Tensor, owner: Tensor, n: int) -> Tensor:
        """Summaries (n, n_pooled) of n sets from their events (N, k); zeros for an empty set."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Padded sets (n, n_max, k + 1) or (n, n_max (k + 1)) -> features (n, n_features).   Raises: ShapeError."""
        flat = torch.flatten(x, start_dim=1)
        width = self.n_columns + 1
        if x.ndim > 2 and x.shape[-1] != width:
            raise ShapeError(
                f"x has shape {tuple(x.shape)}; expected (n, n_max, {width}): {self.n_columns} columns of an event and a mask, as pad_sets "
                "makes them of a list of sets without a mask"
            )
        if flat.shape[1] % width or not flat.shape[1]:
            raise ShapeError(
                f"x has rows of {flat.shape[1]} columns; expected a multiple of {width}: {self.n_columns} of an event and a mask"
            )
        if self.shift.numel() not in (0, flat.shape[1]):
            raise ShapeError(f"x has rows of {flat.shape[1]} columns; expected {self.shift.numel()} as in training")
        step = max(1, _EVENTS // (flat.shape[1] // width))
        if torch.is_grad_enabled() or len(flat) <= step:
            return self._features(flat)
        return torch.cat([self._features(part) for part in flat.split(step)])

    def _features(self, flat: Tensor) -> Tensor:
        events, owner = self._events(flat)
        counts = torch.bincount(owner, minlength=len(flat)).to(flat.dtype)
        pooled = self.pooled(events, owner, len(flat)).to(flat.dtype)
        size = (torch.log1p(counts) - _COUNT_CENTRE) / _COUNT_SPREAD
        out: Tensor = self.rho(torch.cat([pooled, size[:, None]], dim=1))
        return out

    def _events(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """All real events, standardised (N, k), and the set of each (N,)."""
        slots = flat.view(len(flat), -1, self.n_columns + 1)
        mask = slots[:, :, -1]
        if self.shift.numel():
            shift, factor = (b.view(-1, self.n_columns + 1) for b in (self.shift, self.factor))
            mask = mask * factor[:, -1] + shift[:, -1]
            owner, slot = torch.nonzero(mask > 0.5, as_tuple=True)
            events = slots[owner, slot, :-1].double() * factor[slot, :-1] + shift[slot, :-1]
        else:
            owner, slot = torch.nonzero(mask > 0.5, as_tuple=True)
            events = slots[owner, slot, :-1].double()
        odd = ((mask - (mask > 0.5).to(mask.dtype)).abs() > _MASK).nonzero()
        if len(odd):
            row, slot_of = odd[0].tolist()
            raise DataError(
                f"the mask of slot {slot_of} of row {row} of x is {float(mask[row, slot_of]):.3g}; expected 1 for an event and "
                f"0 for an empty slot, in the last of {self.n_columns + 1} columns of each slot; pad_sets adds a mask to sets"
            )
        return ((events - self.centre) / self.spread).to(flat.dtype), owner

    def take_scaling(self, scaler: XScaler) -> None:
        """Undo z = (x - mean) / scale from now on; mean and width of the real events follow from the columns' moments.

        Raises: SettingError (columns taken for counts), ShapeError.
        """
        width = self.n_columns + 1
        mean, scale = scaler.mean.reshape(-1), scaler.scale.reshape(-1)
        if scaler.missing.any():
            raise SettingError("values of x may be missing, and sets have a mask of their own; expected observables without missing=True")
        if scaler.counts.any():
            raise SettingError("events are whole numbers and were taken for counts; expected x_transform='real' with sets of events")
        if mean.size % width:
            raise ShapeError(f"x has rows of {mean.size} columns; expected a multiple of {width}: {self.n_columns} of an event and a mask")
        self.shift = torch.from_numpy(mean.copy()).to(self.shift.device)
        self.factor = torch.from_numpy(scale.copy()).to(self.factor.device)
        m, s = mean.reshape(-1, width), scale.reshape(-1, width)
        if (m[:, -1] == 0).all() and (s[:, -1] == 1).all():  # already one scale for all slots, and the mask as it is
            self.shift, self.factor = self.shift.new_zeros(0), self.factor.new_zeros(0)
            self.centre, self.spread = torch.zeros_like(self.centre), torch.ones_like(self.spread)
            return
        filled = m[:, -1]  # the share of sets that fill a slot
        used = filled > 0
        if not used.any():
            return
        total = filled.sum()
        centre = m[used, :-1].sum(axis=0) / total
        square = (s[used, :-1] ** 2 + m[used, :-1] ** 2).sum(axis=0) / total - centre**2
        self.centre = torch.from_numpy(centre).to(self.centre.device)
        self.spread = torch.from_numpy(np.sqrt(np.maximum(square, 1e-24 + 1e-12 * centre**2))).to(self.spread.device)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in ("shift", "factor"):  # as long as a row, which only the training knew
            if prefix + name in state_dict:
                setattr(self, name, torch.zeros_like(state_dict[prefix + name], device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DeepSet(SetEmbedding):
    """Deep set: rho(mean_e phi(e), log(1 + m)).

    Args: n_columns: of an event, without the mask. hidden: width of phi, two layers. n_pooled: length of the mean.
    config: of rho. seed: of the initial weights.   Raises: SettingError.   Source: Zaheer et al. 2017, arXiv:1703.06114.

    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("mu", -1, 1)])
    >>> npe = sp.NPE(prior, embedding=sp.DeepSet(n_columns=1))
    """

    def __init__(
        self, n_columns: int, *, hidden: int = 64, n_pooled: int = 64, config: EmbeddingConfig | None = None, seed: int = 0
    ) -> None:
        with torch_seeded(seed_for(seed, "deep set")):
            super().__init__(n_columns, require_int("n_pooled", n_pooled, low=1), config)
            self.first = nn.Linear(n_columns, require_int("hidden", hidden, low=1))
            self.second = nn.Linear(hidden, n_pooled)

    def pooled(self, events: Tensor, owner: Tensor, n: int) -> Tensor:
        """Mean of phi over each set's events -> (n, n_pooled)."""
        h = F.silu(self.second(F.silu(self.first(events))))
        counts = torch.bincount(owner, minlength=n).clamp(min=1)
        return segment_sum(h, owner, n) / counts[:, None]


class SetAttention(SetEmbedding):
    """Small set transformer: induced attention blocks, then pooling by learned queries, then rho with log(1 + m).

    In an induced block, n_induced learned queries attend to the events, and each event attends to their results: the cost grows with the
    number of events, not with its square.

    Args: n_columns: of an event, without the mask. hidden: width. n_heads: divides it. n_blocks: induced blocks. n_induced: their
    queries. n_seeds: of the pooling. config: of rho. seed: of the initial weights.
    Raises: SettingError.   Source: Lee et al. 2019, arXiv:1810.00825.

    >>> import sbi_phys as sp, torch
    >>> sp.SetAttention(n_columns=1, n_heads=2, hidden=16)(torch.ones(4, 3, 2)).shape
    torch.Size([4, 64])
    """

    def __init__(
        self,
        n_columns: int,
        *,
        hidden: int = 48,
        n_heads: int = 4,
        n_blocks: int = 1,
        n_induced: int = 8,
        n_seeds: int = 2,
        config: EmbeddingConfig | None = None,
        seed: int = 0,
    ) -> None:
        hidden, n_heads = require_int("hidden", hidden, low=1), require_int("n_heads", n_heads, low=1)
        if hidden % n_heads:
            raise SettingError(f"hidden is {hidden} and n_heads {n_heads}; expected a width that the number of heads divides")
        n_seeds = require_int("n_seeds", n_seeds, low=1)
        with torch_seeded(seed_for(seed, "set attention")):
            super().__init__(n_columns, hidden * n_seeds, config)
            self.first = nn.Linear(n_columns, hidden)
            self.second = nn.Linear(hidden, hidden)
            self.blocks = nn.ModuleList(
                _InducedBlock(hidden, n_heads, require_int("n_induced", n_induced, low=1))
                for _ in range(require_int("n_blocks", n_blocks, low=0))
            )
            self.pool = _Queries(hidden, n_heads, n_seeds)

    def pooled(self, events: Tensor, owner: Tensor, n: int) -> Tensor:
        """Results of the pooling queries in each set -> (n, n_seeds hidden)."""
        h = F.silu(self.second(F.silu(self.first(events))))
        for block in self.blocks:
            h = block(h, owner, n)
        return self.pool(h, owner, n).flatten(start_dim=1)


class _Queries(nn.Module):
    """m learned queries attend to the events of each set: softmax-weighted means of values -> (n, m, hidden)."""

    def __init__(self, hidden: int, n_heads: int, n_queries: int) -> None:
        super().__init__()
        self.n_heads, self.n_queries = n_heads, n_queries
        self.queries = nn.Parameter(torch.randn(n_heads, n_queries, hidden // n_heads))
        self.key, self.value = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, owner: Tensor, n: int) -> Tensor:
        heads = (len(h), self.n_heads, self.queries.shape[2])
        key, value = self.key(h).view(heads), self.value(h).view(heads)
        score = torch.einsum("ehd,hqd->ehq", key, self.queries) / key.shape[-1] ** 0.5
        weight = torch.exp(score - _segment_max(score.detach(), owner, n)[owner])
        total = segment_sum(weight, owner, n)  # (n, heads, queries)
        summed = segment_sum(weight[..., None] * value[:, :, None, :], owner, n)  # (n, heads, queries, d)
        # an empty set has no weights: its mean is zero
        mean = summed / total.clamp(min=torch.finfo(h.dtype).tiny)[..., None]
        return mean.permute(0, 2, 1, 3).flatten(start_dim=2).to(h.dtype)


class _InducedBlock(nn.Module):
    """h_e + attention of e to the results of the queries in its set, then h + perceptron."""

    def __init__(self, hidden: int, n_heads: int, n_induced: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.look = _Queries(hidden, n_heads, n_induced)
        self.query, self.key, self.value = (nn.Linear(hidden, hidden) for _ in range(3))
        self.up, self.down = nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, owner: Tensor, n: int) -> Tensor:
        found = self.look(h, owner, n)  # (n, m, hidden)
        width = h.shape[1] // self.n_heads
        shape = (n, found.shape[1], self.n_heads, width)
        key, value = self.key(found).view(shape), self.value(found).view(shape)
        query = self.query(h).view(len(h), self.n_heads, width)
        score = torch.einsum("ehd,emhd->ehm", query, key[owner]) / query.shape[-1] ** 0.5
        h = h + torch.einsum("ehm,emhd->ehd", score.softmax(dim=-1), value[owner]).flatten(start_dim=1)
        return h + self.down(F.silu(self.up(F.silu(h))))


def segment_sum(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """Sum of values (N, ...) over the rows of each set (n, ...); in double precision where no gradient is needed.

    In single precision, the sum over a thousand events would depend on their order at the level of 1e-5.
    """
    values = values if torch.is_grad_enabled() else values.double()
    return values.new_zeros(n, *values.shape[1:]).index_add(0, owner, values)


def _segment_max(values: Tensor, owner: Tensor, n: int) -> Tensor:
    index = owner.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
    start = values.new_full((n, *values.shape[1:]), -torch.inf)
    return start.scatter_reduce(0, index, values, reduce="amax")
