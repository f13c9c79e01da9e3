r"""OmniFold: unbinned unfolding by reweighting simulated events with classifiers.

With simulated pairs (t_i, r_i), nominal weights w_i and data x_j, starting from nu_i = 1:

    step 1   pull_i = nu_i rho(r_i),   rho(r) = p_data(r) / [p_sim(r; w nu) + p_background(r)]
    step 2   nu(t)  = E[pull | t, reconstructed],                                                    repeated.

It is expectation maximisation, iterative Bayesian unfolding without bins: after k iterations it has the same regularisation.

Acceptance. Missed events (reco_pass False) have no pull. Weight 1 in its place is biased, for ever; their last weight is right, but
slow where the efficiency is low. Here step 2 is trained on reconstructed events alone, w pull against w, and its ratio holds for
every event at that truth: missed events get the mean weight at their truth. This is what the division by the efficiency is in bins.

Where the efficiency is near 0, the ratio of step 2 is extrapolated, and a fluctuation of few events at the edge of what is measured would
move it by any factor. If it is below a tenth of its mean for a twentieth of the events, the ratio is exp(quadratic form + correction), the
correction as large as the evidence asks for (`classifier`). If nature over simulation is near to such a form, the answer there is a good
one; if not, it is this assumption: narrow structures at the limit of significance are smoothed.

Fakes (truth_pass False, reconstructed) have no truth to follow. They keep their nominal weight: shape and share of what is measured are
the simulation's, as with `Response.fakes`. Fitted with the signal (fit_fakes; the mean pull over fakes, as if they all had one truth)
their number hangs on the small difference of two broad shapes: expectation maximisation takes a part of them for signal in the first
iteration and does not give it back in fifty. In the tests' toy, a tenth of fakes, 17 % of them are lost, with any number of events.

Background, absolute and not among the pairs, is added to the simulation's side of step 1 with the counts expected. On the data's side
it would need negative weights, under which a classifier's loss has no lower bound.

Normalisation: weights add up to the unfolded number of events, efficiency-corrected: with the nominal scale of the simulation lost.

Source: Andreassen+ 2020, arXiv:1911.09107 (OmniFold), 2105.04448 (acceptance and efficiency).
"""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sbi_phys.core.checks import require_int
from sbi_phys.core.device import resolve_device
from sbi_phys.core.errors import SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress, Task, or_none
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.loop import TrainConfig
from sbi_phys.unfold.classifier import RatioEstimator
from sbi_phys.unfold.omnifold_inputs import Events, check_events, lowest_efficiency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["OmniFold", "OmniFoldIteration", "omnifold"]


