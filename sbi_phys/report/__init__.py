"""Reports: numbers of a posterior as tables, one HTML page of a run, and files that ArviZ reads."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
