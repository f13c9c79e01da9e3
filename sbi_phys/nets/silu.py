r"""The layer of a perceptron, h = silu(x W^T + s), or with a skip connection h = x + silu(x W^T + s).

silu(z) = z / (1 + e^-z) (Hendrycks & Gimpel 2016, arXiv:1606.08415). The shift s is a bias (c,), or a row for each x (n, c): in a
conditional flow the share of the context. On a CPU shift, silu and skip are one pass over the product (`native`), and the
gradient is written out: where torch's operations copy the shift, and add what comes back along the two ways of a skip,
in passes of their own, here one product adds to the other.

    dL/dz = g silu'(z),   dL/dx = dL/dz W (+ g),   dL/dW = (dL/dz)^T x,   silu'(z) = S + z S (1 - S),   S = 1 / (1 + e^-z)
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sbi_phys.nets import native

__all__ = ["silu_layer"]


def silu_layer(x: Tensor, weight: Tensor, shift: Tensor, *, skip: bool = False) -> Tensor:
    """H of x (n, k), weight (c, k), shift (c,) or (n, c) -> (n, c); with `skip`, c = k and x is added."""
    # under torch.compile the compiler makes one pass of it by itself
    if x.ndim == 2 and not torch.compiler.is_compiling() and native.usable(x, weight, shift):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or shift.requires_grad):
            out: Tensor = _SiluLayer.apply(x, weight, shift, skip)
            return out
        return native.silu_map(x @ weight.t(), shift, x if skip else None)
    return _plain(x, weight, shift, skip)


def _plain(x: Tensor, weight: Tensor, shift: Tensor, skip: bool) -> Tensor:
    hidden = F.silu(F.linear(x, weight, shift) if shift.ndim == 1 else torch.addmm(shift, x, weight.t()))
    return x + hidden if skip else hidden


class _SiluLayer(torch.autograd.Function):
    """`_plain`, with the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, skip: bool) -> Tensor:
        """Keep z, of which nobody else knows: the kernel has written into the product."""
        z = x @ weight.t()
        ctx.skip = skip
        out = native.silu_map(z, shift, x if skip else None)
        ctx.save_for_backward(x, weight, shift, z)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """As above; where it is to be differentiated again, as autograd records it."""
        x, weight, shift, z = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            needed = [t for t, need in zip((x, weight, shift), needs, strict=True) if need]
            found = iter(torch.autograd.grad(_plain(x, weight, shift, ctx.skip), needed, grad, create_graph=True))
            return *(next(found) if need else None for need in needs), None
        g = native.silu_gradient(z, grad)
        g_x = None
        if needs[0]:
            g_x = torch.addmm(grad, g, weight) if ctx.skip else g @ weight
        return g_x, g.t() @ x if needs[1] else None, (g if shift.ndim == 2 else g.sum(dim=0)) if needs[2] else None, None
