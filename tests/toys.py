"""What several test files share: simulators with known answers (importable by worker processes), training sets, posteriors, power."""

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sbi_phys.core.rng import rng_for
from sbi_phys.priors import NormalPrior, Observable, Parameter

Array = NDArray[np.float64]


def training_set(simulator: Any, n: int, seed: int = 0) -> tuple[Array, Array]:
    """theta (n, d) from the simulator's prior, and x (n, k)."""
    theta = simulator.prior.sample(n, rng_for(seed, "theta"))
    return theta, simulator.simulate(theta, rng_for(seed, "x"))


def gaussian_posteriors(
    rng: np.random.Generator, *, n: int = 500, n_draws: int = 99, d: int = 1, width: float = 1.0, shift: float = 0.0, spread: float = 1.0
) -> tuple[Array, Array]:
    """Truths (n, d) and draws (n, n_draws, d) of exact posteriors N(m, 1), m ~ N(0, spread^2), or of wrong ones N(m + shift, width^2)."""
    mean = spread * rng.standard_normal((n, d))
    theta = mean + rng.standard_normal((n, d))
    return theta, mean[:, None] + shift + width * rng.standard_normal((n, n_draws, d))


def rejection_rate(pvalue: Callable[[np.random.Generator, int], float], repetitions: int, seed: int, alpha: float = 0.05) -> float:
    """Share of repetitions i with pvalue(rng, i) < alpha, one generator for all: the size of a test, or its power."""
    rng = np.random.default_rng(seed)
    return float(np.mean([pvalue(rng, i) < alpha for i in range(repetitions)]))


class LinearGaussian:
    r"""x = A theta + noise * N(0, I_k), theta ~ N(0, prior_sd^2 I_d): every posterior is Gaussian and known.

    A (k, d) has ones on its diagonal, `mixing` beside it (on one side, so it is not symmetric) and, for k > d, repeats.
    Posterior: covariance S = (I / prior_sd^2 + A^T A / noise^2)^-1, mean S A^T x / noise^2.
    """

    def __init__(self, dim: int = 2, n_columns: int | None = None, noise: float = 0.5, mixing: float = 0.5, prior_sd: float = 1.0) -> None:
        k = dim if n_columns is None else n_columns
        self.settings: dict[str, Any] = {"dim": dim, "n_columns": k, "noise": noise, "mixing": mixing, "prior_sd": prior_sd}
        self.prior = NormalPrior([Parameter(f"t{i}", unit="EV", latex=rf"\theta_{i}") for i in range(dim)], sd=prior_sd)
        self.parameters = self.prior.parameters
        self.observables: tuple[Observable, ...] = (Observable("x", k, unit="EeV"),)
        self.noise = noise
        row, column = np.arange(k)[:, None] % dim, np.arange(dim)[None, :]
        self.matrix = (row == column) * 1.0 + (row == column + 1) * mixing

    @property
    def dim(self) -> int:
        return self.prior.dim

    def expected(self, theta: ArrayLike) -> Array:
        """Mean of x (n, k)."""
        return np.asarray(theta) @ self.matrix.T

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        mean = self.expected(theta)
        return mean + self.noise * rng.standard_normal(mean.shape)

    def log_likelihood(self, x: ArrayLike, theta: ArrayLike) -> Array:
        """log N(x; A theta, noise^2 I) -> (n,); one x (k,) serves all theta."""
        z = (np.asarray(x) - self.expected(theta)) / self.noise
        return -0.5 * np.einsum("nk,nk->n", z, z) - z.shape[1] * (math.log(self.noise) + 0.5 * math.log(2 * math.pi))

    def posterior(self, x: ArrayLike) -> tuple[Array, Array]:
        """Exact posterior mean, (d,) for x (k,) or (n, d) for x (n, k), and covariance (d, d), the same for every x."""
        precision = np.diag(self.prior.sd**-2.0) + self.matrix.T @ self.matrix / self.noise**2
        covariance = np.linalg.inv(precision)
        return np.asarray(x) @ self.matrix @ covariance / self.noise**2, covariance

    def exact_log_posterior(self, theta: ArrayLike, x: ArrayLike) -> Array:
        """log p(theta | x), normalised, for theta (n, d) and x (k,) or (n, k) -> (n,)."""
        mean, covariance = self.posterior(x)
        delta = np.asarray(theta) - mean
        _, log_det = np.linalg.slogdet(2 * math.pi * covariance)
        return -0.5 * np.einsum("ni,ij,nj->n", delta, np.linalg.inv(covariance), delta) - 0.5 * log_det

    def posterior_sample(self, x: ArrayLike, n: int, rng: np.random.Generator) -> Array:
        """Draw theta from the exact posterior: (n, d) for x (k,), (b, n, d) for x (b, k)."""
        mean, covariance = self.posterior(x)
        noise = rng.standard_normal((*mean.shape[:-1], n, self.dim)) @ np.linalg.cholesky(covariance).T
        return mean[..., None, :] + noise


