"""Keyed generators: same key same stream, other key other stream, nothing global touched."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import key_number, rng_for, seed_for, torch_rng_for, torch_seeded

KEYS = st.lists(st.one_of(st.integers(0, 2**31), st.text(max_size=8)), max_size=3)


@given(st.integers(0, 2**62), KEYS)
def test_same_key_same_stream(seed: int, key: list[int | str]) -> None:
    assert rng_for(seed, *key).random() == rng_for(seed, *key).random()
    assert 0 <= seed_for(seed, *key) < 2**63


def test_streams_of_neighbouring_keys_are_independent() -> None:
    draws = np.stack([rng_for(0, "shard", k).standard_normal(2000) for k in range(50)])
    off = np.corrcoef(draws)[np.triu_indices(50, 1)]
    assert np.abs(off).max() < 5 / np.sqrt(2000)
    assert len({seed_for(0, "shard", k) for k in range(10_000)}) == 10_000


def test_text_keys_are_the_same_on_every_platform() -> None:
    assert key_number("shard") == 2_550_246_860
    assert rng_for(7, "a", 3).integers(2**31) == rng_for(7, "a", 3).integers(2**31)


def test_global_generators_are_left_alone() -> None:
    torch_before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    generator = torch_rng_for(3, "draws")
    torch.randn(5, generator=generator)
    rng_for(3).random(5)
    assert torch.equal(torch_before, torch.random.get_rng_state())
    assert (numpy_before == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize("seed", [-1, 0.5, None, "0"])
def test_bad_seed(seed: object) -> None:
    with pytest.raises(SettingError, match="seed"):
        rng_for(seed)  # type: ignore[arg-type]


def test_layers_made_in_threads_have_the_weights_of_their_seeds() -> None:
    """Many layers at once: without the lock another thread's seed comes in between; the global state is left as it was."""

    def weights(seed: int) -> list[float]:
        with torch_seeded(seed):
            return [torch.nn.Linear(30, 30).weight.sum().item() for _ in range(40)]

    alone, state = [weights(s) for s in range(8)], torch.random.get_rng_state()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(weights, range(8))) == alone
    assert torch.equal(torch.random.get_rng_state(), state)
    with torch_seeded(3, alone=False):
        one = torch.rand(2)
    with torch_seeded(3):
        assert torch.equal(torch.rand(2), one)
    assert torch.equal(torch.random.get_rng_state(), state)
