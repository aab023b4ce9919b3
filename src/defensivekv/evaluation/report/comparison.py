"""Published figures beside ours, where the setting is the same; where it is not, what of it differs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from defensivekv.evaluation.report.aggregate import domain_loss
from defensivekv.evaluation.report.bootstrap import mean_over_tasks
from defensivekv.evaluation.report.cell import Cell, Setting
from defensivekv.evaluation.report.order import (
    FULL,
    LONGBENCH,
    RULER,
    base_task,
    budget_label,
    budget_share,
    task_length,
)
from defensivekv.evaluation.report.published import Published, published_figures
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.text import one_line
from defensivekv.evaluation.statistics import Interval

HAYSTACK = "haystack"
"""The suite of the paper's seventh domain, Needle-in-a-Haystack."""

_LONGBENCH_DOMAIN = {task: domain for domain, tasks in LONGBENCH.items() for task in tasks}

_MODELS = {
    "Llama-3.1-8B-Instruct": r"(meta)?llama318b(instruct)?",
    "Mistral-7B-Instruct-v0.3": r"mistral7b(instruct)?v03",
    "Qwen2.5-32B-Instruct": r"qwen2532b(instruct)?",
}
"""What a model's name is once only its letters and digits are left; a fine-tuned or quantised one has more."""


@dataclass(frozen=True)
class Comparison:
    """A published figure beside ours.

    ours: out of 100, with its 95 % interval; None where there is none. n, failures: of ours. setting, budget: ours;
    None where no run has the policy on the figure's tasks. differs: the parts of the setting that are not the same.
    """

    published: Published
    setting: Setting | None
    budget: str | None
    ours: Interval | None
    n: int
    failures: int
    differs: tuple[str, ...]

    @property
    def difference(self) -> float | None:
        """Ours less the published figure, in points; None where the settings differ."""
        return None if self.differs or self.ours is None else self.ours.mean - self.published.value


def compare(results: Results) -> list[Comparison]:
    """Each published figure beside all of ours in its setting; failing any, beside the nearest, with what differs."""
    return [comparison for figure in published_figures() for comparison in _of_figure(results, figure)]


def _of_figure(results: Results, figure: Published) -> list[Comparison]:
    found = [_compared(figure, results, own) for own in _candidates(results, figure)]
    same = [comparison for comparison in found if not comparison.differs]
    absent = Comparison(figure, None, None, None, 0, 0, ("not run",))
    return same or [min(found, key=lambda comparison: len(comparison.differs), default=absent)]


def _candidates(results: Results, figure: Published) -> Iterator[list[Cell]]:
    """The policy's cells on the figure's tasks, apart by setting and budget, and RULER's by length."""
    found: dict[tuple[object, ...], list[Cell]] = {}
    for cell in results.cells.values():
        suite, task = cell.facts.suite, base_task(cell.key.task)
        if figure.suite == "ruler":
            is_asked = suite == "ruler" and task in (RULER if figure.task == "mean" else (figure.task,))
            apart = task_length(cell.key.task)
        else:
            is_asked = suite == HAYSTACK or (suite == "longbench" and task in _LONGBENCH_DOMAIN)
            apart = None
        if is_asked and cell.key.policy == figure.policy:
            found.setdefault((cell.key.setting, cell.key.budget, apart), []).append(cell)
    yield from found.values()


def _compared(figure: Published, results: Results, own: list[Cell]) -> Comparison:
    key, answered = own[0].key, [cell for cell in own if cell.n]
    differs = _differences(figure, own, answered)
    ours = None
    if figure.quantity == "loss":
        ours, reason = _mean_loss(results, answered)
        differs += reason
    elif answered:
        ours = mean_over_tasks([cell.scores for cell in answered])
    return Comparison(
        figure,
        key.setting,
        key.budget,
        None if ours is None else Interval(100 * ours.mean, 100 * ours.low, 100 * ours.high),
        sum(cell.n for cell in own),
        sum(cell.failures for cell in own),
        tuple(differs),
    )


def _differences(figure: Published, own: list[Cell], answered: list[Cell]) -> list[str]:
    key, differs = own[0].key, []
    if not re.fullmatch(_MODELS[figure.model], re.sub(r"[^a-z0-9]", "", key.model.lower())):
        differs.append(f"model {one_line(key.model, 40)}")
    if budget_share(key.budget) != figure.budget:
        differs.append(f"budget {budget_label(key.budget)}")
    lengths = {task_length(cell.key.task) for cell in own}
    if figure.length is not None and lengths != {figure.length}:
        differs.append(f"length {' and '.join(sorted(str(length or 'unknown') for length in lengths))}")
    if key.query_aware != figure.query_aware:
        differs.append("the question was seen")
    if key.template != figure.template:
        differs.append(f"template {one_line(key.template, 20)}")
    # Of the haystack there is one way of dividing.
    splits = {cell.facts.split for cell in own if cell.facts.suite != HAYSTACK} - set(figure.splits)
    differs += [f"split {one_line(split, 20)}" for split in sorted(splits)]
    reasons = {cell.facts.not_comparable for cell in own} - {""}
    differs += [f"data: {one_line(reason, 100)}" for reason in sorted(reasons)]
    have, want = len({base_task(c.key.task) for c in answered if c.facts.suite != HAYSTACK}), _num_tasks(figure)
    if have != want:
        differs.append(f"{have} of {want} tasks answered")
    if figure.suite != "ruler" and not any(cell.facts.suite == HAYSTACK for cell in answered):
        differs.append("no Needle-in-a-Haystack")
    return differs


def _num_tasks(figure: Published) -> int:
    if figure.suite != "ruler":
        return len(_LONGBENCH_DOMAIN)
    return len(RULER) if figure.task == "mean" else 1


def _mean_loss(results: Results, answered: list[Cell]) -> tuple[Interval | None, list[str]]:
    """The mean of the domains' losses, or why there is none."""
    domains: dict[str, list[tuple[Cell, Cell]]] = {}
    for cell in answered:
        full = results.cell(cell.key.setting, FULL, cell.key.budget, cell.key.task)
        if full is None:
            return None, ["no full-cache row"]
        name = _LONGBENCH_DOMAIN.get(base_task(cell.key.task), HAYSTACK)
        domains.setdefault(name, []).append((cell, full))
    loss = domain_loss(list(domains.values())) if domains else None
    return loss, [] if loss is not None else ["no samples in common with the full-cache row"]
