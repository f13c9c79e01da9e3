"""The version of this package, in a file that imports nothing: `import sbi_phys` and the build read it."""

__all__ = ["__version__"]

__version__ = "0.2.0"
