from dataclasses import replace
from pathlib import Path

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import METRICS
from defensivekv.evaluation.runner import evaluate, read_records, rescore
from defensivekv.evaluation.runner.examiner import Examiner
from defensivekv.evaluation.runner.plan import RunPlan
from tests.evaluation.runner.samples import ListedTask, Loaded, byte_model, byte_tokenizer, plan_of, sample

TASK = ListedTask((sample(0), sample(1, context=""), sample(2)))


def load(plan: RunPlan) -> Loaded:
    return byte_model(), byte_tokenizer()


def test_a_new_metric_gives_new_scores_without_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(plan_of(["full"]), tmp_path, load, tasks=[TASK])
    before = read_records(tmp_path)
    assert rescore(tmp_path) == 0
    metric = METRICS["word_recall"]
    newer = replace(metric, version=metric.version + 1, function=lambda *_: 0.25)
    monkeypatch.setitem(METRICS, "word_recall", newer)

    assert rescore(tmp_path) == len(before)
    after = read_records(tmp_path)
    assert [record.scores for record in after] == [[0.25, 0.25], [], [0.25, 0.25]]
    assert {record.metric_version for record in after} == {metric.version + 1}
    changed = {"scores", "metric_version"}
    for old, new in zip(before, after, strict=True):
        assert old.model_dump(exclude=changed) == new.model_dump(exclude=changed)
    assert [path.suffix for path in (tmp_path / "records").iterdir()] == [".jsonl"]


def test_going_on_rescores_what_an_older_metric_scored_and_asks_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(plan_of(["full"]), tmp_path, load, tasks=[TASK])
    metric = METRICS["word_recall"]
    newer = replace(metric, version=metric.version + 1, function=lambda *_: 0.5)
    monkeypatch.setitem(METRICS, "word_recall", newer)
    monkeypatch.setattr(Examiner, "examine", lambda *_: pytest.fail("nothing is to be asked"))
    evaluate(plan_of(["full"]), tmp_path, load, tasks=[TASK])
    assert [record.scores for record in read_records(tmp_path)] == [[0.5, 0.5], [], [0.5, 0.5]]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no records"):
        rescore(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
