from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from defensivekv.bench.shapes import SHAPES, shape_config
from defensivekv.bench.subject import Subject, model_facts
from defensivekv.bench.workers.random_model import random_model
from defensivekv.errors import InvalidInputError

PUBLISHED = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-32b": 32_763_876_352,
    "mistral-7b": 7_248_023_552,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_weights_as_the_model_of_its_name(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert set(PUBLISHED) | {"tiny"} == set(SHAPES)


def test_random_matrices_differ_and_tied_ones_stay_tied() -> None:
    config = shape_config("tiny")
    model = random_model(config, torch.float32, torch.device("cpu"), seed=3)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    first, second = (layer.self_attn.q_proj.weight for layer in model.model.layers)
    assert not torch.equal(first, second), "a format that stores equal matrices once would hold fewer"
    assert first.detach().std().item() == pytest.approx(0.02, rel=0.1)
    assert all((layer.input_layernorm.weight == 1).all() for layer in model.model.layers)
    again = random_model(config, torch.float32, torch.device("cpu"), seed=3)
    assert torch.equal(first, again.model.layers[0].self_attn.q_proj.weight)
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_input_embedding_is_read_only_where_it_is_the_outputs_too(is_tied: bool) -> None:
    subject = Subject(None, "tiny", None, "bfloat16", "cpu", 0)
    config = shape_config("tiny", tie_word_embeddings=is_tied)
    model = random_model(config, torch.bfloat16, torch.device("cpu"), seed=0)
    facts = model_facts(subject, model)
    embedding = 256 * 64 * 2
    assert facts.weight_bytes == 2 * facts.parameters
    assert facts.read_bytes == facts.weight_bytes - (0 if is_tied else embedding)
    assert facts.token_bytes == 2 * 2 * 2 * 16 * 2  # keys and values, layers, heads, size, bytes
    assert facts.positions == 4096


def test_a_subject_can_be_shortened_but_not_lengthened(tmp_path: Path) -> None:
    short = Subject(None, "qwen2.5-0.5b", 3, "auto", "cpu", 0).config()
    assert short.num_hidden_layers == len(short.layer_types) == 3
    assert short.dtype is torch.bfloat16
    packaged = Subject(None, None, 1, "auto", "cpu", 0)
    model = packaged.load()
    assert len(model.model.layers) == 1
    assert model.dtype is torch.float32, "its own"
    assert model_facts(packaged, model).of_layers == 4
    with pytest.raises(InvalidInputError, match="has 2 layers: --layers 3 is more"):
        Subject(None, "tiny", 3, "auto", "cpu", 0).config()
    with pytest.raises(InvalidInputError, match="cannot load"):
        Subject(str(tmp_path / "none"), None, None, "auto", "cpu", 0).config()
