"""An enabled model without a cache computes what it did before, gradients too."""

import pytest
import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from tests.integrations.transformers.models import SOFTCAPPED_OR_SINKS, prompt, tiny_model


def _gradients(model: PreTrainedModel, mask: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    ids = prompt(40, rows=2)
    model.zero_grad()
    model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", *SOFTCAPPED_OR_SINKS])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_are_those_of_the_stock_model(architecture: str, padded: bool) -> None:
    model = tiny_model(architecture)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, 30:] = 0
    before = _gradients(model, mask if padded else None)
    dkv.enable(model)
    after = _gradients(model, mask if padded else None)
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("architecture", SOFTCAPPED_OR_SINKS)
def test_attention_dropout_still_drops(architecture: str) -> None:
    model = tiny_model(architecture, attention_dropout=0.5).train()
    dkv.enable(model)
    ids = prompt(40)
    with torch.no_grad():
        first, second = (model(ids, use_cache=False).logits for _ in range(2))
    assert not torch.equal(first, second)
