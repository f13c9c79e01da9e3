r"""Local classifier two-sample test: is the posterior right at THIS observation?

A classifier d(theta, x) learns to tell the joint (theta, x), class 1, from (theta_q, x) with theta_q ~ q(. | x), class 0, over n
calibration simulations. Where q is the posterior nothing can be learned and d = 1/2. At an observation x_o the statistic is

    T(x_o) = 1/M sum_m (d(theta_m, x_o) - 1/2)^2,   theta_m ~ q(. | x_o),

compared with that of classifiers trained where the hypothesis holds: p = (1 + #{T_null >= T}) / (H + 1), of the right size whatever
the classifier. With the flow's latent variables z = f(theta; x) the hypothesis reads z ~ N(0, I) independent of x; the null is
simulated. With draws it reads that truth and draw of a row may be exchanged. Either way it serves every observation:
`train_lc2st` trains once, `.at(x_obs)` costs milliseconds.

What d has learned is put in words: r = d / (1 - d) estimates p(theta | x_o) / q(theta | x_o), so draws of q weighted with r
show the posterior as the calibration simulations would have it, and its mean and width are compared with those of q.

Size is exact under the hypothesis that q is right at every x; the test's power is local, its null is not. A smooth classifier carries
what it learned at neighbouring x to x_o.

Source: Linhart, Gramfort & Rodrigues 2023, arXiv:2306.03580. Within-row exchange in the place of a permutation over rows: theta and
theta_q are exchangeable given their own x only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration.inputs import ALPHA, check_names, verdict_words
from sbi_phys.calibration.lc2st_features import Reduction, Residuals, affordable, reduction, residuals, whitened
from sbi_phys.calibration.lc2st_fit import Classifier, check_kind, fit_all
from sbi_phys.core.checks import as_array, as_real, require_choice, require_finite, require_int, require_same_rows
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LC2ST", "LC2STModel", "lc2st", "train_lc2st"]


MIN_PAIRS = 50
MIN_POINTS = 20
FAR = 3.0  # sd of a component of x beyond which the classifier extrapolates


@dataclass(frozen=True, kw_only=True, slots=True)
class LC2ST:
    r"""L-C2ST at one observation.

    statistic T(x_o) in [0, 1/4], and null (h,), the same of classifiers with nothing to learn. pvalue = (1 + #{null >= T}) / (h + 1).
    points (m, d), draws of q(. | x_o) (units of theta; of z if only latent variables are known), probability (m,) = d there, > 1/2
    where q has too little mass; band (m, 2), 95 % of null classifiers at that point. shift (d,), q's mean - the corrected mean in sd of q;
    width (d,), sd of q over the corrected sd; their errors from the null. Both are lower bounds where q hardly overlaps the posterior.
    n, calibration pairs. n_components of x used; farthest, largest component of x_obs in sd of the calibration simulations.
    latent, whether points, shift and width are those of latent variables.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    statistic: float
    null: Array
    pvalue: float
    points: Array
    probability: Array
    band: Array
    shift: Array
    shift_err: Array
    width: Array
    width_err: Array
    n: int
    n_components: int
    farthest: float
    latent: bool

    @property
    def verdicts(self) -> dict[str, str]:
        """What is wrong at x_obs per parameter: directions in which the classifier would move q by three standard errors or more."""
        if self.pvalue > ALPHA:
            return dict.fromkeys(self.names, "calibrated")
        # verdict_words asks for two; there are two directions for every parameter
        sizes = zip(self.shift, 1.5 * self.shift_err, self.width, 1.5 * self.width_err, strict=True)
        words = {name: verdict_words(*size) for name, size in zip(self.names, sizes, strict=True)}
        if all(word == "wrong shape" for word in words.values()):
            return words
        return {name: "nothing seen" if word == "wrong shape" else word for name, word in words.items()}

    def summary(self) -> str:
        """Return the result in words: one line for the test, one line per parameter."""
        found = "q is not the posterior at x_obs" if self.pvalue <= ALPHA else "no deviation found at x_obs"
        over = self.statistic / max(float(np.median(self.null)), 1e-300)
        lines = [
            f"L-C2ST, {self.n} simulations, {self.n_components} components of x: {found} "
            f"(p = {self.pvalue:.3g}, T = {self.statistic:.3g}, {over:.1f} x the null's median)"
        ]
        pad, room = max(map(len, self.names)), max(map(len, self.verdicts.values()))
        for j, (name, words) in enumerate(self.verdicts.items()):
            shape = f"shift {self.shift[j]:+.2f} +- {self.shift_err[j]:.2f} sd  width x{self.width[j]:.2f} +- {self.width_err[j]:.2f}"
            lines.append(f"  {name:<{pad}}  {words:<{room}}  {shape}")
        if self.latent:
            lines.append("  directions are those of latent variables; with draws_obs and latent_obs they are those of parameters")
        if self.farthest > FAR:
            lines.append(f"  x_obs lies {self.farthest:.1f} sd from the calibration simulations: few or none are near it")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, kind: str = "null", pair: tuple[int, int] = (0, 1)) -> "Axes":
        """Draw kind 'null' (statistic against its null) or 'map' (where q has too much and too little mass; `pair` of parameters).

        Raises: SettingError.
        """
        if require_choice("kind", kind, ("null", "map")) == "null":
            return figures.calibration_compare.lc2st_null(self, ax)
        dim = len(self.names)
        if dim > 1 and (len(pair) != 2 or pair[0] == pair[1] or any(not 0 <= j < dim for j in pair)):
            raise SettingError(f"pair is {pair}; expected two different columns of {self.names}")
        return figures.calibration_compare.lc2st_map(self, ax, pair)


