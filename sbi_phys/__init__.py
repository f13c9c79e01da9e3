"""Simulation-based inference for astroparticle physics.

    import sbi_phys as sp

The public names load when they are first used: `import sbi_phys` is quick, and the worker processes of a simulation start without torch.
"""

from sbi_phys.core.lazy import public_names
from sbi_phys.core.version import __version__

__getattr__, __dir__, _names = public_names(__name__, __file__)
__all__ = ["__version__", *_names]
