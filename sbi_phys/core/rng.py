"""Random generators from (seed, *key): every random number follows from one integer and a key that names its purpose.

Keys give independent streams without a counter: the generator of shard 7 is the same for any number of workers, and whether
the shards before it were made in this process or read from disk.
"""

import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from sbi_phys.core.checks import require_int

if TYPE_CHECKING:
    import torch

__all__ = ["key_number", "rng_for", "seed_for", "torch_rng_for", "torch_seeded"]

_TORCH = threading.RLock()  # held while torch's global generator is seeded, used alone, or restored


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


@contextmanager
def torch_seeded(seed: int, devices: Sequence["torch.device"] = (), *, alone: bool = True) -> Iterator[None]:
    """Seed torch's global generator for a block of code that can use no other, such as the initial weights of torch's layers.

    The generator's state is restored at the end. Threads of one process share it: with `alone`, those that call this function wait for each
    other, and the block gives the same numbers for any number of them. A long block (an epoch with dropout) is not alone: only its
    seeding is, so that random layers of networks that train at the same time in threads share their noise.
    """
    import torch

    fork = torch.random.fork_rng(list(devices))
    if alone:
        with _TORCH, fork:
            torch.manual_seed(seed)
            yield
        return
    with _TORCH:
        fork.__enter__()
        torch.manual_seed(seed)
    try:
        yield
    finally:
        with _TORCH:
            fork.__exit__(None, None, None)