@dataclass(frozen=True, kw_only=True, slots=True)
class LC2STModel:
    """Classifiers of `train_lc2st`, observed and null; `.at(x_obs)` tests at an observation, as many as wanted."""

    names: tuple[str, ...]
    labels: tuple[str, ...]
    n: int
    latent: bool
    reduce: Reduction
    frame: Residuals | None
    classifier: Classifier
    members: list[list[Any]]
    seed: int

    def at(
        self, x_obs: ArrayLike, draws_obs: ArrayLike | None = None, *, latent_obs: ArrayLike | None = None, n_points: int = 1000
    ) -> LC2ST:
        """Test at one observation.

        Args:
            x_obs: (k,), or a number if k = 1.
            draws_obs: (m, d), independent draws of q(. | x_obs), m >= 20 (1000 are enough); needed unless latent variables were given.
            latent_obs: (m, d), the latent variables that draws_obs were made from; with both, shift and width are those of theta.
            n_points: how many z ~ N(0, I) are drawn where neither is given.

        Returns: LC2ST.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
        """
        observed = as_real("x_obs", x_obs)
        observed = as_array("x_obs", observed.reshape(1) if observed.ndim == 0 else observed, (self.reduce.mean.size,), note="a row of x")
        u = self.reduce(observed[None])
        w, points = self._points(u, draws_obs, latent_obs, n_points)
        inputs = self.classifier.inputs(w, np.repeat(u, w.shape[0], axis=0))
        probability = np.stack([np.mean([m.predict_proba(inputs)[:, 1] for m in members], axis=0) for members in self.members])
        statistic = ((probability - 0.5) ** 2).mean(axis=1)
        shift, width = _moments(points, probability)
        return LC2ST(
            names=self.names,
            labels=tuple(f"latent {label}" for label in self.labels) if points is w else self.labels,
            statistic=float(statistic[0]),
            null=statistic[1:],
            pvalue=float((1 + (statistic[1:] >= statistic[0]).sum()) / statistic.size),
            points=points,
            probability=probability[0],
            band=np.quantile(probability[1:], [0.025, 0.975], axis=0).T,
            shift=shift[0],
            shift_err=shift[1:].std(axis=0),
            width=width[0],
            width_err=width[1:].std(axis=0),
            n=self.n,
            n_components=self.reduce.n_components,
            farthest=float(np.abs(u).max()),
            latent=points is w,
        )

    def _points(self, u: Array, draws_obs: ArrayLike | None, latent_obs: ArrayLike | None, n_points: int) -> tuple[Array, Array]:
        # -> (what the classifier takes, what is reported) at x_obs
        dim = len(self.names)
        draws = None if draws_obs is None else _columns("draws_obs", draws_obs, dim)
        if self.latent:
            if latent_obs is not None:
                w = _columns("latent_obs", latent_obs, dim)
                if draws is not None:
                    require_same_rows(latent_obs=w, draws_obs=draws)
                return w, w if draws is None else draws
            if draws is not None:
                raise SettingError("draws_obs without latent_obs; expected both (the classifier sees latent variables), or neither")
            rng = rng_for(self.seed, "lc2st points")
            w = rng.standard_normal((require_int("n_points", n_points, low=MIN_POINTS), dim))
            return w, w
        if draws is None or latent_obs is not None:
            raise SettingError("expected draws_obs (m, d), draws of q(. | x_obs), and no latent_obs: the classifier was trained on theta")
        if self.frame is not None:
            return self.frame(draws, np.repeat(u, draws.shape[0], axis=0)), draws
        return whitened(draws[None], draws[None])[0], draws


