r"""Monotone rational-quadratic spline y = f(x) on [-B, B] with identity tails, forward and inverse.

In bin k with knots (x_k, y_k), (x_{k+1}, y_{k+1}), slope s = h/w and knot derivatives d_k, d_{k+1}, xi = (x - x_k)/w:

    f(x)  = y_k + h N / D,   N = s xi^2 + d_k xi (1-xi),   D = s + (d_k + d_{k+1} - 2s) xi (1-xi)
    f'(x) = s^2 E / D^2,     E = d_{k+1} xi^2 + 2 s xi (1-xi) + d_k (1-xi)^2

Every row takes the same path: inputs are clamped to the domain, the bin is found by comparing with the inner knots,
and the tails are chosen by `where`. There is no boolean indexing, hence no host synchronisation and no change of
shape, on any device. Source: Durkan+ 2019, arXiv:1906.04032; Gregory & Delbourgo 1982.

A training step of a small flow is bound by the number of operations, not by their size. So the forward map has its
gradient written out by hand (`_Spline`). Where a derivative is to be differentiated again (`create_graph=True`), the
gradient is that of `spline_map`, the same map for autograd to record.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["n_spline_parameters", "rational_quadratic_spline", "spline_map"]

MIN_WIDTH = 1e-3  # of a bin, as a fraction of the domain
MIN_DERIVATIVE = 1e-3
# softplus(0 + offset) + MIN_DERIVATIVE = 1: parameters of zero give the identity
_DERIVATIVE_OFFSET = math.log(math.expm1(1 - MIN_DERIVATIVE))


def n_spline_parameters(n_bins: int) -> int:
    """Numbers per transformed feature: widths (K), heights (K), inner derivatives (K - 1)."""
    return 3 * n_bins - 1


def rational_quadratic_spline(x: Tensor, parameters: Tensor, *, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Apply the spline elementwise, with the fast gradient where it is the forward map.

    Args: x (..., d). parameters (..., d, 3K - 1), unconstrained; zeros give the identity. bound B > 0.
    Returns: y (..., d) and log|dy/dx| (..., d) (of the inverse map when `inverse`).
    """
    if inverse or not (torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad)):
        return spline_map(x, parameters, bound=bound, inverse=inverse)
    y, log_slope = _Spline.apply(x, parameters, bound)
    return y, log_slope


