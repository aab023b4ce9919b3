"""What goes on from a context: turns, appended text, smaller budgets. The context itself stays as it is."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers import Context
from tests.integrations.transformers.contexts.cases import assert_same, context_of, document
from tests.integrations.transformers.models import tiny_model
from tests.integrations.transformers.tokenizers import END, USER, small_tokenizer

CHAT = (
    "[BOS]{% for m in messages %}{% if m['role'] == 'user' %} [USER] {{ m['content'] }} [END] [ASSISTANT]"
    "{% else %} {{ m['content'] }} [END]{% endif %}{% endfor %}"
)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


# ---------------------------------------------------------------------- less of the document

WHOLE = ["layer-defensivekv", "defensivekv", "snapkv", "criticalkv", "adakv", "h2o", "expected-attention", "kvzip"]


def _positions(context: Context) -> list[list[int]]:
    cache = context.cache
    return [
        cache.kept_positions(layer, 0, head).tolist()
        for layer in range(cache.lengths.shape[0])
        for head in range(cache.lengths.shape[2])
    ]


@pytest.mark.parametrize("policy", [*WHOLE, "streaming-llm", "keydiff", "tova"])
def test_a_shrunk_context_is_the_document_compressed_to_that_budget(model: PreTrainedModel, policy: str) -> None:
    large = context_of(model, policy, budget=0.6)
    for budget in (0.4, 0.2, 48):
        small, expected = large.shrink(budget), context_of(model, policy, budget=budget)
        assert _positions(small) == _positions(expected)
        assert small.ask("w7 w8", max_new_tokens=8) == expected.ask("w7 w8", max_new_tokens=8)
        assert small.report() == expected.report()
    twice = large.shrink(0.4).shrink(0.2)
    assert _positions(twice) == _positions(context_of(model, policy, budget=0.2))
    assert _positions(large) == _positions(context_of(model, policy, budget=0.6))


@pytest.mark.parametrize("policy", ["layer-defensivekv", "snapkv"])
def test_a_document_that_is_kept_whole_can_be_shrunk(model: PreTrainedModel, policy: str) -> None:
    whole = context_of(model, policy, budget=1.0)
    assert _positions(whole.shrink(0.2)) == _positions(context_of(model, policy, budget=0.2))


def test_an_adaptive_budget_can_be_shrunk(model: PreTrainedModel) -> None:
    found = context_of(model, budget="auto:0.9")
    assert _positions(found.shrink(0.15)) == _positions(context_of(model, budget=0.15))


@pytest.mark.parametrize("policy", ["pyramidkv", "cake", "chunkkv"])
def test_layers_and_chunks_that_would_get_more_keep_what_they_have(model: PreTrainedModel, policy: str) -> None:
    large = context_of(model, policy, budget=0.6)
    small, expected = large.shrink(0.3), context_of(model, policy, budget=0.3)
    held = [set(one) for one in _positions(large)]
    assert all(set(one) <= other for one, other in zip(_positions(small), held, strict=True))
    assert small.report().entries_kept <= expected.report().entries_kept
    assert small.report().entries_kept >= 0.9 * expected.report().entries_kept


def test_a_document_read_in_chunks_can_be_shrunk(model: PreTrainedModel) -> None:
    large = context_of(model, budget=0.6, chunk_size=64)
    small = large.shrink(0.2)
    assert small.report().achieved == pytest.approx(0.2, abs=0.005)
    held = [set(one) for one in _positions(large)]
    assert all(set(one) <= other for one, other in zip(_positions(small), held, strict=True))
    window = set(range(301 - 32, 301))
    assert all(window <= set(one) for one in _positions(small))
    assert small.ask("w7", max_new_tokens=5)


def test_a_shrunk_context_from_a_file_needs_no_document(model: PreTrainedModel, tmp_path: Path) -> None:
    context_of(model, budget=0.6).save(tmp_path / "book.kv")
    small = dkv.load_context(tmp_path / "book.kv", model, small_tokenizer()).shrink(0.2)
    assert _positions(small) == _positions(context_of(model, budget=0.2))
    small.save(tmp_path / "small.kv")
    assert_same(dkv.load_context(tmp_path / "small.kv", model, small_tokenizer()), small)
    assert (tmp_path / "small.kv").stat().st_size < 0.45 * (tmp_path / "book.kv").stat().st_size


def test_layers_of_which_nothing_goes_are_shared(model: PreTrainedModel) -> None:
    large = context_of(model, "layer-defensivekv", budget=0.6)
    same = large.shrink(0.6)
    for index in large.cache.evicted_layers:
        ours, theirs = (context.cache.layers[index].store.view.prefix for context in (same, large))
        assert ours is theirs


def test_scores_take_their_bytes_and_no_others(model: PreTrainedModel) -> None:
    with_scores, without = context_of(model, "defensivekv"), context_of(model, "defensivekv", keep_scores=False)
    entries = without.report().entries_kept
    assert with_scores.cache.nbytes - without.cache.nbytes == 8 * entries
    assert context_of(model, "snapkv").cache.nbytes - without.cache.nbytes == 4 * entries
    assert _positions(with_scores) == _positions(without)


@pytest.mark.parametrize(
    ("options", "budget", "error", "says"),
    [
        ({"budget": 0.3}, 0.5, dkv.BudgetError, "holds 30.00% of its prompt .* is gone"),
        ({"budget": 0.3}, 0.01, dkv.BudgetError, "below the observation window"),
        ({"budget": 0.3}, "1MiB", dkv.BudgetError, "give a share or a count"),
        ({"budget": 0.3}, "auto:0.5", dkv.BudgetError, "give a share or a count"),
        ({"budget": 0.3, "keep_scores": False}, 0.2, dkv.CacheError, "keep_scores=True before its prompt"),
        ({"max_entries": 96}, 0.2, dkv.CacheError, r"fork\(max_entries=...\)"),
        ({"policy": "ada-criticalkv"}, 0.2, dkv.CacheError, "no scores were kept"),
        ({"policy": "full"}, 0.2, dkv.CacheError, "no scores were kept"),
    ],
)
def test_what_cannot_be_shrunk_is_refused(
    model: PreTrainedModel, options: dict[str, Any], budget: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        context_of(model, **options).shrink(budget)


@pytest.mark.parametrize(
    ("options", "says"),
    [({"max_entries": 96}, "caches without a bound"), ({"policy": "ada-criticalkv"}, "'ada-criticalkv' cannot evict")],
)
def test_scores_that_cannot_be_kept_are_refused_before_the_prompt(
    model: PreTrainedModel, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(dkv.InvalidInputError, match=says):
        context_of(model, keep_scores=True, **options)


def test_rows_of_a_batch_are_shrunk_each_for_itself(model: PreTrainedModel) -> None:
    dkv.enable(model)
    ids = torch.cat([context_of(model).document_ids, context_of(model).document_ids.flip(1)])
    batch = dkv.EvictingCache(model, "defensivekv", 0.6, keep_scores=True)
    dkv.prefill(model, batch, ids)
    batch.reorder_cache(torch.tensor([1, 0, 1]))
    small = batch.shrink(0.2)
    for row, source in enumerate((1, 0, 1)):
        alone = dkv.EvictingCache(model, "defensivekv", 0.2)
        dkv.prefill(model, alone, ids[source : source + 1])
        for layer in range(3):
            for head in range(2):
                assert torch.equal(small.kept_positions(layer, row, head), alone.kept_positions(layer, 0, head))


# ---------------------------------------------------------------------- more text


@pytest.mark.parametrize("options", [{}, {"chunk_size": 64}, {"policy": "full"}, {"static_tokens": 400}])
def test_appended_text_is_read_as_if_it_had_followed(model: PreTrainedModel, options: dict[str, Any]) -> None:
    context, more = context_of(model, **options), document(50, seed=3)
    longer = context.append(more)
    assert longer.num_tokens == context.num_tokens + 50
    assert longer.ask("w7 w8", max_new_tokens=8) == context.ask(f"{more} w7 w8", max_new_tokens=8)
    assert torch.equal(longer.cache.lengths, context.cache.lengths)
    shares = [
        longer.cache.layers[index].store.view.prefix is context.cache.layers[index].store.view.prefix
        for index in context.cache.evicted_layers
    ]
    assert all(shares), "the document is held once"


@pytest.mark.parametrize("count", [300, 301, 302])
def test_as_much_text_again_is_no_second_reading_of_the_same(model: PreTrainedModel, count: int) -> None:
    longer = context_of(model).append(document(count, seed=3))
    assert longer.num_tokens == 301 + count


def test_a_bounded_context_stays_within_its_bound_as_text_is_appended(model: PreTrainedModel) -> None:
    context = context_of(model, max_entries=96)
    longer = context.append(document(200, seed=3))
    assert longer.cache.nbytes <= context.cache.nbytes + 12 * 3 * 2 * 2 * 16 * 4
    assert longer.report().prompt_tokens[0] > 480


def test_what_was_appended_goes_to_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    longer = context_of(model).append(document(50, seed=3))
    longer.save(tmp_path / "book.kv")
    loaded = dkv.load_context(tmp_path / "book.kv", model, small_tokenizer())
    assert_same(loaded, longer)
    further = loaded.append("w7 w8 w9").shrink(0.2)
    assert further.recipe.steps == ("append 50 tokens", "append 3 tokens", "shrink from 0.3")
    assert further.ask("w9", max_new_tokens=5)
    with pytest.raises(dkv.InvalidInputError, match="the text has no tokens"):
        loaded.append("  ")
    with pytest.raises(dkv.InvalidInputError, match="document and text: 1052 tokens"):
        loaded.append(document(700))


# ---------------------------------------------------------------------- more turns


def test_a_turn_goes_on_where_the_last_one_ended(model: PreTrainedModel, tmp_path: Path) -> None:
    context = context_of(model)
    answer, after = context.turn("w7 w8", max_new_tokens=6)
    assert answer.text == context.ask("w7 w8", max_new_tokens=6)
    assert after.num_tokens == context.num_tokens + 2 + answer.new_tokens
    said = small_tokenizer().decode(after.document_ids[0, context.num_tokens :])
    by_hand = context.ask(f"{said} w9", max_new_tokens=6)
    assert after.ask("w9", max_new_tokens=6) == by_hand
    second, later = after.turn("w9", max_new_tokens=6)
    assert second.text == by_hand
    later.save(tmp_path / "talk.kv")
    loaded = dkv.load_context(tmp_path / "talk.kv", model, small_tokenizer())
    assert_same(loaded, later)
    assert context.ask("w7 w8", max_new_tokens=6) == answer.text, "the document alone is as it was"


def test_a_chat_template_stands_between_turns(model: PreTrainedModel) -> None:
    tokenizer = small_tokenizer(CHAT)
    model.generation_config.eos_token_id = END
    context = dkv.compress(model, tokenizer, document(), "snapkv", 0.3)
    answer, after = context.turn("w7", max_new_tokens=3)
    said = after.document_ids[0].tolist()
    ended = answer.new_tokens < 3 or said[-1] == END
    assert said[context.num_tokens :][:3] == [7, END, 4]
    question = after.answer("w8", max_new_tokens=2).question_tokens
    assert question == 5, "the answer's end, the user's mark, the word, its end and the model's mark"
    whole = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": f"{document()} w7"},
            {"role": "assistant", "content": answer.text},
            {"role": "user", "content": "w8"},
        ],
        add_generation_prompt=True,
    )
    ids = whole if isinstance(whole, list) else whole["input_ids"]
    ours = [*said, END, USER, 8, END, 4]
    assert ended or ours == ids


def test_text_after_an_answer_would_be_the_models_own_under_a_template(model: PreTrainedModel) -> None:
    context = dkv.compress(model, small_tokenizer(CHAT), document(), "snapkv", 0.3).append("w7")
    _, after = context.turn("w7", max_new_tokens=3)
    with pytest.raises(dkv.InvalidInputError, match="make the text part of the next question"):
        after.append("w8")


def test_one_answer_is_one_turn(model: PreTrainedModel) -> None:
    with pytest.raises(dkv.InvalidInputError, match="one answer"):
        context_of(model).turn("w7", num_beams=2)
