r"""Neural likelihood estimation.

For pairs (theta, x) from any distribution of theta the expected loss

    E[-log q(x | theta)] = E_theta KL(p(x | theta) || q(x | theta)) + E_theta H[p(x | theta)]

is smallest where q is the likelihood. Likelihoods of independent events multiply, so for one data set

    log L(theta) = sum_e log q(x_e | theta),

for any number of events, and the prior may differ from that of the simulations. The flow is that of NPE with the roles changed:
conditional on u = prior.to_unbounded(theta), a density over x, mapped with its exact Jacobian, whole numbers dequantised
(`nets.likelihood`). Posteriors come from a sampler (`density_sampling`), which says whether it has converged.

A trained likelihood also emulates the simulator (`sample_x`, `as_simulator`). Where simulations are expensive and p(x | theta) is simpler
than p(theta | x), a posterior network r can be trained on any number of emulated pairs,

    theta ~ p(theta),   x ~ q(x | theta),   min over r of E[-log r(theta | x)],

which tends to the posterior of q. By the chain rule of the divergence of the pairs

    E_x KL(p(theta | x) || q(theta | x)) = E_theta KL(p(x | theta) || q(x | theta)) - KL(p(x) || q(x)):

its error is at most that of the likelihood, to which the error of r is added.

Source: Papamakarios, Sterratt & Murray 2019, arXiv:1805.07226; Theis, van den Oord & Bethge 2016, arXiv:1511.01844 (dequantisation);
Papamakarios & Murray 2016, arXiv:1605.06376 (r).
"""

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Unpack, cast

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import as_matrix, require_int
from sbi_phys.core.errors import NonFiniteError, SettingError, ShapeError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import torch_rng_for
from sbi_phys.core.types import AnyArray, Array, ArrayLike, Integers
from sbi_phys.estimators.base import Estimator, Shared
from sbi_phys.estimators.density_sampling import Gradient, PosteriorDraws, sample_posterior
from sbi_phys.estimators.other_priors import require_within
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.flow_own import require_flow
from sbi_phys.nets.likelihood import DequantisedLoss, XColumns, log_density_rows, noise_points, value_and_gradient
from sbi_phys.nets.posterior import PosteriorNet, sample_net
from sbi_phys.priors import Observable, Parameter, Prior, to_rows
from sbi_phys.samplers.importance import Proposal
from sbi_phys.training.loop import Loss
from sbi_phys.training.reach import warn_far

__all__ = ["NLE", "Emulator"]

_SET_ROWS = 1 << 20  # (event, theta) pairs at a time
_MANY = 4  # columns of counts for which a Gaussian is enough
_COUNTS = 1  # of XColumns.kind


