"""What the harness wants of a filled cache: greedy answers, and log-likelihoods of continuations."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from defensivekv.errors import DefensiveKVError
from defensivekv.integrations.transformers import EvictingCache
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

AnyCache = DynamicCache | EvictingCache


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel, cache: AnyCache, rows: Sequence[tuple[list[int], list[int]]]
) -> list[tuple[float, bool]]:
    """The log-probability of each continuation, and whether greedy decoding would have given it.

    rows: (tokens after those of the cache, continuation), neither empty; all in one forward pass, from one fork of the
    cache. Sums are natural logarithms, taken in float32. Raises DefensiveKVError where the model gives NaN.
    """
    inputs = [asked + continuation[:-1] for asked, continuation in rows]
    longest = max(map(len, inputs))
    # Pads stand on the right, where no token that is looked at sees them.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in inputs], device=model.device)
    first = min(len(asked) for asked, _ in rows) - 1
    fork: Any = copy.deepcopy(cache)
    if len(rows) > 1:
        fork.batch_repeat_interleave(len(rows))
    output = model(input_ids=ids, use_cache=True, logits_to_keep=longest - first, **{CACHE_ARGUMENT: fork})
    logits = output.logits[:, -(longest - first) :]
    scored = []
    for row, (asked, continuation) in enumerate(rows):
        start = len(asked) - 1 - first
        log_probs = logits[row, start : start + len(continuation)].float().log_softmax(-1)
        if bool(log_probs.isnan().any()):
            raise DefensiveKVError("the model gives logits that are not numbers: load it in another dtype")
        targets = torch.tensor(continuation, device=log_probs.device)
        total = log_probs.gather(-1, targets[:, None]).sum()
        scored.append((float(total), bool((log_probs.argmax(-1) == targets).all())))
    return scored


def generate_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cache: AnyCache,
    ids: Tensor,
    *,
    max_new_tokens: int,
    stopping: StoppingCriteriaList,
) -> list[int]:
    """The new tokens, the end included, from a fork of the cache.

    ids: (1, t), what the cache holds included. Raises DefensiveKVError where the model gives NaN.
    """
    with _own_settings(model, tokenizer, max_new_tokens):
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            logits_processor=LogitsProcessorList([_refuse_nan]),
            stopping_criteria=stopping,
            **{CACHE_ARGUMENT: copy.deepcopy(cache)},
        )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def _refuse_nan(input_ids: Tensor, scores: Tensor) -> Tensor:
    if bool(scores.isnan().any()):
        raise DefensiveKVError("the model gives logits that are not numbers: load it in another dtype")
    return scores


@contextmanager
def _own_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> Iterator[None]:
    """Nothing but greedy decoding. What `generate()` is not told, it takes from the model's own settings."""
    theirs = model.generation_config
    stated = tokenizer.eos_token_id if theirs.eos_token_id is None else theirs.eos_token_id
    ends = [] if stated is None else [stated] if isinstance(stated, int) else list(stated)
    known = (tokenizer.pad_token_id, theirs.pad_token_id, *ends, 0)
    pad = next(token for token in known if isinstance(token, int) and token >= 0)
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=ends or None, pad_token_id=pad, do_sample=False
    )
    try:
        yield
    finally:
        model.generation_config = theirs
