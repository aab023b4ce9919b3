"""The page: everything in one HTML file that loads nothing and runs nothing."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from defensivekv.evaluation.report.cell import Cell, Setting
from defensivekv.evaluation.report.comparison import compare
from defensivekv.evaluation.report.comparison_table import comparison_table
from defensivekv.evaluation.report.notes import notes
from defensivekv.evaluation.report.order import FULL, Group, budget_label, sorted_policies
from defensivekv.evaluation.report.pictures import Picture, shown_budget
from defensivekv.evaluation.report.rendering import environment, html_table
from defensivekv.evaluation.report.results import Results
from defensivekv.evaluation.report.tables import Table, domain_table, summary_table, task_table
from defensivekv.evaluation.report.text import one_line, shortened
from defensivekv.evaluation.report.wording import EXPLANATION, setting_label

SHOWN_FAILURES = 50
_SHOWN_EXAMPLES = 6
_SHOWN_LETTERS = 600


@dataclass(frozen=True)
class Example:
    """A question and what each policy answered; each answer: policy, output, score out of 100."""

    task: str
    sample: str
    question: str
    references: tuple[str, ...]
    answers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Cut:
    """Documents of a task that were cut. samples: how many at most under one policy; tokens: the most of one sample."""

    task: str
    samples: int
    of: int
    tokens: int


def render_page(results: Results, pictures: Mapping[Setting, Sequence[Picture]], *, against_paper: bool = False) -> str:
    """The page as HTML, with the pictures' files inside it. What models and datasets wrote is shown as text only."""
    failures = results.failures()
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            sections=[_section(results, setting, pictures.get(setting, ())) for setting in results.settings],
            explanation=EXPLANATION,
            notes=notes(results),
            comparison=_html(comparison_table(compare(results))) if against_paper else None,
            failures=[
                {
                    "place": f"{one_line(f.key.model, 60)}{', query-aware' if f.key.query_aware else ''}, "
                    f"{one_line(f.key.policy, 40)} at {budget_label(f.key.budget)}, {one_line(f.key.task, 80)}",
                    "sample": one_line(f.sample, 60),
                    "error": shortened(f.error, _SHOWN_LETTERS),
                }
                for f in failures[:SHOWN_FAILURES]
            ],
            num_failures=len(failures),
        )
    )


def _section(results: Results, setting: Setting, pictures: Sequence[Picture]) -> dict[str, object]:
    budgets = results.budgets(setting)
    tables = [domain_table(results, setting, budget) for budget in budgets]
    return {
        "title": setting_label(setting),
        "query_aware": setting.query_aware,
        "facts": _facts(results.of(setting), setting),
        "parts": _parts(results.of(setting)),
        "groups": [_group_section(results, setting, group) for group in results.groups(setting)],
        "domains": [_html(table) for table in tables if table is not None],
        "pictures": [
            {"source": f"data:image/png;base64,{base64.b64encode(p.path.read_bytes()).decode()}", "caption": p.caption}
            for p in pictures
        ],
        "examples": _examples(results, setting),
        "cuts": _cuts(results.of(setting)),
    }


def _group_section(results: Results, setting: Setting, group: Group) -> dict[str, object]:
    wide = [task_table(results, setting, group, budget) for budget in results.budgets(setting, group)]
    return {
        "title": group.label,
        "summary": _html(summary_table(results, setting, group)),
        "tables": [_html(table) for table in wide] if len(results.tasks(setting, group)) > 1 else [],
    }


def _html(table: Table) -> Markup:
    # The template of tables has escaped what is in it.
    return Markup(html_table(table))


def _facts(cells: Sequence[Cell], setting: Setting) -> list[tuple[str, str]]:
    def each(name: str) -> str:
        return ", ".join(sorted({one_line(str(getattr(cell.facts, name)), 120) or "none" for cell in cells}))

    versions = {f"{one_line(package, 40)} {one_line(v, 40)}" for cell in cells for package, v in cell.facts.versions}
    return [
        ("model", one_line(setting.model, 120)),
        ("revision of the weights", each("model_revision")),
        ("dtype", each("dtype")),
        ("device", ", ".join(sorted({one_line(device, 80) for cell in cells for device in cell.facts.devices}))),
        ("versions", ", ".join(sorted(versions)) or "none given"),
        ("seed", each("seed")),
        ("template", one_line(setting.template, 40)),
        ("split of context and question", each("split")),
        ("data", each("revision")),
        ("metrics", ", ".join(sorted({f"{one_line(c.facts.metric, 40)} {c.facts.metric_version}" for c in cells}))),
    ]


def _parts(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    found: dict[str, set[str]] = {}
    for cell in cells:
        text = ", ".join(f"{one_line(name, 40)}: {one_line(part, 120)}" for name, part in cell.facts.policy_parts)
        found.setdefault(cell.key.policy, set()).add(text)
    return [(one_line(policy, 60), "; or ".join(sorted(found[policy]))) for policy in sorted_policies(found)]


def _cuts(cells: Sequence[Cell]) -> list[Cut]:
    cuts: dict[str, Cut] = {}
    for cell in cells:
        if cell.truncations:
            most = max(outcome.truncated_tokens for outcome in cell.outcomes)
            task = cell.key.task
            old = cuts.get(task, Cut(task, 0, 0, 0))
            cuts[task] = Cut(
                task, max(old.samples, cell.truncations), max(old.of, len(cell.outcomes)), max(old.tokens, most)
            )
    return [cuts[task] for task in sorted(cuts)]


def _examples(results: Results, setting: Setting) -> list[Example]:
    budget = shown_budget(results, setting)
    found = []
    for group in results.groups(setting):
        for task in results.tasks(setting, group):
            example = _example(results, setting, budget, task)
            if example is not None:
                found.append(example)
    # Spread over the tasks rather than the first ones.
    step = max(1, -(-len(found) // _SHOWN_EXAMPLES))
    return found[::step]


def _example(results: Results, setting: Setting, budget: str, task: str) -> Example | None:
    cells = [results.cell(setting, policy, budget, task) for policy in results.policies(setting, None, budget)]
    records = [cell.example for cell in cells if cell is not None and cell.example is not None]
    if not any(record.questions and record.outputs for record in records):
        return None
    first = min(record.sample for record in records)
    same = [record for record in records if record.sample == first and record.outputs]
    answers = tuple(
        (
            "full cache" if record.policy == FULL else one_line(record.policy, 60),
            shortened(record.outputs[0], _SHOWN_LETTERS),
            f"{100 * record.scores[0]:.0f}",
        )
        for record in same
    )
    chosen = same[0]
    return Example(
        one_line(task, 80),
        one_line(chosen.sample, 60),
        shortened(chosen.questions[0] + chosen.answer_prefixes[0], _SHOWN_LETTERS),
        tuple(shortened(reference, 200) for reference in chosen.references[0]),
        answers,
    )
