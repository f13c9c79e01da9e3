r"""Kernels in C for training on a CPU (`kernels.c`), compiled by the system's compiler at their first use, and the layer built on them.

A small flow spends its training step on many short operations: the spline alone is fifty torch operations. The kernel is a single pass
and five times as fast. `kernels.c` needs no header of Python or torch, so the compilation takes about a second. The library is kept in
the user's cache folder and called through ctypes. Without a compiler, or if the library cannot be loaded, the same maps are computed by
torch operations. SBI_PHYS_NATIVE=0 switches the kernels off.

A library is code, so it is loaded only from a folder that belongs to the user and that nobody else can write to. Its name is made from
the source, the compiler, the processor and the SHA-256 of its content; owner, mode and content are checked on the open file that is
then loaded. A new library runs once in a process of its own, and every loaded one is compared with torch before its first use.

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
import stat
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sbi_phys.core.errors import ShapeError

__all__ = ["MAX_BINS", "available", "silu_gradient", "silu_layer", "silu_map", "spline_gradient", "spline_map", "usable"]

_SOURCE = Path(__file__).with_name("kernels.c")
# -ffast-math is not used: a NaN has to stay a NaN
_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math")
MAX_BINS = 128
_BUILD_SECONDS = 60


# run in a process of its own after the compilation: code that this processor cannot run ends that process alone
_TRIAL = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
number = ctypes.c_float
for bins in (8, 40):
    rows = 40
    x, y, log, grad = ((number * rows)(*(0.2 * i - 4 for i in range(rows))) for _ in range(4))
    p, out = ((number * (rows * (3 * bins - 1)))() for _ in range(2))
    shape = (ctypes.c_long(rows), bins, number(5), number(1e-3), number(1e-3), number(0.54))
    for inverse in (0, 1):
        library.spline_map(*shape, inverse, x, p, y, log)
    library.spline_gradient(*shape, x, p, y, log, grad, out)
    library.silu_map(ctypes.c_long(5), 8, x, y, ctypes.c_long(0), log, grad)
    library.silu_gradient(ctypes.c_long(rows), x, y, grad)
"""


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels apply: all tensors are float32 in main memory, and the library is available."""
    for t in tensors:
        if t.dtype is not torch.float32 or t.device.type != "cpu":
            return False
    # under autocast a product of float32 matrices has another type
    return not torch.is_autocast_enabled("cpu") and _at_hand()


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
        library = _library(compiler, flags)
        if library is not None:
            return library if _agrees(library) else None
    return None


def _library(compiler: str, flags: tuple[str, ...]) -> ctypes.CDLL | None:
    """The library from the first cache folder that is private, compiled if it is not there; None if that is impossible."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=_BUILD_SECONDS, check=True).stdout
        name = hashlib.sha256("\0".join([_SOURCE.read_text(), *flags, version, _processor()]).encode()).hexdigest()[:24]
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None
    for folder in (root / "sbi_phys", Path(tempfile.gettempdir()) / f"sbi_phys-{os.geteuid()}"):
        try:
            handle = _private(folder)
        except OSError:
            continue
        try:
            library = _load(handle, folder, name)
            if library is None and _build(handle, folder, name, [compiler, *flags, str(_SOURCE)]):
                library = _load(handle, folder, name)
            return library
        except subprocess.SubprocessError:
            return None
        except OSError:
            continue
        finally:
            os.close(handle)
    return None


