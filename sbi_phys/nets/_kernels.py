r"""Kernels in C for training on a CPU (`kernels.c`), compiled by the system's compiler at their first use, and the layer built on them.

A small flow spends its training step on many short operations: the spline alone is fifty torch operations. The kernel is a single pass
and five times as fast. `kernels.c` needs no header of Python or torch, so the compilation takes about a second. The library is kept in
the user's cache folder, under a name made from the source, the compiler and the processor, and is called through ctypes. Without a
compiler, or if the library cannot be loaded, the same maps are computed by torch operations. SBI_PHYS_NATIVE=0 switches the kernels off.

`silu_layer` is one layer of a perceptron, h = silu(x W^T + s), with a skip connection h = x + silu(x W^T + s), where
silu(z) = z / (1 + e^-z). The shift s is a bias (c,), or one row for each x (n, c), as the context of a conditional flow is. On a CPU,
shift, silu and skip are one pass over the product x W^T. The gradient is written by hand, with S = 1 / (1 + e^-z):

    dL/dz = g silu'(z),   dL/dx = dL/dz W (+ g),   dL/dW = (dL/dz)^T x,   silu'(z) = S + z S (1 - S)

Source: Hendrycks & Gimpel 2016, arXiv:1606.08415 (silu).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["MAX_BINS", "available", "silu_gradient", "silu_layer", "silu_map", "spline_gradient", "spline_map", "usable"]

_SOURCE = Path(__file__).with_name("kernels.c")
# -ffast-math is not used: a NaN has to stay a NaN
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
MAX_BINS = 128
_BUILD_SECONDS = 60


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels apply: all tensors are float32 in main memory, and the library is available."""
    for t in tensors:
        if t.dtype is not torch.float32 or t.device.type != "cpu":
            return False
    return _at_hand()


@torch.compiler.assume_constant_result
def _at_hand() -> bool:
    return available() is not None


@cache
def available() -> ctypes.CDLL | None:
    """Return the library, compiled at the first call, or None."""
    if os.environ.get("SBI_PHYS_NATIVE", "1") == "0":
        return None
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None or platform.system() == "Windows":
        return None
    for flags in ((*_FLAGS, "-march=native"), _FLAGS):
        path = _cached(compiler, flags)
        if path is not None:
            return _open(path)
    return None


def _cached(compiler: str, flags: tuple[str, ...]) -> Path | None:
    """Path of the compiled library; it is written to a temporary name and renamed, so that several processes may do this at once."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_BUILD_SECONDS, check=True).stdout
        name = hashlib.sha256("\0".join([_SOURCE.read_text(), *flags, version, _processor()]).encode()).hexdigest()[:24]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        for folder in (root / "sbi_phys", Path(tempfile.gettempdir()) / f"sbi_phys-{os.getuid()}"):
            path = folder / f"kernels-{name}.so"
            if path.exists() and path.stat().st_uid == os.getuid():
                return path
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                # in a shared place the folder, and the code in it, could belong to another user
                if folder.stat().st_uid != os.getuid():
                    continue
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    built = Path(work) / path.name
                    command = [compiler, *flags, str(_SOURCE), "-o", str(built)]
                    subprocess.run(command, capture_output=True, timeout=_BUILD_SECONDS, check=True)
                    os.replace(built, path)
                return path
            except OSError:
                continue
    except (OSError, RuntimeError, subprocess.SubprocessError):
        pass
    return None


def _processor() -> str:
    """Text that identifies the instruction set, since several machines may share one home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()


