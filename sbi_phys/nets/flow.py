r"""Conditional normalizing flow q(u | h) and its layers, each a `Layer`: a map with its inverse, as a `Transform` of nflows is.

    z_0 = u,   z_l = T_l(z_{l-1}; c_l(h)),   log q(u | h) = log N(z_L; 0, I) + sum_l log|dz_l/dz_{l-1}|

h (n, k) are the features of an observation, computed by an embedding. One linear map of h, a single matrix product, gives the contexts
c_l of all layers. A coupling adds its context to its first hidden layer; an affine layer takes it as its parameters. The first layer is
a full conditional Gaussian (`GaussianLayer`): it learns location, width and correlation, and the couplings behind it learn what is not
Gaussian. A layer whose parameters are zero is the identity, and the last `context_zero` entries of each context start at zero, so a new
flow equals its base density.

Source: Papamakarios et al. 2021, arXiv:1912.02762 (review); Durkan et al. 2019, arXiv:1906.04032 (spline couplings).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_choice, require_int, require_number
from sbi_phys.core.classes import plain_settings, split_spec
from sbi_phys.core.errors import SettingError
from sbi_phys.nets._kernels import silu_layer
from sbi_phys.nets.spline import n_spline_parameters, rational_quadratic_spline

__all__ = ["FLOWS", "ConditionalFlow", "FlowConfig"]

FLOWS = ("spline", "affine", "maf")
_LOG_2PI = 1.8378770664093453
_LOG_SCALE_LIMIT = 12.0
_COUPLING_SCALE = 3.0  # largest log scale of one layer, which bounds what a single layer can do


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Settings of a conditional flow.

    Args: kind: 'spline' (rational-quadratic couplings), 'affine' (affine couplings, the cINN) or 'maf' (masked affine
    autoregressive). n_layers: couplings or autoregressive layers. hidden: width of each conditioner.
    n_bins, bound: bins and half-width of the splines' domain, in units of the whitened posterior.
    gaussian_layer: put the full conditional Gaussian next to the data.
    spec: 'package.module:Class' of a flow of your own in place of this one (`flow_own`), a torch.nn.Module as nflows' transforms or zuko's
    flows are. settings: its keyword arguments, plain values.   Raises: SettingError.

    >>> import sbi_phys as sp
    >>> sp.FlowConfig(kind="maf", n_layers=3).hidden
    64
    """

    kind: str = "spline"
    n_layers: int = 5
    hidden: int = 64
    n_bins: int = 8
    bound: float = 5.0
    gaussian_layer: bool = True
    spec: str = ""
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def of(cls, value: Any, **small: Any) -> "Self | FlowConfig | nn.Module":
        """Settings from the name of a kind, with the sizes `small`, or of a class; settings and modules as they are.

        Raises: SettingError.
        """
        if isinstance(value, str):
            return cls(spec=value) if ":" in value else cls(kind=value, **small)
        if not isinstance(value, FlowConfig | nn.Module):
            kinds = ", ".join(FLOWS)
            raise SettingError(f"flow is a {type(value).__name__}; expected {kinds}, 'module:Class', a FlowConfig or a torch.nn.Module")
        return value

    def __post_init__(self) -> None:
        """Check names and ranges."""
        object.__setattr__(self, "settings", plain_settings("flow settings", self.settings))
        if self.spec:
            split_spec("flow spec", self.spec)
        elif self.settings:
            raise SettingError(f"flow has settings {self.settings} and no spec; expected spec = 'package.module:Class'")
        require_choice("flow kind", self.kind, FLOWS)
        require_int("n_layers", self.n_layers, low=0 if self.gaussian_layer else 1)
        require_int("hidden", self.hidden, low=1)
        require_int("n_bins", self.n_bins, low=2, high=128)
        require_number("bound", self.bound, low=0, open_low=True)


