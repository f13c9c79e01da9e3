"""Priors of independent parameters: uniform, uniform in the logarithm, normal."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from sbi_phys.core.checks import as_array
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array, ArrayLike, Mask
from sbi_phys.priors.base import Prior, standard_normal_log_prob
from sbi_phys.priors.parameters import Parameter

__all__ = ["BoxPrior", "LogUniformPrior", "NormalPrior"]


class BoxPrior(Prior):
    """Uniform on a box: p(theta) = prod_k 1 / (high_k - low_k);   u = Phi^-1((theta - low) / (high - low)).

    Args: parameters, with finite ranges.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> prior = sp.BoxPrior([sp.Parameter("gamma", 1.0, 3.0)])
    >>> prior.contains([[2.0], [4.0]]), prior.log_prob([[2.0]]).round(4)
    (array([ True, False]), array([-0.6931]))
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(parameters)
        self._low = np.array([p.low for p in self.parameters])
        self._high = np.array([p.high for p in self.parameters])
        for p in self.parameters:
            if not (math.isfinite(p.low) and math.isfinite(p.high)):
                raise SettingError(f"{type(self).__name__} parameter {p.name} has range [{p.low}, {p.high}]; expected finite bounds")

    def _contains(self, theta: Array) -> Mask:
        return np.all((theta >= self._low) & (theta <= self._high), axis=1)

    def _log_prob(self, theta: Array) -> Array:
        return np.full(theta.shape[0], -np.log(self._high - self._low).sum())

    def _to_unbounded(self, theta: Array) -> Array:
        return ndtri((theta - self._low) / (self._high - self._low))

    def _from_unbounded(self, u: Array) -> Array:
        return np.clip(self._low + (self._high - self._low) * ndtr(u), self._low, self._high)


class LogUniformPrior(BoxPrior):
    """Uniform in ln theta on [low, high], low > 0:   p(theta) = prod_k 1 / (theta_k ln(high_k / low_k)).

    Args: parameters, with finite ranges above 0.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> prior = sp.LogUniformPrior([sp.Parameter("energy", 1.0, 100.0, unit="EeV")])
    >>> prior.from_unbounded([[0.0]]).round(6)  # the median
    array([[10.]])
    """

    def __init__(self, parameters: Sequence[Parameter]) -> None:
        super().__init__(parameters)
        for p in self.parameters:
            if p.low <= 0:
                raise SettingError(f"LogUniformPrior parameter {p.name} has low={p.low}; expected low > 0")
        self._width = np.log(self._high / self._low)

    def _log_prob(self, theta: Array) -> Array:
        return -np.log(theta).sum(axis=1) - np.log(self._width).sum()

    def _to_unbounded(self, theta: Array) -> Array:
        return ndtri(np.log(theta / self._low) / self._width)

    def _from_unbounded(self, u: Array) -> Array:
        return np.clip(self._low * np.exp(self._width * ndtr(u)), self._low, self._high)


class NormalPrior(Prior):
    """Independent normals N(mean_k, sd_k^2);   u = (theta - mean) / sd. The parameters must be unbounded.

    Args: mean, sd: numbers or (dim,), in the parameters' units; default 0 and 1.   Raises: SettingError, ShapeError.

    >>> import sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("lg_flux")], mean=-15.0, sd=0.5)
    >>> prior.to_unbounded([[-14.0]])
    array([[2.]])
    """

    def __init__(self, parameters: Sequence[Parameter], mean: ArrayLike = 0.0, sd: ArrayLike = 1.0) -> None:
        super().__init__(parameters)
        self.mean = as_array("mean", np.broadcast_to(mean, (self.dim,)) if np.ndim(mean) == 0 else mean, (self.dim,))
        self.sd = as_array("sd", np.broadcast_to(sd, (self.dim,)) if np.ndim(sd) == 0 else sd, (self.dim,))
        if (self.sd <= 0).any():
            raise SettingError(f"NormalPrior has sd={self.sd.tolist()}; expected sd > 0")
        for p in self.parameters:
            if math.isfinite(p.low) or math.isfinite(p.high):
                raise SettingError(
                    f"NormalPrior parameter {p.name} has bounds [{p.low}, {p.high}]; expected none (use BoxPrior for a bounded range)"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain description, with mean and sd."""
        return {**super().to_dict(), "mean": self.mean.tolist(), "sd": self.sd.tolist()}

    def _contains(self, theta: Array) -> Mask:
        return np.ones(theta.shape[0], dtype=bool)

    def _log_prob(self, theta: Array) -> Array:
        return standard_normal_log_prob((theta - self.mean) / self.sd) - np.log(self.sd).sum()

    def _to_unbounded(self, theta: Array) -> Array:
        return (theta - self.mean) / self.sd

    def _from_unbounded(self, u: Array) -> Array:
        return self.mean + self.sd * u
