"""Arrival directions, 1400 events: a learned test statistic beside the exact one, and confidence sets for the signal fraction that cover.

    python benchmarks/arrival_directions.py [--toys 4000] [--events 300000] [--out benchmarks/results/arrival_directions.json]

An event comes from a catalogue of sources blurred by delta0, s(u | delta0), or from an isotropic sky, b(u), both seen through the exposure.
A classifier with delta0 as an input learns r = s / b. What it sees of an event is the catalogue smoothed by five fixed angles, at the
event's direction: nothing of the exposure, the normalisation, or how the blurring depends on delta0. With the relative exposure
a(delta0), a set of n events then has the learned log likelihood ratio

    log Lambda(f, delta0) = sum_e log(1 + f (a r_e - 1)) - n log(1 + f (a - 1)),   q(f) = 2 [max log Lambda - max_delta0 log Lambda(f)].

statistic   2 max log Lambda, learned against exact, on the same data sets: correlation, shift of the mean
coverage    sets in f by learned critical values (delta0 profiled), and Wilks' beside them, at f in [0, .2] and three blurrings
Prints each number with what is asked of it, writes JSON and exits with 1 if one is missed.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chi2

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# ruff: noqa: E402
from sbi_phys.confidence import LF2I, lf2i
from sbi_phys.estimators.two_hypotheses import TwoHypotheses
from sbi_phys.nets.classifier import ClassifierConfig
from sbi_phys.nets.embed import EmbeddingConfig
from sbi_phys.rng import rng_for
from sbi_phys.train import TrainConfig
from simulators import ArrivalDirections
from simulators.arrival_directions import unit_vectors

Array = NDArray[np.float64]
Numbers = dict[str, tuple[float, str, float | None]]  # name -> value, '<=' or '>=', bound (None = for information)

N_EVENTS = 1400
LEVELS = (0.68, 0.9)
DELTAS = np.array([5.0, 7.0, 9.0, 12.0, 15.0, 19.0, 24.0, 30.0])  # degrees, where the likelihood is looked at
FRACTIONS = np.concatenate([np.arange(0, 0.11, 0.01), [0.125, 0.15, 0.175, 0.2, 0.25, 0.3, 0.35, 0.4]])
TRUTHS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2)
BLURS = (9.0, 15.0, 24.0)
SIM = ArrivalDirections(n_events=N_EVENTS, delta_range=(DELTAS[0], DELTAS[-1]))
SMOOTHING = np.array([4.0, 8.0, 14.0, 22.0, 36.0])  # degrees
_GROUP = 10  # events whose factors are multiplied before a logarithm is taken


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
        seed,
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


def tables(sky: SkyMap, theta: Array, rng: np.random.Generator) -> Array:
    """log Lambda (n, fractions, blurrings) of one simulated data set at each theta (n, 2)."""
    out = np.empty((len(theta), FRACTIONS.size, DELTAS.size))
    a, f = SIM.relative_exposure(DELTAS), FRACTIONS[:, None]
    for start in range(0, len(theta), 100):
        part = theta[start : start + 100]
        events = SIM.sample_events(np.repeat(part, N_EVENTS, axis=0), rng)
        excess = (sky.at(events[:, :3]) - 1).reshape(len(part), _GROUP, N_EVENTS // _GROUP, DELTAS.size)
        for k, share in enumerate(FRACTIONS):
            out[start : start + 100, k] = np.log((1 + share * excess).prod(axis=1)).sum(axis=1)
    return np.asarray(out - N_EVENTS * np.log1p(f * (a - 1)))


def statistic(data: Array, theta: Array) -> Array:
    """q (n,) of data sets, given by their tables, at f of FRACTIONS: theta (d,) for all or (n, d)."""
    k = np.abs(FRACTIONS[:, None] - np.atleast_1d(theta[..., 0])).argmin(axis=0)
    here = data[np.arange(len(data)), k].max(axis=1)
    return np.asarray(2 * (data.max(axis=(1, 2)) - here))


def profile(data: Array, psi: Array) -> Array:
    """Blurring (n, 1) that fits best at f = psi; without sources all fit alike, and one in the middle stands for them."""
    k = int(np.abs(FRACTIONS - psi[0]).argmin())
    if k == 0:
        return np.full((len(data), 1), 15.0)
    return DELTAS[data[:, k].argmax(axis=1)][:, None]


def against_exact(sky: SkyMap, n_toys: int) -> Numbers:
    """TS of the same data sets by both likelihoods."""
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


def construct(sky: SkyMap, n: int) -> LF2I:
    """Critical values in (f, delta0) from one data set at each of n points, f denser where they change fast."""
    rng = rng_for(42, "learn")
    k = rng.choice(int(np.searchsorted(FRACTIONS, 0.26)), n)
    theta = np.column_stack([FRACTIONS[k], rng.uniform(DELTAS[0], DELTAS[-1], n)])
    q = statistic(data := tables(sky, theta, rng), theta)
    print(f"[{n} data sets for critical values: mean q {q.mean():.3f}, {data.nbytes / 2**20:.0f} MiB]", flush=True)
    bounds = [(0, None), (DELTAS[0], DELTAS[-1])]
    return lf2i(theta, q, statistic, LEVELS, names=["f", "delta0"], interest=1, profile=profile, bounds=bounds, model="splines-6", seed=1)


def coverage(sky: SkyMap, sets: LF2I, n_toys: int) -> Numbers:
    """Share of data sets whose set holds the true f."""
    numbers: Numbers = {}
    rows: dict[tuple[float, str], list[float]] = {(level, name): [] for level in LEVELS for name in ("learned", "Wilks")}
    for delta in BLURS:
        for f in TRUTHS:
            data = tables(sky, np.tile([f, delta], (n_toys, 1)), rng_for(43, "cover", int(1000 * f), int(delta)))
            q = statistic(data, np.array([f]))
            for level in LEVELS:
                rows[level, "learned"].append(float(sets.contains(data, [f], level).mean()))
                rows[level, "Wilks"].append(float((q <= chi2.ppf(level, 1)).mean()))
            shown = "  ".join(f"{level:g}: {rows[level, 'learned'][-1]:.4f} ({rows[level, 'Wilks'][-1]:.4f})" for level in LEVELS)
            print(f"  f = {f:<5g} delta0 = {delta:<4g}  coverage, in brackets Wilks'  {shown}", flush=True)
    for level in LEVELS:
        for name in ("learned", "Wilks"):
            found = np.array(rows[level, name])
            where = f"{name}, {100 * level:g} %"
            asked = ("<=", 0.02) if name == "learned" else ("", None)
            numbers[f"{where}: largest |coverage - level|, {found.size} points, {n_toys} data sets each"] = (
                float(np.abs(found - level).max()), *asked)  # fmt: skip
            numbers[f"{where}: mean coverage"] = (float(found.mean()), "", None)
            numbers[f"{where}: coverage at f = 0"] = (float(found[:: len(TRUTHS)].mean()), "", None)
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=300_000, help="events of each kind to learn from")
    parser.add_argument("--learn", type=int, default=30_000, help="data sets for critical values")
    parser.add_argument("--toys", type=int, default=4000, help="data sets at each point where coverage is counted")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/arrival_directions.json")
    options = parser.parse_args()
    begin = time.perf_counter()
    seconds: dict[str, float] = {}
    sky = sky_map(learn(options.events))
    seconds["learn"] = round(time.perf_counter() - begin, 1)
    print(f"[learned in {seconds['learn']} s]", flush=True)
    numbers = against_exact(sky, 200)
    seconds["statistic"] = round(time.perf_counter() - begin - sum(seconds.values()), 1)
    sets = construct(sky, options.learn)
    print(sets.summary(), flush=True)
    numbers |= coverage(sky, sets, options.toys)
    seconds["coverage"] = round(time.perf_counter() - begin - sum(seconds.values()), 1)
    rows = []
    for n, (v, sign, bound) in numbers.items():
        met = bound is None or bool(v <= bound if sign == "<=" else v >= bound)
        rows.append({"name": n, "value": float(v), "asked": None if bound is None else f"{sign} {bound:g}", "met": met})
        print(f"{n:<84} {v:<12.4g}" + ("" if bound is None else f" {rows[-1]['asked']}  {'met' if met else 'MISSED'}"))
    print(f"[{seconds}]")
    aside = options.out.with_suffix(".tmp")
    settings = {"events": options.events, "learn": options.learn, "toys": options.toys}
    aside.write_text(json.dumps({**settings, "seconds": seconds, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, options.out)
    sys.exit(not all(row["met"] for row in rows))


if __name__ == "__main__":
    main()
