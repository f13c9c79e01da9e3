r"""Neural ratio estimation: log r(x | theta) = log p(x | theta) - log p(x), from a classifier of pairs.

Joint pairs (theta, x) ~ p(theta) p(x | theta) are told apart from marginal pairs ~ p(theta) p(x). The log odds of the best classifier
are log r, for every x and theta at once (network: `nets.classifier`). Then

    p(theta | x) = p(theta) r(x | theta),      p(theta | {x_e}) proportional to p(theta) prod_e r(x_e | theta)

for one observation and for a set of independent events. r is a likelihood up to a factor that does not depend on theta, so that it also
serves for likelihood ratios and confidence sets; E_{x ~ p(x)}[r(x | theta)] = 1 for every theta is tested by `calibration.ratios`.

Losses. A row is a joint pair (x_i, theta_i), with log odds f_i, and K contrasts: x_i with other theta, log odds f_ik. s is the logistic
function; every loss has its minimum at the same f* = log r:

    carl, nre-a   -log s(f_i) - mean_k log(1 - s(f_ik))                                       arXiv:1506.02169, 1903.04057
    bnre          carl + lambda (mean_i s(f_i) + mean_ik s(f_ik) - 1)^2, lambda = 100          arXiv:2208.13624
    nre-c         which of K theta belongs to x, or none of them (odds 1 : gamma):              arXiv:2210.06170

        q(none | Theta, x) = K / (K + gamma sum_j e^f_j),      q(k | Theta, x) = gamma e^f_k / (K + gamma sum_j e^f_j)
        L = -[ log q(none | K contrasts) + gamma log q(own | own and K - 1 contrasts) ] / (1 + gamma)

At f* the balance mean s(joint) + mean s(marginal) = 1 holds; BNRE also enforces it during the training, which makes errors of f lead to
wider posteriors. NRE-B (K-way softmax without "none") leaves a free function c(x) in f, so that no test of the mean ratio applies to it:
it is not offered.

Narrow posteriors. Where a posterior is much narrower than the prior, few marginal pairs fall near it, and distant ones teach nothing:

- The contrasts theta' of a row come from q(theta' | x), half the prior (other rows' theta) and half a widened Gaussian posterior that is
  learned at the same time. The classifier's log odds are then log p(theta | x) / q(theta | x), and
  f = log odds + log q(theta | x) / p(theta) is log r for any q: q decides how well f is learned, not what is learned.
- f starts from a reference, the log ratio of Gaussians learned by maximum likelihood (`nets.classifier`); the classifier corrects it.

The mean over the prior, integral p(theta) r(x | theta) dtheta = 1, holds for the exact ratio at every x. A learned r has a mean
m(x) = E_prior[r(x | theta)] instead, and r(x | theta) / m(x) obeys the identity. A factor of x alone changes no posterior, but it is what
a network learns worst: in the exact log ratio it is -log p(x), a steep function of all columns. So m is computed, not learned, by
importance sampling in whitened space, for many x at once: the first round draws from the prior and from the networks' Gaussians, widened;
each further round adds Gaussians fitted to the weighted draws so far, for those x that need it. All draws of an x are weighted with the
mixture that they were drawn from,

    w_i = r(x | u_i) N(u_i; 0, I) / q(u_i),     q = sum_j (n_j / n) q_j,     m = mean(w),     n_eff = (sum w)^2 / sum w^2,

and rounds end at `WANTED` effective draws; where sixteen rounds do not suffice, tempering (`samplers.tempering`) finds a mixture. Points
of a round are a Sobol sequence, shifted at random for each x, so that the error quoted, that of independent draws,
sqrt((1 / n_eff - 1 / n) n / (n - 1)), is conservative. A mode that neither the Gaussians nor a draw of the prior reaches is not seen.

Source: Hermans, Begy & Louppe 2019, arXiv:1903.04057; Miller et al. 2022, arXiv:2210.06170; Delaunoy et al. 2022, arXiv:2208.13624;
Cornuet et al. 2012, arXiv:0907.1254 (adaptive multiple importance sampling).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from scipy.special import logsumexp, ndtri
from torch import Tensor
from torch.nn import functional as F

from sbi_phys.core.checks import as_matrix, require_choice, require_int
from sbi_phys.core.errors import ConvergenceError, DataError, SettingError, ShapeError
from sbi_phys.core.figures import figures
from sbi_phys.core.progress import Progress
from sbi_phys.core.results import Result, Rows
from sbi_phys.core.rng import rng_for
from sbi_phys.core.types import Array, ArrayLike, Integers
from sbi_phys.estimators.base import Estimator, Shared
from sbi_phys.estimators.density_sampling import PosteriorDraws, sample_posterior
from sbi_phys.estimators.other_priors import require_within
from sbi_phys.nets.classifier import NEAR, REFERENCES, ClassifierConfig, PairClassifier, Parts
from sbi_phys.nets.embedding_vector import is_own
from sbi_phys.priors import Prior, standard_normal_log_prob
from sbi_phys.samplers.importance import Proposal, effective_size
from sbi_phys.samplers.mixture import Mixture
from sbi_phys.samplers.tempering import temper
from sbi_phys.training.scaling import XScaler

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BALANCE_WEIGHT", "LOSSES", "NRE", "PriorMean", "balance", "bnre_loss", "carl_loss", "mean_over_prior", "nre_c_loss"]

PairLoss = Callable[[Tensor, Tensor], Tensor]
Gaussians = tuple[Array, Array]  # means (n, k, d), lower triangular factors (n, k, d, d), k of them for each x

BALANCE_WEIGHT = 100.0
# effective draws at which rounds end, below which tempering is tried after the last of them, and below which a mean is not trusted
WANTED, ENOUGH, LEAST = 400.0, 100.0, 50.0
_FROM_PRIOR = 0.25  # share of the first round
_WIDTHS = (1.1, 2.0)
_ROUNDS = 16
_FIT = 12.0  # effective draws that a Gaussian is fitted to, if need be with tempered weights
_PAIRS = {"cpu": 8192, "cuda": 262144}  # pairs at a time: bounded memory, and on a CPU the working set stays in the cache
_X_ROWS = 8192
_CONTRASTS = 8
_COLUMNS = 64  # most columns whose Gaussian with full covariance is the default reference


def carl_loss(joint: Tensor, contrast: Tensor) -> Tensor:
    """Cross entropy of joint against marginal pairs: joint (n,), contrast (n, K) -> (n,)."""
    return F.softplus(-joint) + F.softplus(contrast).mean(dim=1)


def balance(joint: Tensor, contrast: Tensor) -> Tensor:
    """Mean classifier output over joint pairs plus that over marginal ones, less one: 0 at the optimum."""
    return torch.sigmoid(joint).mean() + torch.sigmoid(contrast).mean() - 1


def bnre_loss(joint: Tensor, contrast: Tensor, weight: float = BALANCE_WEIGHT) -> Tensor:
    """Cross entropy with the batch's balance as a penalty, which is added to every row -> (n,)."""
    return carl_loss(joint, contrast) + weight * balance(joint, contrast) ** 2


