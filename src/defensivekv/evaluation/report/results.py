"""What an evaluation found: records gathered into cells, and cells into aggregates.

Knows no file, no figure and no page. Nothing is averaged over models, lengths, templates, or over whether the question
was seen; failures are counted and never scored.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.report.aggregate import Aggregate, aggregate_cells
from defensivekv.evaluation.report.cell import Cell, CellKey, Facts, Outcome, Setting
from defensivekv.evaluation.report.order import FULL, Group, budget_rank, sorted_groups, sorted_policies, sorted_tasks
from defensivekv.evaluation.report.text import one_line


@dataclass(frozen=True)
class Failure:
    """A sample that gave no answer, and why."""

    key: CellKey
    sample: str
    error: str


@dataclass(frozen=True)
class Results:
    """Cells by key, in no order that means anything, and what is asked of them."""

    cells: Mapping[CellKey, Cell]
    _aggregates: dict[tuple[object, ...], Aggregate] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_records(
        cls, records: Iterable[Record], timings: Iterable[tuple[CellKey | tuple[str, str, str, str, bool, str], Timing]]
    ) -> "Results":
        """Gathers records, in any order, with the timings of their cells; a timing without its record is left out.

        Raises InvalidInputError for a sample that is twice in a cell, for a cell of two settings (seeds, revisions,
        dtypes, ...), and for scores that are none: missing, outside 0 to 1, or not numbers.
        """
        outcomes: dict[CellKey, list[Outcome]] = defaultdict(list)
        facts: dict[CellKey, Facts] = {}
        examples: dict[CellKey, Record] = {}
        for record in records:
            key = CellKey.of(record)
            outcomes[key].append(Outcome.of(record))
            facts[key] = facts[key].merged(record, key) if key in facts else Facts.of(record)
            kept = examples.get(key)
            if record.status == "ok" and (kept is None or record.sample < kept.sample):
                examples[key] = record
        times: dict[CellKey, list[Timing]] = defaultdict(list)
        for given, timing in timings:
            times[CellKey(*given)].append(timing)
        cells = {
            key: Cell.gathered(key, facts[key], of_cell, times.get(key, []), examples.get(key))
            for key, of_cell in sorted(outcomes.items())
        }
        _refuse_two_places(cells)
        return cls(cells)

    @cached_property
    def settings(self) -> list[Setting]:
        """Models by name; of each, templates, and the question unseen before seen."""
        return sorted(self._by_setting, key=lambda s: (s.model, s.query_aware, s.template))

    def groups(self, setting: Setting) -> list[Group]:
        """The groups of tasks that the setting has."""
        return sorted_groups(self._by_setting.get(setting, {}))

    def of(self, setting: Setting, group: Group | None = None) -> list[Cell]:
        """The cells of the setting, or of one of its groups."""
        by_group = self._by_setting.get(setting, {})
        return [cell for each, cells in by_group.items() if group in (None, each) for cell in cells]

    def tasks(self, setting: Setting, group: Group, domain: str | None = None) -> list[str]:
        """The tasks of the group that any policy was asked, or of one of its domains, in their table's order."""
        domain_of = {cell.key.task: cell.facts.domain for cell in self.of(setting, group)}
        return sorted_tasks(task for task, of_task in domain_of.items() if domain in (None, of_task))

    def domains(self, setting: Setting) -> list[tuple[Group, str]]:
        """The domains of each group, in the order of the group's tasks."""
        found: dict[tuple[Group, str], None] = {}
        for group in self.groups(setting):
            domain_of = {cell.key.task: cell.facts.domain for cell in self.of(setting, group)}
            found.update(dict.fromkeys((group, domain_of[task]) for task in sorted_tasks(domain_of)))
        return list(found)

    def budgets(self, setting: Setting, group: Group | None = None) -> list[str]:
        """The budgets of evicting policies, small to large; the full cache's own where nothing else was run."""
        cells = self.of(setting, group)
        evicting = {cell.key.budget for cell in cells if cell.key.policy != FULL}
        return sorted(evicting or {cell.key.budget for cell in cells}, key=budget_rank)

    def policies(
        self, setting: Setting | None = None, group: Group | None = None, budget: str | None = None
    ) -> list[str]:
        """The policies in the paper's order, the full cache at every budget."""
        cells = self.cells.values() if setting is None else self.of(setting, group)
        return sorted_policies(c.key.policy for c in cells if budget in (None, c.key.budget) or c.key.policy == FULL)

    def cell(self, setting: Setting, policy: str, budget: str, task: str) -> Cell | None:
        """That cell, or None; the full cache's at any budget."""
        if policy == FULL:
            return self._full_cells.get((setting, task))
        return self.cells.get(CellKey(setting.model, policy, budget, task, setting.query_aware, setting.template))

    @cached_property
    def _by_setting(self) -> dict[Setting, dict[Group, list[Cell]]]:
        found: dict[Setting, dict[Group, list[Cell]]] = {}
        for cell in self.cells.values():
            found.setdefault(cell.key.setting, {}).setdefault(cell.group, []).append(cell)
        return found

    @cached_property
    def _full_cells(self) -> dict[tuple[Setting, str], Cell]:
        return {(key.setting, key.task): cell for key, cell in self.cells.items() if key.policy == FULL}

    def aggregate(
        self, setting: Setting, policy: str, budget: str, group: Group, domain: str | None = None
    ) -> Aggregate:
        """The policy at the budget over all tasks of a group, or of one of its domains."""
        cache_key = (setting, policy, budget, group, domain)
        if cache_key not in self._aggregates:
            tasks = self.tasks(setting, group, domain)
            own = {task: self.cell(setting, policy, budget, task) for task in tasks}
            full = {task: self.cell(setting, FULL, budget, task) for task in tasks}
            self._aggregates[cache_key] = aggregate_cells(own, full)
        return self._aggregates[cache_key]

    def failures(self) -> list[Failure]:
        """All of them, cell after cell."""
        return [
            Failure(cell.key, outcome.sample, outcome.error)
            for cell in self.cells.values()
            for outcome in cell.outcomes
            if outcome.score is None
        ]


def _refuse_two_places(cells: Mapping[CellKey, Cell]) -> None:
    """A task that is of two suites or domains would be averaged with different tasks in different rows."""
    places: dict[tuple[Setting, str], tuple[str, str]] = {}
    for cell in cells.values():
        place = (cell.facts.suite, cell.facts.domain)
        if places.setdefault((cell.key.setting, cell.key.task), place) != place:
            raise InvalidInputError(
                f"task {one_line(cell.key.task)!r} has more than one suite or domain: report one run at a time"
            )
