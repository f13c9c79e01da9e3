"""Training on fresh simulations: every row once, the same rows for any number of workers, failures replaced and told."""

import warnings

import numpy as np
import pytest
import torch

import sbi_phys as sp
from sbi_phys.core.errors import DataError, SettingError, SimulatorMismatchError
from sbi_phys.core.rng import rng_for
from sbi_phys.training.online import OnlineBatches
from sbi_phys.training.ranks import Ranks
from tests.toys import Flaky, LinearGaussian, Misbehaving

SIM = LinearGaussian(dim=2)


def rows(source: OnlineBatches, epoch: int, n_batches: int) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(t.clone() for t in batch) for batch in source.epoch(epoch, n_batches)]


def test_batches_are_fresh_exact_and_reproducible() -> None:
    with OnlineBatches(SIM, SIM.prior, 5000, n_valid=300, workers=0) as source:
        first, second = rows(source, 0, 7), rows(source, 1, 7)
        assert [len(b[0]) for b in first] == [715, 715, 714, 714, 714, 714, 714]
        u = torch.cat([b[0] for b in first + second] + [source.validation[0]])
        assert len(torch.unique(u, dim=0)) == 10_300
        again = rows(source, 0, 7)
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    with OnlineBatches(SIM, SIM.prior, 5000, n_valid=300, workers=2) as other:
        elsewhere = rows(other, 0, 7)
    assert all(torch.equal(a, b) for x, y in zip(first, elsewhere, strict=True) for a, b in zip(x, y, strict=True))


def test_rows_follow_prior_and_simulator() -> None:
    with OnlineBatches(SIM, SIM.prior, 20_000, n_valid=300, workers=0) as source:
        u, z = (torch.cat(t).double().numpy() for t in zip(*rows(source, 0, 10), strict=True))
        x = z * source.scaler.scale + source.scaler.mean
    residual = (x - SIM.expected(SIM.prior.from_unbounded(u))) / SIM.noise
    assert np.abs(np.r_[u.mean(axis=0), residual.mean(axis=0)]).max() < 5 / np.sqrt(20_000)
    assert np.abs(np.r_[u.std(axis=0), residual.std(axis=0)] - 1).max() < 5 / np.sqrt(40_000)


def test_ranks_share_an_epoch_without_overlap() -> None:
    parts = []
    for rank in (0, 1):
        with OnlineBatches(SIM, SIM.prior, 5001, n_valid=300, workers=0, ranks=Ranks(rank, 2)) as source:
            parts.append(torch.cat([b[0] for b in rows(source, 0, 4)]))
    assert [len(p) for p in parts] == [2501, 2500]
    assert len(torch.unique(torch.cat(parts), dim=0)) == 5001


def test_failures_are_replaced_and_told() -> None:
    with pytest.warns(RuntimeWarning, match=r"\d+ simulations of .*Flaky failed and were replaced.*more often at low t0.*non-finite"):
        source = OnlineBatches(Flaky(nan_below=-0.5), SIM.prior, 5000, n_valid=300, workers=0)
        batches = rows(source, 0, 5)
        source.close()
    assert sum(len(b[0]) for b in batches) == 5000
    assert torch.cat([b[0] for b in batches])[:, 0].min() > -0.51
    with pytest.raises(DataError, match="all 300 simulations of a chunk failed"):
        OnlineBatches(Misbehaving("raises"), SIM.prior, 5000, n_valid=300, workers=0)


def test_npe_learns_from_a_simulator() -> None:
    npe = sp.NPE(
        SIM.prior,
        flow=sp.FlowConfig(n_layers=2, hidden=32),
        embedding=sp.EmbeddingConfig(hidden=32, n_blocks=1, n_features=16),
        config=sp.TrainConfig(batch_size=256),
        device="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        npe.fit(simulator=SIM, online=True, n=40_000, workers=0)
    theta = SIM.prior.sample(2000, rng_for(7, "theta"))
    x = SIM.simulate(theta, rng_for(7, "x"))
    assert -0.01 < (SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean() < 0.03
    assert len(npe.history[0]) == 40
    assert npe.identity is not None
    assert npe.identity["class"] == "tests.toys:LinearGaussian"


def test_what_is_missing_is_named() -> None:
    npe = sp.NPE(SIM.prior)
    with pytest.raises(SettingError, match="both simulator=... and online=True"):
        npe.fit(simulator=SIM, n=100)
    with pytest.raises(SettingError, match="n is None"):
        npe.fit(simulator=SIM, online=True)
    with pytest.raises(DataError, match="together with a simulator"):
        npe.fit(np.zeros((3, 2)), simulator=SIM, online=True, n=100)
    with pytest.raises(SimulatorMismatchError, match="the simulator has parameters"):
        npe.fit(simulator=LinearGaussian(dim=3), online=True, n=100)
