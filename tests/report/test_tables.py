import csv
import io
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_phys.core.errors import DataError, NonFiniteError, ShapeError
from sbi_phys.priors import Parameter
from sbi_phys.report import tables
from tests.report.demo_data import PARAMETERS, PUBLISHED, draws

NAMES = [p.name for p in PARAMETERS]


@pytest.fixture(scope="module")
def samples():
    return draws(3000, np.random.default_rng(1))


def test_summary_is_what_numpy_says(samples):
    summary = tables.summarise(samples, NAMES)
    assert list(summary) == NAMES
    for k, name in enumerate(NAMES):
        expected = {"mean": samples[:, k].mean(), "sd": samples[:, k].std(ddof=1)}
        expected |= {f"q{q:02d}": np.quantile(samples[:, k], q / 100) for q in (5, 16, 50, 84, 95)}
        assert summary[name] == pytest.approx(expected, rel=1e-13)
    assert json.loads(json.dumps(summary)) == summary


def test_rows_hold_full_precision_and_csv_reads_back(samples):
    rows = tables.posterior_table(samples, PARAMETERS)
    assert [r.name for r in rows] == NAMES
    assert rows[1].unit == "lg V"
    np.testing.assert_array_equal([r.q025 for r in rows], np.quantile(samples, 0.025, axis=0))
    np.testing.assert_array_equal([r.q975 for r in rows], np.quantile(samples, 0.975, axis=0))
    read = list(csv.DictReader(io.StringIO(tables.rows_to_csv(rows))))
    assert [float(r["q50"]) for r in read] == [r.q50 for r in rows]
    assert [r["name"] for r in read] == NAMES


def test_interval_carries_its_unit(samples):
    assert tables.posterior_table(samples, PARAMETERS)[1].interval68.endswith(" lg V")


def test_comparison_counts_sds_and_mass(samples):
    rows = tables.comparison_table(samples, PARAMETERS, PUBLISHED)
    assert len(rows) == 7 + 2  # a value that a fit does not give is no row
    row = next(r for r in rows if r.name == "gamma" and r.fit == "CTG 1st")
    gamma = samples[:, 0]
    assert row.offset == pytest.approx((-1.03 - np.median(gamma)) / gamma.std(ddof=1), rel=1e-12)
    assert row.below == pytest.approx(np.mean(gamma < -1.03), abs=1e-12)
    assert next(r for r in rows if r.name == "lg_rcut" and r.fit == "far away").below == 1.0
    assert next(r for r in rows if r.name == "f_fe").below == 0.5 * np.mean(samples[:, 6] == 0)


def test_shift_of_a_shifted_copy_is_known(samples):
    shifted = samples + 0.1 * samples.std(axis=0, ddof=1)
    rows = tables.shift_table(shifted, samples, PARAMETERS)
    assert [r.shift for r in rows] == pytest.approx([0.1] * 9, rel=1e-9)
    assert [r.width_ratio for r in rows] == pytest.approx([1.0] * 9, rel=1e-9)


def test_markdown_and_html_hold_the_same_cells(samples):
    table = tables.rows_to_table(tables.posterior_table(samples, PARAMETERS), "A | caption")
    lines = table.to_markdown().splitlines()
    assert lines[0].count("|") == 7 and set(lines[1]) <= set("|- ")
    assert len(lines) == 2 + 9 + 2
    page = table.to_html()
    assert page.count("<tr>") == 10 and page.count('scope="row"') == 9 and "<caption>A | caption</caption>" in page
    assert "<i>f</i><sub>He</sub>" in page


def test_a_pipe_does_not_break_markdown():
    assert tables.Table(("a",), (("x|y",),)).to_markdown().splitlines()[2] == "| x\\|y |"


def test_bad_input_is_named(samples):
    with pytest.raises(ShapeError, match=r"samples has shape \(3000, 8\); expected \(n, 9\)"):
        tables.summarise(samples[:, :8], NAMES)
    with pytest.raises(NonFiniteError):
        tables.posterior_table(np.where(samples > 18.2, np.nan, samples), PARAMETERS)
    with pytest.raises(DataError, match="expected at least 2"):
        tables.summarise(samples[:1], NAMES)
    with pytest.raises(DataError, match="expected label, source and theta"):
        tables.comparison_table(samples, PARAMETERS, [{"label": "x"}])
    with pytest.raises(ShapeError, match="row 1 of the table has 1 cells; expected 2"):
        tables.Table(("a", "b"), (("1", "2"), ("3",)))
    with pytest.raises(DataError, match="rows is empty"):
        tables.rows_to_table([])
    with pytest.raises(DataError, match="rows is empty"):
        tables.rows_to_csv([])


def test_a_constant_column_has_no_offset():
    rows = tables.comparison_table(np.ones((5, 1)), [Parameter("a", 0, 2)], [{"label": "l", "theta": {"a": 1.5}}])
    assert np.isnan(rows[0].offset) and rows[0].cells()[4] == "nan"


def test_markup_in_text():
    got = tables.inline_html("a `b<c` **bold `x`** $f_\\mathrm{He}$ see https://arxiv.org/abs/1612.07155. costs $5 and 6$7")
    assert "<code>b&lt;c</code>" in got and "<strong>bold <code>x</code></strong>" in got
    assert '<span class="math"><i>f</i><sub>He</sub></span>' in got
    assert (
        '<a href="https://arxiv.org/abs/1612.07155" rel="noopener noreferrer">https://arxiv.org/abs/1612.07155</a>. costs $5 and 6$7' in got
    )


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab<>&\"'`*$\\_^{} \n/:hts.é"), max_size=60))
def test_no_text_gets_through_as_markup(text):
    page = tables.inline_html(text)
    known = re.sub(
        r'</?(code|strong|i|sub|sup|a)>|<span class="math">|</span>|<a href="https://[^"<>]*" rel="noopener noreferrer">', "", page
    )
    assert "<" not in known and ">" not in known
    assert not re.search(r"&(?!(amp|lt|gt|quot|#x27);)", known)
