"""The one place through which results reach their figures, which live in a folder above them.

`figures.calibration.rank_ecdf(result, ax)` loads `sbi_phys.plotting.calibration` when it is called: matplotlib stays out of numeric code.
"""

import importlib
from types import ModuleType

__all__ = ["figures"]


class _Figures:
    """Modules of `sbi_phys.plotting` as attributes, each imported when it is used."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"sbi_phys.plotting.{name}")


figures = _Figures()
