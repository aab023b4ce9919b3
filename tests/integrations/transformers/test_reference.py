"""The decisions of the authors' code, and what their models then say, through the real integration."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

FOLDER = Path(__file__).parents[2] / "data" / "reference" / "end_to_end"
CASES: list[dict[str, Any]] = json.loads((FOLDER / "index.json").read_text())
STEPS = 12

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda case: Path(case["file"]).stem)


def _model(case: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FOLDER / case["model"], dtype=torch.float32).eval()
    dkv.enable(model)
    return model


def _expected(case: dict[str, Any]) -> dict[str, Tensor]:
    expected: dict[str, Tensor] = load_file(FOLDER / case["file"])
    return expected


def _compress(model: PreTrainedModel, case: dict[str, Any], context_ids: Tensor) -> dkv.EvictingCache:
    policy = dkv.policy(case["method"].replace("_", "-"), case["budget"], protect_window=False)
    cache = dkv.EvictingCache(model, policy)
    with torch.no_grad():
        model(context_ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def test_the_kept_sets_are_the_authors(case: dict[str, Any]) -> None:
    expected = _expected(case)
    scores, theirs = expected["scores"], expected["kept"].bool()
    cache = _compress(_model(case), case, expected["context_ids"])
    ours = torch.zeros_like(theirs)
    for layer, head in torch.cartesian_prod(*map(torch.arange, theirs.shape[:2])).tolist():
        ours[layer, head, cache.kept_positions(layer, 0, head).long()] = True

    competing = (
        [(scores, theirs, ours)] if case["method"].startswith("layer") else zip(scores, theirs, ours, strict=True)
    )
    for score, their, our in competing:
        assert our.sum() == their.sum()
        threshold = score[their].min()
        tied = score == threshold
        assert torch.equal(our & ~tied, their & ~tied), "only a tie at the threshold may be decided otherwise"


def test_the_decoded_logits_are_the_authors(case: dict[str, Any]) -> None:
    expected = _expected(case)
    model = _model(case)
    cache = _compress(model, case, expected["context_ids"])
    ids, decoded = expected["question_ids"], []
    with torch.no_grad():
        for _ in range(STEPS):
            logits = model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits[:, -1]
            decoded.append(logits)
            ids = logits.argmax(-1, keepdim=True)
    torch.testing.assert_close(torch.cat(decoded), expected["logits"], atol=1e-4, rtol=0)
    assert [int(step.argmax()) for step in decoded] == expected["generated_ids"].flatten().tolist()


def test_generate_says_what_the_authors_models_say(case: dict[str, Any]) -> None:
    expected = _expected(case)
    model = _model(case)
    cache = _compress(model, case, expected["context_ids"])
    ids = torch.cat((expected["context_ids"], expected["question_ids"]), dim=1)
    options = {"do_sample": False, "max_new_tokens": STEPS, "min_new_tokens": STEPS, "pad_token_id": 0}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **options)
    assert output[0, ids.shape[1] :].tolist() == expected["generated_ids"].flatten().tolist()
