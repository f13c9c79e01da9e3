r"""Neural posterior estimation.

For pairs (theta, x) ~ p(theta) p(x | theta) the expected loss

    E[-log q(theta | x)] = E_x KL(p(theta | x) || q(theta | x)) + E_x H[p(theta | x)]

is least where q is the posterior for (almost) every x: one training serves all observations (amortised). The network
works in u, the prior's whitened space (see `priors`), so that

    log q(theta | x) = log q(u | x) + log p(theta) - log N(u; 0, I),   u = prior.to_unbounded(theta)

and no draw can leave the support. What the network is wrong about can be measured and mended where the simulator has
an exact likelihood: `proposal` hands the learned posterior to importance sampling.

Source: Papamakarios & Murray 2016, arXiv:1605.06376; Greenberg+ 2019, arXiv:1905.07488; Radev+ 2020, arXiv:2003.06281.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from sbi_phys.core.checks import as_matrix, as_real, require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, ModelFileError, SettingError, ShapeError, SimulatorMismatchError
from sbi_phys.core.progress import NoProgress, Progress
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.estimators.fitting import History, fit_ensemble, require_prior, rows_of, train_member
from sbi_phys.estimators.model_file import FILE, maker, shared_content, shared_settings, with_weights
from sbi_phys.nets.embedding_set import take_scaling
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import FlowProposal, PosteriorNet, encode_net, log_prob_nets, npe_loss, sample_net
from sbi_phys.priors import Observable, Prior, standard_normal_log_prob
from sbi_phys.simulation.protocol import Simulator
from sbi_phys.store.identity import simulator_identity
from sbi_phys.store.store import Store
from sbi_phys.training.checkpoint import read_file, write_file
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.scaling import XScaler
from sbi_phys.training.sources import Rows, Settings, from_simulator

__all__ = ["NPE", "load"]


class NPE:
    """Amortised posterior q(theta | x).

    Args:
        prior: over theta; its whitening map is the space the network works in.
        seed: of weights, split, order and draws.
        flow: 'spline', 'affine', 'maf' or a FlowConfig.
        embedding: None (residual perceptron), an EmbeddingConfig, or any nn.Module (n, *x_shape) -> (n, k).
        n_ensemble: networks, trained with different seeds and splits; the density is their equal mixture.
        device: 'auto' takes CUDA where there is one.
        x_transform: 'auto', 'counts' (Anscombe's root) or 'real'; 'auto' asks `observables`, else looks at the values.
        observables: the simulator's blocks of columns, if any.
        simulator: identity of the simulator, kept in the model file; taken from the store when fitted from one.
        config: of the training loop.
    Raises: SettingError.
    """

    def __init__(
        self,
        prior: Prior,
        seed: int = 0,
        *,
        flow: str | FlowConfig = "spline",
        embedding: EmbeddingConfig | nn.Module | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        x_transform: str = "auto",
        observables: Sequence[Observable] | None = None,
        simulator: dict[str, Any] | None = None,
        config: TrainConfig | None = None,
    ) -> None:
        self.prior = require_prior(prior)
        self.seed = require_int("seed", seed, low=0)
        self.flow = FlowConfig(kind=flow) if isinstance(flow, str) else flow
        self.embedding = EmbeddingConfig() if embedding is None else embedding
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.x_transform = x_transform
        self.observables = tuple(observables) if observables is not None else None
        self.simulator = simulator
        self.config = config or TrainConfig()
        self.history: list[History] = []
        self._scaler: XScaler | None = None
        self._nets: list[PosteriorNet] = []

    def fit(
        self,
        theta: ArrayLike | Tensor | Store | str | Path | Sequence[Store | str | Path] | None = None,
        x: ArrayLike | Tensor | None = None,
        *,
        simulator: Simulator | None = None,
        online: bool = False,
        n: int | None = None,
        memory: int | None = None,
        workers: int | None = None,
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on simulations: arrays, stores, or a simulator that runs beside the training.

        Args: theta (n, d) in the prior's support and x (n, ...); or a store (or its path, or several) in place of both; or
        simulator=..., online=True, n=...: n fresh simulations, each used once.
        memory: bytes that the rows of stores may take: more are streamed from disk; default half of the machine's memory.
        workers: processes that simulate online, 0 for a thread; default one a core but one.
        checkpoint: path prefix; an interrupted training goes on from there, with the same weights in the end.
        Under torchrun all ranks call this alike and end with the same network.
        Raises: ShapeError, NonFiniteError, SupportError, DataError (empty, too few), TrainingError, StoreError, SettingError.
        """
        progress = progress or NoProgress()
        with self._rows(theta, x, simulator, online, n, memory, workers, progress) as rows:
            nets, history = fit_ensemble(self.n_ensemble, lambda k: self._fit_member(k, rows, checkpoint, progress))
        self._scaler, self._nets, self.history = rows.scaler, nets, history
        return self

    def _rows(
        self, theta: Any, x: Any, simulator: Any, online: bool, n: int | None, memory: int | None, workers: int | None, progress: Progress
    ) -> Rows:
        if online != (simulator is not None):
            raise SettingError("online training takes both simulator=... and online=True; expected both, or theta and x, or a store")
        if online:
            if theta is not None or x is not None:
                raise DataError("theta or x was given beside a simulator; expected fit(simulator=..., online=True, n=...)")
            self.simulator = self.simulator or simulator_identity(simulator)
            self.observables = self.observables or tuple(simulator.observables)
            return from_simulator(simulator, n, self._settings(), workers)
        return rows_of(self, theta, x, self._settings, memory, progress, ways="fit(theta, x), fit(store) or fit(simulator=...)")

    def _settings(self) -> Settings:
        return Settings(self.prior, self.seed, self.config, self.device, self.x_transform, self.observables)

    def _fit_member(self, k: int, rows: Rows, checkpoint: str | Path | None, progress: Progress) -> tuple[PosteriorNet, History]:
        batches, start = rows.member(k)
        net = self._new_net(k, rows.scaler.shape)
        take_scaling(net.embedding, rows.scaler)
        net.start_at(start)
        member = k, self.n_ensemble
        return net, train_member(
            npe_loss, net, batches, rows.config, seed=self.seed, member=member, progress=progress, checkpoint=checkpoint
        )

    def _new_net(self, k: int, x_shape: tuple[int, ...]) -> PosteriorNet:
        seed = seed_for(self.seed, "member", k)
        return PosteriorNet(self.prior.free_dim, x_shape, self.flow, self.embedding, seed=seed).to(self.device)

    def _require_fit(self) -> XScaler:
        if self._scaler is None:
            raise SettingError("this NPE is not trained; expected .fit(theta, x) or sp.load(path) first")
        return self._scaler

    def _inputs(self, x: ArrayLike | Tensor) -> tuple[Tensor, bool]:
        scaler = self._require_fit()
        array, single = scaler.check("x", x)
        return scaler.apply(array).to(self.device), single

    def sample(self, x: ArrayLike | Tensor, n: int, seed: int = 0) -> Array:
        """Draw n posterior samples: (n, d) for one observation, (b, n, d) for a batch of b, in the prior's units.

        Raises: ShapeError, NonFiniteError, DataError, SettingError.
        """
        n = require_int("n", n, low=1)
        inputs, single = self._inputs(x)
        counts = rng_for(seed, "members").multinomial(n, np.full(len(self._nets), 1 / len(self._nets)))
        parts = [
            sample_net(net, inputs, int(c), torch_rng_for(seed, "draws", k, device=self.device))
            for k, (net, c) in enumerate(zip(self._nets, counts, strict=True))
            if c
        ]
        u = torch.cat(parts, dim=1).double().numpy()
        if len(parts) > 1:  # the members' draws are mixed, so that any part of the draws is a sample of the mixture
            u = u[:, rng_for(seed, "mix").permutation(n)]
        theta = self.prior.from_unbounded(u.reshape(-1, self.prior.free_dim)).reshape(len(inputs), n, self.prior.dim)
        return theta[0] if single else theta

    def log_prob(self, theta: ArrayLike | Tensor, x: ArrayLike | Tensor) -> Array:
        """Normalised log density of theta (n, d) given one observation x or n paired ones -> (n,); -inf outside the prior.

        Raises: ShapeError, NonFiniteError, DataError.
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        inputs, _ = self._inputs(x)
        if inputs.shape[0] not in (1, len(array)):
            raise DataError(f"theta has {len(array)} rows and x has {inputs.shape[0]}; expected one observation or as many as theta")
        out = np.full(len(array), -np.inf)
        inside = np.flatnonzero(self.prior.contains(array))
        if len(inside):
            u = self.prior.to_unbounded(array[inside])
            rows = inputs if inputs.shape[0] == 1 else inputs[torch.from_numpy(inside).to(self.device)]
            log_u = log_prob_nets(self._nets, torch.from_numpy(u.astype(np.float32)).to(self.device), rows)
            out[inside] = log_u + self.prior.log_prob(array[inside]) - standard_normal_log_prob(u)
        return out

    def log_prob_draws(self, draws: ArrayLike, x: ArrayLike | Tensor) -> Array:
        """Log density of draws (b, n, d) of b observations x (b, ...), all at once -> (b, n); -inf outside the prior.

        Raises: ShapeError, NonFiniteError, DataError.
        """
        inputs, _ = self._inputs(x)
        array = as_real("draws", draws)
        b, d = len(inputs), self.prior.dim
        if array.ndim != 3 or array.shape[0] != b or array.shape[2] != d:
            raise ShapeError(f"draws has shape {array.shape}; expected ({b}, n, {d}) for {b} observations")
        flat = array.reshape(-1, d)
        out = np.full(len(flat), -np.inf)
        inside = np.flatnonzero(self.prior.contains(flat))
        if len(inside):
            u = self.prior.to_unbounded(flat[inside])
            owner = torch.from_numpy(inside // array.shape[1]).to(self.device)
            log_u = log_prob_nets(self._nets, torch.from_numpy(u.astype(np.float32)).to(self.device), inputs, owner)
            out[inside] = log_u + self.prior.log_prob(flat[inside]) - standard_normal_log_prob(u)
        return out.reshape(array.shape[:2])

    def latent(self, theta: ArrayLike | Tensor, x: ArrayLike | Tensor) -> Array | None:
        """Base coordinates z (n, d') of theta (n, d) given x (n, ...): N(0, I) whatever x, if the posterior is right.

        None for an ensemble, whose members have bases of their own.   Raises: ShapeError, NonFiniteError, SupportError.
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        inputs, _ = self._inputs(x)
        if len(self._nets) > 1:
            return None
        if len(inputs) != len(array):
            raise ShapeError(f"theta has {len(array)} rows and x has {len(inputs)}; expected the same number")
        u = torch.from_numpy(self.prior.to_unbounded(array).astype(np.float32)).to(self.device)
        z: Array = encode_net(self._nets[0], u, inputs)[0].double().cpu().numpy()
        return z

    def map(self, x: ArrayLike | Tensor, *, n_start: int = 2000, seed: int = 0) -> Array:
        """Mode of q(theta | x) for one observation -> (d,): the best of n_start draws, then a simplex search in u."""
        draws = self.sample(x, n_start, seed)
        if draws.ndim != 2:
            raise DataError(f"x holds {len(draws)} observations; expected one")
        start = self.prior.to_unbounded(draws[np.argmax(self.log_prob(draws, x))][None])[0]
        width = self.prior.to_unbounded(draws).std(axis=0) + 1e-6

        def objective(step: Array) -> float:
            u = start + step * width
            return float("inf") if np.abs(u).max() > 8 else -float(self.log_prob(self.prior.from_unbounded(u[None]), x)[0])

        simplex = np.vstack([np.zeros(len(start)), 0.3 * np.eye(len(start))])
        options = {"maxiter": 300 * len(start), "xatol": 1e-3, "fatol": 1e-5, "initial_simplex": simplex}
        best = minimize(objective, simplex[0], method="Nelder-Mead", options=options)
        return self.prior.from_unbounded((start + best.x * width)[None])[0]

    def embed(self, x: ArrayLike | Tensor) -> Array:
        """Features h of observations, those of all members side by side: (k,) for one, (b, k) for a batch."""
        inputs, single = self._inputs(x)
        with torch.inference_mode():
            h = torch.cat([torch.cat([net.embedding(part) for part in inputs.split(8192)]) for net in self._nets], dim=1)
        features: Array = h.double().cpu().numpy()
        return features[0] if single else features

    def proposal(self, x: ArrayLike | Tensor, *, prior_share: float = 0.01) -> FlowProposal:
        """The learned posterior of one observation as a proposal density in u, tails widened."""
        inputs, single = self._inputs(x)
        if not single and len(inputs) != 1:
            raise DataError(f"x holds {len(inputs)} observations; expected one")
        return FlowProposal(self._nets, inputs, prior_share=prior_share)

    def save(self, path: str | Path) -> None:
        """Write the model: weights, scaling, prior, settings and history; no code is stored.   Raises: ModelFileError."""
        content = shared_content(self) | {
            "flow": asdict(self.flow),
            "scaler": self._require_fit().to_dict(),
        }
        write_file(path, *FILE, content)

    @classmethod
    def _from_content(cls, path: Path, content: dict[str, Any], embedding: nn.Module | None, device: str | torch.device) -> "NPE":
        npe = cls(**shared_settings(path, content, embedding), flow=FlowConfig(**content["flow"]), device=device)
        npe._scaler = XScaler.from_dict(content["scaler"])
        npe.history = content["history"]
        npe._nets = with_weights([npe._new_net(k, npe._scaler.shape) for k in range(npe.n_ensemble)], content)
        return npe


def load(
    path: str | Path,
    *,
    simulator: Simulator | None = None,
    embedding: nn.Module | None = None,
    device: str | torch.device = "auto",
) -> Any:
    """Read a model that `save` wrote: an NPE, NLE, NRE, TwoHypotheses, MinedRatio or SALLY, as the file says.

    Args: simulator: if given, it must be the one the model was trained with. embedding: the module, where the model was
    trained with one of the user's own (its weights come from the file).
    Raises: ModelFileError (missing, truncated, not ours, another network), SimulatorMismatchError.
    """
    path = Path(path)
    content = read_file(path, *FILE)
    try:
        model = maker(content["estimator"])(path, content, embedding, device)
    except (KeyError, TypeError, RuntimeError) as err:
        raise ModelFileError(f"{path} does not describe a model that this version can build: {str(err).splitlines()[0]}") from err
    if simulator is not None:
        require_same_simulator(path, getattr(model, "simulator", None), simulator)
    return model


def require_same_simulator(path: Path, stored: dict[str, Any] | None, simulator: Simulator) -> None:
    """Raise SimulatorMismatchError unless the stored identity is the given simulator's, or that of an emulator of it."""
    got = simulator_identity(simulator)
    if stored is None or json.loads(json.dumps(got)) in (stored, stored.get("settings", {}).get("emulates")):
        return
    raise SimulatorMismatchError(f"{path} was trained with {json.dumps(stored)}; got {json.dumps(got)}")