class Gaps:
    r"""An image of pixels x_j = mu + noise N(0, 1), each missing with probability `gaps` whatever mu; mu ~ N(0, 1).

    Posterior: with m pixels present the precision is 1 + m / noise^2 and the mean sum(x) / noise^2 / precision.
    form: of what simulate returns, 'rows' (n, k), 'shape' (n, *shape) or 'blocks'. single: the image is the only observable; else the
    number of present pixels stands beside it.
    """

    def __init__(
        self, shape: tuple[int, ...] = (2, 3), noise: float = 1.0, gaps: float = 0.5, form: str = "rows", single: bool = True
    ) -> None:
        self.settings: dict[str, Any] = {"shape": list(shape), "noise": noise, "gaps": gaps, "form": form, "single": single}
        self.prior = NormalPrior([Parameter("mu")])
        self.parameters = self.prior.parameters
        image = Observable("image", shape=tuple(shape), missing=True)
        self.observables: tuple[Observable, ...] = (image,) if single else (image, Observable("present", 1, kind="counts"))
        self.noise, self.gaps, self.form = noise, gaps, form

    def simulate(self, theta: Array, rng: np.random.Generator) -> Any:
        x = theta + self.noise * rng.standard_normal((len(theta), self.observables[0].size))
        empty = rng.random(x.shape) < self.gaps
        empty[:, 0] &= ~empty.all(axis=1)  # at least one pixel
        x[empty] = np.nan
        present = (~empty).sum(axis=1, keepdims=True).astype(np.float64)
        image = x.reshape(-1, *self.observables[0].shape)
        if self.form == "blocks":
            return {"image": image} if len(self.observables) == 1 else {"image": image, "present": present}
        if self.form == "shape":
            return image
        return x if len(self.observables) == 1 else np.hstack([x, present])

    def posterior(self, x: ArrayLike) -> tuple[Array, Array]:
        """Exact mean and sd (n,) of mu for rows x (n, k) of a single image."""
        rows = np.asarray(x, dtype=np.float64)
        precision = 1 + (~np.isnan(rows)).sum(axis=1) / self.noise**2
        return np.nansum(rows, axis=1) / self.noise**2 / precision, precision**-0.5


class Flaky(LinearGaussian):
    """LinearGaussian whose batch raises if any t0 > raise_above, and whose rows are NaN where t0 < nan_below."""

    def __init__(self, raise_above: float = math.pi, nan_below: float = -math.pi) -> None:
        super().__init__(dim=2)
        self.settings = {"raise_above": raise_above, "nan_below": nan_below}

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        bad = np.flatnonzero(theta[:, 0] > self.settings["raise_above"])
        if bad.size:
            raise ArithmeticError(f"shower did not converge at t0 = {theta[bad[0], 0]:.6f} {object()!r}")
        x = super().simulate(theta, rng)
        x[theta[:, 0] < self.settings["nan_below"], 1] = np.nan
        return x


class Slow(LinearGaussian):
    """LinearGaussian that takes `seconds` a batch."""

    def __init__(self, seconds: float = 0.1) -> None:
        super().__init__(dim=2)
        self.settings = {"seconds": seconds}

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        time.sleep(self.settings["seconds"])
        return super().simulate(theta, rng)


class Counts(LinearGaussian):
    """Poisson counts of mean `scale` in three bins, the last of which is an overflow, and a real number beside them."""

    def __init__(self, scale: float = 100.0) -> None:
        super().__init__(dim=2)
        self.settings = {"scale": scale}
        self.observables = (
            Observable("spectrum", 3, kind="counts", edges=(18.0, 18.5, 19.0, math.inf), edges_unit="lg eV"),
            Observable("xmax", 1, unit="g/cm2", latex=r"X_\mathrm{max}"),
        )

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        return np.column_stack([rng.poisson(self.settings["scale"], (theta.shape[0], 3)), theta[:, 0]])


