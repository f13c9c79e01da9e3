"""Every loss, on a table of x and theta whose expectation is summed up exactly: least at the exact log ratio."""

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from sbi_phys.estimators.nre import LOSSES, balance, bnre_loss, carl_loss, nre_c_loss

# pairs (x, theta) by the number of times they occur in 12
COUNTS = np.array([[3, 1, 1], [1, 2, 0], [1, 0, 3]])
N_CONTRASTS = 2


def table() -> tuple[Tensor, Tensor, Tensor]:
    """x, own theta and K other theta of all equally likely rows: x (12 12^K,), own (same), others (same, K)."""
    pairs = [(x, t) for x, t in product(range(3), range(3)) for _ in range(COUNTS[x, t])]
    thetas = [t for _, t in pairs]
    rows = [(x, t, *others) for (x, t) in pairs for others in product(thetas, repeat=N_CONTRASTS)]
    array = torch.tensor(rows)
    return array[:, 0], array[:, 1], array[:, 2:]


def exact() -> Tensor:
    p = torch.tensor(COUNTS, dtype=torch.float64) / 12
    return (p / p.sum(dim=1, keepdim=True) / p.sum(dim=0)).log()


def minimum(loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Table of log odds f(x, theta) at which the exact mean of the loss is least."""
    x, own, others = table()
    f = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([f], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(f[x, own], f[x[:, None], others]).mean()
        value.backward()
        return value

    optimiser.step(closure)
    return f.detach()


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_the_optimum_is_the_exact_log_ratio(name: str) -> None:
    found, truth = minimum(LOSSES[name]), exact()
    possible = torch.isfinite(truth)
    torch.testing.assert_close(found[possible], truth[possible], atol=2e-3, rtol=0)
    assert (found[~possible] < -4).all()  # pairs that never occur: on the way to minus infinity


@pytest.mark.parametrize("gamma", [0.2, 5.0])
def test_contrastive_optimum_for_any_odds(gamma: float) -> None:
    found, truth = minimum(lambda joint, contrast: nre_c_loss(joint, contrast, gamma)), exact()
    possible = torch.isfinite(truth)
    torch.testing.assert_close(found[possible], truth[possible], atol=2e-3, rtol=0)


def test_a_loss_without_none_would_leave_a_function_of_x_free() -> None:
    """The reason why NRE-B is not offered: adding c(x) to f does not change its loss, but changes all those that are."""
    x, own, others = table()
    truth = torch.where(torch.isfinite(exact()), exact(), torch.tensor(-20.0, dtype=torch.float64))
    moved = truth + torch.tensor([[0.5], [-0.2], [0.3]])

    def values(f: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> float:
        return float(loss(f[x, own], f[x[:, None], others]).mean())

    def nre_b(joint: Tensor, contrast: Tensor) -> Tensor:
        return -joint + torch.logsumexp(torch.cat([joint[:, None], contrast], dim=1), dim=1)

    assert values(moved, nre_b) == pytest.approx(values(truth, nre_b), abs=1e-9)
    for loss in LOSSES.values():
        assert values(moved, loss) > values(truth, loss) + 1e-3


def test_balance_is_zero_at_the_optimum_and_is_what_the_penalty_sees() -> None:
    x, own, others = table()
    truth = exact()
    joint, contrast = truth[x, own], truth[x[:, None], others]
    assert float(balance(joint, contrast)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(bnre_loss(joint, contrast), carl_loss(joint, contrast))
    moved = bnre_loss(joint + 1, contrast + 1) - carl_loss(joint + 1, contrast + 1)
    assert float(moved.mean()) == pytest.approx(100 * float(balance(joint + 1, contrast + 1)) ** 2)
    assert float(moved.mean()) > 1


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_far_log_odds_stay_finite(name: str) -> None:
    joint = torch.tensor([-300.0, 300.0, 0.0], requires_grad=True)
    contrast = torch.tensor([[300.0, -300.0], [0.0, 300.0], [-300.0, -300.0]], requires_grad=True)
    value = LOSSES[name](joint, contrast)
    assert value.shape == (3,)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert joint.grad is not None and torch.isfinite(joint.grad).all()
    assert contrast.grad is not None and torch.isfinite(contrast.grad).all()


def test_one_contrast_is_enough_for_every_loss() -> None:
    joint, contrast = torch.zeros(4), torch.zeros(4, 1)
    values = {name: float(loss(joint, contrast).mean()) for name, loss in LOSSES.items()}
    assert values["carl"] == values["nre-a"] == pytest.approx(2 * np.log(2))
    assert values["nre-c"] == pytest.approx(np.log(2))  # own or none, nothing known
