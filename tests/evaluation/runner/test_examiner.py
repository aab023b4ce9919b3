from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import METRICS
from defensivekv.evaluation.runner import examiner as examiner_module
from defensivekv.evaluation.runner.examiner import Examiner, Outcome
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.evaluation.runner.reading import read_prompts
from defensivekv.evaluation.tasks.sample import Question, Sample, Unreadable
from defensivekv.integrations.transformers import ContextStore, is_enabled
from defensivekv.needleworld import make_sample, score
from tests.evaluation.runner.samples import (
    byte_model,
    byte_tokenizer,
    examine,
    packaged,
    plan_of,
    records_of,
    sample,
)

SMALL = {"name": "layer-defensivekv", "window_size": 8}


@pytest.mark.parametrize("policy", ["full", "layer-defensivekv"])
def test_answers_scores_and_bytes_are_those_of_asking_each_compressed_document(policy: str) -> None:
    model, tokenizer = packaged()
    made = [
        make_sample(task, num_tokens=512, seed=seed) for task in ("multi_query", "variable_chain") for seed in (1, 2)
    ]
    samples: list[Sample | Unreadable] = [
        Sample(each.task + str(each.seed), each.document, tuple(Question(q.text, q.answer) for q in each.questions), 26)
        for each in made
    ]
    outcomes = examine((model, tokenizer), plan_of([policy], budgets=[0.2]), samples)
    assert not is_enabled(model)
    for each, outcome in zip(made, outcomes, strict=True):
        record = outcome.record
        made_with = dkv.policy(policy, 1.0 if policy == "full" else 0.2)
        context = dkv.compress(model, tokenizer, each.document, made_with, keep_scores=False)
        answers = [context.ask(question.text, max_new_tokens=26) for question in each.questions]
        assert record.outputs == answers
        assert record.scores == [score(text, q.answer) for text, q in zip(answers, each.questions, strict=True)]
        assert record.achieved == context.report().achieved
        # The stock cache holds no positions.
        positions = 4 * context.report().entries_seen if policy == "full" else 0
        assert record.cache_bytes == context.report().nbytes - positions
        assert outcome.timing is not None
        assert outcome.timing.token_seconds is not None
        assert outcome.timing.batch_size == 2
    dkv.disable(model)


@pytest.mark.parametrize("policy", ["full", SMALL])
def test_batched_samples_get_the_records_that_they_get_alone(policy: Any) -> None:
    loaded = byte_model(), byte_tokenizer()
    samples: list[Sample | Unreadable] = [sample(0), sample(3), sample(1, questions=(Question("one?", ("x",)),))]
    together = examine(loaded, plan_of([policy], batch_size=3), samples)
    alone = [records_of(loaded, plan_of([policy]), [each])[0] for each in samples]
    assert [outcome.record for outcome in together] == alone
    assert [outcome.timing.batch_size for outcome in together if outcome.timing] == [2, 2, 1]
    assert len({record.context_tokens for record in alone}) == 3
    assert all(record.status == "ok" for record in alone)


def test_a_record_holds_what_was_held() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    record = records_of((model, tokenizer), plan_of([SMALL], budgets=[0.3]), [sample()])[0]
    config = model.config
    heads = config.num_hidden_layers * config.num_key_value_heads
    held = sum(map(sum, record.lengths))
    assert held == int(record.context_tokens * heads * 0.3)
    assert record.achieved == pytest.approx(held / (record.context_tokens * heads))
    assert record.cache_bytes == held * (2 * config.head_dim * 4 + 4)
    assert record.full_bytes == record.context_tokens * heads * 2 * config.head_dim * 4
    full = records_of((model, tokenizer), plan_of(["full"]), [sample()])[0]
    assert full.full_bytes == full.cache_bytes == record.full_bytes
    assert record.policy == "layer-defensivekv+window_size=8"
    assert record.policy_parts["window_size"] == "8"
    assert record.metric_version == METRICS["word_recall"].version
    assert set(record.versions) >= {"torch", "transformers", "defensivekv"}


def test_documents_read_in_chunks_are_held_to_the_same_budget() -> None:
    loaded = byte_model(), byte_tokenizer()
    whole, chunked = (
        records_of(loaded, plan_of([policy], budgets=[0.3], batch_size=2), [sample(0), sample(1)])
        for policy in (SMALL, {**SMALL, "chunk_size": 16} if isinstance(SMALL, dict) else f"{SMALL}+chunk_size=16")
    )
    for one, other in zip(whole, chunked, strict=True):
        assert (one.status, other.status) == ("ok", "ok")
        assert sum(map(sum, one.lengths)) == sum(map(sum, other.lengths))
        assert one.lengths != other.lengths
        assert one.cache_bytes == other.cache_bytes


def test_an_adaptive_budget_is_recorded_with_what_it_came_to() -> None:
    loaded = byte_model(), byte_tokenizer()
    (record,) = records_of(loaded, plan_of([SMALL], budgets=["auto:0.5"]), [sample()])
    assert (record.status, record.budget) == ("ok", "auto:0.5")
    assert 0.1 < record.achieved < 0.9


def test_a_failure_is_the_one_samples_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = byte_model(), byte_tokenizer()
    read = read_prompts
    sizes: list[int] = []

    def fragile(model: PreTrainedModel, tokenizer: Any, setting: Any, prompts: list[list[int]], **options: Any) -> Any:
        sizes.append(len(prompts))
        if any("poison" in tokenizer.decode(prompt) for prompt in prompts):
            raise RuntimeError("CUDA out of memory")
        return read(model, tokenizer, setting, prompts, **options)

    clean = records_of(loaded, plan_of([SMALL], batch_size=3), [sample(0), sample(2)])
    monkeypatch.setattr(examiner_module, "read_prompts", fragile)
    bad = sample(1, context="poison " * 20)
    records = records_of(loaded, plan_of([SMALL], batch_size=3), [sample(0), bad, sample(2)])
    assert sizes == [3, 1, 1, 1]
    assert records[1].error == "RuntimeError: CUDA out of memory"
    assert (records[1].outputs, records[1].scores) == ([], [])
    assert [records[0], records[2]] == clean


