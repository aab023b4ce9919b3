"""What cannot be used is refused with a typed error before work is lost, and what can is not."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model

PROMPT = 300


@pytest.fixture
def model() -> PreTrainedModel:
    made = tiny_model("llama")
    dkv.enable(made)
    return made


def _feed(model: PreTrainedModel, cache: object, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}, **inputs).logits
    return logits


def _generate(model: PreTrainedModel, ids: Tensor, cache: object = None, **options: Any) -> Tensor:
    given = {} if cache is None else {CACHE_ARGUMENT: cache}
    mask = options.pop("attention_mask", torch.ones_like(ids))
    output: Tensor = model.generate(ids, attention_mask=mask, **given, **({"max_new_tokens": 4} | options))
    return output


# ---------------------------------------------------------------------- policies and budgets


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (0, "keeps nothing"),
        (0.0, "keeps nothing"),
        (-0.5, "keeps nothing"),
        (1.5, "above one"),
        (31, "below the observation window of 32"),
        (float("nan"), "not finite"),
        ("a fifth", "not understood"),
        ("20 parsecs", "unknown unit"),
        (None, "needs a budget"),
        (True, "not a number"),
    ],
)
def test_a_budget_that_means_nothing_is_refused_when_the_cache_is_made(
    model: PreTrainedModel, budget: Any, says: str
) -> None:
    with pytest.raises(dkv.BudgetError, match=says):
        dkv.EvictingCache(model, "defensivekv", budget)


def test_an_unknown_policy_is_refused_with_the_nearest_names(model: PreTrainedModel) -> None:
    with pytest.raises(dkv.UnknownPolicyError, match="did you mean 'layer-defensivekv'"):
        dkv.EvictingCache(model, "layer_defensive_kv", 0.2)


def test_a_finished_policy_takes_no_second_budget_or_options(model: PreTrainedModel) -> None:
    policy = dkv.policy("snapkv", 0.2)
    with pytest.raises(dkv.InvalidInputError, match="has its budget and options already"):
        dkv.EvictingCache(model, policy, 0.3)
    with pytest.raises(dkv.InvalidInputError, match="has its budget and options already"):
        dkv.EvictingCache(model, policy, window_size=8)


@pytest.mark.parametrize("budget", [0.05, "12KiB"])
def test_a_budget_below_the_window_of_this_prompt_is_refused_before_the_first_attention(
    model: PreTrainedModel, budget: float | str
) -> None:
    cache = dkv.EvictingCache(model, "layer-defensivekv", budget)
    with pytest.raises(dkv.BudgetError, match=r"below the observation window of 32: give at least 0\.1067"):
        _feed(model, cache, prompt(PROMPT))
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


# ---------------------------------------------------------------------- prompts


def test_a_prompt_of_no_tokens_is_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        _feed(model, cache, prompt(PROMPT)[:, :0])
    _feed(model, cache, prompt(PROMPT))
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        _feed(model, cache, prompt(PROMPT)[:, :0])


@pytest.mark.filterwarnings("ignore:.*input_ids.*:UserWarning")
def test_generate_with_a_prompt_of_no_tokens_is_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        _generate(model, prompt(PROMPT)[:, :0], cache)


def test_a_row_of_pads_only_is_refused(model: PreTrainedModel) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT, rows=2), attention_mask=mask)


def test_a_text_past_the_models_positions_is_refused_before_the_first_attention(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match="1025 tokens exceed the model's maximum of 1024"):
        _feed(model, cache, prompt(1025))
    assert cache.nbytes == 0
    _feed(model, cache, prompt(1000))
    with pytest.raises(dkv.InvalidInputError, match="1025 tokens exceed"):
        _feed(model, cache, prompt(25))
    _feed(model, cache, prompt(24))


@pytest.mark.parametrize(("length", "budget"), [(20, 0.3), (100, 0.2), (32, 0.999)])
def test_a_prompt_too_short_to_be_worth_compressing_is_kept_whole_and_says_so(
    model: PreTrainedModel, length: int, budget: float
) -> None:
    cache = dkv.EvictingCache(model, "layer-defensivekv", budget)
    with pytest.warns(dkv.DefensiveKVWarning, match=rf"1 of 1 prompts \({length} tokens\) are kept whole"):
        _feed(model, cache, prompt(length))
    report = cache.report()
    assert report.kept_whole == (True,)
    assert report.achieved == 1.0
    assert "1 of 1 prompts kept whole" in str(report)


@pytest.mark.parametrize("policy", [("full", None), ("defensivekv", 1.0)])
def test_a_prompt_that_is_to_be_kept_whole_does_not_say_so(
    model: PreTrainedModel, policy: tuple[str, float | None]
) -> None:
    _feed(model, dkv.EvictingCache(model, *policy), prompt(20))


def test_of_a_batch_only_the_short_prompts_are_kept_whole(model: PreTrainedModel) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :200] = 0
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.2)
    with pytest.warns(dkv.DefensiveKVWarning, match=r"1 of 2 prompts \(100 tokens\) are kept whole"):
        _feed(model, cache, prompt(PROMPT, rows=2), attention_mask=mask)
    assert cache.report().kept_whole == (False, True)
    assert cache.lengths.sum((0, 2)).tolist() == [6 * 60, 6 * 100]


# ---------------------------------------------------------------------- pads


def _padded(*lengths: int) -> Tensor:
    rows = [prompt(length, seed=length) for length in lengths]
    return torch.cat([torch.nn.functional.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pads_without_an_attention_mask_are_refused(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype)
    dkv.enable(model)
    with pytest.raises(dkv.InvalidInputError, match=r"rows 1, 2 .* attention_mask"):
        _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), _padded(PROMPT, PROMPT - 30, PROMPT - 4))


def test_pads_with_a_mask_of_ones_are_refused_in_generate_too(model: PreTrainedModel) -> None:
    for beams in (1, 3):
        with pytest.raises(dkv.InvalidInputError, match="attention_mask"):
            _generate(model, _padded(PROMPT, 250), dkv.EvictingCache(model, "defensivekv", 0.3), num_beams=beams)


def test_a_mask_that_generate_makes_of_the_pads_is_as_good_as_one_passed(model: PreTrainedModel) -> None:
    ids = _padded(PROMPT, 250)
    inferred = dkv.EvictingCache(model, "defensivekv", 0.3)
    output = model.generate(ids, **{CACHE_ARGUMENT: inferred}, max_new_tokens=4, do_sample=False)
    given = dkv.EvictingCache(model, "defensivekv", 0.3)
    assert torch.equal(output, _generate(model, ids, given, attention_mask=(ids != 0).long(), do_sample=False))
    assert inferred.report().prompt_tokens == (PROMPT, 250)


def _begins_with(*starts: list[int]) -> Tensor:
    rows = prompt(PROMPT, rows=len(starts))
    for row, start in zip(rows, starts, strict=True):
        row[: len(start)] = torch.tensor(start)
    return rows


@pytest.mark.parametrize(
    "ids",
    [
        _begins_with([7, 7, 7], [1, 2]),
        _begins_with([7, 7], [8, 8], [1, 2]),
        _begins_with([7] * 9, [8] * 9, [1, 2]),
        _begins_with([7] * 9, [7] * 9),
        _begins_with([7] * 9),
        _begins_with([1, 2], [3, 4]),
    ],
    ids=["three times", "pairs", "two tokens", "all rows", "one row", "none"],
)
def test_texts_that_begin_with_a_token_repeated_are_not_taken_for_pads(model: PreTrainedModel, ids: Tensor) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _feed(model, cache, ids)
    assert cache.report().achieved == pytest.approx(0.3)


def test_the_expanded_rows_of_one_prompt_are_not_taken_for_pads(model: PreTrainedModel) -> None:
    ids = _begins_with([7] * 9)
    for options in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        _generate(model, ids, dkv.EvictingCache(model, "defensivekv", 0.3), **options)


# ---------------------------------------------------------------------- the wrong model, or none


def test_a_cache_used_with_another_model_is_refused(model: PreTrainedModel) -> None:
    other = tiny_model("llama", seed=1)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    dkv.enable(other)
    with pytest.raises(dkv.CacheError, match="made for another model"):
        _feed(other, cache, prompt(PROMPT))
    dkv.disable(other)
    cache.reset()
    with pytest.raises(dkv.CacheError, match="never arrived at defensivekv's attention"):
        _feed(other, cache, prompt(PROMPT))


def test_a_cache_goes_on_after_another_model_tried_it_once_it_is_reset(model: PreTrainedModel) -> None:
    other = tiny_model("llama", seed=1)
    dkv.enable(other)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.CacheError, match="made for another model"):
        _feed(other, cache, prompt(PROMPT))
    with pytest.raises(dkv.CacheError, match="broke off: call reset"):
        _feed(model, cache, prompt(PROMPT))
    cache.reset()
    _feed(model, cache, prompt(PROMPT))
    assert cache.report().achieved == pytest.approx(0.3)


def test_a_cache_used_after_disable_is_refused_and_goes_on_after_enable(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _feed(model, cache, prompt(PROMPT))
    plain = cache.fork()
    dkv.disable(model)
    for ids in (prompt(1), prompt(5)):
        with pytest.raises(dkv.CacheError, match=r"LlamaForCausalLM is not enabled.*call defensivekv.enable"):
            _feed(model, cache, ids)
    dkv.enable(model)
    torch.testing.assert_close(_feed(model, cache, prompt(5)), _feed(model, plain, prompt(5)), atol=0, rtol=0)


def test_a_cache_of_a_model_that_was_never_enabled_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(dkv.CacheError, match="is not enabled"):
        _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT))


def test_attention_switched_back_by_other_means_is_noticed(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _feed(model, cache, prompt(PROMPT))
    model.set_attn_implementation("sdpa")
    with pytest.raises(dkv.CacheError, match="is not enabled"):
        _feed(model, cache, prompt(1))


def test_a_cache_whose_model_is_gone_says_so() -> None:
    model = tiny_model("llama")
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    twin = tiny_model("llama")
    dkv.enable(twin)
    del model
    with pytest.raises(dkv.CacheError, match="is gone"):
        _feed(twin, cache, prompt(PROMPT))


# ---------------------------------------------------------------------- NaN, masks, training


@pytest.mark.parametrize(
    ("part", "says"), [("k_proj", "keys"), ("v_proj", "values"), ("q_proj", "queries"), ("o_proj", "scores")]
)
@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv"])
def test_nan_is_refused_and_says_where(model: PreTrainedModel, part: str, says: str, policy: str) -> None:
    getattr(model.model.layers[1].self_attn, part).weight.data[3, 3] = float("nan")
    with pytest.raises(dkv.InvalidInputError, match=f"layer 1: {says} hold NaN"):
        _feed(model, dkv.EvictingCache(model, policy, 0.3), prompt(PROMPT))


def test_float_attention_masks_are_refused(model: PreTrainedModel) -> None:
    mask = torch.zeros(1, 1, PROMPT, PROMPT).masked_fill(torch.ones(PROMPT, PROMPT).triu(1) > 0, float("-inf"))
    with pytest.raises(dkv.InvalidInputError, match=r"boolean attention masks, not torch.float32: pass a 2-D mask"):
        _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT), attention_mask=mask)


def test_boolean_attention_masks_are_taken(model: PreTrainedModel) -> None:
    mask = torch.ones(1, 1, PROMPT, PROMPT, dtype=torch.bool).tril()
    masked, plain = (dkv.EvictingCache(model, "defensivekv", 0.3) for _ in range(2))
    expected = _feed(model, plain, prompt(PROMPT))
    torch.testing.assert_close(_feed(model, masked, prompt(PROMPT), attention_mask=mask), expected, atol=1e-4, rtol=0)
    assert torch.equal(masked.lengths, plain.lengths)


def test_attention_dropout_is_refused() -> None:
    model = tiny_model("llama", attention_dropout=0.1)
    dkv.enable(model)
    model.train()
    with pytest.raises(dkv.InvalidInputError, match=r"for inference.*call model.eval\(\)"):
        _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT))
    model.eval()
    _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT))


# ---------------------------------------------------------------------- prompts in pieces


def test_chunked_prefill_is_refused_by_name(model: PreTrainedModel) -> None:
    # Nothing that a cache is told gives chunks away; this fails when transformers renames what the check looks for.
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(
        dkv.InvalidInputError, match="prefill_chunk_size=128 would show the policy the first 128 of 300"
    ):
        _generate(model, prompt(PROMPT), cache, prefill_chunk_size=128)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(("budget", "size"), [(1.0, 64), (0.3, PROMPT), (0.3, 10**6)])
def test_chunked_prefill_that_hides_nothing_from_the_policy_is_taken(
    model: PreTrainedModel, budget: float, size: int
) -> None:
    chunked, plain = (dkv.EvictingCache(model, "defensivekv", budget) for _ in range(2))
    output = _generate(model, prompt(PROMPT), chunked, prefill_chunk_size=size, do_sample=False)
    assert torch.equal(output, _generate(model, prompt(PROMPT), plain, do_sample=False))


def test_chunked_reading_of_a_later_turn_is_not_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _feed(model, cache, prompt(PROMPT))
    kept = cache.lengths
    mask = torch.ones(1, PROMPT + 90, dtype=torch.long)
    _generate(model, prompt(90, seed=1), cache, attention_mask=mask, prefill_chunk_size=32)
    assert cache.get_seq_length() == PROMPT + 90 + 3
    assert torch.equal(cache.lengths, kept)


def test_two_pieces_of_one_length_are_pointed_out(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    _feed(model, cache, prompt(150))
    with pytest.warns(dkv.DefensiveKVWarning, match="chunks of one prompt"):
        _feed(model, cache, prompt(150, seed=1))


def test_a_text_that_is_read_twice_is_pointed_out(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.warns(dkv.DefensiveKVWarning, match="the whole text again"):
        _generate(model, prompt(PROMPT), cache, use_cache=False, max_new_tokens=2)


# ---------------------------------------------------------------------- no evicting cache


def test_generate_without_an_evicting_cache_is_pointed_out(model: PreTrainedModel) -> None:
    with pytest.warns(dkv.DefensiveKVWarning, match="nothing is evicted: pass generate"):
        _generate(model, prompt(PROMPT))
    with pytest.warns(dkv.DefensiveKVWarning, match="nothing is evicted: pass generate"):
        _generate(model, prompt(PROMPT), DynamicCache(config=model.config))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3_text", "qwen3_next"])
def test_models_of_all_kinds_point_it_out(architecture: str) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    with pytest.warns(dkv.DefensiveKVWarning, match="nothing is evicted: pass generate"):
        _generate(model, prompt(PROMPT))


def test_with_an_evicting_cache_or_without_any_there_is_nothing_to_point_out(model: PreTrainedModel) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", dkv.DefensiveKVWarning)
        _generate(model, prompt(PROMPT), dkv.EvictingCache(model, "defensivekv", 0.3))
        _generate(model, prompt(PROMPT), use_cache=False)
        with torch.no_grad():
            model(prompt(PROMPT))
        dkv.disable(model)
        _generate(model, prompt(PROMPT))
