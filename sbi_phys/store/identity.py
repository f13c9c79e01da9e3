"""Identity of a simulator in stores and models: the path of its class and its settings, as plain JSON."""

import json
from typing import Any

from sbi_phys.core.errors import SimulatorMismatchError

__all__ = ["class_path", "simulator_identity"]


def class_path(simulator: object) -> str:
    """Return 'package.module:Class'."""
    kind = type(simulator)
    return f"{kind.__module__}:{kind.__qualname__}"


def simulator_identity(simulator: object) -> dict[str, Any]:
    """Return {"class": "package.module:Class", "settings": {...}} as plain JSON values.

    Raises: SimulatorMismatchError if `settings` is missing or cannot be written as JSON.
    """
    settings = getattr(simulator, "settings", None)
    if not isinstance(settings, dict):
        raise SimulatorMismatchError(f"{class_path(simulator)}.settings is {settings!r}; expected a dict of keyword arguments")
    try:
        plain = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as err:
        raise SimulatorMismatchError(f"{class_path(simulator)}.settings = {settings!r} cannot be written as JSON: {err}") from err
    return {"class": class_path(simulator), "settings": plain}
