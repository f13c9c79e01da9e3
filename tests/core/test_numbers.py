import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_phys.core.numbers import MINUS, decimals, fixed, format_interval


@pytest.mark.parametrize(
    ("median", "low", "high", "text"),
    [
        (18.2123, 18.171, 18.262, "18.21 +0.05 -0.04"),  # 0.041 -> one digit (355..949)
        (-1.0312, -1.1592, -0.9112, "-1.03 +0.12 -0.13"),  # 0.120 -> two digits (100..354)
        (5.0, 4.0, 6.0, "5.0 +1.0 -1.0"),
        (1234.0, 1184.0, 1294.0, "1234 +60 -50"),
        (0.5, 0.4026, 0.65, "0.50 +0.15 -0.10"),  # 0.0974 rounds up to 0.10
        (0.00321, 0.0, 0.0363, "0.003 +0.033 -0.003"),  # at an edge the larger error sets the digits
        (-0.001, -0.9, 0.9, "0.0 +0.9 -0.9"),  # no minus zero
        (2.0, 2.0, 2.0, "2.0000 +0.0000 -0.0000"),
    ],
)
def test_interval_has_the_digits_of_the_particle_data_group(median, low, high, text):
    assert format_interval(median, low, high).replace(MINUS, "-") == text


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e4),
    st.floats(1e-6, 1e4),
)
def test_rounding_moves_no_number_by_more_than_a_tenth_of_the_scale(median, below, above):
    text = format_interval(median, median - below, median + above).replace(MINUS, "-")
    centre, plus, minus = (abs(float(part)) if i else float(part) for i, part in enumerate(text.split(" ")))
    scale = max(min(below, above), max(below, above) / 5)
    # PDG: the last digit is worth between 1/35 and 1/3.55 of the error, so rounding moves it by at most 1/7
    assert abs(centre - median) <= scale / 7 + 1e-9 * abs(median)
    assert abs(plus - above) <= scale / 7 + 1e-9 * abs(median)
    assert abs(minus - below) <= scale / 7 + 1e-9 * abs(median)


@pytest.mark.parametrize(
    ("below", "above", "digits"), [(0.041, 0.05, 2), (0.12, 0.12, 2), (0.0974, 0.15, 2), (60, 60, 0), (0, 0, 4), (float("nan"), 1, 4)]
)
def test_digits_follow_the_smaller_error(below, above, digits):
    assert decimals(below, above) == digits


@pytest.mark.parametrize(
    ("value", "digits", "sign", "text"),
    [(1.25, 1, False, "1.2"), (-0.001, 2, False, "0.00"), (-0.001, 2, True, "0.00"), (3.0, 1, True, "+3.0"), (-3.0, 0, True, MINUS + "3")],
)
def test_fixed_point_text(value, digits, sign, text):
    assert fixed(value, digits, sign=sign) == text


def test_what_is_not_finite_is_written_in_words():
    assert [fixed(v, 2) for v in (float("inf"), float("nan"))] == ["inf", "nan"]


def test_the_unit_follows():
    assert format_interval(18.2123, 18.171, 18.262, "lg V") == f"18.21 +0.05 {MINUS}0.04 lg V"
