"""L-C2ST, the local classifier two-sample test: is the posterior right at one given observation?

A classifier d(theta, x) is trained to separate the joint (theta, x), class 1, from (theta_q, x) with theta_q ~ q(. | x), class 0, on n
calibration simulations. If q is the posterior, nothing can be learned and d = 1/2. The statistic at an observation x_o is

    T(x_o) = 1/M sum_m (d(theta_m, x_o) - 1/2)^2,   theta_m ~ q(. | x_o).

It is compared with classifiers trained where the hypothesis holds: p = (1 + #{T_null >= T}) / (H + 1) has the right size for any
classifier. With the latent variables z = f(theta; x) of a flow, the hypothesis is that z ~ N(0, I) independently of x, and the null is
simulated. With draws, the hypothesis is that true value and draw of a row can be exchanged. Neither depends on the observation:
`train_lc2st` trains once, and `.at(x_obs)` takes milliseconds.

r = d / (1 - d) estimates p(theta | x_o) / q(theta | x_o). Draws of q weighted with r approximate the posterior according to the
calibration simulations, and their mean and width are compared with those of q.

The size is exact under the hypothesis that q is right at every x; the power is local, the null is not. A smooth classifier also uses what
it learned at neighbouring x.

**Observations** are standardised and rotated onto at most `max_components` principal components of unit variance. A direction of x with
little variance that is not among them is not seen: pass a summary of x (posterior means, an embedding) where that matters.

**Parameters** enter as w, which is approximately N(0, I) if the posterior is right, so that a wrong mean, width or correlation is the same
polynomial of w at every x. w is the flow's latent variable; or theta minus the mean of spare draws at the same x, divided by their
Cholesky factor; or, with a single draw, the residual of one regression on x for true values and draws together. None of these knows
which of the exchanged rows is the true one, so the exchange remains exact.

**Features** of the default classifier are {1, w_i, w_i w_j} times {1, u_a, u_a^2}, with u the components of x. With many parameters or few
rows the squares of u are dropped first, then products of u with w_i w_j. The log ratio of two Gaussians is of second degree in w; the
products with u let its coefficients vary with x. A polynomial of second degree in (w, u) jointly lacks w^2 u and cannot detect a
posterior that is too narrow for one half of x and too wide for the other. Measured on a conjugate Gaussian whose q has width x0.7 at
x < 0 and x1.4 at x > 0, n = 1000, at x_o = +1 and -1: this classifier rejects in 60 of 60 repetitions on both sides (h = 39), the network
'mlp' in 8 and 7 of 10 (h = 19) and takes twenty times as long.

Source: Linhart, Gramfort & Rodrigues 2023, arXiv:2306.03580. The exchange within a row replaces their permutation over rows, because
theta and theta_q are exchangeable only given their own x.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sbi_phys.calibration._results import fault_words, shape_text
from sbi_phys.calibration.inputs import check_names
from sbi_phys.calibration.pvalues import ALPHA
from sbi_phys.core.checks import as_array, as_real, require_choice, require_finite, require_int, require_same_rows
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for, seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.priors import Parameter

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "LC2ST",
    "Classifier",
    "LC2STModel",
    "Reduction",
    "Residuals",
    "Terms",
    "affordable",
    "check_kind",
    "fit_all",
    "lc2st",
    "polynomial",
    "reduction",
    "residuals",
    "train_lc2st",
    "whitened",
]

MIN_PAIRS = 50
MIN_POINTS = 20
FAR = 3.0  # sd of a component of x beyond which the classifier extrapolates


@dataclass(frozen=True, kw_only=True, slots=True)
class LC2ST(Result):
    r"""Result of `lc2st`: the local classifier test at one observation.

    statistic T(x_o) in [0, 1/4], and null (h,), the same for classifiers trained under the null. pvalue = (1 + #{null >= T}) / (h + 1).
    points (m, d), draws of q(. | x_o) (units of theta; of z if only latent variables are known), probability (m,) = d there, > 1/2
    where q has too little mass; band (m, 2), 95 % of null classifiers at that point. shift (d,), mean of q - corrected mean in sd of q;
    width (d,), sd of q over the corrected sd; their errors from the null. Both are lower bounds if q hardly overlaps the posterior.
    n, calibration pairs. n_components of x used; farthest, largest component of x_obs in sd of the calibration simulations.
    latent, whether points, shift and width are those of latent variables.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> theta = np.random.default_rng(0).normal(size=(200, 1))
    >>> x = theta + np.random.default_rng(1).normal(size=(200, 1))
    >>> latent = (theta - x / 2) * 2**0.5  # of the exact posterior N(x / 2, 1 / 2)
    >>> result = sp.calibration.lc2st(None, None, x, [0.5], latent_theta=latent, n_null=19)
    >>> result.null.shape, result.points.shape
    ((19,), (1000, 1))
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
        """What is wrong at x_obs, by parameter: deviations of three standard errors or more according to the classifier."""
        if self.pvalue > ALPHA:
            return dict.fromkeys(self.names, "calibrated")
        # fault_words uses two standard errors; two directions of every parameter are tested here
        sizes = zip(self.shift, 1.5 * self.shift_err, self.width, 1.5 * self.width_err, strict=True)
        words = {name: fault_words(*size) for name, size in zip(self.names, sizes, strict=True)}
        if all(word == "wrong shape" for word in words.values()):
            return words
        return {name: "no deviation" if word == "wrong shape" else word for name, word in words.items()}

    def rows(self) -> Rows:
        """Return the table: one row for each parameter (or latent variable); the test and its p-value are of all together."""
        verdicts, shapes = self.verdicts, {k: getattr(self, k) for k in ("shift", "shift_err", "width", "width_err")}
        return Rows.of({"name": self.names, "verdict": [verdicts[n] for n in self.names], "pvalue": self.pvalue} | shapes)

    def summary(self) -> str:
        """Return the result in words: one line for the test, one line for each parameter."""
        found = "q is not the posterior at x_obs" if self.pvalue <= ALPHA else "no deviation found at x_obs"
        over = self.statistic / max(float(np.median(self.null)), 1e-300)
        lines = [
            f"L-C2ST, {self.n} simulations, {self.n_components} components of x: {found} "
            f"(p = {self.pvalue:.3g}, T = {self.statistic:.3g}, {over:.1f} x the null's median)"
        ]
        pad, room = max(map(len, self.names)), max(map(len, self.verdicts.values()))
        for j, (name, words) in enumerate(self.verdicts.items()):
            shape = shape_text(self.shift[j], self.shift_err[j], self.width[j], self.width_err[j])
            lines.append(f"  {name:<{pad}}  {words:<{room}}  {shape}")
        if self.latent:
            lines.append("  shift and width are those of latent variables; pass draws_obs and latent_obs to get those of parameters")
        if self.farthest > FAR:
            lines.append(f"  x_obs lies {self.farthest:.1f} sd from the calibration simulations: few or none are near it")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, *, kind: str = "null", pair: tuple[int, int] = (0, 1)) -> "Axes":
        """Draw kind 'null' (statistic and its null) or 'map' (where q has too much and too little mass, for a `pair` of parameters).

        Raises: SettingError.
        """
        if require_choice("kind", kind, ("null", "map")) == "null":
            return figures.calibration.lc2st_null(self, ax)
        dim = len(self.names)
        if dim > 1 and (len(pair) != 2 or pair[0] == pair[1] or any(not 0 <= j < dim for j in pair)):
            raise SettingError(f"pair is {pair}; expected two different columns of {self.names}")
        return figures.calibration.lc2st_map(self, ax, pair)


