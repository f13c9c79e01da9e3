r"""OmniFold: unbinned unfolding by reweighting simulated events with classifiers, and its errors by bootstrap.

With simulated pairs (t_i, r_i), nominal weights w_i and data x_j, starting from nu_i = 1, two steps are repeated:

    step 1   pull_i = nu_i rho(r_i) ,   rho(r) = p_data(r) / [p_sim(r; w nu) + p_background(r)]
    step 2   nu(t)  = E[pull | t, reconstructed]

This is expectation maximisation: iterative Bayesian unfolding without bins, with the same regularisation after k iterations.

Acceptance. Missed events (reco_pass False) have no pull. Weight 1 for them biases the result at every iteration; their previous weight is
unbiased, but converges slowly where the efficiency is low. Here step 2 is trained on reconstructed events only, w pull against w, and the
ratio is applied to every event at that truth. Missed events get the mean weight at their truth, which corresponds to the division by the
efficiency in the binned method.

Low efficiency. Where the efficiency is near 0 the ratio of step 2 is an extrapolation, and a fluctuation of a few events at the edge of
the acceptance can change it by any factor. If the efficiency is below a tenth of its mean for a twentieth of the events, the ratio is
exp(quadratic form + correction), with a correction as large as the evidence supports (see `classifier`). The result is then good if the
ratio of the true to the simulated density is close to such a form; narrow structures at the limit of significance are smoothed.

Fakes (truth_pass False, reconstructed) have no truth. They keep their nominal weight: their shape and their share of what is measured are
those of the simulation, as with `Response.fakes`. With fit_fakes they get the mean pull over all fakes. Their number then depends on the
small difference of two broad shapes, and expectation maximisation assigns a part of them to the signal in the first iteration: with a
tenth of fakes 17 % of them are lost in the tests' toy, for any number of events.

Background, given in absolute counts and not among the pairs, is added to the simulation's side of step 1. Subtracted from the data it
would need negative weights, under which the loss of a classifier has no lower bound.

Normalisation. The weights add up to the unfolded number of events, corrected for efficiency.

Source: Andreassen+ 2020, arXiv:1911.09107 (OmniFold), 2105.04448 (acceptance and efficiency).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from sbi_phys.core.checks import as_real, require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold._inputs import MIN_EVENTS, as_columns, as_mask, as_weights, check_overlap
from sbi_phys.unfold.classifier import RatioEstimator
from sbi_phys.unfold.replicas import Sample, WeightReplicas, bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OmniFold", "OmniFoldIteration", "bootstrap_omnifold", "omnifold"]


_FAR = 7.0  # log ratio of data over simulation above which the simulation is missing

_FAR_SHARE = 0.001

_SELDOM = 0.1  # share of the mean efficiency below which the weights of a twentieth of the events are extrapolated, not learned

_LOW_SIZE = 0.01  # effective share of the events below which a few of them dominate the result


_HOLE_BINS, _HOLE_EVENTS = 20, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """Simulated pairs, data and background, checked.

    truth (n, d), reco (n, k); reco_pass, truth_pass (n,); weights (n,), nominal, in units of the data's counts: those that pass, with
    the background, add up to the data. scale: factor applied to the given weights. data (m, k), data_weights (m,).
    background (b, k), background_weights (b,), expected counts.
    """

    truth: Array
    reco: Array
    reco_pass: Mask
    truth_pass: Mask
    weights: Array
    scale: float
    data: Array
    data_weights: Array
    background: Array
    background_weights: Array


def check_events(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    reco_pass: ArrayLike | None,
    truth_pass: ArrayLike | None,
    data_weights: ArrayLike | None,
    weights: ArrayLike | None,
    background: ArrayLike | None,
    background_weights: ArrayLike | None,
) -> Events:
    """Check the arguments of OmniFold; order and shapes are those of `omnifold` and of `Events`.

    Raises: ShapeError, NonFiniteError, DataError (too few events, negative weights, efficiency 0, more background than data, no overlap).
    Warns, with the place: data outside the simulation, stretches of the truth without efficiency.
    """
    rows = {name: np.shape(as_real(name, a))[:1] for name, a in (("truth", truth), ("reco", reco))}
    if rows["truth"] != rows["reco"] or rows["truth"] == ():
        raise ShapeError(f"truth has rows {rows['truth']}, reco has {rows['reco']}; expected the same events in both, row by row")
    n = rows["truth"][0]
    seen, true = as_mask("reco_pass", reco_pass, n, "reco"), as_mask("truth_pass", truth_pass, n, "truth")
    own = as_weights("weights", weights, n, "truth")
    _require_events(seen, true, own)
    measured = as_columns("data", data)
    simulated = as_columns("reco", reco, seen)
    extra = np.empty((0, simulated.shape[1])) if background is None else as_columns("background", background)
    for name, a in (("data", measured), ("background", extra)):
        if a.shape[1] != simulated.shape[1]:
            raise ShapeError(f"{name} has {a.shape[1]} columns and reco {simulated.shape[1]}; expected the same quantities")
    counts = as_weights("data_weights", data_weights, len(measured), "data")
    if background is None and background_weights is not None:
        raise DataError("background_weights was given without background; expected both or neither")
    expected = as_weights("background_weights", background_weights, len(extra), "background")
    if (counts > 0).sum() < MIN_EVENTS:
        raise DataError(f"data has {(counts > 0).sum()} events; expected at least {MIN_EVENTS} to train on")
    if expected.sum() >= counts.sum():
        raise DataError(f"background adds up to {expected.sum():g} and data to {counts.sum():g}; expected less background than data")
    check_overlap(measured, np.concatenate([simulated[seen], extra]))
    scale = float((counts.sum() - expected.sum()) / own[seen].sum())
    events = Events(
        truth=as_columns("truth", truth, true),
        reco=simulated,
        reco_pass=seen,
        truth_pass=true,
        weights=scale * own,
        scale=scale,
        data=measured,
        data_weights=counts,
        background=extra,
        background_weights=expected,
    )
    _warn_holes(events)
    return events


def _require_events(seen: Mask, true: Mask, weights: Array) -> None:
    n = len(seen)
    if not (true & (weights > 0)).any():
        raise DataError(f"truth_pass is False (or the weight 0) in all {n} rows; expected true events")
    both = int((seen & true & (weights > 0)).sum())
    if both == 0:
        raise DataError(
            f"reco_pass is False in all {int(true.sum())} rows with a truth: the efficiency is 0; expected events that pass both"
        )
    if both < MIN_EVENTS:
        raise DataError(f"{both} of {n} simulated events pass reco_pass and truth_pass with weight; expected at least {MIN_EVENTS}")


def lowest_efficiency(events: Events) -> float:
    """Smallest efficiency of a twentieth of the true events, cut in one column, over the mean efficiency."""
    true, seen = events.truth[events.truth_pass], events.reco_pass[events.truth_pass]
    lowest = 1.0
    for column in true.T:
        edges = np.unique(np.quantile(column, np.linspace(0, 1, _HOLE_BINS + 1)))
        place = np.clip(np.searchsorted(edges, column, side="right") - 1, 0, max(len(edges) - 2, 0))
        total, passed = np.bincount(place), np.bincount(place, weights=seen)
        lowest = min(lowest, float((passed[total > 0] / total[total > 0]).min() / seen.mean()))
    return lowest


def _warn_holes(events: Events) -> None:
    """Warn where a stretch of a truth column, a twentieth of the events, has none that is reconstructed: weights are extrapolated."""
    true, seen = events.truth[events.truth_pass], events.reco_pass[events.truth_pass]
    for j in range(true.shape[1]):
        edges = np.unique(np.quantile(true[:, j], np.linspace(0, 1, _HOLE_BINS + 1)))
        if len(edges) < 3:
            continue
        place = np.clip(np.searchsorted(edges, true[:, j], side="right") - 1, 0, len(edges) - 2)
        total = np.bincount(place, minlength=len(edges) - 1)
        passed = np.bincount(place[seen], minlength=len(edges) - 1)
        empty = np.flatnonzero((passed == 0) & (total >= _HOLE_EVENTS))
        if len(empty):
            where = ", ".join(f"[{edges[b]:.4g}, {edges[b + 1]:.4g}]" for b in empty[:4])
            warnings.warn(
                f"the efficiency is 0 in truth column {j} within {where}: {total[empty].sum()} events, none reconstructed; "
                "their weights are extrapolated from the neighbourhood",
                RuntimeWarning,
                stacklevel=4,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniFoldIteration:
    """Record of one iteration.

    separation_reco: Jensen-Shannon divergence left between data and the folded simulation before the iteration, nats (held-out events);
    near 0 the iterations have converged at reco. norm_reco, norm_truth: normalisation of the two ratios before it was set right; far
    from 1 a classifier has not been trained well. change: mean |nu_new - nu_old| / mean nu_new over true events.
    effective_sample_size: events, (sum w)^2 / sum w^2. fake_scale: factor of all fakes.
    """

    iteration: int
    separation_reco: float
    norm_reco: float
    norm_truth: float
    change: float
    effective_sample_size: float
    fake_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniFold(Result):
    """Unfolded weights of simulated events.

    weights (n,), unfolded counts: any histogram, mean or quantile of `truth` under them is the unfolded one; 0 for events that are not
    true (truth_pass False). factors (n,) of the nominal weights (scaled to the data), fakes included: `nominal *
    factors` of the reconstructed events, with the background, describes the data if the result is correct.
    nominal (n,). truth (n, d). truth_pass (n,). history: one record per iteration. smooth: whether step 2's ratio was a quadratic form
    with a correction from the evidence. seed.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import omnifold
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> result = omnifold(truth, reco, data, 1, config=quick, device="cpu")
    >>> result.n_iterations, result.effective_sample_size > 0.5 * len(result.weights)
    (1, True)
    """

    weights: Array
    factors: Array
    nominal: Array
    truth: Array
    truth_pass: Mask
    history: tuple[OmniFoldIteration, ...]
    smooth: bool
    seed: int

    @property
    def effective_sample_size(self) -> float:
        """Effective number of true events, (sum w)^2 / sum w^2: as many events of equal weight have the same statistical errors."""
        return _effective(self.weights[self.truth_pass])

    @property
    def n_iterations(self) -> int:
        """Number of iterations done."""
        return len(self.history)

    def rows(self) -> Rows:
        """Return the table: one row for each iteration; the weights of the events are in `weights`."""
        names = [f.name for f in fields(OmniFoldIteration)]
        return Rows.of({name: [getattr(record, name) for record in self.history] for name in names}, {"separation_reco": "nats"})

    def summary(self) -> str:
        """Return the result in words."""
        last = self.history[-1]
        total, n = self.weights.sum(), int(self.truth_pass.sum())
        lines = [
            f"OmniFold, {self.n_iterations} iterations: {total:.6g} unfolded events on {n} simulated ones, "
            f"worth {self.effective_sample_size:.6g} of equal weight",
            f"before the last iteration data and folded simulation differed by {last.separation_reco:.2g} nats (Jensen-Shannon, held out); "
            f"its weights moved by {100 * last.change:.2g} %",
        ]
        if self.smooth:
            lines.append("ratios of the truth are a quadratic form with a correction determined by the evidence (smooth)")
        if max(abs(last.norm_reco - 1), abs(last.norm_truth - 1)) > 0.02:
            lines.append(f"the ratios' norms were {last.norm_reco:.3f} and {last.norm_truth:.3f}; expected 1: train longer")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, column: int = 0, bins: int | Sequence[float] = 40) -> "Axes":
        """Draw one column of the truth under the nominal and the unfolded weights.   Raises: SettingError."""
        column = require_int("column", column, low=0, high=self.truth.shape[1] - 1)
        return figures.unfolding.omnifold_column(self, column, bins, ax)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How the classifiers are trained."""

    n_iterations: int
    n_ensemble: int
    device: torch.device
    config: TrainConfig | None
    network: EmbeddingConfig | None
    fit_fakes: bool
    smooth: bool | None


