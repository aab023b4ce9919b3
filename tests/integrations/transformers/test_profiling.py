"""Profiles measured on a model."""

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.profiling import make_profile
from tests.integrations.transformers.models import feed, prompt, tiny_model
from tests.integrations.transformers.tokenizers import small_tokenizer

TEXTS = [" ".join(f"w{int(token)}" for token in prompt(80, seed=seed)[0].clamp_min(5)) for seed in range(2)]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_a_profile_is_what_the_stock_models_weights_say(architecture: str) -> None:
    eager = tiny_model(architecture)
    eager.set_attn_implementation("eager")
    model = tiny_model(architecture)
    profile = make_profile(model, small_tokenizer(), TEXTS, num_sinks=4, num_recent=16)
    evicted = dkv.EvictingCache(model, "snapkv", 0.5).evicted_layers
    expected = torch.zeros(len(evicted), 2)
    for text in TEXTS:
        ids = torch.tensor([small_tokenizer()(text)["input_ids"]])
        places = torch.arange(ids.shape[1])
        missed = (places >= 4) & (places <= places[:, None] - 16)
        weights = eager(ids, output_attentions=True).attentions
        for number, layer in enumerate(evicted):
            lost = (weights[layer][0] * missed).sum((1, 2)) / (ids.shape[1] - 20)
            expected[number] += lost.view(2, -1).amax(1) / 2
    torch.testing.assert_close(torch.tensor(profile.heads), expected, rtol=1e-3, atol=1e-5)
    assert (profile.num_sinks, profile.num_recent) == (4, 16)
    assert "2 texts" in profile.method


@torch.no_grad()
def test_a_measured_profile_serves_the_policy() -> None:
    model = tiny_model("llama")
    profile = make_profile(model, small_tokenizer(), TEXTS, num_sinks=4, num_recent=16)
    cache = dkv.EvictingCache(model, "duo-attention", 0.6, profile=profile)
    feed(model, cache, prompt(100))
    counts = cache.lengths[:, 0]
    assert sorted(counts.flatten().tolist())[-3:] == [100] * 3
    assert counts.flatten().sort().values[0] == 20
    assert cache.report().achieved <= 0.6
    assert counts.flatten()[torch.tensor(profile.heads).flatten().argmax()] == 100


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no text to make a profile from"),
        ([TEXTS[0], "w7 w8"], "text 2 has 3 tokens and shows nothing of heads that hold 20"),
        ([" ".join(["w9"] * 1100)], "text 1 has 1101 tokens, the model 1024 positions"),
    ],
)
def test_texts_that_show_nothing_are_refused(model: PreTrainedModel, texts: list[str], message: str) -> None:
    with pytest.raises(dkv.InvalidInputError, match=message):
        make_profile(model, small_tokenizer(), texts, num_sinks=4, num_recent=16)
