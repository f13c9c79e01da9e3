"""The simulation store: HDF5 files that resume, verify themselves, and can be merged, imported and reweighted."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