@dataclass(frozen=True, kw_only=True, slots=True)
class LC2STModel:
    """Classifiers trained by `train_lc2st`, the observed and the null ones; `.at(x_obs)` tests at any observation.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> theta = np.random.default_rng(0).normal(size=(200, 1))
    >>> x = theta + np.random.default_rng(1).normal(size=(200, 1))
    >>> model = sp.calibration.train_lc2st(None, None, x, latent_theta=(theta - x / 2) * 2**0.5, n_null=19)
    >>> [model.at(x_obs).statistic < 0.25 for x_obs in (-1.0, 0.0, 1.0)]
    [True, True, True]
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    n: int
    latent: bool
    reduce: "Reduction"
    frame: "Residuals | None"
    classifier: "Classifier"
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
            n_points: number of z ~ N(0, I) drawn if neither is given.

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
    Read: p < 0.05 = the posterior is wrong at or near x_obs; `.summary()` gives the direction, `.plot(kind="map")` the location.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> rng = np.random.default_rng(0)
    >>> theta = rng.normal(size=(200, 1))
    >>> x = theta + rng.normal(size=(200, 1))
    >>> narrow, at_obs = x / 2 + 0.3 * rng.normal(size=(200, 1)), 0.25 + 0.3 * rng.normal(size=(200, 1))  # sd 0.3 in place of 0.71
    >>> bool(sp.calibration.lc2st(theta, narrow, x, [0.5], draws_obs=at_obs, n_null=19).pvalue < 0.1)
    True
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
        theta: (n, d), true parameters of the simulations; None with latent_theta.
        draws: (n, d), one draw of q(. | x_i) each, or (n, l, d): n_ensemble draws are compared with theta, the others centre and scale
            both, which adds much power. None with latent_theta.
        x: (n, k), observations, or a summary of them: only their first `max_components` principal components are used.
        latent_theta: (n, d), z = f(theta; x), the flow's latent variables of theta, N(0, I) if q is right.
        names: d names, or Parameters.
        classifier: 'quadratic', logistic regression on {1, w, w w} x {1, u, u^2} (u: components of x); 'mlp'; or a scikit-learn
            classifier with predict_proba. See the module docstring for the choice of the default.
        n_null: classifiers of the null, h; the smallest p is 1 / (h + 1).
        n_ensemble: classifiers averaged, each with its own draw as class 0.
        max_components: most components of x.
        seed: of everything random.
        workers: processes; the result does not depend on their number.

    Returns: LC2STModel.   Raises: ShapeError, NonFiniteError, DataError (few rows, constant columns), SettingError.
    Source: Linhart, Gramfort & Rodrigues 2023, arXiv:2306.03580.

    >>> import numpy as np
    >>> import sbi_phys as sp
    >>> theta = np.random.default_rng(0).normal(size=(200, 1))
    >>> x = theta + np.random.default_rng(1).normal(size=(200, 1))
    >>> narrow = (theta - x / 2) / 0.3  # latent variables of N(x / 2, 0.3^2), in place of N(x / 2, 0.5)
    >>> bool(sp.calibration.train_lc2st(None, None, x, latent_theta=narrow, n_null=19).at([0.5]).pvalue < 0.1)
    True
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
    """Return true values and draws to be separated (n, 1 + r, d), or latent variables (n, 1, d), and spare draws (n, s, d) or None."""
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


def _framed(rows: Array, spare: Array | None, u: Array) -> "tuple[Array, Residuals | None]":
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
    """Shift and width (c, d) of draws (m, d) of q relative to the same draws weighted with d / (1 - d) of each of c classifiers (c, m)."""
    inside = np.clip(probability, 1e-6, 1 - 1e-6)
    weight = inside / (1 - inside)
    weight /= weight.sum(axis=1, keepdims=True)
    sd = points.std(axis=0)
    standard = (points - points.mean(axis=0)) / np.where(sd > 0, sd, 1.0)
    mean = weight @ standard
    variance = weight @ standard**2 - mean**2
    return -mean, 1 / np.sqrt(np.maximum(variance, 1e-12))


X_LIMIT = 3.0  # components of x are clipped to so many sd, because squares of outliers would dominate the fit
MAX_TERMS = 160  # time grows with the square of their number
W_LIMIT = 6.0  # the same for parameters; a standard normal value reaches it once in 5e8


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduction:
    """Observations (n, k) -> components (n, c), of unit variance over the calibration rows."""

    mean: Array
    scale: Array
    axes: Array

    @property
    def n_components(self) -> int:
        """Number of components."""
        return int(self.axes.shape[1])

    def __call__(self, x: Array) -> Array:
        """Return the components of x (n, k), not limited."""
        return ((x - self.mean) / self.scale) @ self.axes


def reduction(x: Array, max_components: int, rng: np.random.Generator, max_rows: int = 5000) -> Reduction:
    """Principal components of the standardised columns, each scaled to unit variance; constant columns are ignored.

    Raises: DataError if no column varies.
    """
    mean, sd = x.mean(axis=0), x.std(axis=0)
    varies = sd > 1e-12 * np.maximum(np.abs(x).max(axis=0), 1e-300)
    if not varies.any():
        raise DataError("every column of x is constant; expected observations that vary from one simulation to the next")
    scale = np.where(varies, sd, np.inf)  # a constant column becomes 0
    standard = (x - mean) / scale
    if x.shape[0] > max_rows:
        standard = standard[rng.permutation(x.shape[0])[:max_rows]]
    value, vector = np.linalg.eigh(standard.T @ standard / standard.shape[0])
    order = np.argsort(value)[::-1][:max_components]
    order = order[value[order] > 1e-10 * value.max()]
    return Reduction(mean=mean, scale=scale, axes=vector[:, order] / np.sqrt(value[order]))


@dataclass(frozen=True, slots=True)
class Terms:
    """Products in the polynomial: whether u_a^2 is included, and whether w_i w_j (i < j) is multiplied with them."""

    squares: bool
    crossed: bool

    def count(self, dim: int, n_components: int) -> int:
        """Return the number of columns of `polynomial`."""
        outer, pairs = 1 + n_components * (2 if self.squares else 1), dim * (dim - 1) // 2
        return (1 + 2 * dim) * outer + pairs * (outer if self.crossed else 1)


def affordable(n: int, dim: int, n_components: int) -> Terms:
    """Return the largest set of terms that n rows determine and a hundred fits can afford."""
    options = [Terms(squares, crossed) for crossed in (True, False) for squares in (True, False)]
    return next((t for t in options if t.count(dim, n_components) <= min(n / 10, MAX_TERMS)), options[-1])


def polynomial(w: Array, u: Array, terms: Terms) -> Array:
    """Features {1, w_i, w_i w_j} x {1, u_a, u_a^2}, restricted to `terms`, of order one: w (n, d), u (n, c) -> (n, p)."""
    w, u = np.clip(w, -W_LIMIT, W_LIMIT), np.clip(u, -X_LIMIT, X_LIMIT)
    n, one = w.shape[0], np.ones((w.shape[0], 1))
    i, j = np.triu_indices(w.shape[1], 1)
    # centred and scaled to be orthonormal for standard normal w and u, so that one penalty suits all
    inner = [one, w, (w**2 - 1) / np.sqrt(2.0)]
    outer = np.concatenate([one, u, (u**2 - 1) / np.sqrt(2.0)] if terms.squares else [one, u], axis=1)
    pairs = w[:, i] * w[:, j]
    crossed = np.concatenate([*inner, pairs] if terms.crossed else inner, axis=1)
    products = (crossed[:, :, None] * outer[:, None, :]).reshape(n, -1)
    return products if terms.crossed else np.concatenate([products, pairs], axis=1)


def whitened(candidates: Array, spare: Array) -> Array:
    """Candidates (n, r, d) minus the mean of the spare draws (n, s, d) of the same row, divided by their Cholesky factor.

    A small part of the mean variance is added to each row, because draws that are all equal have zero width.
    Raises: DataError if a parameter has no width in any row.
    """
    mean = spare.mean(axis=1, keepdims=True)
    centred = spare - mean
    covariance = np.einsum("nsi,nsj->nij", centred, centred) / (spare.shape[1] - 1)
    variance = np.einsum("nii->ni", covariance).mean(axis=0)
    if np.any(variance <= (1e-12 * np.abs(spare).max(axis=(0, 1))) ** 2):
        raise DataError(
            f"parameter {int(np.argmin(variance))} is constant within the draws of every row; expected a posterior with a width"
        )
    factor = np.linalg.cholesky(covariance + 1e-6 * np.diag(variance))
    return np.swapaxes(np.linalg.solve(factor, np.swapaxes(candidates - mean, 1, 2)), 1, 2)


@dataclass(frozen=True, kw_only=True, slots=True)
class Residuals:
    """Parameters -> whitened residual of a regression on the components of x: w = (theta - A(u)) over the Cholesky factor."""

    coefficients: Array
    factor: Array

    def __call__(self, theta: Array, u: Array) -> Array:
        """Return w (n, d) of theta (n, d) at components u (n, c)."""
        return np.asarray(np.linalg.solve(self.factor, (theta - _trend(u) @ self.coefficients).T).T)


def _trend(u: Array) -> Array:
    u = np.clip(u, -X_LIMIT, X_LIMIT)
    return np.concatenate([np.ones((u.shape[0], 1)), u, u**2], axis=1)


def residuals(candidates: Array, u: Array) -> Residuals:
    """Fit on all candidates (n, r, d), true values and draws alike, so that exchanging them changes nothing.

    Raises: DataError if a parameter is constant.
    """
    n, r, d = candidates.shape
    theta = candidates.reshape(n * r, d)
    spread = theta.std(axis=0)
    if np.any(spread <= 1e-12 * np.abs(theta).max(axis=0)):
        raise DataError(f"parameter {int(np.argmin(spread))} is constant in theta and draws; expected a varying one, leave it out")
    trend = _trend(np.repeat(u, r, axis=0))
    coefficients = np.asarray(np.linalg.lstsq(trend, theta, rcond=1e-8)[0], dtype=np.float64)
    left = theta - trend @ coefficients
    covariance = left.T @ left / theta.shape[0] + 1e-12 * np.diag(spread**2)
    factor = np.asarray(np.linalg.cholesky(covariance), dtype=np.float64)
    return Residuals(coefficients=coefficients, factor=factor)


BLOCK = 10  # ensembles in one job, because starting a job takes some milliseconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Classifier:
    """The kind of classifier ('quadratic', 'mlp', or a scikit-learn classifier) and the terms of its polynomial."""

    kind: Any
    terms: Terms

    def inputs(self, w: Array, u: Array) -> Array:
        """Return the classifier's inputs for parameters w (n, d) and components u (n, c)."""
        if isinstance(self.kind, str) and self.kind == "quadratic":
            return polynomial(w, u, self.terms)
        return np.concatenate([np.clip(w, -W_LIMIT, W_LIMIT), np.clip(u, -X_LIMIT, X_LIMIT)], axis=1)

    def fitted(self, one: Array, zero: Array, u: Array, seed: int) -> Any:
        """Train true values `one` (n, d) against draws `zero` (n, d) at the same components u (n, c)."""
        from sklearn.exceptions import ConvergenceWarning

        inputs = np.concatenate([self.inputs(one, u), self.inputs(zero, u)])
        labels = np.repeat([1, 0], one.shape[0])
        estimator = _estimator(self.kind, seed)
        # a network that stops at its last iteration is a valid classifier, because the null uses the same kind
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            return estimator.fit(inputs, labels)


