"""Settings of the caller's process: the numbers are those of a plain process, or the setting is refused by name."""

import contextlib

import numpy as np
import pytest
import torch

from sbi_phys.core.errors import ModelFileError, SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.base import load
from sbi_phys.estimators.nle import NLE
from sbi_phys.estimators.npe import NPE
from sbi_phys.estimators.nre import NRE
from sbi_phys.training.loop import TrainConfig
from tests.toys import LinearGaussian

SIMULATOR = LinearGaussian()
THETA = SIMULATOR.prior.sample(200, rng_for(1))
X = SIMULATOR.simulate(THETA, rng_for(2))


def answer(kind):
    model = kind(SIMULATOR.prior, seed=3, device="cpu", config=TrainConfig(max_epochs=2, batch_size=64)).fit(THETA, X)
    if kind is NPE:
        return np.concatenate([model.sample(X[0], 20, seed=4).ravel(), model.log_prob(THETA[:5], X[:5])])
    return model.log_likelihood(X[:5], THETA[:5]) if kind is NLE else model.log_ratio(X[:5], THETA[:5])


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", [NPE, NLE, NRE])
def test_errors_of_numpy_missing_gradients_and_global_seeds_change_nothing(kind):
    plain = answer(kind)
    torch.manual_seed(77)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    with np.errstate(all="raise"), torch.no_grad():
        np.testing.assert_array_equal(answer(kind), plain)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


@pytest.mark.parametrize("kind", [NPE, NLE, NRE])
def test_types_and_modes_that_cannot_work_are_refused_by_name(kind):
    with default_dtype(torch.float64), pytest.raises(SettingError, match=r"default dtype is torch.float64; expected"):
        answer(kind)
    with torch.inference_mode(), pytest.raises(SettingError, match=r"within torch.inference_mode"):
        answer(kind)


@pytest.mark.parametrize("path", [3, None, b"model.pt", "9" * 400, "a\0b", "none.pt"])
def test_what_is_no_model_is_refused_by_name(path):
    with pytest.raises(ModelFileError, match="expected"):
        load(path)
