"""Samplers of a log density: importance sampling, Markov chains, Hamiltonian chains, grids. They take arrays and callables."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
