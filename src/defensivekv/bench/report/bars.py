"""One length alone: a bar for each rival, and on it the least time that it could take."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from defensivekv.bench.records import CellRecord
from defensivekv.bench.report.styles import styles
from defensivekv.bench.report.tables import milliseconds
from defensivekv.bench.sizes import format_tokens
from defensivekv.drawing import DPI, add_legend


def draw_bars(cell: CellRecord, title: str) -> Figure | None:
    """The times of one token, the shortest above; None where there are none."""
    shown = {each.label: each for each in reversed(cell.outcomes) if each.status == "ok"}
    outcomes = sorted(shown.values(), key=lambda each: each.seconds or 0)
    if not outcomes:
        return None
    style_of = styles(cell.outcomes)
    figure = Figure(figsize=(7.2, 1.5 + 0.38 * len(outcomes)), layout="constrained", dpi=DPI)
    ax = figure.add_subplot()
    longest = max(max(each.samples_s) for each in outcomes) * 1e3
    for row, each in enumerate(outcomes):
        assert each.seconds is not None
        middle, low, high = (1e3 * value for value in (each.seconds, min(each.samples_s), max(each.samples_s)))
        ax.barh(row, middle, height=0.62, color=style_of[each.label].color, alpha=0.85)
        ax.plot([low, high], [row, row], color="black", linewidth=1, marker="|", markersize=5)
        ax.text(high + 0.015 * longest, row, f"{milliseconds(each.seconds)} ms", va="center", fontsize=8.5)
        if each.floor_s is not None:
            x = 1e3 * each.floor_s
            ax.plot([x, x], [row - 0.36, row + 0.36], color="white", linewidth=3.2, solid_capstyle="butt")
            ax.plot([x, x], [row - 0.36, row + 0.36], color="black", linewidth=1.4, solid_capstyle="butt")
    ax.set_yticks(range(len(outcomes)), [each.label for each in outcomes])
    ax.invert_yaxis()
    ax.set_xlim(0, 1.14 * longest)
    ax.set_xlabel(f"time of one token after {format_tokens(cell.filled)} stored (ms; median, fastest to slowest)")
    ax.spines[["top", "right"]].set_visible(False)
    name = "least time to read its weights and its cache"
    add_legend(figure, {name: Line2D([], [], color="black", marker="|", markersize=9, linestyle="", label=name)}, 1)
    figure.suptitle(title, fontsize=10)
    return figure
