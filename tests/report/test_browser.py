import os

import numpy as np
import pytest

from sbi_phys import plotting as figures
from sbi_phys.report import html as page
from sbi_phys.report import tables
from tests.report.browser import check_report, missing_browser
from tests.report.demo_data import PARAMETERS, PUBLISHED, draws, history

pytestmark = [pytest.mark.browser, pytest.mark.skipif(bool(missing_browser()), reason=missing_browser() or "-")]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    sets = {"flow": draws(2000, rng), "exact MCMC": draws(2000, rng)}
    made = {"corner": figures.corner_figure(sets, PARAMETERS, published=PUBLISHED), "loss": figures.loss_figure(history(2, 30, rng))}
    png = {name: figures.save_figure(fig, folder / "figures", name, dpi=80)[0] for name, fig in made.items()}
    blocks = [page.FigureBlock(png[name], f"The {name}.", f"Picture of the {name}", pdf=f"figures/{name}.pdf") for name in png]
    rows = tables.posterior_table(sets["flow"], PARAMETERS)
    long = "a_very_long_name_without_any_place_to_break_" * 4
    sections = [
        page.Section(
            "Data and prior", [page.Text(f"See `config.toml`, {long} and https://arxiv.org/abs/1612.07155."), page.KeyValues({long: long})]
        ),
        page.Section("Posterior", [page.Verdict("good", "agrees"), blocks[0], tables.rows_to_table(rows, "Marginals.")]),
        page.Section("Published", [tables.rows_to_table(tables.comparison_table(sets["flow"], PARAMETERS, PUBLISHED))]),
        page.Section("Training", [page.Details("Loss", [blocks[1]], open=True), page.Code("x = 1 # " + "long " * 60)]),
    ]
    return page.render_report(folder / "report.html", "Sources " + long, "Synthetic, $X_\\mathrm{max}$", sections, footer=long)


def test_the_report_is_whole_at_desktop_and_narrow_width(report):
    found = check_report(report, widths=(1280, 400, 360), screenshots=os.environ.get("SBI_PHYS_SCREENSHOTS"))
    assert found.problems == []
    assert (found.images, found.sections) == (2, 4)
    assert found.requests and all(url.startswith(("file:", "data:")) for url in found.requests)


def test_the_check_sees_what_is_wrong(tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<html><body><h1>x</h1><h3>y</h3><img src='none.png' alt='lost'><img src='http://127.0.0.1:9/a.png' alt='far'>"
        "<div style='width: 2000px'>wide</div><nav><a href='#nowhere'>n</a></nav><script>console.error('broken')</script></body></html>"
    )
    problems = "\n".join(check_report(bad, widths=(400,)).problems)
    for complaint in (
        "image not loaded: lost",
        "heading skips a level: y",
        "page is 20",
        "no lang",
        "lands nowhere",
        "holds a script",
        "broken",
        "request: http://127.0.0.1:9/a.png",
    ):
        assert complaint in problems
