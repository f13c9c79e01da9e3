r"""Sources of ultra-high-energy cosmic rays from the energy spectrum and the Xmax distributions of the Pierre Auger Observatory.

theta = (gamma, lg R_cut [, f_H, f_He, f_N, f_Si, f_Fe] [, nu_energy] [, nu_xmax] [, lg_n])  ->  expected counts  ->  x

1. injection    J_A(E) = J0 f_A (E/EeV)^-gamma f_cut(E / Z R_cut)                         (`propagation`)
2. propagation  particles per mass group at Earth, by the matrix collapsed from CRPropa 3   (`propagation`)
3. detector     energy resolution, energy scale; 15 bins of lgE from 18.7 to 20.2           (`detector`)
4. Xmax         generalised Gumbel, acceptance, resolution, Xmax scale; 9 histograms        (`xmax`)

Steps 1 to 3 are one matrix product (`expectation`). The counts are

    energy bins       conditioned: multinomial(N_obs, p(theta));    parameter: Poisson(10^lg_n p(theta))
    Xmax histograms   multinomial(n_obs of the histogram, q(theta))

with the *observed* totals. For lambda_k = c s_k(theta), the Poisson likelihood integrated over the normalisation c with the scale-free
prior 1/c equals the multinomial times 1/N. 'conditioned' is therefore exactly the Poisson likelihood with the normalisation
marginalised, and needs no parameter for it. The number of events per Xmax histogram depends on the on-time of the fluorescence
telescopes and not on the sources, so it is conditioned on in both cases.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbi_phys.priors import BoxPrior, DirichletPrior, NormalPrior, Observable, Parameter, Prior, ProductPrior
from simulators.auger import AugerData, load_auger
from simulators.counts import CountsBlock, CountsLayout
from simulators.detector import AUGER_FD, AUGER_SD
from simulators.errors import (
    CountsError,
    SimulatorSettingError,
    require_choice,
    require_flag,
    require_fractions,
    require_number,
    require_range,
)
from simulators.expectation import ENERGY_SCALE, LG_EDGES, MAX_PULL, N_XMAX_WINDOWS, EnergyWindows, SpectrumTable, XmaxTable, with_floor
from simulators.propagation import EBL_MODELS, FRACTION_CONVENTIONS, SPECIES, energy_weights, load_propagation
from simulators.xmax import HADRONIC_MODELS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PUBLISHED_FITS", "SourceSpectrum"]

Array = NDArray[np.float64]

_LATEX = {"h": "f_\\mathrm{H}", "he": "f_\\mathrm{He}", "n": "f_\\mathrm{N}", "si": "f_\\mathrm{Si}", "fe": "f_\\mathrm{Fe}"}
_XMAX_LG_EDGES = np.append(LG_EDGES[:9], 20.0)
LG_THRESHOLD = 17.8  # of the energy fractions, lg(E/eV)
_CHUNK = 256  # rows computed at once, few enough for the processor's cache

# label, gamma, lg(R_cut/V), fractions at fixed energy of H, He, N, Si, Fe; Auger combined fit, arXiv:1612.07155.
# The fractions of the SPG fit's first minimum have not been checked against the paper's table; all other numbers have.
PUBLISHED_FITS: tuple[tuple[str, float, float, tuple[float, ...]], ...] = (
    ("Auger 2017, CTG, 1st minimum", -1.03, 18.21, (0.6794, 0.31, 0.01, 0.0006, 0.0)),
    ("Auger 2017, CTG, 2nd minimum", 0.87, 18.62, (0.0, 0.0, 0.88, 0.12, 0.0)),
    ("Auger 2017, CTD, 1st minimum", -1.47, 18.15, (0.4494, 0.52, 0.03, 0.0006, 0.0)),
    ("Auger 2017, SPG, 1st minimum", 0.96, 18.68, (0.0, 0.673, 0.281, 0.046, 0.0)),
    ("Auger 2017, SPG with systematics", 1.22, 18.72, (0.064, 0.467, 0.375, 0.094, 0.0)),
)
_DEFAULT_FRACTIONS = PUBLISHED_FITS[0][3]


class SourceSpectrum:
    r"""Auger's spectrum and Xmax distributions from sources with a rigidity cutoff: simulator with exact likelihood.

    x = [15 counts per energy bin | 9 x n_bins counts per Xmax bin]; theta as in the module's docstring.
    Priors: gamma ~ U(-3, 2.5); lg(R_cut/V) ~ U(17.8, 20); fractions ~ Dirichlet(1, 1, 1, 1, 1); nuisances ~ N(0, 1), in
    units of one systematic standard deviation; lg_n ~ U(4, 5.5).

    Args:
        composition: 'free' (fractions are parameters) or 'fixed' (theta = (gamma, lg_rcut), spectrum only by default).
        fractions: five fractions of H, He, N, Si, Fe for 'fixed'; default: the CTG fit, 1st minimum, of arXiv:1612.07155.
        fraction_convention: 'fixed_energy' or 'energy' (shares of the energy emitted above 10^17.8 eV, the 2022 fit's).
        hadronic_model: 'EPOS-LHC', 'QGSJETII-04' or 'Sibyll2.1'.
        ebl: 'Gilmore12', 'Dominguez11' or 'Kneiske04'.
        evolution: m of the source density (1+z)^m; -3, 0, 3 or 5 are shipped.
        energy_scale: whether nu_energy shifts the measured energies by 14 % per unit; default: in the free case.
        xmax_scale: whether nu_xmax shifts the measured Xmax by its systematic error; default: with free composition.
        xmax: whether x holds the Xmax histograms; default: with free composition.
        normalisation: 'conditioned' or 'parameter'.
        xmax_range: first and last edge of the Xmax histograms in g/cm2, multiples of 20; events beyond are counted in
            the first and the last bin.

    Raises: SimulatorSettingError (a ValueError) for a setting out of range.
    Nuisances beyond +-5 act as +-5. Every bin's probability has a floor of 1e-12, the same in simulator and likelihood.
    Source: arXiv:1612.07155 (model), 2008.06486 (spectrum), 1409.4809 (Xmax).

    >>> from simulators import SourceSpectrum
    >>> simulator = SourceSpectrum(composition="fixed")
    >>> theta = [[-1.03, 18.21]]  # spectral index, lg(R_cut/V)
    >>> simulator.expected(theta).shape, simulator.log_likelihood(simulator.observed(), theta).shape
    ((1, 15), (1,))
    """

    def __init__(
        self,
        *,
        composition: str = "free",
        fractions: Sequence[float] | None = None,
        fraction_convention: str = "fixed_energy",
        hadronic_model: str = "EPOS-LHC",
        ebl: str = "Gilmore12",
        evolution: float = 0.0,
        energy_scale: bool | None = None,
        xmax_scale: bool | None = None,
        xmax: bool | None = None,
        normalisation: str = "conditioned",
        xmax_range: Sequence[float] = (600.0, 1000.0),
    ) -> None:
        free = require_choice("composition", composition, ("free", "fixed")) == "free"
        has_xmax = free if xmax is None else require_flag("xmax", xmax)
        low, high = _checked_range(xmax_range)
        self.settings: dict[str, Any] = {
            "composition": composition,
            "fractions": _checked_fractions(fractions, free),
            "fraction_convention": require_choice("fraction_convention", fraction_convention, FRACTION_CONVENTIONS),
            "hadronic_model": require_choice("hadronic_model", hadronic_model, HADRONIC_MODELS),
            "ebl": require_choice("ebl", ebl, EBL_MODELS),
            "evolution": require_number("evolution", evolution, -10, 10),
            "energy_scale": free if energy_scale is None else require_flag("energy_scale", energy_scale),
            "xmax_scale": (free and has_xmax) if xmax_scale is None else require_flag("xmax_scale", xmax_scale),
            "xmax": has_xmax,
            "normalisation": require_choice("normalisation", normalisation, ("conditioned", "parameter")),
            "xmax_range": [low, high],
        }
        if self.settings["xmax_scale"] and not has_xmax:
            raise SimulatorSettingError("xmax_scale is True and xmax is False; expected xmax=True, or xmax_scale=False")
        self.prior: Prior = _build_prior(self.settings)
        self._column = {name: i for i, name in enumerate(self.prior.names)}
        self.data: AugerData = load_auger()
        self._build_tables(low, high)

    def _build_tables(self, low: float, high: float) -> None:
        s = self.settings
        self.propagation = load_propagation(s["ebl"], s["evolution"])
        self._source = SpectrumTable(self.propagation.lg_centres, s["fraction_convention"], LG_THRESHOLD)
        sliding = bool(s["energy_scale"])
        self._energy = EnergyWindows.build(self.propagation, AUGER_SD, LG_EDGES.size - 1, by_group=False, sliding=sliding)
        first = int(np.flatnonzero(self.data.spectrum_edges[:-1] > LG_EDGES[0] - 0.01)[0])
        self._observed = [self.data.spectrum_counts[first:].astype(np.float64)]
        total = int(self._observed[0].sum()) if s["normalisation"] == "conditioned" else None
        blocks = [CountsBlock("n_energy", 0, LG_EDGES.size - 1, total)]
        observables = [
            Observable("n_energy", LG_EDGES.size - 1, "", r"N(\lg(E/\mathrm{eV}))", "counts", tuple(LG_EDGES), "lg(E/eV)"),
        ]
        self._groups: EnergyWindows | None = None
        self._xmax: XmaxTable | None = None
        if s["xmax"]:
            self._groups = EnergyWindows.build(self.propagation, AUGER_FD, N_XMAX_WINDOWS, by_group=True, sliding=sliding)
            row = int(np.flatnonzero(self.data.xmax_lg_edges > LG_EDGES[0] - 0.01)[0])
            edges = np.arange(low, high + 1, 20.0)
            self._xmax = XmaxTable.build(self.data, s["hadronic_model"], edges, row)
            for i in range(9):
                name = f"n_xmax_{_XMAX_LG_EDGES[i]:.1f}"
                latex = rf"N(X_\mathrm{{max}} \mid {_XMAX_LG_EDGES[i]:.1f} < \lg E < {_XMAX_LG_EDGES[i + 1]:.1f})"
                start = blocks[-1].start + blocks[-1].size
                blocks.append(CountsBlock(name, start, edges.size - 1, int(self._xmax.n_events[i])))
                observables.append(Observable(name, edges.size - 1, "", latex, "counts", tuple(edges), "g/cm2"))
                self._observed.append(_rebin(self.data.xmax_counts[row + i], self.data.xmax_edges, edges))
        self.layout = CountsLayout(tuple(blocks))
        self.observables: tuple[Observable, ...] = tuple(observables)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The columns of theta."""
        return self.prior.parameters

    def __repr__(self) -> str:
        """The settings."""
        return f"SourceSpectrum({', '.join(f'{k}={v!r}' for k, v in self.settings.items())})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the settings only, so that worker processes rebuild the tables instead of receiving megabytes."""
        return _rebuild, (self.settings,)

    def simulate(self, theta: ArrayLike, rng: np.random.Generator) -> Array:
        """Draw observations x (n, k) of whole counts at theta (n, d).

        Raises: ShapeError, NonFiniteError or SupportError (of sbi_phys) for theta of the wrong shape, with NaN, or
        outside the prior.   Read: the same theta and generator state give the same bytes.
        """
        theta = self._checked(theta)
        out = np.empty((theta.shape[0], self.layout.size))
        for rows in _chunks(theta.shape[0]):
            out[rows] = self.layout.sample(self._expected(theta[rows]), rng)
        return out

    def expected(self, theta: ArrayLike) -> Array:
        """Mean of x at theta (n, d) -> (n, k), events.   Raises: as `simulate`."""
        theta = self._checked(theta)
        out = np.empty((theta.shape[0], self.layout.size))
        for rows in _chunks(theta.shape[0]):
            out[rows] = self._expected(theta[rows])
        return out

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """Exact, normalised log p(x | theta) (n,) of x (k,) or (n, k) at theta (n, d), with all multinomial coefficients.

        Raises: CountsError for x of the wrong shape or totals, and as `simulate` for theta.
        """
        return self._over_rows(x, theta, self.layout.log_likelihood)

    def deviance(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """2 (log L of the saturated model - log p(x | theta)) (n,), >= 0.   Raises: as `log_likelihood`."""
        return self._over_rows(x, theta, self.layout.deviance)

    def observed(self) -> Array:
        """Auger's published counts in the layout of x (k,)."""
        return np.concatenate(self._observed)

    def published(self) -> list[dict[str, Any]]:
        """Published best fits for comparison: label, source, theta (parameter name -> value), in this convention of fractions."""
        out = []
        for label, gamma, lg_rcut, fractions in PUBLISHED_FITS:
            theta = {"gamma": gamma, "lg_rcut": lg_rcut}
            if self.settings["composition"] == "free":
                share = np.array(fractions)
                if self.settings["fraction_convention"] == "energy":
                    share = share * energy_weights(gamma, lg_rcut, LG_THRESHOLD)[0]
                theta |= {f"f_{name}": float(v) for name, v in zip(SPECIES, share / share.sum(), strict=True)}
            out.append({"label": label, "source": "arXiv:1612.07155", "theta": theta})
        return out

    def figures(self, theta: ArrayLike, x_obs: ArrayLike, *, seed: int = 0) -> list[tuple[str, str, str, "Figure"]]:
        """Spectrum, Xmax moments and Xmax histograms with posterior-predictive bands: (name, title, caption, figure).

        Args: theta (n, d): posterior draws. x_obs (k,). seed: of the predictive simulations.   Raises: as `log_likelihood`.
        """
        from simulators.figures import source_figures

        return source_figures(self, self._checked(theta), self.layout.check(x_obs)[0], seed=seed)

    def group_counts(self, theta: ArrayLike) -> Array:
        """Expected counts per mass group at Earth and energy bin (n, 5, 15), folded, summing to the energy block of `expected`."""
        theta = self._checked(theta)
        windows = EnergyWindows.build(
            self.propagation, AUGER_SD, LG_EDGES.size - 1, by_group=True, sliding=bool(self.settings["energy_scale"])
        )
        out = np.empty((theta.shape[0], 5, LG_EDGES.size - 1))
        for rows in _chunks(theta.shape[0]):
            out[rows] = windows.counts(self._injected(theta[rows]), self._energy_shift(theta[rows]))
        total = self.expected(theta)[:, : LG_EDGES.size - 1]
        return out / out.sum(axis=1, keepdims=True) * total[:, None]

    def pure_groups(self, theta: ArrayLike) -> tuple[Array, Array]:
        """Mean lg(E/eV) (9,) of the Xmax histograms' energy bins, and their shape (5, 9, n_bins) for one pure mass group each.

        Averaged over theta (n, d) where the energies within a bin matter; without nuisances.
        Raises: SimulatorSettingError if x holds no Xmax histograms.
        """
        if self._xmax is None or self._groups is None:
            raise SimulatorSettingError("xmax is False; expected a simulator with Xmax histograms")
        theta = self._checked(theta)
        windows = self._groups.counts(self._injected(theta), self._energy_shift(theta)).sum(axis=1)
        share = (windows / windows.sum(axis=1, keepdims=True)).mean(axis=0)
        pure = np.zeros((5, 5, N_XMAX_WINDOWS))
        pure[np.arange(5), np.arange(5)] = share
        mean_last = float((share[8:] * (19.55 + 0.1 * np.arange(5))).sum() / share[8:].sum())
        return np.append(18.75 + 0.1 * np.arange(8), mean_last), self._xmax.probabilities(pure, None)

    def _checked(self, theta: ArrayLike) -> Array:
        if hasattr(theta, "detach"):  # a torch tensor
            theta = theta.detach().cpu().numpy()
        inside = self.prior.contains(theta)
        theta = np.atleast_2d(np.asarray(theta, dtype=np.float64))
        if not inside.all():
            self.prior.require_contains(theta)
        return theta

    def _over_rows(self, x: ArrayLike, theta: ArrayLike, function: Any) -> Array:
        theta, counts = self._checked(theta), self.layout.check(x)
        if counts.shape[0] not in (1, theta.shape[0]):
            raise CountsError(f"x has {counts.shape[0]} rows and theta {theta.shape[0]}; expected as many, or one x")
        out = np.empty(theta.shape[0])
        for rows in _chunks(theta.shape[0]):
            out[rows] = function(counts if counts.shape[0] == 1 else counts[rows], self._expected(theta[rows]))
        return out

    def _injected(self, theta: Array) -> Array:
        if self.settings["composition"] == "free":
            start = self._column["f_h"]
            fractions = theta[:, start : start + 5]
        else:
            fractions = np.broadcast_to(np.array(self.settings["fractions"]), (theta.shape[0], 5))
        return self._source.injected(theta[:, 0], theta[:, 1], fractions)

    def _energy_shift(self, theta: Array) -> Array | None:
        if not self.settings["energy_scale"]:
            return None
        return np.clip(theta[:, self._column["nu_energy"]], -MAX_PULL, MAX_PULL) * ENERGY_SCALE

    def _expected(self, theta: Array) -> Array:
        injected, shift = self._injected(theta), self._energy_shift(theta)
        total = self._energy.counts(injected, shift)[:, 0]
        out = np.empty((theta.shape[0], self.layout.size))
        block = self.layout.blocks[0]
        probability = with_floor(total / total.sum(axis=1, keepdims=True))
        events = 10 ** theta[:, self._column["lg_n"], None] if block.total is None else block.total
        out[:, block.columns] = probability * events
        if self._xmax is not None and self._groups is not None:
            pull = theta[:, self._column["nu_xmax"]] if self.settings["xmax_scale"] else None
            groups = self._groups.counts(injected, shift)
            q = self._xmax.probabilities(groups, self._xmax.shift(shift, pull, theta.shape[0]))
            out[:, block.size :] = (q * self._xmax.n_events[:, None]).reshape(theta.shape[0], -1)
        return out


def _rebuild(settings: dict[str, Any]) -> SourceSpectrum:
    return SourceSpectrum(**settings)


def _chunks(n: int) -> list[slice]:
    return [slice(i, min(i + _CHUNK, n)) for i in range(0, n, _CHUNK)]


def _rebin(counts: NDArray[np.int64], edges: Array, new: Array) -> Array:
    """Sum counts into the bins `new`; the first and the last bin include all counts beyond them."""
    index = np.clip(np.searchsorted(new, edges[:-1] + 1e-9, side="right") - 1, 0, new.size - 2)
    return np.bincount(index, weights=counts, minlength=new.size - 1).astype(np.float64)


def _checked_range(value: Sequence[float]) -> tuple[float, float]:
    low, high = require_range("xmax_range", value, 400, 1400)
    if low % 20 or high % 20 or high - low < 60:
        raise SimulatorSettingError(
            f"xmax_range is {value!r}; expected two multiples of 20 g/cm2 within [400, 1400], at least 60 apart, e.g. (600, 1000)"
        )
    return low, high


def _checked_fractions(value: Sequence[float] | None, free: bool) -> list[float] | None:
    if free:
        if value is not None:
            raise SimulatorSettingError(
                f"fractions are {value!r} and composition is 'free'; expected fractions only with composition='fixed'"
            )
        return None
    return require_fractions(_DEFAULT_FRACTIONS if value is None else value).tolist()


def _build_prior(settings: dict[str, Any]) -> Prior:
    blocks: list[Prior] = [
        BoxPrior(
            [Parameter("gamma", -3.0, 2.5, "", r"\gamma"), Parameter("lg_rcut", 17.8, 20.0, "lg V", r"\lg(R_\mathrm{cut}/\mathrm{V})")]
        )
    ]
    if settings["composition"] == "free":
        blocks.append(DirichletPrior([Parameter(f"f_{name}", latex=_LATEX[name]) for name in SPECIES]))
    nuisances = []
    if settings["energy_scale"]:
        nuisances.append(Parameter("nu_energy", latex=r"\nu_E"))
    if settings["xmax_scale"]:
        nuisances.append(Parameter("nu_xmax", latex=r"\nu_{X_\mathrm{max}}"))
    if nuisances:
        blocks.append(NormalPrior(nuisances))
    if settings["normalisation"] == "parameter":
        blocks.append(BoxPrior([Parameter("lg_n", 4.0, 5.5, "", r"\lg N")]))
    return blocks[0] if len(blocks) == 1 else ProductPrior(blocks)
