"""How each rival is drawn, the same in every figure."""

from collections.abc import Iterable
from dataclasses import replace

from matplotlib.lines import Line2D

from defensivekv.bench.plan import OURS
from defensivekv.bench.records import Outcome
from defensivekv.drawing import LineStyle, Style

_KNOWN = {
    OURS: Style("#b2182b", "o", width=2.4),
    f"{OURS} compiled": Style("#e6550d", "*", width=2.4),
    "flat-copy": Style("#ef8a62", "s"),
    "stock": Style("#222222", "X"),
    "static": Style("#8a8a8a", "P"),
    "static compiled": Style("#bdbdbd", "p"),
    "kvpress": Style("#2166ac", "^"),
    "llama.cpp": Style("#1b7837", "v"),
    "llama.cpp flash": Style("#7fbf7b", "D"),
    "openvino": Style("#8c6bb1", "h"),
}
_OURS = (
    _KNOWN[OURS],
    Style("#e7298a", "s", width=2.0),
    Style("#67001f", "^", width=2.0),
    Style("#f768a1", "D", width=2.0),
)
"""Of this package's policies and budgets, which share a figure more often than not."""

_LINES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")


def styles(outcomes: Iterable[Outcome]) -> dict[str, Style]:
    """A style for each label; those of one rival differ by their lines, and of ours by their colours too."""
    made: dict[str, Style] = {}
    counts: dict[str, int] = {}
    for each in outcomes:
        if each.label not in made:
            number = counts[each.rival] = counts.get(each.rival, -1) + 1
            style = _KNOWN.get(each.rival, Style("#555555", ">"))
            line = _LINES[number % len(_LINES)]
            made[each.label] = replace(_OURS[number % len(_OURS)] if each.rival == OURS else style, line=line)
    return made


def handle(label: str, style: Style) -> Line2D:
    """For a legend."""
    return Line2D(
        [], [], color=style.color, marker=style.marker, linestyle=style.line, linewidth=style.width, label=label
    )
