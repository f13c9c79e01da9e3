r"""Prior-free unfolding: learn the detector, p(reco | truth), and fit the spectrum of the truth to the data through it.

    minimise  sum_i w_i [ -log q(r_i | t_i) ]     over simulated events that are reconstructed; and eps(t) = P(reconstructed | t)

What a detector does to a given truth does not depend on how many such truths were simulated: q and eps are the same whatever the
simulation's spectrum was, as long as it covers the truths that occur. Only then is the spectrum asked for, by maximum likelihood, with
nothing of the simulation's prior in it:

    p(r | reconstructed) = int f(t) eps(t) q(r | t) dt / int f(t) eps(t) dt

- `unfold`: weights on truth points by expectation maximisation, without binning, in any dimension (`forward_fit`);
- `response`: q and eps integrated over bins, for `bayesian_unfold`, `ibu`, `tikhonov` and `forward_fold`;
- `fit_density`: a density f(t; phi) with a few parameters, and their errors.

Truth and reco enter in units of the simulation's mean and standard deviation; take logarithms of what is steep. Beyond the simulated
truths q is an extrapolation, which is refused.

Source: SPINUP, arXiv:2507.15084.
"""

import math
from collections.abc import Callable, Sequence
from typing import Self

import numpy as np
import torch
from scipy.special import expit, ndtr
from torch import Tensor, nn

from sbi_phys.core.checks import require_int, require_number
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.progress import Progress, or_none
from sbi_phys.core.rng import rng_for, seed_for, torch_rng_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.posterior import PosteriorNet, encode_net, log_prob_nets, sample_net
from sbi_phys.training.loop import TrainConfig, fit
from sbi_phys.unfold.classifier import RatioEstimator
from sbi_phys.unfold.forward_fit import DensityFit, Kernel, UnfoldedTruth, fit_weights, minimise_density, points_of
from sbi_phys.unfold.inputs import bin_name, check_edges
from sbi_phys.unfold.omnifold_inputs import MIN_EVENTS, as_columns, as_mask, as_weights, check_overlap
from sbi_phys.unfold.response import Response

__all__ = ["ForwardUnfolder"]

Density = Callable[[Array, Array], ArrayLike]

MAX_PAIRS = 30_000_000  # of data and truth points: 240 MB
GRID = 1024  # nodes that one reco quantity is gathered on, where there are more events
NODES = 12  # Gauss-Legendre points in a truth bin
_ROWS = 262_144


def weighted_loss(net: nn.Module, r: Tensor, t: Tensor, w: Tensor) -> Tensor:
    """-w log q(r | t), one value per row."""
    return -w * net.log_prob(r, t)  # type: ignore[operator]