def lc2st(
    theta: ArrayLike | None,
    draws: ArrayLike | None,
    x: ArrayLike,
    x_obs: ArrayLike,
    *,
    draws_obs: ArrayLike | None = None,
    latent_theta: ArrayLike | None = None,
    latent_obs: ArrayLike | None = None,
    names: Sequence[str | Parameter] | None = None,
    classifier: Any = "quadratic",
    n_null: int = 100,
    n_ensemble: int = 1,
    max_components: int = 8,
    seed: int = 0,
    workers: int = 1,
) -> LC2ST:
    r"""L-C2ST at one observation: `train_lc2st(theta, draws, x, ...).at(x_obs, draws_obs, ...)`, see there for the arguments.

    Returns: LC2ST.   Raises: ShapeError, NonFiniteError, DataError, SettingError.
    Source: Linhart, Gramfort & Rodrigues 2023, arXiv:2306.03580.
    Read: p < 0.05 = the posterior is wrong at or near x_obs; `.summary()` says in which direction, `.plot(kind="map")` where.
    """
    model = train_lc2st(
        theta,
        draws,
        x,
        latent_theta=latent_theta,
        names=names,
        classifier=classifier,
        n_null=n_null,
        n_ensemble=n_ensemble,
        max_components=max_components,
        seed=seed,
        workers=workers,
    )
    return model.at(x_obs, draws_obs, latent_obs=latent_obs)


def train_lc2st(
    theta: ArrayLike | None,
    draws: ArrayLike | None,
    x: ArrayLike,
    *,
    latent_theta: ArrayLike | None = None,
    names: Sequence[str | Parameter] | None = None,
    classifier: Any = "quadratic",
    n_null: int = 100,
    n_ensemble: int = 1,
    max_components: int = 8,
    seed: int = 0,
    workers: int = 1,
) -> LC2STModel:
    r"""Train L-C2ST's classifier and its null on n >= 50 calibration simulations (1000 or more to find much).

    Args:
        theta: (n, d), the values the simulations were made with; None with latent_theta.
        draws: (n, d), one draw of q(. | x_i) each, or (n, l, d); n_ensemble draws are told from theta, the rest centre and scale both,
            which adds much power. None with latent_theta.
        x: (n, k), observations, or a summary of them: only their first `max_components` principal components are seen.
        latent_theta: (n, d), z = f(theta; x), the flow's latent variables of theta, N(0, I) if q is right.
        names: d names, or Parameters.
        classifier: 'quadratic', logistic regression on {1, w, w w} x {1, u, u^2} (u: components of x); 'mlp'; or a scikit-learn
            classifier with predict_proba. The first is the default for power and speed, see `lc2st_features`.
        n_null: classifiers of the null, h; the smallest p is 1 / (h + 1).
        n_ensemble: classifiers averaged, each with its own draw as class 0.
        max_components: most components of x.
        seed: of everything random.
        workers: processes; the result does not depend on their number.

    Returns: LC2STModel.   Raises: ShapeError, NonFiniteError, DataError (few rows, constant columns), SettingError.
    Source: Linhart, Gramfort & Rodrigues 2023, arXiv:2306.03580.
    """
    check_kind(classifier)
    n_ensemble = require_int("n_ensemble", n_ensemble, low=1)
    rows, spare = _rows(theta, draws, latent_theta, n_ensemble)
    n, _, dim = rows.shape
    plain, labels = check_names(names, dim)
    data = as_real("x", x)
    data = as_array("x", data[:, None] if data.ndim == 1 else data, (n, None), note="one row per simulation")
    reduce = reduction(data, require_int("max_components", max_components, low=1), rng_for(seed, "lc2st components"))
    u, latent = reduce(data), latent_theta is not None
    rows, frame = (rows, None) if latent else _framed(rows, spare, u)
    chosen = Classifier(kind=classifier, terms=affordable(n, dim, u.shape[1]))
    n_null, workers = require_int("n_null", n_null, low=19), require_int("workers", workers, low=1)
    return LC2STModel(
        names=plain,
        labels=labels,
        n=n,
        latent=latent,
        reduce=reduce,
        frame=frame,
        classifier=chosen,
        members=fit_all(chosen, rows, u, latent=latent, n_members=n_ensemble, n_null=n_null, seed=seed, workers=workers),
        seed=seed,
    )


