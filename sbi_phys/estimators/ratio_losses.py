r"""Losses whose optimum is the log ratio f*(x, theta) = log p(x | theta) / p(x): one value per row, from log odds.

A row is a joint pair (x_i, theta_i), with log odds f_i, and K contrasts: x_i with other theta, log odds f_ik (where these are drawn from
q(theta | x) and not from the prior, f* = log p(theta | x) / q(theta | x)). s is the logistic function; every loss is least at the same
f*, they differ in how they get there.

carl, nre-a   -log s(f_i) - mean_k log(1 - s(f_ik))                                       arXiv:1506.02169, 1903.04057
bnre          carl + lambda (mean_i s(f_i) + mean_ik s(f_ik) - 1)^2, lambda = 100          arXiv:2208.13624
nre-c         which of K theta belongs to x, or none of them (odds 1 : gamma):              arXiv:2210.06170

    q(none | Theta, x) = K / (K + gamma sum_j e^f_j),      q(k | Theta, x) = gamma e^f_k / (K + gamma sum_j e^f_j)
    L = -[ log q(none | K contrasts) + gamma log q(own | own and K - 1 contrasts) ] / (1 + gamma)

At f* the balance mean s(joint) + mean s(marginal) = 1 holds; BNRE asks for it while f is still wrong, which makes f err on the side
of too wide a posterior. NRE-B (K-way softmax without "none") leaves a free function c(x) in f, so that no check of the mean ratio
applies to it: it is not offered.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["BALANCE_WEIGHT", "LOSSES", "PairLoss", "balance", "bnre_loss", "carl_loss", "nre_c_loss"]

PairLoss = Callable[[Tensor, Tensor], Tensor]

BALANCE_WEIGHT = 100.0


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
