from pathlib import Path

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import METRICS
from defensivekv.evaluation.tasks import longbench, ruler
from defensivekv.evaluation.tasks.registry import SUITES, make_tasks
from defensivekv.evaluation.tasks.task import TaskOptions
from tests.evaluation.tasks.longbench_files import record, write_lines


def names(*specs: str, lengths: tuple[int, ...] | None = None) -> list[str]:
    return [task.name for task in make_tasks(specs, TaskOptions(lengths=lengths))]


def test_a_suites_name_stands_for_its_tasks_at_their_default_lengths() -> None:
    assert names("ruler") == [f"ruler/{task}@4096" for task in ruler.TASKS]
    assert names("haystack") == [f"haystack@{length}" for length in (1024, 2048, 4096, 8192)]
    assert names("shared-context") == ["shared-context@4096"]
    assert len(names("needleworld")) == 5


def test_longbench_is_read_from_the_data_folder(tmp_path: Path) -> None:
    for dataset in longbench.TASKS:
        write_lines(tmp_path, dataset, [record()])

    tasks = make_tasks(["longbench"], TaskOptions(data=tmp_path, lengths=(4096,)))
    assert [task.name for task in tasks] == [f"longbench/{dataset}" for dataset in longbench.TASKS]


def test_lengths_make_a_task_each() -> None:
    assert names("haystack/number", "needleworld/multi_key", lengths=(512, 1024)) == [
        "haystack/number@512", "haystack/number@1024", "needleworld/multi_key@512", "needleworld/multi_key@1024",
    ]  # fmt: skip


def test_a_task_named_twice_is_made_once() -> None:
    found = names("needleworld/multi_key", "needleworld", "needleworld/multi_key")

    assert found[0] == "needleworld/multi_key@1024"
    assert len(found) == len(set(found)) == 5


def test_every_task_says_what_a_result_needs() -> None:
    for task in make_tasks([suite for suite in SUITES if suite != "longbench"], TaskOptions()):
        assert task.metric in METRICS
        assert task.name.split("@")[0].split("/")[0] == task.suite
        assert task.domain
        assert task.revision


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("rule", "unknown task 'rule': did you mean ruler"),
        ("longbench/trek", "unknown task 'longbench/trek': did you mean longbench/trec"),
        ("ruler/vt@4096", "did you mean ruler/vt"),
        ("haystack/", "did you mean haystack"),
        ("zzz", "unknown task 'zzz': the suites are ruler, longbench, haystack, shared-context, needleworld"),
        ("", "unknown task ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(spec: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_tasks(["needleworld", spec], TaskOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TaskOptions(num_samples=0), "0 samples make no task"),
        (TaskOptions(lengths=()), "mean nothing"),
        (TaskOptions(lengths=(4096, -1)), "mean nothing"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: TaskOptions, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_tasks(["needleworld"], options)
    with pytest.raises(InvalidInputError, match="no task is named"):
        make_tasks([], options)
