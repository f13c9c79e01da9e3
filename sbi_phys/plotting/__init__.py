"""Figures: functions that take results or arrays and return matplotlib Axes or Figures, all in one style."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
