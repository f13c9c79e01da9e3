"""Simulators for the benchmarks of campaigns, in a module that workers can import."""

import hashlib
import math
import os
import signal
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.priors import BoxPrior, Observable, Parameter

Array = NDArray[np.float64]
PRIOR = BoxPrior([Parameter("u", 0, 1), Parameter("v", -1, 1)])
COLUMNS = 20
CRASHES, NANS, HANGS = 0.01, 0.02, 0.021  # where u lies below: 1 %, 1 % and 0.1 % of the rows


class Rows:
    """x = theta + noise; a batch sleeps for `seconds`, so that its time does not depend on the load of the machine."""

    def __init__(self, seconds: float = 0.0, columns: int = COLUMNS) -> None:
        self.settings: dict[str, Any] = {"seconds": seconds, "columns": columns}
        self.prior, self.parameters = PRIOR, PRIOR.parameters
        self.observables = (Observable("x", columns),)

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Simulate rows (n, columns)."""
        time.sleep(self.settings["seconds"])
        return theta[:, :1] + rng.standard_normal((len(theta), self.settings["columns"]))


class Work(Rows):
    """Rows that cost `milliseconds` of processor time each, on a current machine; with `bad` some rows crash, hang or are NaN."""

    def __init__(self, milliseconds: float = 5.0, bad: bool = False) -> None:
        super().__init__()
        self.settings = {"milliseconds": milliseconds, "bad": bad}

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Simulate all rows in one call, from one generator."""
        return np.stack([event(row, rng, **self.settings) for row in theta])


class Events(Work):
    """The same rows, each from a generator of its own."""

    def one_event(self, theta: Array, rng: np.random.Generator) -> Array:
        """Simulate one row (k,)."""
        return event(theta, rng, **self.settings)

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Simulate row by row."""
        return np.stack([self.one_event(row, own) for row, own in zip(theta, rng.spawn(len(theta)), strict=True)])


def event(theta: Array, rng: np.random.Generator, milliseconds: float, bad: bool) -> Array:
    """One row of processor time and noise, or a failure, depending on theta."""
    burn(milliseconds)
    u = theta[0]
    if bad and u < CRASHES:
        os._exit(13) if u < CRASHES / 2 else os.kill(os.getpid(), signal.SIGSEGV)
    if bad and NANS <= u < HANGS:
        time.sleep(3600)
    x = u + rng.standard_normal(COLUMNS)
    if bad and CRASHES <= u < NANS:
        x[3] = math.nan
    return x


def burn(milliseconds: float) -> None:
    """A fixed amount of work, about `milliseconds` long."""
    data = b"0" * 65536
    for _ in range(round(milliseconds * 24)):
        hashlib.sha1(data, usedforsecurity=False).digest()
