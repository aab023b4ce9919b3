import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.needleworld import TASKS, make_task
from defensivekv.evaluation.tasks.task import Task, TaskOptions
from defensivekv.needleworld import make_sample
from tests.evaluation.tasks.small_tokenizers import count, small_tokenizer


def test_the_tasks_are_the_suite_of_the_packaged_model() -> None:
    tokenizer = small_tokenizer("words")
    suite = [make_sample(name, num_tokens=1024, seed=42 * 10**6 + number) for name in TASKS for number in range(6)]
    samples = [sample for name in TASKS for sample in make_task(name, TaskOptions()).samples(tokenizer)]

    assert [sample.context for sample in samples] == [sample.document for sample in suite]
    for sample, original in zip(samples, suite, strict=True):
        assert [question.text for question in sample.questions] == [question.text for question in original.questions]
        assert [question.references for question in sample.questions] == [q.answer for q in original.questions]
        assert count(tokenizer, sample.context, special=True) == sample.metadata["length"] == 1024


def test_a_task_tells_of_itself() -> None:
    task: Task = make_task("multi_key", TaskOptions(num_samples=2, seed=3), 512)

    assert (task.name, task.domain, task.metric) == ("needleworld/multi_key@512", "multi key", "word_recall")
    assert task.revision == "generator 1 seed 3"
    assert len(list(task.samples(small_tokenizer("words")))) == 2


@pytest.mark.parametrize("name", TASKS)
def test_the_longest_documents_can_be_made(name: str) -> None:
    assert len(list(make_task(name, TaskOptions(), 4096).samples(small_tokenizer("words")))) == 6


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"no task 'qa': known are single_key"):
        make_task("qa", TaskOptions())
    for length in (255, 4097):
        with pytest.raises(InvalidInputError, match=f"no {length} tokens: ask for 256 to 4096"):
            make_task("multi_key", TaskOptions(), length)
