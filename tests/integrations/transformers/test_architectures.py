"""Every architecture, against the stock model and against dense attention with the evicted entries masked."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import ARCHITECTURES, prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

PROMPT, QUESTION, STEPS = 300, 9, 3
TOLERANCE = 2e-4
"""Logits have a standard deviation of about 2; masking 70 % of the entries moves them by more than 1."""

pytestmark = pytest.mark.parametrize("architecture", ARCHITECTURES)


def _feed(model: PreTrainedModel, cache: dkv.EvictingCache, *turns: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(turn, use_cache=True, **{CACHE_ARGUMENT: cache}).logits for turn in turns]


def _turns() -> list[Tensor]:
    """A prompt, a question, and tokens that come one at a time."""
    steps = prompt(STEPS, seed=2)
    return [prompt(PROMPT), prompt(QUESTION, seed=1), *steps.split(1, dim=1)]


def test_with_the_full_budget_logits_equal_the_stock_model(architecture: str) -> None:
    model = tiny_model(architecture)
    turns = _turns()
    with torch.no_grad():
        stock = model(torch.cat(turns, 1), use_cache=False).logits
    dkv.enable(model)
    logits = torch.cat(_feed(model, dkv.EvictingCache(model, "defensivekv", 1.0), *turns), 1)
    torch.testing.assert_close(logits, stock, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv"])
def test_logits_equal_dense_attention_with_the_evicted_entries_masked(architecture: str, policy: str) -> None:
    model = tiny_model(architecture)
    turns = _turns()
    with torch.no_grad():
        stock = model(torch.cat(turns, 1), use_cache=False).logits[:, PROMPT:]
    dkv.enable(model)
    cache = dkv.EvictingCache(model, policy, 0.3)
    logits = torch.cat(_feed(model, cache, *turns)[1:], 1)
    dkv.disable(model)

    heads = cache.lengths.shape[2]
    assert int(cache.lengths.sum()) == len(cache.evicted_layers) * heads * PROMPT * 3 // 10
    if policy == "defensivekv":
        assert cache.lengths.sum((1, 2)).unique().tolist() == [heads * PROMPT * 3 // 10]

    oracle = MaskedModel(model, cache, PROMPT)
    expected = torch.cat([oracle(turn) for turn in turns][1:], 1)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    assert (expected - stock).abs().max() > 1000 * TOLERANCE, "the oracle must differ from the stock model"


def test_a_left_padded_batch_equals_its_rows_one_at_a_time(architecture: str) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    lengths = (PROMPT, PROMPT - 47)
    rows = [prompt(length, seed=row) for row, length in enumerate(lengths)]
    questions = prompt(QUESTION, rows=2, seed=7)
    width = PROMPT + QUESTION
    mask = torch.ones(2, width, dtype=torch.long)
    mask[1, :47] = 0
    ids = torch.cat((rows[0], torch.cat((torch.zeros(1, 47, dtype=torch.long), rows[1]), 1)))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    batch = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    with torch.no_grad():
        model(ids, attention_mask=mask[:, :PROMPT], position_ids=positions[:, :PROMPT], **{CACHE_ARGUMENT: batch})
        together = model(
            questions, attention_mask=mask, position_ids=positions[:, PROMPT:], **{CACHE_ARGUMENT: batch}
        ).logits
    for row, pads in enumerate((0, 47)):
        single = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
        alone = _feed(model, single, rows[row], questions[row : row + 1])[1]
        for layer in range(len(single.evicted_layers)):
            for head in range(single.lengths.shape[2]):
                in_batch = batch.kept_positions(layer, row, head) - pads
                assert in_batch.tolist() == single.kept_positions(layer, 0, head).tolist()
        torch.testing.assert_close(together[row : row + 1], alone, atol=TOLERANCE, rtol=0)
    assert batch.report().prompt_tokens == lengths
