"""A cache with the wrong model, with pieces of a prompt, or left out is noticed."""

import warnings

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from tests.integrations.transformers.models import feed, generate, prompt, tiny_model

PROMPT = 300


# ---------------------------------------------------------------------- the wrong model, or none


def test_a_cache_used_with_another_model_is_refused(model: PreTrainedModel) -> None:
    other = tiny_model("llama", seed=1)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    dkv.enable(other)
    with pytest.raises(dkv.CacheError, match="made for another model"):
        feed(other, cache, prompt(PROMPT))
    dkv.disable(other)
    cache.reset()
    with pytest.raises(dkv.CacheError, match="never arrived at defensivekv's attention"):
        feed(other, cache, prompt(PROMPT))


def test_a_cache_goes_on_after_another_model_tried_it_once_it_is_reset(model: PreTrainedModel) -> None:
    other = tiny_model("llama", seed=1)
    dkv.enable(other)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.CacheError, match="made for another model"):
        feed(other, cache, prompt(PROMPT))
    with pytest.raises(dkv.CacheError, match="broke off: call reset"):
        feed(model, cache, prompt(PROMPT))
    cache.reset()
    feed(model, cache, prompt(PROMPT))
    assert cache.report().achieved == pytest.approx(0.3)


def test_a_cache_used_after_disable_is_refused_and_goes_on_after_enable(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    feed(model, cache, prompt(PROMPT))
    plain = cache.fork()
    dkv.disable(model)
    for ids in (prompt(1), prompt(5)):
        with pytest.raises(dkv.CacheError, match=r"LlamaForCausalLM is not enabled.*call defensivekv.enable"):
            feed(model, cache, ids)
    dkv.enable(model)
    torch.testing.assert_close(feed(model, cache, prompt(5)), feed(model, plain, prompt(5)), atol=0, rtol=0)


def test_a_cache_of_a_model_that_was_never_enabled_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(dkv.CacheError, match="is not enabled"):
        feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT))


def test_attention_switched_back_by_other_means_is_noticed(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    feed(model, cache, prompt(PROMPT))
    model.set_attn_implementation("sdpa")
    with pytest.raises(dkv.CacheError, match="is not enabled"):
        feed(model, cache, prompt(1))


def test_a_cache_whose_model_is_gone_says_so() -> None:
    model = tiny_model("llama")
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    twin = tiny_model("llama")
    dkv.enable(twin)
    del model
    with pytest.raises(dkv.CacheError, match="is gone"):
        feed(twin, cache, prompt(PROMPT))


# ---------------------------------------------------------------------- prompts in pieces


def test_generate_tells_that_a_prompt_comes_in_chunks(model: PreTrainedModel) -> None:
    # Nothing that a cache is told gives chunks away; this fails when transformers renames what the check looks for.
    whole, told = (dkv.EvictingCache(model, "layer-defensivekv", 0.3) for _ in range(2))
    output = generate(model, prompt(PROMPT), whole, prefill_chunk_size=128, do_sample=False)
    told.expect(PROMPT)
    for chunk in prompt(PROMPT).split(128, dim=1):
        logits = feed(model, told, chunk)
    assert int(logits[0, -1].argmax()) == int(output[0, PROMPT])
    assert torch.equal(whole.lengths, told.lengths)
    assert int(whole.lengths.sum()) == 3 * 2 * PROMPT * 3 // 10


def test_a_policy_that_wants_the_whole_prompt_refuses_chunks_of_it_by_name(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "cake", 0.3)
    with pytest.raises(dkv.InvalidInputError, match=r"'cake' cannot evict in steps.*needs all queries at once"):
        generate(model, prompt(PROMPT), cache, prefill_chunk_size=128)
    assert cache.get_seq_length() == 0


def test_chunks_that_are_less_than_the_window_are_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.11)
    with pytest.raises(
        dkv.InvalidInputError, match=r"a chunk of 20 tokens, of a prompt of 300 .* is less than the window of 32"
    ):
        generate(model, prompt(PROMPT), cache, prefill_chunk_size=20)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(("budget", "size"), [(1.0, 64), (0.3, PROMPT), (0.3, 10**6)])
