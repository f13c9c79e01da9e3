"""The report of a run as a self-contained HTML file: sections of text, tables, figures, key-value lists and verdicts.

Figures are data URIs and the style sheet is inline; a content security policy in the page forbids requests and scripts, so that the
file does not need a network. Text is escaped; it may contain `code`, **bold**, $LaTeX$ and https addresses.
"""

import base64
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sbi_phys.core.checks import require_choice
from sbi_phys.core.errors import DataError, SettingError
from sbi_phys.core.files import write_aside
from sbi_phys.report.tables import Table, inline_html

__all__ = ["Block", "Code", "Details", "FigureBlock", "KeyValues", "Section", "Table", "Text", "Verdict", "render_report"]

_PNG = b"\x89PNG\r\n\x1a\n"
_LEVELS = {"good": ("✓", "Good"), "warn": ("!", "Caution"), "bad": ("✗", "Problem"), "next": ("→", "Next")}
_TEMPLATE = Path(__file__).with_name("template.html.j2")


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, separated by blank lines; lines that begin with '- ' form a list.

    >>> from sbi_phys.report import Text
    >>> Text("The posterior of $E$ is **narrow**.").text
    'The posterior of $E$ is **narrow**.'
    """

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """Verbatim text, such as a settings file or a command.

    >>> from sbi_phys.report import Code
    >>> Code("sbi-phys report --out runs/mine", caption="The command").caption
    'The command'
    """

    text: str
    caption: str = ""


@dataclass(frozen=True, slots=True)
class FigureBlock:
    """A PNG figure (path or bytes) with a caption and alt, a description for readers who cannot see it.

    Args: pdf, path of the figure as PDF relative to the report, or ''; max_width in CSS pixels, None for the full column.
    Raises: DataError for a file that is missing or not PNG, or an empty alt; SettingError for a pdf that is not a relative path.

    >>> from sbi_phys.plotting import new_axes, save_figure
    >>> from sbi_phys.report import FigureBlock
    >>> png, pdf = save_figure(new_axes(width=2, height=1).figure, ".", "empty")
    >>> FigureBlock(png, "A figure", "empty axes").size
    (300, 150)
    """

    source: str | os.PathLike[str] | bytes
    caption: str
    alt: str
    pdf: str = ""
    max_width: int | None = None

    def __post_init__(self) -> None:
        """Check the arguments and the file when the block is created."""
        if not self.alt.strip():
            raise DataError(f"figure {self.caption[:40]!r} has an empty alt; expected a description for readers who cannot see it")
        if self.pdf and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)*", self.pdf):
            raise SettingError(f"pdf is {self.pdf!r}; expected a path relative to the report, e.g. 'figures/corner.pdf'")
        self.png()

    def png(self) -> bytes:
        """The bytes of the PNG file."""
        if isinstance(self.source, bytes):
            data, name = self.source, "source"
        else:
            try:
                data, name = Path(self.source).read_bytes(), str(self.source)
            except OSError as err:
                raise DataError(f"figure {self.source} cannot be read: {err.strerror}; expected a PNG file") from err
        if not data.startswith(_PNG) or len(data) < 33:
            raise DataError(f"figure {name} has {len(data)} bytes that are not PNG; expected a PNG file")
        return data

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, from the PNG header; with them the browser reserves the space before it draws."""
        head = self.png()[16:24]
        return int.from_bytes(head[:4], "big"), int.from_bytes(head[4:], "big")

    @property
    def uri(self) -> str:
        """The figure as a data URI."""
        return "data:image/png;base64," + base64.b64encode(self.png()).decode("ascii")


