r"""Embedding of sets of events through a learned likelihood of single events, and the flow that uses its summary.

    f(e, u) = phi(e) . psi(u) + c(u)   ->   sum_e f(e, u) = (sum_e phi(e)) . psi(u) + m c(u)

Up to terms that do not depend on u, f is learned to be log p(e | theta(u)). Its sum over a set is then the log likelihood for any number m
of events, and sum_e phi(e) with m is a sufficient statistic as far as f is exact. A network that only sees averages of the events must
find a maximum whose width falls as 1/sqrt(m); here it is computed. With L_k = sum_e f(e, u_k) at K quasi-random points u_k of N(0, I), the
prior in its whitened space, the summary has three parts:

    quadratic   b.u - u^T H u / 2 fitted to L_k with weights softmax(t L_k), t = 1, m^-1/4, m^-1/2: with the prior, a Gaussian posterior of
                precision P = H + I and mean P^-1 b. The tempered weights cover many points if the posterior lies between few
    moments     mean and covariance of the points with weights softmax(L)
    marginals   sum of softmax(L)_k over the points in each of equally likely bins of each u_i: several modes, non-Gaussian shapes

One of these Gaussians is the anchor: the moments if the posterior covers many points, since they include all modes; else the fit with the
least tempering that covers enough points. The latter is refined four times by importance sampling with new points around it. The last
columns of the summary are the mean of the anchor and A with A^T A = P; the rest goes to a perceptron in units of the anchor. Once the
scores are learned, the summary of a set is fixed, so it is computed once for all epochs of the flow. `AnchoredFlow` is a density of
v = A (u - mean): its task is of order one for any number of events, and its errors are in units of the width of the posterior.

Source: van den Oord et al. 2018, arXiv:1807.03748, and Durkan et al. 2020, arXiv:2002.03712 (the contrastive loss); Brehmer et al. 2018,
arXiv:1805.12244 (summaries from a learned likelihood of events).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sbi_phys.core.checks import require_int
from sbi_phys.core.rng import seed_for, torch_seeded
from sbi_phys.nets.embedding_set import SetEmbedding, segment_sum
from sbi_phys.nets.embedding_vector import EmbeddingConfig
from sbi_phys.nets.flow import ConditionalFlow, FlowConfig, GaussianLayer
from sbi_phys.training.scaling import XScaler

__all__ = ["AnchoredFlow", "EventScores", "LikelihoodSet", "contrastive_loss"]

_POWERS = (0.0, 0.25, 0.5)  # t = m^-power
_LARGEST = 1e8  # precision
_NEAR = 48  # points of a refinement
_REACH = 5.0  # limit of a mean, in sd of the prior
_MANY, _SOME = 40.0, 20.0  # effective points that moments, and a fit, need
_ROUNDS, _WIDER = 4, 1.4  # refinements of a narrow anchor, and how much wider than it their points lie
_TEMPERS, _HELD = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03, 0.01), 10.0  # of their weights; the first that is spread over so many is taken
_LIMIT = 12.0  # of the Gaussian layer's log scales


def _spread_layer(n_in: int, n_out: int) -> nn.Linear:
    """First layer for standardised inputs with structure at any place and of any width from about 1 to 1/10."""
    layer = nn.Linear(n_in, n_out)
    slope = torch.randn(n_out, n_in) * torch.exp(math.log(20) * torch.rand(n_out, 1)) / 2
    with torch.no_grad():
        layer.weight.copy_(slope)
        layer.bias.copy_(-(slope * torch.randn(n_out, n_in) * 1.2).sum(dim=1))
    return layer


def _quadratic(u: Tensor) -> Tensor:
    """1, u_i, u_i u_j of u (n, d) -> (n, (d + 1)(d + 2) / 2)."""
    i, j = torch.triu_indices(u.shape[1], u.shape[1])
    return torch.cat([torch.ones_like(u[:, :1]), u, u[:, i] * u[:, j]], dim=1)


class EventScores(nn.Module):
    """f(e, u) = phi(e) . psi(u) + c(u) of standardised events (n, k) and whitened parameters (m, d).

    Args: n_columns k. dim d. hidden: width of phi and psi. rank: their length. seed: of the weights.   Raises: SettingError.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, n_columns: int, dim: int, *, hidden: int = 64, rank: int = 48, seed: int = 0) -> None:
        super().__init__()
        with torch_seeded(seed_for(seed, "event scores")):
            hidden, self.rank = require_int("hidden", hidden, low=1), require_int("rank", rank, low=1)
            self.phi = nn.Sequential(
                _spread_layer(require_int("n_columns", n_columns, low=1), hidden),
                nn.SiLU(),
                nn.Linear(hidden, hidden),
                nn.SiLU(),
                nn.Linear(hidden, rank),
            )
            self.psi = nn.Sequential(
                _spread_layer(require_int("dim", dim, low=1), 2 * hidden),
                nn.SiLU(),
                nn.Linear(2 * hidden, 2 * hidden),
                nn.SiLU(),
                nn.Linear(2 * hidden, rank + 1),
            )
            with torch.no_grad():  # start near a flat likelihood, for any number of events
                for weight in self.psi[-1].parameters():
                    weight.mul_(0.1)
        self.register_buffer("centre", torch.zeros(n_columns, dtype=torch.float64))
        self.register_buffer("spread", torch.ones(n_columns, dtype=torch.float64))

    def table(self, total: Tensor, counts: Tensor, u: Tensor) -> Tensor:
        """Log likelihoods (n, m) of sets with sums of phi (n, rank) and counts (n,), up to a constant for each, at u (m, d)."""
        psi = self.psi(u)
        return total @ psi[:, :-1].T + counts[:, None] * psi[:, -1]