def nre_c_loss(joint: Tensor, contrast: Tensor, gamma: float = 1.0) -> Tensor:
    """Contrastive loss over K theta and none: joint (n,), contrast (n, K) -> (n,)."""
    k = contrast.shape[1]
    own = torch.cat([joint[:, None], contrast[:, : k - 1]], dim=1)
    log_none = math.log(k) - _log_norm(contrast, gamma)
    log_own = math.log(gamma) + joint - _log_norm(own, gamma)
    return -(log_none + gamma * log_own) / (1 + gamma)


def _log_norm(logits: Tensor, gamma: float) -> Tensor:
    """log(K + gamma sum_k e^f_k) of (n, K) -> (n,)."""
    none = logits.new_full((len(logits), 1), math.log(logits.shape[1]))
    return torch.logsumexp(torch.cat([none, logits + math.log(gamma)], dim=1), dim=1)


LOSSES: dict[str, PairLoss] = {"carl": carl_loss, "nre-a": carl_loss, "nre-c": nre_c_loss, "bnre": bnre_loss}


class NRE(Estimator):
    """Amortised likelihood-to-evidence ratio r(x | theta).

    Args:
        prior: over theta; the network sees theta in its whitening map.
        loss: 'carl' (the same as 'nre-a'), 'nre-c' or 'bnre', see the module.
        network: of the part that sees pairs; None takes a trunk of width 64 and 32 products.
        reference: 'posterior', 'likelihood' (see `nets.classifier`) or 'auto': the latter for up to 64 columns of numbers, the former where
            there are more, where values may be missing, or where the embedding is a module.
        n_ensemble: networks, trained with different seeds and splits; log r is the mean of theirs, so that their factors of x alone, which
            differ by nats, do not favour one network for each x.
        contrast: other theta per joint pair; None takes 8.
        Others as `BaseEstimator`.
    The theta of `fit` must be draws of the prior: p(x) is the mean of p(x | theta) over them. Weights count joint pairs alone: with
    E[w | theta] = 1 the ratio is that of w p(x | theta).
    Raises: SettingError.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.NormalPrior([sp.Parameter("mu")]), np.random.default_rng(0)
    >>> theta = prior.sample(200, rng)
    >>> nre = sp.NRE(prior, config=sp.TrainConfig(max_epochs=2)).fit(theta, theta + rng.standard_normal((200, 1)))
    >>> nre.log_ratio([0.3], theta[:4]).shape
    (4,)
    """

    takes = "draws of the prior"
    _nets: list[PairClassifier]

    def __init__(
        self,
        prior: Prior,
        *,
        loss: str = "carl",
        network: ClassifierConfig | None = None,
        reference: str = "auto",
        contrast: int | None = None,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(prior, **shared)
        if network is not None and not isinstance(network, ClassifierConfig):
            raise SettingError(f"network is a {type(network).__name__}; expected None or ClassifierConfig(...)")
        self.loss = require_choice("loss", loss, LOSSES)
        self.network = network or ClassifierConfig()
        self.reference = require_choice("reference", reference, ("auto", *REFERENCES))
        self.contrast = _CONTRASTS if contrast is None else require_int("contrast", contrast, low=1)

    def build(self, scaler: Any, seed: int) -> PairClassifier:
        """Classifier of pairs with its Gaussian reference."""
        shape = scaler.shape
        gaps = isinstance(scaler, XScaler) and bool(scaler.missing.any())
        if gaps and self.reference == "likelihood":
            raise SettingError("reference is 'likelihood', a Gaussian of all columns, and values of x may be missing; expected 'posterior'")
        columns = len(shape) == 1 and shape[0] <= _COLUMNS and not gaps and not is_own(self.embedding)
        kind = self.reference if self.reference != "auto" else "likelihood" if columns else "posterior"
        return PairClassifier(self.prior.free_dim, shape, self.network, self.embedding, seed=seed, reference=kind)

    def row_loss(self, net: PairClassifier, u: Tensor, x: Tensor) -> Tensor:
        """Loss of the classifier, and minus the log likelihood of the Gaussians."""
        # the same contrasts in every validation
        generator = None if net.training else torch.Generator(device=x.device).manual_seed(0)
        # the balance of BNRE is that between joint and marginal pairs
        near = 0.0 if self.loss == "bnre" else NEAR
        joint, contrast, learned = net.with_contrasts(x, u, self.contrast, generator, near=near)
        return LOSSES[self.loss](joint, contrast) - learned

    def log_ratio(self, x: ArrayLike | Tensor, theta: ArrayLike | Tensor, *, event_set: bool = False, normalise: bool = False) -> Array:
        """Log r(x | theta) = log p(x | theta) - log p(x), nats -> (m,).

        Args: theta (m, d), prior units. x: one observation (k,) for all theta, or m paired ones (m, k), all at one theta if there is one;
        with event_set=True the (n_events, k) events of one data set, whose log ratios are added up for every theta. normalise: divide r
        by its mean over the prior at each x (`prior_mean`), which is 1 for the exact ratio; needed if r itself is used, and not only its
        dependence on theta.
        Raises: SupportError (a theta outside the prior, where nothing was learned), ShapeError, NonFiniteError, DataError,
        ConvergenceError (as `prior_mean`).
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        if len(array) == 1 and event_set is False:
            array = np.repeat(array, len(self._observations(x)), axis=0)
        found = self._density(x, event_set, len(array)).log_ratio(self._u(array))
        if not normalise:
            return found
        mean = self.prior_mean(x).log_mean
        return found - (mean.sum() if event_set else mean)

    def prior_mean(self, x: ArrayLike | Tensor, *, n_draws: int = 512, seed: int = 0) -> "PriorMean":
        """Mean over the prior of r(x | theta), 1 for the exact ratio, at each of n observations x, (k,) or (n, k).

        Args: n_draws: of a round of importance sampling for each x, a power of two. seed: of the draws.
        Raises: ConvergenceError (where the ratio has its mass was not found), ShapeError, NonFiniteError, DataError, SettingError.
        Read: log_mean is what `log_ratio(..., normalise=True)` takes off, and the log evidence that `posterior` states.
        """
        n_draws, seed = require_int("n_draws", n_draws, low=64), require_int("seed", seed, low=0)
        if n_draws & (n_draws - 1):
            raise SettingError(f"n_draws is {n_draws}; expected a power of two")
        inputs, step = self._observations(x), max(1, _PAIRS["cpu"] // n_draws)
        found = []
        for first in range(0, len(inputs), step):
            part = inputs[first : first + step]
            density = _Density(self._nets, [net.x_parts(part) for net in self._nets], False)
            found.append(mean_over_prior(density.log_ratios, _gaussians(self._nets, part), n_draws=n_draws, seed=seed, first=first))
        return joined(found)

    def _observations(self, x: ArrayLike | Tensor, what: str = "observations") -> Tensor:
        """Scaled x (n, ...), at least one."""
        inputs, _ = self._inputs(x)
        if len(inputs) == 0:
            raise DataError(f"x has shape {np.shape(x)}, no {what}; expected at least one")
        return inputs

    def _density(self, x: ArrayLike | Tensor, event_set: bool, n_theta: int | None = None) -> "_Density":
        """The ratio as a function of theta, x embedded; n_theta None: x must be one observation or one set."""
        if not isinstance(event_set, bool):
            raise SettingError(f"event_set is {event_set!r}; expected True or False")
        inputs = self._observations(x, "events" if event_set else "observations")
        if not event_set and len(inputs) != 1 and len(inputs) != n_theta:
            paired = "" if n_theta is None else f", or {n_theta}, as many as theta"
            raise ShapeError(f"x holds {len(inputs)} observations; expected one{paired}; event_set=True takes x as one set of events")
        with torch.no_grad():
            parts = [_joined([net.x_parts(part) for part in inputs.split(_X_ROWS)]) for net in self._nets]
        return _Density(self._nets, parts, event_set)

    def sample(
        self,
        x: ArrayLike | Tensor,
        n: int,
        *,
        seed: int = 0,
        event_set: bool = False,
        prior: Prior | None = None,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> Array:
        """Draw theta (n, d) from p(theta | x) for one observation x (k,) or one set of events (n_events, k), prior units.

        Args and Raises: as `posterior`, whose diagnostics are left out here (a sampler that fails raises all the same).
        """
        return self.posterior(x, n, seed=seed, event_set=event_set, prior=prior, method=method, proposal=proposal, progress=progress).theta

    def posterior(
        self,
        x: ArrayLike | Tensor,
        n: int,
        *,
        seed: int = 0,
        event_set: bool = False,
        prior: Prior | None = None,
        method: str = "auto",
        proposal: Proposal | None = None,
        progress: Progress | None = None,
    ) -> PosteriorDraws:
        """Draws of p(theta | x) proportional to p(theta) r(x | theta), with the sampler's diagnostics.

        Args: prior: in place of that of the training, without mass outside it. method: 'auto', 'importance', 'emcee', 'hmc' (with the
        prior of the training) or 'grid'. proposal: over u, e.g. `NPE.proposal(x)`; both as in `sample_posterior`.
        Raises: ConvergenceError, SupportError (the other prior has mass where nothing was learned), SimulatorMismatchError, ShapeError,
        NonFiniteError, DataError, SettingError.
        """
        density = self._density(x, event_set)

        def log_likelihood(theta: Array) -> Array:
            return density.log_ratio(self._u(theta))

        def gradient(u: Array) -> tuple[Array, Array]:
            return density.with_gradient(torch.from_numpy(u.astype(np.float32)).to(self.device))

        return sample_posterior(
            log_likelihood,
            self.prior if prior is None else require_within(self.prior, prior),
            n,
            seed=seed,
            method=method,
            proposal=proposal,
            gradient=gradient if prior is None else None,
            progress=progress,
        )

    def log_ratio_pairs(self, theta: ArrayLike | Tensor, x: ArrayLike | Tensor, *, normalise: bool = False) -> tuple[Array, Array]:
        """Log r of held-out joint pairs, theta (n, d) and x (n, ...), and of marginal pairs made by moving theta one row on -> (n,) twice.

        They are the numerator and the reference of `calibration.ratios`; the rows must be in no particular order. normalise: as for
        `log_ratio`; the checks judge r itself, so that what they are to say of a normalised ratio needs it.   Raises: as `log_ratio`.
        """
        array = as_matrix("theta", theta, self.prior.dim, self.prior.names)
        mean = self.prior_mean(x).log_mean if normalise else 0.0
        return self.log_ratio(x, array) - mean, self.log_ratio(x, np.roll(array, -1, axis=0)) - mean


class _Density:
    """Log ratio of embedded x as a function of u: the mean over the members."""

    def __init__(self, nets: Sequence[PairClassifier], parts: Sequence[Parts], event_set: bool) -> None:
        self._nets, self._parts, self._event_set = nets, parts, event_set
        self._n = len(parts[0][0])

    @torch.inference_mode()
    def log_ratio(self, u: Tensor) -> Array:
        """u (m, d') -> (m,)."""
        out = torch.zeros(len(u), dtype=torch.float64)
        self._each_chunk(u, lambda rows, value: out[rows].add_(value.cpu()))
        return out.numpy()

    @torch.inference_mode()
    def log_ratios(self, u: Array, rows: Integers) -> Array:
        """u (m, k, d'), k for each of the observations rows (m,) -> (m, k)."""
        device = self._parts[0][0].device
        flat, owner = torch.from_numpy(u.reshape(-1, u.shape[-1]).astype(np.float32)), torch.from_numpy(np.repeat(rows, u.shape[1]))
        step = _PAIRS.get(device.type, _PAIRS["cpu"])
        chunks = zip(flat.split(step), owner.split(step), strict=True)
        return torch.cat([self._pairs(a.to(device), b.to(device), slice(None)).cpu() for a, b in chunks]).view(u.shape[:2]).numpy()

    def with_gradient(self, u: Tensor) -> tuple[Array, Array]:
        """u (m, d') -> log ratio (m,) and its gradient in u (m, d')."""
        u = u.requires_grad_()
        out, gradient = torch.zeros(len(u), dtype=torch.float64), torch.zeros(u.shape, dtype=torch.float64)

        def add(rows: slice, value: Tensor) -> None:
            out[rows] += value.detach().cpu()
            gradient[rows] += torch.autograd.grad(value.sum(), u)[0][rows].double().cpu()

        self._each_chunk(u, add)
        return out.numpy(), gradient.numpy()

    def _each_chunk(self, u: Tensor, add: Callable[[slice, Tensor], Any]) -> None:
        """Call add(rows, log ratio) for chunks of pairs; events of a set come in several chunks, to be added up."""
        most = _PAIRS.get(u.device.type, _PAIRS["cpu"])
        n_events = min(self._n, most) if self._event_set else 1
        step = max(1, most // n_events)
        for start in range(0, len(u), step):
            rows = slice(start, min(start + step, len(u)))
            for first in range(0, self._n if self._event_set else 1, n_events):
                value = self._pairs(u[rows], rows, slice(first, first + n_events))
                add(rows, value.sum(dim=1) if self._event_set else value)

    def _pairs(self, u: Tensor, rows: slice | Tensor, events: slice) -> Tensor:
        """Log ratio of theta rows and events, (m,) or (m, e), double."""
        logs = []
        for net, (trunk, products, context) in zip(self._nets, self._parts, strict=True):
            theta = net.theta_parts(u)
            chosen = events if self._event_set else slice(None) if self._n == 1 else rows
            x = trunk[chosen], products[chosen], context[chosen]
            logs.append((net.table(x, theta) if self._event_set else net.log_odds(x, theta)).double())
        return logs[0] if len(logs) == 1 else torch.stack(logs).mean(dim=0)


def _joined(parts: Sequence[Parts]) -> Parts:
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts])


@torch.no_grad()
def _gaussians(nets: Sequence[PairClassifier], x: Tensor) -> Gaussians:
    """The networks' Gaussian posteriors of scaled x (n, ...): means (n, k, d'), factors (n, k, d', d'), one of each network."""
    means, factors = [], []
    for net in nets:
        assert net.proposal is not None
        part, d = net.proposal.x_part(net.embedding(x), x), net.dim
        mean = net.proposal.draw(part, part.new_zeros(len(x), 1, d))
        columns = net.proposal.draw(part, torch.eye(d, dtype=part.dtype, device=part.device).expand(len(x), d, d)) - mean
        means.append(mean)
        factors.append(columns.transpose(1, 2)[:, None])
    return torch.cat(means, dim=1).double().cpu().numpy(), torch.cat(factors, dim=1).double().cpu().numpy()


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorMean(Result):
    """Mean of a ratio over the prior for n observations: log_mean (n,), nats, with error (n,); n_effective (n,) of n_draws (n,) draws.

    Returned by `NRE.prior_mean`.

    >>> import numpy as np, sbi_phys as sp
    >>> prior, rng = sp.NormalPrior([sp.Parameter("mu")]), np.random.default_rng(0)
    >>> theta = prior.sample(200, rng)
    >>> nre = sp.NRE(prior, config=sp.TrainConfig(max_epochs=2)).fit(theta, theta + rng.standard_normal((200, 1)))
    >>> mean = nre.prior_mean([[0.3], [1.0]])
    >>> type(mean).__name__, mean.log_mean.shape
    ('PriorMean', (2,))
    """

    log_mean: Array
    error: Array
    n_effective: Array
    n_draws: Integers

    def rows(self) -> Rows:
        """Return the table: one row for each observation."""
        found = {"log_mean": self.log_mean, "log_mean_err": self.error, "n_effective": self.n_effective, "n_draws": self.n_draws}
        return Rows.of({"observation": np.arange(len(self.log_mean))} | found, {"log_mean": "nats", "log_mean_err": "nats"})

    def summary(self) -> str:
        """Return the result in words."""
        rms = float(np.sqrt((self.log_mean**2).mean()))
        return (
            f"log of the mean ratio over the prior, {len(self.log_mean)} observations: rms {rms:.3g} nats, largest"
            f" {np.abs(self.log_mean).max():.3g} (0 if the ratio is exact); Monte Carlo error at most {self.error.max():.2g},"
            f" at least {self.n_effective.min():.0f} effective draws"
        )

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the log of the mean ratio of each observation with its error.   Read: at 0 within errors = exact."""
        rows = [str(i) for i in range(len(self.log_mean))]
        return figures.results.forest(rows, self.log_mean, self.error, ax, line=0.0, xlabel="log mean ratio [nats]")


def mean_over_prior(
    log_ratio: Callable[[Array, Integers], Array], start: Gaussians, *, n_draws: int, seed: int, first: int = 0, wanted: float = WANTED
) -> PriorMean:
    """Mean over N(u; 0, I) of exp(log_ratio) for n observations.

    Args: log_ratio: u (m, k, d) and which observations (m,) -> log r (m, k), nats; -inf allowed. start: Gaussians near the posteriors.
    n_draws: of a round, a power of two. seed; first: number of the first observation, whose draws follow from (seed, number).
    wanted: effective draws at which an observation is done.
    Raises: ConvergenceError (fewer than `LEAST` effective draws: where the ratio has its mass was not found), DataError (r is 0).
    """
    from scipy.stats.qmc import Sobol  # takes long to import: only when used

    n, _, d = start[0].shape
    states = [_State(d, [(start[0][i], width * start[1][i]) for width in _WIDTHS]) for i in range(n)]
    todo = np.arange(n)
    for turn in range(_ROUNDS):
        unit = Sobol(d, seed=rng_for(seed, "mean ratio", turn)).random_base2(n_draws.bit_length() - 1)
        shift = np.stack([rng_for(seed, "shift", turn, first + int(i)).random(d) for i in todo])
        z = ndtri(np.clip((unit + shift[:, None]) % 1.0, 1e-12, 1 - 1e-12))
        u = np.stack([states[i].draw(z_i) for i, z_i in zip(todo, z, strict=True)])
        for i, u_i, value in zip(todo, u, log_ratio(u, todo), strict=True):
            states[i].add(u_i, value)
        todo = np.array([i for i in todo if states[i].n_effective < wanted], dtype=np.int64)
        if not len(todo):
            break
    log_w = [s.log_w for s in states]
    for i in (i for i in todo if effective_size(log_w[i]) < ENOUGH):
        other = _by_tempering(log_ratio, int(i), d, _ROUNDS * n_draws, rng_for(seed, "tempering", first + int(i)))
        log_w[i] = max(log_w[i], other, key=effective_size)
        if effective_size(log_w[i]) < LEAST:
            raise ConvergenceError(
                f"the mean of the ratio over the prior at observation {first + i}: {len(log_w[i])} draws are worth"
                f" {effective_size(log_w[i]):.1f}; expected at least {LEAST:g}: the ratio has narrow peaks that no Gaussians follow"
            )
    size, ess = np.array([len(w) for w in log_w]), np.array([effective_size(w) for w in log_w])
    return PriorMean(
        log_mean=np.array([logsumexp(w) - math.log(len(w)) for w in log_w]),
        error=np.sqrt(np.maximum(1 / ess - 1 / size, 0.0) * size / (size - 1)),
        n_effective=ess,
        n_draws=size.astype(np.int64),
    )


def _by_tempering(log_ratio: Callable[[Array, Integers], Array], i: int, dim: int, n: int, rng: np.random.Generator) -> Array:
    """Log weights (n,) of draws of a mixture that tempering finds: for peaks that a single Gaussian does not follow."""

    def log_r(u: Array) -> Array:
        return log_ratio(u[None], np.array([i]))[0]

    proposal = temper(log_r, dim, rng).proposal
    u = proposal.sample(n, rng)
    return log_r(u) + standard_normal_log_prob(u) - proposal.log_prob(u)


def joined(parts: Sequence[PriorMean]) -> PriorMean:
    """Results of parts of the observations, one after the other."""
    return PriorMean(
        log_mean=np.concatenate([p.log_mean for p in parts]),
        error=np.concatenate([p.error for p in parts]),
        n_effective=np.concatenate([p.n_effective for p in parts]),
        n_draws=np.concatenate([p.n_draws for p in parts]),
    )


class _State:
    """Draws of one observation, and the mixture that they are from."""

    def __init__(self, dim: int, start: list[tuple[Array, Array]]) -> None:
        self.dim, self.start = dim, start  # components of the first round: means (k, d) and factors (k, d, d)
        self.u = np.empty((0, dim))
        self.log_target = np.empty(0)  # log r + log N(u; 0, I)
        self.components: list[tuple[float, Array, Array]] = []  # number of draws, mean (d,), factor (d, d)
        self.log_w = np.empty(0)  # log of target over mixture
        self.n_effective = 0.0

    def draw(self, z: Array) -> Array:
        """Draws of the round (m, d) from standard normal points z (m, d)."""
        if not self.components or self.n_effective == 0:
            parts = [(np.zeros(self.dim), np.eye(self.dim))]
            parts += [(m, f) for means, factors in self.start for m, f in zip(means, factors, strict=True)]
            from_prior = int(_FROM_PRIOR * len(z))
        else:
            mean, factor = _fitted(self.u, self.log_w)
            parts, from_prior = [(mean, width * factor) for width in _WIDTHS], 0
        sizes = [len(a) for a in np.array_split(z[from_prior:], len(parts) - (from_prior > 0))]
        sizes = [from_prior, *sizes] if from_prior else sizes
        chunks = np.split(z, np.cumsum(sizes)[:-1])
        self.components += [(float(len(c)), m, f) for c, (m, f) in zip(chunks, parts, strict=True)]
        return np.concatenate([m + c @ f.T for c, (m, f) in zip(chunks, parts, strict=True)])

    def add(self, u: Array, log_ratio: Array) -> None:
        """Take in log r (m,) of draws (m, d)."""
        self.u = np.concatenate([self.u, u])
        self.log_target = np.concatenate([self.log_target, log_ratio + standard_normal_log_prob(u)])
        counts, means, factors = (np.array(part, dtype=np.float64) for part in zip(*self.components, strict=True))
        self.log_w = self.log_target - Mixture(weights=counts / counts.sum(), means=means, factors=factors).log_prob(self.u)
        self.n_effective = effective_size(self.log_w)


def _fitted(u: Array, log_w: Array) -> tuple[Array, Array]:
    """Mean (d,) and Cholesky factor (d, d) of weighted draws, the weights tempered until `_FIT` draws count."""
    log_w = np.where(np.isneginf(log_w), log_w[np.isfinite(log_w)].min() - 1e3, log_w)
    power = 1.0
    while effective_size(power * log_w) < min(_FIT, 0.5 * len(log_w)):
        power *= 0.7
    w = np.exp(power * (log_w - log_w.max()))
    w /= w.sum()
    mean = w @ u
    covariance = (u - mean).T @ ((u - mean) * w[:, None])
    scale = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    correlation = covariance / np.outer(scale, scale) + 1e-6 * np.eye(len(mean))
    return mean, scale[:, None] * np.linalg.cholesky(correlation)
