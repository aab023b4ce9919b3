import json
from pathlib import Path
from typing import Any

import pytest

from defensivekv.errors import DefensiveKVWarning, InvalidInputError
from defensivekv.evaluation.runner import evaluate, read_records, read_timings, rescore
from defensivekv.evaluation.runner.cells import Cell, TaskFacts
from defensivekv.evaluation.runner.examiner import Examiner, Outcome
from defensivekv.evaluation.runner.plan import RunPlan, make_plan
from defensivekv.evaluation.runner.store import CellLog
from defensivekv.evaluation.tasks.sample import Sample, Unreadable
from defensivekv.folders import locked
from tests.evaluation.runner.samples import ListedTask, Loaded, byte_model, byte_tokenizer, examine, plan_of, sample

SMALL = {"name": "snapkv", "window_size": 8}
SAMPLES: tuple[Sample | Unreadable, ...] = (
    sample(0),
    sample(1),
    Unreadable("broken", "line 3"),
    sample(3, context=""),
    sample(4),
)
TASK = ListedTask(SAMPLES)


def load(plan: RunPlan) -> Loaded:
    return byte_model(), byte_tokenizer()


def contents(folder: Path, part: str = "records") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / part).iterdir()}


def run(
    folder: Path, policies: list[Any] | None = None, *, tasks: list[ListedTask] | None = None, **fields: Any
) -> None:
    plan = plan_of(policies or ["full", SMALL], **({"batch_size": 2} | fields))
    evaluate(plan, folder, load, tasks=tasks or [TASK])


def test_a_run_is_a_plan_and_a_line_for_each_sample(tmp_path: Path) -> None:
    run(tmp_path)
    assert set(contents(tmp_path)) == {"listed.task--full--1.jsonl", "listed.task--snapkv+window_size=8--0.5.jsonl"}
    assert contents(tmp_path).keys() == contents(tmp_path, "timings").keys()
    for lines in contents(tmp_path).values():
        assert [json.loads(line)["sample"] for line in lines.splitlines()] == [each.id for each in SAMPLES]
    assert [(name[1], timing.sample) for name, timing in read_timings(tmp_path)] == [
        (policy, answered) for policy in ("full", "snapkv+window_size=8") for answered in ("s0", "s1", "s4")
    ]
    assert {record.status for record in read_records(tmp_path)} == {"ok", "failed"}
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["batch_size"] == 2
    assert make_plan(stored["plan"]).policies[1].options == {"window_size": 8}
    assert not any(b"seconds" in lines for lines in contents(tmp_path).values())


