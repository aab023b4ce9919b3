"""The tables, before anything is known of a terminal or a page: policies down, tasks across."""

from dataclasses import dataclass

from defensivekv.evaluation.report.aggregate import Aggregate
from defensivekv.evaluation.report.cell import Cell, Setting
from defensivekv.evaluation.report.order import FULL, Group, budget_label, task_label
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.text import one_line
from defensivekv.evaluation.report.wording import (
    NONE,
    bytes_text,
    counted,
    failed_text,
    interval_text,
    milliseconds,
    percent,
    seconds_text,
    setting_label,
    share_text,
)


@dataclass(frozen=True)
class Entry:
    """What stands in a place of a table. detail: below it, smaller. is_best: of its column, the full cache aside."""

    text: str
    detail: str = ""
    is_best: bool = False


@dataclass(frozen=True)
class Column:
    """title: over the column. group: over several. is_number: set to the right."""

    title: str
    group: str = ""
    is_number: bool = True


@dataclass(frozen=True)
class Table:
    """lead: how many first columns say what a row is; they are repeated where a table is broken. ends: rows, by their
    number, below which a line stands. is_query_aware: to be shown in bold beside the title.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Entry, ...], ...]
    lead: int
    ends: frozenset[int] = frozenset()
    notes: tuple[str, ...] = ()
    is_query_aware: bool = False


_HELD = (Column("policy", is_number=False), Column("KV held"), Column("a token"))


def summary_table(results: Results, setting: Setting, group: Group) -> Table:
    """All policies at all budgets over a group's tasks: the mean, its interval, the loss, memory and time."""
    columns = (
        Column("budget"),
        *_HELD,
        Column("mean"),
        Column("95 %"),
        Column("loss"),
        Column("samples"),
        Column("failed"),
        Column("cut"),
        Column("kept"),
        Column("prefill"),
    )
    lines: list[tuple[str, str]] = []
    ends = set()
    budgets = results.budgets(setting, group)
    for policy in results.policies(setting, group)[:1]:
        if policy == FULL:
            lines.append((FULL, budgets[0]))
            ends.add(0)
    for budget in budgets:
        lines += [(policy, budget) for policy in results.policies(setting, group, budget) if policy != FULL]
        ends.add(len(lines) - 1)
    aggregates = [results.aggregate(setting, policy, budget, group) for policy, budget in lines]
    is_mixed = _is_mixed(aggregates)
    full = aggregates[0] if lines[0][0] == FULL else None
    means: dict[str, list[float]] = {budget: [] for budget in budgets}
    for (policy, budget), aggregate in zip(lines, aggregates, strict=True):
        if policy != FULL and aggregate.score is not None:
            means[budget].append(aggregate.score.mean)
    rows = []
    for (policy, budget), aggregate in zip(lines, aggregates, strict=True):
        score = aggregate.score
        is_best = policy != FULL and score is not None and score.mean == _best(means[budget])
        rows.append(
            (
                Entry("all" if policy == FULL else budget_label(budget)),
                *_held_entries(policy, aggregate, full, is_mixed),
                Entry(percent(score.mean) if score else NONE, _tasks_text(aggregate), is_best),
                Entry(interval_text(score, aggregate.n)),
                _loss_entry(aggregate),
                Entry(f"{aggregate.n:,}"),
                Entry(str(aggregate.failures)),
                Entry(str(aggregate.truncations)),
                Entry(NONE if aggregate.achieved is None else percent(aggregate.achieved)),
                Entry(seconds_text(aggregate.prefill_seconds)),
            )
        )
    return Table(
        title=f"{setting_label(setting)}: {group.label}, mean of {counted(len(results.tasks(setting, group)), 'task')}",
        columns=columns,
        rows=tuple(rows),
        lead=4,
        ends=frozenset(ends),
        notes=_notes(aggregates),
        is_query_aware=setting.query_aware,
    )


