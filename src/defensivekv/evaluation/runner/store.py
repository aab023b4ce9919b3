"""The folder of a run, written so that it can be stopped at any moment.

run.json                  what was asked for, and what it was made with
records/<cell>.jsonl      a line for each sample, in the task's order
timings/<cell>.jsonl      a line for each answered sample

Whole windows of samples are written at once: first their times, then their records, which count. A line that broke
off, or a window that did, is cut when the run goes on.
"""

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from defensivekv.errors import DefensiveKVWarning, InvalidInputError
from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.runner.cells import Cell
from defensivekv.evaluation.runner.examiner import Outcome
from defensivekv.evaluation.runner.facts import Facts
from defensivekv.evaluation.runner.plan import RunPlan, make_plan
from defensivekv.evaluation.tasks.sample import Sample, Unreadable
from defensivekv.folders import replace_file

CellName = tuple[str, str, str, str, bool, str]
"""What tells a record's cell from all others: model, policy, budget, task, query_aware, template."""

_Line = TypeVar("_Line", bound=BaseModel)
_FIXED = ("seed", "num_samples", "data", "split", "max_context_tokens", "query_aware")


def claim(folder: Path, plan: RunPlan, facts: Facts) -> None:
    """Writes down what the folder's records are made with, adding to what is there.

    Raises InvalidInputError, naming the difference, where the folder was made with something else.
    """
    path = folder / "run.json"
    if path.exists():
        earlier = _read_run(path)
        _check_same(path, earlier, plan, facts)
        plan = _joined(make_plan(earlier["plan"]), plan)
    elif any((folder / "records").glob("*.jsonl")):
        raise InvalidInputError(f"{str(folder)!r} holds records and no run.json: give another folder")
    content = {"plan": plan.model_dump(mode="json"), "batch_size": plan.rows, "made_with": facts.noted}
    replace_file(path, json.dumps(content, indent=1) + "\n")


