from pathlib import Path

import pytest
import torch
from tokenizers import normalizers
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

import defensivekv as dkv
from defensivekv.integrations.transformers.contexts import fingerprints
from defensivekv.integrations.transformers.contexts.fingerprints import model_fingerprint, tokenizer_fingerprint
from tests.integrations.transformers.models import tiny_model
from tests.integrations.transformers.tokenizers import small_tokenizer


@pytest.mark.parametrize("name", ["embed_tokens", "layers.2.mlp.down_proj", "norm"])
@pytest.mark.parametrize("place", [0, -1])
def test_any_element_of_any_weight_tells_models_apart(name: str, place: int) -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model("llama")).differences(before) == []
    with torch.no_grad():
        model.state_dict()[f"model.{name}.weight"].view(-1)[place] += 1e-4
    assert model_fingerprint(model).differences(before) == ["weights"]


def test_one_models_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, hashed = tiny_model("llama"), fingerprints._hash_weights
    read: list[int] = []

    def hash_weights(state: dict[str, torch.Tensor]) -> str:
        read.append(len(state))
        return hashed(state)

    monkeypatch.setattr(fingerprints, "_hash_weights", hash_weights)
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    dkv.enable(model)
    assert model_fingerprint(model) == first
    assert len(read) == 1


def test_an_adapter_merged_behind_pytorchs_back_is_noticed() -> None:
    model = tiny_model("llama")
    before, weight = model_fingerprint(model), model.model.layers[1].self_attn.q_proj.weight
    weight.data += 1e-3 * torch.outer(torch.ones(len(weight)), torch.ones(weight.shape[1]))
    assert model_fingerprint(model).differences(before) == ["weights"]