def omnifold(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    n_iterations: int = 4,
    reco_pass: ArrayLike | None = None,
    truth_pass: ArrayLike | None = None,
    *,
    data_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    background: ArrayLike | None = None,
    background_weights: ArrayLike | None = None,
    fit_fakes: bool = False,
    smooth: bool | None = None,
    n_ensemble: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    config: TrainConfig | None = None,
    network: EmbeddingConfig | None = None,
    progress: Progress | None = None,
) -> OmniFold:
    r"""Weights of simulated events that turn the simulation into the unfolded data, nu(t) = E[pull | t].

    Args: truth (n, d), reco (n, k): simulated pairs, any units (logarithms of steep quantities). data (m, k): measured events.
    n_iterations: more removes more of the simulation's prior and adds noise. reco_pass (n,): reconstructed; where False, reco may be
    NaN. truth_pass (n,): has a truth; where False the event is a fake and truth may be NaN.
    data_weights (m,), weights (n,): >= 0. background (b, k), background_weights (b,): expected counts that the pairs do not contain.
    fit_fakes: let the number of fakes follow the data; only where their shape at reco differs strongly from the signal's.
    smooth: step 2's ratio is a quadratic form with a correction from the evidence; None: where the efficiency is near 0.
    n_ensemble: classifiers per step, their log ratios averaged. config, network: of each classifier; None chooses them.

    Returns: OmniFold.   Raises: ShapeError, NonFiniteError, DataError (too few events, efficiency 0, no overlap, negative weights),
    SettingError. Warns, with the place, of data outside the simulation and of truths that are not reconstructed.
    Source: arXiv:1911.09107.   Read: `np.histogram(truth, weights=result.weights)` is the unfolded spectrum; errors: `bootstrap_omnifold`.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import omnifold
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> result = omnifold(truth, reco, data, 1, config=quick, device="cpu")
    >>> result.weights.shape, round(result.weights.sum())
    ((120,), 100)
    """
    events = check_events(truth, reco, data, reco_pass, truth_pass, data_weights, weights, background, background_weights)
    settings = check_settings(n_iterations, n_ensemble, device, config, network, fit_fakes, smooth)
    with or_none(progress).task("omnifold", 2 * settings.n_iterations * settings.n_ensemble) as task:
        return unfold_events(events, settings, seed=require_int("seed", seed, low=0), task=task, warn=True)


