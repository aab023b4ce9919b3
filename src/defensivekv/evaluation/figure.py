"""The picture: score against budget, one line for each policy."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt

from defensivekv.evaluation.needles import Cell

_STYLES = {
    "layer-defensivekv": ("#b2182b", "o"),
    "layer-averaged": ("#8c6bb1", "*"),
    "defensivekv": ("#ef8a62", "s"),
    "criticalkv": ("#2166ac", "^"),
    "adakv": ("#4393c3", "v"),
    "snapkv": ("#92c5de", "D"),
    "streaming-llm": ("#888888", "P"),
    "random": ("#bbbbbb", "x"),
}


def draw_scores(cells: Iterable[Cell], path: Path, *, title: str) -> None:
    """Writes a PNG of accuracy against the share of the cache kept, with 95 % intervals, to `path`."""
    cells = list(cells)
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    full = next((cell for cell in cells if cell.policy == "full"), None)
    if full is not None:
        level = 100 * full.accuracy.mean
        axes.axhline(level, color="black", linewidth=1, linestyle="--", label=f"full cache ({level:.1f} %)")
    measured = {cell.policy for cell in cells} - {"full"}
    for name in [*(name for name in _STYLES if name in measured), *sorted(measured - _STYLES.keys())]:
        line = sorted((cell for cell in cells if cell.policy == name), key=lambda cell: cell.budget)
        scores = [cell.accuracy for cell in line]
        means = [100 * score.mean for score in scores]
        errors = [
            [100 * (score.mean - score.low) for score in scores],
            [100 * (score.high - score.mean) for score in scores],
        ]
        color, marker = _STYLES.get(name, (None, "o"))
        budgets = [100 * cell.budget for cell in line]
        axes.errorbar(budgets, means, yerr=errors, color=color, marker=marker, markersize=5, capsize=2.5, label=name)
    axes.set_xlabel("budget: share of the KV cache kept (%)")
    axes.set_ylabel("answers found (%), with 95 % intervals")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.25)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    figure.savefig(path, dpi=150)
    plt.close(figure)
