"""Failed rows: where their parameters differ is found, where they do not it is said, and a training warns of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sbi_phys.core.progress import or_none
from sbi_phys.core.rng import rng_for
from sbi_phys.training.failures import describe_failures, warn_of_failures
from sbi_phys.training.loop import TrainConfig
from sbi_phys.training.sources import Settings, from_stores
from tests.training.stream_helpers import PRIOR, make_store

NAMES = ("gamma", "flux", "width")
LEFT = "the posterior is that of p(theta | simulation did not fail)"


def parameters(n: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.random.Generator]:
    rng = rng_for(seed)
    return rng.random((n, 3)), rng


@pytest.mark.parametrize(("side", "where", "tenth"), [(1, "high", "highest"), (-1, "low", "lowest")])
def test_a_rate_that_rises_to_an_edge_is_named_with_its_numbers(side: int, where: str, tenth: str) -> None:
    theta, _ = parameters()
    order = np.argsort(side * theta[:, 0])  # the last tenth is at the edge
    failed = np.zeros(len(theta), dtype=bool)
    failed[order[-2000::5]] = True  # 400 of 2000, one in five
    failed[order[:-2000:90]] = True  # 200 of 18 000
    said = describe_failures(theta, failed, NAMES)
    assert said == f"rows fail more often at {where} gamma: 3 % of all, 20 % in the {tenth} tenth; {LEFT}"


def test_a_rate_that_peaks_in_between_and_a_second_parameter_are_named() -> None:
    theta, rng = parameters()
    failed = rng.random(len(theta)) < 0.01 + 0.4 * (np.abs(theta[:, 1] - 0.65) < 0.05) + 0.1 * (theta[:, 2] > 0.8)
    said = describe_failures(theta, failed, NAMES)
    assert "around flux = 0.6" in said
    assert "also at high width" in said


def test_failures_that_do_not_depend_on_theta_are_called_so_at_the_size_of_the_test() -> None:
    wrong = 0
    for seed in range(100):
        theta, rng = parameters(2000, seed)
        wrong += "more often" in describe_failures(theta, rng.random(2000) < 0.05, NAMES)
    assert wrong <= 5  # 1 % of 100 expected, at most 5 with probability 0.999
    theta, _ = parameters(10)
    assert describe_failures(theta, np.ones(10, dtype=bool), NAMES) == LEFT


@pytest.mark.parametrize("memory", [None, 30_000])
def test_a_training_on_a_store_warns_of_failed_rows(tmp_path: Path, memory: int | None) -> None:
    theta = PRIOR.sample(900, np.random.default_rng(0))
    failed = np.flatnonzero(theta[:, 1] > 0)
    store = make_store(tmp_path / "s", 900, theta=theta, failed=failed)
    settings = Settings(PRIOR, 1, TrainConfig(), torch.device("cpu"), "real", None)
    message = (
        rf"{len(failed)} of 900 simulations failed and are left out of the training: rows fail more often at high b: .* First: no shower"
    )
    with pytest.warns(RuntimeWarning, match=message), from_stores([store], settings, memory, or_none(None)) as rows:
        assert rows.member(0)[0].n < 900 - len(failed)


def test_a_store_without_failures_says_nothing(tmp_path: Path) -> None:
    warn_of_failures([make_store(tmp_path / "s", 50)], PRIOR.names)  # a warning would be an error
