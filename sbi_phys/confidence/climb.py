r"""Maxima of many functions at once over a box of any number of parameters: Newton steps from differences that are as large as the peak.

Around a point c, with a reach h_i in each parameter where ln L has changed by about 1/2, the 1 + d + d^2 values

    f(c), f(c +- h_i e_i), f(c +- (h_i e_i + h_j e_j))

give slope g and curvature H, and the step p = -H^-1 g (curvature of the wrong sign is turned round), kept within the box and within a few
reaches: a parameter that would leave is held at the end, and the others are solved for again. The reach then becomes 1 / sqrt(-H_ii).
With differences of that size rounding does not matter, so a likelihood learned in single precision will do; no derivative is asked
for. All data sets take their steps together, in one batch.

It climbs to the top of the peak it begins on: where there are several, the starts have to see the highest.

Source: Conn, Scheinberg & Vicente 2009, Introduction to Derivative-Free Optimization, chapters 3 and 10; bounds by an active set.
"""

from collections.abc import Callable

import numpy as np

from sbi_phys.core.types import Array, Integers, Mask

__all__ = ["climb"]

Values = Callable[[Integers, Array], Array]

CLOSE = 0.0005  # of f: what a step has to promise, or to give, for another one
MOST_STEPS = 40
TRUST = 6.0  # reaches that the first step may go; doubled where the quadratic was right, halved where it was not
SWEEPS = 10
SHARES = np.array([1.0, 0.4, 2.5])  # of the step that are tried
LEAST, WIDEST = 1e-5, 0.2  # of the box: reach


def climb(values: Values, start: Array, best: Array, low: Array, high: Array) -> tuple[Array, Array]:
    r"""Climb from a start for each of n functions, max_{low <= t <= high} f_i(t).

    Args: values: (rows (m,) of the n, points (m, j, d)) -> (m, j), -inf allowed. start (n, d), within the box; best (n,), f there.
        low, high (d,).
    Returns: largest values found (n,) and where, (n, d).
    Read: good to about 0.001 in f where f is smooth, to some hundredths where a flat ridge runs into a side of the box.
    """
    n, d = start.shape
    width, best, at = high - low, np.array(best), (start - low) / (high - low)
    reach, trust, todo = np.full((n, d), 0.05), np.full(n, TRUST), np.arange(n)
    stencil, answers = _stencil(d), np.zeros(n, dtype=np.int64)
    for _ in range(MOST_STEPS):
        h = reach[todo]
        centre = np.clip(at[todo], h, 1 - h)
        tried = centre[:, None] + stencil * h[:, None]
        f = values(todo, low + tried * width)
        ok: Mask = np.asarray(np.isfinite(f).all(axis=1))
        g, hessian = _quadratic(np.where(ok[:, None], f, 0.0), d)
        far = trust[todo, None]
        p = _step(g, hessian, -np.minimum(centre / h, far), np.minimum((1 - centre) / h, far))
        ends = np.clip(centre[:, None] + SHARES[:, None] * (p * h)[:, None], 0, 1)
        all_f = np.concatenate([f, values(todo, low + ends * width)], axis=1)
        all_t = np.concatenate([tried, ends], axis=1)
        each, k = np.arange(todo.size), all_f.argmax(axis=1)
        up: Mask = np.asarray(all_f[each, k] > best[todo])
        gain = np.where(up, all_f[each, k], 0.0) - np.where(up, best[todo], 0.0)
        at[todo[up]], best[todo[up]] = all_t[each, k][up], all_f[each, k][up]
        model = np.einsum("ni,ni->n", g, p) + 0.5 * np.einsum("ni,nij,nj->n", p, hessian, p)
        promised = np.where(ok, f[:, 0] + model - best[todo], 0.0)
        # a quadratic that does not know the value where it leads was drawn through points too far apart
        reached = all_f[:, len(stencil)]
        sure = ok & np.isfinite(reached) & (np.abs(np.where(ok, f[:, 0] + model - reached, 0.0)) < CLOSE)
        short = np.asarray((np.abs(p) > far - 1e-9).any(axis=1))  # the top may lie further on
        trust[todo] = np.clip(far[:, 0] * np.where(gain > promised / 2, 2.0, 0.5), 2.0, 1e4)
        curved = -np.diagonal(hessian, axis1=1, axis2=2)
        # the conditional error in each parameter; where there is no peak yet, wider if that helped and closer if it did not
        fit = np.where(curved > 1e-6, h / np.sqrt(np.maximum(curved, 1e-6)), h * np.where(gain > CLOSE, 2.0, 0.4)[:, None])
        fit = np.where((sure | short | (gain > CLOSE))[:, None], np.clip(fit, h / 10, 3 * h), 0.4 * h)
        reach[todo] = np.clip(fit, LEAST, WIDEST)
        done = (sure & ~short) | (h <= 1.01 * LEAST).all(axis=1)
        done &= (gain < CLOSE) & (promised < CLOSE)
        # once more from points further apart: along a flat and bent ridge the first answer may be early
        reach[todo[done]] = np.minimum(2.5 * reach[todo[done]], WIDEST)
        answers[todo] += done
        todo = todo[answers[todo] < 2]
        if todo.size == 0:
            break
    return best, low + at * width


