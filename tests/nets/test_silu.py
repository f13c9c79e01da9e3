"""The layer against torch's own operations: values, gradients, second derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sbi_phys.nets.silu import silu_layer


def _exact(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor, skip: bool) -> torch.Tensor:
    hidden = F.silu(x @ weight.t() + shift)
    return x + hidden if skip else hidden


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 40), width=st.integers(1, 20), skip=st.booleans(), per_row=st.booleans(), seed=st.integers(0, 10**6))
def test_values_and_gradients(rows: int, width: int, skip: bool, per_row: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    n_in = width if skip else 3
    x, weight = torch.randn(rows, n_in, generator=rng), torch.randn(width, n_in, generator=rng)
    # rows of a wider tensor, as the shares of a context are
    wide = torch.randn(rows, width + 5, generator=rng)
    shift, grad = wide[:, 2 : 2 + width] if per_row else wide[0, :width], torch.randn(rows, width, generator=rng)
    inputs = [t.detach().clone() if t is not shift else t.detach() for t in (x, weight, shift)]
    for t in inputs:
        t.requires_grad_()
    out = silu_layer(*inputs, skip=skip)
    got = torch.autograd.grad(out, inputs, grad)
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    want_out = _exact(doubles[0], doubles[1], doubles[2], skip)
    want = torch.autograd.grad(want_out, doubles, grad.double())
    assert torch.allclose(out.double(), want_out, rtol=1e-5, atol=2e-5)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and torch.allclose(a.double(), b, rtol=1e-4, atol=2e-4)
    with torch.no_grad():
        assert torch.allclose(silu_layer(*inputs, skip=skip), out, rtol=1e-6, atol=1e-6)


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    x, weight, shift = torch.randn(4, 3), torch.randn(2, 3, requires_grad=True), torch.randn(2)
    silu_layer(x, weight, shift).sum().backward()
    assert weight.grad is not None and x.grad is None and shift.grad is None


@pytest.mark.parametrize("skip", [False, True])
def test_second_derivatives_in_single_precision(skip: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    weight, shift = torch.randn(3, 3, generator=rng), torch.randn(3, generator=rng)

    def bend(x: torch.Tensor, weight: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(silu_layer(x, weight, shift, skip=skip).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), x)
        return second

    x = torch.randn(6, 3, generator=rng)
    assert torch.allclose(bend(x, weight, shift).double(), bend(x.double(), weight.double(), shift.double()), rtol=1e-3, atol=1e-4)


def test_the_input_is_left_as_it_was_and_autograd_sees_changes_to_it() -> None:
    x, weight, shift = torch.randn(4, 3), torch.randn(3, 3, requires_grad=True), torch.randn(3)
    kept = x.clone()
    out = silu_layer(x, weight, shift, skip=True)
    assert torch.equal(x, kept)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