def spline_map(x: Tensor, parameters: Tensor, *, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Same map, written in operations that autograd can differentiate any number of times; arguments and result as above."""
    clamped = x.clamp(-bound, bound)
    b = _bin(clamped, parameters, bound, inverse=inverse)
    if inverse:
        xi = _solve(clamped - b.y0, b)
        value = b.x0 + xi * b.w
    else:
        xi = (clamped - b.x0) / b.w
    cross = xi * (1 - xi)
    denominator = b.slope + b.curve * cross
    if not inverse:
        value = b.y0 + b.h * (b.slope * xi * xi + b.d0 * cross) / denominator
    log_slope = 2 * (b.slope / denominator).log() + (b.d1 * xi * xi + 2 * b.slope * cross + b.d0 * (1 - xi).square()).log()
    inside = x.abs() <= bound
    return torch.where(inside, value, x), torch.where(inside, -log_slope if inverse else log_slope, torch.zeros_like(x))


class _Bin(NamedTuple):
    """The bin that each value falls into, and what the gradient needs: shares (..., 2, K), place (..., 1), raw (..., 2)."""

    x0: Tensor
    w: Tensor
    y0: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor
    slope: Tensor
    curve: Tensor
    shares: Tensor
    place: Tensor
    raw: Tensor


def _bin(clamped: Tensor, parameters: Tensor, bound: float, *, inverse: bool) -> _Bin:
    n_bins = (parameters.shape[-1] + 1) // 3
    # widths and heights together: one softmax, one running sum, one gather
    shares = parameters[..., : 2 * n_bins].unflatten(-1, (2, n_bins)).softmax(dim=-1)
    sizes = shares * (2 * bound * (1 - MIN_WIDTH * n_bins)) + 2 * bound * MIN_WIDTH
    right = sizes.cumsum(dim=-1)
    known = right[..., 1 if inverse else 0, :-1]
    index = ((clamped + bound).unsqueeze(-1) >= known).sum(dim=-1, keepdim=True)
    both = index.unsqueeze(-1).expand(*index.shape[:-1], 2, 1)
    size = sizes.gather(-1, both).squeeze(-1)
    left = right.gather(-1, both).squeeze(-1) - size - bound
    # derivatives: only those at the two knots of the bin are made; at the ends of the domain they are 1, as the tails'
    around = torch.cat([index - 1, index], dim=-1)
    raw = parameters[..., 2 * n_bins :].gather(-1, around.clamp(0, n_bins - 2)) + _DERIVATIVE_OFFSET
    inner = (around >= 0) & (around < n_bins - 1)
    derivative = torch.where(inner, F.softplus(raw) + MIN_DERIVATIVE, torch.ones_like(raw))
    w, h = size.unbind(-1)
    x0, y0 = left.unbind(-1)
    d0, d1 = derivative.unbind(-1)
    slope = h / w
    return _Bin(x0, w, y0, h, d0, d1, slope, d0 + d1 - 2 * slope, shares, index, raw)


def _solve(dy: Tensor, b: _Bin) -> Tensor:
    """Position xi in [0, 1] within the bin, the stable root of the quadratic."""
    second = b.h * (b.slope - b.d0) + dy * b.curve
    first = b.h * b.d0 - dy * b.curve
    constant = -b.slope * dy
    root = (first * first - 4 * second * constant).clamp(min=0).sqrt()
    return (2 * constant / (-first - root)).clamp(0, 1)


class _Spline(torch.autograd.Function):
    """`spline_map`, forward, with its gradient by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Map x; keep the bin, not the graph."""
        b = _bin(x.clamp(-bound, bound), parameters, bound, inverse=False)
        xi = (x.clamp(-bound, bound) - b.x0) / b.w
        rest = 1 - xi
        cross = xi * rest
        denominator = b.slope + b.curve * cross
        numerator = b.slope * xi * xi + b.d0 * cross
        e = b.d1 * xi * xi + 2 * b.slope * cross + b.d0 * rest * rest
        inside = x.abs() <= bound
        y = torch.where(inside, b.y0 + b.h * numerator / denominator, x)
        log_slope = ((b.slope / denominator).square() * e).log() * inside
        ctx.bound, ctx.n_parameters = bound, parameters.shape[-1]
        ctx.save_for_backward(
            x, parameters, xi, b.w, b.h, b.d0, b.d1, b.slope, b.curve, b.shares, b.place, b.raw, cross, denominator, numerator, e, inside
        )
        return y, log_slope

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Chain rule through N, D, E to (xi, s, d0, d1), from there to the bin's knots, from there to the parameters."""
        x, parameters, xi, w, h, d0, d1, slope, curve, shares, index, raw, cross, denominator, numerator, e, inside = ctx.saved_tensors
        if torch.is_grad_enabled():
            outputs = spline_map(x, parameters, bound=ctx.bound)
            needed = [t for t in (x, parameters) if t.requires_grad]
            found = iter(torch.autograd.grad(outputs, needed, (grad_y, grad_log), create_graph=True))
            return next(found) if x.requires_grad else None, next(found) if parameters.requires_grad else None, None
        g_y, g_log = grad_y * inside, grad_log * inside
        rest, turn = 1 - xi, 1 - 2 * xi
        g_n = g_y * h / denominator
        g_d = -(g_n * numerator + 2 * g_log) / denominator
        g_e = g_log / e
        g_xi = g_n * (2 * slope * xi + d0 * turn) + g_d * curve * turn + 2 * g_e * (d1 * xi + slope * turn - d0 * rest)
        g_s = g_n * xi * xi + g_d * (1 - 2 * cross) + 2 * (g_e * cross + g_log / slope)
        g_d0 = (g_n + g_d) * cross + g_e * rest * rest
        g_d1 = g_d * cross + g_e * xi * xi
        g_x = g_xi / w
        g_size = torch.stack([-(g_s * slope + g_xi * xi) / w, g_y * numerator / denominator + g_s / w], dim=-1)
        g_left = torch.stack([-g_x, g_y], dim=-1)
        grad = _to_parameters(ctx, g_left, g_size, torch.stack([g_d0, g_d1], dim=-1), shares, index, raw)
        return torch.where(inside, g_x, grad_y), grad, None


def _to_parameters(ctx: Any, g_left: Tensor, g_size: Tensor, g_derivative: Tensor, shares: Tensor, index: Tensor, raw: Tensor) -> Tensor:
    """Gradients of the bin's left knot, size and derivatives (..., 2) each -> gradient of the parameters (..., 3K - 1).

    The left knot is the sum of the sizes before it, so each of these has the knot's gradient; the bin's own has its size's.
    """
    n_bins = shares.shape[-1]
    grad = shares.new_zeros(*index.shape[:-1], ctx.n_parameters)
    before = torch.arange(n_bins, device=index.device) < index
    g_sizes = g_left.unsqueeze(-1) * before.unsqueeze(-2)
    g_sizes.scatter_(-1, index.unsqueeze(-1).expand(*index.shape[:-1], 2, 1), g_size.unsqueeze(-1))
    weighted = g_sizes * shares
    g_raw = (weighted - shares * weighted.sum(dim=-1, keepdim=True)) * (2 * ctx.bound * (1 - MIN_WIDTH * n_bins))
    grad[..., : 2 * n_bins] = g_raw.flatten(-2)
    around = torch.cat([index - 1, index], dim=-1)
    inner = (around >= 0) & (around < n_bins - 1)
    grad[..., 2 * n_bins :].scatter_add_(-1, around.clamp(0, n_bins - 2), g_derivative * raw.sigmoid() * inner)
    return grad
