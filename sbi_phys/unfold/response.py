r"""The response of a detector: P[j, mu] = P(reconstructed in bin j | truth in bin mu).

The column sums are the efficiency, eps_mu = sum_j P[j, mu] <= 1; the rest of the events of a truth bin is not reconstructed. Two sources
add to what is measured. Fakes come with the signal: events whose truth lies outside the truth bins, or which have no truth. They make up
a share phi_j of what is reconstructed in bin j. Background is a number of counts b_j that does not depend on the signal. The expected
counts are

    f_j(n) = sum_mu P[j, mu] n_mu / (1 - phi_j) + b_j .

A matrix that is filled with N_mu simulated events has multinomial noise,

    cov(P[j, mu], P[l, mu]) = (delta_jl P[j, mu] - P[j, mu] P[l, mu]) / N_mu ,

independent between truth bins. With weights N_mu is the effective number (sum w)^2 / sum w^2, which is exact where w depends only on
the truth.
"""

import warnings
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import ndtr

from sbi_phys.core.checks import as_array, require_finite, require_number, require_same_rows
from sbi_phys.core.errors import DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.results import Result, Rows, bin_columns
from sbi_phys.core.types import Array, ArrayLike, Integers, Mask
from sbi_phys.unfold._inputs import bin_name, check_edges, check_mask, check_nonnegative, frozen

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["PairHistograms", "Response", "as_response", "integrate"]


Curve = Callable[[Array], ArrayLike]

ROUNDING = 1e-6  # tolerance of column sums above 1


def _nothing() -> Array:
    return np.zeros(0)


