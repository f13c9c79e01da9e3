r"""Monotone rational-quadratic spline y = f(x) on [-B, B] with identity tails, forward and inverse.

In bin k with knots (x_k, y_k), (x_{k+1}, y_{k+1}), slope s = h/w and knot derivatives d_k, d_{k+1}, xi = (x - x_k)/w:

    f(x)  = y_k + h N / D,   N = s xi^2 + d_k xi (1-xi),   D = s + c xi (1-xi),   c = d_k + d_{k+1} - 2s
    f'(x) = s^2 E / D^2,     E = d_{k+1} xi^2 + 2 s xi (1-xi) + d_k (1-xi)^2

All rows go through the same operations: inputs are clamped to the domain, the bin is found by comparison with the inner knots, and the
tails are selected by `where`. Without boolean indexing there is no synchronisation with the host and no change of shape on any device.

The time of a training step of a small flow is set by the number of operations, not by their size. Therefore the gradient of the forward
map is written by hand (`_Spline`), and float32 on a CPU is computed by a kernel in C if a compiler is available (`_kernels`). For
second derivatives (`create_graph=True`), the gradient is that of `spline_map`, the same map in operations that autograd records.

Source: Durkan et al. 2019, arXiv:1906.04032; Gregory & Delbourgo 1982, IMA J. Numer. Anal. 2, 123.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sbi_phys.nets import _kernels

__all__ = ["arithmetic", "n_spline_parameters", "rational_quadratic_spline", "spline_map"]

_CPU = torch.device("cpu")
MIN_WIDTH = 1e-3  # of a bin, as a fraction of the domain
MIN_DERIVATIVE = 1e-3
_RAW_LIMIT = 30.0
# softplus(0 + offset) + MIN_DERIVATIVE = 1: parameters of zero give the identity
_DERIVATIVE_OFFSET = math.log(math.expm1(1 - MIN_DERIVATIVE))


def arithmetic(device: torch.device = _CPU, precision: str = "float32") -> str:
    """What computes splines and hidden layers on a device: 'kernels' (those in C) or 'torch'; results record it.

    >>> from sbi_phys.nets.spline import arithmetic
    >>> arithmetic(precision="bf16")
    'torch'
    """
    return "kernels" if device.type == "cpu" and precision == "float32" and _kernels.available() is not None else "torch"


def n_spline_parameters(n_bins: int) -> int:
    """Numbers per transformed feature: widths (K), heights (K), inner derivatives (K - 1)."""
    return 3 * n_bins - 1


def rational_quadratic_spline(x: Tensor, parameters: Tensor, *, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """Apply the spline elementwise; the forward map has the fast gradient.

    Args: x (..., d). parameters (..., d, 3K - 1), unconstrained; zeros give the identity. bound B > 0.
    Returns: y (..., d) and log|dy/dx| (..., d) (of the inverse map when `inverse`).
    """
    if torch.compiler.is_compiling() and not inverse and _fits(x, parameters):
        return spline_operator(x, parameters, _constants(bound))
    differentiated = torch.is_grad_enabled() and (x.requires_grad or parameters.requires_grad)
    fast = _fits(x, parameters)
    if not differentiated and fast:
        return _kernels.spline_map(x, parameters, _constants(bound), inverse=inverse)
    if inverse or not differentiated:
        return spline_map(x, parameters, bound=bound, inverse=inverse)
    y, log_slope = (_NativeSpline if fast else _Spline).apply(x, parameters, bound)
    return y, log_slope


def _fits(x: Tensor, parameters: Tensor) -> bool:
    width = parameters.shape[-1]
    fits = width % 3 == 2 and width < 3 * _kernels.MAX_BINS and parameters.shape == (*x.shape, width)
    return fits and _kernels.usable(x, parameters)


def _constants(bound: float) -> tuple[float, ...]:
    return bound, MIN_WIDTH, MIN_DERIVATIVE, _DERIVATIVE_OFFSET


def spline_map(x: Tensor, parameters: Tensor, *, bound: float, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same map in operations that autograd can differentiate any number of times; arguments and result as above."""
    clamped = x.clamp(-bound, bound)
    b = _bin(clamped, parameters, bound, inverse=inverse)
    if inverse:
        xi = _solve(clamped - b.y0, b)
        value = torch.addcmul(b.x0, xi, b.w)
        _, ratio, log_slope = _terms(xi, b)[-3:]
    else:
        xi = (clamped - b.x0) / b.w
        _, ratio, log_slope = _terms(xi, b)[-3:]
        value = torch.addcmul(b.y0, b.h, ratio)
    outside = clamped != x
    return torch.where(outside, x, value), (-log_slope if inverse else log_slope).masked_fill(outside, 0.0)


