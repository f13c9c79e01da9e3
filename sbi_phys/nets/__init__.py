"""Networks: conditional flows, classifiers, and embeddings of vectors and of sets of events (`embedding_*`)."""

from sbi_phys.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__, __file__)