def _estimator(kind: Any, seed: int) -> Any:
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.neural_network import MLPClassifier

    if isinstance(kind, str):
        if kind == "quadratic":
            return LogisticRegression(C=1.0, solver="newton-cholesky", fit_intercept=False, tol=1e-3, max_iter=30)
        return MLPClassifier(hidden_layer_sizes=(32, 32), alpha=1e-2, learning_rate_init=5e-3, early_stopping=True, random_state=seed)
    copy = clone(kind)
    if "random_state" in copy.get_params():
        copy.set_params(random_state=seed)
    return copy


def check_kind(kind: Any) -> None:
    """Raise SettingError unless `kind` is a known name or a classifier with probabilities."""
    if isinstance(kind, str):
        if kind not in ("quadratic", "mlp"):
            raise SettingError(f"classifier is {kind!r}; expected 'quadratic', 'mlp' or a scikit-learn classifier")
    elif not all(hasattr(kind, method) for method in ("fit", "predict_proba", "get_params")):
        raise SettingError(
            f"classifier is a {type(kind).__name__}; expected 'quadratic', 'mlp' or a scikit-learn classifier with predict_proba"
        )


def fit_all(
    classifier: Classifier, rows: Array, u: Array, *, latent: bool, n_members: int, n_null: int, seed: int, workers: int
) -> list[list[Any]]:
    """Fit n_null + 1 ensembles of n_members; the first is the observed one. The result does not depend on the number of workers.

    Args: rows (n, 1, d) latent variables, or (n, 1 + n_members, d) true values and draws. u (n, c).
    """
    from joblib import Parallel, delayed

    blocks = [range(i, min(i + BLOCK, n_null + 1)) for i in range(0, n_null + 1, BLOCK)]
    jobs = (delayed(_block)(classifier, rows, u, latent, n_members, block, seed) for block in blocks)
    return [ensemble for block in Parallel(n_jobs=workers)(jobs) for ensemble in block]


