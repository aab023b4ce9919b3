"""A run from its plan to its folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.runner.cells import Cell, Setting, TaskFacts
from defensivekv.evaluation.runner.crew import Crew, Load, LocalCrew, Tell
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.evaluation.runner.rescoring import rescore_file
from defensivekv.evaluation.runner.scribe import metric_version
from defensivekv.evaluation.runner.store import CellLog, claim
from defensivekv.evaluation.tasks.sample import Sample, Unreadable
from defensivekv.evaluation.tasks.task import Task
from defensivekv.folders import locked


@dataclass(frozen=True)
class Step:
    """How far a run is: of one cell `done` of its `samples`, in a run of so many `cells`."""

    cell: Cell
    done: int
    samples: int
    cells: int


def _say_nothing(step: Step) -> None:
    """Progress that nobody watches."""


def evaluate(
    plan: RunPlan,
    folder: Path,
    load: Load,
    *,
    tasks: Sequence[Task] | None = None,
    on_ray: bool = False,
    ray_address: str | None = None,
    progress: Callable[[Step], None] = _say_nothing,
) -> None:
    """Answers every cell of the plan that the folder does not hold yet.

    load: loads the model. tasks: in place of those that the plan names, for tasks of one's own. progress: told after
    each window, and once of what was done before.

    Raises typed errors for what no sample is to blame for: an unknown task, policy or metric, a model that cannot
    be loaded or has no room for a task's length, a folder that is another run's, or that another run writes to.
    """
    settings = plan.settings()
    tasks = make_tasks(plan) if tasks is None else list(tasks)
    for task in tasks:
        metric_version(task.metric)

    def tell(cell: Cell, done: int, samples: int) -> None:
        progress(Step(cell, done, samples, len(tasks) * len(settings)))

    with locked(folder):
        crew = _gather(plan, load, on_ray, ray_address)
        try:
            _check_room(tasks, crew.facts.max_positions)
            for task in tasks:
                _samples(task, crew, only_first=True)
            claim(folder, plan, crew.facts)
            for path in sorted((folder / "records").glob("*.jsonl")):
                rescore_file(path, stale_only=True)
            crew.run(_logs(folder, plan, tasks, settings, crew, tell), tell)
        finally:
            crew.close()


def make_tasks(plan: RunPlan) -> list[Task]:
    """The plan's tasks. Raises InvalidInputError for unknown ones, and for none."""
    from defensivekv.evaluation.tasks.registry import make_tasks as make

    tasks = list(make(plan.tasks, plan.task_options))
    if not tasks:
        raise InvalidInputError(f"tasks {', '.join(plan.tasks)} are none: give --tasks")
    return tasks


def _gather(plan: RunPlan, load: Load, on_ray: bool, address: str | None) -> Crew:
    if not on_ray:
        return LocalCrew(load, plan)
    from defensivekv.evaluation.runner.ray import RayCrew

    return RayCrew(load, plan, address)


def _check_room(tasks: list[Task], max_positions: int | None) -> None:
    if max_positions is None:
        return
    long = [task for task in tasks if task.length is not None and task.length > max_positions]
    if long:
        named = ", ".join(f"{task.name} ({task.length})" for task in long)
        raise InvalidInputError(
            f"the model has {max_positions} positions, too few for {named}: give --lengths up to {max_positions}, "
            "leave those tasks out, or take a model with more"
        )


def _logs(
    folder: Path, plan: RunPlan, tasks: list[Task], settings: list[Setting], crew: Crew, tell: Tell
) -> Iterator[CellLog]:
    """The cells, task by task, so that the samples of one task are held at a time."""
    for task in tasks:
        samples = _samples(task, crew)
        for setting in settings:
            log = CellLog(folder, Cell(TaskFacts.of(task, samples), setting), samples, plan.rows)
            if log.done:
                tell(log.cell, log.done, len(samples))
            yield log


def _samples(task: Task, crew: Crew, *, only_first: bool = False) -> list[Sample | Unreadable]:
    """The task's samples. Raises InvalidInputError where it has none, or two of one id."""
    drawn = iter(task.samples(crew.tokenizer))
    first = next(drawn, None)
    if first is None:
        raise InvalidInputError(f"task {task.name} has no samples: give its data, or leave it out")
    if only_first:
        return [first]
    samples = [first, *drawn]
    seen: set[str] = set()
    for sample in samples:
        if sample.id in seen:
            raise InvalidInputError(f"task {task.name} has two samples of id {sample.id!r}: ids must differ")
        seen.add(sample.id)
    return samples
