r"""Summary networks: an observation x (n, ...) -> features h (n, k)."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_int
from sbi_phys.nets.silu import silu_layer

__all__ = ["EmbeddingConfig", "ResidualMLP"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingConfig:
    """Shape of the default summary network.   Raises: SettingError.

    Args: hidden: width. n_blocks: residual blocks. n_features: length of the summary.
    """

    hidden: int = 128
    n_blocks: int = 2
    n_features: int = 64

    def __post_init__(self) -> None:
        """Check ranges."""
        require_int("embedding hidden", self.hidden, low=1)
        require_int("embedding n_blocks", self.n_blocks, low=0)
        require_int("embedding n_features", self.n_features, low=1)


class ResidualMLP(nn.Module):
    """Perceptron with skip connections: h_0 = W x, h_{i+1} = h_i + V_i silu(U_i h_i), out = W' silu(h) + W'' x.

    The last term passes the input straight through, so that what is linear in x costs the network nothing.
    """

    def __init__(self, n_inputs: int, config: EmbeddingConfig) -> None:
        super().__init__()
        self.first = nn.Linear(n_inputs, config.hidden)
        self.up = nn.ModuleList(nn.Linear(config.hidden, config.hidden) for _ in range(config.n_blocks))
        down = [nn.Linear(config.hidden, config.hidden) for _ in range(config.n_blocks)]
        self.down = nn.ModuleList(down)
        self.last = nn.Linear(config.hidden, config.n_features)
        self.straight = nn.Linear(n_inputs, config.n_features, bias=False)
        for layer in down:
            # a block begins as the identity: depth is no obstacle at the start
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """X (n, ...) -> features (n, k); axes after the first are flattened."""
        x = torch.flatten(x, start_dim=1)
        hidden: Tensor = self.first(x)
        for up, down in zip(self.up, self.down, strict=True):
            hidden = hidden + down(silu_layer(F.silu(hidden), cast(Tensor, up.weight), cast(Tensor, up.bias)))
        out: Tensor = self.last(F.silu(hidden)) + self.straight(x)
        return out
