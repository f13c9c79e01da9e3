"""What all `fit` share: simulations handed in rightly or not, members and their histories."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sbi_phys as sp
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.progress import NoProgress
from sbi_phys.core.rng import rng_for
from sbi_phys.estimators.fitting import fit_ensemble, require_prior, stores_or_data, train_member
from sbi_phys.training.batches import MemoryBatches
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2)


@pytest.mark.parametrize("maker", [sp.NPE, sp.NLE, sp.NRE])
def test_every_estimator_refuses_what_is_no_prior_and_half_of_the_data(maker: type) -> None:
    with pytest.raises(SettingError, match="prior is a list; expected a prior"):
        maker([0, 1])
    theta = SIM.prior.sample(30, rng_for(0))
    for given, missing in (((theta, None), "x"), ((None, theta), "theta")):
        with pytest.raises(DataError, match=f"{missing} is missing; expected fit"):
            maker(SIM.prior).fit(*given)


def test_a_store_tells_what_made_it(tmp_path: Path) -> None:
    store = sp.simulate(SIM, 30, tmp_path / "store", seed=0, workers=1)
    model = sp.NRE(SIM.prior)
    assert stores_or_data(model, np.zeros((3, 2)), np.zeros((3, 2))) is None
    assert model.simulator is None
    assert len(stores_or_data(model, tmp_path / "store", None) or []) == 1
    assert model.simulator == store.identity
    assert model.observables == tuple(store.observables)
    with pytest.raises(DataError, match="x was given beside a store"):
        stores_or_data(model, store, np.zeros((30, 2)))


def test_a_prior_is_returned() -> None:
    assert require_prior(SIM.prior) is SIM.prior


def _loss(net: nn.Module, x: Tensor) -> Tensor:
    return net(x)[:, 0] ** 2


def test_members_are_trained_in_turn_and_keep_their_records(tmp_path: Path) -> None:
    config = sp.TrainConfig(max_epochs=3, batch_size=10)

    def member(k: int) -> tuple[nn.Linear, list[dict[str, object]]]:
        net = nn.Linear(1, 1)
        nn.init.constant_(net.weight, 1.0 + k)
        batches = MemoryBatches([torch.ones(40, 1)], [torch.ones(10, 1)], seed=k)
        where = tmp_path / "check"
        return net, train_member(_loss, net, batches, config, seed=0, member=(k, 2), progress=NoProgress(), checkpoint=where)

    nets, histories = fit_ensemble(2, member)
    assert [len(h) for h in histories] == [3, 3]
    assert histories[0][0]["train"] != histories[1][0]["train"]
    assert not torch.equal(nets[0].weight, nets[1].weight)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["check.0", "check.1"]
