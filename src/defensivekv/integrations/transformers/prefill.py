"""Reading a prompt into a cache: once, or twice where the policy wants to hear it repeated (KVzip)."""

import copy
import inspect

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.errors import CacheError, InvalidInputError, UnsupportedModelError
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.checks import check_positive
from defensivekv.integrations.transformers.layer import EvictedLayer
from defensivekv.integrations.transformers.model import has_dynamic_rotation, max_positions
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT
from defensivekv.policies import Policy
from defensivekv.policies.scoring import Reconstruction

DEFAULT_CHUNK_SIZE = 512
"""Tokens; less costs answers, and more memory (docs/memory.md)."""

_FIRST = "\n\nRepeat the previous context exactly."
_NEXT = "\n\nRepeat the part of the previous context exactly, starting with"
_QUOTED = 8
"""Tokens before a chunk by which the model is told where to start (the instructions are KVzip's, as kvpress has
them)."""


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    cache: EvictingCache,
    input_ids: Int[Tensor, "b t"],
    *,
    attention_mask: Int[Tensor, "b t"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    suffix: str = "",
    chunk_size: int | None = None,
) -> None:
    """Reads a prompt into an empty cache, which keeps what its policy keeps.

    chunk_size: tokens that are read at a time; None: all at once, or `DEFAULT_CHUNK_SIZE` where the cache is bounded.
    After each chunk all that was read so far competes for the budget, so that what is held at any moment is the budget
    and one chunk. What is kept is not quite what one reading keeps; `docs/memory.md` measures by how much.

    Policies that observe a reconstruction have the prompt read a second time, in chunks that the model is told to
    repeat, in about twice the time; what it says to that is forgotten again. They need `tokenizer` for the
    instruction, and rows without pads.

    attention_mask: 0 at pads; None: no pads. suffix: what stands between the user's words and the model's, such as the
    end of a chat template; the model's turn to repeat begins after it.

    Raises CacheError for a cache that holds something, and InvalidInputError or UnsupportedModelError where the prompt
    cannot be repeated, or read in such chunks: each before the prompt is read.
    """
    _check_prompt(cache, input_ids, attention_mask)
    if cache.get_seq_length():
        raise CacheError("the cache holds a prompt already: make a new one, or call reset()")
    scorer = cache.policy.scorer
    num_tokens = input_ids.shape[1]
    if chunk_size is None and cache.is_bounded:
        chunk_size = max(DEFAULT_CHUNK_SIZE, cache.policy.num_window)
    if chunk_size is not None:
        check_chunk_size(cache.policy, chunk_size)
        if chunk_size < num_tokens:
            cache.expect(num_tokens)
    repeats: list[tuple[int, int, Tensor]] = []
    # What is kept whole needs no scores; a budget in entries or bytes shows its share once the prompt is known.
    if isinstance(scorer, Reconstruction) and cache.policy.reads_twice:
        _check_repeatable(model, input_ids, attention_mask, tokenizer)
        assert tokenizer is not None
        repeats = _repeats(input_ids, tokenizer, suffix, scorer.chunk_size)
        _check_room(model, input_ids.shape[1], max(ids.shape[1] for _, _, ids in repeats))
    step = chunk_size or max(1, num_tokens)
    with cache.reconstructing():
        for start in range(0, max(1, num_tokens), step):
            stop = min(start + step, num_tokens)
            options = masking(model, attention_mask, start, stop)
            chunk = input_ids[:, start:stop]
            model(input_ids=chunk, use_cache=True, logits_to_keep=1, **options, **{CACHE_ARGUMENT: cache})
        stock = [None if isinstance(layer, EvictedLayer) else copy.deepcopy(layer) for layer in cache.layers]
        for start, stop, ids in repeats:
            if not cache.awaits_repeats:
                break
            cache.repeats = (start, stop)
            model(input_ids=ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
            # The evicted layers took back what was repeated; the others cannot.
            cache.layers = [
                layer if kept is None else copy.deepcopy(kept) for layer, kept in zip(cache.layers, stock, strict=True)
            ]


def masking(
    model: PreTrainedModel, attention_mask: Tensor | None, start: int = 0, stop: int | None = None
) -> dict[str, Tensor]:
    """For the tokens from `start` to `stop`, the mask up to them, and positions that leave its pads out, from which
    `generate()` goes on.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return {}
    options = {"attention_mask": attention_mask[:, :stop]}
    if "position_ids" in inspect.signature(model.forward).parameters:
        options["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
    return options


def check_chunk_size(policy: Policy, chunk_size: object) -> None:
    """Raises InvalidInputError for chunks that the policy could not observe from."""
    check_positive("chunk_size", chunk_size)
    assert isinstance(chunk_size, int)
    if not policy.budget.is_full and chunk_size < policy.num_window:
        raise InvalidInputError(
            f"chunk_size {chunk_size} is less than the window of {policy.num_window} that observes: give at least as "
            "many, or a smaller window_size"
        )


def _repeats(
    input_ids: Tensor, tokenizer: PreTrainedTokenizerBase, suffix: str, chunk_size: int
) -> list[tuple[int, int, Tensor]]:
    """For each chunk of the prompt, its start and end, and the tokens that make the model repeat it, (b, x)."""
    b, t = input_ids.shape

    def encode(text: str) -> Tensor:
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=input_ids.dtype)
        return ids.to(input_ids.device).expand(b, -1)

    repeats = []
    for start in range(0, t, chunk_size):
        stop = min(start + chunk_size, t)
        asked = [encode(_NEXT if start else _FIRST), input_ids[:, max(0, start - _QUOTED) : start], encode(suffix)]
        repeats.append((start, stop, torch.cat((*asked, input_ids[:, start:stop]), dim=1)))
    return repeats


def _check_prompt(cache: object, input_ids: object, attention_mask: object) -> None:
    if not isinstance(cache, EvictingCache):
        raise InvalidInputError(f"cache is a {type(cache).__name__}: give an EvictingCache")
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2:
        raise InvalidInputError("input_ids must be a tensor of token ids, (batch, tokens)")
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        raise InvalidInputError(
            f"attention_mask must be a tensor of the ids' shape {tuple(input_ids.shape)}, 1 at tokens and 0 at pads"
        )


def _check_repeatable(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    if has_dynamic_rotation(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} rotates by frequencies that change with the length (dynamic NTK): a second "
            "reading would spoil what the first one stored; use a policy with one, such as 'snapkv'"
        )
    if tokenizer is None:
        raise InvalidInputError("this policy has the prompt repeated: pass the tokenizer, for the instruction")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InvalidInputError("this policy has the prompt repeated, without pads: pass rows of one length")
    if input_ids.shape[1] == 0:
        raise InvalidInputError("the prompt has no tokens: pass at least one")


def _check_room(model: PreTrainedModel, prompt: int, longest: int) -> None:
    maximum = max_positions(model)
    if maximum is not None and prompt + longest > maximum:
        raise InvalidInputError(
            f"a prompt of {prompt} tokens and {longest} to repeat a part of it exceed the model's {maximum} positions: "
            "give a shorter prompt, or scoring=Reconstruction(chunk_size=...) of less"
        )
