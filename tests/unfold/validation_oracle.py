"""An unfolding that is right, exact inversion with its full covariance, and ways to spoil it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sbi_phys.unfold.ibu import ibu
from sbi_phys.unfold.response import Response

Array = NDArray[np.float64]
Unfold = Callable[[Array, Response], Any]


def response(n: int = 8, stay: float = 0.8, **extra: Any) -> Response:
    """Most events stay, the others go to the neighbours; those at the ends are lost there."""
    leave = (1 - stay) / 2
    return Response(stay * np.eye(n) + leave * (np.eye(n, k=1) + np.eye(n, k=-1)), np.arange(n + 1.0), np.arange(n + 1.0), **extra)


def falling(n: int = 8, first: float = 6000.0) -> Array:
    return first * np.exp(-0.2 * np.arange(n))


def inversion(counts: Array, resp: Response) -> SimpleNamespace:
    """n = A^-1 (N - b), V = A^-1 diag(N) A^-T, A = P / (1 - fakes), and the response's own noise."""
    jacobian = np.linalg.inv(resp.matrix / (1 - resp.fakes)[:, None])
    n = jacobian @ (counts - resp.background)
    covariance = (jacobian * counts) @ jacobian.T
    # dn/dP[j, mu] = -J_{. j} n_mu / (1 - phi_j)
    covariance += resp.propagate(-(jacobian / (1 - resp.fakes))[:, :, None] * n)
    return SimpleNamespace(counts=n, covariance=covariance, truth_edges=resp.truth_edges)


def scaled(factor: float = 1.0, covariance: float = 1.0) -> Unfold:
    def unfold(counts: Array, resp: Response) -> SimpleNamespace:
        found = inversion(counts, resp)
        return SimpleNamespace(counts=factor * found.counts, covariance=covariance * found.covariance)

    return unfold


def diagonal(of: Unfold = inversion) -> Unfold:
    """The right errors without their correlations."""

    def unfold(counts: Array, resp: Response) -> SimpleNamespace:
        found = of(counts, resp)
        return SimpleNamespace(counts=found.counts, covariance=np.diag(np.diag(found.covariance)))

    return unfold


def iterated(k: int, prior: Array | None = None) -> Unfold:
    return lambda counts, resp: ibu(counts, resp, k, prior)


def response_like(resp: Response) -> Response:
    """The same response, taken for exact."""
    return Response(resp.matrix, resp.truth_edges, resp.reco_edges, fakes=resp.fakes, background=resp.background)
