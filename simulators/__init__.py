"""Simulators of astroparticle physics: each has a prior, observables, `simulate` and, where tractable, an exact likelihood.

The shortest complete example is `muon_decay.py`. The public names stand in the stub `__init__.pyi` and load when they are first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
