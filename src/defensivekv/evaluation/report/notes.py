"""What limits the figures of a report: what is not comparable with what, and why."""

from collections import defaultdict
from collections.abc import Iterator

from defensivekv.evaluation.report.cell import Setting
from defensivekv.evaluation.report.order import FULL, budget_share
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.text import one_line
from defensivekv.evaluation.report.wording import counted, setting_label


def notes(results: Results) -> list[str]:
    """Sentences, most grave first; none twice."""
    found = [*_of_run(results)]
    for setting in results.settings:
        found += _of_setting(results, setting)
    return list(dict.fromkeys(found))


def _of_run(results: Results) -> Iterator[str]:
    if len({setting.query_aware for setting in results.settings}) > 1:
        yield (
            "Some runs saw the question when they compressed, which makes eviction far easier. They stand apart, "
            "marked query-aware, and are never averaged or compared with the others."
        )
    reasons: dict[str, set[str]] = defaultdict(set)
    for cell in results.cells.values():
        if cell.facts.not_comparable:
            reasons[cell.facts.not_comparable].add(cell.key.task)
    for reason, tasks in sorted(reasons.items()):
        shown = ", ".join(one_line(task, 60) for task in sorted(tasks)[:4])
        more = f" and {len(tasks) - 4} more" if len(tasks) > 4 else ""
        yield f"Not to be held against published figures: {shown}{more}: {one_line(reason, 300)}."


def _of_setting(results: Results, setting: Setting) -> Iterator[str]:
    name = setting_label(setting, with_query=True)
    cells = results.of(setting)
    if not any(cell.key.policy == FULL for cell in cells):
        yield f"{name}: there is no full-cache row, and so no loss."
    differing: dict[str, set[str]] = defaultdict(set)
    for cell in cells:
        full = results.cell(setting, FULL, cell.key.budget, cell.key.task)
        if full is not None:
            for part in cell.facts.differences(full.facts):
                differing[cell.key.policy].add(part)
    for policy, parts in sorted(differing.items()):
        yield (
            f"{name}: {one_line(policy)} and the full cache differ in {', '.join(sorted(parts))}: their scores are not "
            "to be compared, and no loss is given."
        )
    yield from _of_counts(results, setting, name)
    if any(budget_share(budget) is None for budget in results.budgets(setting)):
        yield f"{name}: budgets that are no shares stand in the figures at the share that was achieved."
    truncated = sum(cell.truncations for cell in cells)
    if truncated:
        yield f"{name}: the documents of {counted(truncated, 'sample')} were cut to fit."
    sizes = {size for cell in cells for size in cell.batch_sizes}
    if len(sizes) > 1:
        yield f"{name}: times are of batches of {', '.join(map(str, sorted(sizes)))}; only equal ones are compared."


def _of_counts(results: Results, setting: Setting, name: str) -> Iterator[str]:
    """Policies that answered other numbers of samples are on other samples."""
    for group in results.groups(setting):
        counts = {
            (policy, budget): tuple(
                0 if (cell := results.cell(setting, policy, budget, task)) is None else cell.n
                for task in results.tasks(setting, group)
            )
            for budget in results.budgets(setting, group)
            for policy in results.policies(setting, group, budget)
        }
        if len(set(counts.values())) > 1:
            yield (
                f"{name}, {group.label}: not every policy answered every sample, so means are over different samples; "
                "losses are over those that both answered."
            )
