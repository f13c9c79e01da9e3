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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet, sample_net
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold._inputs import MIN_EVENTS, as_columns, as_weights, check_overlap
from sbi_phys.unfold._learned import LearnedUnfolder, PairScaler
from sbi_phys.unfold.classifier import RatioEstimator
from sbi_phys.unfold.replicas import Sample, WeightReplicas, bootstrap

__all__ = ["FlowUnfolder", "UnfoldIteration", "bootstrap_flow"]


_ROWS = 32768  # draws decoded at a time: bounds the memory


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfoldIteration:
    """Record of one iteration.

    loss: best held-out -log q per event, in units of the standardised truth. mean, sd (d,): of the data unfolded with this network; NaN
    without data. separation: Jensen-Shannon divergence of unfolded and simulated truth, nats. effective_sample_size: events of equal weight
    that the weights of the next training are worth, (sum w)^2 / sum w^2.
    """

    iteration: int
    loss: float
    mean: Array
    sd: Array
    separation: float
    effective_sample_size: float


class FlowUnfolder(LearnedUnfolder):
    """Invertible network q(truth | reco) in any number of dimensions.

    Args: seed: of weights, splits, order and the draws between iterations. flow: 'spline', 'affine', 'maf' or a FlowConfig.
    embedding: of reco, None, an EmbeddingConfig or a module. n_ensemble: networks; a draw comes from one at random. device: 'auto' takes
    CUDA where there is one. config: of every training; None chooses batches and epochs from the number of events.
    Raises: SettingError.

    After `fit`: iterations, one record of each; weights (n,), of all simulated truths: `np.histogram(truth, weights=unfolder.weights)`
    is the spectrum unfolded with the last network, in counts, corrected for efficiency (the nominal weights without data); data_weights
    (m,), of the data events: as given, times their probability to be signal; history, of each network, a dictionary per epoch.
    `save(path)` writes all of it, and `sp.load(path)` reads it.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import FlowUnfolder
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> unfolder = FlowUnfolder(flow="affine", config=quick, device="cpu").fit(truth, reco, data)
    >>> unfolder.sample(data, 3).shape, unfolder.weights.shape
    ((100, 3, 1), (120,))
    """

    iterations: tuple[UnfoldIteration, ...] = ()
    weights: Array = np.empty(0)
    data_weights: Array = np.empty(0)

    def build(self, scaler: PairScaler, seed: int) -> PosteriorNet:
        """Flow of truth, given reco."""
        return PosteriorNet(scaler.truth.shape[0], scaler.reco.shape, self.flow, self.embedding, seed=seed)

    def state(self) -> dict[str, Any]:
        """Weights of truths and data, and the records of the iterations."""
        records = [asdict(record) | {"mean": record.mean.tolist(), "sd": record.sd.tolist()} for record in self.iterations]
        return {"iterations": records, **{name: torch.from_numpy(getattr(self, name)) for name in ("weights", "data_weights")}}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`."""
        records = (record | {"mean": np.array(record["mean"]), "sd": np.array(record["sd"])} for record in state["iterations"])
        self.iterations = tuple(UnfoldIteration(**record) for record in records)
        self.weights, self.data_weights = state["weights"].numpy(), state["data_weights"].numpy()

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
        checkpoint: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Train on simulated pairs; with data, n_iterations times, reweighting the simulation to the unfolded data in between.

        Args: truth (n, d), reco (n, k). data (m, k); more than one iteration needs them. reco_pass (n,): reconstructed; where False, reco
        may be NaN. weights (n,), data_weights (m,): >= 0. background (b, k), background_weights (b,): expected counts among the data.
        checkpoint: path prefix, one file per network and iteration; an interrupted training continues from there.
        Raises: ShapeError, NonFiniteError, DataError (too few events, negative weights, no overlap, more background than data),
        SettingError, TrainingError, ModelFileError (a checkpoint of another training).
        Read: one iteration leaves the simulation's prior in; compare the means of `iterations` until they stop moving.
        """
        n_iterations = require_int("n_iterations", n_iterations, low=1)
        if n_iterations > 1 and data is None:
            raise DataError(f"n_iterations is {n_iterations} and data is None; expected data to reweight the simulation to, or 1 iteration")
        with self._all_or_nothing():
            t_all, r_all, seen, own, keep = self._pairs(truth, reco, reco_pass, weights)
            t, r, w = t_all[keep], r_all[keep], own[keep] / own[keep].mean()
            measured, counts = self._check_data(data, data_weights, r)
            counts = self.data_weights = self._signal(measured, counts, background, background_weights)
            self._nets = [self._new_net(self._scaler, seed_for(self.seed, "member", m)) for m in range(self.n_ensemble)]
            self.history, self.weights = [[] for _ in self._nets], np.ones(len(t_all))
            with or_none(progress).task("unfold", n_iterations * self.n_ensemble) as task:
                self.iterations = tuple(self._iterate(t, r, w, t_all, keep, measured, counts, n_iterations, checkpoint, task))
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
        checkpoint: str | Path | None,
        task: Task,
    ) -> Iterator[UnfoldIteration]:
        """Train, unfold, reweight; yields a record per iteration."""
        ratio = RatioEstimator(t.shape[1], seed=seed_for(self.seed, "ratio"), n_ensemble=self.n_ensemble, device=self.device)
        rows = self._scaler.truth.apply(t), self._scaler.reco.apply(r)
        rho = np.ones(len(t))
        for k in range(n_iterations):
            losses = []
            for m, net in enumerate(self._nets):
                history = self._train_further(net, rows, w * rho, (14, 5e-3) if k == 0 else (8, 2e-3), checkpoint, m, k)
                self.history[m] += history
                losses.append(min(record["valid"] for record in history))
                task.advance(1, text=f"iteration {k + 1} loss {losses[-1]:.3f}")
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
            effective = float(product.sum() ** 2 / (product**2).sum())
            yield UnfoldIteration(
                iteration=k + 1, loss=float(np.mean(losses)), mean=mean, sd=sd, separation=separation, effective_sample_size=effective
            )

    def sample(self, data: ArrayLike, n: int = 1, *, seed: int = 0) -> Array:
        """Draw n truths for each event of data (m, k) -> (m, n, d), in the truth's units.

        Raises: SettingError (not trained), ShapeError, NonFiniteError.
        """
        (x, inputs), n = self._check("data", data, "reco"), require_int("n", n, low=1)
        scaler = self._scaler.truth
        owner = np.repeat(np.arange(len(x)), n)
        member = rng_for(seed, "members").integers(self.n_ensemble, size=len(owner))
        out = np.empty((len(owner), *scaler.shape))
        for m, net in enumerate(self._nets):
            generator = torch_rng_for(seed, "draws", m, device=self.device)
            rows = np.flatnonzero(member == m)
            for part in np.array_split(rows, max(1, math.ceil(len(rows) / _ROWS))):
                if len(part):
                    own = inputs[torch.from_numpy(owner[part]).to(self.device)]
                    out[part] = sample_net(net, own, 1, generator)[:, 0].double().numpy()
        return (scaler.mean + scaler.scale * out).reshape(len(x), n, -1)

    def log_prob(self, truth: ArrayLike, data: ArrayLike) -> Array:
        """log q(truth | data) of paired rows truth (m, d), data (m, k) -> (m,).   Raises: SettingError, ShapeError, NonFiniteError."""
        (x, inputs), t = self._check("data", data, "reco"), as_columns("truth", truth)
        scaler = self._scaler.truth
        if t.shape != (len(x), *scaler.shape):
            raise ShapeError(f"truth has shape {t.shape}; expected ({len(x)}, {scaler.shape[0]}), a row per event of data")
        return self._log_prob(t, scaler, inputs)


def bootstrap_flow(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    n_iterations: int = 1,
    *,
    n_replicas: int = 10,
    reco_pass: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    data_weights: ArrayLike | None = None,
    background: ArrayLike | None = None,
    background_weights: ArrayLike | None = None,
    n_ensemble: int = 1,
    seed: int = 0,
    flow: str | FlowConfig = "spline",
    embedding: EmbeddingConfig | nn.Module | None = None,
    device: str | torch.device = "auto",
    config: TrainConfig | None = None,
    progress: Progress | None = None,
) -> WeightReplicas:
    """Weights of the simulated truths from `FlowUnfolder`, once, and n_replicas times each with data, simulation and seeds varied.

    Args: n_replicas: >= 2; 3 n_replicas + 1 unfoldings of n_iterations trainings each. The others: as in `FlowUnfolder` and its `fit`.
    Returns: WeightReplicas.   Raises: what `FlowUnfolder` raises.   Source: `replicas`.
    Read: `.histogram(truth, edges)` gives the unfolded spectrum with covariances from data, simulation and training apart.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import bootstrap_flow
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=200)
    >>> reco, data = truth + 0.3 * rng.normal(size=200), rng.uniform(-1.5, 1.5, size=100)
    >>> replicas = bootstrap_flow(truth, reco, data, n_replicas=2, flow="affine", config=quick, device="cpu")
    >>> replicas.histogram(truth, [-3, 0, 3]).total.shape
    (2, 2)
    """
    n_replicas, seed = require_int("n_replicas", n_replicas, low=2), require_int("seed", seed, low=0)
    own = as_weights("weights", weights, len(as_columns("truth", truth)), "truth")
    counts = as_weights("data_weights", data_weights, len(as_columns("data", data)), "data")
    if background is None and background_weights is not None:
        raise DataError("background_weights was given without background; expected both or neither")
    extra = None if background is None else as_columns("background", background)
    expected = np.empty(0) if extra is None else as_weights("background_weights", background_weights, len(extra), "background")

    def unfolded(sample: Sample, member: int) -> Array:
        unfolder = FlowUnfolder(seed=member, flow=flow, embedding=embedding, n_ensemble=n_ensemble, device=device, config=config)
        unfolder.fit(
            truth,
            reco,
            data,
            n_iterations,
            reco_pass=reco_pass,
            weights=sample.simulation,
            data_weights=sample.data,
            background=extra,
            background_weights=None if extra is None else sample.background,
        )
        task.advance()
        return unfolder.weights

    with or_none(progress).task("bootstrap flow", 3 * n_replicas + 1) as task:
        sample = Sample(own, counts, expected)
        replicas = bootstrap(unfolded, sample, n_replicas, seed, ("bootstrap flow",), ("bootstrap flow",))
        return WeightReplicas(weights=unfolded(sample, seed), truth_pass=np.ones(len(own), dtype=np.bool_), **replicas)