def _stencil(d: int) -> Array:
    """Offsets (1 + d + d^2, d) in units of the reach: the centre, each side, and pairs."""
    one = np.eye(d)
    pairs = [one[i] + one[j] for i in range(d) for j in range(i)]
    both = np.array(pairs).reshape(-1, d)
    return np.concatenate([np.zeros((1, d)), one, -one, both, -both])


def _quadratic(f: Array, d: int) -> tuple[Array, Array]:
    """Slope (n, d) and curvature (n, d, d), in units of the reach, of the quadratic through values (n, j) on the stencil."""
    middle, plus, minus = f[:, 0], f[:, 1 : 1 + d], f[:, 1 + d : 1 + 2 * d]
    # on both sides, so that what is of third order drops out: else it drowns the curvature along a flat ridge
    pairs = f[:, 1 + 2 * d :].reshape(len(f), 2, -1).mean(axis=1)
    sides = (plus + minus) / 2
    hessian = np.zeros((len(f), d, d))
    hessian[:, np.arange(d), np.arange(d)] = plus + minus - 2 * middle[:, None]
    column = 0
    for i in range(d):
        for j in range(i):
            hessian[:, i, j] = hessian[:, j, i] = pairs[:, column] - sides[:, i] - sides[:, j] + middle
            column += 1
    return (plus - minus) / 2, hessian


def _step(g: Array, hessian: Array, low: Array, high: Array) -> Array:
    """Step (n, d) to the top of each quadratic within low..high (n, d): parameters are held at an end, and let go where it draws back."""
    n, d = g.shape
    value, vector = np.linalg.eigh(hessian)
    # too flat a direction would send the step to the end of the box on rounding alone
    concave = np.einsum("nij,nj,nkj->nik", vector, -np.maximum(np.abs(value), 1e-3), vector)
    p, held = np.zeros((n, d)), np.zeros((n, d), dtype=bool)
    for _ in range(2 * d):
        free = ~held
        matrix = np.where(free[:, :, None] & free[:, None, :], concave, 0.0)
        matrix[:, np.arange(d), np.arange(d)] += np.where(free, 0.0, -1.0)
        right = np.where(free, -(g + np.einsum("nij,nj->ni", concave, np.where(held, p, 0.0))), -p)
        p = np.linalg.solve(matrix, right[..., None])[..., 0]
        out = free & ((p < low) | (p > high))
        p = np.clip(p, low, high)
        slope = g + np.einsum("nij,nj->ni", concave, p)
        back = held & np.where(p >= high, slope < 0, slope > 0)
        if not (out | back).any():
            break
        held = (held | out) & ~back
    for _ in range(SWEEPS):  # where that went round in circles: uphill one by one, which never does harm
        for i in range(d):
            slope = g[:, i] + np.einsum("nj,nj->n", concave[:, i], p)
            p[:, i] = np.clip(p[:, i] - slope / concave[:, i, i], low[:, i], high[:, i])
    return p
