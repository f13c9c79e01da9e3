"""Shards and small stores for tests, and digests of folders."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sbi_phys.priors import BoxPrior, DirichletPrior, NormalPrior, Parameter, ProductPrior
from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.shards import Header, ShardData
from sbi_phys.store.store import Store
from tests.toys import Flaky

PRIOR = ProductPrior(
    [
        BoxPrior([Parameter("gamma", -3, 2.5), Parameter("lg_rcut", 17.8, 20, unit="lg V", latex=r"\lg R")]),
        DirichletPrior([Parameter("f_h"), Parameter("f_fe")]),
        NormalPrior([Parameter("nu", unit="é")]),
    ]
)
HEADER = Header(
    simulator={"class": "tests.toys:Counts", "settings": {"scale": 1.5}},
    prior=PRIOR.to_dict(),
    observables=[{"name": "n", "size": 3, "unit": "", "latex": "", "kind": "counts", "edges": [], "edges_unit": ""}],
    seed=3,
    shard_size=40,
    dtype="float32",
    theta="prior",
)


def rows(n: int = 40, failed: Iterable[int] = (), seed: int = 0) -> ShardData:
    """n rows of noise; x of the failed ones holds a NaN."""
    failed = list(failed)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 3)).astype(np.float32)
    status = np.zeros(n, dtype=np.uint8)
    status[failed] = 1
    x[failed, 1] = np.nan
    return ShardData(PRIOR.sample(n, rng), x, status, {row: f"row {row} ✗" for row in failed})


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, hidden ones too, by name."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def flaky(path: Path, n: int = 350, seed: int = 5, shard_size: int = 100) -> Store:
    """A store in which some rows raised and some are NaN."""
    return simulate(Flaky(1.5, -1.5), n, path, seed=seed, shard_size=shard_size, workers=1)
