"""Contexts written to files and loaded again: the same answers, bit for bit, or a refusal that says why."""

import json
import struct
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.cache.tensor_file import read_header
from defensivekv.integrations.transformers.contexts.files import file_facts
from defensivekv.policies.scoring import WindowAttention
from tests.integrations.transformers.contexts.cases import assert_same, context_of, document
from tests.integrations.transformers.models import tiny_model
from tests.integrations.transformers.tokenizers import small_tokenizer

TEMPLATE = "[BOS]{% for m in messages %} [USER] {{ m['content'] | trim }} [END]{% endfor %} [ASSISTANT]"


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


# ---------------------------------------------------------------------- the same answers


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("layer-defensivekv", {}),
        ("defensivekv", {"budget": 0.5}),
        ("layer-defensivekv", {"chunk_size": 64}),
        ("layer-defensivekv", {"budget": "auto:0.8"}),
        ("cake", {}),
        ("keydiff", {"keep_scores": False}),
        ("ada-criticalkv", {}),
        ("kvzip", {}),
        ("full", {}),
        ("layer-defensivekv", {"static_tokens": 64}),
        ("layer-defensivekv", {"max_entries": 96, "chunk_size": 64}),
        ("layer-defensivekv", {"budget": "90KiB"}),
        ("h2o", {"max_entries": 96, "interval": 7}),
        ("streaming-llm", {"max_batch_bytes": "80KiB"}),
    ],
)
def test_a_loaded_context_answers_as_the_one_just_made_bit_for_bit(
    model: PreTrainedModel, tmp_path: Path, policy: str, options: dict[str, Any]
) -> None:
    made = context_of(model, policy, **options)
    made.save(tmp_path / "book.kv")
    loaded = dkv.load_context(tmp_path / "book.kv", model, small_tokenizer())
    assert loaded.was_stored
    assert not made.was_stored
    assert_same(loaded, made)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3_text", "gpt_oss", "qwen3_next", "gpt2", "lfm2"])
def test_layers_of_transformers_own_are_kept_too(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    model = tiny_model(architecture, dtype=dtype)
    made = context_of(model, "defensivekv")
    made.save(tmp_path / "book.kv")
    assert_same(dkv.load_context(tmp_path / "book.kv", model, small_tokenizer()), made)


def test_another_process_answers_the_same(model: PreTrainedModel, tmp_path: Path) -> None:
    made = context_of(model)
    made.save(tmp_path / "book.kv")
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "import defensivekv as dkv\n"
        "from tests.integrations.transformers.models import tiny_model\n"
        "from tests.integrations.transformers.tokenizers import small_tokenizer\n"
        "context = dkv.load_context(sys.argv[1], tiny_model('llama'), small_tokenizer())\n"
        "print(context.ask('w7 w8 w9', max_new_tokens=20))\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "book.kv")], capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == made.ask("w7 w8 w9", max_new_tokens=20)


def test_the_chat_template_goes_along(model: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(TEMPLATE)
    made = dkv.compress(model, tokenizer, document(), "snapkv", 0.3)
    made.save(tmp_path / "book.kv")
    loaded = dkv.load_context(tmp_path / "book.kv", model, tokenizer)
    assert loaded.answer("w7 w8", max_new_tokens=3).question_tokens == 4
    assert loaded.ask("w7 w8") == made.ask("w7 w8")


def test_the_file_that_is_there_is_replaced_whole(model: PreTrainedModel, tmp_path: Path) -> None:
    path = tmp_path / "book.kv"
    context_of(model).save(path)
    before = dkv.load_context(path, model, small_tokenizer())
    said = before.ask("w7", max_new_tokens=9)
    smaller = context_of(model, budget=0.2)
    smaller.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["book.kv"]
    assert_same(dkv.load_context(path, model, small_tokenizer()), smaller)
    assert before.ask("w7", max_new_tokens=9) == said, "who has the old file mapped keeps it"


def test_a_loaded_context_can_be_saved_again(model: PreTrainedModel, tmp_path: Path) -> None:
    context_of(model).save(tmp_path / "one.kv")
    loaded = dkv.load_context(tmp_path / "one.kv", model, small_tokenizer())
    loaded.save(tmp_path / "two.kv")
    assert_same(dkv.load_context(tmp_path / "two.kv", model, small_tokenizer()), loaded)


# ---------------------------------------------------------------------- mapped, and no more than is read


def test_what_is_mapped_is_the_file_and_scores_are_not_read_for_an_answer(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    path = tmp_path / "book.kv"
    context_of(model).save(path)
    with path.open("rb") as file:
        names = [name for name in read_header(file, "it") if name.endswith(".scores")]
    assert len(names) == 3
    _flip(path, "layers.0.scores")
    loaded = dkv.load_context(path, model, small_tokenizer())
    assert loaded.ask("w7", max_new_tokens=3)
    with pytest.raises(dkv.DamagedContextError, match=r"book\.kv: layers\.0\.scores is damaged"):
        loaded.shrink(0.2)


def test_others_can_read_the_file(model: PreTrainedModel, tmp_path: Path) -> None:
    made = context_of(model, "defensivekv")
    made.save(tmp_path / "book.kv")
    with safe_open(tmp_path / "book.kv", framework="pt") as file:
        metadata = file.metadata()
        lengths = file.get_tensor("lengths")
        assert torch.equal(lengths, made.cache.lengths[:, 0].int())
        assert torch.equal(file.get_tensor("tokens"), made.document_ids[0])
        start = int(lengths[1, 0])
        second = file.get_tensor("layers.1.positions")[start : start + int(lengths[1, 1])]
        assert torch.equal(second, made.cache.kept_positions(1, 0, 1))
        assert file.get_tensor("layers.1.keys").shape == (int(lengths[1].sum()), 16)
    assert metadata["format"] == "defensivekv-context"
    assert json.loads(metadata["policy"])["fields"]["name"] == "defensivekv"
    assert json.loads(metadata["about"])["num_tokens"] == 301


def test_facts_are_read_from_the_header_alone(model: PreTrainedModel, tmp_path: Path) -> None:
    made = context_of(model, "defensivekv")
    made.save(tmp_path / "book.kv")
    facts = file_facts(tmp_path / "book.kv")
    assert (facts.key, facts.policy, facts.budget, facts.num_tokens) == (made.key, "defensivekv", "0.3", 301)
    assert facts.held == pytest.approx(0.3, abs=0.005)
    assert facts.dtype == "float32"


# ---------------------------------------------------------------------- refused, by name


def _changed(model: PreTrainedModel, name: str) -> PreTrainedModel:
    with torch.no_grad():
        parameter = dict(model.named_parameters())[name]
        parameter.view(-1)[-1] += 1e-3
    return model


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda: _changed(tiny_model("llama"), "model.layers.1.self_attn.k_proj.weight"), r"\(weights\)"),
        (lambda: tiny_model("llama", dtype=torch.bfloat16), r"\(dtype, weights\).* in float32 .* in bfloat16"),
        (lambda: tiny_model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5000.0}), "config rope"),
        (lambda: tiny_model("qwen3"), "config model_type"),
    ],
)
def test_another_model_is_refused_and_what_differs_named(tmp_path: Path, other: Any, says: str) -> None:
    context_of().save(tmp_path / "book.kv")
    with pytest.raises(dkv.ContextError, match=rf"book\.kv was made by another model .*{says}"):
        dkv.load_context(tmp_path / "book.kv", other(), small_tokenizer())


