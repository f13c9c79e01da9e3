"""Small stores with failed rows, for the tests of what keeps stores whole."""

from pathlib import Path

from sbi_phys.simulation.campaign import simulate
from sbi_phys.store.store import Store
from tests.toys import Flaky

OLD = Path(__file__).parent / "data" / "schema_1"


def flaky(path: Path, n: int = 350, seed: int = 5, shard_size: int = 100) -> Store:
    """A store in which some rows raised and some are NaN."""
    return simulate(Flaky(1.5, -1.5), n, path, seed=seed, shard_size=shard_size, workers=1)
