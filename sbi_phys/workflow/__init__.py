"""Runs in folders: settings, stages, report pages and the command line `sbi-phys`."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
