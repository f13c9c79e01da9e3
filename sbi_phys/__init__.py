"""Simulation-based inference for astroparticle physics, with proof.

    import sbi_phys as sp

The names below are the public face. They load when they are first used, so that `import sbi_phys` is quick and the
worker processes of a simulation start without torch.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sbi_phys import calibration as calibration
    from sbi_phys import confidence as confidence
    from sbi_phys import samplers as samplers
    from sbi_phys import unfold as unfold
    from sbi_phys.calibrate import calibrate as calibrate
    from sbi_phys.comparison import model_comparison as model_comparison
    from sbi_phys.errors import SbiPhysError as SbiPhysError
    from sbi_phys.estimators.event_sets import ExtendedLikelihood as ExtendedLikelihood
    from sbi_phys.estimators.nle import NLE as NLE
    from sbi_phys.estimators.npe import NPE as NPE
    from sbi_phys.estimators.npe import load as load
    from sbi_phys.estimators.nre import NRE as NRE
    from sbi_phys.estimators.sequential import truncated_rounds as truncated_rounds
    from sbi_phys.nets.embed import EmbeddingConfig as EmbeddingConfig
    from sbi_phys.nets.flow import FlowConfig as FlowConfig
    from sbi_phys.priors import BoxPrior as BoxPrior
    from sbi_phys.priors import DirichletPrior as DirichletPrior
    from sbi_phys.priors import LogUniformPrior as LogUniformPrior
    from sbi_phys.priors import NormalPrior as NormalPrior
    from sbi_phys.priors import Observable as Observable
    from sbi_phys.priors import Parameter as Parameter
    from sbi_phys.priors import ProductPrior as ProductPrior
    from sbi_phys.progress import RichProgress as RichProgress
    from sbi_phys.protocol import Simulator as Simulator
    from sbi_phys.simulate import simulate as simulate
    from sbi_phys.store import Store as Store
    from sbi_phys.stream import Stream as Stream
    from sbi_phys.train import TrainConfig as TrainConfig

# name -> the module it lives in; an empty module means that the name is a submodule itself
_PUBLIC = {
    "BoxPrior": "priors",
    "DirichletPrior": "priors",
    "EmbeddingConfig": "nets.embed",
    "ExtendedLikelihood": "estimators.event_sets",
    "FlowConfig": "nets.flow",
    "LogUniformPrior": "priors",
    "NLE": "estimators.nle",
    "NPE": "estimators.npe",
    "NRE": "estimators.nre",
    "NormalPrior": "priors",
    "Observable": "priors",
    "Parameter": "priors",
    "ProductPrior": "priors",
    "RichProgress": "progress",
    "SbiPhysError": "errors",
    "Simulator": "protocol",
    "Store": "store",
    "Stream": "stream",
    "TrainConfig": "train",
    "calibrate": "calibrate",
    "calibration": "",
    "confidence": "",
    "load": "estimators.npe",
    "model_comparison": "comparison",
    "samplers": "",
    "simulate": "simulate",
    "truncated_rounds": "estimators.sequential",
    "unfold": "",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'sbi_phys' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = _PUBLIC[name]
    value = getattr(importlib.import_module(f"sbi_phys.{module}"), name) if module else importlib.import_module(f"sbi_phys.{name}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _Face(types.ModuleType):
    """The package as a module whose `simulate` and `calibrate` are functions: python binds each submodule to its name when it loads."""

    def __setattr__(self, name: str, value: Any) -> None:
        is_function = name in ("simulate", "calibrate") and isinstance(value, types.ModuleType)
        super().__setattr__(name, getattr(value, name) if is_function else value)


sys.modules[__name__].__class__ = _Face
