"""Layers that are not full attention keep their stock cache, and the report says which and why."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

PROMPT = 300
KINDS: dict[str, tuple[str, ...]] = {
    "gemma3_text": ("sliding_attention", "full_attention") * 2,
    "llama4_text": ("chunked_attention", "full_attention") * 2,
    "qwen3_next": ("linear_attention", "full_attention") * 2,
    "lfm2": ("conv", "full_attention") * 2,
    "gemma4_text": ("sliding_attention", "full_attention") * 2,
    "gemma3n_text": ("sliding_attention", "full_attention") * 2,
}
SOURCES = {"gemma4_text": {5: 3}, "gemma3n_text": {5: 3}}
"""Of the last two layers, which have no keys of their own, the one with full attention reads those of layer 3."""

on_every_kind = pytest.mark.parametrize("architecture", KINDS)


def _turns() -> list[Tensor]:
    return [prompt(PROMPT), *prompt(6, seed=2).split(1, dim=1)]


def _feed(model: PreTrainedModel, cache: object) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(turn, use_cache=True, **{CACHE_ARGUMENT: cache}).logits for turn in _turns()], 1)


@on_every_kind
def test_with_the_full_budget_logits_equal_those_of_the_stock_cache(architecture: str) -> None:
    model = tiny_model(architecture)
    stock = _feed(model, DynamicCache(config=model.config))
    dkv.enable(model)
    logits = _feed(model, dkv.EvictingCache(model, "defensivekv", 1.0))
    torch.testing.assert_close(logits, stock, atol=3e-4, rtol=0)


@on_every_kind
@pytest.mark.parametrize("policy", ["defensivekv", "layer-defensivekv"])
def test_logits_equal_dense_attention_with_the_evicted_entries_masked(architecture: str, policy: str) -> None:
    model = tiny_model(architecture)
    stock = _feed(model, DynamicCache(config=model.config))
    dkv.enable(model)
    cache = dkv.EvictingCache(model, policy, 0.3)
    logits = _feed(model, cache)
    dkv.disable(model)
    oracle = MaskedModel(model, cache, PROMPT, SOURCES.get(architecture))
    expected = torch.cat([oracle(turn) for turn in _turns()], 1)
    torch.testing.assert_close(logits, expected, atol=3e-4, rtol=0)
    assert (expected - stock).abs().max() > 0.3


@on_every_kind
def test_the_report_says_which_layers_are_evicted_and_why_others_are_not(architecture: str) -> None:
    model = tiny_model(architecture)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    _feed(model, cache)
    report = cache.report()
    assert tuple(layer.kind for layer in report.layers)[:4] == KINDS[architecture]
    stock = DynamicCache(config=model.config)
    for layer, held, theirs in zip(report.layers, cache.layers, stock.layers, strict=True):
        assert layer.evicted == layer.can_evict == (layer.kind == "full_attention")
        assert layer.evicted == (layer.reason == "")
        assert layer.evicted == (type(held) is not type(theirs))
        assert layer.evicted == bool(layer.lengths)
        assert layer.evicted or f"{layer.kind:20s} not evicted: {layer.reason}" in str(report)
    reasons = {layer.kind: layer.reason for layer in report.layers if not layer.evicted}
    assert not any("not full attention" in reason for reason in reasons.values()), "each kind here has its own reason"
    assert all(("kept by transformers" in reason) == (kind != "dummy") for kind, reason in reasons.items())


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_models_with_latent_attention_in_all_layers_are_refused_by_name(architecture: str) -> None:
    model = tiny_model(architecture)
    before = model.config._attn_implementation
    for refused in (lambda: dkv.enable(model), lambda: dkv.EvictingCache(model, "defensivekv", 0.3)):
        with pytest.raises(dkv.UnsupportedModelError, match=r"Deepseek.*no full-attention layer.*latent_attention"):
            refused()
    assert model.config._attn_implementation == before


def test_models_whose_layers_are_all_sliding_are_refused_by_name() -> None:
    model = tiny_model("mistral", sliding_window=64)
    with pytest.raises(dkv.UnsupportedModelError, match=r"MistralForCausalLM.*sliding_attention"):
        dkv.enable(model)


def test_layers_that_read_keys_of_others_are_refused_where_these_travel_between_devices() -> None:
    model = tiny_model("gemma4_text")
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(dkv.UnsupportedModelError, match=r"Gemma4ForCausalLM.*load it onto one device"):
        dkv.enable(model)
    model.hf_device_map = {"": 0}
    dkv.enable(model)
