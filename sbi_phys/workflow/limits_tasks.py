"""What `sbi-phys limits RUN` is asked for, and the test statistics of a trained run; `limits` makes sets of them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from sbi_phys.confidence import RefinedLRT, posterior_moments, waldo
from sbi_phys.confidence.inputs import check_levels
from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array, Integers
from sbi_phys.estimators.base import load
from sbi_phys.workflow.run import Run

__all__ = ["STATISTICS", "LimitsSettings", "PosteriorWaldo", "make_statistic", "require_model"]


STATISTICS = {"waldo": "WALDO from the posterior", "nre": "learned ratio", "nle": "learned likelihood", "exact": "exact likelihood ratio"}
DRAWS = 400  # of a posterior, for its mean and covariance


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitsSettings:
    """What is asked for.

    Args: parameters: one name, or two for a joint set. statistic: 'waldo', 'nre', 'nle' or 'exact'. levels. kind: 'two-sided', 'upper'
    or 'lower' (for one parameter). n: simulations. physical: 'none', 'low', 'high' or 'both': ends of the first parameter's range that are
    bounds of nature, where a set may stop. open_ends: an end that runs into the range becomes infinite, instead of an error. value:
    of the parameter, whose p-value is asked for. critical: regression of the critical values, as in `learn_critical_values`.
    Raises: SettingError.
    """

    parameters: tuple[str, ...]
    statistic: str = "waldo"
    levels: tuple[float, ...] = (0.683, 0.9)
    kind: str = "two-sided"
    n: int = 5_000
    physical: str = "none"
    open_ends: bool = False
    value: float | None = None
    critical: str = "auto"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if len(self.parameters) not in (1, 2) or len(set(self.parameters)) != len(self.parameters):
            raise SettingError(f"parameters are {', '.join(self.parameters) or 'none'}; expected one name, or two different ones")
        require_choice("--statistic", self.statistic, STATISTICS)
        object.__setattr__(self, "levels", check_levels(self.levels))
        require_choice("--kind", self.kind, ("two-sided", "upper", "lower"))
        require_choice("--physical", self.physical, ("none", "low", "high", "both"))
        if self.kind != "two-sided" and len(self.parameters) > 1:
            raise SettingError(f"--kind is {self.kind!r}; expected 'two-sided' with two parameters")
        if self.kind != "two-sided" and min(self.levels) <= 0.5:
            raise SettingError(f"--level is {min(self.levels):g}; expected more than 0.5 for a one-sided limit")
        require_int("--n", self.n, low=400)
        if self.value is not None:
            require_number("--value", self.value)
            if len(self.parameters) > 1:
                raise SettingError("--value was given with two parameters; expected it with one")

    @property
    def name(self) -> str:
        """What the files of this call are called."""
        return "_".join((*self.parameters, self.statistic, *(() if self.kind == "two-sided" else (self.kind,))))


def require_model(run: Run, settings: LimitsSettings) -> None:
    """Refuse a statistic that the folder, the simulator or the number of parameters does not allow.   Raises: SettingError."""
    if settings.statistic == "exact":
        if not callable(getattr(run.simulator, "log_likelihood", None)):
            raise SettingError(f"--statistic is 'exact', but {run.config.simulator.spec} has no log_likelihood; expected waldo, nre or nle")
    else:
        file, method = {"waldo": ("model.pt", "npe")}.get(settings.statistic, (f"model_{settings.statistic}.pt", settings.statistic))
        if not run.path(file).is_file():
            raise SettingError(
                f"--statistic is {settings.statistic!r}, but {run.path(file)} is not there; expected it trained: "
                f"sbi-phys train --method {method} --out {run.folder}"
            )
    if settings.statistic != "waldo" and run.simulator.prior.free_dim != len(run.names):
        raise SettingError(
            f"--statistic is {settings.statistic!r} with the parameters {', '.join(run.names)}, some of them fixed by the others; expected "
            "waldo: a likelihood's maximum is searched for in a box"
        )


class PosteriorWaldo:
    """WALDO of the parameters of interest from an amortised posterior; nuisances at their best values given psi, were it Gaussian."""

    def __init__(self, run: Run, order: list[int], interest: int, low: Array, high: Array, kind: str) -> None:
        self.npe = load(run.path("model.pt"), simulator=run.simulator, device=run.config.run.device)
        self.seed, self.order, self.interest = run.seed("limits", "waldo"), order, interest
        self.low, self.high, self.kind = low, high, kind

    def prepare(self, data: Any) -> tuple[Array, Array]:
        """Posterior mean (n, d) and covariance (n, d, d), once for any number of psi."""
        return posterior_moments(self.npe.sample(np.asarray(data), DRAWS, seed=self.seed)[..., self.order])

    def __call__(self, data: Any, psi: Any) -> Array:
        """Values (n,) at psi (interest,) or row by row; further columns are left out."""
        mean, spread = data if isinstance(data, tuple) else self.prepare(data)
        k = self.interest
        return waldo(mean[:, :k], spread[:, :k, :k], np.atleast_1d(psi)[..., :k], self.kind)

    def repeated(self, data: Any, m: int) -> tuple[Array, Array]:
        """Moments of one data set m times, from the same draws."""
        mean, spread = self.prepare(data)
        return np.repeat(mean, m, axis=0), np.repeat(spread, m, axis=0)

    def nuisance(self, data: Any, psi: Any) -> Array:
        """E[nu | x, psi] (n, d - interest) of a Gaussian posterior, within the box."""
        mean, spread = data if isinstance(data, tuple) else self.prepare(data)
        k = self.interest
        gain = np.linalg.solve(spread[:, :k, :k], (np.atleast_1d(psi)[..., :k] - mean[:, :k])[..., None])
        best = mean[:, k:] + (spread[:, k:, :k] @ gain)[..., 0]
        return np.clip(best, self.low[k:], self.high[k:])


def make_statistic(run: Run, settings: LimitsSettings, order: list[int], low: Array, high: Array) -> Any:
    """The test statistic over the box low..high (d,), parameters in this order, those of interest first."""
    k = len(settings.parameters)
    if settings.statistic == "waldo":
        return PosteriorWaldo(run, order, k, low, high, settings.kind)
    back = np.argsort(order)
    if settings.statistic == "exact":
        density: Any = run.simulator.log_likelihood  # type: ignore[attr-defined]
    else:
        model = load(run.path(f"model_{settings.statistic}.pt"), simulator=run.simulator, device=run.config.run.device)
        density = model.log_likelihood if settings.statistic == "nle" else model.log_ratio
    rows = partial(_rows, density, back)
    names = tuple(run.names[i] for i in order)
    return RefinedLRT(log_likelihood=rows, low=low, high=high, names=names, interest=k, kind=settings.kind)


def _rows(density: Any, back: Integers, x: Array, theta: Array) -> Array:
    return np.asarray(density(x, theta[:, back]), dtype=np.float64)