def check_settings(
    n_iterations: int,
    n_ensemble: int,
    device: str | torch.device,
    config: TrainConfig | None,
    network: EmbeddingConfig | None,
    fit_fakes: bool,
    smooth: bool | None,
) -> Settings:
    """Check the settings of OmniFold.   Raises: SettingError."""
    if not isinstance(fit_fakes, bool):
        raise SettingError(f"fit_fakes is {fit_fakes!r}; expected True or False")
    if smooth is not None and not isinstance(smooth, bool):
        raise SettingError(f"smooth is {smooth!r}; expected True, False or None")
    return Settings(
        n_iterations=require_int("n_iterations", n_iterations, low=1),
        n_ensemble=require_int("n_ensemble", n_ensemble, low=1),
        device=resolve_device(device),
        config=config,
        network=network,
        fit_fakes=fit_fakes,
        smooth=smooth,
    )


def unfold_events(events: Events, settings: Settings, *, seed: int, task: Task, warn: bool = False) -> OmniFold:
    """OmniFold of checked events; `warn`: of data far from all simulation and of few events that carry the weight."""
    smooth = settings.smooth if settings.smooth is not None else lowest_efficiency(events) < _SELDOM
    first, second = _estimator(events, settings, seed, "reco"), _estimator(events, settings, seed, "truth", smooth)
    nu = np.ones(len(events.truth))
    true, fakes = events.truth_pass, events.reco_pass & ~events.truth_pass
    history: list[OmniFoldIteration] = []
    for k in range(settings.n_iterations):
        x, w1, w0 = _reco_rows(events, nu)
        at_reco = first.fit(x, w1, w0, done=task.advance)
        if k == 0 and warn:
            _warn_far(events, first)
        pull = np.zeros(len(nu))
        pull[events.reco_pass] = nu[events.reco_pass] * np.exp(first.log_ratio(events.reco[events.reco_pass]))
        both = events.reco_pass & true
        at_both, limit = events.weights[both], at_reco.n_effective  # step 2 receives the data through step 1
        at_truth = second.fit(events.truth[both], at_both * pull[both], at_both, done=task.advance, n_effective=limit)
        before, nu = nu, nu.copy()
        nu[true] = np.exp(second.log_ratio(events.truth[true]))
        if settings.fit_fakes and events.weights[fakes].sum() > 0:
            nu[fakes] = np.average(pull[fakes], weights=events.weights[fakes])
        own = events.weights[true]
        history.append(
            OmniFoldIteration(
                iteration=k + 1,
                separation_reco=at_reco.separation,
                norm_reco=at_reco.norm,
                norm_truth=at_truth.norm,
                change=float((own * np.abs(nu - before)[true]).sum() / (own * nu[true]).sum()),
                effective_sample_size=_effective(own * nu[true]),
                fake_scale=float(nu[fakes][0]) if fakes.any() else 1.0,
            )
        )
    if warn:
        _warn_few(history[-1].effective_sample_size, int(true.sum()))
    return OmniFold(
        weights=np.where(true, events.weights * nu, 0.0),
        factors=nu,
        nominal=events.weights,
        truth=events.truth,
        truth_pass=true,
        history=tuple(history),
        smooth=smooth,
        seed=seed,
    )


