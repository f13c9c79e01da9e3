r"""Neural likelihood estimation.

For pairs (theta, x) from any distribution of theta the expected loss

    E[-log q(x | theta)] = E_theta KL(p(x | theta) || q(x | theta)) + E_theta H[p(x | theta)]

is least where q is the likelihood. A likelihood, unlike a posterior, multiplies: independent events of one data set are

    log L(theta) = sum_e log q(x_e | theta),

any number of them, and the prior can be another one than the simulations had. It also emulates the simulator: `sample_x`, `as_simulator`.

The flow is that of NPE with the roles changed: conditional on u = prior.to_unbounded(theta), a density over x, mapped with its exact
Jacobian, whole numbers dequantised (`likelihood_net`). Posteriors come from a sampler (`from_density`), which says whether it converged.

Source: Papamakarios, Sterratt & Murray 2019, arXiv:1805.07226; Theis, van den Oord & Bethge 2016, arXiv:1511.01844 (dequantisation).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import as_matrix, require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, NonFiniteError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.estimators.density_sampling import Gradient, PosteriorDraws, sample_posterior
from sbi_phys.estimators.emulator import Emulator
from sbi_phys.estimators.fitting import History, fit_ensemble, require_prior, stores_or_data, train_member
from sbi_phys.estimators.model_file import FILE, shared_content, shared_settings, with_weights
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.likelihood import DequantisedLoss, XColumns, log_density_rows, noise_points, value_and_gradient
from sbi_phys.nets.posterior import PosteriorNet, sample_net
from sbi_phys.priors import Observable, Prior
from sbi_phys.samplers.importance import Proposal
from sbi_phys.store.store import Store
from sbi_phys.training.batches import MemoryBatches
from sbi_phys.training.checkpoint import write_file
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.ranks import current_ranks
from sbi_phys.training.scaling import prepare_simulations, split_rows
from sbi_phys.training.sources import MIN_SIMULATIONS

__all__ = ["NLE"]

_SET_ROWS = 1 << 20  # (event, theta) pairs at a time
_MANY = 4  # columns of counts that a Gaussian is enough for


class NLE:
    """Learned likelihood q(x | theta) of one event x (k,).

    Args:
        prior: over theta; its whitening map makes the network's input.
        seed: of weights, split, order, noise and draws.
        flow: 'spline', 'affine', 'maf' (3 layers of width 32) or a FlowConfig, over x. 'auto' takes FlowConfig(n_layers=0), a full
            conditional Gaussian alone, for four or more columns that all are counts (Anscombe's root makes them nearly normal, and
            couplings that mix so many columns cost more than they find), 'spline' for others.
        embedding: of theta: None (residual perceptron), an EmbeddingConfig, or any nn.Module (n, d') -> (n, k).
        n_ensemble: networks, trained with different seeds and splits; the density is their equal mixture.
        device: 'auto' takes CUDA where there is one.
        x_transform: 'auto', 'counts' (Anscombe's root), 'log' or 'real'; 'auto' asks `observables`, else looks at the values.
        dequantise: add uniform noise to whole numbers: 'auto' in columns of counts; True everywhere; False nowhere.
        n_noise: noise points that a probability of whole numbers is averaged over.
        observables: the simulator's blocks of columns, if any.
        simulator: identity of the simulator, kept in the model file; taken from the store when fitted from one.
        config: of the training loop.
    Raises: SettingError.   Source: arXiv:1805.07226.
    """

    def __init__(
        self,
        prior: Prior,
        seed: int = 0,
        *,
        flow: str | FlowConfig = "auto",
        embedding: EmbeddingConfig | nn.Module | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        x_transform: str = "auto",
        dequantise: str | bool = "auto",
        n_noise: int = 8,
        observables: Sequence[Observable] | None = None,
        simulator: dict[str, Any] | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        self.prior = require_prior(prior)
        self.seed = require_int("seed", seed, low=0)
        self._choose_flow = isinstance(flow, str) and flow == "auto"
        kind = "spline" if self._choose_flow else flow
        self.flow = FlowConfig(kind=kind, n_layers=3, hidden=32) if isinstance(kind, str) else kind
        self.embedding = EmbeddingConfig() if embedding is None else embedding
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.x_transform, self.dequantise = x_transform, dequantise
        self.n_noise = require_int("n_noise", n_noise, low=1)
        self.observables = tuple(observables) if observables is not None else None
        self.simulator = simulator
        self.config = config or TrainConfig()
        self.history: list[History] = []
        self._columns: XColumns | None = None
        self._nets: list[PosteriorNet] = []

    def fit(
        self,
        theta: ArrayLike | Tensor | Store | str | Path | Sequence[Store | str | Path],
        x: ArrayLike | Tensor | None = None,
        *,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on simulated events.

        Args: theta (n, d) in the prior's support and x (n, k), one event a row; or a store (or its path, or several) in place of both.
        checkpoint: path prefix; an interrupted training goes on from there, with the same weights in the end.
        Raises: ShapeError, NonFiniteError, SupportError, DataError (too few; columns that are not what they are declared as),
        TrainingError, StoreError, SettingError.
        """
        u, data = self._arrays(theta, x)
        train, _ = split_rows(len(u), self.config.validation_fraction, seed_for(self.seed, "member", 0))
        columns = XColumns.fit(data, self.x_transform, self.dequantise, self.observables, data[train])
        if self._choose_flow:
            self.flow = FlowConfig(n_layers=0 if columns.all_counts and columns.dim >= _MANY else 3, hidden=32)
        rows = (torch.from_numpy(u.astype(np.float32)), columns.stored(data))
        nets, history = fit_ensemble(self.n_ensemble, lambda k: self._fit_member(k, rows, columns, checkpoint, or_none(progress)))
        self._columns, self._nets, self.history = columns, nets, history
        return self

    def _arrays(self, theta: Any, x: Any) -> tuple[Array, Array]:
        stores = stores_or_data(self, theta, x)
        if stores is not None:
            parts = [store.read() for store in stores]
            theta, x = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        u, data = prepare_simulations(self.prior, theta, x)
        if data.ndim != 2:
            raise ShapeError(f"x has shape {data.shape}; expected (n, k), one event a row")
        if len(u) < MIN_SIMULATIONS:
            raise DataError(f"{len(u)} simulations; expected at least {MIN_SIMULATIONS}")
        return u, np.asarray(data, dtype=np.float64)

    def _fit_member(
        self, k: int, rows: tuple[Tensor, Tensor], columns: XColumns, checkpoint: str | Path | None, progress: Progress
    ) -> tuple[PosteriorNet, History]:
        seed = seed_for(self.seed, "member", k)
        parts = [torch.from_numpy(part) for part in split_rows(len(rows[0]), self.config.validation_fraction, seed)]
        train, valid = ([t[part].to(self.device) for t in rows] for part in parts)
        batches = MemoryBatches(train, valid, seed=seed, ranks=current_ranks())
        loss = DequantisedLoss(columns, self.device)
        net = self._new_net(k, columns)
        noise = torch.rand(train[1].shape, generator=torch_rng_for(seed, "start")).to(self.device)
        net.start_at(loss.with_noise(train[1], noise))
        member = k, self.n_ensemble
        return net, train_member(loss, net, batches, self.config, seed=self.seed, member=member, progress=progress, checkpoint=checkpoint)

    def _new_net(self, k: int, columns: XColumns) -> PosteriorNet:
        seed = seed_for(self.seed, "member", k)
        return PosteriorNet(columns.dim, (self.prior.free_dim,), self.flow, self.embedding, seed=seed).to(self.device)

    def _require_fit(self) -> XColumns:
        if self._columns is None:
            raise SettingError("this NLE is not trained; expected .fit(theta, x) or sp.load(path) first")
        return self._columns

    def _u(self, theta: ArrayLike | Tensor) -> Tensor:
        """Network inputs (m, d') of theta (m, d).   Raises: ShapeError, NonFiniteError, SupportError."""
        u = self.prior.to_network(as_matrix("theta", theta, self.prior.dim, self.prior.names))
        return torch.from_numpy(u.astype(np.float32)).to(self.device)

    def _noise(self, columns: XColumns) -> Array:
        return noise_points(columns, self.n_noise, self.seed)

    def log_likelihood(self, x: ArrayLike | Tensor, theta: ArrayLike | Tensor, *, event_set: bool = False) -> Array:
        """Log q(x | theta) -> (m,) for theta (m, d).

        Args: x (k,), one event for all theta; or (m, k), row by row, all at one theta if there is one; or, with event_set,
        (n_events, k), one data set of independent events, any number of them (in chunks): the sum of their logs, in double precision.
        Probabilities where x are counts, densities per unit of x elsewhere.
        Raises: ShapeError, NonFiniteError, SupportError (theta outside the prior), DataError (no events; x outside the support).
        """
        columns, inputs = self._require_fit(), self._u(theta)
        array, _ = columns.check("x", x, rows=event_set)
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
        columns, inputs = self._require_fit(), self._u(theta)
        array, _ = columns.check("x", x, rows=True)
        if owner.shape != (len(array),) or owner.min() < 0 or owner.max() >= len(inputs):
            raise ShapeError(f"owner has shape {owner.shape}; expected ({len(array)},) with values in 0 .. {len(inputs) - 1}")
        return self._rows(array, inputs, owner)

    def _rows(self, x: Array, u: Tensor, owner: Integers) -> Array:
        columns = self._require_fit()
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
        columns, inputs = self._require_fit(), self._u(theta)
        array, _ = columns.check("x", x, rows=event_set)
        if len(array) != 1 and not event_set:
            raise ShapeError(f"x has {len(array)} rows; expected one event, or event_set=True")
        return value_and_gradient(self._nets, columns, self._noise(columns), array, inputs)

    def _gradient(self, array: Array) -> Gradient:
        columns = self._require_fit()

        def gradient(u: Array) -> tuple[Array, Array]:
            inputs = torch.from_numpy(u.astype(np.float32)).to(self.device)
            return value_and_gradient(self._nets, columns, self._noise(columns), array, inputs)

        return gradient

    def posterior(
        self,
        x_obs: ArrayLike | Tensor,
        n: int,
        seed: int = 0,
        *,
        event_set: bool = False,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> PosteriorDraws:
        """Draw theta (n, d) from q(x_obs | theta) p(theta), with the sampler's verdict; see `sample_posterior` for methods.

        Args: x_obs (k,), one event; or, with event_set, (n_events, k), one data set. proposal: over u, e.g. `NPE.proposal(x_obs)`.
        Raises: as `log_likelihood`, and ConvergenceError.
        """
        columns = self._require_fit()
        array, _ = columns.check("x_obs", x_obs, rows=event_set)
        if len(array) != 1 and not event_set:
            raise ShapeError(f"x_obs has {len(array)} rows; expected one event ({columns.n_columns},), or event_set=True")
        return sample_posterior(
            lambda theta: self.log_likelihood(array, theta, event_set=True),
            self.prior,
            n,
            seed=seed,
            method=method,
            proposal=proposal,
            gradient=self._gradient(array),
            progress=progress,
        )

    def sample(
        self,
        x_obs: ArrayLike | Tensor,
        n: int,
        seed: int = 0,
        *,
        event_set: bool = False,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Posterior draws theta (n, d) alone; arguments and errors as `posterior`."""
        return self.posterior(x_obs, n, seed, event_set=event_set, method=method, proposal=proposal, progress=progress).theta

    def sample_x(self, theta: ArrayLike | Tensor, n: int, seed: int = 0) -> Array:
        """Emulate the simulator: x (m, n, k), n events at each theta (m, d); whole numbers where x are counts.

        Raises: ShapeError, NonFiniteError, SupportError, SettingError.
        """
        columns, inputs = self._require_fit(), self._u(theta)
        n = require_int("n", n, low=1)
        counts = rng_for(seed, "members").multinomial(n, np.full(len(self._nets), 1 / len(self._nets)))
        parts = [
            sample_net(net, inputs, int(c), torch_rng_for(seed, "draws", k, device=self.device))
            for k, (net, c) in enumerate(zip(self._nets, counts, strict=True))
            if c
        ]
        z = torch.cat(parts, dim=1).double().numpy()
        if len(parts) > 1:
            z = z[:, rng_for(seed, "mix").permutation(n)]
        return columns.from_z(z.reshape(-1, columns.dim)).reshape(len(inputs), n, columns.n_columns)

    def as_simulator(self) -> Emulator:
        """q(x | theta) as a Simulator: `NPE(prior).fit(simulator=nle.as_simulator(), online=True, n=...)` trains on its pairs.

        Read: where few simulations are all there is and p(x | theta) is simple, the posterior learned so is closer than from the
        simulations themselves; it can be no better than this likelihood.   Raises: SettingError.
        """
        columns = self._require_fit()
        return Emulator(self._nets, columns, self.prior, self.observables, self.simulator, self.device)

    def save(self, path: str | Path) -> None:
        """Write the model: weights, map of x, prior, settings and history; no code is stored.   Raises: ModelFileError."""
        content = shared_content(self) | {
            "flow": asdict(self.flow),
            "dequantise": self.dequantise,
            "n_noise": self.n_noise,
            "columns": self._require_fit().to_dict(),
        }
        write_file(path, *FILE, content)

    @classmethod
    def _from_content(cls, path: Path, content: dict[str, Any], embedding: nn.Module | None, device: str | torch.device) -> "NLE":
        own = {"flow": FlowConfig(**content["flow"]), "dequantise": content["dequantise"], "n_noise": content["n_noise"]}
        nle = cls(**shared_settings(path, content, embedding), **own, device=device)
        nle._columns = XColumns.from_dict(content["columns"])
        nle.history = content["history"]
        nle._nets = with_weights([nle._new_net(k, nle._columns) for k in range(nle.n_ensemble)], content)
        return nle
