import pytest
from transformers import AutoTokenizer

import defensivekv as dkv
from defensivekv.needleworld import MAX_NEW_TOKENS, TASKS, make_sample, score


@pytest.mark.parametrize("num_tokens", [256, 1024, 2048])
@pytest.mark.parametrize("task", TASKS)
def test_the_document_is_as_many_tokens_as_asked_for(task: str, num_tokens: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dkv.demo_model())
    for seed in range(5):
        sample = make_sample(task, num_tokens=num_tokens, seed=seed)
        ids = tokenizer(sample.document)["input_ids"]
        assert len(ids) == num_tokens
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("task", TASKS)
def test_the_answers_can_be_read_from_the_document_and_a_perfect_reply_scores_one(task: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dkv.demo_model())
    for seed in range(20):
        sample = make_sample(task, num_tokens=512, seed=seed)
        assert sample.questions
        for question in sample.questions:
            assert all(f" {reference} " in sample.document for reference in question.answer)
            assert score(question.reply, question.answer) == 1.0
            ids = tokenizer(question.reply, add_special_tokens=False)["input_ids"]
            assert len(ids) <= MAX_NEW_TOKENS
            assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("task", "questions", "references"),
    [("single_key", 1, 1), ("multi_key", 4, 1), ("multi_value", 4, 3), ("multi_query", 4, 4), ("variable_chain", 2, 3)],
)
def test_each_task_asks_for_what_its_name_says(task: str, questions: int, references: int) -> None:
    if task not in TASKS:
        return
    sample = make_sample(task, num_tokens=1024, seed=3)
    assert len(sample.questions) == questions
    assert {len(question.answer) for question in sample.questions} == {references}


def test_a_sample_is_the_same_for_one_seed_and_another_for_the_next() -> None:
    first = make_sample("multi_key", num_tokens=512, seed=1)
    assert first == make_sample("multi_key", num_tokens=512, seed=1)
    assert first.document != make_sample("multi_key", num_tokens=512, seed=2).document


def test_the_score_counts_whole_words_in_a_row_and_each_reference_alone() -> None:
    assert score("one misty harbor 47 83", ("47 83",)) == 1.0
    assert score("one misty harbor 47 08 83", ("47 83",)) == 0.0
    assert score("147 83", ("47 83",)) == 0.0
    assert score("47   83\n", ("47 83", "11 12")) == 0.5
    assert score("", ("47 83",)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "riddle"}, "unknown task"),
        ({"num_tokens": 100}, "at least 256"),
        ({"num_questions": 0}, "at least one"),
    ],
)
def test_what_cannot_be_made_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_sample(**({"task": "multi_key", "num_tokens": 512, "seed": 0} | change))  # type: ignore[arg-type]
