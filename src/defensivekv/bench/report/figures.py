"""Figures of a run, each where there is something to draw."""

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from defensivekv.bench.records import CellRecord, Outcome, Results
from defensivekv.bench.report.bars import draw_bars
from defensivekv.bench.report.styles import handle, styles
from defensivekv.bench.report.tables import overhead
from defensivekv.bench.sizes import format_tokens
from defensivekv.drawing import DPI, add_legend, drawing, panels

_Value = Callable[[Outcome, CellRecord], float | None]
_FLOOR = "least time to read weights and cache"


def draw_figures(results: Results, folder: Path) -> list[Path]:
    """Writes the PNGs that the results have cells for, and gives their paths."""
    drawn: list[Path] = []
    with drawing():
        for name, draw in _FIGURES.items():
            figure = draw(results)
            if figure is not None:
                drawn.append(folder / f"{name}.png")
                figure.savefig(drawn[-1], dpi=DPI, metadata={"Software": None})
    return drawn


def _decode(results: Results) -> Figure | None:
    cells = [cell for cell in results.of_kind("steps") if cell.batch == 1]
    if len(cells) == 1:
        return draw_bars(cells[0], _title(results))
    if not cells:
        return None
    figure, (ax,) = panels(1, width=7.2, height=4.4, below=0.6)
    _lines(ax, cells, _step_milliseconds, _length, _floor_milliseconds)
    _log_both(ax, [cell.filled for cell in cells])
    ax.set_xlabel("tokens stored")
    ax.set_ylabel("time of one token (ms)")
    return _finish(figure, cells, _title(results), has_floor=True)


def _throughput(results: Results) -> Figure | None:
    cells = results.of_kind("steps")
    lengths = sorted({cell.length for cell in cells if cell.batch > 1})
    if not lengths:
        return None
    figure, axes = panels(len(lengths), width=4.2, height=3.4, below=0.6)
    for ax, length in zip(axes, lengths, strict=True):
        here = [cell for cell in cells if cell.length == length]
        _lines(
            ax, here, lambda each, cell: cell.batch / each.seconds if each.seconds else None, lambda cell: cell.batch
        )
        _log_both(ax, [cell.batch for cell in here], str)
        ax.set_title(f"{format_tokens(length)} tokens stored by each", fontsize=9)
        ax.set_xlabel("sequences")
    axes[0].set_ylabel("tokens a second, all sequences")
    return _finish(figure, cells, _title(results))


def _prefill(results: Results) -> Figure | None:
    cells = results.of_kind("prefill")
    if not cells:
        return None
    figure, (left, right) = panels(2, width=4.4, height=3.6, below=0.6)
    _lines(left, cells, _step_seconds, _length)
    _log_both(left, [cell.filled for cell in cells])
    left.set_ylabel("time to the first token (s)")
    _lines(right, cells, _overhead_percent, _length)
    right.axhline(0, color="#222222", linewidth=1)
    right.set_xscale("log", base=2)
    _length_ticks(right, [cell.filled for cell in cells])
    right.set_ylabel("over the stock cache's prefill (%)")
    for ax in (left, right):
        ax.set_xlabel("tokens of the prompt")
    return _finish(figure, cells, _title(results))


def _memory(results: Results) -> Figure | None:
    cells = results.of_kind("memory")
    if not cells:
        return None
    figure, (ax,) = panels(1, width=7.2, height=4.2, below=0.6)
    _lines(ax, cells, _peak_mebibytes, _length)
    _length_ticks(ax, [cell.filled for cell in cells])
    ax.set_ylim(0, 1.06 * ax.get_ylim()[1])
    ax.set_xlabel("tokens of the prompt")
    ax.set_ylabel("peak memory over the idle model (MiB)")
    return _finish(figure, cells, _title(results))


_FIGURES = {"decode": _decode, "throughput": _throughput, "prefill": _prefill, "memory": _memory}


def _step_seconds(each: Outcome, cell: CellRecord) -> float | None:
    return each.seconds


def _peak_mebibytes(each: Outcome, cell: CellRecord) -> float | None:
    return None if each.peak_bytes is None else each.peak_bytes / 2**20


def _step_milliseconds(each: Outcome, cell: CellRecord) -> float | None:
    return None if each.seconds is None else 1e3 * each.seconds


def _floor_milliseconds(each: Outcome, cell: CellRecord) -> float | None:
    return None if each.floor_s is None else 1e3 * each.floor_s


def _overhead_percent(each: Outcome, cell: CellRecord) -> float | None:
    over = overhead(each, cell)
    return None if over is None else 100 * over


def _length(cell: CellRecord) -> int:
    return cell.filled


def _lines(
    ax: Axes, cells: Sequence[CellRecord], value: _Value, at: Callable[[CellRecord], int], floor: _Value | None = None
) -> None:
    """A line for each label; floor: drawn thin and dashed in the same colour."""
    every = [each for cell in cells for each in cell.outcomes]
    for label, style in styles(every).items():
        for measure, is_floor in ((value, False), (floor, True)):
            points = [] if measure is None else _points(cells, label, measure, at)
            if points and is_floor:
                ax.plot(*zip(*points, strict=True), color=style.color, linewidth=0.9, linestyle=(0, (2, 2)), zorder=1)
            elif points:
                ax.plot(
                    *zip(*points, strict=True),
                    color=style.color,
                    marker=style.marker,
                    markersize=6,
                    linewidth=style.width,
                    linestyle=style.line,
                )
    ax.grid(alpha=0.3)


def _points(
    cells: Sequence[CellRecord], label: str, measure: _Value, at: Callable[[CellRecord], int]
) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for cell in cells:
        found = next((each for each in cell.outcomes if each.label == label and each.status == "ok"), None)
        y = None if found is None else measure(found, cell)
        if y is not None:
            points.append((at(cell), y))
    return points


def _log_both(ax: Axes, xs: Sequence[int], text: Callable[[int], str] = format_tokens) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    _length_ticks(ax, xs, text)
    ax.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _length_ticks(ax: Axes, xs: Sequence[int], text: Callable[[int], str] = format_tokens) -> None:
    ax.xaxis.set_major_locator(FixedLocator(sorted(set(xs))))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(round(value))))


def _finish(figure: Figure, cells: Sequence[CellRecord], title: str, *, has_floor: bool = False) -> Figure:
    shown = [each for cell in cells for each in cell.outcomes if each.status == "ok"]
    handles = {label: handle(label, style) for label, style in styles(shown).items()}
    if has_floor:
        handles[_FLOOR] = Line2D([], [], color="#555555", linewidth=0.9, linestyle=(0, (2, 2)), label=_FLOOR)
    add_legend(figure, handles, 4)
    figure.suptitle(title, fontsize=10)
    return figure


def _title(results: Results) -> str:
    model, machine = results.model, results.machine
    layers = f", {model['layers']} of {model['of_layers']} layers" if model["layers"] < model["of_layers"] else ""
    return f"{model['name']}{layers}, {model['dtype']}\n{machine['device']}, {machine['threads']} threads"
