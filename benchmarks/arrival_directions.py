"""Arrival directions, 1400 events: a learned test statistic compared with the exact one, and confidence sets for the signal fraction.

    python benchmarks/arrival_directions.py [--toys 12000] [--events 250000] [--keep FOLDER] [--parts 2]
        [--out benchmarks/results/arrival_directions.json]

An event comes from a catalogue of sources blurred by delta0, s(u | delta0), or from an isotropic sky, b(u), both seen through the exposure.
A classifier with delta0 as an input learns r = s / b. Its inputs for an event are the catalogue smoothed by five fixed angles, at the
event's direction; the exposure, the normalisation and the dependence of the blurring on delta0 are not among them. With the relative
exposure a(delta0), a set of n events then has the learned log likelihood ratio

    log Lambda(f, delta0) = sum_e log(1 + f (a r_e - 1)) - n log(1 + f (a - 1)),   q(f) = 2 [max log Lambda - max_delta0 log Lambda(f)].

statistic   2 max log Lambda, learned against exact, on the same data sets: correlation, shift of the mean
coverage    sets in f from a Neyman construction on a grid of (f, delta0), at f in [0, .2] and three blurrings, and on average over the
            prior of the blurring. With few sources delta0 is hardly identified, and its treatment matters. Compared are: its profiled
            value taken for the true one, the same corrected by prepivoting, the supremum over it; learned critical values, with and
            without correction; Wilks'.
size        how often the sets hold a wrong f

Experiment i shares its random numbers between all grid points: it takes the first n - m_i of a row of isotropic events and the first m_i
of a row of signal events (one row for each blurring), where m_i counts the uniform numbers of that experiment below the share of signal
events. At each grid point it is an exact draw, and experiments i and j are independent. All points cost little more than one.
With --keep the experiments are kept in a folder; with --parts the run stops after that many thousands, and the same command continues it.
Prints each number with its required value, writes JSON and exits with 1 if a requirement is not met.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
from benchmarks.suite.table import Numbers, arguments, run
from sbi_phys.confidence import Construction, lf2i, neyman
from sbi_phys.core.files import open_aside
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.hypotheses import TwoHypotheses
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.training.loop import TrainConfig
from simulators import ArrivalDirections
from simulators.arrival_directions import unit_vectors

Array = NDArray[np.float64]

N_EVENTS = 1400
LEVELS = (0.68, 0.9)
DELTAS = np.array([5.0, 7.0, 9.0, 12.0, 15.0, 19.0, 24.0, 30.0])  # degrees, where the likelihood is evaluated
FRACTIONS = np.concatenate([np.arange(0, 0.11, 0.01), [0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4]])
TRUTHS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)
BLURS = (9.0, 15.0, 24.0)
ROUNDS = 4  # of prepivoting
SIM = ArrivalDirections(n_events=N_EVENTS, delta_range=(DELTAS[0], DELTAS[-1]))
SMOOTHING = np.array([4.0, 8.0, 14.0, 22.0, 36.0])  # degrees
GRID = FRACTIONS[FRACTIONS < 0.21]  # fractions at which critical values are computed
PART = 1000  # experiments that are simulated and saved together
BLOCK = 25  # experiments whose events are drawn together
_GROUP = 16  # events whose factors are multiplied before a logarithm is taken: no more, or single precision overflows


def features(directions: Array) -> Array:
    """Log of the catalogue, smoothed by each of SMOOTHING, over isotropy: unit vectors (n, 3) -> (n, 5)."""
    cosine = directions @ SIM.catalogue.directions.T
    kappa = 1 / np.radians(SMOOTHING) ** 2
    maps = [4 * np.pi * k / (-2 * np.pi * np.expm1(-2 * k)) * np.exp(k * (cosine - 1)) @ SIM.catalogue.weights for k in kappa]
    return np.log(np.stack(maps, axis=1) + 1e-3)


def learn(n: int, *, epochs: int = 8, hidden: int = 64, seed: int = 0) -> TwoHypotheses:
    """Classifier of n signal events, blurrings evenly over their range, against n isotropic ones."""
    rng = rng_for(seed, "events")
    delta = rng.uniform(DELTAS[0], DELTAS[-1], n)
    signal = SIM.sample_events(np.column_stack([np.ones(n), delta]), rng)
    isotropic = SIM.sample_events(np.column_stack([np.zeros(n), delta]), rng)
    # the hypotheses are (is signal, delta0), as one function of both gives the ratio; isotropy has no blurring
    first, second = np.column_stack([np.ones(n), delta]), np.array([0.0, DELTAS.mean()])
    ratio = TwoHypotheses(
        seed=seed,
        network=ClassifierConfig(hidden=hidden, rank=64),
        embedding=EmbeddingConfig(hidden=hidden, n_blocks=1, n_features=48),
        config=TrainConfig(batch_size=min(1024, n // 8), max_epochs=epochs, patience=epochs, learning_rate=4e-3),
        device="cpu",
    )
    return ratio.fit(first, features(signal[:, :3]), second, features(isotropic[:, :3]))


@dataclass(frozen=True)
class SkyMap:
    """a r on a grid of one degree in right ascension and declination for each of DELTAS: log values (n_dec, 361, n_delta)."""

    values: Array
    declinations: Array

    def at(self, directions: Array) -> Array:
        """a r (n, n_delta) at unit vectors (n, 3), bilinear in the logarithm."""
        ra = np.degrees(np.arctan2(directions[:, 1], directions[:, 0])) % 360
        row = np.clip(np.degrees(np.arcsin(directions[:, 2])) - self.declinations[0], 0, len(self.declinations) - 1 - 1e-9)
        i, j = row.astype(int), np.minimum(ra.astype(int), 359)
        v, w = (row - i)[:, None], (ra - j)[:, None]
        low = self.values[i, j] * (1 - w) + self.values[i, j + 1] * w
        high = self.values[i + 1, j] * (1 - w) + self.values[i + 1, j + 1] * w
        return np.exp(low * (1 - v) + high * v)


def sky_map(ratio: TwoHypotheses) -> SkyMap:
    """The learned ratio everywhere, scaled so that its mean over an isotropic sky is the relative exposure."""
    dec, ra = np.arange(-90.0, 47.0), np.arange(0.0, 361.0)
    grid = np.stack(np.meshgrid(dec, ra, indexing="ij"), axis=-1).reshape(-1, 2)
    x = features(unit_vectors(grid[:, 1], grid[:, 0]))
    log_r = [ratio.log_ratio(x, [[1.0, d]], [[0.0, DELTAS.mean()]]) for d in DELTAS]
    raw = SkyMap(np.stack(log_r, axis=-1).reshape(dec.size, ra.size, DELTAS.size), dec)
    n = 200_000  # points spread evenly over the sphere: the ratio of densities integrates to one
    i = np.arange(n) + 0.5
    sky = unit_vectors(np.degrees(np.pi * (1 + 5**0.5) * i) % 360, np.degrees(np.arcsin(1 - 2 * i / n)))
    omega = SIM.exposure(sky[:, 2])
    mean = (omega[:, None] * raw.at(sky)).sum(axis=0) / omega.sum()
    print("[mean of the learned ratio over an isotropic sky, before it is set to 1: " + ", ".join(f"{m:.4f}" for m in mean) + "]")
    return SkyMap(raw.values + np.log(SIM.relative_exposure(DELTAS) / mean), dec)


def prefix_sums(excess: NDArray[np.float32], ends: NDArray[np.int64]) -> Array:
    """sum_(e < end) log(1 + f excess_e) for ends (k,), of excesses (m, n_delta) -> (k, fractions, n_delta)."""
    m, width = len(excess), FRACTIONS.size * DELTAS.size
    if m == 0:
        return np.zeros((ends.size, FRACTIONS.size, DELTAS.size))
    starts = np.unique(np.concatenate([np.arange(0, m, _GROUP), ends[ends < m]]))
    factors = FRACTIONS.astype(np.float32)[:, None] * excess[:, None, :]
    factors += 1
    logs = np.log(np.multiply.reduceat(factors.reshape(m, width), starts, axis=0))
    total = np.concatenate([np.zeros((1, width)), np.cumsum(logs, axis=0, dtype=np.float64)])
    return total[np.searchsorted(np.append(starts, m), ends)].reshape(-1, FRACTIONS.size, DELTAS.size)


def experiments(sky: SkyMap, f: Array, deltas: Array, tested: Array | None, rng: np.random.Generator) -> tuple[Array, Array]:
    """Experiments at fractions f (k,) and blurrings (n, c): the largest log Lambda (n, k, c), and log Lambda at the tested f.

    The latter is (n, k, c, n_delta) at the true f, or (n, k, c, t, n_delta) at f = tested (t,).
    """
    n, c = deltas.shape
    own = np.abs(FRACTIONS[:, None] - f).argmin(axis=0)
    wanted = own if tested is None else np.abs(FRACTIONS[:, None] - tested).argmin(axis=0)
    norm = N_EVENTS * np.log1p(FRACTIONS[:, None] * (SIM.relative_exposure(DELTAS) - 1))
    a = SIM.relative_exposure(deltas.ravel()).reshape(n, 1, c)
    share = f[:, None] * a / (1 - f[:, None] + f[:, None] * a)
    top, rows = np.empty((n, f.size, c)), np.empty((n, f.size, c, *(() if tested is None else wanted.shape), DELTAS.size))
    for start in range(0, n, BLOCK):
        block = range(start, min(start + BLOCK, n))
        m = [np.searchsorted(np.sort(rng.random(N_EVENTS)), share[i]) for i in block]  # signal events (k, c) of each
        most = np.array([count.max(axis=0) for count in m])
        kind = np.repeat([0.0, 1.0], [N_EVENTS * len(block), int(most.sum())])
        blur = np.concatenate([np.full(N_EVENTS * len(block), DELTAS.mean()), np.repeat(deltas[block].ravel(), most.ravel())])
        excess = (sky.at(SIM.sample_events(np.column_stack([kind, blur]), rng)[:, :3]) - 1).astype(np.float32)
        isotropic = excess[: N_EVENTS * len(block)].reshape(len(block), N_EVENTS, -1)
        signal = np.split(excess[N_EVENTS * len(block) :], np.cumsum(most)[:-1])
        for i, count in enumerate(m):
            table = prefix_sums(isotropic[i], N_EVENTS - count.ravel()).reshape(f.size, c, *norm.shape) - norm
            for j in range(c):
                table[:, j] += prefix_sums(signal[i * c + j], count[:, j])
            top[start + i] = table.max(axis=(2, 3))
            rows[start + i] = table[np.arange(f.size), :, own] if tested is None else table[:, :, wanted]
    return top, rows


def kept(folder: Path | None, name: str, make: Callable[[], dict[str, Array]], budget: list[int]) -> dict[str, Array]:
    """Arrays from a file of the folder, or computed and saved there; exits when the budget of parts is used up."""
    file = None if folder is None else folder / f"{name}.npz"
    if file is not None and file.is_file():
        with np.load(file) as found:
            return dict(found)
    if not budget[0]:
        sys.exit("the parts of this run are finished; start it again to continue")
    budget[0] -= 1
    made = make()
    if file is not None:
        with open_aside(file, make_folder=True) as aside:
            np.savez(aside, **made)  # type: ignore[arg-type]
    return made


def simulated(sky: SkyMap, what: str, n: int, folder: Path | None, budget: list[int]) -> tuple[Array, Array]:
    """Experiments for the critical values, or for the coverage, part by part."""

    def make(part: int) -> dict[str, Array]:
        rng = rng_for(42, what, part)
        if what == "critical":
            top, rows = experiments(sky, GRID, np.tile(DELTAS, (PART, 1)), None, rng)
        else:
            prior = rng.uniform(DELTAS[0], DELTAS[-1], PART)
            deltas = np.column_stack([np.tile(BLURS, (PART, 1)), prior])
            top, rows = experiments(sky, np.array(TRUTHS), deltas, np.array(TRUTHS), rng)
        print(f"[{what} {part + 1}]", flush=True)
        return {"top": top.astype(np.float32), "rows": rows.astype(np.float32)}

    parts = [kept(folder, f"{what}_{i}", partial(make, i), budget) for i in range(-(-n // PART))]
    return np.concatenate([p["top"] for p in parts])[:n], np.concatenate([p["rows"] for p in parts])[:n]


def statistic(theta: Array, data: Array) -> Array:
    """q (n,) of experiments (n, 1 + n_delta): the largest log Lambda, and log Lambda at the tested f for each blurring."""
    return np.asarray(2 * (data[:, 0] - data[:, 1:].max(axis=1)))


def profile(psi: Array, data: Array) -> Array:
    """Blurring (n,) that fits best at f = psi; without sources all fit equally well, and one in the middle is returned."""
    return np.full(len(data), 15.0) if psi[0] < 1e-9 else DELTAS[data[:, 1:].argmax(axis=1)]


def joined(top: Array, rows: Array) -> Array:
    """Experiments as the statistic takes them."""
    return np.concatenate([top[..., None], rows], axis=-1).astype(np.float64)


def against_exact(sky: SkyMap, n_toys: int) -> Numbers:
    """Test statistics of the same data sets from the learned and the exact likelihood."""
    numbers: Numbers = {}
    a, f = SIM.relative_exposure(DELTAS), FRACTIONS[:, None]
    for name, theta in (("null", (0.0, 15.0)), ("f = 0.09, 15 deg", (0.09, 15.0)), ("f = 0.2, 9 deg", (0.2, 9.0))):
        x = SIM.simulate(np.tile(theta, (n_toys, 1)), rng_for(41, name)).reshape(n_toys, N_EVENTS, 5)
        learned, exact = np.empty(n_toys), np.empty(n_toys)
        for i, row in enumerate(x):
            exact[i] = SIM.scan(row, FRACTIONS, DELTAS).max()
            excess = (sky.at(row[:, :3]) - 1)[:, None]
            learned[i] = 2 * (np.log1p(f[:, 0, None] * excess).sum(axis=0) - N_EVENTS * np.log1p(f * (a - 1))).max()
        numbers[f"{name}: correlation of learned and exact TS, {n_toys} data sets"] = (
            float(np.corrcoef(learned, exact)[0, 1]), ">=", 0.99)  # fmt: skip
        numbers[f"{name}: |shift of the mean TS| over its sd"] = (float(abs((learned - exact).mean()) / exact.std()), "<=", 0.05)
        numbers[f"{name}: mean of the exact TS"] = (float(exact.mean()), "", None)
    return numbers


def construct(top: Array, rows: Array) -> dict[str, Construction]:
    """Confidence sets for each treatment of delta0."""

    def simulator(theta: Array, n: int, rng: np.random.Generator) -> Array:
        i, j = int(np.abs(GRID - theta[0]).argmin()), int(np.abs(DELTAS - theta[1]).argmin())
        return joined(top[:, i, j], rows[:, i, j])

    bounds = [(0.0, None), (DELTAS[0], DELTAS[-1])]
    axes, sets = {"f": GRID, "delta0": DELTAS}, dict[str, Construction]()
    for how in ("prepivoted", "profiled", "supremum"):
        known = None if how == "supremum" else profile
        sets[how] = neyman(
            simulator, statistic, axes, LEVELS, n_toys=len(top), interest=1, profile=known, nuisance=how, n_rounds=ROUNDS, bounds=bounds
        )
        print(sets[how].summary(), flush=True)  # type: ignore[attr-defined]
    rng = rng_for(42, "learn")
    i, j = rng.integers(GRID.size, size=(2, len(top))), rng.integers(DELTAS.size, size=(2, len(top)))
    each = np.arange(len(top))
    theta = np.column_stack([GRID[i.ravel()], DELTAS[j.ravel()]])
    data = np.concatenate([joined(top[each, a, b], rows[each, a, b]) for a, b in zip(i, j, strict=True)])
    best = np.where(theta[:, 0] > 0, DELTAS[data[:, 1:].argmax(axis=1)], 15.0)
    for name, profiled in (("learned", None), ("learned, corrected", best)):
        sets[name] = lf2i(
            theta, statistic(theta, data), statistic, LEVELS, names=["f", "delta0"], interest=1, profile=profile, bounds=bounds,
            model="splines-6", profiled=profiled, n_rounds=ROUNDS, seed=1,
        )  # fmt: skip
    return sets


def chance(n_critical: int, n: int, level: float, points: int) -> float:
    """Expected largest deviation of `points` coverages from the level for exact sets and a finite number of experiments."""
    z = np.abs(rng_for(44, "chance").standard_normal((20_000, points))).max(axis=1).mean()
    return float(z * np.sqrt(level * (1 - level) * (1 / n_critical + 1 / n)))


def coverage(sets: dict[str, Construction], n_critical: int, top: Array, rows: Array) -> Numbers:
    """Share of experiments whose set holds the true f, and share whose set holds another one of TRUTHS."""
    numbers: Numbers = {}
    n, points = len(top), len(TRUTHS) * len(BLURS)
    held = {(name, level): np.empty((len(TRUTHS), len(BLURS) + 1, len(TRUTHS))) for name in (*sets, "Wilks") for level in LEVELS}
    for k in range(len(TRUTHS)):
        for j in range(len(BLURS) + 1):
            for t, f in enumerate(TRUTHS):
                data = joined(top[:, k, j], rows[:, k, j, t])
                q = statistic(np.array([f]), data)
                for level in LEVELS:
                    held["Wilks", level][k, j, t] = (q <= chi2.ppf(level, 1)).mean()
                    for name, each in sets.items():
                        held[name, level][k, j, t] = each.contains(data, [f], level).mean()
    numbers |= {f"{100 * level:g} %: largest of {points} deviations by chance alone": (chance(n_critical, n, level, points), "", None)
                for level in LEVELS}  # fmt: skip
    false = ~np.eye(len(TRUTHS), dtype=bool)
    for (name, level), share in held.items():
        true, where = np.einsum("kjk->kj", share), f"{name}, {100 * level:g} %"
        print(f"{where}: rows f = {TRUTHS}, columns delta0 = {BLURS} and its prior\n{np.round(true, 4)}", flush=True)
        asked = ("<=", 0.02) if name == "prepivoted" else ("", None)
        found = true[:, :-1]
        numbers |= {
            f"{where}: largest |coverage - level|, {points} points": (float(np.abs(found - level).max()), *asked),
            f"{where}: on average over the prior of delta0, largest of {len(TRUTHS)}": (float(np.abs(true[:, -1] - level).max()), *asked),
            f"{where}: mean coverage": (float(found.mean()), "", None),
            f"{where}: lowest coverage": (float(found.min()), "", None),
            f"{where}: share of wrong f held": (float(share.transpose(1, 0, 2)[:-1][:, false].mean()), "", None),
        }
    return numbers


def main() -> None:
    parser = arguments(__doc__, "arrival_directions")
    parser.add_argument("--events", type=int, default=250_000, help="events of each kind to learn from")
    parser.add_argument("--toys", type=int, default=12_000, help="experiments for critical values, and as many to count coverage with")
    parser.add_argument("--keep", type=Path, help="folder where the learned map and experiments are kept")
    parser.add_argument("--parts", type=int, default=1000, help="files to make before the run stops")
    options = parser.parse_args()
    budget = [options.parts]
    learned = kept(options.keep, "sky", lambda: {"values": sky_map(learn(options.events)).values}, budget)["values"]
    sky = SkyMap(learned, np.arange(-90.0, 47.0))

    def covered() -> Numbers:
        critical = simulated(sky, "critical", options.toys, options.keep, budget)
        counted = simulated(sky, "coverage", options.toys, options.keep, budget)
        return coverage(construct(*critical), options.toys, *counted)

    facts = {"events": options.events, "toys": options.toys, "rounds": ROUNDS, "kept": options.keep is not None}
    sys.exit(run({"statistic": lambda: against_exact(sky, 200), "coverage": covered}, options, facts))


if __name__ == "__main__":
    main()
