"""Estimators: what is learned from simulations. `load` reads any of them back."""

from sbi_phys.estimators.nle import NLE
from sbi_phys.estimators.npe import NPE, load
from sbi_phys.estimators.nre import NRE

__all__ = ["NLE", "NPE", "NRE", "load"]
