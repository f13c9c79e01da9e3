"""Files that are whole or absent: written under a temporary name in the same folder, then renamed."""

import os
import uuid
from collections.abc import Callable
from pathlib import Path

__all__ = ["write_aside"]


def write_aside(path: str | os.PathLike[str], write: Callable[[Path], object]) -> Path:
    """Call `write` on a temporary name in the folder of `path`, then rename it: a reader sees the old file or the new one whole."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}.tmp{target.suffix}")
    try:
        write(aside)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target
