"""Flows of the user's own, transforms of nflows and distributions as zuko's, against a conjugate Gaussian; wrong ones are refused."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from nflows.transforms import CompositeTransform, MaskedAffineAutoregressiveTransform, PointwiseAffineTransform, ReversePermutation
from torch import Tensor, nn

import sbi_phys as sp
from sbi_phys.core.errors import ModelFileError, SettingError, ShapeError
from sbi_phys.nets.flow_own import DistributionFlow, TransformFlow, build_flow
from tests.toys import LinearGaussian, training_set

SIM = LinearGaussian(dim=2)
SMALL = sp.EmbeddingConfig(hidden=32, n_blocks=1, n_features=16)
HERE = __name__


class MAF(CompositeTransform):
    """Two layers of nflows' masked affine autoregressive transform; the first feature of a layer does not see the context."""

    def __init__(self, features: int, context_features: int, hidden_features: int = 32) -> None:
        def layer() -> nn.Module:
            return MaskedAffineAutoregressiveTransform(features, hidden_features, context_features=context_features, num_blocks=1)

        super().__init__([layer(), ReversePermutation(features), layer()])


class Gaussian(nn.Module):
    """A flow in the form of zuko's: context -> distribution, a full Gaussian."""

    def __init__(self, features: int, context: int) -> None:
        super().__init__()
        self.features = features
        self.net = nn.Linear(context, 2 * features + features * features)
        nn.init.zeros_(self.net.weight)
        nn.init.zeros_(self.net.bias)

    def forward(self, context: Tensor) -> torch.distributions.Distribution:
        d = self.features
        mean, log_scale, lower = self.net(context).split([d, d, d * d], dim=-1)
        factor = torch.diag_embed(log_scale.exp()) + torch.tril(lower.unflatten(-1, (d, d)), diagonal=-1)
        return torch.distributions.MultivariateNormal(mean, scale_tril=factor, validate_args=False)


class WrongJacobian(PointwiseAffineTransform):
    def __init__(self) -> None:
        super().__init__(shift=0.0, scale=2.0)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(inputs, context)
        return z, log_det + 0.3


class WrongInverse(PointwiseAffineTransform):
    def __init__(self) -> None:
        super().__init__(shift=0.0, scale=2.0)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs, torch.zeros(len(inputs))


def make(flow: object, **settings: object) -> sp.NPE:
    given = {
        "seed": 1,
        "embedding": SMALL,
        "device": "cpu",
        "config": sp.TrainConfig(max_epochs=20, batch_size=128, learning_rate=5e-3),
    } | settings
    return sp.NPE(SIM.prior, flow=flow, **given)


MODULES = {"nflows": f"{HERE}:MAF", "as zuko": f"{HERE}:Gaussian"}


@pytest.fixture(scope="module", params=list(MODULES))
def trained(request: pytest.FixtureRequest) -> tuple[str, sp.NPE]:
    return request.param, make(MODULES[request.param]).fit(*training_set(SIM, 3000))


def test_a_flow_of_ones_own_learns_the_conjugate_posterior(trained: tuple[str, sp.NPE]) -> None:
    npe = trained[1]
    theta, x = training_set(SIM, 1000, seed=7)
    assert -0.01 < (SIM.exact_log_posterior(theta, x) - npe.log_prob(theta, x)).mean() < 0.15  # the prior would be off by 2 nats
    draws = npe.sample(x[:3], 4000)
    mean, covariance = SIM.posterior(x[:3])
    sd = np.sqrt(np.diag(covariance))
    assert np.abs((draws.mean(axis=1) - mean) / sd).max() < 0.5
    assert np.abs(draws.std(axis=1) / sd - 1).max() < 0.25
    np.testing.assert_array_equal(draws[0], npe.sample(x[:3], 4000)[0])
    assert not np.array_equal(draws[0], npe.sample(x[:3], 4000, seed=1)[0])


def test_the_other_methods_of_the_estimator_work(trained: tuple[str, sp.NPE]) -> None:
    name, npe = trained
    theta, x = training_set(SIM, 50, seed=8)
    draws = npe.sample(x[:2], 30)
    by_draws = npe.log_prob_draws(draws, x[:2])
    np.testing.assert_allclose(by_draws[1], npe.log_prob(draws[1], x[1]), atol=1e-4)
    latent = npe.latent(theta, x)
    assert latent is None if name == "as zuko" else latent.shape == (50, 2)
    result = sp.samplers.importance_sample(
        lambda u: npe.log_prob(npe.prior.from_unbounded(u), x[0]), npe.proposal(x[0]), 2000
    )  # the prior is the standard normal
    assert result.ess_fraction > 0.5 and abs(result.log_evidence) < 0.1


def test_files(trained: tuple[str, sp.NPE], tmp_path: Path) -> None:
    name, npe = trained
    x = training_set(SIM, 3, seed=9)[1]
    npe.save(tmp_path / "m.pt")
    again = sp.load(tmp_path / "m.pt", device="cpu")
    np.testing.assert_array_equal(again.sample(x, 10), npe.sample(x, 10))
    assert again.flow.spec == MODULES[name]