def _block(classifier: Classifier, rows: Array, u: Array, latent: bool, n_members: int, block: range, seed: int) -> list[list[Any]]:
    from sklearn import config_context
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    # one BLAS thread each: matrices are small, and the numbers must not depend on the number of workers;
    # inputs are already checked, and checking them again for every classifier takes longer than fitting it
    with threadpool_limits(1), config_context(assume_finite=True, skip_parameter_validation=True):
        return [_ensemble(classifier, rows, u, latent, n_members, index, seed) for index in block]


def _ensemble(classifier: Classifier, rows: Array, u: Array, latent: bool, n_members: int, index: int, seed: int) -> list[Any]:
    rng = rng_for(seed, "lc2st", index)
    rows = _latent_rows(rows, n_members, index, rng) if latent else _exchanged(rows, index, rng)
    seeds = [seed_for(seed, "lc2st classifier", index, member) % 2**32 for member in range(n_members)]
    return [classifier.fitted(rows[:, 0], rows[:, 1 + member], u, own) for member, own in enumerate(seeds)]


def _latent_rows(rows: Array, n_members: int, index: int, rng: np.random.Generator) -> Array:
    n, _, d = rows.shape
    truth = rng.standard_normal((n, 1, d)) if index > 0 else rows
    return np.concatenate([truth, rng.standard_normal((n, n_members, d))], axis=1)


def _exchanged(rows: Array, index: int, rng: np.random.Generator) -> Array:
    # the candidate that takes the place of the true value is chosen at random in each row
    if index == 0:
        return rows
    each, chosen = np.arange(rows.shape[0]), rng.integers(0, rows.shape[1], rows.shape[0])
    exchanged = rows.copy()
    exchanged[each, chosen], exchanged[:, 0] = rows[:, 0], rows[each, chosen]
    return exchanged
