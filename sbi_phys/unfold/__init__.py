"""Unfolding: from what was measured back to what was true, with full covariance and the prior's share of it.

response        Response: matrix with efficiency, fakes, background and its own noise, from pairs or from a resolution
binned          ibu (iterative Bayes) · tikhonov (regularised least squares) · forward_fold (parametric flux)
unbinned        omnifold (weights for all truth events) · FlowUnfolder (event by event) · bootstrap_omnifold, bootstrap_flow
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from sbi_phys.unfold.folding import ForwardFold, forward_fold
from sbi_phys.unfold.ibu import IBU, ibu
from sbi_phys.unfold.response import Response
from sbi_phys.unfold.stopping import Stopping, StoppingRule
from sbi_phys.unfold.tikhonov import Tikhonov, TikhonovScan, tikhonov

if TYPE_CHECKING:
    from sbi_phys.unfold.flow import FlowUnfolder as FlowUnfolder
    from sbi_phys.unfold.flow_bootstrap import bootstrap_flow as bootstrap_flow
    from sbi_phys.unfold.omnifold import OmniFold as OmniFold
    from sbi_phys.unfold.omnifold import omnifold as omnifold
    from sbi_phys.unfold.omnifold_bootstrap import bootstrap_omnifold as bootstrap_omnifold
    from sbi_phys.unfold.omnifold_bootstrap import write_weights as write_weights

# these need torch, which the binned methods do without: they load when they are first used
_LEARNED = {
    "FlowUnfolder": "flow",
    "OmniFold": "omnifold",
    "bootstrap_flow": "flow_bootstrap",
    "bootstrap_omnifold": "omnifold_bootstrap",
    "omnifold": "omnifold",
    "write_weights": "omnifold_bootstrap",
}

__all__ = [
    "IBU", "FlowUnfolder", "ForwardFold", "OmniFold", "Response", "Stopping", "StoppingRule", "Tikhonov", "TikhonovScan", "bootstrap_flow",
    "bootstrap_omnifold", "forward_fold", "ibu", "omnifold", "tikhonov", "write_weights",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LEARNED:
        raise AttributeError(f"module 'sbi_phys.unfold' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"sbi_phys.unfold.{_LEARNED[name]}"), name)
    globals()[name] = value
    return value


class _Face(types.ModuleType):
    """The package as a module whose `omnifold` is the function: python binds each submodule to its name when it loads."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name == "omnifold" and isinstance(value, types.ModuleType)
        super().__setattr__(name, value.omnifold if is_module else value)


sys.modules[__name__].__class__ = _Face
