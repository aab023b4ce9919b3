"""Which models are taken, how their attention is switched and given back, and where output projections are found."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, DynamicCache, Gemma3Config, PreTrainedModel, T5Config
from transformers.models.gemma3 import Gemma3ForConditionalGeneration

import defensivekv as dkv
from defensivekv.integrations.transformers import is_enabled
from defensivekv.integrations.transformers.model import max_positions, output_projection
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from tests.integrations.transformers.models import VOCABULARY, prompt, tiny_model
from tests.integrations.transformers.oracle import MaskedModel

PROMPT = 260
IMAGE, IMAGE_TOKENS = 120, 4


def _feed(model: PreTrainedModel, cache: object, *turns: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(turn, use_cache=True, **{CACHE_ARGUMENT: cache}).logits for turn in turns], 1)


def _gemma3(implementation: str | dict[str, str]) -> Gemma3ForConditionalGeneration:
    """A model of text and images, whose parts have configurations of their own."""
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.25,
        "pad_token_id": 0,
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=IMAGE_TOKENS,
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()


def _implementations(model: PreTrainedModel) -> list[str]:
    configs = {id(module.config): module.config for module in model.modules() if isinstance(module, PreTrainedModel)}
    return [config._attn_implementation for config in configs.values()]


# ---------------------------------------------------------------------- refused by name


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("falcon", "FalconForCausalLM"), ("bloom", "BloomForCausalLM"), ("mpt", "MptForCausalLM")],
)
def test_models_that_compute_their_attention_themselves_are_refused_by_name(architecture: str, name: str) -> None:
    model = tiny_model(architecture)
    for refused in (lambda: dkv.enable(model), lambda: dkv.EvictingCache(model, "defensivekv", 0.3)):
        with pytest.raises(dkv.UnsupportedModelError, match=f"{name} computes its attention itself"):
            refused()


def test_encoder_decoder_models_are_refused_by_name() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(dkv.UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        dkv.enable(model)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None, "meta-llama/Llama-3.2-1B"], ids=["module", "none", "name"])
def test_what_is_no_transformers_model_is_refused(model: Any) -> None:
    for refused in (lambda: dkv.enable(model), lambda: dkv.EvictingCache(model, "defensivekv", 0.3)):
        with pytest.raises(dkv.UnsupportedModelError, match="is not a transformers PreTrainedModel"):
            refused()


def test_models_that_rewrite_values_after_the_cache_are_refused_and_not_misread() -> None:
    model = tiny_model("diffllama", num_key_value_heads=4)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", 0.3)
    with pytest.raises(dkv.UnsupportedModelError, match="DiffLlamaAttention computes new keys or values"):
        _feed(model, cache, prompt(PROMPT))


def test_models_that_rewrite_keys_and_values_after_the_cache_are_refused_and_not_misread() -> None:
    model = tiny_model("jetmoe", kv_channels=16, num_local_experts=2, num_experts_per_tok=2)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "snapkv", 0.3)
    with pytest.raises(dkv.CacheError, match="changes its keys after the cache"):
        _feed(model, cache, prompt(PROMPT))


# ---------------------------------------------------------------------- switching


def test_enabling_and_disabling_twice_is_as_good_as_once() -> None:
    model = tiny_model("gemma2")
    assert model.config._attn_implementation == "eager"
    dkv.enable(model)
    dkv.enable(model)
    assert is_enabled(model)
    dkv.disable(model)
    assert model.config._attn_implementation == "eager"
    dkv.disable(model)
    assert model.config._attn_implementation == "eager"
    assert not is_enabled(model)


@pytest.mark.parametrize(
    "implementation",
    ["sdpa", "eager", {"text_config": "eager", "vision_config": "sdpa"}, {"": "eager", "vision_config": "eager"}],
    ids=str,
)
def test_every_part_of_a_composite_model_gets_its_own_attention_back(implementation: str | dict[str, str]) -> None:
    model = _gemma3(implementation)
    before = _implementations(model)
    dkv.enable(model)
    assert is_enabled(model)
    dkv.disable(model)
    assert _implementations(model) == before


def test_a_copy_of_an_enabled_model_can_be_disabled_and_leaves_the_original_enabled() -> None:
    model = tiny_model("llama")
    dkv.enable(model)
    twin = copy.deepcopy(model)
    dkv.disable(twin)
    assert twin.config._attn_implementation == "sdpa"
    assert is_enabled(model)


def test_an_enabled_model_without_an_evicting_cache_computes_what_it_did_before() -> None:
    model = tiny_model("gemma2")
    ids = prompt(PROMPT)
    before = _feed(model, DynamicCache(config=model.config), ids)
    dkv.enable(model)
    torch.testing.assert_close(_feed(model, DynamicCache(config=model.config), ids), before, atol=1e-4, rtol=0)


def test_two_models_can_be_enabled_at_once() -> None:
    first, second = tiny_model("llama"), tiny_model("gemma2")
    dkv.enable(first)
    dkv.enable(second)
    dkv.disable(first)
    assert is_enabled(second)
    assert (first.config._attn_implementation, second.config._attn_implementation) == ("sdpa", "defensivekv")


@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_a_model_of_text_and_images_is_evicted_from_in_its_text_layers(budget: float) -> None:
    model = _gemma3("sdpa")
    ids, pixels = prompt(PROMPT), torch.randn(1, 3, 28, 28)
    ids[ids == IMAGE] = 1
    ids[:, 5 : 5 + IMAGE_TOKENS] = IMAGE
    images = {"pixel_values": pixels, "token_type_ids": (ids == IMAGE).long()}
    steps = prompt(4, seed=1).clamp_max(100).split(1, dim=1)
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "defensivekv", budget)
    with torch.no_grad():
        model(ids, use_cache=True, **images, **{CACHE_ARGUMENT: cache})
    logits = _feed(model, cache, *steps)
    assert cache.evicted_layers == (1, 3)
    assert cache.report().achieved == budget
    dkv.disable(model)
    oracle = MaskedModel(model, cache, PROMPT)
    oracle(ids, **images)
    torch.testing.assert_close(logits, torch.cat([oracle(step) for step in steps], 1), atol=2e-4, rtol=0)


# ---------------------------------------------------------------------- output projections


class Attention(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Conv1D(nn.Module):
    """As GPT-2's: the weight is stored transposed."""

    def __init__(self, columns: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, hidden))