def overview_table(results: Results, setting: Setting, group: Group) -> Table:
    """Policies down, budgets across: the mean over a group's tasks with its interval, and nothing else."""
    budgets = results.budgets(setting, group)
    policies = results.policies(setting, group)
    rows = []
    found = {(p, b): results.aggregate(setting, p, b, group) for p in policies for b in budgets}
    best = {
        budget: _best([a.score.mean for (p, b), a in found.items() if b == budget and p != FULL and a.score])
        for budget in budgets
    }
    for policy in policies:
        aggregates = [found[policy, budget] for budget in budgets]
        # The full cache has no budget: its score stands once.
        shown = aggregates[:1] if policy == FULL else aggregates
        entries = [_overview_entry(aggregate, best[budget]) for budget, aggregate in zip(budgets, shown, strict=False)]
        entries += [Entry("")] * (len(budgets) - len(entries))
        rows.append((Entry(one_line(policy, 32)), *entries))
    return Table(
        title=f"{setting_label(setting)}: {group.label}, mean of {counted(len(results.tasks(setting, group)), 'task')}",
        columns=(_HELD[0], *(Column(budget_label(budget)) for budget in budgets)),
        rows=tuple(rows),
        lead=1,
        ends=frozenset({0}) if policies[0] == FULL else frozenset(),
        notes=_notes(list(found.values()), with_times=False),
        is_query_aware=setting.query_aware,
    )


def _overview_entry(aggregate: Aggregate, best: float | None) -> Entry:
    score = aggregate.score
    if score is None:
        return Entry(NONE)
    failed = f" {failed_text(aggregate.failures, aggregate.n)}" if aggregate.failures else ""
    interval = interval_text(score, aggregate.n).replace(" to ", "-")
    # Whole points: five budgets should fit a terminal.
    return Entry(f"{100 * score.mean:.0f} {interval}{failed}", is_best=score.mean == best)


def task_table(results: Results, setting: Setting, group: Group, budget: str) -> Table:
    """All policies at one budget, task by task, in the order of the paper's tables."""
    tasks = results.tasks(setting, group)
    policies = results.policies(setting, group, budget)
    domain_of = {cell.key.task: cell.facts.domain for cell in results.of(setting, group)}
    # Over tasks of one domain each, the domain's name would be as good as the task's.
    is_grouped = len(set(domain_of.values())) < len(tasks) and group.suite != "ruler"
    columns = [Column(task_label(t), one_line(domain_of[t], 40) if is_grouped else "") for t in tasks]
    aggregates = {policy: results.aggregate(setting, policy, budget, group) for policy in policies}
    scores: list[list[Entry]] = []
    for task in tasks:
        cells = [results.cell(setting, policy, budget, task) for policy in policies]
        means = [c.score.mean for c in cells if c is not None and c.score is not None and c.key.policy != FULL]
        scores.append([_score_entry(cell, _best(means)) for cell in cells])
    return _wide_table(
        f"{setting_label(setting)}: {group.label}, budget {budget_label(budget)}",
        setting,
        aggregates,
        [*columns],
        scores,
    )


def domain_table(results: Results, setting: Setting, budget: str) -> Table | None:
    """All policies at one budget, domain by domain over all suites; None for fewer than two domains, and where the
    domains of the only suite are its tasks.
    """
    domains = results.domains(setting)
    groups = {group for group, _ in domains}
    num_tasks = sum(len(results.tasks(setting, group)) for group in groups)
    if len(domains) < 2 or (len(groups) == 1 and num_tasks == len(domains)):
        return None
    policies = results.policies(setting, None, budget)
    columns = [Column(one_line(domain, 24), group.label if len(groups) > 1 else "") for group, domain in domains]
    scores: list[list[Entry]] = []
    for group, domain in domains:
        aggregates = {p: results.aggregate(setting, p, budget, group, domain) for p in policies}
        means = [a.score.mean for p, a in aggregates.items() if a.score is not None and p != FULL]
        best = _best(means)
        scores.append(
            [
                Entry(
                    percent(a.score.mean) if a.score else NONE,
                    _joined(interval_text(a.score, a.n), failed_text(a.failures, a.n), _tasks_text(a)),
                    p != FULL and a.score is not None and a.score.mean == best,
                )
                for p, a in aggregates.items()
            ]
        )
    rows = tuple((Entry(one_line(p, 32)), *(column[i] for column in scores)) for i, p in enumerate(policies))
    return Table(
        title=f"{setting_label(setting)}: domains, budget {budget_label(budget)}",
        columns=(_HELD[0], *columns),
        rows=rows,
        lead=1,
        ends=frozenset({0}) if policies[0] == FULL else frozenset(),
        is_query_aware=setting.query_aware,
    )


