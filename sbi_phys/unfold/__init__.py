"""Unfolding: from what was measured back to what was true, with full covariance and the prior's share of it.

response        Response: matrix with efficiency, fakes, background and its own noise, from pairs or from a resolution
binned          ibu (iterative Bayes) · tikhonov (regularised least squares) · forward_fold (parametric flux)
                bayesian_unfold (posterior over spectra); all four take and give histograms of hist and boost-histogram
unbinned        omnifold (weights for all truth events) · FlowUnfolder (event by event) · bootstrap_omnifold, bootstrap_flow
                ForwardUnfolder (p(reco | truth) learned, then the truth fitted: no simulated spectrum is remembered)
proof           validate (closure, stress, toys, bottom line, prior) · event_pit
data            read_pairs, response_from_store (simulation stores)
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
    from sbi_phys.unfold.bayes import BayesianUnfold as BayesianUnfold
    from sbi_phys.unfold.bayes import bayesian_unfold as bayesian_unfold
    from sbi_phys.unfold.flow import FlowUnfolder as FlowUnfolder
    from sbi_phys.unfold.flow_bootstrap import bootstrap_flow as bootstrap_flow
    from sbi_phys.unfold.forward import ForwardUnfolder as ForwardUnfolder
    from sbi_phys.unfold.omnifold import OmniFold as OmniFold
    from sbi_phys.unfold.omnifold import omnifold as omnifold
    from sbi_phys.unfold.omnifold_bootstrap import bootstrap_omnifold as bootstrap_omnifold
    from sbi_phys.unfold.omnifold_bootstrap import write_weights as write_weights
    from sbi_phys.unfold.pairs import read_pairs as read_pairs
    from sbi_phys.unfold.pairs import response_from_store as response_from_store
    from sbi_phys.unfold.spectrum_model import SpectrumModel as SpectrumModel
    from sbi_phys.unfold.validate import validate as validate
    from sbi_phys.unfold.validate_pit import event_pit as event_pit
    from sbi_phys.unfold.validate_result import Validation as Validation
    from sbi_phys.unfold.validate_rows import Criteria as Criteria

# these need torch, scikit-learn or stores, which the simple binned methods do without: they load when they are first used
_LATER = {
    "BayesianUnfold": "bayes",
    "Criteria": "validate_rows",
    "FlowUnfolder": "flow",
    "ForwardUnfolder": "forward",
    "OmniFold": "omnifold",
    "SpectrumModel": "spectrum_model",
    "Validation": "validate_result",
    "bayesian_unfold": "bayes",
    "bootstrap_flow": "flow_bootstrap",
    "bootstrap_omnifold": "omnifold_bootstrap",
    "event_pit": "validate_pit",
    "omnifold": "omnifold",
    "read_pairs": "pairs",
    "response_from_store": "pairs",
    "validate": "validate",
    "write_weights": "omnifold_bootstrap",
}

__all__ = [
    "IBU", "BayesianUnfold", "Criteria", "FlowUnfolder", "ForwardFold", "ForwardUnfolder", "OmniFold", "Response", "SpectrumModel",
    "Stopping", "StoppingRule", "Tikhonov", "TikhonovScan", "Validation", "bayesian_unfold", "bootstrap_flow", "bootstrap_omnifold",
    "event_pit", "forward_fold", "ibu", "omnifold", "read_pairs", "response_from_store", "tikhonov", "validate", "write_weights",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'sbi_phys.unfold' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"sbi_phys.unfold.{_LATER[name]}"), name)
    globals()[name] = value
    return value


class _Face(types.ModuleType):
    """The package as a module whose `omnifold` and `validate` are the functions: python binds each submodule to its name when it loads."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_module = name in ("omnifold", "validate") and isinstance(value, types.ModuleType)
        super().__setattr__(name, getattr(value, name) if is_module else value)


sys.modules[__name__].__class__ = _Face
