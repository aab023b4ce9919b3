"""What cannot be used is refused with a typed error before work is lost."""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from tests.integrations.transformers.models import feed, generate, prompt, tiny_model

PROMPT = 300


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


def test_a_budget_below_the_window_of_this_prompt_is_refused_before_the_first_attention(
    model: PreTrainedModel,
) -> None:
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.05)
    with pytest.raises(dkv.BudgetError, match=r"below the observation window of 32: give at least 0\.1067"):
        feed(model, cache, prompt(PROMPT))
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)


# ---------------------------------------------------------------------- prompts


def test_a_prompt_of_no_tokens_is_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        feed(model, cache, prompt(PROMPT)[:, :0])
    feed(model, cache, prompt(PROMPT))
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        feed(model, cache, prompt(PROMPT)[:, :0])


@pytest.mark.filterwarnings("ignore:.*input_ids.*:UserWarning")
def test_generate_with_a_prompt_of_no_tokens_is_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        generate(model, prompt(PROMPT)[:, :0], cache)


def test_a_row_of_pads_only_is_refused(model: PreTrainedModel) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1] = 0
    with pytest.raises(dkv.InvalidInputError, match="no tokens"):
        feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT, rows=2), attention_mask=mask)


def test_a_text_past_the_models_positions_is_refused_before_the_first_attention(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.InvalidInputError, match="1025 tokens exceed the model's maximum of 1024"):
        feed(model, cache, prompt(1025))
    assert cache.nbytes == 0
    feed(model, cache, prompt(1000))
    with pytest.raises(dkv.InvalidInputError, match="1025 tokens exceed"):
        feed(model, cache, prompt(25))
    feed(model, cache, prompt(24))


@pytest.mark.parametrize(("length", "budget"), [(20, 0.3), (100, 0.2), (32, 0.999)])
def test_a_prompt_too_short_to_be_worth_compressing_is_kept_whole_and_says_so(
    model: PreTrainedModel, length: int, budget: float
) -> None:
    cache = dkv.EvictingCache(model, "layer-defensivekv", budget)
    with pytest.warns(dkv.DefensiveKVWarning, match=rf"1 of 1 prompts \({length} tokens\) are kept whole"):
        feed(model, cache, prompt(length))
    report = cache.report()
    assert report.kept_whole == (True,)
    assert report.achieved == 1.0
    assert "1 of 1 prompts kept whole" in str(report)


@pytest.mark.parametrize("policy", [("full", None), ("defensivekv", 1.0)])
def test_a_prompt_that_is_to_be_kept_whole_does_not_say_so(
    model: PreTrainedModel, policy: tuple[str, float | None]
) -> None:
    feed(model, dkv.EvictingCache(model, *policy), prompt(20))


def test_of_a_batch_only_the_short_prompts_are_kept_whole(model: PreTrainedModel) -> None:
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[1, :200] = 0
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.2)
    with pytest.warns(dkv.DefensiveKVWarning, match=r"1 of 2 prompts \(100 tokens\) are kept whole"):
        feed(model, cache, prompt(PROMPT, rows=2), attention_mask=mask)
    assert cache.report().kept_whole == (False, True)
    assert cache.lengths.sum((0, 2)).tolist() == [6 * 60, 6 * 100]


# ---------------------------------------------------------------------- NaN, masks, training


@pytest.mark.parametrize(
    ("part", "says"), [("k_proj", "keys"), ("v_proj", "values"), ("q_proj", "queries"), ("o_proj", "scores")]
)
@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv"])
def test_nan_is_refused_and_says_where(model: PreTrainedModel, part: str, says: str, policy: str) -> None:
    getattr(model.model.layers[1].self_attn, part).weight.data[3, 3] = float("nan")
    with pytest.raises(dkv.InvalidInputError, match=f"layer 1: {says} hold NaN"):
        feed(model, dkv.EvictingCache(model, policy, 0.3), prompt(PROMPT))


def test_float_attention_masks_are_refused(model: PreTrainedModel) -> None:
    mask = torch.zeros(1, 1, PROMPT, PROMPT).masked_fill(torch.ones(PROMPT, PROMPT).triu(1) > 0, float("-inf"))
    with pytest.raises(dkv.InvalidInputError, match=r"boolean attention masks, not torch.float32: pass a 2-D mask"):
        feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT), attention_mask=mask)


def test_boolean_attention_masks_are_taken(model: PreTrainedModel) -> None:
    mask = torch.ones(1, 1, PROMPT, PROMPT, dtype=torch.bool).tril()
    masked, plain = (dkv.EvictingCache(model, "defensivekv", 0.3) for _ in range(2))
    expected = feed(model, plain, prompt(PROMPT))
    torch.testing.assert_close(feed(model, masked, prompt(PROMPT), attention_mask=mask), expected, atol=1e-4, rtol=0)
    assert torch.equal(masked.lengths, plain.lengths)


def test_attention_dropout_is_refused() -> None:
    model = tiny_model("llama", attention_dropout=0.1)
    dkv.enable(model)
    model.train()
    with pytest.raises(dkv.InvalidInputError, match=r"for inference.*call model.eval\(\)"):
        feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT))
    model.eval()
    feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), prompt(PROMPT))
