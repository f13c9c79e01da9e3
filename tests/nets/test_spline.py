"""The spline against nflows' own, against autograd, at its edges and far outside."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

from sbi_phys.nets.spline import MIN_DERIVATIVE, n_spline_parameters, rational_quadratic_spline, spline_map

BINS, BOUND = 8, 5.0


def draw(n: int, scale: float, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(n, 2, generator=generator, dtype=dtype)
    return x, scale * torch.randn(n, 2, n_spline_parameters(BINS), generator=generator, dtype=dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("inverse", [False, True])
def test_values_are_those_of_nflows(dtype: torch.dtype, tolerance: float, inverse: bool) -> None:
    x, parameters = draw(3000, 1.0, dtype)
    offset = math.log(math.expm1(1 - MIN_DERIVATIVE))
    widths, heights, slopes = parameters.split([BINS, BINS, BINS - 1], dim=-1)
    want, want_log = unconstrained_rational_quadratic_spline(
        x, widths, heights, slopes + offset, inverse=inverse, tails="linear", tail_bound=BOUND
    )
    got, got_log = rational_quadratic_spline(x, parameters, bound=BOUND, inverse=inverse)
    # rounding of the knots is multiplied by the slope of a bin, so the slope goes into the bound
    steepness = want_log.abs().exp().clamp(min=1)
    assert ((got - want).abs() / steepness).max() < tolerance
    assert ((got_log - want_log).abs() / steepness).max() < 20 * tolerance


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 3.0]))
def test_round_trip_and_log_derivative(seed: int, scale: float) -> None:
    x, parameters = draw(50, scale, torch.float64, seed)
    y, log_slope = rational_quadratic_spline(x, parameters, bound=BOUND)
    again, back = rational_quadratic_spline(y, parameters, bound=BOUND, inverse=True)
    assert (again - x).abs().max() < 1e-7
    assert (log_slope + back).abs().max() < 1e-6
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(rational_quadratic_spline(x, parameters, bound=BOUND)[0].sum(), x)
    assert (gradient.log() - log_slope).abs().max() < 1e-9


@pytest.mark.parametrize("inverse", [False, True])
def test_gradients(inverse: bool) -> None:
    x, parameters = draw(6, 1.0, torch.float64, seed=3)
    x, parameters = (0.4 * x).requires_grad_(), parameters.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: rational_quadratic_spline(a, b, bound=BOUND, inverse=inverse), (x, parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
def test_edges_and_far_outside(dtype: torch.dtype, inverse: bool) -> None:
    x = torch.tensor([-1e6, -5.0000005, -5.0, 5.0, 5.0000005, 1e6, 0.0], dtype=dtype)[:, None].requires_grad_()
    parameters = draw(7, 3.0, dtype)[1][:, :1].requires_grad_()
    y, log_slope = rational_quadratic_spline(x, parameters, bound=BOUND, inverse=inverse)
    outside = x.detach().abs() > BOUND
    assert torch.equal(y.detach()[outside], x.detach()[outside])
    assert (log_slope[outside] == 0).all()
    assert (y.detach()[2:4].abs() - BOUND).abs().max() < 1e-5
    (y + log_slope).sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(parameters.grad).all()


def test_zero_parameters_are_the_identity() -> None:
    x, parameters = draw(100, 0.0, torch.float64)
    y, log_slope = rational_quadratic_spline(x, parameters, bound=BOUND)
    assert (y - x).abs().max() < 1e-12
    assert log_slope.abs().max() < 1e-12


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 4.0]))
def test_the_gradient_by_hand_is_autograds(seed: int, scale: float) -> None:
    """Inside, outside and at the edges, for a loss that mixes value and log slope with a weight per entry."""
    x, parameters = draw(40, scale, torch.float64, seed)
    x[:3] = torch.tensor([[-BOUND, BOUND], [7.0, -7.0], [0.0, 1e6]], dtype=torch.float64)
    weights = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    gradients = []
    for function in (rational_quadratic_spline, spline_map):
        leaves = [x.clone().requires_grad_(), parameters.clone().requires_grad_()]
        y, log_slope = function(*leaves, bound=BOUND)
        gradients.append(torch.autograd.grad((weights[0] * y + weights[1] * log_slope).sum(), leaves))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_second_derivatives() -> None:
    x, parameters = draw(4, 1.0, torch.float64, seed=3)
    x, parameters = (0.4 * x).requires_grad_(), parameters.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda a, b: rational_quadratic_spline(a, b, bound=BOUND), (x, parameters))
