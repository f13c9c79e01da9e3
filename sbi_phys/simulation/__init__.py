"""Simulation campaigns: the Simulator protocol, workers, batch systems, and simulators made of functions and commands."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
