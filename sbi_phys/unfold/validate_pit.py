r"""Event-wise proof: is the truth of an event a fair draw from what q(truth | reco) says of that event?

The rank of each true value among l draws for its own event is uniform on 0..l if and only if, on average over events, q is right;
right marginals of the unfolded spectrum prove nothing about event posteriors. Of two quantities the product

    (t_a - m_a)(t_b - m_b),   m = mean of draws and truth of the event,

is ranked as well: it is what a wrong correlation within the events' posteriors moves. With the measured quantities the ranks are also
regressed on them, which finds a q that is right on average over events and wrong in places.

Source: Talts et al. 2018, arXiv:1804.06788 (ranks); Zhao et al. 2021, arXiv:2102.10473 (regression).
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.calibration.inputs import check_names, check_pairs, combine
from sbi_phys.calibration.pit import PITRegression, pit_regression
from sbi_phys.calibration.sbc import SBC, sbc
from sbi_phys.core.types import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EventPIT", "event_pit"]


MAX_PAIRS = 10  # of truth quantities whose products are ranked


@dataclass(frozen=True, kw_only=True, slots=True)
class EventPIT:
    """Ranks of the events' truths: `sbc` of each quantity and of products of two; `regression` of ranks on reco, or None."""

    sbc: SBC
    regression: PITRegression | None

    @property
    def pvalue(self) -> float:
        """Of both together: the smaller, times two if there are two."""
        both = {"ranks": self.sbc.pvalue} | ({} if self.regression is None else {"regression": float(self.regression.pvalue)})
        return combine(both)

    def summary(self) -> str:
        """Return the result in words."""
        return self.sbc.summary() if self.regression is None else f"{self.sbc.summary()}\n{self.regression.summary()}"

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the ranks' distribution minus the uniform one, with its band.   Read: inside the band = calibrated."""
        return self.sbc.plot(ax)


def event_pit(
    truth: ArrayLike, draws: ArrayLike, reco: ArrayLike | None = None, names: Sequence[str] | None = None, *, seed: int = 0
) -> EventPIT:
    r"""Ranks of the truths of n events among l draws of q(truth | reco) for each, and their dependence on reco.

    Args:
        truth: (n, d) or (n,), true values, that q was not trained on, of the spectrum that q has as its prior.
        draws: (n, l, d) or (n, l), e.g. `FlowUnfolder.sample(reco, l)`; same units.
        reco: (n, k) or (n,), measured quantities to look for dependence on; None = ranks alone.
        names: d names.
        seed: of ties and of the simulated null of the regression.

    Returns: EventPIT.
    Raises: ShapeError, NonFiniteError, DataError (fewer than 10 events or 2 draws), SettingError.
    Source: arXiv:1804.06788, 2102.10473.
    Read: p < 0.05 = the event posteriors are wrong; the summary says whether they are shifted, too narrow, or wrong in correlation.
    """
    theta, samples = check_pairs(truth, draws)
    plain, _ = check_names(names if names is not None else [f"truth_{j}" for j in range(theta.shape[1])], theta.shape[1])
    together = np.concatenate([theta[:, None], samples], axis=1)  # the truth is one of l + 1 exchangeable values
    moved = together - together.mean(axis=1, keepdims=True)
    products = {}
    for a, b in itertools.islice(itertools.combinations(range(theta.shape[1]), 2), MAX_PAIRS):
        product = moved[:, :, a] * moved[:, :, b]
        products[f"{plain[a]} x {plain[b]}"] = (product[:, 0], product[:, 1:])
    ranks = sbc(theta, samples, plain, products, seed=seed)
    regression = None if reco is None else pit_regression(theta, samples, np.asarray(reco), names=plain, seed=seed)
    return EventPIT(sbc=ranks, regression=regression)