@dataclass(frozen=True, slots=True)
class KeyValues:
    """A list of names and values, such as settings or versions.

    >>> from sbi_phys.report import KeyValues
    >>> KeyValues({"seed": 1}, "Settings").items
    {'seed': 1}
    """

    items: Mapping[str, Any]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a check in words; level 'good', 'warn' or 'bad' is shown by a sign, a word and a colour, 'next' is what to do next.

    Raises: SettingError.

    >>> from sbi_phys.report import Verdict
    >>> Verdict("good", "The network is calibrated.").name
    'Good'
    """

    level: str
    words: str
    detail: str = ""

    def __post_init__(self) -> None:
        """Check the level."""
        require_choice("level", self.level, _LEVELS)

    @property
    def sign(self) -> str:
        """The sign of the level."""
        return _LEVELS[self.level][0]

    @property
    def name(self) -> str:
        """The level as a word."""
        return _LEVELS[self.level][1]


@dataclass(frozen=True, slots=True)
class Details:
    """Blocks below a summary line that expands on a click; printed only if expanded.

    >>> from sbi_phys.report import Details, Text
    >>> len(Details("All numbers", [Text("p = 0.3")]).body)
    1
    """

    summary: str
    body: Sequence["Block"]
    open: bool = False


Block = Text | Code | Table | FigureBlock | KeyValues | Verdict | Details


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the report; its title is also in the table of contents.

    >>> from sbi_phys.report import Section, Text
    >>> Section("Result", [Text("p = 0.3")]).title
    'Result'
    """

    title: str
    body: Sequence[Block]
    anchor: str = field(default="")

    def __post_init__(self) -> None:
        """Check the blocks; a str is refused, because its characters would be taken as blocks."""
        if not self.title.strip():
            raise DataError("section has an empty title; expected words for the table of contents")
        body: Any = self.body
        if isinstance(body, str):
            raise DataError(f"body of section {self.title!r} is a str; expected a list of blocks such as Text(...)")
        _require_blocks(self.body, f"section {self.title!r}")


def render_report(
    path: str | os.PathLike[str],
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    *,
    verdicts: Sequence[Verdict] = (),
    footer: str = "",
    lang: str = "en",
) -> Path:
    """Write the report to `path` and return the path.

    Args: verdicts: shown below the title. footer: one line, e.g. versions and seed. lang: language tag of the page.
    Raises: DataError for no sections or other types of blocks; SettingError for a lang that is not a language tag.

    >>> from sbi_phys.report import Section, Text, render_report
    >>> path = render_report("report.html", "A run", "seed 1", [Section("Result", [Text("p = 0.3")])])
    >>> "p = 0.3" in path.read_text(encoding="utf-8")
    True
    """
    if not sections:
        raise DataError("sections is empty; expected at least one Section")
    for part in sections:
        if not isinstance(part, Section):
            raise DataError(f"sections has a {type(part).__name__}; expected Section(title, body)")
    _require_blocks(verdicts, "verdicts")
    if not re.fullmatch(r"[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*", lang):
        raise SettingError(f"lang is {lang!r}; expected a language tag such as 'en'")
    page = (
        _environment()
        .get_template(_TEMPLATE.name)
        .render(
            title=title,
            subtitle=subtitle,
            sections=list(zip(_anchors(sections), sections, strict=True)),
            verdicts=verdicts,
            footer=footer,
            lang=lang,
        )
    )
    # file names may contain lone surrogates, which cannot be written as UTF-8
    data = page.encode("utf-8", "replace")
    return write_aside(path, data, make_folder=True)


def _environment() -> Any:
    import jinja2
    from markupsafe import Markup

    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATE.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["inline"] = lambda text: Markup(inline_html(str(text)))
    env.filters["paragraphs"] = lambda text: Markup(_paragraphs(text))
    env.filters["table"] = lambda table: Markup(table.to_html())
    env.filters["kind"] = lambda block: type(block).__name__
    return env


def _paragraphs(text: str) -> str:
    out = []
    for part in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in part.splitlines() if line.strip()]
        if lines and all(line.startswith("- ") for line in lines):
            out.append("<ul>" + "".join(f"<li>{inline_html(line[2:])}</li>" for line in lines) + "</ul>")
        elif lines:
            out.append(f"<p>{inline_html(' '.join(lines))}</p>")
    return "\n".join(out)


def _anchors(sections: Sequence[Section]) -> list[str]:
    """Distinct fragment identifiers (slugs) from the titles."""
    out: list[str] = []
    for k, part in enumerate(sections):
        slug = re.sub(r"[^a-z0-9]+", "-", (part.anchor or part.title).lower()).strip("-") or f"section-{k + 1}"
        while slug in out:
            slug += "-x"
        out.append(slug)
    return out


def _require_blocks(blocks: Sequence[Any], where: str) -> None:
    for block in blocks:
        if not isinstance(block, Block):
            raise DataError(f"{where} has a {type(block).__name__}; expected Text, Code, Table, FigureBlock, KeyValues, Verdict or Details")
