r"""A learned likelihood in the place of the simulator: x ~ q(x | theta), as many rows as are asked for, in microseconds each.

Where a simulation is expensive and p(x | theta) is simpler than p(theta | x), few simulations teach the likelihood better than the
posterior. The posterior network is then trained on pairs of which there is no end,

    theta ~ p(theta),   x ~ q(x | theta),   min over r of E[-log r(theta | x)]

so that nothing is overfitted. What r tends to is the posterior of q, and by the chain rule of the divergence of the pairs

    E_x KL(p(theta | x) || q(theta | x)) = E_theta KL(p(x | theta) || q(x | theta)) - KL(p(x) || q(x)):

it is off by at most what the likelihood is off by. What r has not learned of q comes on top: r can not be expected to be better than q.

Source: Papamakarios, Sterratt & Murray 2019, arXiv:1805.07226 (q); Papamakarios & Murray 2016, arXiv:1605.06376 (r).
"""

import itertools
import zlib
from collections.abc import Sequence
from typing import Any, NoReturn

import numpy as np
import torch

from sbi_phys.core.checks import as_matrix
from sbi_phys.core.errors import SettingError
from sbi_phys.core.types import Array
from sbi_phys.nets.likelihood import XColumns
from sbi_phys.nets.posterior import PosteriorNet, sample_net
from sbi_phys.priors import Observable, Parameter, Prior

__all__ = ["Emulator"]


_COUNTS = 1  # of XColumns.kind


class Emulator:
    """A trained `NLE` as a Simulator (see `protocol`): x (n, k) ~ q(x | theta); made by `NLE.as_simulator`.

    Args: nets: equal members, each row is drawn from one of them. columns: the map of x. prior: of the training.
    observables: blocks of x; None makes one block for each run of columns of one kind. simulator: identity of what is emulated.
    Attributes: settings: the emulated simulator's identity and a checksum of the weights; they name the emulator, they do not
    rebuild it. in_process: the network stays in its process: online training draws its rows in a thread.
    """

    in_process = True

    def __init__(
        self,
        nets: Sequence[PosteriorNet],
        columns: XColumns,
        prior: Prior,
        observables: Sequence[Observable] | None,
        simulator: dict[str, Any] | None,
        device: torch.device,
    ) -> None:
        self.prior: Prior = prior
        self.parameters: tuple[Parameter, ...] = prior.parameters
        self.observables: tuple[Observable, ...] = tuple(observables) if observables is not None else _blocks(columns)
        self.settings: dict[str, Any] = {"emulates": simulator, "weights": _checksum(nets)}
        self._nets, self._columns, self._device = tuple(nets), columns, device

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draw x (n, k) at theta (n, d), one each; whole numbers where x are counts.   Raises: ShapeError, NonFiniteError, SupportError."""
        u = self.prior.to_network(as_matrix("theta", theta, self.prior.dim, self.prior.names))
        inputs = torch.from_numpy(u.astype(np.float32)).to(self._device)
        generator = torch.Generator(device=self._device).manual_seed(int(rng.integers(2**63)))
        member = rng.integers(len(self._nets), size=len(u))
        z = np.empty((len(u), self._columns.dim))
        for k, net in enumerate(self._nets):
            rows = np.flatnonzero(member == k)
            if len(rows):
                z[rows] = sample_net(net, inputs[torch.from_numpy(rows).to(self._device)], 1, generator)[:, 0].double().numpy()
        return self._columns.from_z(z)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled: torch in every worker would cost more than the draws."""
        raise SettingError(
            "an emulator is a network and stays in its process; expected workers=0 in online training, workers=1 in simulate"
        )


def _checksum(nets: Sequence[PosteriorNet]) -> int:
    """CRC-32 of all weights, in their order."""
    value = 0
    for net in nets:
        for tensor in net.state_dict().values():
            value = zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes(), value)
    return value


def _blocks(columns: XColumns) -> tuple[Observable, ...]:
    """Blocks of columns without names of their own: runs of counts, and of others."""
    counts = np.zeros(columns.n_columns, dtype=bool)
    counts[columns.kept] = columns.kind == _COUNTS
    for tied, _, _ in columns.ties:
        counts[list(tied)] = True
    runs = [(kind, len(list(run))) for kind, run in itertools.groupby(counts.tolist())]
    names = ["x"] if len(runs) == 1 else [f"x{i}" for i in range(len(runs))]
    return tuple(Observable(name, size, kind="counts" if kind else "real") for name, (kind, size) in zip(names, runs, strict=True))
