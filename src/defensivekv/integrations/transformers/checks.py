"""What is checked before tokens enter a cache, so that no work is lost and no answer silently wrong."""

import sys
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from defensivekv.errors import CacheError, DefensiveKVWarning, InvalidInputError, UnsupportedModelError
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.model import LayerPlan, is_enabled
from defensivekv.policies import Policy


def check_model(model: PreTrainedModel | None) -> None:
    """Raises CacheError where the cache's model is gone or disabled."""
    if model is None:
        raise CacheError("the model that this cache was made for is gone")
    if not is_enabled(model):
        raise CacheError(
            f"{type(model).__name__} is not enabled, and its own attention would read a part of this cache only: "
            "call defensivekv.enable(model)"
        )


def check_forward(
    layers: Sequence[EvictedLayer], keys: Tensor, values: Tensor, max_tokens: int | None, drafting_from: int
) -> None:
    """Raises for what a forward pass brings, when it arrives at the first of the evicted layers.

    keys, values: (b, h, x, d or v) of the tokens to be stored. max_tokens: the model's positions. drafting_from:
    tokens that were stored when assisted decoding started; 0 where it did not since the last forward pass.
    """
    first, x = layers[0], int(keys.shape[2])
    seen, stepping = first.store.seen, first.owner.stepping
    is_broken = first.owner.is_broken or any(
        layer.store.seen != seen or layer.store.tail_length != first.store.tail_length for layer in layers
    )
    is_undecided = (
        stepping.is_underway if stepping is not None else seen and any(not layer.store.view for layer in layers)
    )
    if is_broken or is_undecided:
        raise CacheError("an earlier forward pass through this cache broke off: call reset(), or make a new cache")
    _check_fits(first, keys, values)
    if drafting_from and x > drafting_from:
        raise CacheError(
            f"assisted decoding from a cache that holds {drafting_from} tokens already passes the whole text again "
            "(transformers does so with its own caches too): give it a new cache, or decode without an assistant"
        )
    if x == 1:
        return
    if max_tokens is not None and seen + x > max_tokens:
        raise InvalidInputError(
            f"{seen + x} tokens exceed the model's maximum of {max_tokens} positions: shorten the prompt"
        )
    if first.awaits_prompt or (stepping is not None and stepping.is_reading(seen)):
        return
    if x == seen + 1:
        warnings.warn(
            f"{x} tokens follow {seen}: if they are the whole text again, as generate(use_cache=False) passes it, then "
            "the model reads it twice; leave use_cache as it is",
            DefensiveKVWarning,
            stacklevel=5,
        )
    elif first.store.tail_length == 0 and x == seen and stepping is None and not first.owner.policy.budget.is_full:
        warnings.warn(
            f"{x} tokens follow a prompt of {x} tokens: if both are chunks of one prompt, then only the first has been "
            "evicted from; call expect() on the cache with the whole prompt's length before the first one",
            DefensiveKVWarning,
            stacklevel=5,
        )


def _check_fits(layer: EvictedLayer, keys: Tensor, values: Tensor) -> None:
    """Raises where the batch is not the one that the layer holds, or is of another dtype."""
    if torch.is_autocast_enabled(keys.device.type) or keys.dtype != values.dtype:
        raise InvalidInputError(
            f"keys are {keys.dtype} and values {values.dtype}, as torch.autocast mixes them, and an evicting cache "
            "reads one dtype: load the model in that dtype, and leave autocast out"
        )
    if not layer.store.seen:
        return
    if keys.shape[0] != layer.batch_size:
        raise CacheError(
            f"the cache holds {layer.batch_size} rows and the batch has {keys.shape[0]}: call "
            "batch_repeat_interleave() on the cache to ask several questions of one prompt, or batch_select_indices() "
            "to leave some rows out"
        )
    if keys.dtype != layer.store.dtype:
        raise CacheError(
            f"the cache holds {layer.store.dtype} and gets {keys.dtype}: make a new cache after a change of dtype"
        )


def check_keeps_scores(policy: Policy, *, is_bounded: bool) -> None:
    """Raises InvalidInputError where scores cannot be kept for later."""
    if is_bounded:
        raise InvalidInputError(
            "keep_scores is for caches without a bound: a bounded one evicts as it goes, and fork(max_entries=...) "
            "puts it under a smaller bound"
        )
    policy.check_shrinks()


def check_single_reading(policy: Policy) -> None:
    """Raises where a prompt that the policy wants to hear repeated is about to be read once."""
    if policy.reads_twice:
        raise InvalidInputError(
            f"policy {policy.name!r} has the prompt read twice, which generate() and a forward pass do not: read it "
            "with defensivekv.prefill(model, cache, input_ids, tokenizer=tokenizer), then call generate(), or use "
            "defensivekv.compress"
        )


def check_positive(name: str, value: object) -> None:
    """Raises InvalidInputError for anything but a whole number of at least one."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidInputError(f"{name} {value!r} must be a positive integer")


def check_static(plans: Sequence[LayerPlan], *, is_bounded: bool) -> None:
    """Raises where decoding steps cannot be compiled."""
    if is_bounded:
        raise InvalidInputError(
            "static_tokens: steps under a bound evict between tokens, which compiled code cannot: leave out either"
        )
    whole = sorted({plan.kind for plan in plans if not plan.evicted} & {"full_attention", "latent_attention"})
    if whole:
        raise UnsupportedModelError(
            f"static_tokens: {', '.join(whole).replace('_', ' ')} is kept in transformers' own growing cache, which "
            "compiled code cannot: leave static_tokens out"
        )


def row_numbers(rows: Sequence[int] | Tensor, batch_size: int) -> tuple[int, ...]:
    """The numbers of rows that are given as numbers, or as a mask of all rows. Raises InvalidInputError."""
    listed = rows.tolist() if isinstance(rows, Tensor) else rows
    if isinstance(listed, str) or not isinstance(listed, Sequence):
        raise InvalidInputError(f"rows {rows!r} must be a list of row numbers, or a mask of all {batch_size} rows")
    if listed and all(isinstance(row, bool) for row in listed):
        if len(listed) != batch_size:
            raise InvalidInputError(f"a mask of {len(listed)} rows does not fit a batch of {batch_size}")
        return tuple(row for row, is_meant in enumerate(listed) if is_meant)
    if any(isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < batch_size for row in listed):
        raise InvalidInputError(f"rows {list(listed)} are not all rows of a batch of {batch_size}")
    return tuple(listed)


def check_tokens(num_tokens: int) -> None:
    """Raises InvalidInputError where a forward pass brings no tokens, which models trip over in ways of their own."""
    if num_tokens == 0:
        raise InvalidInputError("the prompt has no tokens: pass at least one")


def announced_prompt(num_tokens: int) -> int | None:
    """Tokens of the prompt of which `generate(prefill_chunk_size=...)` is about to pass the first `num_tokens`.

    None: nothing says that there are more. A chunk looks like a prompt, and nothing that a cache is given tells them
    apart: only the caller knows, and is asked.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_name != "_prefill":
            continue
        chunk_size = getattr(frame.f_locals.get("generation_config"), "prefill_chunk_size", None)
        prompt = frame.f_locals.get("input_ids")
        if chunk_size is not None and isinstance(prompt, Tensor) and prompt.shape[1] > num_tokens:
            return int(prompt.shape[1])
        return None
    return None
