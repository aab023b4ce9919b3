"""Tables as text: for a terminal, as markdown, as HTML; and all cells as CSV."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import groupby

from jinja2 import Environment, PackageLoader, StrictUndefined
from rich import box
from rich.cells import cell_len
from rich.table import Table as RichTable
from rich.text import Text

from defensivekv.evaluation.report.aggregate import Aggregate
from defensivekv.evaluation.report.cell import Cell, Setting
from defensivekv.evaluation.report.order import FULL, Group, budget_rank, sorted_policies
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.tables import Column, Entry, Table
from defensivekv.evaluation.report.text import markdown_text, plain, sheet_text

_GAP = 2


@cache
def environment() -> Environment:
    """Where templates are found. Everything put into one is escaped, and its control characters spelt out."""
    made = Environment(
        loader=PackageLoader("defensivekv.evaluation.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: plain(value) if type(value) is str else value,
    )
    made.filters["groupwise"] = _groupwise
    return made


def _groupwise(columns: Sequence[Column]) -> list[dict[str, object]]:
    """Neighbouring columns of one group, for the row above their titles."""
    runs = [(name, len(list(of_group))) for name, of_group in groupby(columns, key=lambda column: column.group)]
    return [{"name": name, "span": span} for name, span in runs]


def html_table(table: Table) -> str:
    """The table as an HTML element, escaped."""
    return environment().get_template("table.html.j2").render(table=table)


def markdown_table(table: Table) -> str:
    """The table as markdown, intervals in parentheses, with its title before it and its notes after it."""
    title = f"**{markdown_text(table.title)}{', query-aware' if table.is_query_aware else ''}**"
    lines = [title, "", _markdown_row([markdown_text(column.title) for column in table.columns])]
    lines.append(_markdown_row(["---:" if column.is_number else "---" for column in table.columns]))
    lines += [_markdown_row([_markdown_entry(entry) for entry in row]) for row in table.rows]
    lines += ["", *map(markdown_text, table.notes)] if table.notes else []
    return "\n".join(lines) + "\n"


def rich_tables(table: Table, width: int) -> list[RichTable]:
    """The table for a terminal of `width` columns, broken into several where it is wider; each repeats its `lead`."""
    return [_rich_table(part) for part in _parts(table, width)]


def table_csv(table: Table) -> str:
    """The table as CSV: each place as text, its detail after it in parentheses."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([sheet_text(column.title) for column in table.columns])
    for row in table.rows:
        writer.writerow([sheet_text(_flat(entry)) for entry in row])
    return out.getvalue()


FIELDS = (
    "model model_revision dtype query_aware template suite length domain task policy budget level n failures "
    "truncations mean low high loss achieved cache_bytes full_bytes token_seconds prefill_seconds batch_size metric "
    "metric_version split revision seed not_comparable"
).split()


def scores_csv(results: Results) -> str:
    """All cells and all means over domains and suites as CSV, one a line; `level` says which. Scores are 0 to 1."""
    out = io.StringIO()
    writer = csv.DictWriter(out, FIELDS, restval="", lineterminator="\n")
    writer.writeheader()
    for setting in results.settings:
        domains = results.domains(setting)
        for group in results.groups(setting):
            own = [domain for of_group, domain in domains if of_group == group]
            for policy, budget in _lines(results, setting, group):
                place = _place(setting, group) | {"policy": policy, "budget": budget}
                writer.writerows(
                    _fields(line) for line in _of_line(results, setting, group, own, policy, budget, place)
                )
    return out.getvalue()


def _lines(results: Results, setting: Setting, group: Group) -> list[tuple[str, str]]:
    """Policies at their budgets, in the order of the tables."""
    pairs = {(cell.key.policy, cell.key.budget) for cell in results.of(setting, group)}
    order = sorted_policies(policy for policy, _ in pairs)
    return sorted(pairs, key=lambda pair: (pair[0] != FULL, budget_rank(pair[1]), order.index(pair[0])))


def _of_line(
    results: Results,
    setting: Setting,
    group: Group,
    domains: list[str],
    policy: str,
    budget: str,
    place: dict[str, object],
) -> Iterator[dict[str, object]]:
    for task in results.tasks(setting, group):
        cell = results.cell(setting, policy, budget, task)
        if cell is not None and cell.key.budget == budget:
            yield place | _of_cell(cell) | _measured(cell)
    for domain in domains:
        found = results.aggregate(setting, policy, budget, group, domain)
        yield place | {"level": "domain", "domain": domain} | _measured(found)
    yield place | {"level": "suite"} | _measured(results.aggregate(setting, policy, budget, group))


