"""Reading a document into a context, or finding it read already."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.budget import Budget
from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.contexts.context import Context, check_length, check_text, encode
from defensivekv.integrations.transformers.contexts.recipe import Recipe
from defensivekv.integrations.transformers.contexts.wrapping import Template, find_wrapping
from defensivekv.integrations.transformers.model import enable
from defensivekv.integrations.transformers.prefill import prefill
from defensivekv.policies import Policy

if TYPE_CHECKING:
    from defensivekv.integrations.transformers.contexts.store import ContextStore


@torch.no_grad()
def compress(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    policy: Policy | str = "layer-defensivekv",
    budget: float | int | str | Budget | None = None,
    *,
    template: Template = "auto",
    chunk_size: int | None = None,
    store: "ContextStore | None" = None,
    **options: Any,
) -> Context:
    """Reads a document once and keeps what the policy keeps of its cache. Enables the model.

    policy, budget, options: as for `EvictingCache`; scores are kept where the policy can shrink by them, unless
    `keep_scores=False`. template: "chat" puts the document and later the question into one user turn of the tokenizer's
    chat template; "plain" takes them as they are; "auto" is "chat" where the tokenizer has a template. chunk_size:
    tokens read at a time, as for `prefill`. store: where the context is looked for first, and put once it is made; a
    warning says where that fails.

    Raises InvalidInputError for an empty document or one past the model's maximum length, and what `enable` and
    `EvictingCache` raise; each before the document is read.
    """
    asked = _Asked.of(model, tokenizer, document, policy, budget, template, chunk_size, options)
    enable(model)
    if store is not None:
        found = store.get(asked.recipe.key(model, tokenizer), model, tokenizer, policy=asked.cache.policy)
        if found is not None:
            return found
    context = read(model, tokenizer, asked.cache, asked.recipe)
    if store is not None:
        store.offer(context)
    return context


def context_key(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    document: str,
    policy: Policy | str = "layer-defensivekv",
    budget: float | int | str | Budget | None = None,
    *,
    template: Template = "auto",
    chunk_size: int | None = None,
    **options: Any,
) -> str:
    """The key of the context that `compress` makes of the same arguments, without reading the document."""
    asked = _Asked.of(model, tokenizer, document, policy, budget, template, chunk_size, options)
    return asked.recipe.key(model, tokenizer)


@torch.no_grad()
def read(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, cache: EvictingCache, recipe: Recipe) -> Context:
    """Reads a recipe's tokens into its cache, of an enabled model."""
    start = time.perf_counter()
    suffix = recipe.wrapping.after
    prefill(model, cache, recipe.ids, tokenizer=tokenizer, suffix=suffix, chunk_size=recipe.chunk_size)
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return Context(model, tokenizer, cache, recipe, time.perf_counter() - start)


@dataclass(frozen=True)
class _Asked:
    """A document that may be read: its empty cache, and what it will be."""

    cache: EvictingCache
    recipe: Recipe

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        document: str,
        policy: Policy | str,
        budget: float | int | str | Budget | None,
        template: Template,
        chunk_size: int | None,
        options: dict[str, Any],
    ) -> "_Asked":
        cache = _make_cache(model, policy, budget, options)
        check_text(document, "document")
        wrapping = find_wrapping(tokenizer, template)
        text = f"{wrapping.before}{document}\n\n" if wrapping.name == "chat" else document
        ids = encode(model, tokenizer, text, special=wrapping.special, what="document")
        check_length(model, ids.shape[1] + 1, "the document")
        return cls(cache, Recipe.of(cache, ids, chunk_size, wrapping))


def _make_cache(
    model: PreTrainedModel, policy: Policy | str, budget: float | int | str | Budget | None, options: dict[str, Any]
) -> EvictingCache:
    if "keep_scores" in options:
        return EvictingCache(model, policy, budget, **options)
    cache = EvictingCache(model, policy, budget, **options)
    if cache.is_bounded or cache.policy.name == "full":
        return cache
    try:
        cache.policy.check_shrinks()
    except InvalidInputError:
        return cache
    return EvictingCache(model, policy, budget, keep_scores=True, **options)
