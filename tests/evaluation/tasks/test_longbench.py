from pathlib import Path
from typing import cast

import pytest
from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import METRICS
from defensivekv.evaluation.tasks.longbench import TASKS, make_task
from defensivekv.evaluation.tasks.sample import Sample
from defensivekv.evaluation.tasks.task import Task, TaskOptions
from tests.evaluation.tasks.longbench_files import record, write_lines
from tests.evaluation.tasks.longbench_prompts import WHOLE

NO_TOKENIZER = cast(PreTrainedTokenizerBase, None)
ENDINGS = {"trec": "Type:", "triviaqa": "Answer:", "samsum": "Summary:"}
QUESTION_BEGINS = {
    "narrativeqa": "Now, answer the question based on the story as",
    "qasper": " Answer the question based on the above article as",
    "multifieldqa_en": "Now, answer the following question based on",
    **dict.fromkeys(("hotpotqa", "2wikimqa", "musique"), "Answer the question based on the given passages. Only"),
    "gov_report": "Now, write a one-page summary of the report.",
    "qmsum": "Now, answer the query based on the above",
    "multi_news": "Now, write a one-page summary of all the news.",
    **dict.fromkeys(("trec", "triviaqa", "samsum", "repobench-p"), "Who?"),
    "passage_count": "Please enter the final count",
    "passage_retrieval_en": "The following is an abstract.\n\nWho?",
    "lcc": "Next line of code:",
}


def only_sample(task: Task) -> Sample:
    (sample,) = task.samples(NO_TOKENIZER)
    assert isinstance(sample, Sample)
    return sample


def make(folder: Path, dataset: str, split: str | None = None, asked: str = "Who?") -> Sample:
    write_lines(folder, dataset, [record(input=asked)])
    return only_sample(make_task(dataset, TaskOptions(data=folder, split=split)))


def whole_prompt(dataset: str, passage: str, asked: str) -> str:
    return WHOLE[dataset].replace("{input}", asked).replace("{context}", passage, 1)


@pytest.mark.parametrize("split", ["authors", "kvpress"])
@pytest.mark.parametrize("dataset", TASKS)
def test_the_parts_rejoin_to_longbenchs_own_prompt(dataset: str, split: str, tmp_path: Path) -> None:
    asked = f"Who?\n{ENDINGS.get(dataset, '')}"
    sample = make(tmp_path, dataset, split, asked)

    (question,) = sample.questions
    assert sample.context + question.text + question.answer_prefix == whole_prompt(dataset, record()["context"], asked)


@pytest.mark.parametrize("dataset", TASKS)
def test_the_authors_context_ends_with_the_passage(dataset: str, tmp_path: Path) -> None:
    sample = make(tmp_path, dataset)

    (question,) = sample.questions
    assert sample.context.rstrip().endswith(record()["context"])
    assert question.answer_prefix == ""
    assert question.text.startswith(QUESTION_BEGINS[dataset])


@pytest.mark.parametrize("dataset", TASKS)
def test_kvpress_asks_no_more_than_it_has_to(dataset: str, tmp_path: Path) -> None:
    sample = make(tmp_path, dataset, "kvpress", f"Who?\n{ENDINGS.get(dataset, '')}")

    (question,) = sample.questions
    expected = {
        "gov_report": "Now, write a one-page summary of the report.\n\n",
        "multi_news": "Now, write a one-page summary of all the news.\n\n",
        "lcc": "",
        "repobench-p": "Who?\n",
        "qmsum": "Query: Who?\n\n",
        **dict.fromkeys(ENDINGS, "Who?\n"),
    }
    if dataset in expected:
        assert question.text == expected[dataset]
    assert question.answer_prefix == ENDINGS.get(dataset, question.answer_prefix)
    assert question.answer_prefix
    assert not sample.is_bare
    assert sample.stop == ()


def test_a_few_shot_record_without_the_usual_ending_keeps_its_prompt(tmp_path: Path) -> None:
    (question,) = make(tmp_path, "samsum", "kvpress", "Dialogue: A: Hi\nSummary: ").questions

    assert question.text == "Dialogue: A: Hi\nSummary: "
    assert question.answer_prefix == ""


def test_what_the_paper_says_of_each_dataset(tmp_path: Path) -> None:
    tasks = {name: make_task(name, TaskOptions(data=write_lines(tmp_path, name, [record()]))) for name in TASKS}
    samples = {name: only_sample(task) for name, task in tasks.items()}

    assert len(TASKS) == 16
    assert {task.metric for task in tasks.values()} < set(METRICS)
    assert {name for name, sample in samples.items() if sample.is_bare} == {
        "trec", "triviaqa", "samsum", "lcc", "repobench-p",
    }  # fmt: skip
    assert {name for name, sample in samples.items() if sample.stop} == {"samsum"}
    tokens = {name: sample.max_new_tokens for name, sample in samples.items()}
    assert [tokens[name] for name in ("narrativeqa", "multifieldqa_en", "musique", "qmsum")] == [128, 64, 32, 512]
    assert [tokens[name] for name in ("trec", "triviaqa", "samsum", "passage_count", "lcc")] == [64, 32, 128, 32, 64]
    assert {task.domain for task in tasks.values()} == {
        "single-document QA", "multi-document QA", "summarisation", "few-shot", "synthetic", "code",
    }  # fmt: skip


def test_a_task_tells_of_itself(tmp_path: Path) -> None:
    write_lines(tmp_path, "trec", [record(1), record(2)])
    task: Task = make_task("trec", TaskOptions(data=tmp_path, num_samples=1))

    assert (task.name, task.suite, task.split, task.length) == ("longbench/trec", "longbench", "authors", None)
    assert task.not_comparable == ""
    sample = only_sample(task)
    assert sample.id == "id1"
    assert sample.questions[0].references == ("Paragraph 1", "Paragraph 0")
    assert sample.choices == ("Paragraph 1", "Paragraph 2")
    assert sample.metadata == {"words": 7}


def test_unknown_names_are_refused_before_any_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no English dataset 'vcsum': known are narrativeqa, "):
        make_task("vcsum", TaskOptions(data=tmp_path))
    with pytest.raises(InvalidInputError, match=r"not split as 'half': known are authors, kvpress"):
        make_task("trec", TaskOptions(data=tmp_path, split="half"))


def test_rouge_is_asked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rouge", None)
    with pytest.raises(InvalidInputError, match="rouge"):
        make_task("samsum", TaskOptions(data=write_lines(tmp_path, "samsum", [record()])))
