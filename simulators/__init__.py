"""Simulators of astroparticle physics: each has a prior, observables, `simulate` and, where tractable, an exact likelihood.

Names are resolved when they are used (PEP 562), so that importing the package is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simulators.arrival_directions import ArrivalDirections as ArrivalDirections
    from simulators.auger import AugerData as AugerData
    from simulators.auger import load_auger as load_auger
    from simulators.detector import BinnedDetector as BinnedDetector
    from simulators.detector import DetectorResponse as DetectorResponse
    from simulators.errors import CountsError as CountsError
    from simulators.errors import SimulatorError as SimulatorError
    from simulators.errors import SimulatorSettingError as SimulatorSettingError
    from simulators.errors import TableError as TableError
    from simulators.event_spectrum import EventSpectrum as EventSpectrum
    from simulators.line import LineSearch as LineSearch
    from simulators.on_off import OnOff as OnOff
    from simulators.source_spectrum import SourceSpectrum as SourceSpectrum

_HOME = {
    "ArrivalDirections": "arrival_directions",
    "AugerData": "auger",
    "BinnedDetector": "detector",
    "CountsError": "errors",
    "DetectorResponse": "detector",
    "EventSpectrum": "event_spectrum",
    "LineSearch": "line",
    "OnOff": "on_off",
    "SimulatorError": "errors",
    "SimulatorSettingError": "errors",
    "SourceSpectrum": "source_spectrum",
    "TableError": "errors",
    "load_auger": "auger",
}
__all__ = [
    "ArrivalDirections",
    "AugerData",
    "BinnedDetector",
    "CountsError",
    "DetectorResponse",
    "EventSpectrum",
    "LineSearch",
    "OnOff",
    "SimulatorError",
    "SimulatorSettingError",
    "SourceSpectrum",
    "TableError",
    "load_auger",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'simulators' has no attribute {name!r}; expected one of {', '.join(sorted(_HOME))}")
    from importlib import import_module

    return getattr(import_module(f"simulators.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(_HOME)
