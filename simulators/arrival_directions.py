r"""Arrival directions of ultra-high-energy cosmic rays: sources blurred by magnetic fields over an isotropic sky.

An event has a direction u and a rigidity R. theta = (f, delta0 [, nu]): share of the flux from a catalogue of sources with weights
w_s, blurring at 10 EV in degrees, and, if the number of events is Poisson, its expectation.

    p(u | R, f, delta0) = omega(u) [(1 - f) / 4 pi + f sum_s w_s vMF(u; s, kappa)] / N
    kappa               = 1 / delta^2,  delta = delta0 / (R / 10 EV) in radians
    vMF(u; s, kappa)    = kappa exp(kappa (u.s - 1)) / (2 pi (1 - exp(-2 kappa)))
    N(f, kappa)         = (1 - f) a_0 + f sum_s w_s b_s(kappa)

a_0 is the mean of the exposure omega over the sky, and b_s its mean weighted with the blurring around source s. The exposure of an array
at latitude a0 with zenith angles up to t_m is (Sommers)

    omega(dec) = cos a0 cos dec sin am + am sin a0 sin dec,   xi = (cos t_m - sin a0 sin dec) / (cos a0 cos dec),
    am = 0 if xi > 1, pi if xi < -1, else arccos xi

**Normalisation.** No numerical integral over the sphere is needed for each theta. omega depends on the declination alone, and a vMF
blurring multiplies the Legendre coefficient of degree l by A_l(kappa) = I_{l+1/2}(kappa) / I_{1/2}(kappa), so

    b_s(kappa) = sum_l a_l A_l(kappa) P_l(sin dec_s),    omega(dec) = sum_l a_l P_l(sin dec),

which is tabulated once in ln kappa. Rigidities follow a power law above a threshold, the same for signal and background and for
every theta; with index None all are equal to the threshold.

Source: Sommers 2001, arXiv:astro-ph/0004016 (exposure); Auger 2018, arXiv:1801.06160 (the model and its test statistic).
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import CubicSpline
from scipy.special import ive

from sbi_phys.priors import BoxPrior, Observable, Parameter
from simulators.auger import DATA_FOLDER
from simulators.errors import CountsError, SimulatorSettingError, TableError, require_choice, require_number, require_range
from simulators.events import EventLayout, checked_theta, poisson_log_pmf, require_count, slots_for, sum_over_sets

__all__ = ["ArrivalDirections", "Catalogue", "Exposure", "load_starbursts", "random_catalogue"]

Array = NDArray[np.float64]
_N_LEGENDRE = 400
_N_KAPPA = 240


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Sources: name, unit vectors (n, 3) in equatorial coordinates, weights (n,) that sum to 1."""

    names: tuple[str, ...]
    directions: Array
    weights: Array

    @property
    def sin_declination(self) -> Array:
        """Sine of the declinations (n,)."""
        return self.directions[:, 2]


