"""How each policy is drawn, the same in every figure of a report, and what every figure shares."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from defensivekv.evaluation.report.order import FULL
from defensivekv.evaluation.report.text import one_line

DPI = 150
FULL_COLOR = "black"

LineStyle = Literal["-", "--", ":", "-."]


@dataclass(frozen=True)
class Style:
    """As matplotlib has them."""

    color: str
    marker: str
    line: LineStyle = "-"
    width: float = 1.6


_KNOWN = {
    "layer-defensivekv": Style("#b2182b", "o", width=2.2),
    "defensivekv": Style("#ef8a62", "s", width=2.2),
    "layer-averaged": Style("#8c6bb1", "*"),
    "criticalkv": Style("#2166ac", "^"),
    "ada-criticalkv": Style("#08306b", "<"),
    "adakv": Style("#4393c3", "v"),
    "snapkv": Style("#92c5de", "D"),
    "cake": Style("#1b7837", "p"),
    "duo-attention": Style("#b8860b", "h"),
    "streaming-llm": Style("#888888", "P"),
    "random": Style("#bbbbbb", "x"),
}

_COLORS = ("#006d5b", "#c51b7d", "#6a3d9a", "#8b4513", "#4d9221", "#e08214", "#00a0b0", "#5c5c8a", "#d6604d", "#999933")
_MARKERS = (">", "d", "X", "8", "H", "^", "v", "s", "D", "p")
_LINES: tuple[LineStyle, ...] = ("--", ":", "-.")


def styles(policies: Sequence[str]) -> dict[str, Style]:
    """A style for each policy, different for up to forty; the known ones have the same in every report."""
    unknown = [name for name in policies if name not in _KNOWN and name != FULL]
    made = {name: _KNOWN[name] for name in policies if name in _KNOWN}
    for number, name in enumerate(unknown):
        turn = number // len(_COLORS)
        made[name] = Style(
            _COLORS[number % len(_COLORS)], _MARKERS[(number + turn) % len(_MARKERS)], _LINES[turn % len(_LINES)]
        )
    return made


def label(text: str, limit: int = 40) -> str:
    """Text of a model or dataset for a figure."""
    line = one_line(text, limit)
    # A legend leaves out names that begin with an underscore.
    return f" {line}" if line.startswith("_") else line


@contextmanager
def drawing() -> Iterator[None]:
    """Within it, dollar signs in names start no formula, and letters that no font has are drawn as boxes."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        mpl.rcParams["text.parse_math"] = False
        mpl.rcParams["font.family"] = "DejaVu Sans"
        mpl.rcParams["font.size"] = 9
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        yield


def handle(name: str, style: Style) -> Line2D:
    """The policy's line in a legend."""
    return Line2D(
        [], [], color=style.color, marker=style.marker, linestyle=style.line, linewidth=style.width, label=name
    )


def add_legend(figure: Figure, handles: Mapping[str, Line2D], columns: int) -> None:
    """A legend below the panels, across the figure, in up to `columns` columns."""
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=min(columns, len(handles)),
            frameon=False,
            fontsize=8,
            handlelength=2.6,
        )


def panels(count: int, *, width: float = 4.0, height: float = 3.3, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, up to three in a row, of that size in inches; below: for a legend."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.2), height * rows + below), layout="constrained", dpi=DPI)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    return figure, axes