def _private(folder: Path) -> int:
    """Descriptor of a folder that belongs to this user and to which nobody else has access; made if missing.   Raises: OSError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(handle).st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user")
        os.fchmod(handle, 0o700)
    except OSError:
        os.close(handle)
        raise
    return handle


def _load(handle: int, folder: Path, name: str) -> ctypes.CDLL | None:
    """The library `kernels-<name>-<SHA-256 of the content>.so` of a private folder, if there is one that can be trusted; others go."""
    for entry in sorted(os.listdir(handle)):
        if not entry.startswith(f"kernels-{name}-"):
            continue
        with suppress(OSError):
            file = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=handle)
            if _trusted(file, entry):
                # the file that was checked, whatever the name means by now; it stays open, because the system keeps libraries by name
                opened = Path(f"/proc/self/fd/{file}")
                library = _declared(ctypes.CDLL(str(opened if opened.exists() else folder / entry)))
                if library is not None:
                    return library
            os.close(file)
            os.unlink(entry, dir_fd=handle)
    return None


def _trusted(file: int, entry: str) -> bool:
    """Whether an open file belongs to this user, cannot be written by others, and has the content that its name says."""
    facts = os.fstat(file)
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid() or facts.st_mode & 0o022:
        return False
    with open(file, "rb", closefd=False) as content:
        return entry.endswith(f"-{hashlib.sha256(content.read()).hexdigest()}.so")


def _build(handle: int, folder: Path, name: str, command: list[str]) -> bool:
    """Compile, try and write the library; it gets its name when it is complete, so that several processes may do this at once."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        built = Path(work) / "kernels.so"
        subprocess.run([*command, "-o", str(built)], capture_output=True, timeout=_BUILD_SECONDS, check=True)
        if sys.executable and subprocess.run([sys.executable, "-I", "-c", _TRIAL, str(built)], capture_output=True, timeout=60).returncode:
            return False
        with open(built, "rb+") as file:
            os.fchmod(file.fileno(), 0o700)
            entry = f"kernels-{name}-{hashlib.sha256(file.read()).hexdigest()}.so"
            os.fsync(file.fileno())
        os.replace(built, entry, dst_dir_fd=handle)
        os.fsync(handle)
    return True


