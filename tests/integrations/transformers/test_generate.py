"""The model's own `generate()` in every mode: as the stock model at the full budget, as the oracle at 30 %."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

PROMPT, NEW = 220, 10
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "top-p": {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.2},
    "beams": {"do_sample": False, "num_beams": 3},
    "beams returned": {"do_sample": False, "num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"do_sample": True, "num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 4, "temperature": 1.2},
}
ARCHITECTURES = ("llama", "gemma3_text")
"""One with full attention only, and one whose sliding layers stay with transformers."""

in_every_mode = pytest.mark.parametrize("mode", MODES)
on_both = pytest.mark.parametrize("architecture", ARCHITECTURES)


def _generate(model: PreTrainedModel, ids: Tensor, cache: object, **options: Any) -> Tensor:
    torch.manual_seed(0)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    output: Tensor = model.generate(ids, attention_mask=mask, **{CACHE_ARGUMENT: cache}, **lengths, **options)
    return output


def _stock(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    return _generate(model, ids, DynamicCache(config=model.config), **options)


def _oracle(model: PreTrainedModel, cache: dkv.EvictingCache, ids: Tensor, **options: Any) -> Tensor:
    """What the disabled model generates with the entries masked that `cache` has evicted."""
    dkv.disable(model)
    torch.manual_seed(0)
    mask = options.pop("attention_mask", torch.ones_like(ids))
    masked = MaskedModel(model, cache, ids.shape[1])
    return masked.generate(ids, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, **options)


@on_both
@in_every_mode
def test_with_the_full_budget_every_mode_generates_what_the_stock_model_does(architecture: str, mode: str) -> None:
    model = tiny_model(architecture)
    expected = _stock(model, prompt(PROMPT, rows=2), **MODES[mode])
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 1.0)
    assert torch.equal(_generate(model, prompt(PROMPT, rows=2), cache, **MODES[mode]), expected)


@on_both
@in_every_mode
def test_every_mode_generates_what_the_oracle_does(architecture: str, mode: str) -> None:
    model = tiny_model(architecture)
    ids = prompt(PROMPT, rows=2)
    stock = _stock(model, ids, **MODES[mode])
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    output = _generate(model, ids, cache, **MODES[mode])
    assert cache.report().achieved == pytest.approx(0.3, abs=0.002)
    single = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    _generate(model, ids, single, do_sample=False)
    assert torch.equal(output, _oracle(model, single, ids, **MODES[mode]))
    assert not torch.equal(output, stock), "eviction must change what is generated here, or nothing is tested"


@on_both
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_a_left_padded_batch_generates_what_its_rows_do(architecture: str, budget: float) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    rows = [prompt(length, seed=length) for length in (PROMPT, PROMPT - 61, PROMPT - 3)]
    ids = torch.cat([torch.nn.functional.pad(row, (PROMPT - row.shape[1], 0)) for row in rows])
    together = _generate(
        model,
        ids,
        dkv.EvictingCache(model, "layer-defensivekv", budget),
        attention_mask=(ids != 0).long(),
        do_sample=False,
    )
    for row, output in zip(rows, together, strict=True):
        alone = _generate(model, row, dkv.EvictingCache(model, "layer-defensivekv", budget), do_sample=False)
        assert output[PROMPT:].tolist() == alone[0, row.shape[1] :].tolist()


@on_both
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_several_turns_on_one_cache_equal_the_oracle_over_the_whole_conversation(
    architecture: str, budget: float
) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", budget)
    first = _generate(model, prompt(PROMPT), cache, do_sample=False)
    second = _generate(model, torch.cat((first, prompt(12, seed=4)), 1), cache, do_sample=False)
    # Only what the cache has not seen may be passed too; of an answer, that is its last token.
    turn = torch.cat((second[:, -1:], prompt(1, seed=5)), 1)
    mask = torch.ones(1, second.shape[1] + 1, dtype=torch.long)
    third = _generate(model, turn, cache, do_sample=False, attention_mask=mask)
    conversation = torch.cat((second[:, :-1], third), 1)

    dkv.disable(model)
    oracle = MaskedModel(model, cache, PROMPT)
    logits = torch.cat([oracle(turn) for turn in conversation.split([PROMPT, conversation.shape[1] - PROMPT], 1)], 1)
    said = logits.argmax(-1)
    for start in (PROMPT, PROMPT + NEW + 12, conversation.shape[1] - NEW):
        assert said[0, start - 1 : start + NEW - 1].tolist() == conversation[0, start : start + NEW].tolist()


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_a_deep_copy_and_a_fork_generate_what_the_original_does(budget: float) -> None:
    model = tiny_model("gemma3_text")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", budget)
    with torch.no_grad():
        model(prompt(PROMPT), use_cache=True, **{CACHE_ARGUMENT: cache})
    questions = [torch.cat((prompt(PROMPT), prompt(11, seed=seed)), 1) for seed in (1, 2, 1)]
    copies = [copy.deepcopy(cache), cache.fork(), cache]
    first, other, again = (_generate(model, q, c, do_sample=False) for q, c in zip(questions, copies, strict=True))
    assert torch.equal(first, again)
    assert not torch.equal(first[:, -NEW:], other[:, -NEW:])
    fresh = _generate(model, questions[1], _compressed(model, budget), do_sample=False)
    assert torch.equal(other, fresh), "a fork must not see what was asked of its siblings"


def _compressed(model: PreTrainedModel, budget: float) -> dkv.EvictingCache:
    cache = dkv.EvictingCache(model, "layer-defensivekv", budget)
    with torch.no_grad():
        model(prompt(PROMPT), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def test_both_names_of_the_cache_argument_that_the_release_takes_reach_the_cache() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    for name in {CACHE_ARGUMENT, "past_key_values"}:
        cache = dkv.EvictingCache(model, "defensivekv", 0.3)
        model.generate(prompt(PROMPT), attention_mask=torch.ones(1, PROMPT), **{name: cache}, max_new_tokens=3)
        assert cache.report().achieved == pytest.approx(0.3, abs=0.002)


_CONTEXTS: dict[str, Any] = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": nullcontext}


@pytest.mark.parametrize("decoding", _CONTEXTS)
@pytest.mark.parametrize("prefill", _CONTEXTS)
def test_prompts_and_steps_may_run_with_and_without_gradients_in_any_order(prefill: str, decoding: str) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    turns = [prompt(PROMPT), prompt(7, seed=1), *prompt(3, seed=2).split(1, 1), prompt(5, seed=3)]

    def feed(contexts: Iterator[AbstractContextManager[Any]]) -> Tensor:
        cache = dkv.EvictingCache(model, "defensivekv", 0.3)
        logits = []
        for turn, context in zip(turns, contexts, strict=True):
            with context:
                logits.append(model(turn, use_cache=True, **{CACHE_ARGUMENT: cache}).logits.detach().clone())
        return torch.cat(logits, 1)

    # The tail is begun in one mode and written in the other.
    kinds = [prefill, prefill, prefill, decoding, decoding, prefill]
    mixed = feed(_CONTEXTS[kind]() for kind in kinds)
    plain = feed(torch.no_grad() for _ in turns)
    torch.testing.assert_close(mixed, plain, atol=1e-5, rtol=0)
