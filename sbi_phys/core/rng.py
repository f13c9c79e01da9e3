"""Random generators from (seed, *key): every random number follows from one integer and a key that names its purpose.

Keys give independent streams without a counter: the generator of shard 7 is the same for any number of workers, and whether
the shards before it were made in this process or read from disk.
"""

import zlib
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import require_int

if TYPE_CHECKING:
    import torch

__all__ = ["key_number", "rng_for", "seed_for", "torch_rng_for"]


def key_number(part: int | str) -> int:
    """Return a part of a key as an integer >= 0; of text its CRC-32, which is the same on every platform."""
    if isinstance(part, str):
        return zlib.crc32(part.encode())
    return require_int("key", part, low=0)


def _sequence(seed: int, key: tuple[int | str, ...]) -> np.random.SeedSequence:
    return np.random.SeedSequence(require_int("seed", seed, low=0), spawn_key=tuple(key_number(k) for k in key))


def rng_for(seed: int, *key: int | str) -> np.random.Generator:
    """Return the numpy generator of (seed, *key), e.g. `rng_for(0, "shard", 7)`.

    Raises: SettingError for a negative or fractional seed.   Source: numpy SeedSequence, spawn keys.
    """
    return np.random.default_rng(_sequence(seed, key))


def seed_for(seed: int, *key: int | str) -> int:
    """Return a 63-bit integer from (seed, *key), for libraries that take only an integer."""
    return int(_sequence(seed, key).generate_state(1, np.uint64)[0] >> np.uint64(1))


def torch_rng_for(seed: int, *key: int | str, device: "torch.device | str" = "cpu") -> "torch.Generator":
    """Return the torch generator of (seed, *key) on `device`; the global torch generator is not used."""
    import torch

    return torch.Generator(device=device).manual_seed(seed_for(seed, *key))