@pytest.mark.parametrize("name", ["o_proj", "dense", "out_proj", "c_proj"])
def test_the_output_projection_is_found_under_its_usual_names(name: str) -> None:
    linear = nn.Linear(48, 64)
    weight = output_projection(Attention(q_proj=nn.Linear(64, 48), **{name: linear}), 48)
    assert torch.equal(weight, linear.weight)
    assert not weight.requires_grad


@pytest.mark.parametrize("hidden", [64, 48], ids=["oblong", "square"])
def test_a_transposed_projection_is_turned(hidden: int) -> None:
    projection = Conv1D(48, hidden)
    assert torch.equal(output_projection(Attention(c_proj=projection), 48), projection.weight.T)


class _Quantised(Tensor):
    """A weight that looks like floats and is something else underneath."""


def _weights() -> dict[str, Tensor]:
    floats = torch.randn(64, 48)
    return {
        "integers": floats.to(torch.int8),
        "packed integers": torch.zeros(64 * 48 // 2, 1, dtype=torch.uint8),
        "8-bit floats": floats.to(torch.float8_e4m3fn),
        "a tensor of its own": floats.as_subclass(_Quantised),
        "another shape": torch.randn(64, 40),
    }


@pytest.mark.parametrize("kind", _weights())
def test_a_weight_that_is_no_plain_matrix_is_refused_with_a_way_out(kind: str) -> None:
    projection = nn.Linear(48, 64)
    projection.weight = nn.Parameter(_weights()[kind], requires_grad=False)
    with pytest.raises(dkv.UnsupportedModelError, match=r"Attention.o_proj holds its weight as .*'snapkv'"):
        output_projection(Attention(o_proj=projection), 48)


def test_an_offloaded_weight_is_refused_with_a_way_out() -> None:
    projection = nn.Linear(48, 64, device="meta")
    with pytest.raises(dkv.UnsupportedModelError, match=r"o_proj is offloaded.*'snapkv'"):
        output_projection(Attention(o_proj=projection), 48)


def test_an_unknown_projection_is_refused_with_a_way_out() -> None:
    with pytest.raises(dkv.UnsupportedModelError, match=r"Attention has no output projection.*'snapkv'"):
        output_projection(Attention(final=nn.Linear(48, 64)), 48)


@pytest.mark.parametrize("architecture", ["gpt2", "opt"])
def test_models_with_other_projections_are_evicted_from(architecture: str) -> None:
    model = tiny_model(architecture)
    turns = [prompt(PROMPT), *prompt(3, seed=1).split(1, 1)]
    dkv.enable(model)
    cache = dkv.EvictingCache(model, "layer-defensivekv", 0.3)
    logits = _feed(model, cache, *turns)
    dkv.disable(model)
    oracle = MaskedModel(model, cache, PROMPT)
    torch.testing.assert_close(logits, torch.cat([oracle(turn) for turn in turns], 1), atol=2e-4, rtol=0)


def test_a_model_with_quantised_projections_can_be_used_without_value_weighting() -> None:
    model = tiny_model("llama")
    turns = [prompt(PROMPT), prompt(3, seed=1)]
    dkv.enable(model)
    expected = _feed(model, dkv.EvictingCache(model, "snapkv", 0.3), *turns)
    for layer in model.model.layers:
        layer.self_attn.o_proj = _Int8(layer.self_attn.o_proj)
    with pytest.raises(dkv.UnsupportedModelError, match="quantised"):
        _feed(model, dkv.EvictingCache(model, "defensivekv", 0.3), *turns)
    logits = _feed(model, dkv.EvictingCache(model, "snapkv", 0.3), *turns)
    assert (logits - expected).abs().mean() < 0.1


class _Int8(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        return states @ (self.weight * self.scale).T


# ---------------------------------------------------------------------- positions


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1024),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 4096),
        (
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 256,
                    "rope_theta": 1e4,
                }
            },
            1024,
        ),
    ],
    ids=["plain", "linear", "yarn"],
)
def test_the_models_positions_count_stretched_ones(changes: dict[str, Any], expected: int) -> None:
    assert max_positions(tiny_model("llama", **changes)) == expected
