"""Training: scaling, batches in memory, from disk or simulated, and the one loop that all networks share."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
