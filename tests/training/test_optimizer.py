"""The flat optimiser does what torch's own tools do tensor by tensor."""

import copy

import pytest
import torch
from torch import Tensor, nn

from sbi_phys.core.errors import SettingError
from sbi_phys.core.rng import torch_rng_for
from sbi_phys.training._optimizer import FlatAdamW, cosine_rate
from sbi_phys.training.ranks import Ranks


def network() -> nn.Module:
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 2))


def rows(step: int) -> Tensor:
    return torch.randn(16, 4, generator=torch_rng_for(0, "rows", step))


def flat(module: nn.Module, **settings: float) -> FlatAdamW:
    defaults = {"learning_rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.05, "ema_decay": 0.9}
    return FlatAdamW(module, **{**defaults, **settings}, ranks=Ranks())


def test_equals_adamw_clipping_and_averaging_tensor_by_tensor() -> None:
    ours, reference = network(), network()
    optimizer = flat(ours)
    groups = [
        {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in reference.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=1e-2)
    average = copy.deepcopy(reference)
    for step in range(20):
        rate = 1e-2 / (1 + step)
        optimizer.zero_grad()
        ours(rows(step)).square().sum().backward()
        optimizer.step(rate, step)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.zero_grad()
        reference(rows(step)).square().sum().backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        assert norm > 0.05  # the limit is at work
        adamw.step()
        decay = min(0.9, (2 + step) / (11 + step))
        for mean, p in zip(average.parameters(), reference.parameters(), strict=True):
            mean.data.lerp_(p.data, 1 - decay)
    for got, want in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    with optimizer.averaged():
        for got, want in zip(ours.parameters(), average.parameters(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    for got, want in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_release_leaves_ordinary_parameters_with_the_same_values() -> None:
    module = network()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimizer = flat(module)
    storages = {p.data_ptr() - p.storage_offset() * 4 for p in module.parameters()}
    assert len(storages) == 1
    optimizer.release()
    assert len({p.untyped_storage().data_ptr() for p in module.parameters()}) == 4
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_weight_without_gradient_only_decays() -> None:
    module = network()
    module.unused = nn.Linear(3, 3)
    start = module.unused.weight.detach().clone()
    optimizer = flat(module)
    module[2](torch.ones(1, 8)).sum().backward()
    optimizer.step(1e-2, 0)
    torch.testing.assert_close(module.unused.weight, start * (1 - 1e-2 * 0.1))


def test_mixed_dtypes_are_refused() -> None:
    module = network()
    module[2].double()
    with pytest.raises(SettingError, match="float32 on cpu.*float64 on cpu"):
        flat(module)
    with pytest.raises(SettingError, match="no kind"):
        flat(nn.Identity())


def test_rate_warms_up_and_decays() -> None:
    rates = [cosine_rate(s, 100, peak=2.0, warmup=0.1, schedule="cosine") for s in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.001, abs=0.01)
    assert rates[-1] < 0.005
    assert cosine_rate(50, 100, peak=2.0, warmup=0.1, schedule="constant") == 2.0
