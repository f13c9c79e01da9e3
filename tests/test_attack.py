"""A small part of the attack on files of `benchmarks/attack.py`: no damaged number is accepted, nothing crashes or hangs."""

import pytest

from benchmarks.attack import OUTCOMES, TARGETS, attack

N = {"store": 60, "model": 30, "checkpoint": 30, "netcdf": 12, "toml": 40, "record": 40}


@pytest.mark.parametrize("name", TARGETS)
def test_mutants_are_refused_or_harmless(name):
    counts, words = attack(name, N[name], seed=11, limit_s=120)
    assert sum(counts.values()) == N[name]
    assert not words, words
    assert counts["refused"] > counts["same"]
    assert set(counts) <= set(OUTCOMES[:3])
