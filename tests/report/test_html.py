import base64
import os
import re
import zlib
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.report import html as page
from sbi_phys.report.tables import posterior_table, rows_to_table
from tests.report.demo_data import PARAMETERS, draws


def png(width=3, height=2):
    """The smallest honest PNG: grey pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x00\x00\x00\x00"
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress((b"\x00" + b"\x80" * width) * height))
        + chunk(b"IEND", b"")
    )


class Reader(HTMLParser):
    """Collects tags, attributes and words; fails on a tag that is closed without having been opened."""

    VOID = {"meta", "link", "img", "input", "br"}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.stack, self.tags, self.words, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.words.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.stack == []
    return reader


def full(word="words"):
    body = [
        page.Text(f"{word}\n\n- {word}\n- b"),
        page.Code(word, caption=word),
        page.Table((word, "b"), ((word, word),), caption=word),
        page.FigureBlock(png(), caption=word, alt=f"alt {word}", pdf="figures/a.pdf", max_width=300),
        page.KeyValues({word: word, "n": 3}, caption=word),
        page.Verdict("warn", word, word),
        page.Details(word, [page.Text(word), page.FigureBlock(png(), caption="c", alt="a")]),
    ]
    return [page.Section(f"Title {word}", body), page.Section(f"Title {word}", [page.Text(word)])]


def test_every_block_is_shown(tmp_path):
    path = page.render_report(tmp_path / "r.html", "T", "S", full(), verdicts=[page.Verdict("good", "fine")], footer="seed 0", lang="en-GB")
    reader = read(path)
    assert ("html", "lang", "en-GB") in reader.attributes
    assert [reader.tags.count(t) for t in ("h1", "section", "table", "img", "dl", "pre", "details", "ul")] == [1, 2, 1, 2, 1, 1, 1, 1]
    text = " ".join(" ".join(reader.words).split())
    assert "Good: fine" in text and "Caution: words" in text and "seed 0" in text
    assert os.listdir(tmp_path) == ["r.html"]


def test_pictures_are_inside_with_their_size_and_nothing_outside_is_named(tmp_path):
    path = page.render_report(tmp_path / "r.html", "T", "S", full())
    reader = read(path)
    sources = [a[2] for a in reader.attributes if a[1] == "src"]
    assert [base64.b64decode(s.removeprefix("data:image/png;base64,")) for s in sources] == [png(), png()]
    assert ("img", "width", "3") in reader.attributes and ("img", "height", "2") in reader.attributes
    assert [a[2] for a in reader.attributes if a[:2] == ("a", "href") and not a[2].startswith("#")] == ["figures/a.pdf"]
    assert "script" not in reader.tags and not [a for a in reader.attributes if a[1].startswith("on")]
    assert not re.search(r"@import|url\(", path.read_text())
    policy = next(a[2] for a in reader.attributes if a[0] == "meta" and a[1] == "content" and "default-src" in a[2])
    assert "default-src 'none'" in policy


def test_anchors_are_distinct_and_reached(tmp_path):
    reader = read(page.render_report(tmp_path / "r.html", "T", "S", [*full(), page.Section("γδ", [])]))
    ids = [a[2] for a in reader.attributes if a[1] == "id"]
    assert len(ids) == len(set(ids))
    assert {a[2][1:] for a in reader.attributes if a[1] == "href" and a[2].startswith("#")} <= set(ids)


@settings(max_examples=60, deadline=None)
@given(
    st.text(alphabet=st.sampled_from("<>&\"'`*$\\_^{}/= ab\n%#}{") | st.characters(), min_size=1, max_size=40).filter(lambda s: s.strip())
)
def test_any_words_are_escaped_everywhere(tmp_path_factory, word):
    path = tmp_path_factory.mktemp("html") / "r.html"
    reader = read(page.render_report(path, word, word, full(word), verdicts=[page.Verdict("bad", word)], footer=word))
    allowed = {"html", "head", "meta", "title", "link", "style", "body", "a", "div", "header", "h1", "p", "span", "nav", "h2", "ol", "li"}
    allowed |= {"main", "section", "ul", "pre", "code", "table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "img"}
    allowed |= {"figcaption", "label", "input", "dl", "dt", "dd", "details", "summary", "footer"}
    assert set(reader.tags) <= allowed | set(["strong", "i", "sub", "sup"])
    assert reader.tags.count("section") == 2 and reader.tags.count("img") == 2
    assert not [a for a in reader.attributes if a[1].startswith("on")]


def test_words_survive_the_way(tmp_path):
    word = "a < b & \"c\" 'd' {{ 7 * 7 }} {% x %}"
    reader = read(page.render_report(tmp_path / "r.html", word, "S", full(word)))
    assert word in "".join(reader.words) and ("img", "alt", f"alt {word}") in reader.attributes
    assert " 49 " not in "".join(reader.words)


def test_a_posterior_table_goes_in_with_its_symbols(tmp_path):
    table = rows_to_table(posterior_table(draws(100, np.random.default_rng(0)), PARAMETERS))
    text = page.render_report(tmp_path / "r.html", "T", "S", [page.Section("P", [table])]).read_text()
    assert '<th scope="row"><span class="math"><i>f</i><sub>He</sub></span></th>' in text


def test_the_same_report_has_the_same_bytes(tmp_path):
    a, b = (page.render_report(tmp_path / n, "T", "S", full()).read_bytes() for n in ("a.html", "b.html"))
    assert a == b


def test_bad_input_is_named(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        page.FigureBlock(tmp_path / "none.png", "c", "a")
    with pytest.raises(DataError, match="are not PNG"):
        page.FigureBlock(b"GIF89a", "c", "a")
    with pytest.raises(DataError, match="empty alt"):
        page.FigureBlock(png(), "c", " ")
    for pdf in ("https://x.org/a.pdf", "/etc/passwd", "../a.pdf", "javascript:alert(1)"):
        with pytest.raises(SettingError, match="pdf is"):
            page.FigureBlock(png(), "c", "a", pdf=pdf)
    with pytest.raises(SettingError, match="level is 'god'; expected one of good, warn, bad, next; did you mean 'good'"):
        page.Verdict("god", "w")
    with pytest.raises(DataError, match="is a str"):
        page.Section("t", "words")
    with pytest.raises(DataError, match="has a dict"):
        page.Section("t", [{}])
    with pytest.raises(DataError, match="empty title"):
        page.Section(" ", [])
    with pytest.raises(DataError, match="sections is empty"):
        page.render_report(tmp_path / "r.html", "T", "S", [])
    with pytest.raises(DataError, match="sections has a Text"):
        page.render_report(tmp_path / "r.html", "T", "S", [page.Text("x")])
    with pytest.raises(SettingError, match="lang"):
        page.render_report(tmp_path / "r.html", "T", "S", full(), lang='en"')
    assert os.listdir(tmp_path) == []
