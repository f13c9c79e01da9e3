r"""Likelihood of data sets of events, with their number: the extended likelihood.

    log L(theta) = n log nu(theta) - nu(theta) + sum_e log p(x_e | theta),      nu = exposure * expected(theta)

for n independent events x_e and a Poisson number of them with mean nu (the constant -log n! is left out). p is a density over single
events: an NLE, an NRE (log p(x | theta) - log p(x): the rest does not depend on theta), or any function. An empty set is data, too: its
log likelihood is -nu(theta). Sums are taken in double precision, events in chunks, so a set may have millions.

nu is known, or learned from simulated numbers of events by `fit_expected_counts`, Poisson regression with a network,

    minimise  E[nu(theta) - n log nu(theta)],     least where nu(theta) = E[n | theta].

Source: Barlow 1990, Nucl. Instrum. Meth. A 297, 496 (extended maximum likelihood).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from scipy.special import xlogy
from torch import Tensor, nn

from sbi_phys.core.checks import as_array, as_matrix, as_real, require_finite, require_int, require_number
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask
from sbi_phys.estimators.density_sampling import PosteriorDraws, sample_posterior
from sbi_phys.nets.embedding_vector import EmbeddingConfig, ResidualMLP
from sbi_phys.priors import Prior
from sbi_phys.samplers.importance import Proposal
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.training.scaling import split_rows

__all__ = ["EventSets", "ExpectedCounts", "ExtendedLikelihood", "fit_expected_counts"]

_PAIRS = 1 << 18  # (event, theta) pairs at a time for a plain function
_MAX_LOG = 30.0


@dataclass(frozen=True, slots=True)
class EventSets:
    """Data sets of any sizes, concatenated: set i holds the rows offsets[i] to offsets[i + 1] of flat (n, k).

    Raises: ShapeError, NonFiniteError, DataError.

    >>> import sbi_phys as sp
    >>> sets = sp.estimators.EventSets.of([[[0.1], [0.7]], [[0.4]]])
    >>> sets.sizes.tolist(), sets.padded()[0].shape
    ([2, 1], (2, 2, 1))
    """

    flat: Array
    offsets: Integers

    def __post_init__(self) -> None:
        """Check shapes and order."""
        if self.flat.ndim != 2:
            raise ShapeError(f"flat has shape {self.flat.shape}; expected (n, k), the events of all sets")
        o = self.offsets
        if o.ndim != 1 or o.size < 2 or o[0] != 0 or o[-1] != len(self.flat) or (np.diff(o) < 0).any():
            raise DataError(f"offsets is {o.tolist()[:8]}...; expected 0 = o_0 <= o_1 <= ... <= o_S = {len(self.flat)}, one set at least")
        require_finite("event sets", self.flat)

    @classmethod
    def of(cls, sets: Any) -> Self:
        """Build from a list of (n_i, k) arrays, a pair (flat (n, k), offsets (S + 1,)), or EventSets.   Raises: ShapeError, DataError."""
        if isinstance(sets, cls):
            return sets
        if isinstance(sets, tuple) and len(sets) == 2 and np.ndim(sets[1]) == 1 and np.ndim(sets[0]) == 2:
            offsets = as_real("offsets", sets[1])
            return cls(as_real("flat", sets[0]), offsets.astype(np.int64))
        if not isinstance(sets, Iterable):
            raise DataError(f"event sets are a {type(sets).__name__}; expected a list of (n_i, k) arrays, or (flat, offsets)")
        arrays = [as_real(f"set {i}", s) for i, s in enumerate(sets)]
        if not arrays:
            raise DataError("there are no event sets; expected at least one (which may be empty)")
        widths = {a.shape[1] for a in arrays if a.ndim == 2 and a.shape[1]}
        if len(widths) > 1:
            other = next(i for i, a in enumerate(arrays) if a.ndim == 2 and a.shape[1] not in (0, arrays[0].shape[1]))
            raise ShapeError(f"set {other} has shape {arrays[other].shape}, set 0 {arrays[0].shape}; expected events of equal width")
        width = widths.pop() if widths else 1
        for i, a in enumerate(arrays):
            if a.size and (a.ndim != 2 or a.shape[1] != width):
                raise ShapeError(f"set {i} has shape {a.shape}; expected (n_events, {width})")
        flat = np.concatenate([a.reshape(-1, width) for a in arrays])
        return cls(flat, np.cumsum([0, *(a.size // width for a in arrays)]))

    @classmethod
    def from_padded(cls, values: ArrayLike, mask: ArrayLike) -> Self:
        """Build from one batch: values (S, n_max, k), and mask (S, n_max), True where there is an event."""
        array, used = as_array("values", values, (None, None, None), finite=False), np.asarray(mask)
        if used.dtype != np.bool_ or used.shape != array.shape[:2]:
            raise ShapeError(f"mask has shape {used.shape} and dtype {used.dtype}; expected bool {array.shape[:2]}")
        return cls(array[used], np.cumsum([0, *used.sum(axis=1)]))

    @property
    def sizes(self) -> Integers:
        """Number of events in each set (S,)."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> Integers:
        """The set that each event belongs to (n,)."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def padded(self) -> tuple[Array, Mask]:
        """One batch: values (S, n_max, k), zero where there is no event, and mask (S, n_max)."""
        sizes = self.sizes
        mask = np.arange(max(1, int(sizes.max()))) < sizes[:, None]
        values = np.zeros((*mask.shape, self.flat.shape[1]))
        values[mask] = self.flat
        return values, mask


class ExtendedLikelihood:
    """log L(theta) = n log nu(theta) - nu(theta) + sum_e log p(x_e | theta), for any number n of events.

    Args:
        log_density: an NLE, an NRE, or a function (x (n, k), theta (n, d)) -> log p (n,), row by row, -inf allowed.
        expected: theta (m, d) -> expected events per unit of exposure (m,), e.g. of `fit_expected_counts`.
        exposure: a number > 0, in the unit of exposure of `expected`. Single sets may have others, see `log_likelihood_sets`.
        support: (low (k,), high (k,)), outside of which no event can lie; None: no bounds (an NLE checks its own).
    Raises: SettingError, ShapeError.

    >>> import numpy as np, sbi_phys as sp
    >>> def log_density(x, theta):  # exponential decay times with rate theta
    ...     return np.log(theta[:, 0]) - theta[:, 0] * x[:, 0]
    >>> likelihood = sp.ExtendedLikelihood(log_density, lambda theta: 75 * theta[:, 0])
    >>> likelihood.log_likelihood([[0.4], [1.2]], [[1.0], [2.0]]).shape
    (2,)
    >>> likelihood.log_likelihood(np.empty((0, 1)), [[1.0]])  # no events: -nu
    array([-75.])
    """

    def __init__(
        self,
        log_density: Any,
        expected: Callable[[Array], Array],
        exposure: float = 1.0,
        *,
        support: tuple[ArrayLike, ArrayLike] | None = None,
    ) -> None:
        if not callable(log_density) and not hasattr(log_density, "log_likelihood") and not hasattr(log_density, "log_ratio"):
            raise SettingError(f"log_density is a {type(log_density).__name__}; expected an NLE, an NRE, or a function (x, theta) -> (n,)")
        if not callable(expected):
            raise SettingError(f"expected is a {type(expected).__name__}; expected a function theta (m, d) -> (m,)")
        self.log_density, self.expected = log_density, expected
        self.exposure = require_number("exposure", exposure, low=0, open_low=True)
        self.support = (
            None if support is None else tuple(as_array(f"support[{i}]", s, (None,), finite=False) for i, s in enumerate(support))
        )

    def expected_counts(self, theta: ArrayLike, exposure: ArrayLike | None = None) -> Array:
        """nu(theta) (m,), events, of theta (m, d).   Raises: ShapeError, NonFiniteError, DataError (nu negative)."""
        array = _thetas(theta)
        share = self.exposure if exposure is None else as_real("exposure", exposure)
        nu = as_array("expected(theta)", self.expected(array), (len(array),)) * share
        if (nu < 0).any():
            i = int(np.argmax(nu < 0))
            raise DataError(f"expected(theta) is {nu[i]:g} at theta = {array[i].tolist()}; expected a number >= 0")
        return nu

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Log L (m,) of one data set x of events (n, k), n >= 0, at theta (m, d); -nu(theta) for an empty one.

        Raises: ShapeError, NonFiniteError (naming the event), SupportError (theta outside the prior of an NLE or NRE), DataError (events
        outside the support, naming the first).
        """
        array, points = _events(x), _thetas(theta)
        nu = self.expected_counts(points)
        n = len(array)
        out = xlogy(float(n), nu) - nu
        if n:
            self._require_support(array, np.zeros(n, dtype=np.int64), None)
            out = out + self._set_sum(array, points)
        return out

    def log_likelihood_sets(self, event_sets: Any, theta: ArrayLike, *, exposure: ArrayLike | None = None) -> Array:
        """Log L (S,) of S data sets of any sizes, each at its own theta (S, d), or all at one theta (d,): one batch.

        Args: event_sets, a list of (n_i, k) arrays, (flat (n, k), offsets (S + 1,)), or EventSets. exposure (S,), or one number.
        Raises: as `log_likelihood`.
        """
        sets, points = EventSets.of(event_sets), _thetas(theta)
        n_sets = len(sets.sizes)
        if len(points) not in (1, n_sets):
            raise ShapeError(f"theta has {len(points)} rows for {n_sets} event sets; expected one, or as many")
        if exposure is not None:
            given = np.broadcast_to(as_real("exposure", exposure), (n_sets,))
            if not (np.isfinite(given).all() and (given > 0).all()):
                raise SettingError("exposure has values that are not > 0; expected one number, or one for each set")
            exposure = given
        points = np.broadcast_to(points, (n_sets, points.shape[1]))
        nu = self.expected_counts(points, exposure)
        out = xlogy(sets.sizes.astype(np.float64), nu) - nu
        if len(sets.flat):
            self._require_support(sets.flat, sets.owner, sets.offsets)
            rows = self._rows(sets.flat, points, sets.owner)
            _require_density(rows, sets.flat, sets.owner, sets.offsets)
            out = out + np.bincount(sets.owner, weights=rows, minlength=n_sets)
        return out

    def posterior(
        self,
        x: ArrayLike,
        n: int,
        *,
        prior: Prior,
        seed: int = 0,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> PosteriorDraws:
        """Draw theta (n, d) from L(theta) p(theta) for one data set x (n_events, k), with the sampler's diagnostics.

        Args: method, proposal: as of `sample_posterior`.   Raises: as there and `log_likelihood`.
        """
        array = _events(x)
        return sample_posterior(
            lambda theta: self.log_likelihood(array, theta), prior, n, seed=seed, method=method, proposal=proposal, progress=progress
        )

    def sample(
        self,
        x: ArrayLike,
        n: int,
        *,
        prior: Prior,
        seed: int = 0,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Posterior draws theta (n, d) alone; arguments and errors as `posterior`."""
        return self.posterior(x, n, prior=prior, seed=seed, method=method, proposal=proposal, progress=progress).theta

    def _set_sum(self, events: Array, theta: Array) -> Array:
        """Sum over events of log p, (m,)."""
        learned = getattr(self.log_density, "log_likelihood", None) or getattr(self.log_density, "log_ratio", None)
        if learned is not None:
            return as_array("log_density", learned(events, theta, event_set=True), (len(theta),), finite=False)
        total = np.zeros(len(theta))
        group = max(1, _PAIRS // len(events))
        size = max(1, _PAIRS // group)
        for first in range(0, len(theta), group):
            part = theta[first : first + group]
            for start in range(0, len(events), size):
                x = events[start : start + size]
                rows = self._call(np.tile(x, (len(part), 1)), np.repeat(part, len(x), axis=0)).reshape(len(part), -1)
                for row in rows:
                    _require_density(row, x, None, None, start)
                total[first : first + group] += rows.sum(axis=1)
        return total

    def _rows(self, x: Array, theta: Array, owner: Integers) -> Array:
        """Log p of each event at the theta of its set (n,)."""
        by_owner = getattr(self.log_density, "log_density_rows", None)
        if by_owner is not None:
            return as_array("log_density", by_owner(x, theta, owner), (len(x),), finite=False)
        parts = [slice(i, i + _PAIRS) for i in range(0, len(x), _PAIRS)]
        return np.concatenate([self._call(x[rows], theta[owner[rows]]) for rows in parts])

    def _call(self, x: Array, theta: Array) -> Array:
        function = getattr(self.log_density, "log_likelihood", None) or getattr(self.log_density, "log_ratio", None) or self.log_density
        return as_array("log_density(x, theta)", function(x, theta), (len(x),), finite=False)

    def _require_support(self, x: Array, owner: Integers, offsets: Integers | None) -> None:
        if self.support is None:
            return
        low, high = self.support
        if low.shape != (x.shape[1],) or high.shape != low.shape:
            raise ShapeError(f"events have {x.shape[1]} columns and the support {low.shape}; expected as many bounds")
        bad = ((x < low) | (x > high)).any(axis=1)
        if bad.any():
            i = int(np.argmax(bad))
            name, expected = _name(i, x, owner, offsets), f"within {low.tolist()} and {high.tolist()}"
            raise DataError(f"{int(bad.sum())} of {len(x)} events lie outside the support, the first is {name}; expected {expected}")


def _thetas(theta: ArrayLike) -> Array:
    array = as_real("theta", theta)
    return as_array("theta", array[None] if array.ndim == 1 else array, (None, None))


def _events(events: ArrayLike) -> Array:
    array = as_real("events", events)
    if array.size == 0:
        return array.reshape(0, array.shape[1] if array.ndim == 2 and array.shape[1] else 1)
    return as_array("events", array[:, None] if array.ndim == 1 else array, (None, None))


def _name(i: int, x: Array, owner: Integers | None, offsets: Integers | None, first: int = 0) -> str:
    """Name of event i for an error message."""
    if owner is None or offsets is None:
        return f"event {first + i} = {x[i].tolist()}"
    return f"event {i - int(offsets[owner[i]])} of set {int(owner[i])} = {x[i].tolist()}"


def _require_density(values: Array, x: Array, owner: Integers | None, offsets: Integers | None, first: int = 0) -> None:
    bad = np.isnan(values) | np.isposinf(values)
    if bad.any():
        i = int(np.argmax(bad))
        raise NonFiniteError(f"log_density is {values[i]} for {_name(i, x, owner, offsets, first)}; expected a finite number or -inf")


class ExpectedCounts:
    """Learned nu(theta) = E[n | theta] per unit of exposure; call it with theta (m, d) -> (m,).

    Made by `fit_expected_counts`. deviance: of held-out simulations, per simulation; 1 where the numbers are Poisson (and not few) and
    nu is correct.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.BoxPrior([sp.Parameter("flux", low=1.0, high=3.0)]), np.random.default_rng(0)
    >>> theta = prior.sample(200, rng)
    >>> fitted = sp.estimators.fit_expected_counts(theta, rng.poisson(10 * theta[:, 0]), prior, config=sp.TrainConfig(max_epochs=2))
    >>> fitted([[2.0]]).shape
    (1,)
    """

    def __init__(self, prior: Prior, net: nn.Module, log_mean: float, deviance: float) -> None:
        self.prior, self.net, self.log_mean, self.deviance = prior, net, log_mean, deviance

    def __call__(self, theta: ArrayLike) -> Array:
        """Expected events per unit of exposure (m,) at theta (m, d).   Raises: ShapeError, NonFiniteError, SupportError."""
        u = self.prior.to_network(as_matrix("theta", theta, self.prior.dim, self.prior.names))
        with torch.no_grad():
            log_nu = _log_nu(self.net, torch.from_numpy(u.astype(np.float32)))
        return np.asarray(np.exp(log_nu.double().numpy() + self.log_mean))


def fit_expected_counts(
    theta: ArrayLike,
    n_observed: ArrayLike,
    prior: Prior,
    *,
    exposure: ArrayLike | None = None,
    seed: int = 0,
    config: TrainConfig | None = None,
    progress: Progress | None = None,
) -> ExpectedCounts:
    """Learn nu(theta) from simulated numbers of events by Poisson regression.

    Args: theta (n, d) in the prior's support. n_observed (n,), events of each simulation. exposure (n,) or one number, default 1.
    Raises: ShapeError, NonFiniteError, SupportError, DataError (negative numbers, fewer than 20 rows), TrainingError.
    Read: deviance far above 1 = nu is not resolved, or the numbers are not Poisson.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.BoxPrior([sp.Parameter("flux", low=1.0, high=3.0)]), np.random.default_rng(0)
    >>> theta = prior.sample(200, rng)
    >>> fitted = sp.estimators.fit_expected_counts(theta, rng.poisson(10 * theta[:, 0]), prior, config=sp.TrainConfig(max_epochs=2))
    >>> bool((fitted(theta) > 0).all())
    True
    """
    u = prior.to_unbounded(as_matrix("theta", theta, prior.dim, prior.names))
    n = as_array("n_observed", n_observed, (len(u),))
    share = np.broadcast_to(1.0 if exposure is None else as_real("exposure", exposure), n.shape)
    if (n < 0).any() or n.sum() <= 0 or not (share > 0).all() or len(u) < 20:
        raise DataError(
            f"{len(u)} simulations with {n.sum():g} events, the least {n.min() if n.size else 0:g}; expected at least 20, with numbers >= 0"
            " that are not all zero, and exposures > 0"
        )
    log_mean = float(np.log(n.sum() / share.sum()))
    rows = [torch.from_numpy(a.astype(np.float32)) for a in (u, n, np.log(share) + log_mean)]
    config = config or TrainConfig()
    with torch_seeded(seed_for(require_int("seed", seed, low=0), "weights")):
        net = ResidualMLP(u.shape[1], EmbeddingConfig(hidden=64, n_blocks=2, n_features=1))
    for weight in (net.last.weight, net.last.bias, net.straight.weight):
        nn.init.zeros_(weight)  # the fit starts at the mean
    train, valid = split_rows(len(u), config.validation_fraction, seed)
    shown, held = ([t[torch.from_numpy(index)] for t in rows] for index in (train, valid))
    with or_none(progress).task("expected counts", config.for_rows(len(train))[1]) as task:
        for record in fit(_half_deviance, net, shown, held, config, seed=seed_for(seed, "fit")):
            task.advance(1, text=f"loss {record.train:.3f} validation {record.valid:.3f}")
    with torch.no_grad():
        deviance = 2 * float(_half_deviance(net, *held).double().mean())
    return ExpectedCounts(prior, net, log_mean, deviance)


def _log_nu(net: nn.Module, u: Tensor) -> Tensor:
    """Log nu minus the logarithm of its mean (n,)."""
    return torch.as_tensor(net(u)).squeeze(-1).clamp(-_MAX_LOG, _MAX_LOG)


def _half_deviance(net: nn.Module, u: Tensor, n: Tensor, offset: Tensor) -> Tensor:
    """nu - n + n log(n / nu), one value per row: zero where nu = n."""
    log_nu = _log_nu(net, u) + offset
    return log_nu.exp() - n + torch.xlogy(n, n) - n * log_nu
