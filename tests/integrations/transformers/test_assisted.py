"""Assisted and prompt-lookup decoding, whose first forward pass carries drafts after the prompt."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

PROMPT, NEW = 220, 24
MODES = ("assistant that is often right", "assistant that is mostly wrong", "prompt lookup")
in_every_mode = pytest.mark.parametrize("mode", MODES)


def _options(mode: str, architecture: str = "llama") -> dict[str, Any]:
    if mode == "prompt lookup":
        return {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    # Windows longer than the text: transformers 5.17 fails on assistants that outgrow theirs, with its own cache too.
    windows: dict[str, Any] = {"sliding_window": 512} if architecture == "gemma3_text" else {}
    assistant = tiny_model(architecture, **windows)
    if mode == "assistant that is mostly wrong":
        assistant = tiny_model("llama", seed=5)
    assistant.generation_config.num_assistant_tokens = 5
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


def _generate(model: PreTrainedModel, ids: Tensor, cache: object, **options: Any) -> Tensor:
    lengths = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    output: Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **{CACHE_ARGUMENT: cache},
        **lengths,
        **{"do_sample": False},
        **options,
    )
    return output


@in_every_mode
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_with_the_full_budget_drafts_change_nothing_that_is_generated(architecture: str, mode: str) -> None:
    model = tiny_model(architecture)
    expected = _generate(model, prompt(PROMPT), DynamicCache(config=model.config))
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 1.0)
    assert torch.equal(_generate(model, prompt(PROMPT), cache, **_options(mode, architecture)), expected)
    assert cache.get_seq_length() == PROMPT + NEW - 1


@in_every_mode
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_tokens_accepted_with_the_prompt_count_as_prompt_and_the_rest_is_the_oracles(
    architecture: str, mode: str
) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    output = _generate(model, prompt(PROMPT), cache, **_options(mode, architecture))
    (read,) = cache.report().prompt_tokens
    accepted = read - PROMPT
    assert (accepted > 0) == (mode == "assistant that is often right")
    assert cache.report().achieved == pytest.approx(0.3, abs=0.002)

    dkv.disable(model)
    oracle = MaskedModel(model, cache, read)
    said = [oracle(output[:, :read])[0, PROMPT - 1 :].argmax(-1)]
    said.extend(oracle(token)[0].argmax(-1) for token in output[:, read:-1].split(1, dim=1))
    assert torch.cat(said).tolist() == output[0, PROMPT:].tolist()


def test_the_decision_on_a_prompt_with_drafts_is_the_one_without_those_that_were_rejected() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    drafted = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    _generate(model, prompt(PROMPT), drafted, **_options("assistant that is mostly wrong"))
    plain = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    with torch.no_grad():
        model(prompt(PROMPT), use_cache=True, **{CACHE_ARGUMENT: plain})
    assert torch.equal(drafted.lengths, plain.lengths)
    for layer, head in torch.cartesian_prod(torch.arange(3), torch.arange(2)).tolist():
        assert torch.equal(drafted.kept_positions(layer, 0, head), plain.kept_positions(layer, 0, head))


def test_speculative_sampling_repeats_with_its_seed() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    options = _options("assistant that is often right") | {"temperature": 1.3, "max_new_tokens": NEW}
    ids = prompt(PROMPT)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        cache = dkv.EvictingCache(model, "defensivekv", 0.3)
        outputs.append(
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, **{CACHE_ARGUMENT: cache}, **options
            )
        )
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@in_every_mode
def test_assisted_decoding_from_a_cache_with_tokens_is_refused_because_all_of_them_would_be_read_again(
    mode: str,
) -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    first = _generate(model, prompt(PROMPT), cache)
    ids = torch.cat((first, prompt(9, seed=1)), 1)
    with pytest.raises(dkv.CacheError, match="passes the whole text again"):
        _generate(model, ids, cache, **_options(mode))
    # Without drafts the conversation goes on where it was.
    again = dkv.EvictingCache(model, "defensivekv", 0.3)
    _generate(model, prompt(PROMPT), again)
    assert torch.equal(_generate(model, ids, cache), _generate(model, ids, again))


def test_a_prompt_that_waits_for_its_drafts_keeps_the_last_queries_only() -> None:
    model = tiny_model("llama", max_position_embeddings=4096)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(2000), use_cache=True, **{CACHE_ARGUMENT: cache})
    pending = [layer.pending for layer in cache.layers]
    assert all(waiting.queries.untyped_storage().nbytes() < 600 * 4 * 16 * 4 for waiting in pending)
    queries = weakref.ref(pending[0].queries)
    del pending
    with pytest.raises(dkv.CacheError, match="600 drafts cannot be taken back"):
        cache.crop(-600)
    cache.crop(-100)
    assert queries() is None
    assert cache.report().prompt_tokens == (1900,)
    assert cache.report().achieved == pytest.approx(0.3, abs=0.002)


def test_nothing_can_be_read_or_forked_while_drafts_are_not_verified() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(PROMPT), use_cache=True, **{CACHE_ARGUMENT: cache})
        with pytest.raises(dkv.CacheError, match="call crop"):
            model(prompt(1), use_cache=True, **{CACHE_ARGUMENT: cache})
    with pytest.raises(dkv.CacheError, match="middle of a forward pass"):
        cache.fork()
    with pytest.raises(dkv.CacheError, match="cannot be reordered"):
        cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(dkv.CacheError, match="cannot be repeated"):
        cache.batch_repeat_interleave(2)
    cache.crop(0)
    assert cache.fork().get_seq_length() == PROMPT
