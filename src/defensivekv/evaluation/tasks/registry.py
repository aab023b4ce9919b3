"""Tasks by their names."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks import haystack, longbench, needleworld, ruler, shared_context
from defensivekv.evaluation.tasks.task import Task, TaskOptions


@dataclass(frozen=True)
class _Suite:
    """tasks: names after "suite/". whole: those that the suite's name alone stands for. lengths: default ones.

    make: of a task's name, the options and a length. A suite without lengths of its own has the length 0.
    """

    tasks: tuple[str, ...]
    whole: tuple[str, ...]
    lengths: tuple[int, ...]
    make: Callable[[str, TaskOptions, int], Task]


_SUITES = {
    "ruler": _Suite(tuple(ruler.TASKS), tuple(ruler.TASKS), (4096,), ruler.make_task),
    "longbench": _Suite(
        longbench.TASKS, longbench.TASKS, (), lambda name, options, _: longbench.make_task(name, options)
    ),
    "haystack": _Suite(haystack.TASKS, haystack.TASKS[:1], haystack.DEFAULT_LENGTHS, haystack.make_task),
    "shared-context": _Suite(
        (), ("",), shared_context.DEFAULT_LENGTHS, lambda _, options, length: shared_context.make_task(options, length)
    ),
    "needleworld": _Suite(needleworld.TASKS, needleworld.TASKS, (needleworld.DEFAULT_LENGTH,), needleworld.make_task),
}

SUITES = tuple(_SUITES)
"""What a spec may begin with."""


def make_tasks(specs: Sequence[str], options: TaskOptions) -> list[Task]:
    """The tasks that the specs name, each once, in their order.

    specs: a suite, such as "ruler", or "suite/task", such as "ruler/vt"; a task at several lengths is several tasks.
    Files are read here, so that what is wrong with them is known before any model runs. Raises InvalidInputError for
    no specs, an unknown name (with the nearest ones), options that mean nothing, and whatever a suite refuses.
    """
    if not specs:
        raise InvalidInputError(f"no task is named: give a suite, one of {', '.join(SUITES)}, or suite/task")
    if options.num_samples is not None and options.num_samples < 1:
        raise InvalidInputError(f"{options.num_samples} samples make no task: ask for at least one")
    if options.lengths is not None and (not options.lengths or min(options.lengths) < 1):
        raise InvalidInputError(f"lengths {options.lengths} mean nothing: give numbers of tokens such as 4096")
    wanted = dict.fromkeys(
        (suite, task, length) for spec in specs for suite, task in _expand(spec) for length in _lengths(suite, options)
    )
    return [_SUITES[suite].make(task, options, length) for suite, task, length in wanted]


def _expand(spec: str) -> list[tuple[str, str]]:
    if spec in _SUITES:
        return [(spec, task) for task in _SUITES[spec].whole]
    suite, _, task = spec.partition("/")
    if suite in _SUITES and task in _SUITES[suite].tasks:
        return [(suite, task)]
    known = [*_SUITES, *(f"{suite}/{task}" for suite, found in _SUITES.items() for task in found.tasks)]
    nearest = get_close_matches(spec, known, n=3, cutoff=0.5)
    advice = f"did you mean {' or '.join(nearest)}?" if nearest else f"the suites are {', '.join(SUITES)}"
    raise InvalidInputError(f"unknown task {spec!r}: {advice}")


def _lengths(suite: str, options: TaskOptions) -> tuple[int, ...]:
    default = _SUITES[suite].lengths
    return (options.lengths or default) if default else (0,)
