"""Exception classes, all under `SbiPhysError`: every message names the thing, what was got and what was expected."""

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
    """Base class: `except SbiPhysError` catches everything this package raises on purpose."""


class ShapeError(SbiPhysError, ValueError):
    """An array has the wrong number of axes, rows or columns."""


class NonFiniteError(SbiPhysError, ValueError):
    """An array holds NaN or Inf where only finite values make sense."""


class SupportError(SbiPhysError, ValueError):
    """A parameter lies outside the support of its prior."""


class DataError(SbiPhysError, ValueError):
    """Data are empty, too few, of the wrong dtype, or an input table is malformed."""


class SettingError(SbiPhysError, ValueError):
    """A setting has an unknown name or a value outside its range."""


class StoreError(SbiPhysError):
    """A simulation store is missing, truncated, foreign, of a newer schema, or made with other settings."""


class SimulatorMismatchError(SbiPhysError):
    """A simulator is not the one that a store, model or run was made with, or it breaks the protocol."""


class ModelFileError(SbiPhysError):
    """A model or checkpoint file is missing, truncated, or not one of ours."""


class RunFolderError(SbiPhysError):
    """A run folder was made with other settings, or holds files that are not a run's."""


class WriteError(SbiPhysError, OSError):
    """A file cannot be written: no room on the disk, no permission, or no such folder."""


class TrainingError(SbiPhysError):
    """Training diverged or cannot start."""


class ConvergenceError(SbiPhysError):
    """A sampler did not converge to the stated criterion."""
