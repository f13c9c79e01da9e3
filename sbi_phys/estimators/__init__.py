"""Estimators: what is learned from simulations. `load` reads any of them back."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
