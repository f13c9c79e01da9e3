"""Lazy import of the public names of a package, so that `import sbi_phys` is quick and does not import torch.

The names are listed in the stub `__init__.pyi` of the package, for this module and for type checkers
(SPEC 1, https://scientific-python.org/specs/spec-0001).
"""

from collections.abc import Callable
from typing import Any

import lazy_loader

__all__ = ["public_names"]


def public_names(package: str, file: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return `__getattr__`, `__dir__` and `__all__` of a package from its stub `__init__.pyi`.

    Args: package, its `__name__`; file, its `__file__`.   Raises: ValueError if there is no stub.
    """
    find, listed, names = lazy_loader.attach_stub(package, file)

    def find_or_say(name: str) -> Any:
        if name in names:
            return find(name)
        from sbi_phys.core.checks import did_you_mean

        known = ", ".join(names)
        raise AttributeError(f"module {package!r} has no attribute {name!r}{did_you_mean(name, names)}; public names: {known}", name=name)

    return find_or_say, listed, names