def test_a_module_is_copied_and_asked_for_again(tmp_path: Path) -> None:
    theta, x = training_set(SIM, 100)
    flow = MAF(2, 16, hidden_features=8)
    npe = make(flow, config=sp.TrainConfig(max_epochs=1)).fit(theta, x)
    npe.save(tmp_path / "m.pt")
    with pytest.raises(ModelFileError, match=r"trained with an flow of class MAF|trained with a flow of class MAF"):
        sp.load(tmp_path / "m.pt")
    again = sp.load(tmp_path / "m.pt", flow=MAF(2, 16, hidden_features=8), device="cpu")
    np.testing.assert_array_equal(again.sample(x[0], 10), npe.sample(x[0], 10))


@pytest.mark.parametrize("spec", list(MODULES.values()), ids=list(MODULES))
def test_a_likelihood_with_a_flow_of_ones_own(spec: str) -> None:
    prior, rng = sp.NormalPrior([sp.Parameter("m")]), np.random.default_rng(0)
    theta = prior.sample(2000, rng)
    x = theta + 0.5 * rng.standard_normal((2000, 2))
    nle = sp.NLE(
        prior, flow=spec, embedding=SMALL, device="cpu", config=sp.TrainConfig(max_epochs=20, batch_size=64, learning_rate=5e-3)
    ).fit(theta, x)
    exact = -2 * ((x[:200] - theta[:200]) ** 2).sum(axis=1) - math.log(2 * math.pi * 0.25)
    assert (exact - nle.log_likelihood(x[:200], theta[:200])).mean() == pytest.approx(0, abs=0.15)
    value, gradient = nle.log_likelihood_and_grad(x[0], [[0.2]])
    step = [float(nle.log_likelihood(x[0], [[0.2 + h]])[0]) for h in (-0.01, 0.01)]
    assert value[0] == pytest.approx(float(nle.log_likelihood(x[0], [[0.2]])[0]), abs=1e-3)
    assert gradient[0, 0] == pytest.approx((step[1] - step[0]) / 0.02, rel=0.1, abs=0.1)
    assert nle.sample_x([[1.0]], 50).shape == (1, 50, 2)


def test_the_seed_covers_the_weights_and_the_arguments_reach_the_class() -> None:
    def weights(hidden: int) -> Tensor:
        torch.randn(3)
        config = sp.FlowConfig(spec=f"{HERE}:MAF", settings={"hidden_features": hidden})
        net = make(config)._new_net(type("S", (), {"shape": (2,)}), 5)
        assert isinstance(net.flow, TransformFlow)
        return torch.cat([p.detach().flatten() for p in net.parameters()])

    assert torch.equal(weights(8), weights(8)) and len(weights(8)) < len(weights(16))
    assert isinstance(build_flow(Gaussian(2, 3), 2, 3, seed=0), DistributionFlow)


@pytest.mark.parametrize(
    ("flow", "error", "message"),
    [
        (WrongJacobian(), SettingError, "WrongJacobian: its log determinant is off by 0.3 from autograd's"),
        (WrongInverse(), SettingError, r"WrongInverse: inverse\(forward\(u\)\) is off by"),
        (MAF(3, 16), SettingError, r"flow MAF, given u of shape \(3, 2\) and context of shape \(3, 16\), fails"),
        (MAF(2, 5), SettingError, r"flow MAF, given u of shape \(3, 2\) and context of shape \(3, 16\), fails"),
        (Gaussian(3, 16), SettingError, r"flow Gaussian, given context of shape \(3, 16\), fails"),
        (
            nn.Linear(16, 2),
            SettingError,
            "flow Linear, given context.*expected a distribution with log_prob and sample, or",
        ),
    ],
)
def test_wrong_flows_are_refused_before_the_training(flow: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(flow).fit(*training_set(SIM, 100))


def test_shapes_of_a_transform() -> None:
    class OneLogDet(PointwiseAffineTransform):
        def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return inputs, torch.zeros(len(inputs), 1)

    with pytest.raises(ShapeError, match=r"returns \[\(3, 2\), \(3, 1\)\]; expected z of shape \(3, 2\) and log\|dz/du\| of shape \(3,\)"):
        build_flow(OneLogDet(), 2, 3, seed=0)


def test_settings_that_are_wrong() -> None:
    with pytest.raises(SettingError, match="flow is a int; expected spline, affine, maf, 'module:Class'"):
        make(3)
    with pytest.raises(SettingError, match="standard library"):
        make("subprocess:Popen")
    with pytest.raises(SettingError, match=r"MAF takes .*got .*'depth': 3"):
        make(sp.FlowConfig(spec=f"{HERE}:MAF", settings={"depth": 3}))
    with pytest.raises(SettingError, match="no spec"):
        sp.FlowConfig(settings={"depth": 3})
