import os

import matplotlib
import pytest

from sbi_phys.core.errors import SettingError
from sbi_phys.plotting.style import house_style, new_figure, save_figure


def simple():
    with house_style():
        fig = new_figure(3, 2)
        fig.subplots().plot([0, 1], [0, 1])
    return fig


def test_style_is_undone():
    before = dict(matplotlib.rcParams)
    with house_style():
        assert matplotlib.rcParams["xtick.direction"] == "in"
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(RuntimeError), house_style():
        raise RuntimeError
    assert dict(matplotlib.rcParams) == before


def test_a_users_settings_do_not_reach_the_figures():
    with matplotlib.rc_context({"lines.linewidth": 17.0, "axes.facecolor": "black"}), house_style():
        assert matplotlib.rcParams["lines.linewidth"] == 1.4 and matplotlib.rcParams["axes.facecolor"] == "white"


def test_two_files_the_same_bytes_every_time(tmp_path):
    png, pdf = save_figure(simple(), tmp_path / "a", "fig-1")
    assert (png.name, pdf.name) == ("fig-1.png", "fig-1.pdf")
    assert png.read_bytes()[:4] == b"\x89PNG" and pdf.read_bytes()[:5] == b"%PDF-"
    assert b"CreationDate" not in pdf.read_bytes() and b"Software" not in png.read_bytes()
    again = save_figure(simple(), tmp_path / "b", "fig-1")
    assert [p.read_bytes() for p in again] == [png.read_bytes(), pdf.read_bytes()]
    assert sorted(os.listdir(tmp_path / "a")) == ["fig-1.pdf", "fig-1.png"]


def test_resolution_is_150_dots_an_inch(tmp_path):
    png, _ = save_figure(simple(), tmp_path, "x")
    head = png.read_bytes()[16:24]
    assert (int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")) == (450, 300)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a.b"])
def test_a_name_is_no_path(tmp_path, name):
    with pytest.raises(SettingError, match="figure name"):
        save_figure(simple(), tmp_path, name)
    with pytest.raises(SettingError, match="dpi"):
        save_figure(simple(), tmp_path, "x", dpi=5)
