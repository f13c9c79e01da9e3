"""Networks: conditional flows over nflows, classifiers, and embeddings of observations."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
