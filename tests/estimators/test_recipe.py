"""The recipe "Add an estimator" of CONTRIBUTING.md: a mixture density network (Bishop 1994) in one class, with all that the base gives."""

from pathlib import Path
from typing import Unpack

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sbi_phys as sp
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array
from sbi_phys.estimators.base import Shared
from sbi_phys.training.sources import Scaling
from tests.toys import LinearGaussian

SIM = LinearGaussian(dim=2)


class MDN(sp.Estimator):
    r"""q(u | x) = sum_k softmax(a(x))_k N(u; m_k(x), diag s_k(x)^2), by maximum likelihood."""

    def __init__(self, prior: sp.Prior, *, n_components: int = 4, **shared: Unpack[Shared]) -> None:
        super().__init__(prior, **shared)
        self.n_components = n_components

    def build(self, scaler: Scaling, seed: int) -> nn.Module:
        n_out = self.n_components * (1 + 2 * self.prior.free_dim)
        return nn.Sequential(nn.Linear(scaler.shape[0], 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, n_out))

    def row_loss(self, net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        return -self.mixture(net, x).log_prob(u)

    def mixture(self, net: nn.Module, x: Tensor) -> torch.distributions.Distribution:
        a, m, log_s = net(x).unflatten(1, (self.n_components, -1)).split([1, self.prior.free_dim, self.prior.free_dim], dim=2)
        parts = torch.distributions.Independent(torch.distributions.Normal(m, log_s.exp()), 1)
        return torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=a[..., 0]), parts)

    @torch.inference_mode()
    def sample(self, x: Array, n: int, *, seed: int = 0) -> Array:
        """Draws (n, d) for one observation."""
        inputs, _ = self._inputs(x)
        with torch.random.fork_rng([]):
            torch.manual_seed(seed)
            u = self.mixture(self._nets[0], inputs).sample((n,))[:, 0]
        return self.prior.from_unbounded(u.double().numpy())


CONFIG = sp.TrainConfig(max_epochs=15, batch_size=128, ema_decay=0.9)
X = np.array([0.4, -0.3])


def check(mdn: MDN) -> None:
    """Mean and covariance of the draws against the exact posterior."""
    mean, covariance = SIM.posterior(X)
    draws = mdn.sample(X, 20_000)
    assert np.abs(draws.mean(axis=0) - mean).max() < 0.15
    np.testing.assert_allclose(np.cov(draws.T).diagonal(), covariance.diagonal(), rtol=0.3)


def test_arrays_and_a_file(tmp_path: Path) -> None:
    theta = SIM.prior.sample(4000, rng_for(0))
    mdn = MDN(SIM.prior, n_components=3, device="cpu", config=CONFIG).fit(theta, SIM.simulate(theta, rng_for(1)))
    check(mdn)
    mdn.save(tmp_path / "mdn.pt")
    again = sp.load(tmp_path / "mdn.pt")
    assert type(again) is MDN and again.n_components == 3
    np.testing.assert_array_equal(again.sample(X, 10), mdn.sample(X, 10))


@pytest.mark.parametrize("memory", [None, 60_000])
def test_a_store_in_memory_and_streamed(memory: int | None, tmp_path: Path) -> None:
    store = sp.simulate(SIM, 4000, tmp_path / "store", seed=0, workers=1, shard_size=1000)
    check(MDN(SIM.prior, device="cpu", config=CONFIG).fit(store, memory=memory))


def test_online() -> None:
    check(MDN(SIM.prior, device="cpu", config=CONFIG).fit(simulator=SIM, online=True, n=60_000, workers=0))


def test_the_code_of_the_recipe_runs() -> None:
    page = (Path(__file__).parent.parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = page.partition("## Add an estimator")[2].partition("```python\n")[2].partition("```")[0]
    found: dict[str, type] = {}
    exec(code.replace("class MDN", "class MDNOfTheRecipe"), found)
    theta = SIM.prior.sample(200, rng_for(0))
    mdn = found["MDNOfTheRecipe"](SIM.prior, config=sp.TrainConfig(max_epochs=2)).fit(theta, SIM.simulate(theta, rng_for(1)))
    assert repr(mdn).endswith("1 trained network")
