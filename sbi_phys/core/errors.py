"""Exception classes, all derived from `SbiPhysError`. Every message says the name, the value that was got and what was expected."""

__all__ = [
    "ConvergenceError",
    "DataError",
    "ModelFileError",
    "NonFiniteError",
    "RunFolderError",
    "SbiPhysError",
    "SettingError",
    "ShapeError",
    "SimulatorMismatchError",
    "StoreError",
    "SupportError",
    "TrainingError",
    "WriteError",
]


class SbiPhysError(Exception):
    """Base class of all errors that this package raises."""


class ShapeError(SbiPhysError, ValueError):
    """An array has the wrong number of axes, rows or columns."""


class NonFiniteError(SbiPhysError, ValueError):
    """An array holds NaN or Inf where finite values are required."""


class SupportError(SbiPhysError, ValueError):
    """A parameter lies outside the support of its prior."""


class DataError(SbiPhysError, ValueError):
    """Data are empty, too few or of the wrong dtype, or an input table is malformed."""


class SettingError(SbiPhysError, ValueError):
    """A setting has an unknown name or a value outside its range."""


class StoreError(SbiPhysError):
    """A simulation store is missing, damaged, of another schema, or made with other settings."""


class SimulatorMismatchError(SbiPhysError):
    """A simulator differs from that of a store, model or run, or does not follow the protocol."""


class ModelFileError(SbiPhysError):
    """A model or checkpoint file is missing, truncated, or of another format."""


class RunFolderError(SbiPhysError):
    """A run folder was made with other settings, or holds files that do not belong to a run."""


class WriteError(SbiPhysError, OSError):
    """A file cannot be written: no room on the disk, no permission, or no such folder."""


class TrainingError(SbiPhysError):
    """Training diverged or cannot start."""


class ConvergenceError(SbiPhysError):
    """A sampler did not converge to the stated criterion."""
