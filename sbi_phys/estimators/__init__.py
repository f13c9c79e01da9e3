"""Estimators: what is learned from simulations. `load` reads any of them back."""

from sbi_phys.estimators.npe import NPE, load

__all__ = ["NPE", "load"]
