r"""Event-by-event unfolding with a conditional invertible network, iterated to remove the simulation's prior (IcINN).

    minimise  sum_i w_i [ -log q(t_i | r_i) ] ,   unfolded events t ~ q(. | r_data)

With w = 1 the network learns p(t | r) under the simulated spectrum, and the unfolded events inherit a part of that spectrum. Three steps
are therefore repeated: unfold the data; learn rho(t) = p_unfolded(t) / p_simulation(t) with a classifier; retrain with w_i = rho(t_i).
They are the steps of iterative Bayesian unfolding, and the number of iterations is the regularisation.

Acceptance. The network is trained on reconstructed events, and the data are reconstructed: the draws are the truths of the measured
events. rho compares reconstructed with reconstructed events, so the efficiency cancels. As weights of all simulated truths it gives the
spectrum before the detector.

Background is given as events whose weights add up to the expected counts. A classifier of background against data learns
b(r) / p_data(r), and each data event counts with its probability to be signal, 1 - b / p_data, limited to the range 0 to 1 and scaled so
that the sum is the data minus the background. All draws of an event carry its weight (`data_weights`), which is never negative.

Truth and reco are standardised with the simulation's mean and standard deviation. Take logarithms of steep quantities, and pass
quantities of the event (zenith, number of stations ...) as further columns of reco.

Source: Bellagente+ 2020, arXiv:2006.06685 (cINN); Backes+ 2022, arXiv:2212.08674 (IcINN).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from sbi_phys.core.checks import require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet, log_prob_nets, sample_net
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.unfold._inputs import MIN_EVENTS, as_columns, as_mask, as_weights, check_overlap
from sbi_phys.unfold.classifier import RatioEstimator
from sbi_phys.unfold.replicas import SOURCES, WeightReplicas

__all__ = ["FlowUnfolder", "UnfoldIteration", "bootstrap_flow"]


_ROWS = 32768  # draws decoded at a time: bounds the memory


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfoldIteration:
    """What one iteration did.

    loss: best held-out -log q per event, in units of the standardised truth. mean, sd (d,): of the data unfolded with this network; NaN
    without data. separation: Jensen-Shannon divergence of unfolded and simulated truth, nats. effective_sample_size: of the weights that
    the next network trains with, as a share of the events.
    """

    iteration: int
    loss: float
    mean: Array
    sd: Array
    separation: float
    effective_sample_size: float


def weighted_loss(net: nn.Module, u: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """-w log q(u | x), one value per row."""
    return -w * net.log_prob(u, x)  # type: ignore[operator]


class FlowUnfolder:
    """Invertible network q(truth | reco) in any number of dimensions.

    Args: seed: of weights, splits, order and the draws between iterations. flow: 'spline', 'affine', 'maf' or a FlowConfig.
    embedding: of reco, None or an EmbeddingConfig. n_ensemble: networks; a draw comes from one at random. device: 'auto' takes CUDA where
    there is one. config: of every training; None chooses batches and epochs from the number of events.
    Raises: SettingError.

    After `fit`: history, one record per iteration; weights (n,), of all simulated truths: `np.histogram(truth, weights=unfolder.weights)`
    is the spectrum unfolded with the last network, in counts, corrected for efficiency (the nominal weights without data); data_weights
    (m,), of the data events: as given, times their probability to be signal.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        flow: str | FlowConfig = "spline",
        embedding: EmbeddingConfig | None = None,
        n_ensemble: int = 1,
        device: str | torch.device = "auto",
        config: TrainConfig | None = None,
    ) -> None:
        self.seed = require_int("seed", seed, low=0)
        self.flow = FlowConfig(kind=flow, n_layers=3, hidden=48) if isinstance(flow, str) else flow
        self.embedding = EmbeddingConfig(hidden=64, n_blocks=1, n_features=32) if embedding is None else embedding
        self.n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
        self.device = resolve_device(device)
        self.config = config
        self.history: tuple[UnfoldIteration, ...] = ()
        self.weights: Array = np.empty(0)
        self.data_weights: Array = np.empty(0)
        self._nets: list[PosteriorNet] = []
        self._truth_scale: tuple[Array, Array] = (np.empty(0), np.empty(0))
        self._reco_scale: tuple[Array, Array] = (np.empty(0), np.empty(0))

    def fit(
        self,
        truth: ArrayLike,
        reco: ArrayLike,
        data: ArrayLike | None = None,
        n_iterations: int = 1,
        *,
        reco_pass: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        data_weights: ArrayLike | None = None,
        background: ArrayLike | None = None,
        background_weights: ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on simulated pairs; with data, n_iterations times, reweighting the simulation to the unfolded data in between.

        Args: truth (n, d), reco (n, k). data (m, k); more than one iteration needs them. reco_pass (n,): reconstructed; where False, reco
        may be NaN. weights (n,), data_weights (m,): >= 0. background (b, k), background_weights (b,): expected counts among the data.
        Raises: ShapeError, NonFiniteError, DataError (too few events, negative weights, no overlap, more background than data),
        SettingError, TrainingError.
        Read: one iteration leaves the simulation's prior in; compare `history` means until they stop moving.
        """
        n_iterations = require_int("n_iterations", n_iterations, low=1)
        if n_iterations > 1 and data is None:
            raise DataError(f"n_iterations is {n_iterations} and data is None; expected data to reweight the simulation to, or 1 iteration")
        u_all = as_columns("truth", truth)
        seen = as_mask("reco_pass", reco_pass, len(u_all), "truth")
        r_all, own = as_columns("reco", reco, seen), as_weights("weights", weights, len(u_all), "truth")
        if len(r_all) != len(u_all):
            raise ShapeError(f"truth has {len(u_all)} rows and reco {len(r_all)}; expected the same events in both, row by row")
        keep = seen & (own > 0)
        if keep.sum() < MIN_EVENTS:
            raise DataError(f"{keep.sum()} of {len(u_all)} simulated events are reconstructed, with weight; expected at least {MIN_EVENTS}")
        t, r, w = u_all[keep], r_all[keep], own[keep] / own[keep].mean()
        self._truth_scale, self._reco_scale = _scale(t), _scale(r)
        measured, counts = self._check_data(data, data_weights, r)
        counts = self.data_weights = self._signal(measured, counts, background, background_weights)
        self._nets = [self._new_net(m, t.shape[1], r.shape[1]) for m in range(self.n_ensemble)]
        self.weights = np.ones(len(u_all))
        with or_none(progress).task("unfold", n_iterations * self.n_ensemble) as task:
            self.history = tuple(self._iterate(t, r, w, u_all, keep, measured, counts, n_iterations, task))
        scale = counts.sum() / own[seen].sum() if len(measured) else 1.0
        self.weights = scale * own * self.weights
        return self

    def _check_data(self, data: ArrayLike | None, data_weights: ArrayLike | None, reco: Array) -> tuple[Array, Array]:
        if data is None:
            return np.empty((0, reco.shape[1])), np.empty(0)
        measured = as_columns("data", data)
        if measured.shape[1] != reco.shape[1]:
            raise ShapeError(f"data has {measured.shape[1]} columns and reco {reco.shape[1]}; expected the same quantities")
        if len(measured) < MIN_EVENTS:
            raise DataError(f"data has {len(measured)} events; expected at least {MIN_EVENTS}")
        check_overlap(measured, reco)
        return measured, as_weights("data_weights", data_weights, len(measured), "data")

    def _signal(self, data: Array, counts: Array, background: ArrayLike | None, weights: ArrayLike | None) -> Array:
        """Weights (m,) of the data without the background."""
        if background is None:
            if weights is not None:
                raise DataError("background_weights was given without background; expected both or neither")
            return counts
        extra = as_columns("background", background)
        expected = as_weights("background_weights", weights, len(extra), "background")
        if len(data) == 0 or extra.shape[1] != data.shape[1]:
            got = f"{extra.shape[1]} columns and data {data.shape[1]}" if len(data) else f"{len(extra)} rows and there are no data"
            raise ShapeError(f"background has {got}; expected the same quantities for both")
        if expected.sum() >= counts.sum():
            raise DataError(f"background adds up to {expected.sum():g} and data to {counts.sum():g}; expected less background than data")
        ratio = RatioEstimator(data.shape[1], seed=seed_for(self.seed, "background"), n_ensemble=self.n_ensemble, device=self.device)
        zeros = np.zeros(len(data)), np.zeros(len(extra))
        ratio.fit(np.concatenate([data, extra]), np.concatenate([zeros[0], expected]), np.concatenate([counts, zeros[1]]))
        signal = counts * np.clip(1 - np.exp(ratio.log_ratio(data)), 0.0, 1.0)
        return np.asarray(signal * ((counts.sum() - expected.sum()) / signal.sum()))

    def _new_net(self, m: int, dim: int, n_reco: int) -> PosteriorNet:
        return PosteriorNet(dim, (n_reco,), self.flow, self.embedding, seed=seed_for(self.seed, "member", m)).to(self.device)

    def _iterate(
        self,
        t: Array,
        r: Array,
        w: Array,
        t_all: Array,
        keep: Mask,
        data: Array,
        counts: Array,
        n_iterations: int,
        task: Task,
    ) -> Iterator[UnfoldIteration]:
        """Train, unfold, reweight; yields a record per iteration."""
        ratio = RatioEstimator(t.shape[1], seed=seed_for(self.seed, "ratio"), n_ensemble=self.n_ensemble, device=self.device)
        rho = np.ones(len(t))
        for k in range(n_iterations):
            loss = float(np.mean([self._train(m, k, t, r, w * rho, task) for m in range(self.n_ensemble)]))
            mean, sd, separation = np.full(t.shape[1], np.nan), np.full(t.shape[1], np.nan), math.nan
            if len(data):
                unfolded = self.sample(data, 1, seed=seed_for(self.seed, "unfold", k))[:, 0]
                mean = np.average(unfolded, axis=0, weights=counts)
                sd = np.sqrt(np.average((unfolded - mean) ** 2, axis=0, weights=counts))
                zeros = np.zeros(len(unfolded))
                found = ratio.fit(
                    np.concatenate([unfolded, t]), np.concatenate([counts, 0 * w]), np.concatenate([zeros, w * (counts.sum() / w.sum())])
                )
                separation = found.separation
                self.weights = np.exp(ratio.log_ratio(t_all))
                rho = self.weights[keep]
            product = w * rho
            effective = float(product.sum() ** 2 / (len(product) * (product**2).sum()))
            yield UnfoldIteration(iteration=k + 1, loss=loss, mean=mean, sd=sd, separation=separation, effective_sample_size=effective)

    def _train(self, m: int, k: int, t: Array, r: Array, w: Array, task: Task) -> float:
        """Train member m, from where it stands; the best held-out loss."""
        seed = seed_for(self.seed, "fit", m, k)
        config = self.config or _config(len(t), warm=k > 0)
        order = torch.from_numpy(rng_for(seed, "split").permutation(len(t)))
        n_valid = max(1, round(config.validation_fraction * len(t)))
        rows = (self._tensor(t, self._truth_scale), self._tensor(r, self._reco_scale), self._tensor(w / w.mean()))
        valid, train = ([a[part.to(self.device)] for a in rows] for part in (order[:n_valid], order[n_valid:]))
        records = list(fit(weighted_loss, self._nets[m], train, valid, config, seed=seed))
        best = min(record.valid for record in records)
        task.advance(1, text=f"iteration {k + 1} loss {best:.3f}")
        return best

    def sample(self, data: ArrayLike, n: int = 1, seed: int = 0) -> Array:
        """Draw n truths for each event of data (m, k) -> (m, n, d), in the truth's units.

        Raises: SettingError (not trained), ShapeError, NonFiniteError.
        """
        x, n = self._check("data", data), require_int("n", n, low=1)
        owner = np.repeat(np.arange(len(x)), n)
        member = rng_for(seed, "members").integers(self.n_ensemble, size=len(owner))
        out = np.empty((len(owner), len(self._truth_scale[0])))
        inputs = self._tensor(x, self._reco_scale)
        for m, net in enumerate(self._nets):
            generator = torch_rng_for(seed, "draws", m, device=self.device)
            rows = np.flatnonzero(member == m)
            for part in np.array_split(rows, max(1, math.ceil(len(rows) / _ROWS))):
                if len(part):
                    own = inputs[torch.from_numpy(owner[part]).to(self.device)]
                    out[part] = sample_net(net, own, 1, generator)[:, 0].double().numpy()
        mean, sd = self._truth_scale
        return (mean + sd * out).reshape(len(x), n, -1)

    def log_prob(self, truth: ArrayLike, data: ArrayLike) -> Array:
        """log q(truth | data) of paired rows truth (m, d), data (m, k) -> (m,).   Raises: SettingError, ShapeError, NonFiniteError."""
        x, t = self._check("data", data), as_columns("truth", truth)
        if t.shape != (len(x), len(self._truth_scale[0])):
            raise ShapeError(f"truth has shape {t.shape}; expected ({len(x)}, {len(self._truth_scale[0])}), a row per event of data")
        log_u = log_prob_nets(self._nets, self._tensor(t, self._truth_scale), self._tensor(x, self._reco_scale))
        return log_u - np.log(self._truth_scale[1]).sum()

    def _check(self, name: str, value: ArrayLike) -> Array:
        if not self._nets:
            raise SettingError("this FlowUnfolder is not trained; expected .fit(truth, reco) first")
        x = as_columns(name, value)
        if x.shape[1] != len(self._reco_scale[0]):
            raise ShapeError(f"{name} has {x.shape[1]} columns; expected {len(self._reco_scale[0])}, those of reco")
        return x

    def _tensor(self, array: Array, scale: tuple[Array, Array] | None = None) -> Tensor:
        values = array if scale is None else (array - scale[0]) / scale[1]
        return torch.from_numpy(values.astype(np.float32)).to(self.device)


def _scale(x: Array) -> tuple[Array, Array]:
    sd = x.std(axis=0)
    return x.mean(axis=0), np.where(sd > 1e-12 * (1 + np.abs(x).max(axis=0)), sd, 1.0)


def _config(n: int, *, warm: bool) -> TrainConfig:
    """Forty steps an epoch for few rows, more where a batch would be too large."""
    batch = int(np.clip(2 ** round(math.log2(n / 40)), 32, 1024))
    epochs = 8 if warm else 14
    return TrainConfig(batch_size=batch, max_epochs=epochs, patience=epochs, learning_rate=2e-3 if warm else 5e-3)


def bootstrap_flow(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    n_iterations: int = 1,
    *,
    n_boot: int = 10,
    reco_pass: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    data_weights: ArrayLike | None = None,
    background: ArrayLike | None = None,
    background_weights: ArrayLike | None = None,
    n_ensemble: int = 1,
    seed: int = 0,
    flow: str | FlowConfig = "spline",
    embedding: EmbeddingConfig | None = None,
    device: str | torch.device = "auto",
    config: TrainConfig | None = None,
    progress: Progress | None = None,
) -> WeightReplicas:
    """Weights of the simulated truths from `FlowUnfolder`, once, and n_boot times each with data, simulation and seeds varied.

    Args: n_boot: >= 2; 3 n_boot + 1 unfoldings of n_iterations trainings each. The others are those of `FlowUnfolder` and its `fit`.
    Returns: WeightReplicas.   Raises: what `FlowUnfolder` raises.   Source: `replicas`.
    Read: `.histogram(truth, edges)` gives the unfolded spectrum with covariances from data, simulation and training apart.
    """
    n_boot, seed = require_int("n_boot", n_boot, low=2), require_int("seed", seed, low=0)
    own = as_weights("weights", weights, len(as_columns("truth", truth)), "truth")
    counts = as_weights("data_weights", data_weights, len(as_columns("data", data)), "data")

    extra = None if background is None else as_columns("background", background)
    expected = None if extra is None else as_weights("background_weights", background_weights, len(extra), "background")
    if extra is None and background_weights is not None:
        raise DataError("background_weights was given without background; expected both or neither")

    def unfolded(simulated: Array, measured: Array, below: Array | None, member: int) -> Array:
        unfolder = FlowUnfolder(member, flow=flow, embedding=embedding, n_ensemble=n_ensemble, device=device, config=config)
        unfolder.fit(
            truth,
            reco,
            data,
            n_iterations,
            reco_pass=reco_pass,
            weights=simulated,
            data_weights=measured,
            background=extra,
            background_weights=below,
        )
        return unfolder.weights

    parts: dict[str, list[Array]] = {source: [] for source in SOURCES}
    with or_none(progress).task("bootstrap flow", 3 * n_boot + 1) as task:
        nominal = unfolded(own, counts, expected, seed)
        task.advance()
        for source in SOURCES:
            for b in range(n_boot):
                rng = rng_for(seed, "bootstrap flow", source, b)
                simulated = own * rng.poisson(1.0, len(own)) if source == "simulation" else own
                measured = counts * rng.poisson(1.0, len(counts)) if source == "data" else counts
                below = expected * rng.poisson(1.0, len(expected)) if expected is not None and source == "simulation" else expected
                parts[source].append(unfolded(simulated, measured, below, seed_for(seed, "bootstrap flow", source, b)))
                task.advance(1, text=source)
    stacked = {source: np.stack(replicas) for source, replicas in parts.items()}
    return WeightReplicas(weights=nominal, truth_pass=np.ones(len(own), dtype=np.bool_), **stacked)
