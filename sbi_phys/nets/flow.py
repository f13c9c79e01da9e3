r"""Conditional normalizing flow q(u | h) over nflows transforms.

    z_0 = u,   z_l = T_l(z_{l-1}; c_l(h)),   log q(u | h) = log N(z_L; 0, I) + sum_l log|dz_l/dz_{l-1}|

h (n, k) are the features of an observation (`embed`). One linear map makes the contexts c_l of all layers in one
matrix product. The first layer is a full conditional Gaussian (`layers.GaussianLayer`): it takes up location, width
and correlation, the couplings behind it learn what is not Gaussian.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from nflows.transforms.base import Transform
from torch import Tensor, nn

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.nets.layers import AffineCoupling, GaussianLayer, MaskedAutoregressive, SplineCoupling

__all__ = ["FLOWS", "ConditionalFlow", "FlowConfig"]

FLOWS = ("spline", "affine", "maf")
_LOG_2PI = 1.8378770664093453


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Shape of the flow.

    Args: kind: 'spline' (rational-quadratic couplings), 'affine' (affine couplings, the cINN) or 'maf' (masked affine
    autoregressive). n_layers: couplings or autoregressive layers. hidden: width of each conditioner.
    n_bins, bound: bins and half-width of the splines' domain, in units of the whitened posterior.
    gaussian_layer: put the full conditional Gaussian next to the data.   Raises: SettingError.
    """

    kind: str = "spline"
    n_layers: int = 5
    hidden: int = 64
    n_bins: int = 8
    bound: float = 5.0
    gaussian_layer: bool = True

    def __post_init__(self) -> None:
        """Check names and ranges."""
        require_choice("flow kind", self.kind, FLOWS)
        require_int("n_layers", self.n_layers, low=0 if self.gaussian_layer else 1)
        require_int("hidden", self.hidden, low=1)
        require_int("n_bins", self.n_bins, low=2, high=128)
        require_number("bound", self.bound, low=0, open_low=True)


class ConditionalFlow(nn.Module):
    """Density over u (n, d) given features h (n, k): `log_prob`, and `decode` from base draws to u.

    Args: dim d. n_features k. config. rng: numbers that choose the couplings' splits (initial weights come from torch's
    generator, which the caller seeds).
    """

    def __init__(self, dim: int, n_features: int, config: FlowConfig, *, rng: torch.Generator) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        layers: list[Transform] = [GaussianLayer(dim)] if config.gaussian_layer else []
        layers += _autoregressive(config, dim, rng) if config.kind == "maf" else _couplings(config, dim, rng)
        self.layers = nn.ModuleList(layers)
        self._shares = [int(layer.context_size) for layer in layers]
        self.context = nn.Linear(n_features, sum(self._shares))
        end = 0
        with torch.no_grad():
            for layer, share in zip(layers, self._shares, strict=True):
                end += share
                self.context.weight[end - int(layer.context_zero) : end] = 0
                self.context.bias[end - int(layer.context_zero) : end] = 0

    def contexts(self, features: Tensor) -> list[Tensor]:
        """Context of each layer from features (n, k): computed once per observation, whatever the number of draws."""
        return list(self.context(features).split(self._shares, dim=-1))

    def encode(self, u: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """u (n, d) -> base z (n, d) and log|dz/du| (n,)."""
        total = u.new_zeros(u.shape[0])
        for layer, context in zip(self.layers, contexts, strict=True):
            u, log_det = layer(u, context)
            total = total + log_det
        return u, total

    def decode(self, z: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Base z (n, d) -> u (n, d) and log|du/dz| (n,)."""
        total = z.new_zeros(z.shape[0])
        for layer, context in zip(reversed(self.layers), reversed(contexts), strict=True):
            z, log_det = cast(Transform, layer).inverse(z, context)
            total = total + log_det
        return z, total

    def log_prob(self, u: Tensor, features: Tensor) -> Tensor:
        """log q(u | h) of u (n, d), h (n, k) -> (n,)."""
        z, log_det = self.encode(u, self.contexts(features))
        return base_log_prob(z) + log_det


def base_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) of z (n, d) -> (n,)."""
    return -0.5 * (z * z).sum(dim=-1) - 0.5 * z.shape[-1] * _LOG_2PI


def coupling_splits(dim: int, n_layers: int, rng: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Positions (kept, changed) for each layer: random halves, each followed by its complement.

    In one dimension nothing is kept: each layer is a map set by the context alone.
    """
    splits: list[tuple[Tensor, Tensor]] = []
    while len(splits) < n_layers:
        order = torch.randperm(dim, generator=rng)
        one, other = order[: dim // 2].sort().values, order[dim // 2 :].sort().values
        splits += [(one, other), (other, one)] if dim > 1 else [(one, other)]
    return splits[:n_layers]


def _couplings(config: FlowConfig, dim: int, rng: torch.Generator) -> list[Transform]:
    splits = coupling_splits(dim, config.n_layers, rng)
    if config.kind == "spline":
        return [SplineCoupling(*split, hidden=config.hidden, n_bins=config.n_bins, bound=config.bound) for split in splits]
    return [AffineCoupling(*split, hidden=config.hidden) for split in splits]


def _autoregressive(config: FlowConfig, dim: int, rng: torch.Generator) -> list[Transform]:
    """Layers in a random order of the features and its reverse, in turn."""
    orders: list[Tensor] = []
    while len(orders) < config.n_layers:
        order = torch.randperm(dim, generator=rng)
        orders += [order, order.flip(0)]
    return [MaskedAutoregressive(order, hidden=config.hidden) for order in orders[: config.n_layers]]
