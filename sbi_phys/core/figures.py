"""Access of results to their figures, which are in a later folder, `sbi_phys.plotting`.

`figures.calibration.rank_ecdf(result, ax)` imports `sbi_phys.plotting.calibration` at the call, so that numerical code does not
import matplotlib.
"""

import importlib
from types import ModuleType

__all__ = ["figures"]


class _Figures:
    """Modules of `sbi_phys.plotting` as attributes, each imported at its first use."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(f"sbi_phys.plotting.{name}")


figures = _Figures()