class Adapted(torch.nn.Module):
    """As adapters are: all of their weights are there, and a plain value says which one is on."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base, self._active, self.merged = base, ["a"], False
        self.added = torch.nn.ModuleDict({name: torch.nn.Linear(base.in_features, base.out_features) for name in "ab"})


def test_which_adapter_is_active_and_constants_tell_models_apart() -> None:
    model = tiny_model("llama")
    attention = model.model.layers[1].self_attn
    attention.v_proj = Adapted(attention.v_proj)
    before = model_fingerprint(model)
    attention.v_proj.train().eval()
    attention.v_proj.max_seq_len_cached = 4096
    assert model_fingerprint(model) == before
    attention.v_proj._active = ["b"]
    assert model_fingerprint(model).differences(before) == ["modules"]
    attention.v_proj._active = ["a"]
    attention.scaling *= 2
    assert model_fingerprint(model).differences(before) == ["modules"]


def test_another_class_of_the_same_weights_is_another_model() -> None:
    model = tiny_model("llama")

    class Mine(type(model)):  # type: ignore[misc]
        """Computes who knows what."""

    other = Mine(model.config).eval()
    other.load_state_dict(model.state_dict())
    assert model_fingerprint(other).differences(model_fingerprint(model)) == ["config class"]


def test_what_changes_no_answer_changes_no_fingerprint() -> None:
    model, tokenizer = tiny_model("llama"), small_tokenizer()
    before = model_fingerprint(model), tokenizer_fingerprint(tokenizer)
    model.config.pad_token_id, model.config.output_hidden_states, model.config.id2label = 3, True, {0: "x"}
    tokenizer.pad_token = "[END]"
    assert (model_fingerprint(model), tokenizer_fingerprint(tokenizer)) == before
    tokenizer.split_special_tokens = True
    assert tokenizer_fingerprint(tokenizer) != before[1]


class Scaled(torch.nn.Linear):
    """Has a state beside its weights."""

    def get_extra_state(self) -> dict[str, float]:
        return {"scale": 2.0}


def test_a_state_that_is_no_tensor_and_a_rotation_that_remembers_are_refused() -> None:
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(dkv.UnsupportedModelError, match="depends on the longest text that it has read"):
        model_fingerprint(model)
    model = tiny_model("llama")
    model.lm_head.__class__ = Scaled
    with pytest.raises(dkv.UnsupportedModelError, match=r"'lm_head\._extra_state' of the model's state is a dict"):
        model_fingerprint(model)


def test_weights_made_of_several_tensors_are_told_apart_by_those() -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    for one in (model, other):
        norm = one.model.norm
        norm.weight = torch.nn.Parameter(TwoTensor(norm.weight.detach(), torch.ones(len(norm.weight))))
    before = model_fingerprint(model)
    assert model_fingerprint(other) == before
    other.model.norm.weight.b[3] = 2
    assert model_fingerprint(other).differences(before) == ["weights"]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float8_e4m3fn, torch.int64])
def test_weights_of_any_dtype_have_a_fingerprint(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    model.register_buffer("table", torch.arange(200).to(dtype).view(20, 10).T)
    before = model_fingerprint(model)
    assert model_fingerprint(model) == before
    model.table = model.table.float().logical_not().to(dtype)
    assert model_fingerprint(model).differences(before) == ["weights"]


def test_where_a_model_came_from_is_told_and_not_compared() -> None:
    model = tiny_model("llama")
    before = model_fingerprint(model)
    model.config._name_or_path, model.config._commit_hash = "some/model", "abc"
    after = model_fingerprint(model)
    assert (after.name, after.revision) == ("some/model", "abc")
    assert after.described == "some/model at revision abc in float32"
    assert after.differences(before) == []


def test_dtype_and_configuration_are_named() -> None:
    before = model_fingerprint(tiny_model("llama"))
    assert model_fingerprint(tiny_model("llama", dtype=torch.bfloat16)).differences(before) == ["dtype", "weights"]
    other = tiny_model("llama")
    other.config.rms_norm_eps = 1e-3
    assert model_fingerprint(other).differences(before) == ["config rms_norm_eps"]


def test_weights_that_are_not_here_are_refused() -> None:
    model = tiny_model("llama").to("meta")
    with pytest.raises(dkv.UnsupportedModelError, match=r"is on disk, .* load the model whole"):
        model_fingerprint(model)


def test_a_tokenizer_is_its_rules_and_its_template_and_not_what_was_asked_of_it_last() -> None:
    plain = tokenizer_fingerprint(small_tokenizer())
    used = small_tokenizer()
    used(["w7", "w8 w9"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(used) == plain
    assert tokenizer_fingerprint(small_tokenizer("{{ messages[0].content }}")) != plain
    more = small_tokenizer()
    more.add_tokens(["another"])
    assert tokenizer_fingerprint(more) != plain


def test_a_tokenizers_vocabulary_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, read = small_tokenizer(), list[int]()
    tokenizer.save_pretrained(tmp_path)
    vocabulary = fingerprints._vocabulary

    def read_vocabulary(one: PreTrainedTokenizerBase) -> bytes:
        read.append(len(one))
        return vocabulary(one)

    monkeypatch.setattr(fingerprints, "_vocabulary", read_vocabulary)
    first = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer) == first
    assert len(read) == 1
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == first

    found = {first}
    for change in (
        lambda: tokenizer.add_tokens(["another"]),
        lambda: setattr(tokenizer, "chat_template", "{{ messages[0].content }}"),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
        lambda: setattr(tokenizer.backend_tokenizer.model, "unk_token", "w3"),
    ):
        change()
        found.add(tokenizer_fingerprint(tokenizer))
    assert len(found) == 5


def test_a_tokenizer_without_a_backend_has_a_fingerprint() -> None:
    assert tokenizer_fingerprint(ByT5Tokenizer()) == tokenizer_fingerprint(ByT5Tokenizer())
    assert tokenizer_fingerprint(ByT5Tokenizer()) != tokenizer_fingerprint(ByT5Tokenizer(extra_ids=124))