def test_a_run_cut_at_any_byte_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    plan = plan_of([SMALL])
    cell = Cell(TaskFacts.of(TASK, SAMPLES), plan.settings()[0])
    made = examine(load(plan), plan, list(SAMPLES))
    whole = CellLog(tmp_path, cell, SAMPLES, 2)
    _write(whole, made)
    records, timings = (next((tmp_path / part).iterdir()) for part in ("records", "timings"))
    expected = records.read_bytes(), timings.read_bytes()
    steps = [range(0, len(text) + 1, max(1, len(text) // 97)) for text in expected]
    for cut in steps[0]:
        for timings_cut in (0, cut * len(expected[1]) // len(expected[0]), len(expected[1])):
            records.write_bytes(expected[0][:cut])
            timings.write_bytes(expected[1][:timings_cut])
            log = CellLog(tmp_path, cell, SAMPLES, 2)
            assert log.done in (0, 2, 4, 5)
            _write(log, made)
            assert (records.read_bytes(), timings.read_bytes()) == expected


def _write(log: CellLog, made: list[Outcome]) -> None:
    while log.window:
        log.append(made[log.done : log.done + len(log.window)])


def test_a_last_line_that_was_damaged_is_answered_again(tmp_path: Path) -> None:
    run(tmp_path)
    expected = contents(tmp_path)
    for path in (tmp_path / "records").iterdir():
        text = path.read_bytes()
        path.write_bytes(text[:-150] + b"\0" * 149 + b"\n")
    run(tmp_path)
    assert contents(tmp_path) == expected


def test_a_damaged_line_that_others_follow_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    run(tmp_path)
    path = sorted((tmp_path / "records").iterdir())[0]
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 1
    path.write_bytes(lines[0][:100] + b"\0" * 50 + lines[0][150:] + b"".join(lines[1:]))
    before = contents(tmp_path)
    for again in (run, read_records, rescore):
        with pytest.raises(InvalidInputError, match=r"\.jsonl' line 1 is no record .*: mend it, or delete"):
            again(tmp_path)
    assert contents(tmp_path) == before


def test_what_is_done_is_not_done_again_and_more_may_be_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, ["full"], budgets=[0.5])
    first = contents(tmp_path)
    asked: list[tuple[str, str, str]] = []
    examine_window = Examiner.examine

    def watched(self: Examiner, cell: Cell, window: Any) -> list[Outcome]:
        asked.append((cell.task.name, cell.setting.title, cell.setting.budget))
        return examine_window(self, cell, window)

    monkeypatch.setattr(Examiner, "examine", watched)
    run(tmp_path, ["full"], budgets=[0.5])
    assert asked == []
    more = ListedTask((sample(7),), name="listed/more")
    run(tmp_path, ["full", SMALL], budgets=[0.4], tasks=[TASK, more])
    title = "snapkv+window_size=8"
    assert set(asked) == {
        ("listed/task", title, "0.4"),
        ("listed/more", title, "0.4"),
        ("listed/more", "full", "1"),
    }
    assert first.items() <= contents(tmp_path).items()
    stored = make_plan(json.loads((tmp_path / "run.json").read_text())["plan"])
    assert [policy.title for policy in stored.policies] == ["full", title]
    assert stored.budgets == ("0.5", "0.4")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 7}, "seed was 42 and is now 7"),
        ({"batch_size": 3}, "batch_size was 2 and is now 3"),
        ({"query_aware": True}, "query_aware was False"),
        ({"max_context_tokens": 50}, "max_context_tokens was None"),
        ({"template": "plain"}, "template was 'chat' and is now 'plain'"),
        ({"policies": ["full", {"name": "adakv", "label": "snapkv+window_size=8"}]}, "policy snapkv"),
    ],
)
def test_a_folder_made_otherwise_is_refused_by_name_and_left_alone(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    run(tmp_path)
    before = contents(tmp_path), (tmp_path / "run.json").read_bytes()
    with pytest.raises(InvalidInputError, match=named):
        run(tmp_path, change.pop("policies", ("full", SMALL)), **change)
    assert (contents(tmp_path), (tmp_path / "run.json").read_bytes()) == before


def test_a_folder_of_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    other = byte_model(seed=1), byte_tokenizer()
    with pytest.raises(InvalidInputError, match="model_revision was"):
        evaluate(plan_of(["full"], batch_size=2), tmp_path, lambda _: other, tasks=[TASK])
    with pytest.raises(InvalidInputError, match="of data '1' where the task now has"):
        run(tmp_path, tasks=[ListedTask(SAMPLES, revision="2")])
    with pytest.raises(InvalidInputError, match="'s1'"):
        run(tmp_path, tasks=[ListedTask((SAMPLES[1], *SAMPLES[2:]))])
    with pytest.raises(InvalidInputError, match="more samples"):
        run(tmp_path, tasks=[ListedTask(SAMPLES[:2])])


def test_a_folder_begun_with_other_packages_goes_on_with_a_warning(tmp_path: Path) -> None:
    run(tmp_path, ["full"])
    path = tmp_path / "run.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.warns(DefensiveKVWarning, match="begun with versions"):
        run(tmp_path, ["full"])


def test_a_second_run_in_the_folder_is_refused_at_once(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(InvalidInputError, match="another run is writing"):
        run(tmp_path)
    run(tmp_path, ["full"])


def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="cannot write"):
        run(tmp_path / "file")
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(InvalidInputError, match="cannot read"):
        run(tmp_path)


def test_errors_that_no_sample_is_to_blame_for_come_before_any_record(tmp_path: Path) -> None:
    long = ListedTask(SAMPLES, name="listed/long@4096", length=4096)
    for tasks, message in (
        ([TASK, long], r"1024 positions, too few for listed/long@4096 \(4096\): give --lengths up to 1024"),
        ([TASK, ListedTask((), name="listed/none")], "listed/none has no samples"),
        ([ListedTask(SAMPLES, metric="taste")], "unknown metric 'taste'"),
        ([ListedTask((sample(0), sample(0)))], "two samples of id 's0'"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            run(tmp_path, tasks=tasks)
        assert not (tmp_path / "records").exists() or not contents(tmp_path)


def test_names_that_files_cannot_have_stay_apart() -> None:
    facts = [TaskFacts.of(ListedTask(SAMPLES, name=name), SAMPLES) for name in ("a/b c", "a/b:c", "a/b_c", "a/b/c")]
    setting = plan_of(["full"]).settings()[0]
    slugs = {Cell(fact, setting).slug for fact in facts}
    assert len(slugs) == 4
    assert not any(set(slug) & set("/: ") for slug in slugs)