class ForwardUnfolder:
    """Conditional flow q(reco | truth) and efficiency eps(truth); then the truth's spectrum by maximum likelihood.

    Args: seed: of weights, splits and order. flow: 'spline', 'affine', 'maf' or a FlowConfig. embedding: of truth, None or an
    EmbeddingConfig. n_ensemble: networks, whose densities are averaged. device: 'auto' takes CUDA where there is one. config: of every
    training; None chooses batches and epochs from the number of events.
    Raises: SettingError.
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
        self.losses: tuple[float, ...] = ()
        self._nets: list[PosteriorNet] = []
        self._acceptance: RatioEstimator | None = None
        self._intercept = 0.0
        self._truth, self._truth_weights, self._reco = np.empty((0, 1)), np.empty(0), np.empty((0, 1))

    def fit(
        self,
        truth: ArrayLike,
        reco: ArrayLike,
        reco_pass: ArrayLike | None = None,
        *,
        weights: ArrayLike | None = None,
        progress: Progress | None = None,
    ) -> Self:
        """Learn q(reco | truth) from reconstructed events and eps(truth) from all.

        Args: truth (n, d), reco (n, k). reco_pass (n,): reconstructed; where False, reco may be NaN. weights (n,) >= 0.
        Raises: ShapeError, NonFiniteError, DataError (too few events, negative weights), TrainingError.
        Read: `losses`, best held-out -log q per event of each network, in units of the standardised reco.
        """
        t = as_columns("truth", truth)
        seen = as_mask("reco_pass", reco_pass, len(t), "truth")
        r, own = as_columns("reco", reco, seen), as_weights("weights", weights, len(t), "truth")
        if len(r) != len(t):
            raise ShapeError(f"truth has {len(t)} rows and reco {len(r)}; expected the same events in both, row by row")
        keep = seen & (own > 0)
        if keep.sum() < MIN_EVENTS:
            raise DataError(f"{keep.sum()} of {len(t)} simulated events are reconstructed, with weight; expected at least {MIN_EVENTS}")
        self._truth, self._truth_weights, self._reco = t, own, r[keep]
        self._truth_scale, self._reco_scale = _scale(t[keep]), _scale(r[keep])
        self._nets = []
        with or_none(progress).task("learn the detector", self.n_ensemble + 1) as task:
            losses = []
            for m in range(self.n_ensemble):
                losses.append(self._train(m, t[keep], r[keep], own[keep]))
                task.advance(1, text=f"loss {losses[-1]:.3f}")
            self._acceptance = self._learn_acceptance(t, seen, own)
            task.advance()
        self.losses = tuple(losses)
        return self

    def _train(self, m: int, t: Array, r: Array, w: Array) -> float:
        net = PosteriorNet(r.shape[1], (t.shape[1],), self.flow, self.embedding, seed=seed_for(self.seed, "member", m)).to(self.device)
        self._nets.append(net)
        seed = seed_for(self.seed, "fit", m)
        config = self.config or _config(len(t))
        order = torch.from_numpy(rng_for(seed, "split").permutation(len(t)))
        n_valid = max(1, round(config.validation_fraction * len(t)))
        rows = (self._tensor(r, self._reco_scale), self._tensor(t, self._truth_scale), self._tensor(w / w.mean()))
        valid, train = ([a[part.to(self.device)] for a in rows] for part in (order[:n_valid], order[n_valid:]))
        return min(record.valid for record in fit(weighted_loss, net, train, valid, config, seed=seed))

    def _learn_acceptance(self, t: Array, seen: Mask, own: Array) -> RatioEstimator | None:
        if own[~seen].sum() == 0:
            return None
        ratio = RatioEstimator(t.shape[1], seed=seed_for(self.seed, "acceptance"), n_ensemble=self.n_ensemble, device=self.device)
        found = ratio.fit(t, np.where(seen, own, 0.0), np.where(seen, 0.0, own))
        # a ratio is scaled so that it sums to one over the missed events, of which there are none where nearly all are seen; as log odds
        # the classifier's own constant is the right one
        self._intercept = math.log(found.norm)
        return ratio

    def efficiency(self, truth: ArrayLike) -> Array:
        """eps(truth) (n,), P(reconstructed | truth), from a classifier of reconstructed against missed; 1 if none was missed.

        Raises: SettingError (not trained), ShapeError, NonFiniteError.
        """
        t = self._check("truth", truth, self._truth)
        return np.ones(len(t)) if self._acceptance is None else np.asarray(expit(self._acceptance.log_ratio(t) + self._intercept))

    def sample(self, truth: ArrayLike, n: int = 1, seed: int = 0) -> Array:
        """Draw n reconstructions of each truth (m, d) -> (m, n, k), given that it is reconstructed.   Raises: as `efficiency`."""
        t, n = self._check("truth", truth, self._truth), require_int("n", n, low=1)
        inputs = self._tensor(t, self._truth_scale)
        owner = rng_for(seed, "members").integers(self.n_ensemble, size=(len(t), n))
        out = np.empty((len(t), n, self._reco.shape[1]))
        for m, net in enumerate(self._nets):
            drawn = sample_net(net, inputs, n, torch_rng_for(seed, "draws", m, device=self.device)).double().numpy()
            out = np.where((owner == m)[:, :, None], drawn, out)
        return self._reco_scale[0] + self._reco_scale[1] * out

    def log_prob(self, reco: ArrayLike, truth: ArrayLike) -> Array:
        """log q(reco | truth) of paired rows reco (n, k), truth (n, d) -> (n,), in the reco's units.   Raises: as `efficiency`."""
        r, t = self._check("reco", reco, self._reco), self._check("truth", truth, self._truth)
        if len(r) != len(t):
            raise ShapeError(f"reco has {len(r)} rows and truth {len(t)}; expected pairs")
        values = log_prob_nets(self._nets, self._tensor(r, self._reco_scale), self._tensor(t, self._truth_scale))
        return values - np.log(self._reco_scale[1]).sum()

    def response(
        self,
        truth_edges: ArrayLike,
        reco_edges: ArrayLike,
        *,
        spectrum_index: float | None = None,
        background: ArrayLike | None = None,
        exposure: float | None = None,
    ) -> Response:
        r"""Integrate the learned detector over bins, P[j, mu] = int_mu w(t) eps(t) Q_j(t) dt / int_mu w(t) dt, of one truth and one reco.

        Q_j(t) is the probability of the reco bin, from the flow's own distribution function: nothing is drawn or binned.

        Args: truth_edges, reco_edges in the units of truth and reco. spectrum_index g: then truth is lg(E) and w = E^(1 - g) within a bin;
            None: w = 1. background (n_reco,), counts. exposure, km2 sr yr.
        Returns: Response; n_simulated, the training events of each truth bin: the noise of a matrix filled with them, which a smooth
            network is below.
        Raises: SettingError (several truths or recos), DataError (a truth bin without training events: named), ShapeError.
        """
        self._require_trained()
        if self._truth.shape[1] != 1 or self._reco.shape[1] != 1:
            dims = f"{self._truth.shape[1]} truth and {self._reco.shape[1]} reco quantities"
            raise SettingError(f"the detector has {dims}; expected one of each for a matrix, use `unfold` or `fit_density`")
        bins_t, bins_r = check_edges("truth_edges", truth_edges), check_edges("reco_edges", reco_edges)
        index = None if spectrum_index is None else require_number("spectrum_index", spectrum_index)
        total = np.histogram(self._truth[:, 0], bins_t, weights=self._truth_weights)[0]
        squares = np.histogram(self._truth[:, 0], bins_t, weights=self._truth_weights**2)[0]
        if (total <= 0).any():
            place = bin_name("truth", int(np.flatnonzero(total <= 0)[0]), bins_t)
            raise DataError(
                f"no training events in {place}; expected some, the network only extrapolates there: drop the bin or simulate it"
            )
        u, v = np.polynomial.legendre.leggauss(NODES)
        t = bins_t[:-1, None] + np.diff(bins_t)[:, None] * (u + 1) / 2
        w = np.tile(v / 2, (len(t), 1)) if index is None else v / 2 * 10.0 ** ((1 - index) * (t - bins_t[0]))
        inside = np.diff(self._distribution(t.ravel(), bins_r), axis=1) * self.efficiency(t.ravel())[:, None]
        matrix = np.einsum("mqj,mq->jm", inside.reshape(*t.shape, -1), w) / w.sum(axis=1)
        return Response(
            np.maximum(matrix, 0.0),
            bins_t,
            bins_r,
            n_simulated=total**2 / squares,
            truth=None if index is None else w.sum(axis=1) * np.diff(bins_t),
            background=np.zeros(bins_r.size - 1) if background is None else np.asarray(background, dtype=np.float64),
            exposure=exposure,
        )

    def _distribution(self, t: Array, edges: Array) -> Array:
        """P(reco < edge | t) (n, k) of t (n,), edges (k,): in one dimension the flow's base coordinate rises with reco."""
        inputs = self._tensor(t[:, None], self._truth_scale)
        owner = torch.arange(len(t), device=self.device).repeat_interleave(len(edges))
        u = self._tensor(np.tile(edges, len(t))[:, None], self._reco_scale)
        parts = [ndtr(encode_net(net, u, inputs, owner)[0][:, 0].double().cpu().numpy()) for net in self._nets]
        return np.asarray(np.mean(parts, axis=0).reshape(len(t), len(edges)))

    def unfold(
        self,
        data: ArrayLike,
        *,
        support: ArrayLike | int = 256,
        n_iterations: int | None = None,
        smoothing: float | None = None,
        data_weights: ArrayLike | None = None,
        n_boot: int = 50,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> UnfoldedTruth:
        r"""Maximise sum_e log sum_i omega_i eps_i q(r_e | t_i) - sum_i omega_i eps_i over counts omega_i >= 0 at truth points t_i.

        Args: data (m, k). support: truth points (s, d), or how many: equally spaced (one truth) or quasi-random over the simulated range.
            n_iterations of expectation maximisation; None: as many as make events left out likeliest (five folds), at most 1000.
            smoothing: width of a Gaussian kernel between iterations, in standard deviations of the simulated truth; None = 0.
            data_weights (m,). n_boot: replicas of the data for the errors, each unfolded with the same number of iterations.
        Returns: UnfoldedTruth; its weights are in counts, corrected for efficiency; 0 where that is below 1/sqrt(events) of its largest.
        Raises: SettingError, ShapeError, NonFiniteError, DataError (no overlap, points outside of the simulated truths).
        Read: without smoothing the likeliest spectrum is a row of spikes: take means, widths and wide bins from it, or use
            `response` with `bayesian_unfold`. Its errors hold the data's statistics, not the training's.
        """
        kernel = self._kernel(data, data_weights, support, seed)
        steps = None if n_iterations is None else require_int("n_iterations", n_iterations, low=1)
        width = 0.0 if smoothing is None else require_number("smoothing", smoothing, low=0)
        n_boot = require_int("n_boot", n_boot, low=0)
        with or_none(progress).task("expectation maximisation", 1 + n_boot) as task:
            return fit_weights(kernel, steps, width * self._truth_scale[1], n_boot, rng_for(seed, "bootstrap forward"), task)

    def fit_density(
        self,
        data: ArrayLike,
        density: Density,
        start: ArrayLike,
        names: Sequence[str],
        *,
        support: ArrayLike | int = 512,
        data_weights: ArrayLike | None = None,
        seed: int = 0,
    ) -> DensityFit:
        r"""Fit f(t; phi) by maximum likelihood, sum_e log [ int f eps q(r_e | t) dt / int f eps dt ], through the learned detector.

        Args: data (m, k). density: f(t (s, d), phi (p,)) -> (s,) >= 0, of any normalisation; it is taken to end with the simulated truths.
            start (p,), names (p). support: points of the quadrature (number, or a regular grid (s, 1) of one truth). data_weights (m,).
        Returns: DensityFit with values, errors (Hesse) and the number of true events.
        Raises: SettingError, ShapeError, NonFiniteError, DataError, ConvergenceError, SbiPhysError (iminuit is not installed).
        """
        return minimise_density(self._kernel(data, data_weights, support, seed), density, start, names)

    def _kernel(self, data: ArrayLike, data_weights: ArrayLike | None, support: ArrayLike | int, seed: int) -> Kernel:
        """eps_i q(r_e | t_i) (m, s) of data and truth points; many events of one reco quantity are gathered on a fine grid first."""
        r = self._check("data", data, self._reco)
        if len(r) == 0:
            raise DataError("data has no rows; expected at least one event")
        w = as_weights("data_weights", data_weights, len(r), "data")
        check_overlap(r, self._reco)
        points, volume = points_of(support, self._truth, seed)
        r, counts = gathered(r[:, 0], w, GRID) if r.shape[1] == 1 and len(r) > GRID else (r, w)
        if len(r) * len(points) > MAX_PAIRS:
            raise SettingError(
                f"{len(r)} events x {len(points)} truth points = {len(r) * len(points)} pairs; expected at most {MAX_PAIRS}: fewer points,"
                " or events gathered in fine bins with data_weights"
            )
        inputs, targets = self._tensor(points, self._truth_scale), self._tensor(r, self._reco_scale)
        shape = (len(r), len(points))
        out = np.empty(shape)
        for rows in np.array_split(np.arange(len(r)), max(1, math.ceil(out.size / _ROWS))):
            if len(rows):
                u = targets[torch.from_numpy(rows).to(self.device)].repeat_interleave(len(points), dim=0)
                owner = torch.arange(len(points), device=self.device).repeat(len(rows))
                out[rows] = log_prob_nets(self._nets, u, inputs, owner).reshape(len(rows), -1)
        # a constant per event takes no part in the fit and keeps far tails from underflowing
        top = out.max(axis=1)
        offset = top - np.log(self._reco_scale[1]).sum()
        return Kernel(np.exp(out - top[:, None]), offset, self.efficiency(points), counts, w, points, volume)

    def _require_trained(self) -> None:
        if not self._nets:
            raise SettingError("this ForwardUnfolder is not trained; expected .fit(truth, reco) first")

    def _check(self, name: str, value: ArrayLike, like: Array) -> Array:
        self._require_trained()
        x = as_columns(name, value)
        if x.shape[1] != like.shape[1]:
            raise ShapeError(f"{name} has {x.shape[1]} columns; expected {like.shape[1]}, those it was trained with")
        return x

    def _tensor(self, array: Array, scale: tuple[Array, Array] | None = None) -> Tensor:
        values = array if scale is None else (array - scale[0]) / scale[1]
        return torch.from_numpy(values.astype(np.float32)).to(self.device)


def gathered(values: Array, weights: Array, n: int) -> tuple[Array, Array]:
    """Share each value (m,) between its two neighbours on n equally spaced nodes: mean and total are kept -> nodes (n, 1), weights (n,)."""
    nodes = np.linspace(values.min(), values.max(), n)
    place = (values - nodes[0]) / (nodes[1] - nodes[0])
    left = np.clip(place.astype(np.int64), 0, n - 2)
    share = place - left
    total = np.bincount(left, weights * (1 - share), n) + np.bincount(left + 1, weights * share, n)
    return np.asarray(nodes[total > 0][:, None]), np.asarray(total[total > 0], dtype=np.float64)


def _scale(x: Array) -> tuple[Array, Array]:
    sd = x.std(axis=0)
    return x.mean(axis=0), np.where(sd > 1e-12 * (1 + np.abs(x).max(axis=0)), sd, 1.0)


def _config(n: int) -> TrainConfig:
    """Forty steps an epoch for few rows, more where a batch would be too large."""
    batch = int(np.clip(2 ** round(math.log2(n / 40)), 32, 1024))
    return TrainConfig(batch_size=batch, max_epochs=16, patience=16, learning_rate=5e-3)