def test_chunked_prefill_that_hides_nothing_from_the_policy_is_taken(
    model: PreTrainedModel, budget: float, size: int
) -> None:
    chunked, plain = (dkv.EvictingCache(model, "defensivekv", budget) for _ in range(2))
    output = generate(model, prompt(PROMPT), chunked, prefill_chunk_size=size, do_sample=False)
    assert torch.equal(output, generate(model, prompt(PROMPT), plain, do_sample=False))


def test_chunked_reading_of_a_later_turn_is_not_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    feed(model, cache, prompt(PROMPT))
    kept = cache.lengths
    mask = torch.ones(1, PROMPT + 90, dtype=torch.long)
    generate(model, prompt(90, seed=1), cache, attention_mask=mask, prefill_chunk_size=32)
    assert cache.get_seq_length() == PROMPT + 90 + 3
    assert torch.equal(cache.lengths, kept)


def test_two_pieces_of_one_length_are_pointed_out(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    feed(model, cache, prompt(150))
    with pytest.warns(dkv.DefensiveKVWarning, match=r"chunks of one prompt.*call expect\(\)"):
        feed(model, cache, prompt(150, seed=1))


def test_a_text_that_is_read_twice_is_pointed_out(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.warns(dkv.DefensiveKVWarning, match="the whole text again"):
        generate(model, prompt(PROMPT), cache, use_cache=False, max_new_tokens=2)


# ---------------------------------------------------------------------- no evicting cache


def test_generate_without_an_evicting_cache_is_pointed_out(model: PreTrainedModel) -> None:
    with pytest.warns(dkv.DefensiveKVWarning, match="nothing is evicted: pass generate"):
        generate(model, prompt(PROMPT))
    with pytest.warns(dkv.DefensiveKVWarning, match="nothing is evicted: pass generate"):
        generate(model, prompt(PROMPT), DynamicCache(config=model.config))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "qwen3_next"])
def test_models_of_all_kinds_point_it_out(architecture: str) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    with pytest.warns(dkv.DefensiveKVWarning, match="nothing is evicted: pass generate"):
        generate(model, prompt(PROMPT))


def test_with_an_evicting_cache_or_without_any_there_is_nothing_to_point_out(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", dkv.DefensiveKVWarning)
        generate(model, prompt(PROMPT), dkv.EvictingCache(model, "defensivekv", 0.3))
        generate(model, prompt(PROMPT), use_cache=False)
        with torch.no_grad():
            model(prompt(PROMPT))
        dkv.disable(model)
        generate(model, prompt(PROMPT))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_of_other_rows_than_the_cache_holds_is_refused(model: PreTrainedModel, rows: int) -> None:
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    feed(model, cache, prompt(300, rows=2))
    with pytest.raises(dkv.CacheError, match="batch_repeat_interleave"):
        feed(model, cache.fork(), prompt(6, rows=rows))
    with pytest.raises(dkv.CacheError, match="batch_repeat_interleave"):
        feed(model, cache.fork(), prompt(1, rows=rows))


def test_one_prompt_repeated_answers_several_questions(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    feed(model, cache, prompt(300))
    questions = prompt(6, rows=3, seed=1)
    alone = torch.cat([feed(model, cache.fork(), question[None]) for question in questions])
    many = cache.fork()
    many.batch_repeat_interleave(3)
    torch.testing.assert_close(feed(model, many, questions), alone, rtol=1e-4, atol=1e-4)


def test_autocast_is_refused_by_name(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "snapkv", 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(dkv.InvalidInputError, match="autocast"):
        feed(model, cache, prompt(300))


def test_a_change_of_dtype_between_turns_is_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "snapkv", 0.3)
    feed(model, cache, prompt(300))
    model.bfloat16()
    with pytest.raises(dkv.CacheError, match="dtype"):
        feed(model, cache, prompt(3))
