"""Training data larger than memory: rows -> cache -> plan -> buffer -> stream, the order to read them in."""

from sbi_phys.stream.stream import Stream

__all__ = ["Stream"]