@dataclass(frozen=True)
class Exposure:
    """Directional exposure of an array, up to a factor.   Args: latitude a0 and largest zenith angle t_m, degrees."""

    latitude_deg: float = -35.2
    zenith_max_deg: float = 80.0

    def __call__(self, sin_declination: ArrayLike) -> Array:
        """omega at the sine of the declination, same shape, >= 0."""
        a0, t_m = np.radians(self.latitude_deg), np.radians(self.zenith_max_deg)
        sine = np.asarray(sin_declination, dtype=np.float64)
        cosine = np.sqrt(np.maximum(1 - sine**2, 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            xi = (np.cos(t_m) - np.sin(a0) * sine) / (np.cos(a0) * cosine)
        am = np.arccos(np.clip(np.nan_to_num(xi, nan=0.0, posinf=2.0, neginf=-2.0), -1.0, 1.0))
        return np.maximum(np.cos(a0) * cosine * np.sin(am) + am * np.sin(a0) * sine, 0.0)

    def legendre(self, n: int = _N_LEGENDRE) -> Array:
        """Coefficients a_l (n,) of omega = sum_l a_l P_l(sin dec); a_0 is the mean over the sky."""
        # omega has kinks where stars cease to rise or set: Gauss's rule on panels that end there, evenly spaced in angle
        kinks = np.sin(np.radians([self.latitude_deg + self.zenith_max_deg, self.latitude_deg - self.zenith_max_deg]))
        edges = np.unique(np.concatenate([-np.cos(np.linspace(0, np.pi, 2 + n // 8)), kinks]))
        x, w = np.polynomial.legendre.leggauss(24)
        half = np.diff(edges)[:, None] / 2
        node, weight = (edges[:-1, None] + half * (1 + x)).ravel(), (half * w).ravel()
        value = self(node) * weight
        table = np.polynomial.legendre.legvander(node, n - 1)
        return np.asarray((value @ table) * (2 * np.arange(n) + 1) / 2)


def load_starbursts(path: Path | str | None = None) -> Catalogue:
    """The 44 starburst galaxies of arXiv:1902.09663 (and Circinus), weights proportional to their radio flux at 1.4 GHz.

    Raises: TableError.
    """
    path = DATA_FOLDER / "starburst_lunardini_2019.csv" if path is None else Path(path)
    try:
        rows = list(csv.DictReader(line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")))
        names = tuple(r["name"] for r in rows)
        ra, dec, flux = (np.array([float(r[c]) for r in rows]) for c in ("ra_deg", "dec_deg", "flux_jy"))
    except (OSError, KeyError, ValueError, TypeError) as err:
        raise TableError(f"{path}: cannot be read as a table of sources with name, ra_deg, dec_deg, flux_jy ({err!r})") from err
    if not rows or not (np.abs(dec) <= 90).all() or not (flux > 0).all():
        raise TableError(f"{path}: {len(rows)} sources; expected at least one, declinations within 90 degrees and fluxes > 0")
    return Catalogue(names, unit_vectors(ra, dec), flux / flux.sum())


def random_catalogue(n: int, *, seed: int) -> Catalogue:
    """Catalogue of n sources, isotropic over the sky, with weights 1 / distance^2, distances uniform in volume within a sphere."""
    rng = np.random.default_rng(seed)
    weights = rng.random(n) ** (-2 / 3)
    return Catalogue(tuple(f"source {i}" for i in range(n)), _isotropic(n, rng), weights / weights.sum())


def unit_vectors(ra_deg: ArrayLike, dec_deg: ArrayLike) -> Array:
    """Right ascension and declination in degrees (n,) -> unit vectors (n, 3)."""
    ra, dec = np.radians(ra_deg), np.radians(dec_deg)
    return np.column_stack([np.cos(dec) * np.cos(ra), np.cos(dec) * np.sin(ra), np.sin(dec)])


class ArrivalDirections:
    """Sets of arrival directions and rigidities from a catalogue of sources over isotropy, with the exact likelihood.

    An event has columns (u_x, u_y, u_z, R): equatorial unit vector and rigidity in EV; x holds n_max slots with a mask
    (see `events`). Priors: f ~ U(0, f_max), delta0 ~ U(delta_range) degrees, nu ~ U(0.8, 1.2) n_events where extended.

    Args:
        n_events: of a set. extended: whether the number is Poisson with mean nu, a third parameter.
        catalogue: 'starbursts' or 'random' (20 sources of seed 1).
        rigidity_min: EV. rigidity_index: of the density R^-index above it, or None: all at rigidity_min.
        f_max, delta_range: ends of the priors. latitude_deg, zenith_max_deg: of the array. n_max: slots; default as needed.
    Raises: SimulatorSettingError.

    >>> import numpy as np
    >>> from simulators import ArrivalDirections
    >>> simulator = ArrivalDirections(n_events=20)
    >>> x = simulator.simulate([0.2, 15.0], np.random.default_rng(0))  # 20 % from sources, blurred by 15 degrees
    >>> x.shape, simulator.log_likelihood(x, [[0.2, 15.0], [0.5, 15.0]]).shape
    ((1, 100), (2,))
    """

    def __init__(
        self,
        *,
        n_events: int = 1400,
        extended: bool = False,
        catalogue: str = "starbursts",
        rigidity_min: float = 10.0,
        rigidity_index: float | None = None,
        f_max: float = 1.0,
        delta_range: Sequence[float] = (3.0, 40.0),
        latitude_deg: float = -35.2,
        zenith_max_deg: float = 80.0,
        n_max: int | None = None,
    ) -> None:
        size = require_count("n_events", n_events)
        if not isinstance(size, int):
            raise SimulatorSettingError(f"n_events is {n_events!r}; expected one number")
        self.n_events, self.extended = size, bool(extended)
        needed = slots_for(1.2 * size) if self.extended else size
        if n_max is not None and n_max < needed:
            raise SimulatorSettingError(f"n_max is {n_max}; expected at least {needed} slots")
        low, high = require_range("delta_range", delta_range, 0.5, 90)
        self.settings: dict[str, Any] = {
            "n_events": size, "extended": self.extended, "catalogue": require_choice("catalogue", catalogue, ("starbursts", "random")),
            "rigidity_min": require_number("rigidity_min", rigidity_min, 0.1, 1e4),
            "rigidity_index": None if rigidity_index is None else require_number("rigidity_index", rigidity_index, 1.01, 50),
            "f_max": require_number("f_max", f_max, 1e-6, 1.0), "delta_range": [low, high],
            "latitude_deg": require_number("latitude_deg", latitude_deg, -89, 89),
            "zenith_max_deg": require_number("zenith_max_deg", zenith_max_deg, 1, 90), "n_max": int(n_max or needed),
        }  # fmt: skip
        self.layout = EventLayout(("u_x", "u_y", "u_z", "R [EV]"), self.settings["n_max"])
        parameters = [
            Parameter("f", 0.0, self.settings["f_max"], "", "f"),
            Parameter("delta0", low, high, "deg", r"\delta_0"),
            *([Parameter("nu", 0.8 * size, 1.2 * size, "", r"\nu")] if self.extended else []),
        ]
        self.prior = BoxPrior(parameters)
        self.observables: tuple[Observable, ...] = (self.layout.observable("(u, R)"),)
        self.exposure = Exposure(self.settings["latitude_deg"], self.settings["zenith_max_deg"])
        self.catalogue = load_starbursts() if catalogue == "starbursts" else random_catalogue(20, seed=1)
        self._build_tables()

    def _build_tables(self) -> None:
        coefficients = self.exposure.legendre()
        self.mean_exposure = float(coefficients[0])
        low, high = self.settings["delta_range"]
        most = 10.0 if self.settings["rigidity_index"] else 1.0  # times the lowest rigidity
        places = np.array([0.95 * low / most, 1.05 * high])
        last, first = np.log(self._kappa(places, np.full(2, self.settings["rigidity_min"])))
        log_kappa = np.linspace(first, last, _N_KAPPA)
        seen = seen_exposure(coefficients, self.catalogue.sin_declination, np.exp(log_kappa)) @ self.catalogue.weights
        self._log_kappa_range = (float(first), float(last))
        self._seen = CubicSpline(log_kappa, seen)
        self._most = float(self.exposure(np.linspace(-1, 1, 20001)).max()) * 1.0001

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The columns of theta."""
        return self.prior.parameters

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw sets x (n, 5 n_max) at theta (n, d).   Raises: ShapeError, NonFiniteError, SupportError of sbi_phys."""
        theta = checked_theta(self.prior, theta)
        counts = rng.poisson(theta[:, 2]) if self.extended else np.full(theta.shape[0], self.n_events)
        owner = np.repeat(np.arange(theta.shape[0]), counts)
        return self.layout.pack(counts.astype(np.int64), self.sample_events(theta[owner], rng))

    def sample_events(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw one event each (n, 4) at theta (n, d): by rejection with the exposure, without the normalisation's table."""
        theta = checked_theta(self.prior, theta)
        n = theta.shape[0]
        rigidity = self._draw_rigidity(n, rng)
        kappa = self._kappa(theta[:, 1], rigidity)
        out, todo = np.empty((n, 3)), np.arange(n)
        while todo.size:
            tried = _isotropic(todo.size, rng)
            signal = np.flatnonzero(rng.random(todo.size) < theta[todo, 0])
            source = rng.choice(self.catalogue.weights.size, signal.size, p=self.catalogue.weights)
            tried[signal] = _draw_vmf(self.catalogue.directions[source], kappa[todo[signal]], rng)
            seen = rng.random(todo.size) * self._most < self.exposure(tried[:, 2])
            out[todo[seen]] = tried[seen]
            todo = todo[~seen]
        return np.column_stack([out, rigidity])

    def event_log_density(self, events: ArrayLike, theta: ArrayLike) -> Array:
        """log p(u, R | theta), 1/sr (1/EV), of events (m, 4) at theta (n, d) -> (n, m).   Raises: CountsError, and as `simulate`."""
        events, theta = self._checked_events(np.asarray(events, dtype=np.float64)), checked_theta(self.prior, theta)
        tiled, rows = np.tile(events, (theta.shape[0], 1)), np.repeat(theta, events.shape[0], axis=0)
        return self._pairs(tiled, rows).reshape(theta.shape[0], events.shape[0])

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Exact log p(x | theta) (n,) of one set x, or of n sets, at theta (n, d); with extended=True the extended likelihood.

        x: (5 n_max,), (n, 5 n_max), or slots (m, 5), (n, m, 5).   Raises: CountsError, and as `simulate`.
        """
        theta = checked_theta(self.prior, theta)
        counts, events = self.layout.unpack(x)
        self._checked_events(events)
        if counts.size == 1 and theta.shape[0] > 1:
            total = self._one_set(events, theta)
        else:
            total = sum_over_sets(self._pairs, counts, events, theta, chunk=20_000)
        return total + poisson_log_pmf(counts, theta[:, 2]) if self.extended else total

    def scan(self, x: ArrayLike, f: ArrayLike, delta0: ArrayLike) -> Array:
        """2 [log L(f, delta0) - log L(0)] of one set on a grid: f (k,), delta0 (l,) degrees -> (k, l); its maximum is the TS.

        Raises: CountsError.
        """
        counts, events = self.layout.unpack(x)
        if counts.size != 1:
            raise CountsError(f"x has {counts.size} sets; expected one")
        f, delta0 = np.asarray(f, dtype=np.float64)[:, None, None], np.asarray(delta0, dtype=np.float64)
        ratio, norm = self._signal_ratio(self._checked_events(events), delta0)
        out = np.log1p(f * (ratio - 1)) - np.log1p(f * (norm - 1))
        return 2 * np.asarray(out.sum(axis=2))

    def relative_exposure(self, delta0: ArrayLike) -> Array:
        """Exposure to the blurred sources over that to an isotropic sky, at the lowest rigidity: delta0 (l,) degrees -> (l,).

        A flux fraction f gives the fraction f a / (1 - f + f a) of events, a this number.
        """
        delta = np.asarray(delta0, dtype=np.float64)
        return self._seen_at(self._kappa(delta, np.full_like(delta, self.settings["rigidity_min"]))) / self.mean_exposure

    def _one_set(self, events: Array, theta: Array) -> Array:
        """Sum over the events at many theta (n,); each blurring is computed once for all f."""
        constant = float(self._isotropic_log_density(events).sum())
        delta0, place = np.unique(theta[:, 1], return_inverse=True)
        out = np.empty(theta.shape[0])
        step = max(1, 2_000_000 // max(1, events.shape[0] * self.catalogue.weights.size))
        order = np.argsort(place, kind="stable")
        bounds = np.searchsorted(place[order], np.arange(0, delta0.size + step, step))
        for i, start in enumerate(range(0, delta0.size, step)):
            rows = order[bounds[i] : bounds[i + 1]]
            ratio, norm = self._signal_ratio(events, delta0[start : start + step])
            f, j = theta[rows, 0], place[rows] - start
            with np.errstate(divide="ignore"):
                for r, share, k in zip(rows, f, j, strict=True):
                    out[r] = (np.log1p(share * (ratio[k] - 1)) - np.log1p(share * (norm[k] - 1))).sum()
        return out + constant

    def _signal_ratio(self, events: Array, delta0: Array) -> tuple[Array, Array]:
        """4 pi sum_s w_s vMF (l, m), and its mean over the exposure relative to isotropy (l, m) or (l, 1)."""
        cosine = events[:, :3] @ self.catalogue.directions.T
        if self.settings["rigidity_index"] is None:
            kappa = self._kappa(delta0, np.full_like(delta0, self.settings["rigidity_min"]))[:, None]
        else:
            kappa = self._kappa(delta0[:, None], events[:, 3])
        ratio = np.empty((delta0.size, events.shape[0]))
        for i in range(delta0.size):
            ratio[i] = 4 * np.pi * _vmf(cosine, kappa[i][:, None]) @ self.catalogue.weights
        return ratio, self._seen_at(kappa) / self.mean_exposure

    def _pairs(self, events: Array, theta: Array) -> Array:
        kappa = self._kappa(theta[:, 1], events[:, 3])
        ratio = 4 * np.pi * _vmf(events[:, :3] @ self.catalogue.directions.T, kappa[:, None]) @ self.catalogue.weights
        norm = self._seen_at(kappa) / self.mean_exposure
        with np.errstate(divide="ignore"):  # f = 1 far from all sources
            signal = np.log1p(theta[:, 0] * (ratio - 1)) - np.log1p(theta[:, 0] * (norm - 1))
        return np.asarray(signal + self._isotropic_log_density(events))

    def _isotropic_log_density(self, events: Array) -> Array:
        """log p(u, R | f = 0) of events (m, 4) -> (m,); all at one rigidity: of the direction alone."""
        with np.errstate(divide="ignore"):
            out = np.log(self.exposure(events[:, 2]) / (4 * np.pi * self.mean_exposure))
        index, low = self.settings["rigidity_index"], self.settings["rigidity_min"]
        return np.asarray(out if index is None else out + np.log((index - 1) / low) - index * np.log(events[:, 3] / low))

    def _seen_at(self, kappa: Array) -> Array:
        log_kappa = np.log(kappa)
        # beyond the table sources are points, whose exposure the end of the table reaches to 1e-4
        return np.asarray(self._seen(np.clip(log_kappa, *self._log_kappa_range)))

    def _kappa(self, delta0: Array, rigidity: Array) -> Array:
        return np.asarray((np.radians(delta0) * 10.0 / rigidity) ** -2.0)

    def _draw_rigidity(self, n: int, rng: np.random.Generator) -> Array:
        low, index = self.settings["rigidity_min"], self.settings["rigidity_index"]
        return np.full(n, low) if index is None else low * (1 - rng.random(n)) ** (-1 / (index - 1))

    def _checked_events(self, events: Array) -> Array:
        if events.ndim != 2 or events.shape[1] != 4:
            raise CountsError(f"events have shape {events.shape}; expected (m, 4) = (u_x, u_y, u_z, R)")
        if not (np.abs(np.linalg.norm(events[:, :3], axis=1) - 1) < 1e-4).all():
            raise CountsError("events have directions that are no unit vectors; expected |u| = 1")
        if (events[:, 3] < self.settings["rigidity_min"] * (1 - 1e-6)).any():
            raise CountsError(
                f"events have rigidities down to {events[:, 3].min():g} EV; expected at least {self.settings['rigidity_min']:g} EV"
            )
        if (self.exposure(events[:, 2]) <= 0).any():
            raise CountsError("events come from declinations without exposure; expected directions within the field of view")
        return events


def seen_exposure(coefficients: Array, sin_declination: Array, kappa: Array) -> Array:
    """b_s(kappa) = sum_l a_l A_l(kappa) P_l(sin dec_s), the exposure averaged over the blurring, (n_kappa, n_sources)."""
    degree = np.arange(coefficients.size)
    with np.errstate(invalid="ignore", divide="ignore"):
        shrink = ive(degree + 0.5, kappa[:, None]) / ive(0.5, kappa[:, None])
    table = np.polynomial.legendre.legvander(sin_declination, coefficients.size - 1)
    return np.asarray((np.nan_to_num(shrink) * coefficients) @ table.T)


def _vmf(cosine: Array, kappa: Array) -> Array:
    """Density (m, n_sources) per steradian at cosines (m, n_sources) and kappa (m, 1)."""
    return np.asarray(kappa / (-2 * np.pi * np.expm1(-2 * kappa)) * np.exp(kappa * (cosine - 1)))


def _isotropic(n: int, rng: np.random.Generator) -> Array:
    sine, ra = rng.uniform(-1, 1, n), rng.uniform(0, 2 * np.pi, n)
    cosine = np.sqrt(1 - sine**2)
    return np.column_stack([cosine * np.cos(ra), cosine * np.sin(ra), sine])


def _draw_vmf(centre: Array, kappa: Array, rng: np.random.Generator) -> Array:
    """One direction each (n, 3) from vMF(centre (n, 3), kappa (n,)), by the inverse distribution of the cosine."""
    n = kappa.size
    v, angle = rng.random(n), rng.uniform(0, 2 * np.pi, n)
    cosine = np.clip(1 + np.log(v + (1 - v) * np.exp(-2 * kappa)) / kappa, -1.0, 1.0)
    sine = np.sqrt(1 - cosine**2)
    # any axis that is not parallel to the centre defines a frame
    helper = np.where(np.abs(centre[:, 2:]) < 0.9, np.array([0.0, 0.0, 1.0]), np.array([1.0, 0.0, 0.0]))
    first = np.cross(centre, helper)
    first /= np.linalg.norm(first, axis=1, keepdims=True)
    second = np.cross(centre, first)
    tangent = np.cos(angle)[:, None] * first + np.sin(angle)[:, None] * second
    out = cosine[:, None] * centre + sine[:, None] * tangent
    return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True))