def _place(setting: Setting, group: Group) -> dict[str, object]:
    return {
        "model": setting.model,
        "query_aware": setting.query_aware,
        "template": setting.template,
        "suite": group.suite,
        "length": "" if group.length is None else group.length,
    }


def _of_cell(cell: Cell) -> dict[str, object]:
    names = ("domain", "metric", "metric_version", "split", "revision", "seed", "not_comparable", "model_revision")
    facts = {name: getattr(cell.facts, name) for name in (*names, "dtype")}
    return {"level": "task", "task": cell.key.task, **facts}


def _measured(found: Cell | Aggregate) -> dict[str, object]:
    names = "n failures truncations achieved cache_bytes full_bytes token_seconds prefill_seconds".split()
    values: dict[str, object] = {name: getattr(found, name) for name in names}
    if found.score is not None:
        values |= {"mean": found.score.mean, "low": found.score.low, "high": found.score.high}
    if isinstance(found, Aggregate) and found.loss is not None:
        values["loss"] = found.loss.mean
    values["batch_size"] = " ".join(map(str, sorted(found.batch_sizes)))
    return {name: value for name, value in values.items() if value is not None}


def _fields(line: dict[str, object]) -> dict[str, object]:
    written: dict[str, object] = {}
    for name, value in line.items():
        if isinstance(value, bool):
            written[name] = str(value).lower()
        elif isinstance(value, float):
            written[name] = f"{value:.6g}"
        else:
            written[name] = sheet_text(value) if isinstance(value, str) else value
    return written


def _flat(entry: Entry) -> str:
    return f"{entry.text} ({', '.join(entry.detail.splitlines())})" if entry.detail else entry.text


def _markdown_row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _markdown_entry(entry: Entry) -> str:
    text = markdown_text(_flat(replace(entry, detail="")))
    detail = f" ({markdown_text(', '.join(entry.detail.splitlines()))})" if entry.detail else ""
    return f"**{text}**{detail}" if entry.is_best else f"{text}{detail}"


def _parts(table: Table, width: int) -> Iterator[Table]:
    widths = [_GAP + _width(column, [row[i] for row in table.rows]) for i, column in enumerate(table.columns)]
    room = width - sum(widths[: table.lead]) - _GAP
    taken: list[int] = []
    parts: list[list[int]] = []
    for i in range(table.lead, len(widths)):
        if taken and sum(widths[j] for j in (*taken, i)) > room:
            parts.append(taken)
            taken = []
        taken.append(i)
    for number, part in enumerate([*parts, taken]):
        kept = [*range(table.lead), *part]
        yield replace(
            table,
            title=table.title if number == 0 else "",
            columns=tuple(table.columns[i] for i in kept),
            rows=tuple(tuple(row[i] for i in kept) for row in table.rows),
            notes=table.notes if number == len(parts) else (),
        )


def _width(column: Column, entries: list[Entry]) -> int:
    texts = [column.title, *(line for entry in entries for line in (entry.text, *entry.detail.splitlines()))]
    return max(map(cell_len, texts))


def _rich_table(table: Table) -> RichTable:
    title = Text(plain(table.title), style="bold" if table.title else "")
    if table.is_query_aware and table.title:
        title.append(", QUERY-AWARE", style="bold reverse")
    made = RichTable(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=title if table.title else None,
        title_justify="left",
        caption=Text("\n".join(map(plain, table.notes))) if table.notes else None,
        caption_justify="left",
    )
    for column in table.columns:
        # Text and not str: a name may hold what rich takes for markup.
        made.add_column(Text(plain(column.title)), justify="right" if column.is_number else "left", no_wrap=True)
    for number, row in enumerate(table.rows):
        texts = []
        for entry in row:
            text = Text(plain(entry.text), style="bold" if entry.is_best else "")
            if entry.detail:
                text.append("\n" + plain(entry.detail), style="not bold dim")
            texts.append(text)
        made.add_row(*texts, end_section=number in table.ends)
    return made
