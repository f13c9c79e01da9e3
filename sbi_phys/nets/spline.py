r"""Monotone rational-quadratic spline y = f(x) on [-B, B] with identity tails, forward and inverse.

In bin k with knots (x_k, y_k), (x_{k+1}, y_{k+1}), slope s = h/w and knot derivatives d_k, d_{k+1}, xi = (x - x_k)/w:

    f(x)  = y_k + h [s xi^2 + d_k xi (1-xi)] / [s + (d_k + d_{k+1} - 2s) xi (1-xi)]
    f'(x) = s^2 [d_{k+1} xi^2 + 2 s xi (1-xi) + d_k (1-xi)^2] / [s + (d_k + d_{k+1} - 2s) xi (1-xi)]^2

Every row takes the same path: inputs are clamped to the domain, the bin is found by comparing with the inner knots,
and the tails are chosen by `where`. There is no boolean indexing, hence no host synchronisation and no change of
shape, on any device. Source: Durkan+ 2019, arXiv:1906.04032; Gregory & Delbourgo 1982.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["n_spline_parameters", "rational_quadratic_spline"]

MIN_WIDTH = 1e-3  # of a bin, as a fraction of the domain
MIN_DERIVATIVE = 1e-3
# softplus(0 + offset) + MIN_DERIVATIVE = 1: parameters of zero give the identity
_DERIVATIVE_OFFSET = math.log(math.expm1(1 - MIN_DERIVATIVE))


def n_spline_parameters(n_bins: int) -> int:
    """Numbers per transformed feature: widths (K), heights (K), inner derivatives (K - 1)."""
    return 3 * n_bins - 1


def rational_quadratic_spline(x: Tensor, parameters: Tensor, *, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Apply the spline elementwise.

    Args: x (..., d). parameters (..., d, 3K - 1), unconstrained; zeros give the identity. bound B > 0.
    Returns: y (..., d) and log|dy/dx| (..., d) (of the inverse map when `inverse`).
    """
    n_bins = (parameters.shape[-1] + 1) // 3
    raw_w, raw_h, raw_d = parameters.split([n_bins, n_bins, n_bins - 1], dim=-1)
    left_x, width = _knots(raw_w, bound)
    left_y, height = _knots(raw_h, bound)
    derivative = F.pad(F.softplus(raw_d + _DERIVATIVE_OFFSET) + MIN_DERIVATIVE, (1, 1), value=1.0)

    clamped = x.clamp(-bound, bound)
    left = left_y if inverse else left_x
    index = (clamped.unsqueeze(-1) >= left[..., 1:]).sum(dim=-1, keepdim=True)
    x0, w, y0, h = (t.gather(-1, index).squeeze(-1) for t in (left_x, width, left_y, height))
    d0 = derivative.gather(-1, index).squeeze(-1)
    d1 = derivative.gather(-1, index + 1).squeeze(-1)
    slope = h / w
    curve = d0 + d1 - 2 * slope

    xi = _solve(clamped - y0, h, slope, d0, curve) if inverse else (clamped - x0) / w
    cross = xi * (1 - xi)
    denominator = slope + curve * cross
    value = x0 + xi * w if inverse else y0 + h * (slope * xi * xi + d0 * cross) / denominator
    log_slope = 2 * (slope.log() - denominator.log()) + (d1 * xi * xi + 2 * slope * cross + d0 * (1 - xi) * (1 - xi)).log()

    inside = x.abs() <= bound
    return torch.where(inside, value, x), torch.where(inside, -log_slope if inverse else log_slope, torch.zeros_like(x))


def _knots(raw: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Left edges (..., K) and widths (..., K) of bins that fill [-bound, bound]."""
    n_bins = raw.shape[-1]
    width = 2 * bound * (MIN_WIDTH + (1 - MIN_WIDTH * n_bins) * raw.softmax(dim=-1))
    left = F.pad(width[..., :-1].cumsum(dim=-1), (1, 0)) - bound
    return left, width


def _solve(dy: Tensor, h: Tensor, slope: Tensor, d0: Tensor, curve: Tensor) -> Tensor:
    """Position xi in [0, 1] within the bin, the stable root of the quadratic."""
    a = h * (slope - d0) + dy * curve
    b = h * d0 - dy * curve
    c = -slope * dy
    root = (b * b - 4 * a * c).clamp(min=0).sqrt()
    return (2 * c / (-b - root)).clamp(0, 1)