class _Bin(NamedTuple):
    """The bin that each value falls into, and what the gradient needs: weight (..., 2, K), place (..., 1), raw (..., 2)."""

    x0: Tensor
    w: Tensor
    y0: Tensor
    h: Tensor
    d0: Tensor
    d1: Tensor
    slope: Tensor
    curve: Tensor
    weight: Tensor
    scale: Tensor
    place: Tensor
    raw: Tensor


def _bin(clamped: Tensor, parameters: Tensor, bound: float, *, inverse: bool) -> _Bin:
    n_bins = (parameters.shape[-1] + 1) // 3
    # widths and heights together; the softmax is written out because torch's is slow along so short an axis. The clamp changes next to
    # nothing: at e^+-30 a bin already has all of the domain or none. Beyond it the map is constant in the parameter, the gradient zero
    weight = parameters[..., : 2 * n_bins].clamp(-_RAW_LIMIT, _RAW_LIMIT).exp().unflatten(-1, (2, n_bins))
    running = _running_sum(weight)
    scale = 2 * bound * (1 - MIN_WIDTH * n_bins) / running[..., -1:]
    least = torch.arange(1, n_bins + 1, dtype=weight.dtype, device=weight.device) * (2 * bound * MIN_WIDTH) - bound
    right = torch.addcmul(least, running, scale)
    place = torch.searchsorted(right[..., 1 if inverse else 0, :-1].contiguous(), clamped.unsqueeze(-1).detach(), right=True)
    both = place.unsqueeze(-1).expand(*place.shape[:-1], 2, 1)
    size = (weight.gather(-1, both) * scale).squeeze(-1) + 2 * bound * MIN_WIDTH
    left = right.gather(-1, both).squeeze(-1) - size
    # derivatives, at the two knots of the bin alone; at the ends of the domain the parameter is 0, hence the slope 1
    knots = F.pad(parameters[..., 2 * n_bins :], (1, 1))
    raw = knots.gather(-1, torch.cat([place, place + 1], dim=-1)) + _DERIVATIVE_OFFSET
    w, h = size.unbind(-1)
    x0, y0 = left.unbind(-1)
    d0, d1 = (F.softplus(raw) + MIN_DERIVATIVE).unbind(-1)
    slope = h / w
    return _Bin(x0, w, y0, h, d0, d1, slope, torch.sub(d0 + d1, slope, alpha=2), weight, scale, place, raw)


def _running_sum(weight: Tensor) -> Tensor:
    """Running sum along the last axis; on a CPU as a matrix product, ten times as fast as cumsum along so short an axis."""
    if weight.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return weight.cumsum(dim=-1)
    n = weight.shape[-1]
    return weight @ torch.ones(n, n, dtype=weight.dtype).triu()


