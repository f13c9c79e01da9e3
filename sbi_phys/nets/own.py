"""Networks of the user's own: built from the name of a class, and guarded, so that a failure names the layer.

A settings class (`EmbeddingConfig`, `FlowConfig`) holds the name 'package.module:Class' and the keyword arguments; files hold these and
the weights, never code. The caller seeds torch's global generator before a module is built.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from sbi_phys.core.classes import call_class, find_class, require_arguments
from sbi_phys.core.errors import NonFiniteError, SbiPhysError, SettingError, ShapeError

__all__ = ["build_own", "guarded", "require_own", "where_it_fails"]


def build_own(what: str, spec: str, settings: Mapping[str, Any], **known: Any) -> nn.Module:
    """Return the module of a class named 'package.module:Class', which must be a subclass of torch.nn.Module.

    Args: known: further arguments, handed over where the class has a parameter of the name that `settings` does not give.
    Raises: SettingError.
    """
    kind = find_class(what, spec, nn.Module)
    return call_class(what, kind, {**_taken(kind, known), **settings})


def require_own(what: str, spec: str, settings: Mapping[str, Any], **known: Any) -> None:
    """Check name and arguments without building the module; its Python module is imported.   Raises: as `build_own`."""
    kind = find_class(what, spec, nn.Module)
    require_arguments(what, kind, {**_taken(kind, known), **settings})


def _taken(kind: type, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        names = inspect.signature(kind).parameters
    except ValueError:
        return {}
    return {name: value for name, value in known.items() if name in names}


def guarded(module: nn.Module, what: str) -> nn.Module:
    """Make `forward` of a module name the layer where it fails, and refuse outputs of another shape or with NaN; returns the module.

    Modules of this package are left as they are. The class of the module becomes a subclass of its own class, so that its attributes and
    the names of its weights stay.
    """
    kind = type(module)
    if kind.__module__.startswith("sbi_phys.") or issubclass(kind, _Guard) or "forward" in vars(module):
        return module
    module.__class__ = type(
        kind.__name__, (_Guard, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_what": what}
    )
    return module


class _Guard(nn.Module):
    """Placed before the user's class: `super().forward` is the user's."""

    _what = "embedding"

    def forward(self, x: Tensor) -> Tensor:
        forward = cast(Callable[[Tensor], Tensor], super().forward)
        if torch.compiler.is_compiling():
            return forward(x)
        try:
            out = forward(x)
        except (SbiPhysError, torch.OutOfMemoryError):
            raise
        except Exception as err:
            raise SettingError(f"{_name(self)} fails {where_it_fails(self, forward, x)}: {_first_line(err)}") from err
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != x.shape[0]:
            raise ShapeError(f"{_name(self)} maps x of shape {tuple(x.shape)} to {_shape(out)}; expected ({x.shape[0]}, n_features)")
        if not torch.isfinite(out).all() and torch.isfinite(x).all() and all(torch.isfinite(p).all() for p in self.parameters()):
            where = where_it_fails(self, forward, x, finite=True)
            raise NonFiniteError(f"{_name(self)} gives NaN or Inf {where}; expected finite features of finite x and weights")
        return out


def where_it_fails(module: nn.Module, forward: Callable[[Tensor], Any], x: Tensor, *, finite: bool = False) -> str:
    """Run `forward` again and say which layer raises, or with `finite` which is the first to give NaN or Inf, and its input's shape."""
    open_layers: list[tuple[str, nn.Module, str]] = []
    found: list[str] = []

    def enter(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(layer: nn.Module, args: Any) -> None:
            open_layers.append((name, layer, ", ".join(map(_shape, args))))

        return hook

    def leave(layer: nn.Module, args: Any, out: Any) -> None:
        if not open_layers:
            return
        place = _place(*open_layers.pop())
        if not found and isinstance(out, Tensor) and not torch.isfinite(out).all():
            found.append(place)

    handles = []
    for name, layer in module.named_modules():
        if layer is not module:
            handles += [layer.register_forward_pre_hook(enter(name)), layer.register_forward_hook(leave)]
    try:
        with torch.no_grad():
            forward(x)
    except Exception:
        found = [_place(*open_layers[-1])] if open_layers and not finite else found
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else f"in its forward, which got x of shape {tuple(x.shape)}"


def _place(name: str, layer: nn.Module, shapes: str) -> str:
    text = repr(layer) if not list(layer.children()) else type(layer).__name__
    return f"in layer {name} = {text}, which got {shapes}"


def _name(module: nn.Module) -> str:
    return f"{getattr(module, '_what', 'embedding')} {type(module).__name__}"


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _first_line(err: BaseException) -> str:
    return f"{type(err).__name__}: {(str(err).splitlines() or [''])[0]}"
