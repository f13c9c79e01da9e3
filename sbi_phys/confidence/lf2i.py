r"""Likelihood-free frequentist sets: a construction whose critical values are learned, {theta: q(D; theta) <= C_level(theta)}.

    theta_i ~ any prior, D_i ~ p(D | theta_i), q_i = q(D_i; theta_i)     one sample, as large as can be had
    sets = lf2i(theta, q, statistic, level=0.9)                          quantile regression of q on theta
    inside_j = sets.contains(D_j, theta_j)                               a second sample
    coverage_map(theta_j, inside_j, 0.9)                                 does it cover, everywhere?

One simulation per theta is enough: the regression borrows from its neighbours what a Neyman construction spends toys on.

With nuisances that are profiled, C is taken at (psi_i, nu_i), nu_i those that fit D_i best at psi_i, instead of at theta_i. Given all nu_i,
the sample tells what that does, and corrects it: the level-quantile of q_i - C(psi_i, nu_i) at theta_i would be 0 everywhere were the
plug-in right; regressed on theta it is added to C, and so on for some rounds (`nuisances` does the same with toys). For p-values
the next regression is of 1 - P(psi_i, nu_i) in the place of q_i.

Source: Dalmasso et al. 2021, arXiv:2107.03920; Masserano et al. 2023, arXiv:2205.15680; corrections: Beran 1988 JASA 83, 687.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.inputs import check_names
from sbi_phys.confidence.critical_values import CriticalValues, PValues, learn_critical_values, learn_pvalues
from sbi_phys.confidence.inputs import Bounds, as_points, check_bounds, check_levels, check_statistic, nearest_level, require_within
from sbi_phys.confidence.sets import Construction, Profile, Statistic
from sbi_phys.core.checks import as_array, require_int
from sbi_phys.core.errors import SettingError
from sbi_phys.core.figures import figures
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LF2I", "lf2i"]

Curve = Callable[[Array], Array]

PROJECTION = 8  # points per nuisance over which a set without a profile is projected


@dataclass(frozen=True, kw_only=True, eq=False)
class LF2I(Construction):
    """Confidence sets with learned critical values; `critical_models`, one CriticalValues per level; p-values, and their corrections."""

    critical_models: tuple[CriticalValues, ...]
    pvalues: PValues | None
    corrections: tuple[PValues, ...] = ()

    def critical(self, theta: ArrayLike, level: float | None = None) -> Array:
        """Critical values C (m,) at theta (m, d).   Raises: SupportError beyond the sample's box, SettingError, ShapeError."""
        points = as_points("theta", theta, self.dim, self.names)
        return self.critical_models[nearest_level(level, self.levels)].at(points)

    def _tail(self, q: Array, theta: Array) -> Array:
        if self.pvalues is None:
            raise SettingError("p-values were not learned; expected lf2i(..., pvalues=True)")
        return _chain((self.pvalues, *self.corrections), q, theta)

    def _nuisances(self) -> Array:
        axes = [np.linspace(a, b, PROJECTION) for a, b in zip(self.low[self.interest :], self.high[self.interest :], strict=True)]
        return np.stack([m.ravel() for m in np.meshgrid(*axes, indexing="ij")], axis=-1)

    def contains_each(self, data: Any, theta: ArrayLike, level: float | None = None) -> Mask:
        """Whether each data set's set holds its own theta, rows (n, d): what `coverage_map` asks for; all parameters of interest.

        Draw these theta from a box a little smaller than the first sample's: what lies beyond that is refused.
        Raises: SupportError, ShapeError, NonFiniteError.
        """
        if self.profile is not None:
            raise SettingError("with profiled nuisances each theta needs its own call; expected contains(data, psi), psi by psi")
        points = as_points("theta", theta, self.dim, self.names)
        q = check_statistic(self.statistic(data, points), points.shape[0], "row by row")
        require_within("theta", points, self.low, self.high, self.names)
        return q <= self.critical(points, level)

    def summary(self) -> str:
        """Return in words which regressions were taken."""
        return "\n".join([f"learned confidence sets in {', '.join(self.names)}", *(f"  {m.summary()}" for m in self.critical_models)])

    def plot(self, ax: "Axes | None" = None, *, level: float | None = None) -> "Axes":
        """Draw the critical values along the first parameter, the others at the middle and at both ends, over Wilks' value."""
        return figures.confidence.learned_critical_values(self, ax, nearest_level(level, self.levels))