def _estimator(events: Events, settings: Settings, seed: int, step: str, smooth: bool = False) -> RatioEstimator:
    return RatioEstimator(
        events.reco.shape[1] if step == "reco" else events.truth.shape[1],
        seed=seed_for(seed, "omnifold", step),
        n_ensemble=settings.n_ensemble,
        smooth=smooth,
        network=settings.network,
        config=settings.config,
        device=settings.device,
    )


def _reco_rows(events: Events, nu: Array) -> tuple[Array, Array, Array]:
    """Rows of step 1: data, then reconstructed events under their present weights, then background."""
    seen = events.reco_pass
    simulated = np.concatenate([(events.weights * nu)[seen], events.background_weights])
    x = np.concatenate([events.data, events.reco[seen], events.background])
    w1 = np.concatenate([events.data_weights, np.zeros(len(simulated))])
    return x, w1, np.concatenate([np.zeros(len(events.data)), simulated])


def _effective(weights: Array) -> float:
    """Effective number of events, (sum w)^2 / sum w^2."""
    return float(weights.sum() ** 2 / (weights**2).sum())


def _warn_far(events: Events, ratio: RatioEstimator) -> None:
    """Warn where the first classifier finds data and hardly any simulation: the ranges may agree where the distributions do not overlap."""
    far = ratio.log_ratio(events.data) > _FAR
    if far.mean() > _FAR_SHARE:
        places = [f"column {j} in [{c.min():.4g}, {c.max():.4g}]" for j, c in enumerate(events.data[far].T[:6])]
        warnings.warn(
            f"{far.sum()} of {len(far)} data events lie where the data are over {np.exp(_FAR):.0f} times denser than the simulation: "
            f"{', '.join(places)}; expected simulated events there",
            RuntimeWarning,
            stacklevel=4,
        )


