"""The one call: an exact posterior passes, wrong ones fail by the test that is made for them, and foreign draws are taken."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sbi_phys as sp
from sbi_phys.calibration.calibrate import TITLES
from sbi_phys.calibration.inputs import draws_from_arviz
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.rng import rng_for
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2)


class Exact:
    """The exact posterior as an estimator, its width and place spoilt on demand."""

    def __init__(self, width: float = 1.0, shift: float = 0.0) -> None:
        self.prior, self.width, self.shift = SIM.prior, width, shift
        covariance = SIM.posterior(np.zeros(2))[1]
        self.root = np.linalg.cholesky(covariance)

    def sample(self, x: np.ndarray, n: int, seed: int = 0) -> np.ndarray:
        mean = SIM.posterior(x)[0] + self.shift * np.sqrt(np.diag(SIM.posterior(x)[1]))
        z = rng_for(seed).standard_normal((*mean.shape[:-1], n, 2))
        return mean[..., None, :] + self.width * z @ self.root.T

    def latent(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        mean = SIM.posterior(x)[0] + self.shift * np.sqrt(np.diag(SIM.posterior(x)[1]))
        return np.linalg.solve(self.root, (theta - mean).T).T / self.width

    def log_prob(self, theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        z = self.latent(theta, x)
        return -0.5 * (z**2).sum(axis=-1) - 2 * np.log(self.width) - np.log(np.diag(self.root)).sum() - np.log(2 * np.pi)

    def log_prob_draws(self, draws: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.stack([self.log_prob(d, np.broadcast_to(row, d.shape)) for d, row in zip(draws, x, strict=True)])


X_OBS = SIM.simulate(np.array([[0.3, -0.5]]), rng_for(99))[0]


def run(**settings: float) -> Any:
    return sp.calibrate(Exact(**settings), SIM, n=400, n_draws=200, x_obs=X_OBS, seed=3)


@pytest.fixture(scope="module")
def exact() -> Any:
    return run()


def test_an_exact_posterior_passes_everything(exact: Any) -> None:
    assert exact.passed
    assert tuple(exact.results) == tuple(TITLES)
    assert exact.skipped == {}
    assert exact.names == ("t0", "t1")
    assert "No test of 9 finds the posterior wrong" in exact.verdict
    assert "like the simulations" in exact.likeness
    assert set(exact.seconds) == {"draws", *TITLES}


def test_a_narrow_posterior_fails_nearly_everything() -> None:
    found = run(width=0.75)
    assert not found.passed
    assert {"sbc", "coverage", "intervals", "tarp", "pulls", "pit_regression", "local_coverage"} <= set(found.failed)
    assert "overconfident" in found.summary()
    assert found.adjusted["sbc"] >= found.pvalues["sbc"]


def test_what_is_written_is_what_was_found(exact: Any, tmp_path: Path) -> None:
    exact.write(tmp_path / "calibration.json")
    read = json.loads((tmp_path / "calibration.json").read_text())
    assert read["passed"] is True
    assert read["pvalues"] == exact.pvalues
    assert set(read["words"]) == set(TITLES)
    figures = exact.figures()
    assert set(figures) == set(TITLES)
    assert all(figure.axes for figure in figures.values())


def test_draws_of_another_tool(exact: Any) -> None:
    theta = SIM.prior.sample(300, rng_for(1))
    x = SIM.simulate(theta, rng_for(2))
    draws = Exact().sample(x, 100, seed=5)
    plain = sp.calibrate(draws, (theta, x), names=["a", "b"])
    assert plain.passed
    assert set(plain.skipped) == {"coverage", "lc2st", "posterior_sbc", "misspecification"}
    xarray = pytest.importorskip("xarray")
    chains = draws.reshape(300, 2, 50, 2).transpose(1, 2, 0, 3)
    group = xarray.Dataset({name: (("chain", "draw", "simulation"), chains[..., j]) for j, name in enumerate("ab")})
    data = SimpleNamespace(posterior=group)
    holder = type("Holder", (), {"posterior": group, "__getitem__": lambda self, key: getattr(self, key)})()
    np.testing.assert_array_equal(draws_from_arviz(holder, ["a", "b"]), draws)
    assert sp.calibrate(holder, (theta, x), names=["a", "b"]).pvalues == plain.pvalues
    assert data.posterior is group


def test_a_store_is_taken_and_x_may_be_unknown(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 60, tmp_path / "store", seed=4, workers=1)
    found = sp.calibrate(Exact(), store, n=50, n_draws=100)
    assert found.n == 50
    assert "lc2st" in found.skipped
    theta = SIM.prior.sample(60, rng_for(1))
    draws = Exact().sample(SIM.simulate(theta, rng_for(2)), 100)
    blind = sp.calibrate(draws, (theta, None))
    assert "pit_regression" in blind.skipped
    assert "cannot detect a posterior that equals the prior" in blind.summary()


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(SettingError, match="simulations is a int"):
        sp.calibrate(Exact(), 3)
    with pytest.raises(SettingError, match="draws were given with a simulator"):
        sp.calibrate(np.zeros((20, 5, 2)), SIM)
    with pytest.raises(DataError, match="x is missing"):
        sp.calibrate(Exact(), (np.zeros((20, 2)), None))