def lf2i(
    theta: ArrayLike,
    q: ArrayLike,
    statistic: Statistic,
    level: float | Sequence[float] = 0.9,
    *,
    names: Sequence[str | Parameter] | None = None,
    interest: int | None = None,
    profile: Profile | None = None,
    bounds: Bounds | None = None,
    model: str = "auto",
    pvalues: bool = False,
    profiled: ArrayLike | None = None,
    rounds: int = 3,
    seed: int = 0,
) -> LF2I:
    r"""Confidence sets {theta: q(D; theta) <= C_level(theta)} with critical values learned from (theta_i, q_i).

    Args:
        theta: (n, d), filling the space where sets are wanted, parameters of interest first.
        q: (n,), q(D_i; theta_i) of simulations.
        statistic: (data of n sets, theta (d,)) -> (n,), the same as q was made with; large where theta is bad.
        level: confidence level, or several (one regression each).
        names: d names or Parameters.
        interest: number of leading parameters that are wanted; the others are nuisances. None = all.
        profile: as in `neyman`; without one, nuisances are projected over 8 values each.
        bounds: physical bounds (low or None, high or None) per parameter.
        model: as in `learn_critical_values`.
        pvalues: learn p-values too.
        profiled: (n, d - interest), `profile` of each simulation at its own psi: critical values are corrected for being taken there.
        rounds: of that correction, each a regression.
        seed: of folds and trees.

    Returns: LF2I.
    Raises: as `learn_critical_values`; SettingError.   Source: arXiv:2107.03920.
    """
    levels = check_levels(level)
    array = np.asarray(theta)
    dim = 1 if array.ndim <= 1 else int(array.shape[1])
    plain, labels = check_names(names, dim)
    wanted = dim if interest is None else require_int("interest", interest, low=1, high=dim)
    if profile is not None and wanted == dim:
        raise SettingError(f"profile is given but all {dim} parameters are of interest; expected interest < {dim}")
    if profiled is not None and profile is None:
        raise SettingError("profiled is given without a profile; expected both")
    q = as_array("q", q, (None,))
    models = [learn_critical_values(theta, q, a, names=plain, bounds=bounds, model=model, seed=seed) for a in levels]
    tails = [learn_pvalues(theta, q, names=plain, bounds=bounds, seed=seed)] if pvalues else []
    if profiled is not None:
        for _ in range(require_int("rounds", rounds, low=0)):
            models, tails = _corrected(models, tails, as_points("theta", theta, dim, plain), q, (profiled, wanted), bounds, seed)
    return LF2I(
        names=plain, labels=labels, interest=wanted, levels=levels, low=models[0].low, high=models[0].high,
        bounds=check_bounds(bounds, models[0].low, models[0].high), statistic=statistic, profile=profile,
        method="learned critical values", critical_models=tuple(models), pvalues=tails[0] if tails else None, corrections=tuple(tails[1:]),
    )  # fmt: skip


def _corrected(
    models: list[CriticalValues], tails: list[PValues], theta: Array, q: Array, nuisances: tuple[ArrayLike, int], bounds: Bounds | None,
    seed: int,
) -> tuple[list[CriticalValues], list[PValues]]:  # fmt: skip
    """Critical values plus what they lack where they are taken at the profiled nuisances and should hold at theta; p-values alike."""
    n, dim = theta.shape
    profiled, k = nuisances
    best = as_array("profiled", np.reshape(np.asarray(profiled), (n, -1)), (n, dim - k))
    seen = np.clip(np.concatenate([theta[:, :k], best], axis=1), models[0].low, models[0].high)
    names, better = models[0].names, []
    for model in models:
        lack = learn_critical_values(theta, q - model.curve(seen), model.level, bounds=bounds, model=model.model, seed=seed)
        better.append(replace(model, curve=_Sum(model.curve, lack.curve)))
    if tails:
        tails = [*tails, learn_pvalues(theta, 1 - _chain(tuple(tails), q, seen), names=names, bounds=bounds, seed=seed)]
    return better, tails


@dataclass(frozen=True, slots=True, eq=False)
class _Sum:
    """Sum of two curves."""

    first: Curve
    second: Curve

    def __call__(self, points: Array) -> Array:
        """Values (m,) at points (m, d)."""
        return self.first(points) + self.second(points)


def _chain(parts: tuple[PValues, ...], q: Array, theta: Array) -> Array:
    """p-values (n,) of q (n,) by the first part, each further one of 1 - p of that before."""
    p = parts[0].at(q, theta)
    for part in parts[1:]:
        p = part.at(1 - p, theta)
    return p
