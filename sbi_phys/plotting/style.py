"""The style of all figures: palette, fonts, axes, legends, and how a figure is written to files.

Figures use matplotlib's objects only, never pyplot: no window opens, and no global list keeps them.
The style holds within `house_style()`; matplotlib's rcParams are restored after it.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sbi_phys.core.checks import require_int
from sbi_phys.core.errors import SettingError
from sbi_phys.core.files import open_aside

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BAND",
    "COLOURS",
    "LINES",
    "MARKERS",
    "MUTED",
    "PALETTE",
    "POINTS",
    "STYLE",
    "finish",
    "house_style",
    "line_style",
    "new_axes",
    "new_figure",
    "save_figure",
]

# Okabe and Ito's palette, which every common colour blindness can tell apart, without its two colours that are too pale for small
# markers and thin lines: the purple is darker here, and the yellow is a dark brown.
# Blue, vermilion, green, purple, orange, sky blue, brown, grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#E69F00", "#56B4E9", "#7F6000", "#555555")
COLOURS = {
    "flow": PALETTE[0],
    "amortised": PALETTE[1],
    "truth": PALETTE[2],
    "published": PALETTE[3],
    "reference": "#111111",
    "prior": "#9A9A9A",
    "grey": "#6B6B6B",
}
BAND = "#D9D9D9"  # the range that a hypothesis allows, or a 95 % band
MUTED = "#999999"  # secondary data: measured counts, an uncorrected result
LINES = ("-", "--", ":", "-.")
MARKERS = ("*", "D", "^", "s", "P", "v", "X", "o")
POINTS = ("o", "D", "s", "^", "v", "P", "X")  # recognised at the size of data points

STYLE: dict[str, Any] = {
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10.0,
    "mathtext.fontset": "dejavusans",
    "axes.linewidth": 0.8,
    "axes.labelsize": 10.5,
    "axes.titlesize": 10.5,
    "axes.axisbelow": True,
    "xtick.direction": "in",
    "ytick.direction": "in",
    "xtick.top": True,
    "ytick.right": True,
    "xtick.labelsize": 9.0,
    "ytick.labelsize": 9.0,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # TrueType: text in a PDF stays text, as journals require
    "svg.hashsalt": "sbi_phys",
}


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """Context in which matplotlib draws in the style of the package; rcParams are restored after it.

    >>> import matplotlib
    >>> from sbi_phys.plotting import house_style
    >>> before = matplotlib.rcParams["xtick.direction"]
    >>> with house_style():
    ...     matplotlib.rcParams["xtick.direction"]
    'in'
    >>> matplotlib.rcParams["xtick.direction"] == before
    True
    """
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's matplotlibrc has no effect, except for the backend
        matplotlib.rcParams.update(cast(Any, STYLE))
        yield


def new_figure(width: float, height: float, *, constrained: bool = True) -> "Figure":
    """Empty figure of width x height inches, not registered in pyplot; call it within `house_style`.

    >>> from sbi_phys.plotting import house_style, new_figure
    >>> with house_style():
    ...     figure = new_figure(5.2, 4.0)
    >>> figure.get_size_inches().tolist()
    [5.2, 4.0]
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained" if constrained else None)


def new_axes(ax: "Axes | None" = None, *, width: float = 5.2, height: float = 4.0) -> "Axes":
    """Return `ax`, or if it is None the axes of a new figure of width x height inches in the style of the package.

    >>> from sbi_phys.plotting import new_axes
    >>> ax = new_axes(width=4.0, height=3.0)
    >>> new_axes(ax) is ax
    True
    """
    if ax is not None:
        return ax
    with house_style():
        return new_figure(width, height).add_subplot()


def line_style(k: int) -> dict[str, Any]:
    """Colour and line style of curve k: the colours of `PALETTE` in turn, from the ninth curve on with another line style.

    >>> from sbi_phys.plotting.style import line_style
    >>> line_style(1)
    {'color': '#D55E00', 'linestyle': '-'}
    """
    return {"color": PALETTE[k % len(PALETTE)], "linestyle": LINES[(k // len(PALETTE)) % len(LINES)]}


def finish(ax: "Axes", *, legend: str = "auto", columns: int = 4) -> "Axes":
    """Add the legend of the labelled artists, if there are any, and return `ax`.

    `legend`: 'above' the axes in rows of at most `columns`, 'beside' them, a location of matplotlib ('upper left'), 'none', or
    'auto': in the best corner, of more than six entries beside the axes, where it hides no curve.

    >>> from sbi_phys.plotting import finish, new_axes
    >>> ax = new_axes()
    >>> line = ax.plot([0, 1], [0, 1], label="data")
    >>> [text.get_text() for text in finish(ax).get_legend().get_texts()]
    ['data']
    """
    labels = ax.get_legend_handles_labels()[1]
    where = ("best" if len(labels) <= 6 else "beside") if legend == "auto" else legend
    if not labels or where == "none":
        return ax
    if where == "beside":
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small", frameon=False)
    elif where == "above":
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "columnspacing": 1.0, "handlelength": 1.4}
        ax.legend(ncols=columns, fontsize="small", frameon=False, **place)
    else:
        ax.legend(loc=cast(Any, where), fontsize="small", frameon=True, framealpha=0.85, edgecolor="none")
    return ax


def save_figure(fig: "Figure", folder: str | os.PathLike[str], name: str, *, dpi: int = 150) -> tuple[Path, Path]:
    """Write `name`.png (dpi 150) and `name`.pdf into `folder` and return the two paths.

    The files hold no date and no version: the same figure gives the same bytes.   Raises: SettingError.

    >>> from sbi_phys.plotting import new_axes, save_figure
    >>> ax = new_axes(width=2.0, height=1.5)
    >>> [path.name for path in save_figure(ax.figure, "figures", "empty")]
    ['empty.png', 'empty.pdf']
    """
    dpi = require_int("dpi", dpi, low=20, high=1200)
    if not name or not name.replace("-", "_").replace("_", "a").isalnum():
        raise SettingError(f"figure name is {name!r}; expected letters, digits, '-' and '_'")
    base = Path(folder)
    files: dict[Path, dict[str, Any]] = {
        base / f"{name}.png": {"dpi": dpi, "metadata": {"Software": None}},
        base / f"{name}.pdf": {"metadata": {"CreationDate": None, "Creator": None, "Producer": None}},
    }
    with house_style():
        for path, options in files.items():
            with open_aside(path, make_folder=True) as file:
                fig.savefig(file, format=path.suffix[1:], **options)
    png, pdf = files
    return png, pdf
