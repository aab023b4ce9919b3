"""Which figures a report has, under which names."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from defensivekv.evaluation.report.cell import Setting
from defensivekv.evaluation.report.figures import draw_curves
from defensivekv.evaluation.report.maps import draw_depths, draw_radar, suites_with_depths
from defensivekv.evaluation.report.order import FULL, budget_label, budget_rank
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.text import slug
from defensivekv.evaluation.report.wording import setting_label

_PREFERRED = "0.2"
"""The budget of the paper's tables."""


@dataclass(frozen=True)
class Picture:
    """A PNG that was written, and what it shows."""

    path: Path
    caption: str


def shown_budget(results: Results, setting: Setting) -> str:
    """The budget of figures that show one: 20 %, or else the smallest of those that most policies have."""
    budgets = results.budgets(setting)
    if _PREFERRED in budgets:
        return _PREFERRED
    count = {budget: len(set(results.policies(setting, None, budget)) - {FULL}) for budget in budgets}
    return min(budgets, key=lambda budget: (-count[budget], budget_rank(budget)))


def draw_pictures(results: Results, setting: Setting, folder: Path) -> list[Picture]:
    """Writes the setting's figures into the folder; names are by the setting's place in the report."""
    return list(_drawn(results, setting, folder))


def _drawn(results: Results, setting: Setting, folder: Path) -> Iterator[Picture]:
    seen = "-query-aware" if setting.query_aware else ""
    stem = f"{results.settings.index(setting) + 1}-{slug(setting.model)}{seen}"
    budget = shown_budget(results, setting)
    name = setting_label(setting, with_query=True)
    path = folder / f"{stem}-budgets.png"
    if draw_curves(results, setting, path):
        yield Picture(
            path,
            f"{name}: mean score against the budget, one panel for each suite and length. Points of one budget stand "
            "side by side, so that their intervals can be told apart.",
        )
    path = folder / f"{stem}-bytes.png"
    if draw_curves(results, setting, path, is_bytes=True):
        yield Picture(path, f"{name}: mean score against the bytes that a sample's cache holds after compression.")
    path = folder / f"{stem}-radar.png"
    if draw_radar(results, setting, budget, path):
        yield Picture(path, f"{name}: scores by domain at a budget of {budget_label(budget)}.")
    for number, suite in enumerate(suites_with_depths(results, setting), start=1):
        path = folder / f"{stem}-depths-{number}-{slug(suite)}.png"
        if draw_depths(results, setting, suite, budget, path):
            yield Picture(
                path,
                f"{name}: mean score by the needle's depth and the length at a budget of {budget_label(budget)}; grey "
                "where nothing was asked.",
            )
