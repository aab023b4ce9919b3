"""Curves: score against budget, and score against bytes, one panel for each group of tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from defensivekv.budget import format_bytes
from defensivekv.drawing import Style, add_legend, drawing, panels
from defensivekv.evaluation.report.cell import Setting
from defensivekv.evaluation.report.order import FULL, Group, budget_share, sorted_policies
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.styles import FULL_COLOR, handle, label, styles
from defensivekv.evaluation.report.wording import setting_label
from defensivekv.evaluation.statistics import Interval

_SCORE = "score (of 100), 95 % intervals"
_SHARE = "share of the KV cache kept (%)"
_BYTES = "bytes held for one sample, mean"


@dataclass(frozen=True)
class Point:
    """x: a share from 0 to 1, or bytes. failures: samples that the score leaves out."""

    x: float
    score: Interval
    failures: int = 0


@dataclass(frozen=True)
class Panel:
    """Lines of points by policy. full: the full cache's, a level where the x is a share."""

    title: str
    lines: dict[str, list[Point]]
    full: Point | None


def draw_curves(results: Results, setting: Setting, path: Path, *, is_bytes: bool = False) -> bool:
    """Writes a PNG of each group's mean score against the budget, or against the bytes held, to `path`.

    A budget that is no share stands at the share that was achieved. Hollow: samples failed. Returns False, and writes
    nothing, where no evicting policy has a mean, or
    against bytes, where none has two.
    """
    made = [_panel(results, setting, group, is_bytes) for group in results.groups(setting)]
    # Against bytes, points of one budget stand on top of each other and show nothing more than against budgets.
    least = 2 if is_bytes else 1
    drawn = [panel for panel in made if any(len(points) >= least for points in panel.lines.values())]
    if drawn:
        title = setting_label(setting, with_query=True)
        _draw(
            drawn,
            path,
            title,
            styles(results.policies()),
            is_bytes=is_bytes,
            size=(6.2, 4.0) if len(drawn) == 1 else (4.0, 3.3),
        )
    return bool(drawn)


def _panel(results: Results, setting: Setting, group: Group, is_bytes: bool) -> Panel:
    lines: dict[str, list[Point]] = {}
    full = None
    for budget in results.budgets(setting, group):
        for policy in results.policies(setting, group, budget):
            found = results.aggregate(setting, policy, budget, group)
            share = budget_share(budget)
            x = found.cache_bytes if is_bytes else found.achieved if share is None else share
            if found.score is None or x is None:
                continue
            point = Point(x, found.score, found.failures)
            if policy == FULL:
                full = point
            else:
                lines.setdefault(policy, []).append(point)
    ordered = {name: sorted(lines[name], key=lambda point: point.x) for name in sorted_policies(lines)}
    return Panel(group.label, ordered, full)


