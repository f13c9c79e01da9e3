"""What the methods of `sbi-phys unfold` get and give: settings, a task, an answer in one form."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sbi_phys.core.checks import require_int, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.core.progress import Progress
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array
from sbi_phys.unfold.measurement import Measurement
from sbi_phys.unfold.response import Response

__all__ = ["TITLES", "Answer", "Task", "UnfoldSettings"]


TITLES = {
    "folding": "forward folding",
    "ibu": "iterative Bayes",
    "tikhonov": "Tikhonov",
    "bayes": "Bayesian posterior",
    "omnifold": "OmniFold",
    "flow": "event-wise flow",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class UnfoldSettings:
    """Settings of `sbi-phys unfold`.   Raises: SettingError.

    Args: seed. n_toys: of the stopping rule of iterative Bayes, per prior. coverage: that it asks of the worst bin. n_breaks: of the
    fitted flux, -1 = the problem's own. n_simulated: events of the learned methods. omnifold_iterations, flow_iterations.
    omnifold_replicas, flow_replicas: of the data, for their covariance. bayes_samples: spectra drawn. bayes_smoothness: 1/sigma of the
    curvature of log n, 0 = learned from the data. validate_toys: toys on which the binned methods are tested, 0 = none.
    """

    seed: int = 0
    n_toys: int = 300
    coverage: float = 0.60
    n_breaks: int = -1
    n_simulated: int = 16_384
    omnifold_iterations: int = 4
    omnifold_replicas: int = 10
    flow_iterations: int = 2
    flow_replicas: int = 4
    bayes_samples: int = 4_000
    bayes_smoothness: float = 0.0
    validate_toys: int = 100

    def __post_init__(self) -> None:
        """Check ranges."""
        lowest = {"seed": 0, "n_toys": 50, "n_breaks": -1, "n_simulated": 1000, "bayes_samples": 100, "validate_toys": 0}
        for name, low in lowest.items():
            require_int(name, getattr(self, name), low=low)
        for name in ("omnifold_iterations", "flow_iterations"):
            require_int(name, getattr(self, name), low=1)
        for name in ("omnifold_replicas", "flow_replicas"):
            require_int(name, getattr(self, name), low=2)
        require_number("coverage", self.coverage, low=0, high=0.68, open_low=True)
        require_number("bayes_smoothness", self.bayes_smoothness, low=0)
        if 0 < self.validate_toys < 20:
            raise SettingError(f"validate_toys is {self.validate_toys}; expected 0 for none, or at least 20")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a method says of the r measured bins.

    counts (r,), true events. covariance (r, r), everything that it knows of; parts, its shares by source. refolded (r,), expected counts.
    effective: parameters that the fit has used up, None = not known. samples (n, r): draws of the spectrum, or None. words: in short.
    numbers: plain values; arrays: further ones, by name. figures: matplotlib Axes, by name.
    """

    counts: Array
    covariance: Array
    refolded: Array
    parts: dict[str, Array] = field(default_factory=dict)
    effective: float | None = None
    samples: Array | None = None
    words: str = ""
    numbers: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Array] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a method gets: measurement, settings, spectrum (f,) of the fit in fine true bins with the responses it makes, prior (f,).

    theta (p,): parameters of the fitted flux; empty: the spectrum comes from elsewhere and is not fitted to replicas.
    """

    measurement: Measurement
    settings: UnfoldSettings
    spectrum: Array
    prior: Array
    theta: Array = field(default_factory=lambda: np.zeros(0))
    progress: Progress | None = None

    @property
    def extended(self) -> Response:
        """Response of all true bins."""
        return self.measurement.extended(self.spectrum)

    @property
    def within(self) -> Response:
        """Response of the measured bins, the rest as a share of each."""
        return self.measurement.within(self.spectrum)

    @property
    def start(self) -> Array:
        """Prior in the true bins (t,)."""
        return self.measurement.coarse(self.prior)

    def seed(self, *key: str | int) -> int:
        """Seed of a place in the work."""
        return seed_for(self.settings.seed, "unfold", *key)