def _columns(name: str, value: ArrayLike, dim: int) -> Array:
    array = as_real(name, value)
    array = as_array(name, array[:, None] if array.ndim == 1 and dim == 1 else array, (None, dim))
    if array.shape[0] < MIN_POINTS:
        raise DataError(f"{name} has {array.shape[0]} rows; expected at least {MIN_POINTS} draws at x_obs")
    return array


def _rows(theta: ArrayLike | None, draws: ArrayLike | None, latent: ArrayLike | None, n_ensemble: int) -> tuple[Array, Array | None]:
    """Return truth and draws to be told apart (n, 1 + r, d), or latent variables (n, 1, d), and spare draws (n, s, d) or None."""
    if latent is not None:
        z = as_real("latent_theta", latent)
        z = as_array("latent_theta", z[:, None] if z.ndim == 1 else z, (None, None))
        _enough("latent_theta", z)
        return z[:, None], None
    if theta is None or draws is None:
        raise SettingError("expected theta and draws, or latent_theta")
    truth, samples = as_real("theta", theta), as_real("draws", draws)
    if truth.ndim == 1 and samples.ndim in (1, 2):
        truth, samples = truth[:, None], samples[..., None]
    if samples.ndim == 2:
        samples = samples[:, None]
    if truth.ndim != 2 or samples.ndim != 3 or samples.shape[0] != truth.shape[0] or samples.shape[2] != truth.shape[1]:
        raise ShapeError(f"theta has shape {np.shape(theta)}, draws {np.shape(draws)}; expected (n, d) with (n, d) or (n, l, d)")
    require_finite("theta", truth)
    require_finite("draws", samples)
    _enough("theta", truth)
    n_draws, dim = samples.shape[1:]
    if n_draws < n_ensemble:
        raise DataError(f"draws has {n_draws} draws per simulation; expected at least n_ensemble = {n_ensemble}")
    rows = np.concatenate([truth[:, None], samples[:, :n_ensemble]], axis=1)
    # a covariance from few draws is too noisy to divide by
    return rows, samples[:, n_ensemble:] if n_draws - n_ensemble >= 4 * dim + 16 else None


def _framed(rows: Array, spare: Array | None, u: Array) -> tuple[Array, Residuals | None]:
    if spare is not None:
        return whitened(rows, spare), None
    frame = residuals(rows, u)
    return np.stack([frame(rows[:, j], u) for j in range(rows.shape[1])], axis=1), frame


def _enough(name: str, array: Array) -> None:
    if array.shape[1] == 0:
        raise ShapeError(f"{name} has shape {array.shape}; expected at least one parameter")
    if array.shape[0] < MIN_PAIRS:
        raise DataError(f"{name} has {array.shape[0]} rows; expected at least {MIN_PAIRS} simulations to train a classifier")


def _moments(points: Array, probability: Array) -> tuple[Array, Array]:
    """Shift and width (c, d) of q's draws (m, d) against the same draws weighted with d / (1 - d) of each of c classifiers (c, m)."""
    inside = np.clip(probability, 1e-6, 1 - 1e-6)
    weight = inside / (1 - inside)
    weight /= weight.sum(axis=1, keepdims=True)
    sd = points.std(axis=0)
    standard = (points - points.mean(axis=0)) / np.where(sd > 0, sd, 1.0)
    mean = weight @ standard
    variance = weight @ standard**2 - mean**2
    return -mean, 1 / np.sqrt(np.maximum(variance, 1e-12))