def _read_run(path: Path) -> dict[str, Any]:
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        return {"plan": earlier["plan"], "batch_size": earlier["batch_size"], "made_with": dict(earlier["made_with"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"cannot read {str(path)!r} ({error}): give another folder") from error


def _check_same(path: Path, earlier: dict[str, Any], plan: RunPlan, facts: Facts) -> None:
    made, old = earlier["made_with"], make_plan(earlier["plan"])
    pairs = [(name, getattr(old, name), getattr(plan, name)) for name in _FIXED]
    pairs.append(("batch_size", earlier["batch_size"], plan.rows))
    pairs += [(name, made.get(name), value) for name, value in facts.fixed.items()]
    titles = {each.title: each for each in old.policies}
    pairs += [(f"policy {new.title}", titles.get(new.title, new), new) for new in plan.policies]
    differences = [f"{name} was {before!r} and is now {now!r}" for name, before, now in pairs if before != now]
    if differences:
        raise InvalidInputError(
            f"{str(path.parent)!r} was made otherwise: {'; '.join(differences)}. Give another folder, or what it was "
            "made with"
        )
    for name in ("device", "versions"):
        if made.get(name) != facts.noted[name]:
            warnings.warn(
                f"{str(path.parent)!r} was begun with {name} {made.get(name)} and goes on with {facts.noted[name]}: "
                "its records may differ from those of one run; each says what it was made with",
                DefensiveKVWarning,
                stacklevel=4,
            )


def _joined(old: RunPlan, new: RunPlan) -> RunPlan:
    """The new plan, with the tasks, policies, budgets and lengths of both."""
    both = {name: _union(getattr(old, name), getattr(new, name)) for name in ("tasks", "policies", "budgets")}
    lengths = None if old.lengths is None or new.lengths is None else _union(old.lengths, new.lengths)
    return new.model_copy(update={**both, "lengths": lengths})


def _union(old: Sequence[Any], new: Sequence[Any]) -> tuple[Any, ...]:
    return (*old, *(each for each in new if each not in old))


class CellLog:
    """The two files of one cell. Opening it cuts what did not become a whole window."""

    def __init__(self, folder: Path, cell: Cell, samples: Sequence[Sample | Unreadable], rows: int) -> None:
        """rows: samples of a window. Raises InvalidInputError where the files are of other samples or data."""
        self.cell, self.samples = cell, samples
        self._rows = rows
        self._records = folder / "records" / f"{cell.slug}.jsonl"
        self._timings = folder / "timings" / f"{cell.slug}.jsonl"
        for path in (self._records, self._timings):
            path.parent.mkdir(exist_ok=True)
        self.done = self._resume()

    def _resume(self) -> int:
        """Cuts both files to whole windows, and says how many samples they hold."""
        records, ends = read_lines(self._records, Record)
        for record, sample in zip(records, self.samples, strict=False):
            self._check(record, sample)
        if len(records) > len(self.samples):
            raise InvalidInputError(f"{str(self._records)!r} has more samples than its task: give another folder")
        timings, timing_ends = read_lines(self._timings, Timing)
        done = len(records)
        answered = [record.sample for record in records if record.status == "ok"]
        timed = sum(1 for _ in _common_start([timing.sample for timing in timings], answered))
        while (done < len(self.samples) and done % self._rows) or self._answered(records[:done]) > timed:
            done -= 1
        _truncate(self._records, ends[done])
        _truncate(self._timings, timing_ends[self._answered(records[:done])])
        return done

    @staticmethod
    def _answered(records: Sequence[Record]) -> int:
        return sum(record.status == "ok" for record in records)

    def _check(self, record: Record, sample: Sample | Unreadable) -> None:
        expected = (sample.id.encode("utf-8", "replace").decode(), self.cell.task.revision)
        found = (record.sample, record.revision)
        if found != expected:
            raise InvalidInputError(
                f"{str(self._records)!r} holds sample {found[0]!r} of data {found[1]!r} where the task now has "
                f"{expected[0]!r} of {expected[1]!r}: give another folder, or the data it was made with"
            )

    @property
    def window(self) -> Sequence[Sample | Unreadable]:
        """The samples to be answered next; none at the end."""
        return self.samples[self.done : self.done + self._rows]

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Writes the outcomes of the present window."""
        timings = [outcome.timing.line() for outcome in outcomes if outcome.timing is not None]
        for path, lines in ((self._timings, timings), (self._records, [each.record.line() for each in outcomes])):
            with path.open("ab") as file:
                file.write("".join(lines).encode("utf-8"))
        self.done += len(outcomes)


def _common_start(first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    for one, other in zip(first, second, strict=False):
        if one != other:
            return
        yield one


def read_lines(path: Path, kind: type[_Line]) -> tuple[list[_Line], list[int]]:
    """The lines, and the bytes before each and after the last; none without a file.

    A last line that broke off is left out, as a run that was stopped leaves it. Raises InvalidInputError for a broken
    line that others follow, by its number.
    """
    lines: list[_Line] = []
    ends = [0]
    raw = path.read_bytes() if path.exists() else b""
    split = raw.splitlines(keepends=True)
    for number, line in enumerate(split, start=1):
        try:
            if not line.endswith(b"\n"):
                break
            lines.append(kind.model_validate_json(line))
        except ValidationError as error:
            if number == len(split):
                break
            raise InvalidInputError(
                f"{str(path)!r} line {number} is no record ({error.errors()[0]['msg']}): mend it, or delete the file "
                "to have its samples answered again"
            ) from None
        ends.append(ends[-1] + len(line))
    return lines, ends


def _truncate(path: Path, size: int) -> None:
    if path.exists() and path.stat().st_size > size:
        os.truncate(path, size)


def record_files(folder: Path) -> list[Path]:
    """The files of records, in the order of their names. Raises InvalidInputError where there are none."""
    found = sorted((folder / "records").glob("*.jsonl"))
    if not found:
        raise InvalidInputError(f"{str(folder)!r} holds no records: give the folder of a run")
    return found


def read_records(folder: Path) -> list[Record]:
    """All records of a run. Raises InvalidInputError where there are none."""
    return [record for path in record_files(folder) for record in read_lines(path, Record)[0]]


def read_timings(folder: Path) -> list[tuple[CellName, Timing]]:
    """The times of a run's answered samples, each with its cell's name. Raises as `read_records`."""
    found = []
    for path in record_files(folder):
        records = {record.sample: record for record in read_lines(path, Record)[0]}
        timings = read_lines(folder / "timings" / path.name, Timing)[0]
        found += [(_name(records[timing.sample]), timing) for timing in timings if timing.sample in records]
    return found


def _name(record: Record) -> CellName:
    return record.model, record.policy, record.budget, record.task, record.query_aware, record.template