_FAR = 7.0  # log ratio of data over simulation that says: hardly any simulation here
_FAR_SHARE = 0.001
_SELDOM = 0.1  # share of the mean efficiency below which the weights of a twentieth of the events are extrapolated, not learned
_LOW_SIZE = 0.01  # effective share of the events below which a handful of them is the answer


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniFoldIteration:
    """What one iteration did.

    separation_reco: Jensen-Shannon divergence left between data and the folded simulation before the iteration, nats (held-out events);
    near 0 the iterations have converged at reco. norm_reco, norm_truth: normalisation of the two ratios before it was set right; far
    from 1 a classifier has not been trained well. change: mean |nu_new - nu_old| / mean nu_new over true events.
    effective_sample_size: (sum w)^2 / (n sum w^2). fake_scale: factor of all fakes.
    """

    iteration: int
    separation_reco: float
    norm_reco: float
    norm_truth: float
    change: float
    effective_sample_size: float
    fake_scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class OmniFold:
    """Unfolded weights of simulated events.

    weights (n,), unfolded counts: any histogram, mean or quantile of `truth` under them is the unfolded one; 0 for events that are not
    true (truth_pass False). factors (n,): what the nominal weights (scaled to the data) were multiplied by, fakes included: `nominal *
    factors` of the reconstructed events, with the background, is what the data look like if the result is right.
    nominal (n,). truth (n, d). truth_pass (n,). history: one record per iteration. smooth: whether step 2's ratio was a quadratic form
    and what the evidence asked for beyond it. seed.
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
        """Share of the true events that the weights are worth: (sum w)^2 / (n sum w^2), 1 for equal weights."""
        return _effective(self.weights[self.truth_pass])

    @property
    def n_iterations(self) -> int:
        """Number of iterations done."""
        return len(self.history)

    def summary(self) -> str:
        """Return the result in words."""
        last = self.history[-1]
        total, n = self.weights.sum(), int(self.truth_pass.sum())
        lines = [
            f"OmniFold, {self.n_iterations} iterations: {total:.6g} unfolded events on {n} simulated ones, "
            f"effective share {self.effective_sample_size:.3f}",
            f"before the last iteration data and folded simulation differed by {last.separation_reco:.2g} nats (Jensen-Shannon, held out); "
            f"its weights moved by {100 * last.change:.2g} %",
        ]
        if self.smooth:
            lines.append("ratios of the truth are a quadratic form with as much correction as the evidence asks for (smooth)")
        if max(abs(last.norm_reco - 1), abs(last.norm_truth - 1)) > 0.02:
            lines.append(f"the ratios' norms were {last.norm_reco:.3f} and {last.norm_truth:.3f}; expected 1: train longer")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return settings and history as plain values, for a file's attributes or a report."""
        return {
            "method": "omnifold",
            "seed": self.seed,
            "n_iterations": self.n_iterations,
            "smooth": self.smooth,
            "effective_sample_size": self.effective_sample_size,
            "history": [asdict(record) for record in self.history],
        }

    def plot(self, ax: "Axes | None" = None, *, column: int = 0, bins: int | Sequence[float] = 40) -> "Axes":
        """Draw one column of the truth under the nominal and the unfolded weights.   Raises: SettingError."""
        column = require_int("column", column, low=0, high=self.truth.shape[1] - 1)
        return figures.unfold_bayes.omnifold_column(self, column, bins, ax)


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

    Args: truth (n, d), reco (n, k): simulated pairs, any units (logarithms of what is steep). data (m, k): measured events.
    n_iterations: more removes more of the simulation's prior and adds noise. reco_pass (n,): reconstructed; where False, reco may be
    NaN. truth_pass (n,): has a truth; where False the event is a fake and truth may be NaN.
    data_weights (m,), weights (n,): >= 0. background (b, k), background_weights (b,): expected counts that the pairs do not contain.
    fit_fakes: let the number of fakes follow the data; only where their shape at reco is quite another than the signal's.
    smooth: step 2's ratio is a quadratic form and what the evidence asks for beyond it; None: where the efficiency is near 0.
    n_ensemble: classifiers per step, their log ratios averaged. config, network: of each classifier; None chooses them.

    Returns: OmniFold.   Raises: ShapeError, NonFiniteError, DataError (too few events, efficiency 0, no overlap, negative weights),
    SettingError. Warns, naming the place, where data lie outside the simulation and where nothing is reconstructed.
    Source: arXiv:1911.09107.   Read: `np.histogram(truth, weights=result.weights)` is the unfolded spectrum; errors: `bootstrap_omnifold`.
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
        at_both, limit = events.weights[both], at_reco.n_effective  # what step 2 sees of the data came through step 1
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
    """(sum w)^2 / (n sum w^2)."""
    return float(weights.sum() ** 2 / (len(weights) * (weights**2).sum()))


def _warn_far(events: Events, ratio: RatioEstimator) -> None:
    """Warn where the first classifier finds data and hardly any simulation: overlap can be missing without any range showing it."""
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
    if effective < _LOW_SIZE:
        warnings.warn(
            f"the weights are worth {effective * n:.0f} of {n} events: a few simulated events carry the answer; "
            "expected a simulation nearer to the data",
            RuntimeWarning,
            stacklevel=4,
        )