def _processor() -> str:
    """Text that identifies the instruction set, since several machines may share one home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor() + platform.machine()


def _declared(library: ctypes.CDLL) -> ctypes.CDLL | None:
    """The library with the types of its functions, None if one of them is missing."""
    number, pointer = ctypes.c_float, ctypes.c_void_p
    shape = (ctypes.c_long, ctypes.c_int, number, number, number, number)
    silu = (ctypes.c_long, ctypes.c_int, pointer, pointer, ctypes.c_long, pointer, pointer)
    types = {
        "spline_map": (*shape, ctypes.c_int, *(pointer,) * 4), "spline_gradient": (*shape, *(pointer,) * 6),
        "silu_map": silu, "silu_gradient": (ctypes.c_long, pointer, pointer, pointer),
    }  # fmt: skip
    try:
        for name, arguments in types.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
    except AttributeError:
        return None
    return library


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library gives the numbers of torch for a small example; warns where it does not."""
    constants, rows = (3.0, 1e-3, 1e-3, 0.54), 37
    with torch.inference_mode(False), torch.enable_grad():
        for bins in (5, 30):
            t = torch.arange(rows * (3 * bins - 1), dtype=torch.float64, device="cpu")
            parameters, x = (3 * torch.sin(t)).reshape(rows, -1), torch.linspace(-3.2, 3.2, rows, dtype=torch.float64, device="cpu")
            y, log_slope, *gradients = _reference(x, parameters, constants)
            x, parameters, y = x.float(), parameters.float(), y.float()
            ones = torch.ones_like(x)
            got = [*_spline_map(library, x, parameters, constants, False), *_spline_gradient(library, x, parameters, ones, ones, constants)]
            back, minus = _spline_map(library, y, parameters, constants, True)
            z = x.reshape(1, -1)
            silu = _silu_map(library, z.clone(), ones, z) - z
            slope = _silu_gradient(library, z, torch.ones_like(z))
            s = torch.sigmoid(z)
            pairs = [*zip(got, [y, log_slope, *gradients], strict=True), (minus, -log_slope), (silu, F.silu(z + 1))]
            pairs.append((slope, s + z * s * (1 - s)))
            # where the map is flat, a small error of y is a large one of x
            flat = ((back - x).abs() * log_slope.exp().clamp(max=1)).max()
            if not all(torch.allclose(a.double(), b.double(), rtol=1e-2, atol=1e-2) for a, b in pairs) or not flat < 1e-3:
                warnings.warn(
                    "the compiled kernels do not give the numbers of torch on this machine; torch is used, which is slower. "
                    "SBI_PHYS_NATIVE=0 switches them off",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return False
    return True


def _reference(x: Tensor, parameters: Tensor, constants: tuple[float, ...]) -> list[Tensor]:
    """y, log|dy/dx| and the gradients of their sum, of x (n,) and parameters (n, 3K - 1), by the formulas as they are written."""
    bound, least, least_slope, offset = constants
    x, parameters = x.detach().requires_grad_(), parameters.detach().requires_grad_()
    bins = (parameters.shape[-1] + 1) // 3
    edges = []
    for raw in (parameters[:, :bins], parameters[:, bins : 2 * bins]):
        sizes = 2 * bound * (least + (1 - least * bins) * raw.softmax(dim=-1))
        edges.append(F.pad(sizes.cumsum(dim=-1), (1, 0)) - bound)
    derivatives = least_slope + F.softplus(F.pad(parameters[:, 2 * bins :], (1, 1)) + offset)
    inside = x.clamp(-bound, bound)
    k = (inside.unsqueeze(-1) >= edges[0][:, 1:-1]).sum(dim=-1, keepdim=True)
    x0, x1, y0, y1 = (e.gather(-1, k + j).squeeze(-1) for e in edges for j in (0, 1))
    d0, d1 = (derivatives.gather(-1, k + j).squeeze(-1) for j in (0, 1))
    s, xi = (y1 - y0) / (x1 - x0), (inside - x0) / (x1 - x0)
    denominator = s + (d0 + d1 - 2 * s) * xi * (1 - xi)
    y = y0 + (y1 - y0) * (s * xi**2 + d0 * xi * (1 - xi)) / denominator
    log_slope = (s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / denominator**2).log()
    outside = inside != x
    out = [torch.where(outside, x, y), log_slope.masked_fill(outside, 0.0)]
    return [t.detach() for t in (*out, *torch.autograd.grad(out[0].sum() + out[1].sum(), (x, parameters)))]


def spline_map(x: Tensor, parameters: Tensor, constants: tuple[float, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return y and log|dy/dx|, of the shape of x; parameters has one row for each value of x.   Raises: ShapeError."""
    _require_rows(x, parameters)
    return _spline_map(_kernels(), x, parameters, constants, inverse)


def _spline_map(library: ctypes.CDLL, x: Tensor, parameters: Tensor, constants: tuple[float, ...], inverse: bool) -> tuple[Tensor, Tensor]:
    x, parameters = x.contiguous(), parameters.contiguous()
    y, log_slope = torch.empty_like(x), torch.empty_like(x)
    n_bins = (parameters.shape[-1] + 1) // 3
    pointers = (x.data_ptr(), parameters.data_ptr(), y.data_ptr(), log_slope.data_ptr())
    library.spline_map(x.numel(), n_bins, *constants, int(inverse), *pointers)
    return y, log_slope


def spline_gradient(x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and of the parameters, given those of y and of the log slope.   Raises: ShapeError."""
    _require_rows(x, parameters)
    for name, t in (("grad_y", grad_y), ("grad_log", grad_log)):
        if t.shape != x.shape or t.dtype is not torch.float32:
            raise ShapeError(f"{name} has shape {tuple(t.shape)} and {t.dtype}; expected {tuple(x.shape)} of float32")
    return _spline_gradient(_kernels(), x, parameters, grad_y, grad_log, constants)


def _spline_gradient(
    library: ctypes.CDLL, x: Tensor, parameters: Tensor, grad_y: Tensor, grad_log: Tensor, constants: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    x, parameters, grad_y, grad_log = x.contiguous(), parameters.contiguous(), grad_y.contiguous(), grad_log.contiguous()
    grad_x, grad = torch.empty_like(x), torch.empty_like(parameters)
    n_bins = (parameters.shape[-1] + 1) // 3
    pointers = (t.data_ptr() for t in (x, parameters, grad_y, grad_log, grad_x, grad))
    library.spline_gradient(x.numel(), n_bins, *constants, *pointers)
    return grad_x, grad


def _require_rows(x: Tensor, parameters: Tensor) -> None:
    """Raise ShapeError unless the parameters have 3K - 1 numbers, K at most MAX_BINS, for each value of x, all in float32."""
    width = parameters.shape[-1] if parameters.ndim else 0
    if width % 3 != 2 or width >= 3 * MAX_BINS or parameters.numel() != width * x.numel():
        raise ShapeError(
            f"parameters have shape {tuple(parameters.shape)} for x of shape {tuple(x.shape)}; expected 3K - 1 numbers for each value "
            f"of x, K at most {MAX_BINS}"
        )
    if x.dtype is not torch.float32 or parameters.dtype is not torch.float32:
        raise ShapeError(f"x is {x.dtype} and parameters are {parameters.dtype}; expected float32")


def silu_map(z: Tensor, shift: Tensor, base: Tensor | None) -> Tensor:
    """Add the shift (c,) or (n, c) to z (n, c) in place; return base + silu(z).   Raises: ShapeError."""
    if z.ndim != 2 or not z.is_contiguous() or not _fits(z.shape, shift) or not (base is None or base.shape == z.shape):
        shapes = [None if t is None else tuple(t.shape) for t in (z, shift, base)]
        raise ShapeError(f"z, shift and base have shapes {shapes}; expected a contiguous z (n, c), shift (c,) or (n, c) and base (n, c)")
    if any(t.dtype is not torch.float32 for t in (z, shift, z if base is None else base)):
        raise ShapeError(f"z is {z.dtype} and shift {shift.dtype}; expected float32")
    return _silu_map(_kernels(), z, shift, base)


def _silu_map(library: ctypes.CDLL, z: Tensor, shift: Tensor, base: Tensor | None) -> Tensor:
    out = torch.empty_like(z)
    if shift.stride(-1) != 1:
        shift = shift.contiguous()
    stride = shift.stride(0) if shift.ndim == 2 else 0
    above = None if base is None else base.contiguous()
    pointers = (z.data_ptr(), shift.data_ptr(), stride, None if above is None else above.data_ptr(), out.data_ptr())
    library.silu_map(*z.shape, *pointers)
    return out


def _fits(shape: tuple[int, ...], shift: Tensor) -> bool:
    """Whether the shift has one row for all rows of z, or one for each."""
    return tuple(shift.shape) in (tuple(shape), tuple(shape[1:]))


def silu_gradient(z: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of z, given that of silu(z).   Raises: ShapeError."""
    if grad.shape != z.shape or not z.is_contiguous() or z.dtype is not torch.float32 or grad.dtype is not torch.float32:
        raise ShapeError(f"z has shape {tuple(z.shape)} and the gradient {tuple(grad.shape)}; expected equal shapes of float32")
    return _silu_gradient(_kernels(), z, grad)


def _silu_gradient(library: ctypes.CDLL, z: Tensor, grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    out = torch.empty_like(z)
    library.silu_gradient(z.numel(), z.data_ptr(), grad.data_ptr(), out.data_ptr())
    return out


def _kernels() -> ctypes.CDLL:
    kernels = available()
    if kernels is None:
        raise RuntimeError("the compiled kernels are not available; expected a check with `usable` before the call")
    return kernels


def silu_layer(x: Tensor, weight: Tensor, shift: Tensor, *, skip: bool = False) -> Tensor:
    """Return h (n, c) of x (n, k), weight (c, k), shift (c,) or (n, c); with `skip`, c = k and x is added.

    A shift of another shape is added by torch's rules.   Raises: ShapeError.
    """
    if skip and weight.shape[0] != weight.shape[1]:
        raise ShapeError(f"weight has shape {tuple(weight.shape)}; expected as many rows as columns in a layer with a skip connection")
    rows = (*x.shape[:-1], weight.shape[0])
    # torch.compile fuses these operations itself
    if x.ndim == 2 and not torch.compiler.is_compiling() and _fits(rows, shift) and usable(x, weight, shift):
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