def _open(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    number, pointer = ctypes.c_float, ctypes.c_void_p
    shape = (ctypes.c_long, ctypes.c_int, number, number, number, number)
    library.spline_map.argtypes, library.spline_map.restype = (*shape, ctypes.c_int, *(pointer,) * 4), None
    library.spline_gradient.argtypes, library.spline_gradient.restype = (*shape, *(pointer,) * 6), None
    silu = (ctypes.c_long, ctypes.c_int, pointer, pointer, ctypes.c_long, pointer, pointer)
    library.silu_map.argtypes, library.silu_map.restype = silu, None
    library.silu_gradient.argtypes, library.silu_gradient.restype = (ctypes.c_long, pointer, pointer, pointer), None
    return library


def spline_map(x: Tensor, parameters: Tensor, constants: tuple[float, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return y and log|dy/dx|, of the shape of x; parameters has one row for each value of x."""
    x, parameters = x.contiguous(), parameters.contiguous()
    y, log_slope = torch.empty_like(x), torch.empty_like(x)
    n_bins = (parameters.shape[-1] + 1) // 3
    pointers = (x.data_ptr(), parameters.data_ptr(), y.data_ptr(), log_slope.data_ptr())
    _kernels().spline_map(x.numel(), n_bins, *constants, int(inverse), *pointers)
    return y, log_slope


def spline_gradient(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the parameters, given those of y and of the log slope."""
    x, parameters, grad_y, grad_log = x.contiguous(), parameters.contiguous(), grad_y.contiguous(), grad_log.contiguous()
    grad_x, grad = torch.empty_like(x), torch.empty_like(parameters)
    n_bins = (parameters.shape[-1] + 1) // 3
    pointers = (t.data_ptr() for t in (x, parameters, grad_y, grad_log, grad_x, grad))
    _kernels().spline_gradient(x.numel(), n_bins, *constants, *pointers)
    return grad_x, grad


def silu_map(z: Tensor, shift: Tensor, base: Tensor | None) -> Tensor:
    """Add the shift (c,) or (n, c) to z (n, c) in place; return base + silu(z)."""
    out = torch.empty_like(z)
    if shift.stride(-1) != 1:
        shift = shift.contiguous()
    stride = shift.stride(0) if shift.ndim == 2 else 0
    above = None if base is None else base.contiguous()
    pointers = (z.data_ptr(), shift.data_ptr(), stride, None if above is None else above.data_ptr(), out.data_ptr())
    _kernels().silu_map(*z.shape, *pointers)
    return out


def silu_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of z, given that of silu(z)."""
    grad = grad.contiguous()
    out = torch.empty_like(z)
    _kernels().silu_gradient(z.numel(), z.data_ptr(), grad.data_ptr(), out.data_ptr())
    return out


def _kernels() -> ctypes.CDLL:
    kernels = available()
    if kernels is None:
        raise RuntimeError("the compiled kernels are not available; expected a check with `usable` before the call")
    return kernels


def silu_layer(x: Tensor, weight: Tensor, shift: Tensor, *, skip: bool = False) -> Tensor:
    """Return h (n, c) of x (n, k), weight (c, k), shift (c,) or (n, c); with `skip`, c = k and x is added."""
    # torch.compile fuses these operations itself
    if x.ndim == 2 and not torch.compiler.is_compiling() and usable(x, weight, shift):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or shift.requires_grad):
            out: Tensor = _SiluLayer.apply(x, weight, shift, skip)
            return out
        return silu_map(x @ weight.t(), shift, x if skip else None)
    return _plain(x, weight, shift, skip)


def _plain(x: Tensor, weight: Tensor, shift: Tensor, skip: bool) -> Tensor:
    hidden = F.silu(F.linear(x, weight, shift) if shift.ndim == 1 else torch.addmm(shift, x, weight.t()))
    return x + hidden if skip else hidden


class _SiluLayer(torch.autograd.Function):
    """The same map as `_plain`, computed by the kernels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, skip: bool) -> Tensor:
        """Map x; keep z, the product into which the kernel has written."""
        z = x @ weight.t()
        ctx.skip = skip
        out = silu_map(z, shift, x if skip else None)
        ctx.save_for_backward(x, weight, shift, z)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient as above; for second derivatives, the gradient of `_plain`, which autograd records."""
        x, weight, shift, z = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            needed = [t for t, need in zip((x, weight, shift), needs, strict=True) if need]
            found = iter(torch.autograd.grad(_plain(x, weight, shift, ctx.skip), needed, grad, create_graph=True))
            return *(next(found) if need else None for need in needs), None
        g = silu_gradient(z, grad)
        g_x = None
        if needs[0]:
            g_x = torch.addmm(grad, g, weight) if ctx.skip else g @ weight
        return g_x, g.t() @ x if needs[1] else None, (g if shift.ndim == 2 else g.sum(dim=0)) if needs[2] else None, None
