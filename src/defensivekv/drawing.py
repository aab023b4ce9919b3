"""What every figure shares: one look, a legend below the panels, and panels of one size."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

DPI = 150

LineStyle = Literal["-", "--", ":", "-."]


@dataclass(frozen=True)
class Style:
    """As matplotlib has them."""

    color: str
    marker: str
    line: LineStyle = "-"
    width: float = 1.6


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


def add_legend(figure: Figure, handles: Mapping[str, Line2D], columns: int) -> None:
    """A legend below the panels, across the figure, in up to `columns` columns: in as many as it is wide enough for."""
    if not handles:
        return
    for count in range(min(columns, len(handles)), 0, -1):
        legend = figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside lower center",
            ncols=count,
            frameon=False,
            fontsize=8,
            handlelength=2.6,
        )
        if count == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def panels(count: int, *, width: float = 4.0, height: float = 3.3, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels, up to three in a row, of that size in inches; below: for a legend."""
    columns = min(3, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 5.2), height * rows + below), layout="constrained", dpi=DPI)
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    return figure, axes