class Misbehaving(LinearGaussian):
    """LinearGaussian that breaks the protocol, or its process, in the way that `how` says."""

    def __init__(self, how: str = "columns", folder: str = "") -> None:
        super().__init__(dim=2)
        self.settings = {"how": how, "folder": folder}

    def simulate(self, theta: Array, rng: np.random.Generator) -> Any:
        x = super().simulate(theta, rng)
        match self.settings["how"]:
            case "columns":
                return x[:, :1]
            case "rows":
                return x[:-1]
            case "complex":
                return x.astype(complex)
            case "text":
                return x.astype(str)
            case "list":
                return x.tolist()
            case "tensor":
                return _Tensor()
            case "changes":  # one column more in every shard whose first parameter is positive
                return np.column_stack([x, x[:, :1]]) if theta[0, 0] > 0 else x
            case "global":  # numpy's global generator: not reproducible
                return x + np.random.standard_normal(x.shape)  # noqa: NPY002
            case "in place":
                theta += 1
                return x
            case "raises":
                raise ValueError("no tables")
            case "exits":
                sys.exit("bye")
            case "memory":
                raise MemoryError
            case "dies":
                os._exit(13)
            case "dies once":  # the first worker that gets here is killed
                mark = Path(self.settings["folder"]) / "died"
                if not mark.exists():
                    mark.touch()
                    os.kill(os.getpid(), 9)
                return x
        raise AssertionError(self.settings["how"])


class Poison(LinearGaussian):
    """LinearGaussian, one row after the other, that breaks at rows with t0 > above in the way that `how` says."""

    def __init__(self, how: str = "dies", above: float = 1.5) -> None:
        super().__init__(dim=2)
        self.settings = {"how": how, "above": above}

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        for row in theta[theta[:, 0] > self.settings["above"]]:
            match self.settings["how"]:
                case "dies":
                    os.kill(os.getpid(), 9)
                case "exits":
                    os._exit(13)
                case "hangs":
                    time.sleep(3600)
                case "raises":
                    raise ValueError(f"no shower at {row[0]:.3f}")
                case "prints":
                    print("progress: 12 %")
        return super().simulate(theta, rng)


def one_event(theta: dict[str, float], rng: np.random.Generator) -> list[float]:
    """Three numbers of one event; none above t0 = 1.5."""
    if theta["t0"] > 1.5:
        raise ArithmeticError(f"no shower at {theta['t0']:.3f}")
    return [theta["t0"], theta["t1"], float(rng.standard_normal())]


def event_that_exits(theta: dict[str, float], rng: np.random.Generator) -> list[float]:
    if theta["t0"] > 1.5:
        os._exit(13)
    return [*rng.standard_normal(3)]


def event_that_segfaults(theta: dict[str, float], rng: np.random.Generator) -> list[float]:
    if theta["t0"] > 1.5:
        os.kill(os.getpid(), 11)
    return [*rng.standard_normal(3)]


def event_that_hangs(theta: dict[str, float], rng: np.random.Generator) -> list[float]:
    if theta["t0"] > 1.5:
        time.sleep(3600)
    return [*rng.standard_normal(3)]


def event_that_raises(theta: dict[str, float], rng: np.random.Generator) -> list[float]:
    if theta["t0"] > 1.5:
        raise ValueError("no shower")
    return [*rng.standard_normal(3)]


class Events(LinearGaussian):
    """LinearGaussian one event at a time: below t0 = -1.5 it is killed once, from 1.5 on its shape is wrong, above 2.5 it has no memory."""

    def __init__(self, mark: str = "") -> None:
        super().__init__(dim=2)
        self.settings = {"mark": mark}

    def one_event(self, theta: Array, rng: np.random.Generator) -> Array:
        mark = Path(self.settings["mark"])
        if theta[0] < -1.5 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), 9)
        if theta[0] > 2.5:
            raise MemoryError
        x = super().simulate(theta[None], rng)[0]
        return x[:1] if theta[0] >= 1.5 else x

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        return np.stack([self.one_event(row, own) for row, own in zip(theta, rng.spawn(len(theta)), strict=True)])


class SlowStart(Poison):
    """Poison whose rebuilding takes half a second."""

    def __init__(self, how: str = "exits", above: float = 1.5) -> None:
        super().__init__(how, above)

    def __setstate__(self, state: dict[str, Any]) -> None:
        time.sleep(0.5)
        self.__dict__.update(state)


class _Tensor:
    """Looks like a torch tensor to code that must not import torch."""

    def detach(self) -> "_Tensor":
        return self
