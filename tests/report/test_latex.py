import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_phys.report.latex import latex_to_html
from tests.report.demo_data import PARAMETERS


@pytest.mark.parametrize(
    ("latex", "html"),
    [
        (r"\gamma", "<i>γ</i>"),
        (r"f_\mathrm{He}", "<i>f</i><sub>He</sub>"),
        (r"\nu_{X_\mathrm{max}}", "<i>ν</i><sub><i>X</i><sub>max</sub></sub>"),
        (r"10^{-3}\,\mathrm{g}/\mathrm{cm}^2", "10<sup>\N{MINUS SIGN}3</sup>\u2009g/cm<sup>2</sup>"),
        (r"\lg(R)", "lg\u2009(<i>R</i>)"),
        (r"\langle X\rangle", "⟨<i>X</i>⟩"),
        (r"a<b", "<i>a</i>&lt;<i>b</i>"),
        (r"\frac{a}{b}", "<i>a</i>/<i>b</i>"),
        (r"\unknown{x}", "unknown<i>x</i>"),
        ("{{x", "<i>x</i>"),
        ("}x_", "<i>x</i><sub></sub>"),
    ],
)
def test_labels(latex, html):
    assert latex_to_html(latex) == html


def test_the_labels_of_the_main_job_lose_no_command():
    assert not [p.latex for p in PARAMETERS if "\\" in latex_to_html(p.latex) or "mathrm" in latex_to_html(p.latex)]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab<&{}_^\\ ,-'") | st.characters(), max_size=80))
def test_any_input_gives_balanced_and_escaped_html(text):
    page = latex_to_html(text)
    for tag in ("i", "sub", "sup"):
        assert page.count(f"<{tag}>") == page.count(f"</{tag}>")
    assert "<" not in re.sub(r"</?(i|sub|sup)>", "", page)


@pytest.mark.parametrize("text", ["{" * 5000, "_" * 5000, "\\mathrm" * 2000, "^{" * 3000, "\\frac" * 2000])
def test_deep_nesting_does_not_exhaust_the_stack(text):
    assert isinstance(latex_to_html(text), str)
