"""The spline's kernel as an operator that torch.compile takes into its graph as it is.

What the compiler makes of the spline's operations is slower than the kernel: it keeps dozens of intermediate rows for the gradient.
An operator is opaque to it; it has shapes (`register_fake`) and a gradient, another operator.
"""

from typing import Any

import torch
from torch import Tensor

from sbi_phys.nets import native

__all__ = ["spline_operator"]

Constants = list[float]


@torch.library.custom_op("sbi_phys::spline", mutates_args=())
def _spline(x: Tensor, parameters: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return native.spline_map(x, parameters, tuple(constants), inverse=False)


@_spline.register_fake
def _(x: Tensor, parameters: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("sbi_phys::spline_gradient", mutates_args=())
def _gradient(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return native.spline_gradient(x, parameters, grad_y, grad_log, tuple(constants))


@_gradient.register_fake
def _(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: Constants) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(parameters, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Constants], output: tuple[Tensor, Tensor]) -> None:
    x, parameters, ctx.constants = inputs
    ctx.save_for_backward(x, parameters)


def _backward(ctx: Any, grad_y: Tensor, grad_log: Tensor) -> tuple[Tensor, Tensor, None]:
    x, parameters = ctx.saved_tensors
    return *_gradient(x, parameters, grad_y, grad_log, ctx.constants), None


_spline.register_autograd(_backward, setup_context=_setup)


def spline_operator(x: Tensor, parameters: Tensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Y and log|dy/dx| as `native.spline_map` has them, differentiable once."""
    y, log_slope = _spline(x, parameters, list(constants))
    return y, log_slope
