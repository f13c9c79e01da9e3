import emcee
import numpy as np
import pytest

from sbi_phys.samplers.moves import default_moves, snooker_proposal


@pytest.mark.parametrize("d", [1, 3, 8])
def test_one_snooker_step_leaves_a_normal_distribution_as_it_is(d):
    random = np.random.RandomState(d)
    n = 100_000
    x, others = random.standard_normal((n, d)), random.standard_normal((40, d))
    moved, factor = snooker_proposal(x, others, random)
    log_ratio = factor - 0.5 * ((moved**2).sum(axis=1) - (x**2).sum(axis=1))
    accept = np.log(random.rand(n)) < log_ratio
    after = np.where(accept[:, None], moved, x)
    assert 0.1 < accept.mean() < 0.9
    # the change of the mean square, whose error is smaller than that of the mean square itself
    change = (after**2 - x**2).mean(axis=1)
    assert abs(change.mean()) < 4 * change.std() / np.sqrt(n)


def test_snooker_helpers_are_three_different_walkers():
    random = np.random.RandomState(0)
    x = random.standard_normal((500, 2))
    moved, factor = snooker_proposal(x, random.standard_normal((3, 2)), random)
    assert np.isfinite(factor).all()
    assert np.all(np.abs(moved - x).max(axis=1) > 0)


def test_default_moves_are_emcee_moves_with_weights_of_one():
    moves = default_moves()
    assert sum(w for _, w in moves) == pytest.approx(1)
    assert all(isinstance(m, emcee.moves.RedBlueMove) for m, _ in moves)