def _warn_few(effective: float, n: int) -> None:
    if effective < _LOW_SIZE * n:
        warnings.warn(
            f"the effective number of events is {effective:.0f} of {n}: a few simulated events dominate the result; "
            "expected a simulation nearer to the data",
            RuntimeWarning,
            stacklevel=4,
        )


def bootstrap_omnifold(
    truth: ArrayLike,
    reco: ArrayLike,
    data: ArrayLike,
    n_iterations: int = 4,
    reco_pass: ArrayLike | None = None,
    truth_pass: ArrayLike | None = None,
    *,
    n_replicas: int = 20,
    data_weights: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    background: ArrayLike | None = None,
    background_weights: ArrayLike | None = None,
    fit_fakes: bool = False,
    smooth: bool | None = None,
    n_ensemble: int = 1,
    seed: int = 0,
    device: str | torch.device = "auto",
    config: TrainConfig | None = None,
    network: EmbeddingConfig | None = None,
    progress: Progress | None = None,
) -> WeightReplicas:
    """OmniFold once, and n_replicas times each with data, simulation and the networks' seeds varied, one at a time.

    Args: n_replicas: >= 2; 3 n_replicas + 1 unfoldings are run, one after the other. The others are those of `omnifold`.
    Returns: WeightReplicas.   Raises: what `omnifold` raises.   Source: `replicas`.
    Read: `.histogram(truth[:, 0], edges)` gives unfolded counts with covariances from data, simulation and training apart.

    >>> import numpy as np
    >>> from sbi_phys.training import TrainConfig
    >>> from sbi_phys.unfold import bootstrap_omnifold
    >>> rng, quick = np.random.default_rng(1), TrainConfig(max_epochs=1)
    >>> truth = rng.normal(size=120)
    >>> reco, data = truth + 0.3 * rng.normal(size=120), rng.uniform(-1.5, 1.5, size=100)
    >>> replicas = bootstrap_omnifold(truth, reco, data, 1, n_replicas=2, config=quick, device="cpu")
    >>> replicas.data.shape
    (2, 120)
    """
    n_replicas, seed = require_int("n_replicas", n_replicas, low=2), require_int("seed", seed, low=0)
    events = check_events(truth, reco, data, reco_pass, truth_pass, data_weights, weights, background, background_weights)
    settings = check_settings(n_iterations, n_ensemble, device, config, network, fit_fakes, smooth)

    def unfolded(sample: Sample, member: int) -> Array:
        counts, expected = sample.data, sample.background
        # nominal weights are scaled to the replica's data as they were to the data
        scale = max(counts.sum() - expected.sum(), 1e-3 * counts.sum()) / sample.simulation[events.reco_pass].sum()
        own = {"weights": scale * sample.simulation, "scale": scale * events.scale}
        varied = events if sample is nominal else replace(events, data_weights=counts, background_weights=expected, **own)
        return unfold_events(varied, settings, seed=member, task=task).weights

    total = 2 * settings.n_iterations * settings.n_ensemble * (3 * n_replicas + 1)
    with or_none(progress).task("bootstrap omnifold", total) as task:
        result = unfold_events(events, settings, seed=seed, task=task, warn=True)
        nominal = Sample(events.weights, events.data_weights, events.background_weights)
        replicas = bootstrap(unfolded, nominal, n_replicas, seed, ("bootstrap",), ())
    return WeightReplicas(weights=result.weights, truth_pass=result.truth_pass, **replicas)
