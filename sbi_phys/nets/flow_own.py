"""Flows of the user's own as the density of an estimator: a `Transform` of nflows, a flow of zuko, or any module of these two forms.

    transform      forward(u (n, d), context (n, k)) -> z (n, d), log|dz/du| (n,), with its `inverse`; the base is N(0, I)
    distribution   forward(context (n, k)) -> a distribution of n rows, with log_prob(u (n, d)) -> (n,) and sample((m,)) -> (m, n, d)

The context is the embedding of the observation. A transform is checked once, on a few points: shapes, that the inverse undoes it, and
its log determinant against autograd. Neither nflows nor zuko is imported here. In an autoregressive layer of nflows the first feature
does not see the context: two layers with a `ReversePermutation` between them are the least that is conditional in every column.
"""

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sbi_phys.core.errors import SettingError, ShapeError
from sbi_phys.core.rng import seed_for, torch_rng_for, torch_seeded
from sbi_phys.nets.flow import ConditionalFlow, FlowConfig, base_log_prob
from sbi_phys.nets.own import build_own, require_own

__all__ = ["DistributionFlow", "TransformFlow", "build_flow", "require_flow"]

_JACOBIAN_DIM = 32  # largest dimension in which the log determinant is checked


class TransformFlow(nn.Module):
    """log q(u | h) = log N(T(u; h); 0, I) + log|dT/du| of a module T with forward and inverse.

    Args: transform. dim d. n_features k.   Raises: ShapeError, SettingError.
    """

    def __init__(self, transform: nn.Module, dim: int, n_features: int) -> None:
        super().__init__()
        self.transform, self.dim = transform, dim
        self._check(n_features)

    def contexts(self, features: Tensor) -> list[Tensor]:
        """The features themselves."""
        return [features]

    def encode(self, u: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """u (n, d) -> base z (n, d) and log|dz/du| (n,)."""
        return cast(tuple[Tensor, Tensor], self.transform(u, contexts[0]))

    def decode(self, z: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Base z (n, d) -> u (n, d) and log|du/dz| (n,)."""
        return cast(tuple[Tensor, Tensor], self.transform.inverse(z, contexts[0]))  # type: ignore[operator]

    def log_prob(self, u: Tensor, features: Tensor) -> Tensor:
        """log q(u | h) of u (n, d), h (n, k) -> (n,)."""
        z, log_det = self.encode(u, [features])
        return base_log_prob(z) + log_det

    def _check(self, n_features: int) -> None:
        name, d, mode = type(self.transform).__name__, self.dim, self.transform.training
        generator = torch_rng_for(0, "check of a flow")
        u, h = torch.randn(3, d, generator=generator), torch.randn(3, n_features, generator=generator)
        self.transform.eval()
        given = f"flow {name}, given u of shape (3, {d}) and context of shape (3, {n_features}),"
        try:
            out = self.transform(u, h)
        except Exception as err:
            first = (str(err).splitlines() or [""])[0]
            raise SettingError(f"{given} fails: {type(err).__name__}: {first}; expected z (3, {d}) and log|dz/du| (3,)") from err
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (out if isinstance(out, tuple) else (out,))]
        if shapes != [(3, d), (3,)]:
            raise ShapeError(f"{given} returns {shapes}; expected z of shape (3, {d}) and log|dz/du| of shape (3,)")
        z, log_det = out[0].detach(), out[1].detach()
        if d <= _JACOBIAN_DIM:
            rows = [torch.autograd.functional.jacobian(lambda v, i=i: self.transform(v[None], h[i : i + 1])[0][0], u[i]) for i in range(3)]
            off = float((torch.linalg.slogdet(torch.stack(rows))[1] - log_det).abs().max())
            if not off < 1e-2:
                raise SettingError(f"flow {name}: its log determinant is off by {off:.3g} from autograd's; expected log|dz/du|")
        try:
            back = self.transform.inverse(z, h)[0].detach()  # type: ignore[operator]
        except Exception as err:
            first = (str(err).splitlines() or [""])[0]
            raise SettingError(f"flow {name} has no inverse: {type(err).__name__}: {first}; expected one, draws need it") from err
        if not float((back - u).abs().max()) < 1e-2:
            raise SettingError(f"flow {name}: inverse(forward(u)) is off by {float((back - u).abs().max()):.3g}; expected u")
        self.transform.train(mode)


class DistributionFlow(nn.Module):
    """q(u | h) as the distribution that a module returns for h; densities and draws, but no base coordinates.

    Args: flow. dim d. n_features k.   Raises: ShapeError, SettingError.
    """

    def __init__(self, flow: nn.Module, dim: int, n_features: int) -> None:
        super().__init__()
        self.flow, self.dim = flow, dim
        self._check(n_features)

    def contexts(self, features: Tensor) -> list[Tensor]:
        """The features themselves."""
        return [features]

    def log_prob(self, u: Tensor, features: Tensor) -> Tensor:
        """log q(u | h) of u (n, d), h (n, k) -> (n,)."""
        return cast(Tensor, self.flow(features).log_prob(u))

    def draw(self, n: int, features: Tensor, seed: int) -> Tensor:
        """Draw u (b, n, d) for features (b, k); torch's global generator is left as it was."""
        with torch_seeded(seed, [features.device] if features.device.type == "cuda" else []):
            return cast(Tensor, self.flow(features).sample((n,))).transpose(0, 1)

    def _check(self, n_features: int) -> None:
        name, d, mode = type(self.flow).__name__, self.dim, self.flow.training
        self.flow.eval()
        h, given = torch.zeros(3, n_features), f"flow {name}, given context of shape (3, {n_features}),"
        try:
            with torch.no_grad():
                log_q, draws = self.log_prob(torch.zeros(3, d), h), self.draw(2, h, 0)
        except Exception as err:
            first = (str(err).splitlines() or [""])[0]
            wanted = "a distribution with log_prob and sample, or a transform with forward(u, context) and inverse"
            raise SettingError(f"{given} fails: {type(err).__name__}: {first}; expected {wanted}") from err
        got = [tuple(t.shape) for t in (log_q, draws)]
        if got != [(3,), (3, 2, d)]:
            raise ShapeError(f"{given} gives log_prob and two draws of shapes {got}; expected (3,) and (3, 2, {d})")
        self.flow.train(mode)


AnyFlow = ConditionalFlow | TransformFlow | DistributionFlow


def build_flow(flow: FlowConfig | nn.Module, dim: int, n_features: int, *, seed: int) -> AnyFlow:
    """Return the flow of u (n, dim) given features (n, n_features): from its settings, a class by its name, or a copy of a module.

    Initial weights come from torch's global generator. A class is handed `features` = dim and, as `context` or `context_features`,
    n_features, where it takes such arguments and the settings do not give them.   Raises: SettingError, ShapeError.
    """
    if isinstance(flow, nn.Module):
        return _adapted(copy.deepcopy(flow), dim, n_features)
    if flow.spec:
        module = build_own("flow", flow.spec, flow.settings, **known_sizes(dim, n_features))
        return _adapted(module, dim, n_features)
    return ConditionalFlow(dim, n_features, flow, rng=torch_rng_for(seed, "splits"))


def known_sizes(dim: int, n_features: int) -> dict[str, Any]:
    """Arguments that a class of a flow may take without being given them."""
    return {"features": dim, "context": n_features, "context_features": n_features}


def _adapted(module: nn.Module, dim: int, n_features: int) -> TransformFlow | DistributionFlow:
    kind = TransformFlow if callable(getattr(module, "inverse", None)) else DistributionFlow
    return kind(module, dim, n_features)


def require_flow(flow: FlowConfig | nn.Module) -> None:
    """Check name and arguments of a class that settings name; its Python module is imported.   Raises: SettingError."""
    if isinstance(flow, FlowConfig) and flow.spec:
        require_own("flow", flow.spec, flow.settings, **known_sizes(1, 1))


def draw_seed(generator: torch.Generator) -> int:
    """A seed from a generator, which it moves on."""
    return seed_for(int(torch.randint(2**62, (), generator=generator, device=generator.device)), "draws")