@dataclass(frozen=True, eq=False, slots=True)
class Response(Result):
    r"""Response matrix P(reco j | truth mu) with everything needed to fold a spectrum; its arrays are read-only.

    matrix (n_reco, n_truth), column sums = efficiency in (0, 1]. truth_edges (n_truth + 1,) and reco_edges (n_reco + 1,) or None.
    n_simulated (n_truth,), effective number of simulated events per truth bin, None = known exactly. truth (n_truth,), spectrum that
    the matrix was made with (counts, or any scale), None = not known. fakes (n_reco,), share of what is reconstructed, in [0, 1).
    background (n_reco,), counts. exposure, km2 sr yr, used by `forward_fold` alone.

    Raises: ShapeError (bins that do not match), NonFiniteError, DataError (empty column or row, negative, efficiency above 1: named).

    >>> import numpy as np
    >>> from sbi_phys.unfold import Response
    >>> edges = np.linspace(0, 4, 5)
    >>> response = Response.from_resolution(edges, edges, resolution=0.4, efficiency=0.8)
    >>> response.matrix.shape, response.efficiency.round(2)
    ((4, 4), array([0.67, 0.8 , 0.8 , 0.67]))
    >>> response.fold([100, 80, 60, 40]).round()
    array([65., 64., 48., 29.])
    """

    matrix: Array
    truth_edges: Array | None = None
    reco_edges: Array | None = None
    _: KW_ONLY
    n_simulated: Array | None = None
    truth: Array | None = None
    fakes: Array = field(default_factory=_nothing)
    background: Array = field(default_factory=_nothing)
    exposure: float | None = None

    def __post_init__(self) -> None:
        matrix = check_nonnegative("response matrix", self.matrix, (None, None))
        n_reco, n_truth = matrix.shape
        if matrix.size == 0:
            raise ShapeError(f"response matrix has shape {matrix.shape}; expected (n_reco, n_truth), at least one bin each")
        values: dict[str, Array | None] = {"matrix": matrix}
        for name, n in (("truth_edges", n_truth), ("reco_edges", n_reco)):
            edges = getattr(self, name)
            values[name] = None if edges is None else check_edges(name, edges, n)
        for name, n in (("n_simulated", n_truth), ("truth", n_truth), ("fakes", n_reco), ("background", n_reco)):
            value = getattr(self, name)
            missing = value is None or np.size(value) == 0
            empty = np.zeros(n_reco) if name in ("fakes", "background") else None
            values[name] = empty if missing else check_nonnegative(name, value, (n,))
        for name, checked in values.items():
            object.__setattr__(self, name, None if checked is None else frozen(checked))
        if self.exposure is not None:
            object.__setattr__(self, "exposure", require_number("exposure", self.exposure, low=0, open_low=True))
        self._check_places()

    def _check_places(self) -> None:
        efficiency = self.efficiency
        for wrong, words in (
            (
                efficiency <= 0,
                "is an empty column (efficiency 0): none of its events is reconstructed; expected > 0, widen or drop the bin",
            ),
            (efficiency > 1 + ROUNDING, "has a column sum (efficiency) above 1: {:.6g}; expected P(reco | truth), normalised by all truth"),
        ):
            if wrong.any():
                mu = int(np.flatnonzero(wrong)[0])
                raise DataError(f"response: {bin_name('truth', mu, self.truth_edges)} {words.format(efficiency[mu])}")
        empty = (self.matrix.sum(axis=1) <= 0) & (self.background <= 0)
        if empty.any():
            place = bin_name("reco", int(np.flatnonzero(empty)[0]), self.reco_edges)
            raise DataError(f"response: {place} is an empty row, no truth bin and no background reaches it; expected events, drop the bin")
        if (self.fakes >= 1).any():
            place = bin_name("reco", int(np.flatnonzero(self.fakes >= 1)[0]), self.reco_edges)
            raise DataError(f"fakes is {self.fakes.max():g} in {place}; expected a share in [0, 1), other sources are `background`")
        if self.n_simulated is not None and (self.n_simulated <= 0).any():
            place = bin_name("truth", int(np.flatnonzero(self.n_simulated <= 0)[0]), self.truth_edges)
            raise DataError(f"n_simulated is 0 in {place}; expected > 0, or None where the matrix is known exactly")

    @classmethod
    def from_pairs(
        cls,
        truth: ArrayLike,
        reco: ArrayLike,
        truth_edges: ArrayLike,
        reco_edges: ArrayLike,
        weights: ArrayLike | None = None,
        reco_pass: ArrayLike | None = None,
        truth_pass: ArrayLike | None = None,
        *,
        background: ArrayLike | None = None,
        exposure: float | None = None,
    ) -> "Response":
        r"""Fill the matrix from n simulated events, P[j, mu] = sum w(reco j, truth mu) / sum w(truth mu).

        Args: truth and reco (n,), same unit as their edges. weights (n,), signed ones of a simulation at
            next-to-leading order too, if no sum in a bin is negative. reco_pass and truth_pass (n,), booleans: an event
            without reconstruction is missed, one outside of the truth selection is a fake; their NaN are not read. An event outside
            of the edges counts as not passed. background (n_reco,), counts. exposure, km2 sr yr.
        Returns: Response with n_simulated, truth (weighted counts) and fakes.
        Raises: ShapeError, NonFiniteError (NaN in an event that passes), DataError (no events in a bin, no overlap, a sum of weights < 0).
        """
        edges_t, edges_r = check_edges("truth_edges", truth_edges), check_edges("reco_edges", reco_edges)
        t, r = as_array("truth", truth, (None,), finite=False), as_array("reco", reco, (None,), finite=False)
        n = require_same_rows(truth=t, reco=r)
        w = np.ones(n) if weights is None else as_array("weights", weights, (n,))
        has_truth, has_reco = check_mask("truth_pass", truth_pass, n), check_mask("reco_pass", reco_pass, n)
        require_finite("truth of events that pass", t[has_truth])
        require_finite("reco of events that pass", r[has_reco])
        sums = PairHistograms(edges_t, edges_r)
        sums.add(t, r, w, has_reco, has_truth)
        return sums.response(background, exposure)

    @classmethod
    def from_resolution(
        cls,
        truth_edges: ArrayLike,
        reco_edges: ArrayLike,
        resolution: float | Curve,
        bias: float | Curve = 0.0,
        efficiency: float | ArrayLike | Curve = 1.0,
        spectrum_index: float | None = None,
        *,
        background: ArrayLike | None = None,
        exposure: float | None = None,
    ) -> "Response":
        r"""Integrate a Gaussian resolution, P[j, mu] = int_mu w(x) eps(x) [Phi(z_{j+1}) - Phi(z_j)] dx / int_mu w(x) dx.

        z_j = (e_j - x - bias(x)) / sigma(x), by Gauss-Legendre within panels no wider than sigma; error below 1e-10.

        Args: truth_edges, reco_edges in the same unit. resolution, sigma > 0 in that unit, and bias: a number or f(x (n,)) -> (n,).
            efficiency: a number, (n_truth,) or f(x), of a truth x, for any reco bin. spectrum_index g: then the axis is
            lg(E) and w = E^(1 - g), counts per lg(E) of dN/dE ~ E^-g; None: w = 1.
        Returns: Response; with a spectrum_index its `truth` is that power law (sum 1).
        Raises: ShapeError, NonFiniteError, DataError, SettingError.
        """
        edges_t, edges_r = check_edges("truth_edges", truth_edges), check_edges("reco_edges", reco_edges)
        index = None if spectrum_index is None else require_number("spectrum_index", spectrum_index)
        matrix, truth = integrate(edges_t, edges_r, resolution, bias, efficiency, index)
        b = _nothing() if background is None else np.asarray(background, dtype=np.float64)
        return cls(matrix, edges_t, edges_r, truth=None if index is None else truth, background=b, exposure=exposure)

    @property
    def n_reco(self) -> int:
        """Number of reconstructed bins."""
        return int(self.matrix.shape[0])

    @property
    def n_truth(self) -> int:
        """Number of truth bins."""
        return int(self.matrix.shape[1])

    @property
    def efficiency(self) -> Array:
        """eps_mu = sum_j P[j, mu], (n_truth,): share of a truth bin that is reconstructed, in any bin."""
        return np.asarray(self.matrix.sum(axis=0))

    @property
    def purity(self) -> Array:
        """Share of the reconstructed signal in a bin whose truth lies in the same bin, (n,), for the `truth` spectrum (flat if None).

        Raises: SettingError unless truth and reco bins are the same.   Read: below about 0.5 bins are finer than the resolution.
        """
        self._require_same_bins("purity")
        n = np.ones(self.n_truth) if self.truth is None else self.truth
        return np.asarray(np.diag(self.matrix) * n / (self.matrix @ n))

    @property
    def stability(self) -> Array:
        """Share of the reconstructed events of a truth bin that stay in it, P[i, i] / eps_i, (n,).

        Raises: SettingError unless truth and reco bins are the same.
        """
        self._require_same_bins("stability")
        return np.asarray(np.diag(self.matrix) / self.efficiency)

    @property
    def condition_number(self) -> float:
        """Largest over smallest singular value: the amplification of noise by a plain inversion."""
        return float(np.linalg.cond(self.matrix))

    def _require_same_bins(self, what: str) -> None:
        t, r = self.truth_edges, self.reco_edges
        same = self.n_reco == self.n_truth and (t is None or r is None or np.allclose(t, r, rtol=1e-12, atol=1e-12))
        if not same:
            raise SettingError(f"{what} needs the same truth and reco bins; got {self.n_truth} and {self.n_reco} bins with other edges")

    def fold(self, truth_counts: ArrayLike) -> Array:
        """Expected reconstructed counts f_j = sum_mu P[j, mu] n_mu / (1 - phi_j) + b_j of truth (n_truth,) or (..., n_truth).

        Raises: ShapeError.
        """
        n = np.asarray(truth_counts, dtype=np.float64)
        if n.ndim == 0 or n.shape[-1] != self.n_truth:
            raise ShapeError(f"truth_counts has shape {n.shape}; expected (..., {self.n_truth}), one for each truth bin")
        return np.asarray((n @ self.matrix.T) / (1 - self.fakes) + self.background)

    def sample(self, truth_counts: ArrayLike, rng: np.random.Generator) -> Integers:
        """Draw reconstructed counts (n_reco,) of whole numbers of true events: multinomial migration, Poisson fakes and background.

        Raises: ShapeError, DataError (fractions: draw them first, `rng.poisson(expected)`).
        """
        n = check_nonnegative("truth_counts", truth_counts, (self.n_truth,), "truth", self.truth_edges)
        if not np.array_equal(n, np.rint(n)):
            raise DataError("truth_counts has fractions; expected whole numbers of events, such as rng.poisson(expected)")
        lost = np.maximum(1 - self.efficiency, 0)
        shares = np.vstack([self.matrix, lost])
        moved = rng.multinomial(n.astype(np.int64), (shares / shares.sum(axis=0)).T)[:, :-1].sum(axis=0)
        extra = self.fakes / (1 - self.fakes) * (self.matrix @ n) + self.background
        return np.asarray(moved + rng.poisson(extra), dtype=np.int64)

    def propagate(self, sensitivity: Array) -> Array:
        """Covariance (m, m) that the noise of the matrix gives m numbers with derivatives dy/dP (m, n_reco, n_truth); 0 if exact.

        Raises: ShapeError.
        """
        if sensitivity.ndim != 3 or sensitivity.shape[1:] != self.matrix.shape:
            raise ShapeError(f"sensitivity has shape {sensitivity.shape}; expected (m, {self.n_reco}, {self.n_truth})")
        m = sensitivity.shape[0]
        if self.n_simulated is None:
            return np.zeros((m, m))
        single = (sensitivity * np.sqrt(self.matrix / self.n_simulated)).reshape(m, -1)
        common = np.einsum("ajm,jm->am", sensitivity, self.matrix) / np.sqrt(self.n_simulated)
        return np.asarray(single @ single.T - common @ common.T)

    def with_background(self, background: ArrayLike) -> "Response":
        """Return the same response with other background counts (n_reco,).   Raises: ShapeError, NonFiniteError, DataError."""
        return replace(self, background=np.asarray(background, dtype=np.float64))

    def rows(self) -> Rows:
        """Return the table: one row for each truth bin, with its efficiency and the share of its events in the likeliest reco bin."""
        found = bin_columns(self.truth_edges, self.n_truth) | {"efficiency": self.efficiency}
        known = {} if self.n_simulated is None else {"n_simulated": self.n_simulated}
        return Rows.of(found | {"largest": self.matrix.max(axis=0), "largest_reco_bin": self.matrix.argmax(axis=0)} | known)

    def summary(self) -> str:
        """Return the result in words."""
        e, known = self.efficiency, "known exactly" if self.n_simulated is None else f"from {self.n_simulated.sum():.6g} simulated events"
        return (
            f"response of {self.n_reco} reconstructed to {self.n_truth} truth bins, {known}: efficiency {e.min():.3g} to {e.max():.3g}, "
            f"fakes up to {100 * self.fakes.max():.3g} %, background {self.background.sum():.4g}"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the matrix, truth to the right and reco upwards, and the efficiency as a line.   Read: off the diagonal = migration."""
        return figures.unfolding.response(self, ax)


def as_response(response: "Response | ArrayLike") -> Response:
    """Return a Response; an array (n_reco, n_truth) becomes one that is known exactly, without fakes or background."""
    return response if isinstance(response, Response) else Response(np.asarray(response))


ORDER = 12  # points of Gauss-Legendre in a panel of at most one sigma: exact to rounding for a smooth integrand

_NOISE = 5.0  # sigma: negative sums of signed weights below this are taken as noise

MAX_NODES = 20_000_000  # values of the integrand, 160 MB


class PairHistograms:
    """Histograms of simulated pairs, from which a response is filled; the pairs may be added in parts.

    joint (n_reco, n_truth), sums of w; total and squares (n_truth,), of w and w^2; seen and fake (n_reco,), of w.
    """

    def __init__(self, truth_edges: Array, reco_edges: Array) -> None:
        self.edges_t, self.edges_r = truth_edges, reco_edges
        n_t, n_r = truth_edges.size - 1, reco_edges.size - 1
        self.joint, self.total, self.squares = np.zeros((n_r, n_t)), np.zeros(n_t), np.zeros(n_t)
        self.noise = np.zeros((n_r, n_t))  # of joint, sums of w^2; filled where weights are signed
        self.seen, self.fake = np.zeros(n_r), np.zeros(n_r)
        self.n = self.n_truth = self.n_reco = self.n_both = 0

    def add(self, t: Array, r: Array, w: Array, reco_pass: Mask, truth_pass: Mask | None = None) -> None:
        """Add events: truth, reco, weights and masks (n,); values of events that do not pass may be NaN."""
        has_truth = np.ones(len(t), dtype=np.bool_) if truth_pass is None else truth_pass
        # comparisons of NaN are False, without a warning
        in_truth = has_truth & (t >= self.edges_t[0]) & (t <= self.edges_t[-1])
        in_reco = reco_pass & (r >= self.edges_r[0]) & (r <= self.edges_r[-1])
        both, fake = in_truth & in_reco, in_reco & ~in_truth
        self.joint += np.histogram2d(r[both], t[both], bins=[self.edges_r, self.edges_t], weights=w[both])[0]
        if (w < 0).any():
            self.noise += np.histogram2d(r[both], t[both], bins=[self.edges_r, self.edges_t], weights=w[both] ** 2)[0]
        self.total += np.histogram(t[in_truth], self.edges_t, weights=w[in_truth])[0]
        self.squares += np.histogram(t[in_truth], self.edges_t, weights=w[in_truth] ** 2)[0]
        self.seen += np.histogram(r[in_reco], self.edges_r, weights=w[in_reco])[0]
        # 1 - real / seen would leave a rounding error where there are no fakes
        self.fake += np.histogram(r[fake], self.edges_r, weights=w[fake])[0]
        self.n, self.n_both = self.n + len(t), self.n_both + int(both.sum())
        self.n_truth, self.n_reco = self.n_truth + int(in_truth.sum()), self.n_reco + int(in_reco.sum())

    def response(self, background: ArrayLike | None, exposure: float | None) -> Response:
        """Return the response of all that was added.   Raises: DataError."""
        if self.n_both == 0:
            got = f"{self.n_truth} events lie within truth_edges, {self.n_reco} within reco_edges, none in both"
            raise DataError(f"no overlap: of {self.n} events {got}; expected some, check units (E or lg E?) and edges")
        if (self.total <= 0).any():
            i = int(np.flatnonzero(self.total <= 0)[0])
            place = bin_name("truth", i, self.edges_t)
            if self.total[i] < 0:
                raise DataError(f"weights sum to {self.total[i]:g} in {place}; expected a positive sum")
            raise DataError(f"no simulated events in {place}, an empty column; expected some, simulate more, widen or drop the bin")
        return Response(
            self._without_noise() / self.total,
            self.edges_t,
            self.edges_r,
            n_simulated=self.total**2 / self.squares,
            truth=self.total,
            fakes=np.divide(self.fake, self.seen, out=np.zeros_like(self.seen), where=self.seen > 0),
            background=_nothing() if background is None else np.asarray(background, dtype=np.float64),
            exposure=exposure,
        )

    def _without_noise(self) -> Array:
        """Sums `joint` with 0 in place of negative ones that are noise of signed weights.   Raises: DataError.   Warns."""
        negative = self.joint < 0
        if not negative.any():
            return self.joint
        sigma = np.where(negative, -self.joint, 0.0) / np.sqrt(np.maximum(self.noise, 1e-300))
        j, i = (int(k) for k in np.unravel_index(int(sigma.argmax()), sigma.shape))
        if sigma[j, i] > _NOISE:
            place = f"{bin_name('reco', j, self.edges_r)}, {bin_name('truth', i, self.edges_t)}"
            raise DataError(f"weights sum to {self.joint[j, i]:g} in {place}, {sigma[j, i]:.2g} sigma below 0; expected a positive sum")
        warnings.warn(
            f"signed weights sum to less than 0 in {int(negative.sum())} of {negative.size} bins of the response, by {sigma[j, i]:.2g}"
            " sigma at most; these are set to 0: simulate more events, or merge bins",
            RuntimeWarning,
            stacklevel=4,
        )
        kept = np.maximum(self.joint, 0.0)
        return kept * np.clip(self.joint.sum(axis=0), 0.0, self.total) / np.maximum(kept.sum(axis=0), 1e-300)  # the efficiency stays


def integrate(
    truth_edges: Array,
    reco_edges: Array,
    resolution: float | Curve,
    bias: float | Curve,
    efficiency: float | ArrayLike | Curve,
    index: float | None,
) -> tuple[Array, Array]:
    """Return matrix (n_reco, n_truth) and the power law's content of the truth bins (n_truth,), sum 1.

    Raises: ShapeError, NonFiniteError, DataError.
    """
    n_truth = truth_edges.size - 1
    # sigma at the ends and the middle of each bin decides how finely the bins are cut; then it is evaluated where it is used
    low, high = truth_edges[:-1], truth_edges[1:]
    probe = np.concatenate([low, (low + high) / 2, high])
    narrowest = _curve("resolution", resolution, probe, low=0).reshape(3, -1).min(axis=0)
    panels = int(np.ceil((np.diff(truth_edges) / narrowest).max()))
    if panels * ORDER * n_truth * reco_edges.size > MAX_NODES:
        raise DataError(f"resolution goes down to {narrowest.min():g}, {panels} times smaller than a truth bin; expected finer bins")
    x, w = _nodes(truth_edges, panels)
    sigma, shift = _curve("resolution", resolution, x.ravel(), low=0), _curve("bias", bias, x.ravel())
    if index is not None:
        w = w * 10.0 ** ((1 - index) * (x - truth_edges[0]))
    content = w.sum(axis=1)
    z = (reco_edges[:, None] - x.ravel() - shift) / sigma
    # in the upper tail 1 - Phi is the accurate one: difference of two values near 1 would lose all digits
    upper = z[:-1] > 0
    inside = np.where(upper, ndtr(-z[:-1]) - ndtr(-z[1:]), ndtr(z[1:]) - ndtr(z[:-1]))
    seen = inside.reshape(-1, *x.shape) * _efficiency(efficiency, x)
    return np.einsum("jmq,mq->jm", seen, w) / content, content / content.sum()


def _nodes(edges: Array, panels: int) -> tuple[Array, Array]:
    # Gauss-Legendre within each of `panels` equal parts of every bin: x, w (n_bins, panels * ORDER)
    u, weight = np.polynomial.legendre.leggauss(ORDER)
    starts = np.arange(panels)[:, None] / panels
    u01 = (starts + (u + 1) / (2 * panels)).ravel()
    width = np.diff(edges)[:, None]
    return edges[:-1, None] + width * u01, width * np.tile(weight / (2 * panels), panels)


def _curve(name: str, value: float | Curve, x: Array, *, low: float | None = None) -> Array:
    raw = value(x) if callable(value) else value
    array = np.asarray(raw, dtype=np.float64)
    if array.shape not in ((), x.shape):
        raise ShapeError(f"{name} gives shape {array.shape} for {x.size} points; expected one value for each, or a number")
    array = np.broadcast_to(array, x.shape)
    require_finite(name, array)
    if low is not None and (array <= low).any():
        raise DataError(f"{name} is {array.min():g} at {x[array.argmin()]:g}; expected > {low:g} everywhere")
    return array


def _efficiency(efficiency: float | ArrayLike | Curve, x: Array) -> Array:
    n_truth = x.shape[0]
    if callable(efficiency):
        return _shares(_curve("efficiency", efficiency, x.ravel()).reshape(x.shape), x)
    array = np.asarray(efficiency, dtype=np.float64)
    if array.shape not in ((), (n_truth,)):
        raise ShapeError(f"efficiency has shape {array.shape}; expected a number, ({n_truth},) = one per truth bin, or a function")
    require_finite("efficiency", array)
    return _shares(np.broadcast_to(array[..., None] if array.ndim else array, x.shape), x)


def _shares(values: Array, x: Array) -> Array:
    bad = (values < 0) | (values > 1)
    if bad.any():
        first = tuple(np.argwhere(bad)[0])
        raise DataError(f"efficiency is {values[first]:g} at {x[first]:g} (truth bin {first[0]}); expected a share in [0, 1]")
    return values
