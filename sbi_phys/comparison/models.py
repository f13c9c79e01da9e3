"""What the comparisons share: names of models and their probabilities before the data."""

from collections.abc import Mapping, Sequence

import numpy as np

from sbi_phys.core.checks import require_choice, require_known, require_number
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array

__all__ = ["prior_probabilities", "require_names"]


def require_names(name: str, names: Sequence[str]) -> int:
    """Place of a model among the names.   Raises: SettingError with the nearest name."""
    return list(names).index(require_choice("model", name, names))


def prior_probabilities(names: Sequence[str], prior: Mapping[str, float] | None) -> Array:
    """Probabilities (K,) that sum to 1 from positive numbers per name; None: equal.   Raises: SettingError."""
    if prior is None:
        return np.full(len(names), 1 / len(names))
    require_known("prior", prior, names)
    missing = [n for n in names if n not in prior]
    if missing:
        raise SettingError(f"prior has no number for {', '.join(missing)}; expected one for each of {', '.join(names)}")
    values = np.array([require_number(f"prior of {n}", prior[n], low=0, open_low=True) for n in names])
    return values / values.sum()
