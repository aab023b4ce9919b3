import re

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.shared_context import SharedContextTask, make_task
from defensivekv.evaluation.tasks.task import Task, TaskOptions
from tests.evaluation.tasks.small_tokenizers import NAMES, count, small_tokenizer

_FACT = re.compile(r"^The registry number of the city of (\w+) is (\d{7})\.$", re.MULTILINE)


def make(length: int = 2500, **options: int) -> SharedContextTask:
    return make_task(TaskOptions(**options), length)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NAMES)
def test_document_and_conversation_fill_the_length_and_no_more(name: str) -> None:
    tokenizer = small_tokenizer(name)
    longest = max(count(tokenizer, f" {sentence}") for sentence in make().prose.sentences)

    for sample in make().samples(tokenizer):
        turns = sum(count(tokenizer, question.text) + sample.max_new_tokens for question in sample.questions)
        total = count(tokenizer, sample.context, special=True) + turns
        assert 2500 - longest - 3 <= total <= 2500


def test_each_fact_stands_once_and_is_asked_for_in_its_own_turn() -> None:
    tokenizer = small_tokenizer("words")

    for sample in make().samples(tokenizer):
        facts = dict(_FACT.findall(sample.context))
        *turns, last = sample.questions
        assert sample.in_turns
        assert len(facts) == len(turns) == 8
        for turn in turns:
            (number,) = turn.references
            assert sample.context.count(number) == 1
            (city,) = [city for city, held in facts.items() if held == number]
            assert f"city of {city}?" in turn.text
        assert sorted(number for turn in turns for number in turn.references) == sorted(facts.values())
        both = [city for city in facts if city in last.text]
        assert len(both) == 2
        assert set(last.references) == {facts[city] for city in both}


def test_facts_are_spread_over_the_document() -> None:
    tokenizer = small_tokenizer("words")

    for sample in make(4096).samples(tokenizer):
        total = count(tokenizer, sample.context)
        places = [count(tokenizer, sample.context[: found.start()]) / total for found in _FACT.finditer(sample.context)]
        assert [round(8 * place - 0.5) for place in places] == list(range(8))


def test_turns_are_not_in_the_documents_order_and_draws_repeat() -> None:
    tokenizer = small_tokenizer("pieces")
    samples = list(make().samples(tokenizer))

    assert len(samples) == 4
    assert samples == list(make().samples(tokenizer))
    assert samples[:2] == list(make(num_samples=2).samples(tokenizer))
    assert samples != list(make(seed=7).samples(tokenizer))
    for sample in samples:
        in_order = [number for _, number in _FACT.findall(sample.context)]
        assert [turn.references[0] for turn in sample.questions[:-1]] != in_order


def test_a_task_tells_of_itself() -> None:
    task: Task = make(4096)

    assert (task.name, task.metric, task.domain) == ("shared-context@4096", "string_match_all", "shared context")
    assert task.not_comparable


def test_too_short_a_length_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="288 tokens are too few for the conversation"):
        make(288)
    with pytest.raises(InvalidInputError, match=r"leaves .* tokens for facts and prose"):
        next(iter(make(500).samples(small_tokenizer("pieces"))))
