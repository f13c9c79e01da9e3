r"""Neural ratio estimation: log r(x | theta) = log p(x | theta) - log p(x), from a classifier of pairs.

Joint pairs (theta, x) ~ p(theta) p(x | theta) are told apart from marginal pairs ~ p(theta) p(x). The log odds of the best classifier
are log r, for every x and theta at once (losses and their sources: `ratio_losses`; the network: `nets.classifier`). Then

    p(theta | x) = p(theta) r(x | theta),      p(theta | {x_e}) proportional to p(theta) prod_e r(x_e | theta)

for one observation and for a set of independent events. r is a likelihood up to a factor that theta does not change, so that it serves
for likelihood ratios and confidence sets just as well; E_{x ~ p(x)}[r(x | theta)] = 1 for every theta is what it can be checked by
(`calibration.ratios`).

Where a posterior is much narrower than the prior, hardly a marginal pair falls near it, and those that do not teach nothing. Two remedies:

- The contrasts theta' of a row come from q(theta' | x), half the prior (other rows' theta) and half a Gaussian posterior, widened, that is
  learned beside. The classifier's log odds are then log p(theta | x) / q(theta | x), and f = log odds + log q(theta | x) / p(theta) is
  log r for any q: where the contrasts lie decides how well f is learned, not what is learned.
- f starts from a reference, the log ratio of Gaussians learned by maximum likelihood (`nets.classifier`); the classifier corrects it.

Source: Hermans, Begy & Louppe 2019, arXiv:1903.04057; Miller et al. 2022, arXiv:2210.06170; Delaunoy et al. 2022, arXiv:2208.13624.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import as_matrix, require_choice, require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.estimators.density_sampling import PosteriorDraws, sample_posterior
from sbi_phys.estimators.fitting import History, fit_ensemble, require_prior, rows_of, train_member
from sbi_phys.estimators.model_file import FILE, shared_content, shared_settings, with_weights
from sbi_phys.estimators.ratio_losses import LOSSES
from sbi_phys.estimators.ratio_mean import Gaussians, PriorMean, joined, mean_over_prior
from sbi_phys.nets.classifier import NEAR, REFERENCES, ClassifierConfig, PairClassifier, Parts
from sbi_phys.nets.embedding_set import take_scaling
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.priors import Observable, Prior
from sbi_phys.samplers.importance import Proposal
from sbi_phys.store.store import Store
from sbi_phys.training.checkpoint import write_file
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.scaling import XScaler
from sbi_phys.training.sources import Rows, Settings

__all__ = ["NRE"]


_PAIRS = {"cpu": 8192, "cuda": 262144}  # pairs at a time: bounded memory, and on a CPU what is at work stays in the cache
_X_ROWS = 8192
_CONTRASTS = 8
_COLUMNS = 64  # most columns whose Gaussian with full covariance is the default reference


class NRE:
    """Amortised likelihood-to-evidence ratio r(x | theta).

    Args:
        prior: over theta; the network sees theta in its whitening map.
        seed: of weights, split, order and draws.
        loss: 'carl' (the same as 'nre-a'), 'nre-c' or 'bnre', see `ratio_losses`.
        network: of the part that sees pairs; None takes a trunk of width 64 and 32 products.
        reference: 'posterior', 'likelihood' (see `nets.classifier`) or 'auto': the latter for up to 64 columns of numbers, the former where
            there are more, or an embedding of one's own.
        embedding: of x: None (residual perceptron), an EmbeddingConfig, or any nn.Module (n, *x_shape) -> (n, k).
        n_ensemble: networks, trained with different seeds and splits; log r is the mean of theirs, so that their factors of x alone, which
            differ by nats, do not choose one network for each x.
        device: 'auto' takes CUDA where there is one.
        x_transform: 'auto', 'counts' (Anscombe's root) or 'real'; 'auto' asks `observables`, else looks at the values.
        observables: the simulator's blocks of columns, if any.
        simulator: identity of the simulator, kept in the model file; taken from the store when fitted from one.
        config: of the training loop. contrast: other theta per joint pair; None takes 8.
    Raises: SettingError.
    """

    def __init__(
        self,
        prior: Prior,
        seed: int = 0,
        *,
        loss: str = "carl",
        network: ClassifierConfig | None = None,
        reference: str = "auto",
        embedding: EmbeddingConfig | nn.Module | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        x_transform: str = "auto",
        observables: Sequence[Observable] | None = None,
        simulator: dict[str, Any] | None = None,
        config: TrainConfig | None = None,
        contrast: int | None = None,
    ) -> None:
        if network is not None and not isinstance(network, ClassifierConfig):
            raise SettingError(f"network is a {type(network).__name__}; expected None or ClassifierConfig(...)")
        self.prior = require_prior(prior)
        self.seed = require_int("seed", seed, low=0)
        self.loss = require_choice("loss", loss, LOSSES)
        self.network = network or ClassifierConfig()
        self.reference = require_choice("reference", reference, ("auto", *REFERENCES))
        self.embedding = EmbeddingConfig() if embedding is None else embedding
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.x_transform = x_transform
        self.observables = tuple(observables) if observables is not None else None
        self.simulator = simulator
        self.config = config or TrainConfig()
        self.contrast = _CONTRASTS if contrast is None else require_int("contrast", contrast, low=1)
        self.history: list[History] = []
        self._scaler: XScaler | None = None
        self._nets: list[PairClassifier] = []

    def fit(
        self,
        theta: ArrayLike | Tensor | Store | str | Path | Sequence[Store | str | Path],
        x: ArrayLike | Tensor | None = None,
        *,
        memory: int | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on simulations: theta (n, d) in the prior's support and x (n, ...), or a store, its path, or several.

        Args: memory: bytes that the rows of stores may take: more are streamed from disk; default half of the machine's memory.
        checkpoint: path prefix; an interrupted training goes on from there.
        The theta must be draws of the prior: the ratio is to the mean of p(x | theta) over the theta that are given.
        Raises: ShapeError, NonFiniteError, SupportError, DataError (empty, too few), TrainingError, StoreError, SettingError.
        """
        progress = or_none(progress)
        with self._rows(theta, x, memory, progress) as rows:
            nets, history = fit_ensemble(self.n_ensemble, lambda k: self._fit_member(k, rows, checkpoint, progress))
        self._scaler, self._nets, self.history = rows.scaler, nets, history
        return self

    def _rows(self, theta: Any, x: Any, memory: int | None, progress: Progress) -> Rows:
        def settings() -> Settings:
            return Settings(self.prior, self.seed, self.config, self.device, self.x_transform, self.observables)

        return rows_of(self, theta, x, settings, memory, progress)

    def _fit_member(self, k: int, rows: Rows, checkpoint: str | Path | None, progress: Progress) -> tuple[PairClassifier, History]:
        batches, _ = rows.member(k)
        net = self._new_net(k, rows.scaler.shape)
        take_scaling(net.embedding, rows.scaler)
        loss, member = _RowLoss(self.loss, self.contrast), (k, self.n_ensemble)
        return net, train_member(loss, net, batches, rows.config, seed=self.seed, member=member, progress=progress, checkpoint=checkpoint)

    def _new_net(self, k: int, x_shape: tuple[int, ...]) -> PairClassifier:
        seed = seed_for(self.seed, "member", k)
        columns = len(x_shape) == 1 and x_shape[0] <= _COLUMNS and not isinstance(self.embedding, nn.Module)
        kind = self.reference if self.reference != "auto" else "likelihood" if columns else "posterior"
        return PairClassifier(self.prior.free_dim, x_shape, self.network, self.embedding, seed=seed, reference=kind).to(self.device)

    def log_ratio(self, x: ArrayLike | Tensor, theta: ArrayLike | Tensor, *, event_set: bool = False, normalise: bool = False) -> Array:
        """Log r(x | theta) = log p(x | theta) - log p(x), nats -> (m,).

        Args: theta (m, d), prior units. x: one observation (k,) for all theta, or m paired ones (m, k), all at one theta if there is one;
        with event_set=True the (n_events, k) events of one data set, whose log ratios are added up for every theta. normalise: divide r
        by its mean over the prior at each x (`prior_mean`), which the exact ratio has 1: for whoever needs r itself and not only how it
        changes with theta.
        Raises: SupportError (a theta outside the prior, where nothing was learned), ShapeError, NonFiniteError, DataError,
        ConvergenceError (as `prior_mean`).
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        if len(array) == 1 and event_set is False:
            array = np.repeat(array, len(self._inputs(x)), axis=0)
        found = self._density(x, event_set, len(array)).log_ratio(self._whitened(array))
        if not normalise:
            return found
        mean = self.prior_mean(x).log_mean
        return found - (mean.sum() if event_set else mean)

    def prior_mean(self, x: ArrayLike | Tensor, *, n_draws: int = 512, seed: int = 0) -> PriorMean:
        """Mean over the prior of r(x | theta), 1 for the exact ratio, at each of n observations x, (k,) or (n, k).

        Args: n_draws: of a round of importance sampling for each x, a power of two. seed: of the draws.
        Raises: ConvergenceError (where the ratio has its mass was not found), ShapeError, NonFiniteError, DataError, SettingError.
        Read: log_mean is what `log_ratio(..., normalise=True)` takes off, and the log evidence that `posterior` states.
        """
        n_draws, seed = require_int("n_draws", n_draws, low=64), require_int("seed", seed, low=0)
        if n_draws & (n_draws - 1):
            raise SettingError(f"n_draws is {n_draws}; expected a power of two")
        inputs, step = self._inputs(x), max(1, _PAIRS["cpu"] // n_draws)
        found = []
        for first in range(0, len(inputs), step):
            part = inputs[first : first + step].to(self.device)
            density = _Density(self._nets, [net.x_parts(part) for net in self._nets], False)
            found.append(mean_over_prior(density.log_ratios, _gaussians(self._nets, part), n_draws=n_draws, seed=seed, first=first))
        return joined(found)

    def _whitened(self, theta: Array) -> Tensor:
        return torch.from_numpy(self.prior.to_network(theta).astype(np.float32)).to(self.device)

    def _inputs(self, x: ArrayLike | Tensor, what: str = "observations") -> Tensor:
        """Scaled x (n, ...), at least one."""
        if self._scaler is None:
            raise SettingError("this NRE is not trained; expected .fit(theta, x) or sp.load(path) first")
        array, _ = self._scaler.check("x", x)
        if len(array) == 0:
            raise DataError(f"x has shape {array.shape}, no {what}; expected at least one")
        return self._scaler.apply(array)

    def _density(self, x: ArrayLike | Tensor, event_set: bool, n_theta: int | None = None) -> "_Density":
        """The ratio as a function of theta, x embedded; n_theta None: x must be one observation or one set."""
        if not isinstance(event_set, bool):
            raise SettingError(f"event_set is {event_set!r}; expected True or False")
        inputs = self._inputs(x, "events" if event_set else "observations").to(self.device)
        if not event_set and len(inputs) != 1 and len(inputs) != n_theta:
            paired = "" if n_theta is None else f", or {n_theta}, as many as theta"
            raise ShapeError(f"x holds {len(inputs)} observations; expected one{paired}; event_set=True takes x as one set of events")
        with torch.no_grad():
            parts = [_joined([net.x_parts(part) for part in inputs.split(_X_ROWS)]) for net in self._nets]
        return _Density(self._nets, parts, event_set)

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
        """Draw theta (n, d) from p(theta | x) for one observation x_obs (k,) or one set of events (n_events, k), prior units.

        Args and Raises: as `posterior`, whose diagnostics are left out here (a sampler that fails raises all the same).
        """
        return self.posterior(x_obs, n, seed, event_set=event_set, method=method, proposal=proposal, progress=progress).theta

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
        """Draws of p(theta | x) proportional to p(theta) r(x | theta), with the sampler's diagnostics.

        Args: method: 'auto', 'importance', 'emcee', 'hmc' or 'grid'. proposal: over u, e.g. `NPE.proposal(x)`; both as in
        `from_density.sample_posterior`.   Raises: ConvergenceError, ShapeError, NonFiniteError, DataError, SettingError.
        """
        density = self._density(x_obs, event_set)

        def log_likelihood(theta: Array) -> Array:
            return density.log_ratio(self._whitened(theta))

        def gradient(u: Array) -> tuple[Array, Array]:
            return density.with_gradient(torch.from_numpy(u.astype(np.float32)).to(self.device))

        return sample_posterior(
            log_likelihood, self.prior, n, seed=seed, method=method, proposal=proposal, gradient=gradient, progress=progress
        )

    def log_ratio_pairs(self, theta: ArrayLike | Tensor, x: ArrayLike | Tensor, *, normalise: bool = False) -> tuple[Array, Array]:
        """Log r of held-out joint pairs, theta (n, d) and x (n, ...), and of marginal pairs made by moving theta one row on -> (n,) twice.

        They are the numerator and the reference of `calibration.ratios`; the rows must be in no particular order. normalise: as for
        `log_ratio`; the checks judge r itself, so that what they are to say of a normalised ratio needs it.   Raises: as `log_ratio`.
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        mean = self.prior_mean(x).log_mean if normalise else 0.0
        return self.log_ratio(x, array) - mean, self.log_ratio(x, np.roll(array, -1, axis=0)) - mean

    def save(self, path: str | Path) -> None:
        """Write the model: weights, scaling, prior, settings and history; no code is stored.   Raises: ModelFileError."""
        if self._scaler is None:
            raise SettingError("this NRE is not trained; expected .fit(theta, x) first")
        content = shared_content(self) | {
            "loss": self.loss,
            "contrast": self.contrast,
            "reference": self.reference,
            "network": asdict(self.network),
            "scaler": self._scaler.to_dict(),
        }
        write_file(path, *FILE, content)

    @classmethod
    def _from_content(cls, path: Path, content: dict[str, Any], embedding: nn.Module | None, device: str | torch.device) -> "NRE":
        own = {name: content[name] for name in ("loss", "contrast", "reference")}
        nre = cls(**shared_settings(path, content, embedding), **own, network=ClassifierConfig(**content["network"]), device=device)
        nre._scaler = XScaler.from_dict(content["scaler"])
        nre.history = content["history"]
        nre._nets = with_weights([nre._new_net(k, nre._scaler.shape) for k in range(nre.n_ensemble)], content)
        return nre


class _RowLoss:
    """loss(net, u, x) for the training loop, one value per row: the classifier's, and minus the log likelihood of the Gaussians."""

    def __init__(self, loss: str, n_contrasts: int) -> None:
        self.function, self.n_contrasts = LOSSES[loss], n_contrasts
        # the balance that makes ratios cautious is that between joint and marginal pairs
        self.near = 0.0 if loss == "bnre" else NEAR

    def __call__(self, net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        assert isinstance(net, PairClassifier)
        # the same contrasts in every validation
        generator = None if net.training else torch.Generator(device=x.device).manual_seed(0)
        joint, contrast, learned = net.with_contrasts(x, u, self.n_contrasts, generator, near=self.near)
        return self.function(joint, contrast) - learned


class _Density:
    """Log ratio of embedded x as a function of u: the mean over the members."""

    def __init__(self, nets: Sequence[PairClassifier], parts: Sequence[Parts], event_set: bool) -> None:
        self._nets, self._parts, self._event_set = nets, parts, event_set
        self._n = len(parts[0][0])

    @torch.inference_mode()
    def log_ratio(self, u: Tensor) -> Array:
        """u (m, d') -> (m,)."""
        out = torch.zeros(len(u), dtype=torch.float64)
        self._each_chunk(u, lambda rows, value: out[rows].add_(value.cpu()))
        return out.numpy()

    @torch.inference_mode()
    def log_ratios(self, u: Array, rows: Integers) -> Array:
        """u (m, k, d'), k for each of the observations rows (m,) -> (m, k)."""
        device = self._parts[0][0].device
        flat, owner = torch.from_numpy(u.reshape(-1, u.shape[-1]).astype(np.float32)), torch.from_numpy(np.repeat(rows, u.shape[1]))
        step = _PAIRS.get(device.type, _PAIRS["cpu"])
        chunks = zip(flat.split(step), owner.split(step), strict=True)
        return torch.cat([self._pairs(a.to(device), b.to(device), slice(None)).cpu() for a, b in chunks]).view(u.shape[:2]).numpy()

    def with_gradient(self, u: Tensor) -> tuple[Array, Array]:
        """u (m, d') -> log ratio (m,) and its gradient in u (m, d')."""
        u = u.requires_grad_()
        out, gradient = torch.zeros(len(u), dtype=torch.float64), torch.zeros(u.shape, dtype=torch.float64)

        def add(rows: slice, value: Tensor) -> None:
            out[rows] += value.detach().cpu()
            gradient[rows] += torch.autograd.grad(value.sum(), u)[0][rows].double().cpu()

        self._each_chunk(u, add)
        return out.numpy(), gradient.numpy()

    def _each_chunk(self, u: Tensor, add: Callable[[slice, Tensor], Any]) -> None:
        """Call add(rows, log ratio) for chunks of pairs; events of a set come in several chunks, to be added up."""
        most = _PAIRS.get(u.device.type, _PAIRS["cpu"])
        n_events = min(self._n, most) if self._event_set else 1
        step = max(1, most // n_events)
        for start in range(0, len(u), step):
            rows = slice(start, min(start + step, len(u)))
            for first in range(0, self._n if self._event_set else 1, n_events):
                value = self._pairs(u[rows], rows, slice(first, first + n_events))
                add(rows, value.sum(dim=1) if self._event_set else value)

    def _pairs(self, u: Tensor, rows: slice | Tensor, events: slice) -> Tensor:
        """Log ratio of theta rows and events, (m,) or (m, e), double."""
        logs = []
        for net, (trunk, products, context) in zip(self._nets, self._parts, strict=True):
            theta = net.theta_parts(u)
            chosen = events if self._event_set else slice(None) if self._n == 1 else rows
            x = trunk[chosen], products[chosen], context[chosen]
            logs.append((net.table(x, theta) if self._event_set else net.log_odds(x, theta)).double())
        return logs[0] if len(logs) == 1 else torch.stack(logs).mean(dim=0)


def _joined(parts: Sequence[Parts]) -> Parts:
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


@torch.no_grad()
def _gaussians(nets: Sequence[PairClassifier], x: Tensor) -> Gaussians:
    """The networks' Gaussian posteriors of scaled x (n, ...): means (n, k, d'), factors (n, k, d', d'), one of each network."""
    means, factors = [], []
    for net in nets:
        assert net.proposal is not None
        part, d = net.proposal.x_part(net.embedding(x), x), net.dim
        mean = net.proposal.draw(part, part.new_zeros(len(x), 1, d))
        columns = net.proposal.draw(part, torch.eye(d, dtype=part.dtype, device=part.device).expand(len(x), d, d)) - mean
        means.append(mean)
        factors.append(columns.transpose(1, 2)[:, None])
    return torch.cat(means, dim=1).double().cpu().numpy(), torch.cat(factors, dim=1).double().cpu().numpy()
