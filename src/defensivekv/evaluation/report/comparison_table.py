"""The published figures beside ours, as a table."""

from collections.abc import Sequence
from itertools import pairwise

from defensivekv.evaluation.report.comparison import Comparison
from defensivekv.evaluation.report.order import RULER, budget_label
from defensivekv.evaluation.report.published import Published
from defensivekv.evaluation.report.tables import Column, Entry, Table
from defensivekv.evaluation.report.text import one_line
from defensivekv.evaluation.report.wording import NONE, counted, failed_text

_COLUMNS = (
    Column("figure", is_number=False),
    Column("policy", is_number=False),
    Column("published"),
    Column("ours"),
    Column("difference"),
    Column("our setting", is_number=False),
)


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each figure that anything was run for; notes say what the rest are and where all are from."""
    run = [comparison for comparison in comparisons if comparison.setting is not None]
    rows = tuple(map(_row, run))
    ends = {i for i, (a, b) in enumerate(pairwise(run)) if _place(a) != _place(b)}
    left = len({id(comparison.published) for comparison in comparisons if comparison.setting is None})
    matched = sum(comparison.difference is not None for comparison in comparisons)
    notes = [
        f"{counted(matched, 'figure')} measured in the same setting. Where a part of it differs, that is named instead "
        "of a difference.",
        *(_sources(comparisons) if rows else ()),
    ]
    if left:
        notes.append(f"{counted(left, 'published figure')} of tasks or policies that were not run are left out.")
    return Table("published figures beside ours", _COLUMNS, rows, lead=2, ends=frozenset(ends), notes=tuple(notes))


def _row(comparison: Comparison) -> tuple[Entry, ...]:
    figure, ours, setting = comparison.published, comparison.ours, comparison.setting
    failed = failed_text(comparison.failures, comparison.n)
    interval = f"{ours.low:.1f} to {ours.high:.1f}" if ours is not None and comparison.n > 1 else ""
    details = "\n".join(part for part in (interval, failed) if part)
    model = "" if setting is None else one_line(setting.model, 40)
    if comparison.differs:
        where = Entry(comparison.differs[0], "\n".join(comparison.differs[1:]))
    else:
        where = Entry("the same", f"{model}, {counted(comparison.n, 'sample')}")
    difference = comparison.difference
    return (
        Entry(figure_label(figure), figure.model),
        Entry(figure.policy),
        Entry(f"{figure.value:.1f}"),
        Entry(NONE if ours is None else f"{ours.mean:.1f}", details),
        Entry(NONE if difference is None else f"{difference:+.1f}"),
        where,
    )


def figure_label(figure: Published) -> str:
    """The figure in few words, such as "RULER 4096 MK1 at 20 %"."""
    at = f"at {budget_label(str(figure.budget))}"
    if figure.quantity == "loss":
        return f"mean loss, {figure.suite}, {at}"
    return f"RULER {figure.length} {RULER.get(figure.task, figure.task)} {at}"


def _sources(comparisons: Sequence[Comparison]) -> list[str]:
    """The settings of the figures, once each."""
    lines: dict[str, None] = {}
    for figure in (comparison.published for comparison in comparisons if comparison.setting is not None):
        kind = f"RULER at {figure.length} tokens" if figure.suite == "ruler" else f"losses over {figure.suite}"
        lines[
            f"{kind}: {figure.source}; budget {budget_label(str(figure.budget))}, question "
            f"{'seen' if figure.query_aware else 'not seen'}, {figure.template} template, split "
            f"{' or '.join(figure.splits)}, samples: {figure.samples}."
        ] = None
    return list(lines)


def _place(comparison: Comparison) -> tuple[str, str, str, str]:
    figure = comparison.published
    return figure.source, figure.suite, figure.model, figure.policy
