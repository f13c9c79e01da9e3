r"""Moves of an ensemble sampler: differential evolution, a mode jump, snooker and stretch, in emcee's interface.

A walker x moves with the help of walkers z, z1, z2 of the other half of the ensemble, which stand still meanwhile:

- differential evolution: x' = x + g (z1 - z2), g = 2.38 / sqrt(2 d), the best scale for a Gaussian;
- mode jump: the same with g = 1, which carries a walker from one mode to the matching place of another;
- snooker: along the line through z, x' = x + 1.7 e (e . (z1 - z2)), e = (x - z) / |x - z|, accepted with the Jacobian
  of radial moves, (|x' - z| / |x - z|)^(d - 1);
- stretch: x' = z + s (x - z), affine-invariant.

The snooker move is written here because that of emcee 3.1.6 leaves the wrong distribution behind: it divides by sqrt(|x - z|)
and takes half of the Jacobian's exponent (on a standard normal in 8 dimensions E[x^2] comes out as 0.63 instead of 1; put right in
emcee's repository, pull request 531, after that release).

Source: ter Braak & Vrugt 2008, Stat. Comput. 18, 435; Nelson et al. 2014, arXiv:1311.5229; Goodman & Weare 2010.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["default_moves", "snooker_proposal"]

Array = NDArray[np.float64]


def snooker_proposal(x: Array, others: Array, rng: Any, gamma: float = 1.7) -> tuple[Array, Array]:
    """Propose along the lines through other walkers -> (x' (n, d), log acceptance factor (n,)).

    Args: x (n, d). others (m >= 3, d). rng: a numpy RandomState, emcee's.   Source: ter Braak & Vrugt 2008.
    """
    # three different helpers each: sort keys of a random matrix, first three places
    picks = np.argsort(rng.rand(x.shape[0], others.shape[0]), axis=1)[:, :3]
    z, z1, z2 = others[picks[:, 0]], others[picks[:, 1]], others[picks[:, 2]]
    away = x - z
    distance = np.maximum(np.linalg.norm(away, axis=1), 1e-300)
    direction = away / distance[:, None]
    moved = x + gamma * direction * ((z1 - z2) * direction).sum(axis=1, keepdims=True)
    after = np.maximum(np.linalg.norm(moved - z, axis=1), 1e-300)
    return moved, (x.shape[1] - 1.0) * (np.log(after) - np.log(distance))


def default_moves() -> list[tuple[Any, float]]:
    """Return emcee moves with their probabilities: 0.65 differential evolution, 0.1 mode jump, 0.1 snooker, 0.15 stretch."""
    from emcee import moves

    class Snooker(moves.RedBlueMove):
        """Snooker move with two halves (vectorised)."""

        def get_proposal(self, sample: Array, complement: list[Array], random: Any) -> tuple[Array, Array]:
            """Propose for one half from the other."""
            return snooker_proposal(sample, np.concatenate(complement), random)

    return [(moves.DEMove(), 0.65), (moves.DEMove(gamma0=1.0), 0.1), (Snooker(), 0.1), (moves.StretchMove(), 0.15)]
