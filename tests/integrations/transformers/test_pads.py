"""Pads that no mask hides are refused, and text that only looks like them is not."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import feed, generate, prompt, tiny_model

PROMPT = 300


def _padded(*lengths: int) -> Tensor:
    rows = [prompt(length, seed=length) for length in lengths]
    return torch.cat([torch.nn.functional.pad(row, (max(lengths) - row.shape[1], 0)) for row in rows])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt_neox", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pads_without_an_attention_mask_are_refused(architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype)
    dkv.enable(model)
    with pytest.raises(dkv.InvalidInputError, match=r"rows 1, 2 .* attention_mask"):
        feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), _padded(PROMPT, PROMPT - 30, PROMPT - 4))


def test_pads_with_a_mask_of_ones_are_refused_in_generate_too(model: PreTrainedModel) -> None:
    for beams in (1, 3):
        with pytest.raises(dkv.InvalidInputError, match="attention_mask"):
            generate(model, _padded(PROMPT, 250), dkv.EvictingCache(model, "defensivekv", 0.3), num_beams=beams)


def test_a_mask_that_generate_makes_of_the_pads_is_as_good_as_one_passed(model: PreTrainedModel) -> None:
    ids = _padded(PROMPT, 250)
    inferred = dkv.EvictingCache(model, "defensivekv", 0.3)
    output = model.generate(ids, **{CACHE_ARGUMENT: inferred}, max_new_tokens=4, do_sample=False)
    given = dkv.EvictingCache(model, "defensivekv", 0.3)
    assert torch.equal(output, generate(model, ids, given, attention_mask=(ids != 0).long(), do_sample=False))
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
    feed(model, cache, ids)
    assert cache.report().achieved == pytest.approx(0.3)


def test_the_expanded_rows_of_one_prompt_are_not_taken_for_pads(model: PreTrainedModel) -> None:
    ids = _begins_with([7] * 9)
    for options in ({"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}):
        generate(model, ids, dkv.EvictingCache(model, "defensivekv", 0.3), **options)


def test_a_later_mask_that_hides_more_of_the_prompt_is_refused(model: PreTrainedModel) -> None:
    cache = dkv.EvictingCache(model, "full")
    feed(model, cache, prompt(300))
    mask = torch.ones(1, 306, dtype=torch.long)
    mask[:, :150] = 0
    with pytest.raises(dkv.InvalidInputError, match="hides tokens of the prompt"):
        feed(model, cache, prompt(6), attention_mask=mask)


def test_a_later_mask_with_the_prompts_own_pads_is_taken_whatever_became_of_the_rows(model: PreTrainedModel) -> None:
    mask = torch.ones(2, 300, dtype=torch.long)
    mask[1, :100] = 0
    cache = dkv.EvictingCache(model, "snapkv", 0.3)
    feed(model, cache, prompt(300, rows=2), attention_mask=mask)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    later = torch.cat((mask[1:].expand(2, -1), torch.ones(2, 6, dtype=torch.long)), 1)
    feed(model, cache, prompt(6, rows=2), attention_mask=later)
    wrong = torch.cat((mask, torch.ones(2, 12, dtype=torch.long)), 1)
    wrong[0, :120] = 0
    with pytest.raises(dkv.InvalidInputError, match="hides tokens of the prompt"):
        feed(model, cache, prompt(6, rows=2), attention_mask=wrong)
