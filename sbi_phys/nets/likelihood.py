r"""Learned likelihood p(x | theta): the map from x to the space of the flow with its exact Jacobian, the loss, and the density of rows.

    z = (g(t) - mean) / scale,   log p(x | theta) = log q(z | theta) + sum_k log|dz_k / dt_k|

t is x itself, or x + v with v uniform on [0, 1) if x are counts (dequantisation). g is 2 sqrt(t) on counts (Anscombe's root, which gives
Poisson noise unit width over all decades), log t on positive columns that span decades, and t elsewhere.

A density over t gives probabilities of whole numbers, P(x | theta) = E_v[p(x + v | theta)]. Training maximises E_v[log p(x + v | theta)],
a lower bound of log P. Evaluation takes the mean of p over a fixed Latin hypercube of J points v, the same for all x and theta, so the
result is a smooth function of theta. Its log is too low by about Var_v[p / P] / 2J, which is zero for a flow that has learned the steps
of the density of t.

Columns without information are removed: constant columns, and one column of each block of counts whose total never changes (the density
is conditional on the total, p(x_1 .. x_k) = p(x_1 .. x_{k-1})). Data in which such a column differs have probability zero, an error.

Source: Theis et al. 2016, arXiv:1511.01844 (dequantisation).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

from sbi_phys.core.checks import as_real, require_choice, require_finite
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import AnyArray, Array, Integers, Mask
from sbi_phys.nets.flow import base_log_prob
from sbi_phys.nets.flow_own import DistributionFlow
from sbi_phys.nets.posterior import PosteriorNet, log_prob_nets
from sbi_phys.priors import Observable
from sbi_phys.training.scaling import count_columns

__all__ = ["DequantisedLoss", "XColumns", "log_density_rows", "noise_points", "value_and_gradient"]


TRANSFORMS = ("auto", "counts", "real", "log")
_REAL, _COUNTS, _LOG = 0, 1, 2
_DECADES = 1e3  # largest over smallest value above which a positive column is taken as its logarithm
_ROWS = 1 << 18  # rows of the flow in memory at a time
_GRADIENT_ROWS = 1 << 15  # the same where the graph is kept


@dataclass(frozen=True, slots=True)
class XColumns:
    """The map of x (n, k) to z (n, d).

    Args: n_columns k. kept (d,): columns that enter the flow. kind (d,): 0 real, 1 counts, 2 logarithm. noisy (d,): dequantised.
    mean, scale (d,). constant: columns and their value. ties: (columns, total, the one left out) of blocks with a constant total.
    """

    n_columns: int
    kept: Integers
    kind: Integers
    noisy: Mask
    mean: Array
    scale: Array
    constant: tuple[tuple[int, float], ...] = ()
    ties: tuple[tuple[tuple[int, ...], float, int], ...] = ()

    @classmethod
    def fit(cls, x: Array, transform: str, dequantise: str | bool, observables: Sequence[Observable] | None, train: Array) -> Self:
        """Learn the columns from all x (n, k) and the scaling from the rows `train`.   Raises: DataError, SettingError, ShapeError."""
        require_choice("x_transform", transform, TRANSFORMS)
        counts = count_columns(x, "real" if transform == "log" else transform, observables)
        whole = (x == np.round(x)).all(axis=0)
        _check_kinds(x, transform, dequantise, counts, whole)
        low, high = x.min(axis=0), x.max(axis=0)
        varies = high > low
        ties = _ties(x, counts & whole, varies, observables)
        kept = np.flatnonzero(varies & ~np.isin(np.arange(x.shape[1]), [t[2] for t in ties]))
        if not len(kept):
            raise DataError("x has no column that varies and is not fixed by the others; expected at least one")
        decades = (low > 0) & (high > _DECADES * np.where(low > 0, low, 1.0)) & ~counts & (transform == "auto")
        kind = np.where(counts, _COUNTS, np.where(decades | (transform == "log"), _LOG, _REAL))[kept]
        noisy = (whole & counts if dequantise == "auto" else np.full(x.shape[1], bool(dequantise)))[kept]
        constant = tuple((int(c), float(low[c])) for c in np.flatnonzero(~varies))
        blank = cls(x.shape[1], kept, kind, noisy, np.zeros(len(kept)), np.ones(len(kept)), constant, ties)
        y, _ = blank.stretch(train[:, kept], np.full(len(kept), 0.5))
        sd = y.std(axis=0)
        return cls(x.shape[1], kept, kind, noisy, y.mean(axis=0), np.where(sd > 0, sd, 1.0), constant, ties)

    @property
    def dim(self) -> int:
        """Columns of the flow."""
        return len(self.kept)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one event (k,)."""
        return (self.n_columns,)

    @property
    def all_counts(self) -> bool:
        """Whether every column of the flow holds counts."""
        return bool((self.kind == _COUNTS).all())

    def check(self, name: str, x: Any, *, rows: bool = False) -> tuple[Array, bool]:
        """Return x as (n, k), and whether one row (k,) was passed; `rows`: a vector is a column of events where k is 1.

        Raises: ShapeError, NonFiniteError, DataError (no rows; values that the training data exclude, naming the first row).
        """
        array = as_real(name, x)
        single = array.ndim == 1 and array.shape[0] == self.n_columns and not (rows and self.n_columns == 1)
        if single:
            array = array[None]
        elif array.ndim == 1 and self.n_columns == 1:
            array = array[:, None]
        if array.ndim != 2 or array.shape[1] != self.n_columns:
            raise ShapeError(f"{name} has shape {array.shape}; expected ({self.n_columns},) or (n, {self.n_columns}) as in training")
        if not len(array):
            raise DataError(f"{name} has no rows; expected at least one event")
        require_finite(name, array)
        self._require_support(name, array)
        return array, single

    def _require_support(self, name: str, x: Array) -> None:
        data = x[:, self.kept]
        self._refuse(name, data, (data < 0) & (self.kind == _COUNTS), "counts >= 0")
        self._refuse(name, data, (data <= 0) & (self.kind == _LOG), "values > 0")
        self._refuse(name, data, (data != np.round(data)) & self.noisy, "whole numbers")
        for column, value in self.constant:
            bad = x[:, column] != value
            if bad.any():
                row = int(np.argmax(bad))
                raise DataError(f"{name} is {x[row, column]:g} in row {row}, column {column}; expected {value:g} as in all training data")
        for columns, total, _ in self.ties:
            sums = x[:, list(columns)].sum(axis=1)
            if (sums != total).any():
                row = int(np.argmax(sums != total))
                raise DataError(
                    f"{name} sums to {sums[row]:g} over columns {columns[0]} to {columns[-1]} in row {row};"
                    f" expected {total:g} as in all training data"
                )
            left_out = x[:, list(columns)]
            if (left_out < 0).any():
                raise DataError(f"{name} has negative values in columns {columns[0]} to {columns[-1]}; expected counts >= 0")

    def _refuse(self, name: str, data: Array, bad: Mask, expected: str) -> None:
        if bad.any():
            row, k = (int(i) for i in np.argwhere(bad)[0])
            raise DataError(
                f"{name} has {int(bad.any(axis=1).sum())} of {len(data)} rows outside the support of the training data, the first is row"
                f" {row}: {data[row, k]:g} in column {self.kept[k]}; expected {expected} there"
            )

    def stretch(self, data: Array, noise: Array) -> tuple[Array, Array]:
        """Return y = g(t) (..., d) and sum_k log|dy/dt| (...) of the kept columns (..., d) with noise v, broadcast."""
        t = data + np.where(self.noisy, noise, np.where(self.kind == _COUNTS, 0.375, 0.0))
        root, log = self.kind == _COUNTS, self.kind == _LOG
        y = np.where(root, 2 * np.sqrt(np.where(root, t, 1.0)), np.where(log, np.log(np.where(log, t, 1.0)), t))
        slope = np.where(root, -0.5 * np.log(np.where(root, t, 1.0)), np.where(log, -np.log(np.where(log, t, 1.0)), 0.0))
        return y, slope.sum(axis=-1)

    def to_z(self, data: Array, noise: Array) -> tuple[Array, Array]:
        """Return z (..., d) and sum_k log|dz/dt| (...) of the kept columns."""
        y, slope = self.stretch(data, noise)
        return (y - self.mean) / self.scale, slope - float(np.log(self.scale).sum())

    def from_z(self, z: Array) -> Array:
        """Inverse: z (n, d) -> x (n, k) with whole numbers where dequantised, constant columns and totals included."""
        y = z * self.scale + self.mean
        root, log = self.kind == _COUNTS, self.kind == _LOG
        t = np.where(root, (np.maximum(y, 0.0) / 2) ** 2, np.where(log, np.exp(np.where(log, y, 0.0)), y))
        t = np.where(self.noisy, np.floor(t), np.where(root, np.maximum(t - 0.375, 0.0), t))
        x = np.zeros((len(z), self.n_columns))
        x[:, self.kept] = t
        for column, value in self.constant:
            x[:, column] = value
        for columns, total, last in self.ties:
            x[:, last] = np.maximum(total - (x[:, list(columns)].sum(axis=1) - x[:, last]), 0.0)
        return x

    def stored(self, x: Array) -> Tensor:
        """Rows x (n, k) for the training loop, float32: z, but the counts themselves in columns that get noise."""
        data = x[:, self.kept]
        z, _ = self.to_z(data, np.full(self.dim, 0.5))
        return torch.from_numpy(np.where(self.noisy, data, z).astype(np.float32))

    def apply(self, x: AnyArray) -> Tensor:
        """`stored` of checked rows x (n, k).   Raises: DataError for values that the rows of `fit` exclude."""
        data = np.asarray(x, dtype=np.float64)
        self._require_support("x", data)
        return self.stored(data)

    def to_dict(self) -> dict[str, Any]:
        """Plain tensors and lists, for a model file."""
        arrays = {k: torch.from_numpy(np.array(getattr(self, k))) for k in ("kept", "kind", "noisy", "mean", "scale")}
        ties = [[list(columns), total, last] for columns, total, last in self.ties]
        return {"n_columns": self.n_columns, **arrays, "constant": [list(c) for c in self.constant], "ties": ties}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        arrays = {k: state[k].numpy() for k in ("kept", "kind", "noisy", "mean", "scale")}
        ties = tuple((tuple(int(c) for c in columns), float(total), int(last)) for columns, total, last in state["ties"])
        constant = tuple((int(c), float(v)) for c, v in state["constant"])
        return cls(n_columns=state["n_columns"], **arrays, constant=constant, ties=ties)