def test_another_tokenizer_is_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    context_of(model).save(tmp_path / "book.kv")
    other = small_tokenizer()
    other.backend_tokenizer.pre_tokenizer = Whitespace()
    for tokenizer in (small_tokenizer(TEMPLATE), other):
        with pytest.raises(dkv.ContextError, match="another tokenizer"):
            dkv.load_context(tmp_path / "book.kv", model, tokenizer)
    padded = small_tokenizer()
    padded(["w7", "w8 w9"], padding=True, truncation=True, max_length=9)
    dkv.load_context(tmp_path / "book.kv", model, padded)


@dataclass(frozen=True)
class OwnScorer(WindowAttention):
    """As the package's, by another name."""


def test_a_policy_with_parts_of_ones_own_is_asked_for(model: PreTrainedModel, tmp_path: Path) -> None:
    own = replace(dkv.policy("snapkv", 0.3), scorer=OwnScorer())
    made = dkv.compress(model, small_tokenizer(), document(), own)
    made.save(tmp_path / "book.kv")
    with pytest.raises(dkv.InvalidInputError, match="pass policy="):
        dkv.load_context(tmp_path / "book.kv", model, small_tokenizer())
    assert_same(dkv.load_context(tmp_path / "book.kv", model, small_tokenizer(), policy=own), made)
    with pytest.raises(dkv.ContextError, match=r"another policy than 'snapkv' at 0\.3"):
        dkv.load_context(tmp_path / "book.kv", model, small_tokenizer(), policy=dkv.policy("snapkv", 0.3))


def _flip(path: Path, name: str) -> None:
    """One bit of a tensor."""
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start, end = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + (start + end) // 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["tokens", "lengths", "layers.1.keys", "layers.2.values", "layers.0.positions"])
def test_a_flipped_bit_is_never_answered_from(model: PreTrainedModel, tmp_path: Path, name: str) -> None:
    path = tmp_path / "book.kv"
    context_of(model).save(path)
    _flip(path, name)
    with pytest.raises(dkv.DamagedContextError, match=rf"book\.kv: {name} is damaged"):
        dkv.load_context(path, model, small_tokenizer()).ask("w7")


def test_files_that_are_not_there_or_not_ours_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(dkv.InvalidInputError, match=r"cannot open .*none\.kv"):
        dkv.load_context(tmp_path / "none.kv", model, small_tokenizer())
    (tmp_path / "text.kv").write_text("A long story. " * 100)
    with pytest.raises(dkv.DamagedContextError, match=r"text\.kv is no stored context"):
        dkv.load_context(tmp_path / "text.kv", model, small_tokenizer())
    with pytest.raises(dkv.InvalidInputError, match="cannot open"):
        context_of(model).save(tmp_path / "missing" / "book.kv")


def test_only_a_file_is_written_anew(model: PreTrainedModel, tmp_path: Path) -> None:
    context = context_of(model)
    for path in (tmp_path, Path("/dev/null"), Path("")):
        with pytest.raises(dkv.InvalidInputError, match="is no file that could be written anew"):
            context.save(path)
    with pytest.raises(dkv.InvalidInputError, match=r"cannot open .*null"):
        context.save(tmp_path / "a\0b.kv")
    (tmp_path / "link.kv").symlink_to(tmp_path / "target.kv")
    context.save(tmp_path / "link.kv")
    assert (tmp_path / "link.kv").is_symlink()
    assert_same(dkv.load_context(tmp_path / "target.kv", model, small_tokenizer()), context)


def test_several_rows_are_no_context() -> None:
    from defensivekv.integrations.transformers.contexts import snapshot

    context = context_of()
    twice = context.cache.fork()
    twice.batch_repeat_interleave(2)
    with pytest.raises(dkv.CacheError, match="one prompt"):
        snapshot.take(twice)
