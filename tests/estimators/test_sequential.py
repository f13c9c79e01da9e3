"""Truncated rounds: the region is drawn from exactly, keeps the posterior, and a round improves a poor network."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

import sbi_phys as sp
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.sequential import TruncatedPrior, truncated_rounds
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from tests.toys import LinearGaussian


def narrow_posterior(n: int = 5000) -> np.ndarray:
    """Draws that are narrow in one direction, as the prior in the others."""
    u = rng_for(0).standard_normal((n, 3))
    u[:, 0] = 0.6 + 0.05 * u[:, 0]
    return u


def test_draws_are_the_prior_within_the_region() -> None:
    region = TruncatedPrior(narrow_posterior(), margin=1.0)
    u = region.sample(20_000, rng_for(1))
    assert region.contains(u).all()
    # the free directions keep the prior but for the region's faint tilt, the narrow one is the prior cut at +-r sd
    assert stats.kstest(u[:5000, 1], "norm").pvalue > 1e-4
    half = np.sqrt(region.radius2) * 0.05
    low, high = u[:, 0].min(), u[:, 0].max()
    assert abs(low - (0.6 - half)) < 0.02
    assert abs(high - (0.6 + half)) < 0.02
    reference = rng_for(2).standard_normal((2_000_000, 3))
    reference = reference[region.contains(reference)]
    assert len(reference) > 20_000
    for k in range(3):
        assert stats.ks_2samp(u[:, k], reference[:20_000, k]).pvalue > 1e-4


def test_region_holds_the_posterior_it_was_made_from() -> None:
    region = TruncatedPrior(narrow_posterior())
    assert region.contains(narrow_posterior(100_000)).mean() > 0.9999


def test_rate_does_not_fall_as_the_region_shrinks() -> None:
    for width in (1e-1, 1e-3, 1e-5):
        region = TruncatedPrior(0.5 + width * rng_for(0).standard_normal((2000, 4)))
        assert len(region.sample(5000, rng_for(1))) == 5000


def test_disjoint_regions_are_an_error() -> None:
    here, there = (TruncatedPrior(shift + 0.01 * rng_for(0).standard_normal((500, 3))) for shift in (-1.0, 1.0))
    with pytest.raises(DataError, match="truncated regions of all rounds"):
        here.sample(100, rng_for(0), within=[there])
    with pytest.raises(DataError, match="at least 30"):
        TruncatedPrior(np.zeros((20, 3)))
    with pytest.raises(SettingError, match="epsilon"):
        TruncatedPrior(narrow_posterior(), epsilon=0.0)


def test_a_round_sharpens_a_poor_network(tmp_path: Path) -> None:
    sim = LinearGaussian(dim=2, noise=0.02)
    theta = sim.prior.sample(300, rng_for(0))
    x = sim.simulate(theta, rng_for(1))
    config = sp.TrainConfig(max_epochs=12, batch_size=64)
    poor = sp.NPE(sim.prior, flow=FlowConfig(n_layers=1, hidden=16), embedding=EmbeddingConfig(hidden=32, n_features=16), config=config)
    poor.fit(theta, x)
    observed = sim.simulate(np.array([[0.4, -0.7]]), rng_for(2))[0]
    mean, covariance = sim.posterior(observed)
    sd = np.sqrt(np.diag(covariance))

    def error(npe: sp.NPE) -> tuple[float, float]:
        draws = npe.sample(observed, 4000)
        return np.abs((draws.mean(axis=0) - mean) / sd).max(), np.abs(np.log(draws.std(axis=0) / sd)).max()

    rounds = sp.TrainConfig(max_epochs=30, batch_size=64, learning_rate=4e-3)
    settings = {"n_rounds": 2, "n_simulations": 1500, "seed": 3, "workers": 1, "config": rounds}
    better = truncated_rounds(poor, sim, observed, tmp_path, **settings)
    assert error(poor)[1] > 1
    assert error(better)[0] < 0.4
    assert error(better)[1] < 0.3
    again = truncated_rounds(poor, sim, observed, tmp_path, **settings)  # from stores and checkpoints: nothing is redone
    assert (again.sample(observed, 5) == better.sample(observed, 5)).all()
    with pytest.raises(SettingError, match="serves a single observation"):
        truncated_rounds(poor, sim, np.stack([observed] * 2), tmp_path / "other", n_simulations=100)