def _check_kinds(x: Array, transform: str, dequantise: str | bool, counts: Mask, whole: Mask) -> None:
    if dequantise != "auto" and not isinstance(dequantise, bool):
        raise SettingError(f"dequantise is {dequantise!r}; expected 'auto', True or False")
    if dequantise is True and not whole.all():
        raise DataError(f"dequantise is True and column {int(np.argmin(whole))} of x has fractions; expected whole numbers")
    if (counts & (x < 0).any(axis=0)).any():
        raise DataError("x has negative values in columns declared as counts; expected counts >= 0")
    if transform == "log" and (x <= 0).any():
        raise DataError("x has values <= 0 and x_transform is 'log'; expected values > 0")


def _ties(x: Array, counts: Mask, varies: Mask, observables: Sequence[Observable] | None) -> tuple[tuple[tuple[int, ...], float, int], ...]:
    """Blocks of counts with a constant total; the column left out is the one with the largest mean."""
    edges = np.cumsum([0, *([x.shape[1]] if observables is None else [o.size for o in observables])])
    found = []
    for start, stop in itertools.pairwise(edges.tolist()):
        columns = np.arange(start, stop)
        if counts[columns].all() and varies[columns].sum() > 1:
            total = x[:, columns].sum(axis=1)
            if (total == total[0]).all():
                last = int(columns[np.argmax(np.where(varies[columns], x[:, columns].mean(axis=0), -1.0))])
                found.append((tuple(int(c) for c in columns), float(total[0]), last))
    return tuple(found)


