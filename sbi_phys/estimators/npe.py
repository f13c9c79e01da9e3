r"""Neural posterior estimation.

For pairs (theta, x) ~ p(theta) p(x | theta) the expected loss

    E[-log q(theta | x)] = E_x KL(p(theta | x) || q(theta | x)) + E_x H[p(theta | x)]

is smallest where q is the posterior for (almost) every x: one training serves all observations (amortised). The network
works in u, the prior's whitened space (see `priors`), so that

    log q(theta | x) = log q(u | x) + log p(theta) - log N(u; 0, I),   u = prior.to_unbounded(theta)

and no draw can leave the support. Where the simulator has an exact likelihood, importance sampling with `proposal` measures and
corrects the error of the network.

Source: Papamakarios & Murray 2016, arXiv:1605.06376; Greenberg+ 2019, arXiv:1905.07488; Radev+ 2020, arXiv:2003.06281.
"""

import math
from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from sbi_phys.core.checks import as_matrix, as_real, require_int
from sbi_phys.core.errors import DataError, ShapeError
from sbi_phys.core.rng import seed_for
from sbi_phys.core.types import Array, ArrayLike
from sbi_phys.estimators.base import Estimator, Shared
from sbi_phys.estimators.density_sampling import PosteriorDraws
from sbi_phys.estimators.other_priors import require_within, reweighted
from sbi_phys.nets.flow import FlowConfig
from sbi_phys.nets.flow_own import DistributionFlow, require_flow
from sbi_phys.nets.posterior import FlowProposal, PosteriorNet, encode_net, log_prob_nets, npe_loss
from sbi_phys.priors import Prior, standard_normal_log_prob

__all__ = ["NPE"]


