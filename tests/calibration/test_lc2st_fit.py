import numpy as np
import pytest

from sbi_phys.calibration.lc2st_features import Terms
from sbi_phys.calibration.lc2st_fit import Classifier, _exchanged, _latent_rows, check_kind, fit_all
from sbi_phys.core.errors import SettingError


def test_exchange_keeps_each_row_and_gives_each_member_the_first_place_equally_often():
    rows = np.arange(3000.0).reshape(1000, 3, 1)
    np.testing.assert_array_equal(_exchanged(rows, 0, np.random.default_rng(0)), rows)
    exchanged = _exchanged(rows, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sort(exchanged, axis=1), rows)
    counts = np.bincount((exchanged[:, 0, 0] % 3).astype(int))
    assert np.all(np.abs(counts - 1000 / 3) < 4 * np.sqrt(1000 * 2 / 9))


def test_null_rows_replace_the_latent_variables_and_the_observed_ones_stay():
    z = np.full((50, 1, 2), 7.0)
    observed, null = (_latent_rows(z, 2, index, np.random.default_rng(1)) for index in (0, 1))
    assert observed.shape == null.shape == (50, 3, 2)
    assert np.all(observed[:, 0] == 7)
    assert np.abs(null).max() < 6


def test_ensembles_are_keyed_by_their_number():
    rng = np.random.default_rng(2)
    rows, u = rng.standard_normal((100, 1, 1)), rng.standard_normal((100, 1))
    kind = Classifier(kind="quadratic", terms=Terms(True, True))
    few, many = (fit_all(kind, rows, u, latent=True, n_members=2, n_null=n, seed=3, workers=1) for n in (3, 15))
    assert [len(f) for f in (few, many, many[0])] == [4, 16, 2]
    for one, other in zip(few, many, strict=False):  # a longer null begins with the shorter one
        np.testing.assert_array_equal(one[1].coef_, other[1].coef_)


def test_what_is_no_classifier():
    for kind in ("forest", 3, None):
        with pytest.raises(SettingError, match="classifier is"):
            check_kind(kind)