def noise_points(columns: XColumns, n: int, seed: int) -> Array:
    """Points v (J, d) in the unit cube, one in each of J strata of every column; (1, d) if nothing is dequantised."""
    if not columns.noisy.any():
        return np.full((1, columns.dim), 0.5)
    rng = rng_for(seed, "dequantisation")
    return np.stack([(rng.permutation(n) + 0.5) / n for _ in range(columns.dim)], axis=1)


class DequantisedLoss:
    """-log q(z | u), one value per row, with fresh noise on counts in training and the same noise in every validation."""

    def __init__(self, columns: XColumns, device: torch.device) -> None:
        """Copy the parameters of the map to the device."""
        self.noisy = torch.from_numpy(columns.noisy).to(device)
        self.root = torch.from_numpy(columns.noisy & (columns.kind == _COUNTS)).to(device)
        self.mean, self.scale = (torch.from_numpy(a).float().to(device) for a in (columns.mean, columns.scale))
        self.any = bool(columns.noisy.any())

    def __call__(self, net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        """Rows u (n, f) and x (n, d) as `XColumns.stored` gives them."""
        assert isinstance(net, PosteriorNet)
        if self.any:
            generator = None if net.training else torch.Generator(device=x.device).manual_seed(0)
            x = self.with_noise(x, torch.rand(x.shape, device=x.device, generator=generator))
        return -net.log_prob(x, u)

    def with_noise(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return z (n, d) of stored rows, with noise v (n, d) in the columns of counts."""
        t = x + noise
        y = torch.where(self.root, 2 * torch.where(self.root, t, torch.ones_like(t)).sqrt(), t)
        return torch.where(self.noisy, (y - self.mean) / self.scale, x)


def log_density_rows(nets: Sequence[PosteriorNet], columns: XColumns, noise: Array, x: Array, u: Tensor, owner: Integers) -> Array:
    """Log p(x_i | theta_owner(i)) (n,) float64 of rows x (n, k), or one for all (1, k), at u (m, f); owner (n,) in 0 .. m - 1."""
    n, j = len(owner), len(noise)
    out = np.empty(n)
    size = max(1, _ROWS // j)
    one = len(x) == 1
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        if start == 0 or not one:
            z, slope = columns.to_z(x[slice(None) if one else rows][:, columns.kept][:, None], noise)
            flat = torch.from_numpy(z.reshape(-1, columns.dim).astype(np.float32)).to(u.device)
        mine, place = np.unique(owner[rows], return_inverse=True)
        index = torch.from_numpy(np.repeat(place, j)).to(u.device)
        every = flat.repeat(len(place), 1) if one else flat
        log_q = log_prob_nets(nets, every, u[torch.from_numpy(mine).to(u.device)], index).reshape(-1, j)
        out[rows] = logsumexp(log_q + slope, axis=1) - np.log(j)
    return out


def value_and_gradient(nets: Sequence[PosteriorNet], columns: XColumns, noise: Array, x: Array, u: Tensor) -> tuple[Array, Array]:
    """Sum over events of log p(x_e | theta_i) (m,) and its gradient in u (m, f), for events x (e, k) and u (m, f)."""
    m, j = len(u), len(noise)
    value, gradient = np.zeros(m), np.zeros(tuple(u.shape))
    per_set = min(len(x), max(1, _GRADIENT_ROWS // j))
    group = max(1, _GRADIENT_ROWS // (per_set * j))
    for first in range(0, len(x), per_set):
        z, slope = columns.to_z(x[first : first + per_set][:, columns.kept][:, None], noise)
        rows = torch.from_numpy(z.reshape(-1, columns.dim).astype(np.float32)).to(u.device)
        jacobian = torch.from_numpy(np.ascontiguousarray(slope)).to(u.device)
        for start in range(0, m, group):
            part = u[start : start + group].detach().requires_grad_(True)
            total = _events_sum(nets, part, rows, jacobian)
            (slopes,) = torch.autograd.grad(total.sum(), part)
            value[start : start + group] += total.detach().cpu().numpy()
            gradient[start : start + group] += slopes.double().cpu().numpy()
    return value, gradient


def _events_sum(nets: Sequence[PosteriorNet], u: Tensor, z: Tensor, jacobian: Tensor) -> Tensor:
    """Sum over events of log mean_v p, (g,) float64: u (g, f), z (e J, d), jacobian (e, J)."""
    g, n = len(u), len(z)
    every = z.repeat(g, 1)
    logs = []
    for net in nets:
        if isinstance(net.flow, DistributionFlow):
            logs.append(net.flow.log_prob(every, net.embedding(u).repeat_interleave(n, dim=0)).double())
            continue
        contexts = [c.repeat_interleave(n, dim=0) for c in net.flow.contexts(net.embedding(u))]
        base, log_det = net.flow.encode(every, contexts)
        logs.append(base_log_prob(base.double()) + log_det.double())
    log_q = torch.logsumexp(torch.stack(logs), dim=0) - np.log(len(nets))
    mean = torch.logsumexp(log_q.view(g, *jacobian.shape) + jacobian, dim=2) - np.log(jacobian.shape[1])
    return mean.sum(dim=1)