class NPE(Estimator):
    """Amortised posterior q(theta | x).

    Args:
        prior: over theta; its whitening map is the space the network works in.
        flow: 'spline', 'affine', 'maf' or a FlowConfig; or your own, a `Transform` of nflows or a flow of zuko over d' = prior.free_dim
            columns whose context are the embedding's features: an nn.Module, or 'module:Class' (arguments:
            FlowConfig(spec=..., settings={...})).
        n_ensemble: networks, trained with different seeds and splits; the density is their equal mixture.
        Others as `BaseEstimator`.
    Raises: SettingError.

    >>> import numpy as np, sbi_phys as sp
    >>> prior = sp.NormalPrior([sp.Parameter("mu")])
    >>> theta = prior.sample(200, np.random.default_rng(0))
    >>> npe = sp.NPE(prior, seed=0, config=sp.TrainConfig(max_epochs=2)).fit(theta, theta + 0.1)
    >>> npe.sample([0.3], 5, seed=1).shape
    (5, 1)
    >>> npe.log_prob(theta[:3], [0.3]).shape
    (3,)
    """

    _nets: list[PosteriorNet]

    def __init__(self, prior: Prior, *, flow: str | FlowConfig | nn.Module = "spline", **shared: Unpack[Shared]) -> None:
        super().__init__(prior, **shared)
        self.flow = FlowConfig.of(flow)
        require_flow(self.flow)

    def build(self, scaler: Any, seed: int) -> PosteriorNet:
        """Embedding and flow."""
        return PosteriorNet(self.prior.free_dim, scaler.shape, self.flow, self.embedding, seed=seed)

    def row_loss(self, net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
        """-log q(u | x)."""
        return npe_loss(net, u, x)

    def start(self, net: PosteriorNet, rows: Sequence[Tensor], seed: int) -> None:
        """Begin at the Gaussian of the training parameters."""
        net.start_at(rows[0])

    def sample(self, x: ArrayLike | Tensor, n: int, *, seed: int = 0, prior: Prior | None = None) -> Array:
        """Draw n posterior samples: (n, d) for one observation, (b, n, d) for a batch of b, in the prior's units.

        Args: prior: in place of that of the training, without mass outside it: draws are weighted with the ratio of the two
        (`other_priors`; `posterior` says how many they are worth).
        Raises: ShapeError, NonFiniteError, DataError, SettingError; with a prior also SupportError (it has mass where nothing was
        learned), SimulatorMismatchError, ConvergenceError (too few effective draws).
        """
        n = require_int("n", n, low=1)
        if prior is not None:
            require_within(self.prior, prior)
            inputs, single = self._inputs(x)
            found = np.stack([self._under(prior, inputs[i : i + 1], n, seed_for(seed, "other prior", i))[0] for i in range(len(inputs))])
            return found[0] if single else found
        inputs, single = self._inputs(x)
        u = self._draw_members(inputs, n, seed)
        theta = self.prior.from_unbounded(u.reshape(-1, self.prior.free_dim)).reshape(len(inputs), n, self.prior.dim)
        return theta[0] if single else theta

    def _under(self, prior: Prior, inputs: Tensor, n: int, seed: int) -> tuple[Array, Array, float, float, float]:
        """`reweighted` draws of one observation, inputs (1, ...) scaled."""

        def draw(number: int, turn: int) -> Array:
            return self.prior.from_unbounded(self._draw_members(inputs, number, seed_for(seed, "round", turn))[0])

        return reweighted(draw, self.prior, prior, n, seed=seed)

    def posterior(self, x: ArrayLike | Tensor, n: int, *, seed: int = 0, prior: Prior | None = None) -> PosteriorDraws:
        """Draw n independent samples of q(theta | x) for one observation, with their normalised log density.

        Args: prior: as in `sample`; n_effective and pareto_k are those of the weights, log_evidence is the log ratio of the evidences under
        this prior and that of the training, and log_prob is normalised with it.
        Raises: as `sample`; DataError for more than one observation.
        """
        if prior is not None:
            require_within(self.prior, prior)
            inputs, _ = self._inputs(x)
            if len(inputs) != 1:
                raise DataError(f"x holds {len(inputs)} observations; expected one")
            theta, log_w, ess, k, log_z = self._under(prior, inputs, require_int("n", n, low=1), seed_for(seed, "other prior", 0))
            return PosteriorDraws(
                theta=theta,
                log_prob=self.log_prob(theta, x) + log_w - log_z,
                method="npe",
                r_hat=np.full(self.prior.free_dim, np.nan),
                n_effective=ess,
                evaluations=0,
                pareto_k=k,
                log_evidence=log_z,
                message=f"draws of the learned posterior weighted with the ratio of the priors: worth {ess:.0f}, Pareto k {k:.2f}",
            )
        draws = self.sample(x, n, seed=seed)
        if draws.ndim == 3 and len(draws) == 1:
            draws = draws[0]
        if draws.ndim != 2:
            raise DataError(f"x holds {len(draws)} observations; expected one")
        return PosteriorDraws(
            theta=draws,
            log_prob=self.log_prob(draws, x),
            method="npe",
            r_hat=np.full(self.prior.free_dim, np.nan),
            n_effective=float(n),
            evaluations=0,
            pareto_k=math.nan,
            log_evidence=math.nan,
            message=f"independent draws of the learned posterior, {len(self._nets)} network(s)",
            parameters=self.prior.parameters,
        )

    def log_prob(self, theta: ArrayLike | Tensor, x: ArrayLike | Tensor) -> Array:
        """Normalised log density of theta (n, d) given one observation x or n paired ones -> (n,); -inf outside the prior.

        Raises: ShapeError, NonFiniteError, DataError.
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        inputs, _ = self._inputs(x)
        if inputs.shape[0] not in (1, len(array)):
            raise DataError(f"theta has {len(array)} rows and x has {inputs.shape[0]}; expected one observation or as many as theta")
        out = np.full(len(array), -np.inf)
        inside = np.flatnonzero(self.prior.contains(array))
        if len(inside):
            u = self.prior.to_unbounded(array[inside])
            rows = inputs if inputs.shape[0] == 1 else inputs[torch.from_numpy(inside).to(self.device)]
            log_u = log_prob_nets(self._nets, torch.from_numpy(u.astype(np.float32)).to(self.device), rows)
            out[inside] = log_u + self.prior.log_prob(array[inside]) - standard_normal_log_prob(u)
        return out

    def log_prob_draws(self, draws: ArrayLike, x: ArrayLike | Tensor) -> Array:
        """Log density of draws (b, n, d) of b observations x (b, ...), all at once -> (b, n); -inf outside the prior.

        Raises: ShapeError, NonFiniteError, DataError.
        """
        inputs, _ = self._inputs(x)
        array = as_real("draws", draws)
        b, d = len(inputs), self.prior.dim
        if array.ndim != 3 or array.shape[0] != b or array.shape[2] != d:
            raise ShapeError(f"draws has shape {array.shape}; expected ({b}, n, {d}) for {b} observations")
        flat = array.reshape(-1, d)
        out = np.full(len(flat), -np.inf)
        inside = np.flatnonzero(self.prior.contains(flat))
        if len(inside):
            u = self.prior.to_unbounded(flat[inside])
            owner = torch.from_numpy(inside // array.shape[1]).to(self.device)
            log_u = log_prob_nets(self._nets, torch.from_numpy(u.astype(np.float32)).to(self.device), inputs, owner)
            out[inside] = log_u + self.prior.log_prob(flat[inside]) - standard_normal_log_prob(u)
        return out.reshape(array.shape[:2])

    def latent(self, theta: ArrayLike | Tensor, x: ArrayLike | Tensor) -> Array | None:
        """Base coordinates z (n, d') of theta (n, d) given x (n, ...): N(0, I) whatever x, if the posterior is right.

        None for an ensemble, whose members have bases of their own, and for a flow of your own that gives no base coordinates.
        Raises: ShapeError, NonFiniteError, SupportError.
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        inputs, _ = self._inputs(x)
        if len(self._nets) > 1 or isinstance(self._nets[0].flow, DistributionFlow):
            return None
        if len(inputs) != len(array):
            raise ShapeError(f"theta has {len(array)} rows and x has {len(inputs)}; expected the same number")
        u = torch.from_numpy(self.prior.to_unbounded(array).astype(np.float32)).to(self.device)
        z: Array = encode_net(self._nets[0], u, inputs)[0].double().cpu().numpy()
        return z

    def map(self, x: ArrayLike | Tensor, *, n_start: int = 2000, seed: int = 0) -> Array:
        """Mode of q(theta | x) for one observation -> (d,): the best of n_start draws, then a simplex search in u."""
        draws = self.sample(x, n_start, seed=seed)
        if draws.ndim != 2:
            raise DataError(f"x holds {len(draws)} observations; expected one")
        start = self.prior.to_unbounded(draws[np.argmax(self.log_prob(draws, x))][None])[0]
        width = self.prior.to_unbounded(draws).std(axis=0) + 1e-6

        def objective(step: Array) -> float:
            u = start + step * width
            return float("inf") if np.abs(u).max() > 8 else -float(self.log_prob(self.prior.from_unbounded(u[None]), x)[0])

        simplex = np.vstack([np.zeros(len(start)), 0.3 * np.eye(len(start))])
        options = {"maxiter": 300 * len(start), "xatol": 1e-3, "fatol": 1e-5, "initial_simplex": simplex}
        best = minimize(objective, simplex[0], method="Nelder-Mead", options=options)
        return self.prior.from_unbounded((start + best.x * width)[None])[0]

    def inputs(self, x: ArrayLike | Tensor) -> Array:
        """Observations as the network receives them, scaled: (...) for one, (b, ...) for a batch."""
        scaled, single = self._inputs(x)
        rows: Array = scaled.double().cpu().numpy()
        return rows[0] if single else rows

    def embed(self, x: ArrayLike | Tensor) -> Array:
        """Features h of observations, those of all members side by side: (k,) for one, (b, k) for a batch."""
        inputs, single = self._inputs(x)
        with torch.inference_mode():
            h = torch.cat([torch.cat([net.embedding(part) for part in inputs.split(8192)]) for net in self._nets], dim=1)
        features: Array = h.double().cpu().numpy()
        return features[0] if single else features

    def proposal(self, x: ArrayLike | Tensor, *, prior_share: float = 0.01) -> FlowProposal:
        """The learned posterior of one observation as a proposal density in u, tails widened."""
        inputs, single = self._inputs(x)
        if not single and len(inputs) != 1:
            raise DataError(f"x holds {len(inputs)} observations; expected one")
        return FlowProposal(self._nets, inputs, prior_share=prior_share)
