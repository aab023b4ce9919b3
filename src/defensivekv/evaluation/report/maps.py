"""Figures at one budget: the radar of domains, and where in a document of what length needles are found."""

import math
import textwrap
from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes

from defensivekv.drawing import DPI, Style, add_legend, drawing, panels
from defensivekv.evaluation.report.cell import Cell, Setting
from defensivekv.evaluation.report.order import FULL, Group, base_task, budget_label, task_length
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.styles import FULL_COLOR, handle, label, styles
from defensivekv.evaluation.report.wording import setting_label

_MIN_AXES = 3
_MAX_DEPTHS = 11


def draw_radar(results: Results, setting: Setting, budget: str, path: Path) -> bool:
    """Writes a PNG of each domain's mean at the budget, an axis for each domain, to `path`.

    Each axis ends at the full cache's mean, where that is known and not zero in every domain; otherwise at 100. A
    domain that a policy has no mean in breaks its line. Returns False, and writes nothing, for fewer than three
    domains, or where no evicting policy has a mean.
    """
    domains = results.domains(setting)
    if len(domains) < _MIN_AXES:
        return False
    policies = results.policies(setting, None, budget)
    found = {name: [results.aggregate(setting, name, budget, *domain) for domain in domains] for name in policies}
    values = {name: [a.score.mean if a.score else math.nan for a in found[name]] for name in policies}
    if all(math.isnan(value) for name, line in values.items() if name != FULL for value in line):
        return False
    full = values.get(FULL)
    is_relative = full is not None and all(value > 0 for value in full)
    ends = full if full is not None and is_relative else [1.0] * len(domains)
    failures = {name: sum(aggregate.failures for aggregate in found[name]) for name in policies}
    unit = "% of the full cache's" if is_relative else "out of 100"
    groups = {group for group, _ in domains}
    axes_labels = [
        textwrap.fill(label(domain, 32), 16)
        + (
            f"\n({label(group.suite, 14)}{f' {_tokens(group.length)}' if group.length else ''})"
            if len(groups) > 1
            else ""
        )
        for group, domain in domains
    ]
    with drawing():
        rows = -(-len(policies) // 3)
        figure = Figure(figsize=(7.4, (5.4 if len(domains) <= 10 else 6.4) + 0.2 * rows), layout="constrained", dpi=DPI)
        ax = cast(PolarAxes, figure.add_subplot(projection="polar"))
        highest = np.nanmax([value / end for line in values.values() for value, end in zip(line, ends, strict=True)])
        _set_radar(ax, axes_labels, max(108.0, 100 * highest + 4))
        handles: dict[str, Line2D] = {}
        style_of = styles(results.policies()) | {FULL: Style(FULL_COLOR, "", "--", 1.0)}
        for name in policies:
            scaled = [100 * value / end for value, end in zip(values[name], ends, strict=True)]
            if name == FULL and not is_relative:
                style_of[FULL] = Style(FULL_COLOR, ".", "--", 1.0)
            shown = f"{label(name)} ({failures[name]} failed)" if failures[name] else label(name)
            handles[shown] = _draw_radar_line(ax, scaled, style_of[name], shown)
        add_legend(figure, handles, 3)
        name = label(setting_label(setting, with_query=True), 90)
        figure.suptitle(f"{name}\nscores by domain at a budget of {budget_label(budget)}, {unit}", fontsize=10)
        figure.savefig(path, metadata={"Software": None})
    return True


def _set_radar(ax: PolarAxes, labels: list[str], limit: float) -> None:
    angles = [2 * math.pi * number / len(labels) for number in range(len(labels))]
    ax.set_theta_offset(math.pi / 2)
    ax.set_theta_direction(-1)
    ax.set_xticks(angles, labels, fontsize=8)
    ax.tick_params(axis="x", pad=12)
    for text, angle in zip(ax.get_xticklabels(), angles, strict=True):
        side = math.sin(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    ax.set_ylim(0, limit)
    ax.set_yticks([20, 40, 60, 80, 100], ["20", "40", "60", "80", "100"], fontsize=7, color="#666666")
    # Between the first two axes, where no spoke runs through the numbers.
    ax.set_rlabel_position(180 / len(labels))
    ax.grid(alpha=0.3)
    ax.spines["polar"].set_visible(False)


def _draw_radar_line(ax: PolarAxes, values: list[float], style: Style, name: str) -> Line2D:
    angles = [2 * math.pi * number / len(values) for number in range(len(values))]
    ax.plot(
        [*angles, angles[0]],
        [*values, values[0]],
        color=style.color,
        linestyle=style.line,
        linewidth=style.width,
        marker=style.marker,
        markersize=4,
    )
    return handle(name, style)


Grid = dict[tuple[float, float], float]
"""Mean scores by depth, in percent, and length, in tokens."""


def draw_depths(results: Results, setting: Setting, suite: str, budget: str, path: Path) -> bool:
    """Writes a PNG of the suite's mean score by the needle's depth and the length, a panel for each policy, to `path`.

    Of several tasks, the mean of those that have the depth and length. Returns False, and writes nothing, where no
    sample says its depth.
    """
    grids: dict[str, Grid] = {}
    failures: dict[str, int] = {}
    for policy in results.policies(setting, None, budget):
        cells = [
            c for g in results.groups(setting) if g.suite == suite for c in _cells(results, setting, g, policy, budget)
        ]
        grid = _grid(cells)
        if grid:
            grids[policy] = grid
            failures[policy] = sum(cell.failures for cell in cells)
    if not grids:
        return False
    depths = sorted({depth for grid in grids.values() for depth, _ in grid})
    lengths = sorted({length for grid in grids.values() for _, length in grid})
    with drawing():
        width = max(2.6, 1.1 + 0.42 * len(lengths))
        figure, axes = panels(len(grids), width=width, height=2.7)
        for number, (ax, (policy, grid)) in enumerate(zip(axes, grids.items(), strict=True)):
            failed = f" ({failures[policy]} failed)" if failures[policy] else ""
            image = _draw_grid(ax, grid, depths, lengths, f"{label(policy)}{failed}")
            if number % 3 == 0:
                ax.set_ylabel("needle's depth (%)", fontsize=8)
        figure.supxlabel("length (tokens)", fontsize=8)
        figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, label="mean score (of 100)").ax.tick_params(labelsize=7)
        figure.suptitle(
            f"{label(setting_label(setting, with_query=True), 60)}\n{label(suite, 30)} at a budget of "
            f"{budget_label(budget)}",
            fontsize=9.5,
        )
        figure.savefig(path, metadata={"Software": None})
    return True


def suites_with_depths(results: Results, setting: Setting) -> list[str]:
    """The suites of which some sample says how deep its needle is."""
    found = dict.fromkeys(group.suite for group in results.groups(setting))
    return [s for s in found if _grid([c for c in results.of(setting) if c.facts.suite == s])]


def _cells(results: Results, setting: Setting, group: Group, policy: str, budget: str) -> list[Cell]:
    cells = (results.cell(setting, policy, budget, task) for task in results.tasks(setting, group))
    return [cell for cell in cells if cell is not None]


def _grid(cells: list[Cell]) -> Grid:
    scores: dict[tuple[float, float], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    depths = {o.depth for cell in cells for o in cell.answered if o.depth is not None}
    for cell in cells:
        for outcome in cell.answered:
            length = task_length(cell.key.task) or outcome.length
            if outcome.depth is None or length is None or outcome.score is None:
                continue
            depth = outcome.depth if len(depths) <= _MAX_DEPTHS else float(round(outcome.depth, -1))
            scores[depth, float(length)][base_task(cell.key.task)].append(outcome.score)
    return {place: fmean(map(fmean, by_task.values())) for place, by_task in scores.items()}


def _draw_grid(ax: Axes, grid: Grid, depths: list[float], lengths: list[float], title: str) -> AxesImage:
    image = np.full((len(depths), len(lengths)), np.nan)
    for (depth, length), score in grid.items():
        image[depths.index(depth), lengths.index(length)] = 100 * score
    shown = ax.imshow(image, cmap="RdYlBu", vmin=0, vmax=100, aspect="auto", interpolation="nearest")
    ax.set_facecolor("#dddddd")
    every = -(-len(lengths) // 8)
    ax.set_xticks(range(0, len(lengths), every), [_tokens(v) for v in lengths[::every]], fontsize=7)
    ax.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=7)
    ax.set_title(title, fontsize=8.5)
    return shown


def _tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count % 1024 == 0 else f"{count:g}"