def test_an_interrupt_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(examiner_module, "read_prompts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        records_of((byte_model(), byte_tokenizer()), plan_of([SMALL]), [sample()])


def test_what_cannot_be_read_is_a_failure_and_counts_no_answer() -> None:
    loaded = byte_model(), byte_tokenizer()
    samples: list[Sample | Unreadable] = [
        Unreadable("broken", "data.jsonl line 7: no 'answers'"),
        sample(1, context=" \n"),
        sample(2, questions=()),
        sample(3, context="lone \ud800 surrogate " * 5),
        sample(4, metadata={"depth": 50}),
    ]
    records = records_of(loaded, plan_of([SMALL]), samples)
    assert [record.status for record in records] == ["failed", "failed", "failed", "failed", "ok"]
    assert "data.jsonl line 7" in records[0].error
    assert "empty" in records[1].error
    assert "asks no question" in records[2].error
    assert records[4].metadata == {"depth": 50}
    assert all(type(record).model_validate_json(record.line()) == record for record in records)


def test_a_cache_above_its_budget_is_a_failure() -> None:
    loaded = byte_model(), byte_tokenizer()
    # Below one window in a short prompt, where the policy keeps the prompt whole.
    record = records_of(loaded, plan_of([{"name": "snapkv", "window_size": 40}], budgets=[0.2]), [sample()])[0]
    assert record.status == "failed"
    seen = record.context_tokens * loaded[0].config.num_hidden_layers * loaded[0].config.num_key_value_heads
    assert f"held {seen} entries, the budget allows {seen // 5}" in record.error


def test_a_metric_that_fails_or_leaves_its_range_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = byte_model(), byte_tokenizer()
    metric = METRICS["word_recall"]
    broken = type(metric)(metric.name, metric.version, lambda *_: float("nan"), "", "")
    monkeypatch.setitem(METRICS, "word_recall", broken)
    record = records_of(loaded, plan_of([SMALL]), [sample()])[0]
    assert record.status == "failed"
    assert "between 0 and 1" in record.error


def test_settings_that_a_model_brings_do_not_change_greedy_answers() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    before = records_of((model, tokenizer), plan_of(["full"]), [sample(max_new_tokens=12)])[0].outputs
    config = model.generation_config
    config.do_sample, config.temperature, config.top_p, config.repetition_penalty = True, 0.6, 0.9, 1.8
    config.no_repeat_ngram_size, config.suppress_tokens = 1, tokenizer(before[0])["input_ids"]
    torch.manual_seed(1)
    assert records_of((model, tokenizer), plan_of(["full"]), [sample(max_new_tokens=12)])[0].outputs == before
    assert model.generation_config is config, "the model's own settings stay"


def test_a_model_that_cannot_be_evicted_from_is_refused_unless_only_its_full_cache_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(model: PreTrainedModel) -> None:
        raise dkv.UnsupportedModelError("not this one")

    monkeypatch.setattr(examiner_module, "check_supported", refuse)
    loaded = byte_model(), byte_tokenizer()
    assert records_of(loaded, plan_of(["full"]), [sample()])[0].status == "ok"
    with pytest.raises(dkv.UnsupportedModelError):
        Examiner(*loaded, plan_of([SMALL]))


@pytest.mark.parametrize("in_turns", [False, True])
def test_a_store_spares_the_reading_and_changes_no_record(tmp_path: Path, in_turns: bool) -> None:
    loaded, samples = (byte_model(), byte_tokenizer()), [sample(number, in_turns=in_turns) for number in range(3)]
    plan = plan_of([SMALL], store=str(tmp_path / "store"))

    def one_by_one(plan: RunPlan) -> list[Outcome]:
        return [outcome for each in samples for outcome in examine(loaded, plan, [each])]

    plain, first, again = one_by_one(plan_of([SMALL])), one_by_one(plan), one_by_one(plan)
    assert len(ContextStore(tmp_path / "store").list()) == 3
    for outcomes in (first, again):
        assert [outcome.record.line() for outcome in outcomes] == [outcome.record.line() for outcome in plain]
    times = [[outcome.timing.prefill_seconds for outcome in each if outcome.timing] for each in (first, again)]
    assert len(times[0]) == 3
    assert times[0] == times[1], "the time of the reading that made it"


def test_a_store_without_room_changes_no_record(tmp_path: Path) -> None:
    loaded = byte_model(), byte_tokenizer()
    plan = plan_of([SMALL], store=str(tmp_path / "store"), store_max_bytes="1KiB")
    with pytest.warns(dkv.DefensiveKVWarning, match="not put into"):
        outcomes = examine(loaded, plan, [sample()])
    plain = examine(loaded, plan_of([SMALL]), [sample()])
    assert [one.record.line() for one in outcomes] == [one.record.line() for one in plain]
    assert outcomes[0].record.status == "ok"


def test_a_store_is_for_documents_read_one_at_a_time() -> None:
    with pytest.raises(InvalidInputError, match="leave batch_size out"):
        plan_of([SMALL], store="somewhere", batch_size=2)
    with pytest.raises(InvalidInputError, match="store_max_bytes is for a store"):
        plan_of([SMALL], store_max_bytes="1GiB")
    assert plan_of([SMALL], store="somewhere").rows == 1