def _wide_table(
    title: str,
    setting: Setting,
    aggregates: dict[str, Aggregate],
    columns: list[Column],
    scores: list[list[Entry]],
) -> Table:
    full = aggregates.get(FULL)
    is_mixed = _is_mixed(list(aggregates.values()))
    best = _best([a.score.mean for p, a in aggregates.items() if p != FULL and a.score])
    rows = []
    for number, (policy, aggregate) in enumerate(aggregates.items()):
        score = aggregate.score
        mean = Entry(
            percent(score.mean) if score else NONE,
            _joined(
                interval_text(score, aggregate.n), failed_text(aggregate.failures, aggregate.n), _tasks_text(aggregate)
            ),
            policy != FULL and score is not None and score.mean == best,
        )
        rows.append(
            (
                *_held_entries(policy, aggregate, full, is_mixed),
                *(column[number] for column in scores),
                mean,
                _loss_entry(aggregate),
            )
        )
    return Table(
        title=title,
        columns=(*_HELD, *columns, Column("mean"), Column("loss")),
        rows=tuple(rows),
        lead=len(_HELD),
        ends=frozenset({0}) if full is not None else frozenset(),
        notes=_notes(list(aggregates.values())),
        is_query_aware=setting.query_aware,
    )


def _best(means: list[float]) -> float | None:
    """The highest, where there is another to be better than."""
    return max(means) if len(means) > 1 else None


def _score_entry(cell: Cell | None, best: float | None) -> Entry:
    if cell is None:
        return Entry(NONE, "not run")
    details = _joined(interval_text(cell.score, cell.n), failed_text(cell.failures, cell.n))
    if cell.score is None:
        return Entry(NONE, details)
    return Entry(percent(cell.score.mean), details, cell.key.policy != FULL and cell.score.mean == best)


def _is_mixed(aggregates: list[Aggregate]) -> bool:
    """Whether steps were timed in batches of different sizes."""
    return len(set().union(*(aggregate.batch_sizes for aggregate in aggregates))) > 1


def _held_entries(
    policy: str, aggregate: Aggregate, full: Aggregate | None, is_mixed: bool
) -> tuple[Entry, Entry, Entry]:
    held, whole = aggregate.cache_bytes, aggregate.full_bytes
    of_full = f"{share_text(held / whole)} of full" if held is not None and whole else ""
    token, stock = aggregate.token_seconds, None if full is None else full.token_seconds
    batch = ", ".join(map(str, sorted(aggregate.batch_sizes)))
    # Steps of batches of different sizes are not to be divided by each other.
    is_fair = full is not None and full.batch_sizes == aggregate.batch_sizes
    factor = f"x{token / stock:.2f}" if token is not None and stock and is_fair and policy != FULL else ""
    return (
        Entry(one_line(policy, 32)),
        Entry(bytes_text(held), of_full),
        Entry(milliseconds(token), _joined(factor, f"batch {batch}" if is_mixed and batch not in ("", "1") else "")),
    )


def _loss_entry(aggregate: Aggregate) -> Entry:
    loss = aggregate.loss
    if loss is None:
        return Entry(NONE)
    pairs = f"{aggregate.paired} pairs" if aggregate.paired < aggregate.n else ""
    return Entry(f"{percent(loss.mean)} %", _joined(interval_text(loss, aggregate.paired), pairs))


def _tasks_text(aggregate: Aggregate) -> str:
    have = len(aggregate.tasks) - len(aggregate.missing)
    return f"{have}/{len(aggregate.tasks)} tasks" if aggregate.missing else ""


def _notes(aggregates: list[Aggregate], *, with_times: bool = True) -> tuple[str, ...]:
    failures = sum(aggregate.failures for aggregate in aggregates)
    notes = []
    sizes = set().union(*(aggregate.batch_sizes for aggregate in aggregates)) - {1}
    if with_times and len(sizes) == 1 and not _is_mixed(aggregates):
        notes.append(f"Decoding steps were timed in batches of {sizes.pop()}.")
    if failures:
        notes.append(f"{counted(failures, 'sample')} failed and count in no mean.")
    if any(aggregate.missing for aggregate in aggregates):
        notes.append("No mean stands where a task has no answers: it would be over other tasks than the rest.")
    return tuple(notes)


def _joined(*details: str) -> str:
    return "\n".join(detail for detail in details if detail)
