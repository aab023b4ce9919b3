"""How each policy is drawn, the same in every figure of a report."""

from collections.abc import Sequence

from matplotlib.lines import Line2D

from defensivekv.drawing import LineStyle, Style
from defensivekv.evaluation.report.order import FULL
from defensivekv.evaluation.report.text import one_line

FULL_COLOR = "black"

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


def handle(name: str, style: Style) -> Line2D:
    """The policy's line in a legend."""
    return Line2D(
        [], [], color=style.color, marker=style.marker, linestyle=style.line, linewidth=style.width, label=name
    )
