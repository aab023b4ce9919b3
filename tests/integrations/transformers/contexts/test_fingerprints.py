import pytest
import torch

import defensivekv as dkv
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
    from defensivekv.integrations.transformers.contexts import fingerprints

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
