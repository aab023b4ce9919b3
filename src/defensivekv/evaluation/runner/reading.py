"""Reading prompts into a cache, and what the cache holds of each afterwards."""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.budget import POSITION_BYTES
from defensivekv.errors import BudgetError, DefensiveKVWarning
from defensivekv.evaluation.runner.cells import Setting
from defensivekv.integrations.transformers import ContextStore, EvictingCache, disable, enable
from defensivekv.integrations.transformers.contexts.compressing import read
from defensivekv.integrations.transformers.contexts.recipe import Recipe
from defensivekv.integrations.transformers.contexts.wrapping import PLAIN, Wrapping
from defensivekv.integrations.transformers.model import plan_layers, text_config
from defensivekv.integrations.transformers.prefill import masking, prefill
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.policies import Policy

AnyCache = DynamicCache | EvictingCache


@dataclass(frozen=True)
class Held:
    """What one row of a cache holds of its prompt.

    tokens: of the prompt. lengths: entries, [evicted layer][kv head]. achieved: the share of entries. cache_bytes: of
    all layers. full_bytes: what the stock cache would hold.
    """

    tokens: int
    lengths: list[list[int]]
    achieved: float
    cache_bytes: int
    full_bytes: int


@dataclass(frozen=True)
class Compressed:
    """What reading prompts came to. held: of each row. seconds: for all rows, compression included."""

    held: list[Held]
    seconds: float


@dataclass(frozen=True)
class Read:
    """Prompts in a cache, and their ids and mask (b, t)."""

    cache: AnyCache
    ids: Tensor
    mask: Tensor
    compressed: Compressed


def read_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    prompts: list[list[int]],
    *,
    pad: int,
    wrapping: Wrapping = PLAIN,
    store: ContextStore | None = None,
) -> Read:
    """Reads prompts, one for each row, and evicts. Leaves the model enabled, or with its own attention for "full".

    wrapping: of the questions, for policies that have the prompt repeated. store: where one prompt alone is looked for
    first, and put afterwards; its time is that of the reading which made it.

    Raises BudgetError where a row holds more entries than its budget allows, and what the cache raises.
    """
    ids, mask = pad_left(prompts, pad, model.device)
    synchronize(model)
    start = time.perf_counter()
    if setting.is_stock:
        disable(model)
        cache: AnyCache = DynamicCache(config=model.config)
        seconds: float | None = None
        model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}, **masking(model, mask))
    else:
        enable(model)
        cache, seconds = EvictingCache(model, setting.policy), None
        if store is None or len(prompts) > 1:
            compress_prompts(model, tokenizer, setting, cache, ids, mask, wrapping.after)
        else:
            cache, seconds = _found_or_read(model, tokenizer, setting, cache, ids, wrapping, store)
    synchronize(model)
    seconds = time.perf_counter() - start if seconds is None else seconds
    held = (
        _held_by_evicting(cache, setting.policy)
        if isinstance(cache, EvictingCache)
        else _held_by_stock(model, cache, mask)
    )
    return Read(cache, ids, mask, Compressed(held, seconds))


def compress_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    cache: EvictingCache,
    ids: Tensor,
    mask: Tensor,
    suffix: str = "",
) -> None:
    """Reads prompts into an empty cache of the enabled model, which keeps what the policy keeps.

    suffix: what stands between the user's words and the model's, for policies that have the prompt repeated.
    """
    with _quiet():
        # Policies that have the prompt repeated refuse pads; the rows are then read one at a time.
        prefill(
            model,
            cache,
            ids,
            attention_mask=mask,
            tokenizer=tokenizer,
            suffix=suffix,
            chunk_size=setting.chunk_size,
        )


def _found_or_read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    setting: Setting,
    cache: EvictingCache,
    ids: Tensor,
    wrapping: Wrapping,
    store: ContextStore,
) -> tuple[EvictingCache, float]:
    """The store's cache of one prompt, or the empty one once it has read it; and the seconds of that reading."""
    recipe = Recipe.of(cache, ids, setting.chunk_size, wrapping)
    context = store.get(recipe.key(model, tokenizer), model, tokenizer, policy=setting.policy)
    if context is None:
        with _quiet():
            context = read(model, tokenizer, cache, recipe)
        store.offer(context)
    return context.cache, context.prefill_seconds


@contextmanager
def _quiet() -> Iterator[None]:
    """A prompt that is too short to be compressed is an error here, see `_check_budget`, and no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*kept whole", category=DefensiveKVWarning)
        yield


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (b, t) of rows of any lengths."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def synchronize(model: PreTrainedModel) -> None:
    """Waits for the device, so that a clock tells the truth."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _held_by_evicting(cache: EvictingCache, policy: Policy) -> list[Held]:
    report = cache.report()
    bytes_per_token = report.full_bytes // sum(report.prompt_tokens)
    others = (report.nbytes - report.evicted_nbytes) // len(report.prompt_tokens)
    found = []
    for row, tokens in enumerate(report.prompt_tokens):
        lengths = [list(layer.lengths[row]) for layer in report.layers if layer.evicted]
        entries, seen = sum(map(sum, lengths)), tokens * sum(map(len, lengths))
        _check_budget(entries, policy, tokens, seen, bytes_per_token)
        found.append(
            Held(
                tokens=tokens,
                lengths=lengths,
                achieved=entries / seen,
                cache_bytes=report.evicted_nbytes * entries // report.entries_kept + others,
                # The stock cache holds no positions.
                full_bytes=tokens * bytes_per_token - seen * POSITION_BYTES + others,
            )
        )
    return found


def _check_budget(entries: int, policy: Policy, tokens: int, seen: int, bytes_per_token: int) -> None:
    allowed = floor(policy.budget.share(tokens, bytes_per_token) * seen)
    if entries > allowed:
        why = ": prompts too short for the observation window are kept whole" if entries == seen else ""
        raise BudgetError(
            f"held {entries} entries, the budget allows {allowed} of {seen} (policy {policy.name}, budget "
            f"{policy.budget}, {tokens} tokens){why}"
        )


def _held_by_stock(model: PreTrainedModel, cache: DynamicCache, mask: Tensor) -> list[Held]:
    """Pads are not counted: a row alone has none."""
    plans = plan_layers(text_config(model))
    rows, longest = mask.shape
    found = []
    for tokens in mask.sum(-1).tolist():
        lengths, held = [], 0
        for plan, layer in zip(plans, cache.layers, strict=True):
            states = [state for name in ("keys", "values") if isinstance(state := getattr(layer, name, None), Tensor)]
            size = sum(state.nbytes for state in states) // rows
            held += size * tokens // longest if plan.evicted else size
            if plan.evicted:
                lengths.append([tokens] * states[0].shape[1])
        found.append(Held(tokens, lengths, 1.0, held, held))
    return found