class NLE(Estimator):
    """Learned likelihood q(x | theta) of one event x (k,).

    Args:
        prior: over theta; its whitening map makes the network's input.
        flow: 'spline', 'affine', 'maf' (3 layers of width 32) or a FlowConfig, over x. 'auto' takes FlowConfig(n_layers=0), a full
            conditional Gaussian alone, for four or more columns that all are counts (Anscombe's root makes them nearly normal, and
            couplings of so many columns cost more than they gain), 'spline' for others. Or your own, as of `NPE`.
        embedding: of theta: None (residual perceptron), an EmbeddingConfig, or any nn.Module (n, d') -> (n, k).
        n_ensemble: networks, trained with different seeds and splits; the density is their equal mixture.
        x_transform: 'auto', 'counts' (Anscombe's root), 'log' or 'real'; 'auto' asks `observables`, else looks at the values.
        dequantise: add uniform noise to whole numbers: 'auto' in columns of counts; True everywhere; False nowhere.
        n_noise: noise points over which a probability of whole numbers is averaged.
        Others as `BaseEstimator`. Of stores that are streamed, the kinds of columns and their scaling are learned from the first rows.
    Raises: SettingError.   Source: arXiv:1805.07226.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.BoxPrior([sp.Parameter("rate", low=0.5, high=2.0)]), np.random.default_rng(0)
    >>> theta = prior.sample(300, rng)
    >>> nle = sp.NLE(prior, config=sp.TrainConfig(max_epochs=2)).fit(theta, rng.exponential(1 / theta))
    >>> nle.log_likelihood(rng.exponential(1.0, (20, 1)), theta[:3], event_set=True).shape  # 20 events, three theta
    (3,)
    """

    scaler_class = XColumns
    takes = "any theta"
    _nets: list[PosteriorNet]

    def __init__(
        self,
        prior: Prior,
        *,
        flow: str | FlowConfig | nn.Module = "auto",
        dequantise: str | bool = "auto",
        n_noise: int = 8,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(prior, **shared)
        self._choose_flow = isinstance(flow, str) and flow == "auto"
        kind = "spline" if self._choose_flow else flow
        self.flow = FlowConfig.of(kind, n_layers=3, hidden=32)
        require_flow(self.flow)
        if self.standardise != "column":
            raise SettingError(f"standardise is {self.standardise!r}; expected 'column': no network of an NLE has x as input")
        self.dequantise = dequantise
        self.n_noise = require_int("n_noise", n_noise, low=1)

    def build(self, scaler: XColumns, seed: int) -> PosteriorNet:
        """Embedding of theta and flow over x."""
        return PosteriorNet(scaler.dim, (self.prior.free_dim,), self.flow, self.embedding, seed=seed)

    def start(self, net: PosteriorNet, rows: Sequence[Tensor], seed: int) -> None:
        """Begin at the Gaussian of the training data."""
        noise = torch.rand(rows[1].shape, generator=torch_rng_for(seed, "start")).to(self.device)
        net.start_at(self._with_noise(rows[1], noise))

    def _loss(self, scaler: XColumns) -> Loss:
        loss = DequantisedLoss(scaler, self.device)
        self._with_noise = loss.with_noise
        return loss

    def _scaling(self) -> Callable[[AnyArray, Integers | slice], XColumns]:
        def columns(x: AnyArray, train: Integers | slice) -> XColumns:
            gaps = [o.name for o in self.observables or () if o.missing]
            if gaps:
                raise SettingError(
                    f"values of {', '.join(gaps)} may be missing, and a density of x has no such values; expected NPE or NRE, or "
                    "observables without missing=True"
                )
            if x.ndim != 2:
                raise ShapeError(f"x has shape {x.shape}; expected (n, k), one event a row")
            data = np.asarray(x, dtype=np.float64)
            found = XColumns.fit(data, self.x_transform, self.dequantise, self.observables, data[train])
            if self._choose_flow:
                self.flow = FlowConfig(n_layers=0 if found.all_counts and found.dim >= _MANY else 3, hidden=32)
            return found

        return columns

    def _columns(self) -> XColumns:
        return cast(XColumns, self._require_fit())

    def _checked(self, x: ArrayLike | Tensor, *, rows: bool = False) -> tuple[Array, bool]:
        """Events x as rows (n, k), from any form that `priors.to_rows` takes, and whether it is a single one."""
        known = self.observables
        if known is not None and (isinstance(x, Mapping) or (len(known) == 1 and np.shape(x)[-len(known[0].shape) :] == known[0].shape)):
            found, single = to_rows(x, known)
            x = found[0] if single else found
        return self._columns().check("x", x, rows=rows)

    def _noise(self, columns: XColumns) -> Array:
        return noise_points(columns, self.n_noise, self.seed)

    def log_likelihood(self, x: ArrayLike | Tensor, theta: ArrayLike | Tensor, *, event_set: bool = False) -> Array:
        """Log q(x | theta) -> (m,) for theta (m, d).

        Args: x (k,), one event for all theta; or (m, k), row by row, all at one theta if there is one; or, with event_set,
        (n_events, k), one data set of independent events, any number of them (in chunks): the sum of their logs, in double precision.
        Probabilities where x are counts, densities per unit of x elsewhere.
        Raises: ShapeError, NonFiniteError, SupportError (theta outside the prior), DataError (no events; x outside the support).
        """
        inputs = self._u(theta)
        array, _ = self._checked(x, rows=event_set)
        if len(inputs) == 1 and not event_set:
            inputs = inputs.expand(len(array), -1)
        m = len(inputs)
        if not event_set and len(array) not in (1, m):
            raise ShapeError(f"x has {len(array)} rows and theta has {m}; expected one x, as many as theta, or event_set=True")
        if not event_set or len(array) == 1:
            return self._rows(array, inputs, np.arange(m))
        total = np.zeros(m)
        group = max(1, _SET_ROWS // len(array))  # thetas at a time
        size = max(1, _SET_ROWS // group)  # events at a time
        for first in range(0, m, group):
            part = inputs[first : first + group]
            for start in range(0, len(array), size):
                events = array[start : start + size]
                owner = np.repeat(np.arange(len(part)), len(events))
                rows = self._rows(np.tile(events, (len(part), 1)), part, owner)
                total[first : first + group] += rows.reshape(len(part), -1).sum(axis=1)
        return total

    def log_density_rows(self, x: ArrayLike | Tensor, theta: ArrayLike | Tensor, owner: Integers) -> Array:
        """Log q(x_e | theta_owner(e)) (n,) of events x (n, k), theta (m, d), owner (n,) in 0 .. m - 1: each theta is embedded once.

        Raises: as `log_likelihood`.
        """
        inputs = self._u(theta)
        array, _ = self._checked(x, rows=True)
        if owner.shape != (len(array),) or owner.min() < 0 or owner.max() >= len(inputs):
            raise ShapeError(f"owner has shape {owner.shape}; expected ({len(array)},) with values in 0 .. {len(inputs) - 1}")
        return self._rows(array, inputs, owner)

    def _rows(self, x: Array, u: Tensor, owner: Integers) -> Array:
        columns = self._columns()
        out = log_density_rows(self._nets, columns, self._noise(columns), x, u, owner)
        bad = ~np.isfinite(out)
        if bad.any():
            i = int(np.argmax(bad))
            where = self.prior.from_unbounded(u[owner[i]].double().cpu().numpy()[None])[0].tolist()
            raise NonFiniteError(
                f"the learned log density is {out[i]} for x = {x[i].tolist()} at theta = {where}; expected a finite number"
            )
        return out

    def log_likelihood_and_grad(self, x: ArrayLike | Tensor, theta: ArrayLike | Tensor, *, event_set: bool = False) -> tuple[Array, Array]:
        """Log q(x | theta) (m,) and its gradient in u = prior.to_unbounded(theta) (m, d'), through the network.

        Args: x (k,), one event, or with event_set (n_events, k).   Raises: as `log_likelihood`.
        """
        columns, inputs = self._columns(), self._u(theta)
        array, _ = self._checked(x, rows=event_set)
        if len(array) != 1 and not event_set:
            raise ShapeError(f"x has {len(array)} rows; expected one event, or event_set=True")
        return value_and_gradient(self._nets, columns, self._noise(columns), array, inputs)

    def _gradient(self, array: Array) -> Gradient:
        columns = self._columns()

        def gradient(u: Array) -> tuple[Array, Array]:
            inputs = torch.from_numpy(u.astype(np.float32)).to(self.device)
            return value_and_gradient(self._nets, columns, self._noise(columns), array, inputs)

        return gradient

    def posterior(
        self,
        x: ArrayLike | Tensor,
        n: int,
        *,
        seed: int = 0,
        event_set: bool = False,
        prior: Prior | None = None,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> PosteriorDraws:
        """Draw theta (n, d) from q(x | theta) p(theta), with the sampler's diagnostics; see `sample_posterior` for methods.

        Args: x (k,), one event; or, with event_set, (n_events, k), one data set. prior: in place of that of the training, without mass
        outside it ('hmc' needs that of the training). proposal: over u, e.g. `NPE.proposal(x)`.
        Raises: as `log_likelihood`, ConvergenceError, SupportError (the other prior has mass where nothing was learned),
        SimulatorMismatchError.
        """
        columns = self._columns()
        array, _ = self._checked(x, rows=event_set)
        if len(array) != 1 and not event_set:
            raise ShapeError(f"x has {len(array)} rows; expected one event ({columns.n_columns},), or event_set=True")
        warn_far(self._reach, columns.apply(array))
        return sample_posterior(
            lambda theta: self.log_likelihood(array, theta, event_set=True),
            self.prior if prior is None else require_within(self.prior, prior),
            n,
            seed=seed,
            method=method,
            proposal=proposal,
            gradient=self._gradient(array) if prior is None else None,
            progress=progress,
        )

    def sample(
        self,
        x: ArrayLike | Tensor,
        n: int,
        *,
        seed: int = 0,
        event_set: bool = False,
        prior: Prior | None = None,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Posterior draws theta (n, d) alone; arguments and errors as `posterior`."""
        return self.posterior(x, n, seed=seed, event_set=event_set, prior=prior, method=method, proposal=proposal, progress=progress).theta

    def sample_x(self, theta: ArrayLike | Tensor, n: int, *, seed: int = 0) -> Array:
        """Emulate the simulator: x (m, n, k), n events at each theta (m, d); whole numbers where x are counts.

        Raises: ShapeError, NonFiniteError, SupportError, SettingError.
        """
        columns, inputs = self._columns(), self._u(theta)
        n = require_int("n", n, low=1)
        z = self._draw_members(inputs, n, seed)
        return columns.from_z(z.reshape(-1, columns.dim)).reshape(len(inputs), n, columns.n_columns)

    def as_simulator(self) -> "Emulator":
        """q(x | theta) as a Simulator: `NPE(prior).fit(simulator=nle.as_simulator(), online=True, n=...)` trains on its pairs.

        Read: with few simulations and a simple p(x | theta) such a posterior is closer than one learned from the simulations
        themselves; it can be no better than this likelihood.   Raises: SettingError.
        """
        columns = self._columns()
        return Emulator(self._nets, columns, self.prior, self.observables, self.identity, self.device)


class Emulator:
    """A trained `NLE` as a Simulator (see `protocol`): x (n, k) ~ q(x | theta); made by `NLE.as_simulator`.

    Args: nets: equal members, each row is drawn from one of them. columns: the map of x. prior: of the training.
    observables: blocks of x; None makes one block for each run of columns of one kind. simulator: identity of what is emulated.
    Attributes: settings: the emulated simulator's identity and a checksum of the weights; they name the emulator, they do not
    rebuild it. in_process: the network stays in its process, and online training draws its rows in a thread.

    >>> import numpy as np, sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(200, np.random.default_rng(0))
    >>> nle = sp.NLE(prior, config=sp.TrainConfig(max_epochs=1)).fit(theta, theta + np.random.default_rng(1).normal(size=(200, 1)))
    >>> nle.as_simulator().simulate(theta[:4], np.random.default_rng(2)).shape
    (4, 1)
    """

    in_process = True

    def __init__(
        self,
        nets: Sequence[PosteriorNet],
        columns: XColumns,
        prior: Prior,
        observables: Sequence[Observable] | None,
        simulator: dict[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.prior: Prior = prior
        self.parameters: tuple[Parameter, ...] = prior.parameters
        self.observables: tuple[Observable, ...] = tuple(observables) if observables is not None else _blocks(columns)
        self.settings: dict[str, Any] = {"emulates": simulator, "weights": _checksum(nets)}
        self._nets, self._columns, self._device = tuple(nets), columns, device

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw x (n, k) at theta (n, d), one each; whole numbers where x are counts.   Raises: ShapeError, NonFiniteError, SupportError."""
        u = self.prior.to_network(as_matrix("theta", theta, self.prior.dim, self.prior.names))
        inputs = torch.from_numpy(u.astype(np.float32)).to(self._device)
        generator = torch.Generator(device=self._device).manual_seed(int(rng.integers(2**63)))
        member = rng.integers(len(self._nets), size=len(u))
        z = np.empty((len(u), self._columns.dim))
        for k, net in enumerate(self._nets):
            rows = np.flatnonzero(member == k)
            if len(rows):
                z[rows] = sample_net(net, inputs[torch.from_numpy(rows).to(self._device)], 1, generator)[:, 0].double().numpy()
        return self._columns.from_z(z)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: torch in every worker would cost more than the draws."""
        raise SettingError(
            "an emulator is a network and stays in its process; expected workers=0 in online training, workers=1 in simulate"
        )


def _checksum(nets: Sequence[PosteriorNet]) -> int:
    """CRC-32 of all weights, in their order."""
    value = 0
    for net in nets:
        for tensor in net.state_dict().values():
            value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), value)
    return value


def _blocks(columns: XColumns) -> tuple[Observable, ...]:
    """Blocks of columns without names of their own: runs of counts, and of others."""
    counts = np.zeros(columns.n_columns, dtype=bool)
    counts[columns.kept] = columns.kind == _COUNTS
    for tied, _, _ in columns.ties:
        counts[list(tied)] = True
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(counts.tolist())]
    names = ["x"] if len(runs) == 1 else [f"x{i}" for i in range(len(runs))]
    return tuple(Observable(name, size, kind="counts" if kind else "real") for name, (kind, size) in zip(names, runs, strict=True))
