"""The report in a terminal."""

import textwrap
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from defensivekv.evaluation.report.comparison import compare
from defensivekv.evaluation.report.comparison_table import comparison_table
from defensivekv.evaluation.report.notes import notes
from defensivekv.evaluation.report.pictures import shown_budget
from defensivekv.evaluation.report.rendering import rich_tables
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.tables import Table, domain_table, overview_table, summary_table, task_table
from defensivekv.evaluation.report.text import one_line, plain
from defensivekv.evaluation.report.wording import EXPLANATION, counted

_SHOWN_FAILURES = 5


def all_tables(results: Results, *, every_budget: bool = True) -> Iterator[Table]:
    """Of each setting: a summary of each group, its tables by budget, and the domains by budget.

    every_budget: or only that of the figures which show one, with an overview in place of the summary.
    """
    for setting in results.settings:
        budgets = results.budgets(setting) if every_budget else [shown_budget(results, setting)]
        for group in results.groups(setting):
            is_short = not every_budget and len(results.budgets(setting, group)) > 1
            yield (overview_table if is_short else summary_table)(results, setting, group)
            if len(results.tasks(setting, group)) > 1:
                for budget in results.budgets(setting, group):
                    if budget in budgets:
                        yield task_table(results, setting, group, budget)
        for budget in budgets:
            domains = domain_table(results, setting, budget)
            if domains is not None:
                yield domains


def print_report(
    results: Results, console: Console, *, against_paper: bool = False, every_budget: bool = False
) -> None:
    """Prints the tables, what limits them, and the first failures.

    every_budget: tables of tasks and domains at every budget, and not only at 20 % or the next best, and summaries
    with memory and time in place of overviews. against_paper: with the published figures beside ours.
    """
    for table in all_tables(results, every_budget=every_budget):
        _print_table(table, console)
    if against_paper:
        _print_table(comparison_table(compare(results)), console)
    _print_text(console, EXPLANATION)
    for note in notes(results):
        _print_text(console, f"note: {note}")
    failures = results.failures()
    if failures:
        _print_text(console, f"{counted(len(failures), 'sample')} failed:", style="bold red")
        for failure in failures[:_SHOWN_FAILURES]:
            key = failure.key
            place = f"{key.model}, {key.policy} at {key.budget}, {key.task}, sample {failure.sample}"
            _print_text(console, f"  {one_line(place, 200)}: {one_line(failure.error, 300)}")
        if len(failures) > _SHOWN_FAILURES:
            _print_text(console, f"  and {len(failures) - _SHOWN_FAILURES} more")


def _print_table(table: Table, console: Console) -> None:
    for part in rich_tables(table, console.width):
        console.print(part)


def _print_text(console: Console, text: str, style: str = "") -> None:
    # Text and not str: errors and names may hold what rich takes for markup.
    console.print(Text(textwrap.fill(plain(text), min(console.width, 110)), style=style))