class Layer(nn.Module):
    """A map of u (n, d) given its context (n, context_size): forward u -> z, log|dz/du|; inverse z -> u, log|du/dz|.

    The last context_zero entries of the context are zero at the start.
    """

    context_size: int
    context_zero: int

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z (n, d) -> u (n, d), log|du/dz| (n,)."""
        raise NotImplementedError


class ConditionalFlow(nn.Module):
    """Density over u (n, d) given features h (n, k): `log_prob`, and `decode` from base draws to u.

    Args: dim d. n_features k. config. rng: torch generator that chooses the splits of the couplings (initial weights come from torch's
    global generator, which the caller seeds).

    >>> import sbi_phys as sp, torch
    >>> flow = sp.nets.ConditionalFlow(2, 3, sp.FlowConfig(n_layers=1), rng=torch.Generator())
    >>> u, h = torch.zeros(5, 2), torch.ones(5, 3)
    >>> flow.log_prob(u, h).shape
    torch.Size([5])
    """

    def __init__(self, dim: int, n_features: int, config: FlowConfig, *, rng: torch.Generator) -> None:
        super().__init__()
        self.dim, self.config = dim, config
        layers: list[Layer] = [GaussianLayer(dim)] if config.gaussian_layer else []
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
            z, log_det = cast(Layer, layer).inverse(z, context)
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


def _couplings(config: FlowConfig, dim: int, rng: torch.Generator) -> list[Layer]:
    splits = coupling_splits(dim, config.n_layers, rng)
    if config.kind == "spline":
        return [SplineCoupling(*split, hidden=config.hidden, n_bins=config.n_bins, bound=config.bound) for split in splits]
    return [AffineCoupling(*split, hidden=config.hidden) for split in splits]


def _autoregressive(config: FlowConfig, dim: int, rng: torch.Generator) -> list[Layer]:
    """Layers in a random order of the features and its reverse, in turn."""
    orders: list[Tensor] = []
    while len(orders) < config.n_layers:
        order = torch.randperm(dim, generator=rng)
        orders += [order, order.flip(0)]
    return [MaskedAutoregressive(order, hidden=config.hidden) for order in orders[: config.n_layers]]


class GaussianLayer(Layer):
    r"""Full conditional affine map z = A(x) (u - mu(x)), A = diag(e^s) (I + N), N strictly lower triangular; log|dz/du| = sum_k s_k.

    With a normal base, this layer alone is a Gaussian posterior with full covariance. It stands next to the data, so that the layers
    behind it see a posterior of unit width, however narrow the posterior is within the prior.

    Context (n, d + d + d(d-1)/2): mu, s, the entries of N.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.context_size = 2 * features + features * (features - 1) // 2
        self.context_zero = self.context_size
        rows, columns = torch.tril_indices(features, features, offset=-1)
        self.register_buffer("_flat", rows * features + columns, persistent=False)

    def _split(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.features
        mean, raw, lower = context.split([d, d, d * (d - 1) // 2], dim=-1)
        log_scale = _LOG_SCALE_LIMIT * torch.tanh(raw / _LOG_SCALE_LIMIT)
        unit = context.new_zeros(context.shape[0], d * d).index_copy(1, cast(Tensor, self._flat), lower).view(-1, d, d)
        return mean, log_scale, unit

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u (n, d) -> z (n, d), log|dz/du| (n,)."""
        mean, log_scale, lower = self._split(context)
        centred = inputs - mean
        z = log_scale.exp() * (centred + torch.bmm(lower, centred.unsqueeze(-1)).squeeze(-1))
        return z, log_scale.sum(dim=-1)

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z (n, d) -> u (n, d), log|du/dz| (n,)."""
        mean, log_scale, lower = self._split(context)
        scaled = (inputs * (-log_scale).exp()).unsqueeze(-1)
        centred = torch.linalg.solve_triangular(lower, scaled, upper=False, unitriangular=True).squeeze(-1)
        return mean + centred, -log_scale.sum(dim=-1)


class MaskedAutoregressive(Layer):
    r"""Affine autoregressive map z_k = u_k e^{s_k} + t_k, (s_k, t_k) a function of the features before k and of the context.

    Forward takes one pass of a masked network: a hidden unit of degree m sees features of rank <= m, and outputs of rank k see degrees
    < k. The parameters of the first feature depend on the context alone, so each output also has a direct part of the context.
    The inverse takes d passes, feature by feature. Context (n, hidden + 2 d).

    Source: Papamakarios+ 2017, arXiv:1705.07057 (over MADE, 1502.03509).

    Args: order: features from first to last. hidden: width of the conditioner.
    """

    def __init__(self, order: Tensor, *, hidden: int) -> None:
        super().__init__()
        d = len(order)
        self.context_size, self.context_zero = hidden + 2 * d, 2 * d
        rank, degree = torch.argsort(order), torch.arange(hidden) % max(1, d - 1)
        self.order = order.tolist()
        out = (rank[:, None] > degree[None, :]).float()
        self.register_buffer("_first_mask", (degree[:, None] >= rank[None, :]).float(), persistent=False)
        self.register_buffer("_second_mask", (degree[:, None] >= degree[None, :]).float(), persistent=False)
        self.register_buffer("_last_mask", torch.cat([out, out]), persistent=False)
        self.first = nn.Linear(d, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, 2 * d, bias=False)
        nn.init.zeros_(self.last.weight)

    def _scale_shift(self, u: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        hidden_share, direct = context.split([self.first.out_features, self.last.out_features], dim=-1)
        hidden = silu_layer(u, self.first.weight * cast(Tensor, self._first_mask), hidden_share)
        hidden = silu_layer(hidden, self.second.weight * cast(Tensor, self._second_mask), self.second.bias, skip=True)
        shift, raw = (direct + F.linear(hidden, self.last.weight * cast(Tensor, self._last_mask))).chunk(2, dim=-1)
        return _COUPLING_SCALE * torch.tanh(raw / _COUPLING_SCALE), shift

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u (n, d) -> z (n, d), log|dz/du| (n,)."""
        log_scale, shift = self._scale_shift(inputs, context)
        return torch.addcmul(shift, inputs, log_scale.exp()), log_scale.sum(dim=-1)

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z (n, d) -> u (n, d), log|du/dz| (n,)."""
        columns = [torch.zeros_like(inputs[:, 0])] * len(self.order)
        total = torch.zeros_like(inputs[:, 0])
        for k in self.order:
            log_scale, shift = self._scale_shift(torch.stack(columns, dim=1), context)
            columns[k] = (inputs[:, k] - shift[:, k]) * (-log_scale[:, k]).exp()
            total = total - log_scale[:, k]
        return torch.stack(columns, dim=1), total


class Coupling(Layer):
    """Coupling layer: features `kept` pass unchanged and, with the context, set the map of the others.

    Args: kept, changed: positions that together are 0 .. d-1 (`kept` may be empty: then the context alone sets the map).
    hidden: width of the conditioner. n_parameters: numbers per changed feature.
    """

    def __init__(self, kept: Tensor, changed: Tensor, *, hidden: int, n_parameters: int) -> None:
        super().__init__()
        self.context_size, self.context_zero = hidden, 0
        self.n_parameters = n_parameters
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("changed", changed, persistent=False)
        self.register_buffer("_back", torch.argsort(torch.cat([kept, changed])), persistent=False)
        self.first = nn.Linear(len(kept), hidden, bias=False) if len(kept) else None
        self.second = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, len(changed) * n_parameters)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def _parameters_of(self, kept: Tensor, context: Tensor) -> Tensor:
        hidden = F.silu(context) if self.first is None else silu_layer(kept, self.first.weight, context)
        hidden = silu_layer(hidden, self.second.weight, self.second.bias, skip=True)
        return cast(Tensor, self.last(hidden)).view(kept.shape[0], -1, self.n_parameters)

    def _apply_map(self, inputs: Tensor, context: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        kept, changed = inputs[:, cast(Tensor, self.kept)], inputs[:, cast(Tensor, self.changed)]
        out, log_slope = self.elementwise(changed, self._parameters_of(kept, context), inverse=inverse)
        return torch.cat([kept, out], dim=1)[:, cast(Tensor, self._back)], log_slope.sum(dim=1)

    def elementwise(self, x: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Map x (n, c) with parameters (n, c, n_parameters) -> y (n, c), log|dy/dx| (n, c)."""
        raise NotImplementedError

    def forward(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """u (n, d) -> z (n, d), log|dz/du| (n,)."""
        return self._apply_map(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """z (n, d) -> u (n, d), log|du/dz| (n,)."""
        return self._apply_map(inputs, context, inverse=True)


class SplineCoupling(Coupling):
    """Coupling with a rational-quadratic spline (Durkan+ 2019, arXiv:1906.04032)."""

    def __init__(self, kept: Tensor, changed: Tensor, *, hidden: int, n_bins: int, bound: float) -> None:
        super().__init__(kept, changed, hidden=hidden, n_parameters=n_spline_parameters(n_bins))
        self.bound = bound

    def elementwise(self, x: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Spline on [-bound, bound], identity outside."""
        return rational_quadratic_spline(x, parameters, bound=self.bound, inverse=inverse)


class AffineCoupling(Coupling):
    """Coupling y = x e^s + t, the conditional invertible network of the physics papers (Ardizzone+ 2019, arXiv:1907.02392)."""

    def __init__(self, kept: Tensor, changed: Tensor, *, hidden: int) -> None:
        super().__init__(kept, changed, hidden=hidden, n_parameters=2)

    def elementwise(self, x: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Affine map; the log scale is held within +-3 by tanh."""
        shift, log_scale = parameters[..., 0], _COUPLING_SCALE * torch.tanh(parameters[..., 1] / _COUPLING_SCALE)
        if inverse:
            return (x - shift) * (-log_scale).exp(), -log_scale
        return x * log_scale.exp() + shift, log_scale