class LikelihoodSet(SetEmbedding):
    """Embedding of sets through the log likelihood that `EventScores` gives them.

    Args: n_columns k, of an event, without the mask. dim: free parameters of the prior. hidden, rank: of the scores. n_points K.
    n_bins: of each marginal. config: of the perceptron. seed: of the weights.
    The scores are learned by `likelihood_embedding` of the estimators, or come from a model file.   Raises: SettingError.
    """

    points: Tensor
    bins: Tensor
    near: Tensor

    def __init__(
        self,
        n_columns: int,
        dim: int,
        *,
        hidden: int = 64,
        rank: int = 48,
        n_points: int = 2048,
        n_bins: int = 24,
        config: EmbeddingConfig | None = None,
        seed: int = 0,
    ) -> None:
        pairs = dim * (dim + 1) // 2
        with torch_seeded(seed_for(seed, "likelihood set")):
            n_bins, n_points = require_int("n_bins", n_bins, low=1), require_int("n_points", n_points, low=16)
            super().__init__(n_columns, rank + (len(_POWERS) + 2) * (dim + pairs) + 1 + dim * n_bins, config)
        self.scores = EventScores(n_columns, dim, hidden=hidden, rank=rank, seed=seed)
        self.learn_scores(False)
        self.dim, self.n_basis = dim, 1 + dim + pairs
        flat = torch.quasirandom.SobolEngine(dim, scramble=True, seed=1).draw(n_points, dtype=torch.float64)
        self.register_buffer("points", torch.special.ndtri(flat.clamp(1e-9, 1 - 1e-9)))
        bins = nn.functional.one_hot((flat * n_bins).long().clamp(max=n_bins - 1), n_bins).double()
        # times sqrt(n_bins), so that shares are of order one for wide and narrow posteriors
        self.register_buffer("bins", bins.flatten(start_dim=1) * math.sqrt(n_bins), persistent=False)
        flat = torch.quasirandom.SobolEngine(dim, scramble=True, seed=2).draw(_NEAR, dtype=torch.float64)
        self.register_buffer("near", torch.special.ndtri(flat.clamp(1e-9, 1 - 1e-9)), persistent=False)

    def learn_scores(self, on: bool) -> None:
        """Choose what is trained: the scores alone (on), or everything but the scores."""
        for name, weight in self.named_parameters():
            weight.requires_grad_(name.startswith("scores.") == on)

    def table(self, x: Tensor, u: Tensor) -> Tensor:
        """Log likelihoods (n, m) of padded sets x (n, ...), up to a constant for each, at u (m, d)."""
        flat = torch.flatten(x, start_dim=1)
        events, owner = self._events(flat)
        counts = torch.bincount(owner, minlength=len(flat)).to(flat.dtype)
        return self.scores.table(segment_sum(self.scores.phi(events), owner, len(flat)).to(flat.dtype), counts, u)

    def standardise_events(self, scaler: XScaler) -> None:
        """Standardise the inputs of the scores by mean and width of the real events.   Raises: as `take_scaling`."""
        super().take_scaling(scaler)
        centre, spread = self.centre, self.spread
        if not self.shift.numel():  # one scale for all slots
            last = self.n_columns
            centre, spread = (torch.from_numpy(a.reshape(-1, last + 1)[0, :last].copy()) for a in (scaler.mean, scaler.scale))
        self.scores.centre.copy_(centre)
        self.scores.spread.copy_(spread)
        self.take_scaling(scaler)

    def forget_scaling(self) -> None:
        """Take rows of any length without scaling until `take_scaling` is called; the scores keep their own scaling."""
        self.shift, self.factor = self.shift.new_zeros(0), self.factor.new_zeros(0)

    def take_scaling(self, scaler: XScaler) -> None:
        """Undo z = (x - mean) / scale from now on, as the scores have their own scaling.   Raises: as `SetEmbedding.take_scaling`."""
        super().take_scaling(scaler)
        self.shift = torch.from_numpy(scaler.mean.reshape(-1).copy()).to(self.centre.device)
        self.factor = torch.from_numpy(scaler.scale.reshape(-1).copy()).to(self.centre.device)
        self.centre, self.spread = torch.zeros_like(self.centre), torch.ones_like(self.spread)

    def _events(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        events, owner = super()._events(flat)
        return ((events - self.scores.centre) / self.scores.spread).to(flat.dtype), owner

    def forward(self, x: Tensor) -> Tensor:
        """Padded sets (n, n_max, k + 1) or (n, n_max (k + 1)) -> features (n, n_features + d (d + 3) / 2), the anchor last."""
        return self.read(self.summarise(x))

    @torch.no_grad()
    def summarise(self, x: Tensor) -> Tensor:
        """Summaries that depend on the scores alone: sets as in `forward` -> (n, n_pooled + 1 + d (d + 3) / 2).   Raises: ShapeError."""
        return super().forward(x)

    def read(self, summary: Tensor) -> Tensor:
        """Features, as returned by `forward`, from summaries as returned by `summarise`."""
        seen, anchor = summary.split([self.rho.first.in_features, summary.shape[1] - self.rho.first.in_features], dim=1)
        return torch.cat([self.rho(seen), anchor], dim=1)

    def _features(self, flat: Tensor) -> Tensor:
        events, owner = self._events(flat)
        pooled, anchor = self.summaries(events, owner, len(flat))
        size = (torch.log1p(torch.bincount(owner, minlength=len(flat))) - 4.0) / 2.0
        return torch.cat([pooled, size[:, None].to(flat.dtype), anchor], dim=1)

    def summaries(self, events: Tensor, owner: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Inputs of the perceptron for n sets (n, n_pooled), and the anchor (n, d (d + 3) / 2)."""
        with torch.no_grad():
            counts = torch.bincount(owner, minlength=n).double()
            total = segment_sum(self.scores.phi(events), owner, n).double()
            psi = self.scores.psi(self.points.to(events.dtype)).double()
            log_l = total @ psi[:, :-1].T + counts[:, None] * psi[:, -1]
            log_l = log_l - log_l.amax(dim=1, keepdim=True)
            size = counts.clamp(min=1)[:, None]
            weights = [(log_l * size**-power).softmax(dim=1) for power in _POWERS]
            gaussians = torch.stack([self._moments(weights[0]), *(self._fit(log_l, w) for w in weights)], dim=1)
            held = torch.stack([1 / (w**2).sum(dim=1) for w in weights], dim=1)  # points that a weight is spread over
            enough = torch.cat([held[:, :1] >= _MANY, held[:, :-1] >= _SOME, torch.ones_like(held[:, :1], dtype=torch.bool)], dim=1)
            first = enough.to(torch.int64).argmax(dim=1)
            anchor = gaussians[torch.arange(n, device=first.device), first]
            narrow = torch.nonzero(first > 0).flatten()
            for _ in range(_ROUNDS if len(narrow) else 0):
                anchor[narrow] = self._refined(anchor[narrow], total[narrow], counts[narrow])
            relative = self._relative(gaussians, anchor[:, None]).flatten(start_dim=1)
            summary = torch.cat([total / size, relative, anchor, held[:, :1].log(), weights[0] @ self.bins], dim=1)
        return summary.to(events.dtype), anchor.to(events.dtype)

    def _refined(self, anchor: Tensor, total: Tensor, counts: Tensor) -> Tensor:
        """Moments of new points around the anchor (n, c) of each set, with importance weights (n, c): for narrow posteriors.

        If few of the points carry the weight, the weights are tempered.
        """
        d, n = self.dim, len(anchor)
        i, j = torch.tril_indices(d, d, offset=-1)
        a = torch.eye(d, dtype=anchor.dtype, device=anchor.device).repeat(n, 1, 1)
        a[:, i, j] = anchor[:, 2 * d :]
        a = anchor[:, d : 2 * d].exp()[:, :, None] * a
        v = _WIDER * self.near
        u = anchor[:, None, :d] + torch.linalg.solve_triangular(a, v.T.expand(n, d, len(v)), upper=False).transpose(1, 2)
        psi = self.scores.psi(u.flatten(end_dim=1).to(self.rho.first.weight.dtype)).to(u.dtype).view(n, len(v), -1)
        log_w = torch.einsum("nkr,nr->nk", psi[:, :, :-1], total) + counts[:, None] * psi[:, :, -1] - 0.5 * (u**2).sum(dim=2)
        log_w = log_w + 0.5 * (self.near**2).sum(dim=1)
        w = (log_w[:, None] * log_w.new_tensor(_TEMPERS)[:, None]).softmax(dim=2)
        enough = 1 / (w**2).sum(dim=2) >= _HELD
        enough[:, -1] = True
        w = w[torch.arange(n, device=w.device), enough.to(torch.int64).argmax(dim=1)]
        mean = w @ v
        centred = v - mean[:, None]
        spread = torch.einsum("nk,nki,nkj->nij", w, centred, centred) + 0.02 * torch.eye(d, dtype=w.dtype, device=w.device)
        place = anchor[:, :d] + torch.linalg.solve_triangular(a, mean[:, :, None], upper=False)[:, :, 0]
        return self._gaussian(place.clamp(-_REACH, _REACH), a.transpose(1, 2) @ torch.linalg.inv(spread) @ a)

    def _gaussian_of(self, found: Tensor, prior: Tensor, lowest: float) -> tuple[Tensor, Tensor]:
        """Mean (n, d) and precision (n, d, d) of exp(quadratic) with coefficients (n, n_basis), curvatures at least `lowest`."""
        d = self.dim
        i, j = torch.triu_indices(d, d)
        hessian = found.new_zeros(len(found), d, d)
        hessian[:, i, j] = -found[:, d + 1 :]
        hessian = hessian + hessian.transpose(1, 2)  # doubles the diagonal, the second derivative of u_i^2
        values, vectors = torch.linalg.eigh(hessian)
        values = values.clamp(lowest, _LARGEST) + prior
        precision = vectors @ (values[:, :, None] * vectors.transpose(1, 2))
        mean = (vectors @ ((vectors.transpose(1, 2) @ found[:, 1 : d + 1, None]) / values[:, :, None]))[:, :, 0]
        return mean, precision

    def _relative(self, gaussians: Tensor, anchor: Tensor) -> Tensor:
        """Gaussians (n, j, c) in units of the anchor (n, 1, c): shift of the mean in its widths, differences of the rest."""
        d = self.dim
        shift = (gaussians[:, :, :d] - anchor[:, :, :d]) * anchor[:, :, d : 2 * d].exp()
        return torch.cat([5 * torch.tanh(shift / 5), gaussians[:, :, d:] - anchor[:, :, d:]], dim=2).clamp(-10, 10)

    def _fit(self, log_l: Tensor, w: Tensor) -> Tensor:
        """Weighted quadratic fit to log likelihoods (n, K), with the prior -> `_gaussian` of precision and mean."""
        basis = _quadratic(self.points)
        products = (basis[:, :, None] * basis[:, None, :]).flatten(start_dim=1)
        normal = (w @ products).view(len(w), self.n_basis, self.n_basis)
        right = (w * log_l) @ basis
        ridge = 1e-9 * torch.eye(self.n_basis, dtype=w.dtype, device=w.device)
        found = torch.linalg.solve(normal + ridge, right[:, :, None])[:, :, 0]
        mean, precision = self._gaussian_of(found, torch.ones(self.dim, dtype=w.dtype, device=w.device), 0.0)
        return self._gaussian(mean.clamp(-_REACH, _REACH), precision)

    def _moments(self, w: Tensor) -> Tensor:
        """Mean and precision of the weighted points, as `_gaussian`."""
        mean = w @ self.points
        centred = self.points - mean[:, None]
        covariance = torch.einsum("nk,nki,nkj->nij", w, centred, centred)
        eye = torch.eye(self.dim, dtype=w.dtype, device=w.device)
        return self._gaussian(mean, torch.linalg.inv(covariance + 1e-6 * eye))

    def _gaussian(self, mean: Tensor, precision: Tensor) -> Tensor:
        """Mean, log diagonal of A, off-diagonal of A over the diagonal (n, d (d + 3) / 2), A^T A = precision, A lower triangular."""
        flipped = torch.linalg.cholesky(precision.flip(1, 2)).flip(1, 2)  # upper triangular U, U U^T = precision, so A = U^T
        a = flipped.transpose(1, 2)
        diagonal = torch.diagonal(a, dim1=1, dim2=2)
        i, j = torch.tril_indices(self.dim, self.dim, offset=-1)
        return torch.cat([mean, diagonal.log(), (a[:, i, j] / diagonal[:, i]).clamp(-20, 20)], dim=1)


class AnchoredFlow(ConditionalFlow):
    """Density of u by that of v = A (u - mean), given features whose last d (d + 3) / 2 columns are mean, log diagonal of A and the rest.

    Args: as `ConditionalFlow`, n_features with the anchor.
    """

    def __init__(self, dim: int, n_features: int, config: FlowConfig, *, rng: torch.Generator) -> None:
        self._size = dim * (dim + 3) // 2
        super().__init__(dim, n_features - self._size, config, rng=rng)
        self.anchor = GaussianLayer(dim)

    def contexts(self, features: Tensor) -> list[Tensor]:
        """The anchor's context, and those of the other layers."""
        mean, scale, lower = features[:, -self._size :].split([self.dim, self.dim, self._size - 2 * self.dim], dim=1)
        raw = _LIMIT * torch.atanh(scale.clamp(-0.99 * _LIMIT, 0.99 * _LIMIT) / _LIMIT)  # the inverse of the layer's tanh
        return [torch.cat([mean, raw, lower], dim=1), *super().contexts(features[:, : -self._size])]

    def encode(self, u: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """u (n, d) -> base z (n, d) and log|dz/du| (n,)."""
        v, first = self.anchor(u, contexts[0])
        z, rest = super().encode(v, contexts[1:])
        return z, first + rest

    def decode(self, z: Tensor, contexts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Base z (n, d) -> u (n, d) and log|du/dz| (n,)."""
        v, first = super().decode(z, contexts[1:])
        u, rest = self.anchor.inverse(v, contexts[0])
        return u, first + rest


def contrastive_loss(net: nn.Module, u: Tensor, x: Tensor) -> Tensor:
    """-log softmax over the parameters of the batch, of each set at its own (n,); least if L is log p(set | u) + a(set)."""
    assert isinstance(net, LikelihoodSet)
    return F.cross_entropy(net.table(x, u), torch.arange(len(u), device=u.device), reduction="none")
