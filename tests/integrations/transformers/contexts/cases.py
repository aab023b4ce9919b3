"""Contexts of small models, as the tests of files and stores want them."""

from typing import Any

import torch
from transformers import PreTrainedModel

import defensivekv as dkv
from defensivekv.integrations.transformers import Context
from tests.integrations.transformers.models import prompt, tiny_model
from tests.integrations.transformers.tokenizers import small_tokenizer

QUESTIONS = ("w7 w8 w9", "w50 w60", "w11")


def document(num_tokens: int = 300, seed: int = 0) -> str:
    """Random words."""
    return " ".join(f"w{int(token)}" for token in prompt(num_tokens, seed=seed)[0].clamp_min(5))


def context_of(model: PreTrainedModel | None = None, policy: str = "layer-defensivekv", **options: Any) -> Context:
    """The document compressed to 30 %, unless the options say otherwise."""
    given: dict[str, Any] = {} if "max_entries" in options or policy == "full" else {"budget": 0.3}
    return dkv.compress(model or tiny_model("llama"), small_tokenizer(), document(), policy, **(given | options))


def assert_same(one: Context, other: Context, max_new_tokens: int = 12) -> None:
    """The same entries and the same bits of every answer's scores."""
    assert torch.equal(one.document_ids, other.document_ids)
    assert torch.equal(one.cache.lengths, other.cache.lengths)
    assert one.cache.policy == other.cache.policy
    # What a tail has room for, and what a sliding layer keeps alive of its prompt, is no part of a context.
    for name in ("policy", "budget", "bound", "prompt_tokens", "shares", "full_bytes", "entries_kept", "achieved"):
        assert getattr(one.report(), name) == getattr(other.report(), name)
    assert one.key == other.key
    for layer in range(len(one.cache.evicted_layers)):
        for head in range(one.cache.lengths.shape[2]):
            assert torch.equal(one.cache.kept_positions(layer, 0, head), other.cache.kept_positions(layer, 0, head))
    for question in QUESTIONS:
        texts, logits = zip(*(_logits(context, question, max_new_tokens) for context in (one, other)), strict=True)
        assert texts[0] == texts[1]
        assert torch.equal(logits[0], logits[1])


def _logits(context: Context, question: str, max_new_tokens: int) -> tuple[str, torch.Tensor]:
    """The answer, and the logits that it was chosen by."""
    seen = []
    head = context.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach().clone()))
    try:
        text = context.ask(question, max_new_tokens=max_new_tokens)
    finally:
        hook.remove()
    return text, torch.cat([one.flatten() for one in seen])