def _draw(
    drawn: Sequence[Panel],
    path: Path,
    title: str,
    style_of: dict[str, Style],
    *,
    is_bytes: bool,
    size: tuple[float, float],
) -> None:
    names = sorted_policies(name for panel in drawn for name in panel.lines)
    columns = min(5, 2 + min(3, len(drawn)))
    with drawing():
        rows = -(-(len(names) + 2) // columns)
        figure, axes = panels(len(drawn), width=size[0], height=size[1], below=0.2 * rows + 0.3)
        handles: dict[str, Line2D] = {}
        for panel, ax in zip(drawn, axes, strict=True):
            handles |= _draw_panel(ax, panel, names, style_of, is_bytes)
        ordered = {name: handles[name] for name in (*map(label, names), *_extra(handles)) if name in handles}
        add_legend(figure, ordered, columns)
        for number, ax in enumerate(axes):
            if number % 3 == 0:
                ax.set_ylabel(_SCORE, fontsize=8.5)
            if number + 3 >= len(axes):
                ax.set_xlabel(_BYTES if is_bytes else _SHARE, fontsize=8.5)
        if title:
            figure.suptitle(label(title, 100), fontsize=10)
        figure.savefig(path, metadata={"Software": None})


def _draw_panel(
    ax: Axes, panel: Panel, names: list[str], style_of: dict[str, Style], is_bytes: bool
) -> dict[str, Line2D]:
    handles: dict[str, Line2D] = {}
    xs = sorted({point.x for points in panel.lines.values() for point in points})
    if panel.full is not None:
        name = "full cache"
        handles[name] = ax.axhline(100 * panel.full.score.mean, color=FULL_COLOR, linewidth=1, linestyle=(0, (5, 2)))
        if is_bytes:
            ax.plot([panel.full.x], [100 * panel.full.score.mean], marker="D", color=FULL_COLOR, markersize=5)
    # Bytes are measured, so that nothing may be moved along their axis.
    step = 0.0 if is_bytes else _dodge(len(panel.lines), len(xs))
    for name, points in panel.lines.items():
        style = style_of[name]
        place = names.index(name) - (len(names) - 1) / 2
        shift = ScaledTranslation(place * step / 72, 0, ax.figure.dpi_scale_trans)
        x = [point.x if is_bytes else 100 * point.x for point in points]
        _draw_line(ax, x, points, style, shift)
        handles[label(name)] = handle(name, style)
    everything = [point for points in panel.lines.values() for point in points]
    everything += [panel.full] if panel.full else []
    if any(point.failures for point in everything):
        handles["hollow: samples failed"] = Line2D(
            [], [], color="black", marker="o", markerfacecolor="white", linestyle=""
        )
    _set_axes(ax, panel, xs, is_bytes)
    return handles


def _draw_line(ax: Axes, x: list[float], points: list[Point], style: Style, shift: ScaledTranslation) -> None:
    means = [100 * point.score.mean for point in points]
    errors = [
        [100 * (point.score.mean - point.score.low) for point in points],
        [100 * (point.score.high - point.score.mean) for point in points],
    ]
    transform = ax.transData + shift
    ax.errorbar(
        x,
        means,
        yerr=errors,
        color=style.color,
        linestyle=style.line,
        linewidth=style.width,
        elinewidth=0.8,
        capsize=2,
        transform=transform,
    )
    for at, mean, point in zip(x, means, points, strict=True):
        face = "white" if point.failures else style.color
        ax.plot(
            [at],
            [mean],
            color=style.color,
            marker=style.marker,
            markersize=5,
            markerfacecolor=face,
            markeredgewidth=1.2,
            transform=transform,
            zorder=3,
        )


def _set_axes(ax: Axes, panel: Panel, xs: list[float], is_bytes: bool) -> None:
    points = [point for line in panel.lines.values() for point in line] + ([panel.full] if panel.full else [])
    low = min(100 * point.score.low for point in points)
    high = max(100 * point.score.high for point in points)
    # Scores far above zero are told apart only where the axis does not start there.
    bottom = 0.0 if low < 40 else 5 * ((low - 5) // 5)
    ax.set_ylim(max(0.0, bottom) - 2, min(103.0, high + 6))
    ax.set_title(label(panel.title, 80), fontsize=9.5)
    ax.grid(alpha=0.25)
    ax.spines[["top", "right"]].set_visible(False)
    if is_bytes:
        ends = [*xs, *([panel.full.x] if panel.full else [])]
        ax.set_xscale("log", base=2)
        ax.set_xlim(min(ends) / 1.3, max(ends) * 1.3)
        ax.xaxis.set_major_locator(LogLocator(base=2, numticks=6))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(round(value)).replace(".0 ", " ")))
        ax.xaxis.set_minor_formatter(NullFormatter())
    elif xs:
        span = max(xs) - min(xs)
        margin = 100 * (0.08 * span if span else 0.1)
        ax.set_xlim(max(0.0, 100 * min(xs) - margin - 2), min(104.0, 100 * max(xs) + margin + 2))
        ax.set_xticks([100 * x for x in xs] if len(xs) <= 6 else ax.get_xticks()[1:-1])
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _extra(handles: dict[str, Line2D]) -> list[str]:
    return [name for name in ("full cache", "hollow: samples failed") if name in handles]


def _dodge(lines: int, budgets: int) -> float:
    """Points of paper between neighbouring lines at a budget, so that their intervals stand side by side."""
    room = 150.0 if budgets == 1 else min(14.0, 60 / budgets)
    return min(8.0 if budgets == 1 else 2.0, room / max(1, lines))
