"""Kernels in C for training on a CPU (`kernels.c`), built by the system's compiler the first time they are wanted.

In torch operations the spline of a small flow is fifty passes over short arrays; the kernel is one, five times as fast, and the layers
between lose their copies of shifts and sums. It is one file without headers of Python or torch: building takes about a second,
the library is kept in the user's cache folder under a name made from source, compiler and processor, and calls go through ctypes.
Where there is no compiler, or the library does not load, the same maps in torch operations are used and nothing else changes.
SBI_PHYS_NATIVE=0 switches the kernels off.
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

import torch
from torch import Tensor

__all__ = ["MAX_BINS", "available", "silu_gradient", "silu_map", "spline_gradient", "spline_map", "usable"]

_SOURCE = Path(__file__).with_name("kernels.c")
# no -ffast-math: a NaN must come out as one
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
MAX_BINS = 128
_BUILD_SECONDS = 60


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels can take them: float32 in main memory, and a compiler at hand."""
    for t in tensors:
        if t.dtype is not torch.float32 or t.device.type != "cpu":
            return False
    return _at_hand()


@torch.compiler.assume_constant_result
def _at_hand() -> bool:
    return available() is not None


@cache
def available() -> ctypes.CDLL | None:
    """The library, built if need be, or None."""
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
    """Path of the built library; built aside and renamed, so that several processes may do it at once."""
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
                # a folder in a shared place could be somebody else's, and so could the code in it
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
    """Text that differs between processors of different instruction sets: a home folder may be shared by several machines."""
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
    """Y and log|dy/dx|, of the shape of x, which has one row of parameters for each of its values."""
    x, parameters = x.contiguous(), parameters.contiguous()
    y, log_slope = torch.empty_like(x), torch.empty_like(x)
    n_bins = (parameters.shape[-1] + 1) // 3
    pointers = (x.data_ptr(), parameters.data_ptr(), y.data_ptr(), log_slope.data_ptr())
    _kernels().spline_map(x.numel(), n_bins, *constants, int(inverse), *pointers)
    return y, log_slope


def spline_gradient(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the parameters, from those of y and of the log slope."""
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
    """Gradient of z from that of silu(z)."""
    grad = grad.contiguous()
    out = torch.empty_like(z)
    _kernels().silu_gradient(z.numel(), z.data_ptr(), grad.data_ptr(), out.data_ptr())
    return out


def _kernels() -> ctypes.CDLL:
    kernels = available()
    if kernels is None:
        raise RuntimeError("there are no kernels here; ask `usable` first")
    return kernels
