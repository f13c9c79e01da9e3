"""Scores of events are learned from small sets, and serve sets of any size."""

import numpy as np
import pytest
import torch

from sbi_phys.core.errors import DataError, ModelFileError, SettingError, ShapeError
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.base import FILE, _Given
from sbi_phys.estimators.npe import NPE
from sbi_phys.estimators.set_npe import SetNPE, likelihood_embedding
from sbi_phys.nets.embedding_set import pad_sets
from sbi_phys.nets.embedding_set_likelihood import LikelihoodSet
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.priors import NormalPrior, Parameter
from sbi_phys.training.checkpoint import read_file, write_file
from sbi_phys.training.loop import TrainConfig
from simulators import LineSearch

PRIOR = NormalPrior([Parameter("t")])
SMALL = EmbeddingConfig(hidden=16, n_blocks=1, n_features=8)


def gaussian_sets(n, n_max, seed):
    rng = rng_for(seed)
    theta, sizes = rng.standard_normal((n, 1)), rng.integers(1, n_max + 1, n)
    return theta, pad_sets([t + rng.standard_normal(m) for t, m in zip(theta[:, 0], sizes, strict=True)], n_max=n_max)


@pytest.fixture(scope="module")
def embedding():
    config = TrainConfig(batch_size=256, max_epochs=8, patience=8, learning_rate=4e-3, weight_decay=0.0)
    return likelihood_embedding(PRIOR, *gaussian_sets(8000, 8, 0), hidden=32, rank=8, embedding=SMALL, config=config, device="cpu")


def test_the_scores_are_log_likelihoods(embedding):
    u = torch.linspace(-1.5, 1.5, 13)[:, None]
    events = 0.4 + rng_for(1).standard_normal(20)
    with torch.no_grad():
        found = embedding.table(torch.from_numpy(pad_sets([events]).astype(np.float32)), u)[0].double().numpy()
    exact = -0.5 * ((events[:, None] - u.numpy()[:, 0]) ** 2).sum(axis=0)
    error = (found - exact) - (found - exact).mean()
    assert exact.std() > 5
    assert error.std() < 1.0


def test_a_posterior_of_larger_sets_than_the_scores_have_seen(embedding, tmp_path):
    theta, x = gaussian_sets(1500, 40, 2)
    config = TrainConfig(batch_size=128, max_epochs=6, patience=6)
    npe = SetNPE(PRIOR, embedding=embedding, flow=FlowConfig(n_layers=2), config=config, device="cpu").fit(theta, x)
    events = 0.4 + rng_for(3).standard_normal(40)
    one = pad_sets([events])[0]
    draws = npe.sample(one, 4000)
    assert abs(draws.mean() - events.sum() / 41) < 0.35 * 41**-0.5
    assert draws.std() == pytest.approx(41**-0.5, rel=0.2)
    npe.save(tmp_path / "sets.pt")
    again = SetNPE.load(tmp_path / "sets.pt", embedding=LikelihoodSet(1, 1, hidden=32, rank=8, config=SMALL), device="cpu")
    np.testing.assert_array_equal(again.sample(one, 50), npe.sample(one, 50))
    same, content = LikelihoodSet(1, 1, hidden=32, rank=8, config=SMALL), read_file(tmp_path / "sets.pt", *FILE)
    assert content["estimator"] == "SetNPE"
    with pytest.raises(RuntimeError, match="size mismatch"):  # a plain NPE cannot take the weights for its own
        NPE._from_content(tmp_path / "sets.pt", content, _Given(embedding=same), "cpu")
    write_file(tmp_path / "other.pt", *FILE, content | {"estimator": "NPE"})
    with pytest.raises(ModelFileError, match="does not describe a model"):
        SetNPE.load(tmp_path / "other.pt", embedding=same)
    with pytest.raises(SettingError, match="expected what likelihood_embedding"):
        SetNPE(PRIOR, device="cpu").fit(theta, x)


def test_sets_are_simulated_while_it_learns():
    sim = LineSearch(n_events=[1, 10])
    config = TrainConfig(batch_size=64, max_epochs=2, patience=2)
    first, again = (
        likelihood_embedding(sim.prior, simulator=sim, n=640, hidden=8, rank=4, config=config, device="cpu", seed=3) for _ in range(2)
    )
    assert first.scores.centre.item() == pytest.approx(3.4, abs=0.5)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_online_each_set_is_summarised_once_and_used_in_every_epoch(embedding, monkeypatch):
    seen = []
    summarise = LikelihoodSet.summarise
    monkeypatch.setattr(LikelihoodSet, "summarise", lambda self, x: (seen.append(x.detach().clone()), summarise(self, x))[1])
    sim = LineSearch(n_events=[1, 6])
    net = LikelihoodSet(1, 2, hidden=8, rank=4, n_points=64, config=SMALL)
    config = TrainConfig(batch_size=64, max_epochs=3, patience=3, validation_fraction=0.1)
    npe = SetNPE(sim.prior, embedding=net, flow=FlowConfig(n_layers=2, hidden=8), config=config, device="cpu")
    npe.fit(simulator=sim, online=True, n=600, workers=0)
    rows = torch.cat([x for x in seen if x.any()])  # without the probe for the number of features
    assert len(rows) == 600 + 60
    assert len(torch.unique(rows, dim=0)) == len(rows)
    assert len(npe.history[0]) == 3
    assert len({record["train"] for record in npe.history[0]}) == 3


def test_bad_input():
    theta, x = gaussian_sets(50, 3, 0)
    with pytest.raises(DataError, match="either theta and x, or simulator"):
        likelihood_embedding(PRIOR, theta)
    with pytest.raises(DataError, match="either theta and x, or simulator"):
        likelihood_embedding(PRIOR, theta, x, simulator=LineSearch(), n=100)
    with pytest.raises(ShapeError, match="slots of 3 columns"):
        likelihood_embedding(PRIOR, theta, x, n_columns=2)


def test_sets_may_be_a_list_of_arrays():
    rng = rng_for(0)
    theta = rng.standard_normal((200, 1))
    data = [t + rng.standard_normal(m) for t, m in zip(theta[:, 0], rng.integers(1, 9, 200), strict=True)]
    quick = {"config": TrainConfig(max_epochs=1), "device": "cpu"}
    by_list, by_array = (likelihood_embedding(PRIOR, theta, x, hidden=8, rank=4, **quick) for x in (data, pad_sets(data)))
    for a, b in zip(by_list.parameters(), by_array.parameters(), strict=True):
        assert torch.equal(a, b)
    npe = SetNPE(PRIOR, embedding=by_list, **quick).fit(theta, data)
    np.testing.assert_array_equal(npe.sample(data[:2], 3), npe.sample(pad_sets(data)[:2], 3))