def _terms(xi: Tensor, b: _Bin) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(xi (1-xi), D, E, N/D, log f'), in few operations: N = s xi + (d0 - s) cross, E = d0 + (d1 - d0) xi - curve cross."""
    cross = torch.addcmul(xi, xi, xi, value=-1)
    denominator = torch.addcmul(b.slope, b.curve, cross)
    ratio = torch.addcmul(b.slope * xi, b.d0 - b.slope, cross) / denominator
    e = torch.addcmul(torch.lerp(b.d0, b.d1, xi), b.curve, cross, value=-1)
    return cross, denominator, e, ratio, ((b.slope / denominator).square() * e).log()


def _solve(dy: Tensor, b: _Bin) -> Tensor:
    """Position xi in [0, 1] within the bin, the stable root of the quadratic."""
    second = torch.addcmul(b.h * (b.slope - b.d0), dy, b.curve)
    first = torch.addcmul(b.h * b.d0, dy, b.curve, value=-1)
    constant = -b.slope * dy
    root = (first * first - 4 * second * constant).clamp(min=0).sqrt()
    return (2 * constant / (-first - root)).clamp(0, 1)


class _Spline(torch.autograd.Function):
    """The forward map of `spline_map` with a gradient written by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Map x; keep the bin for the gradient."""
        clamped = x.clamp(-bound, bound)
        b = _bin(clamped, parameters, bound, inverse=False)
        xi = (clamped - b.x0) / b.w
        cross, denominator, e, ratio, log_slope = _terms(xi, b)
        outside = clamped != x
        ctx.bound = bound
        kept = (b.w, b.h, b.d0, b.d1, b.slope, b.curve, b.weight, b.scale, b.place, b.raw)
        ctx.save_for_backward(x, parameters, outside, xi, cross, denominator, e, ratio, *kept)
        return torch.where(outside, x, torch.addcmul(b.y0, b.h, ratio)), log_slope.masked_fill_(outside, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Chain rule through N, D, E to (xi, s, d0, d1), from there to the bin's knots, from there to the parameters."""
        x, parameters, outside, xi, cross, denominator, e, ratio, w, h, d0, d1, slope, curve, *bins = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _recorded_gradient(x, parameters, grad_y, grad_log, ctx.bound)
        g_y, g_log = grad_y.masked_fill(outside, 0.0), grad_log.masked_fill(outside, 0.0)
        twice = g_log + g_log
        g_rise = g_y * h  # of N/D
        g_n = g_rise / denominator
        minus_g_d = torch.addcmul(twice, g_rise, ratio) / denominator
        g_e = g_log / e
        through_curve = cross * (minus_g_d + g_e)  # minus the gradient of curve = d0 + d1 - 2s
        g_cross = torch.addcmul(g_n * (d0 - slope), curve, minus_g_d + g_e, value=-1)
        g_xi = torch.addcmul(torch.addcmul(g_cross, xi, g_cross, value=-2), g_n, slope).addcmul_(g_e, d1 - d0)
        g_s = torch.addcmul(twice / slope - minus_g_d, g_n, xi - cross).add_(through_curve, alpha=2)
        at_d1 = torch.addcmul(through_curve, g_e, xi, value=-1).neg_()
        at_d0 = torch.addcmul(g_e, g_n, cross).sub_(g_e * xi).sub_(through_curve)
        g_x, per_w = g_xi / w, g_s / w
        g_size = torch.stack([torch.addcmul(per_w * slope, g_x, xi).neg_(), torch.addcmul(per_w, g_y, ratio)], dim=-1)
        g_left = torch.stack([-g_x, g_y], dim=-1)
        grad = _to_parameters(ctx.bound, g_left, g_size, torch.stack([at_d0, at_d1], dim=-1), *bins)
        n_sizes = 2 * bins[0].shape[-1]
        grad[..., :n_sizes].masked_fill_(parameters[..., :n_sizes].abs() > _RAW_LIMIT, 0.0)
        return torch.where(outside, grad_y, g_x), grad, None


class _NativeSpline(torch.autograd.Function):
    """The forward map of `spline_map` and its gradient, both by the kernel, which keeps only the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        """Map x."""
        ctx.bound = bound
        ctx.save_for_backward(x, parameters)
        return _kernels.spline_map(x, parameters, _constants(bound), inverse=False)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradient; the kernel finds the bin again, which costs less than keeping it."""
        x, parameters = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _recorded_gradient(x, parameters, grad_y, grad_log, ctx.bound)
        return *_kernels.spline_gradient(x, parameters, grad_y, grad_log, _constants(ctx.bound)), None


def _recorded_gradient(
    x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, bound: float
) -> tuple[Tensor | None, Tensor | None, None]:
    """Gradient that autograd can differentiate again."""
    outputs = spline_map(x, parameters, bound=bound)
    needed = [t for t in (x, parameters) if t.requires_grad]
    found = iter(torch.autograd.grad(outputs, needed, (grad_y, grad_log), create_graph=True))
    return next(found) if x.requires_grad else None, next(found) if parameters.requires_grad else None, None


def _to_parameters(
    bound: float, g_left: Tensor, g_size: Tensor, g_derivative: Tensor, weight: Tensor, scale: Tensor, place: Tensor, raw: Tensor
) -> Tensor:
    """Gradients of the bin's left knot, size and derivatives (..., 2) each -> gradient of the parameters (..., 3K - 1).

    The left knot is the sum of the sizes before it, so each of these has the knot's gradient; the bin's own has its size's.
    """
    n_bins = weight.shape[-1]
    before = (torch.arange(n_bins, device=place.device) < place).to(weight.dtype)
    g_sizes = g_left.unsqueeze(-1) * before.unsqueeze(-2)
    g_sizes.scatter_(-1, place.unsqueeze(-1).expand(*place.shape[:-1], 2, 1), g_size.unsqueeze(-1))
    stretch = weight * scale  # size less its floor: (softmax) times the length that is shared out
    weighted = g_sizes * stretch
    mean = weighted.sum(dim=-1, keepdim=True) / (2 * bound * (1 - MIN_WIDTH * n_bins))
    g_raw = torch.addcmul(weighted, stretch, mean, value=-1)
    knots = weight.new_zeros(*place.shape[:-1], n_bins + 1)
    knots.scatter_(-1, torch.cat([place, place + 1], dim=-1), g_derivative * raw.sigmoid())
    return torch.cat([g_raw.flatten(-2), knots[..., 1:-1]], dim=-1)


# The kernel as an operator, which torch.compile takes into its graph unchanged. The code that it generates for the torch operations is
# slower, because that keeps dozens of intermediate arrays for the gradient. `register_fake` gives the shapes of the operator's results.


@torch.library.custom_op("sbi_phys::spline", mutates_args=())
def _operator(x: Tensor, parameters: Tensor, constants: list[float]) -> tuple[Tensor, Tensor]:
    return _kernels.spline_map(x, parameters, tuple(constants), inverse=False)


@_operator.register_fake
def _(x: Tensor, parameters: Tensor, constants: list[float]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("sbi_phys::spline_gradient", mutates_args=())
def _operator_gradient(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: list[float]) -> tuple[Tensor, Tensor]:
    return _kernels.spline_gradient(x, parameters, grad_y, grad_log, tuple(constants))


@_operator_gradient.register_fake
def _(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: list[float]) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(parameters, memory_format=torch.contiguous_format)


def _operator_setup(ctx: Any, inputs: tuple[Tensor, Tensor, list[float]], output: tuple[Tensor, Tensor]) -> None:
    x, parameters, ctx.constants = inputs
    ctx.save_for_backward(x, parameters)


def _operator_backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> tuple[Tensor, Tensor, None]:
    x, parameters = ctx.saved_tensors
    return *_operator_gradient(x, parameters, grad_y, grad_log, ctx.constants), None


_operator.register_autograd(_operator_backward, setup_context=_operator_setup)


def spline_operator(x: Tensor, parameters: Tensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return y and log|dy/dx| as `_kernels.spline_map` does, differentiable once."""
    y, log_slope = _operator(x, parameters, list(constants))
    return y, log_slope
