"""How a context came to be: all that decides what is in it. Its hash is the context's key."""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.contexts.fingerprints import (
    ModelFingerprint,
    model_fingerprint,
    tokenizer_fingerprint,
)
from defensivekv.integrations.transformers.contexts.wrapping import Wrapping
from defensivekv.policies import Policy
from defensivekv.policies.encoding import encode

FORMAT_VERSION = 1
"""Of files. One of another version is not read."""

METHOD_VERSION = 1
"""Counts up when the same document, policy and budget come to keep something else than before."""


@dataclass(frozen=True)
class Recipe:
    """What was read and how, but for the model and the tokenizer.

    ids: (1, t) all tokens, those of later turns counted. policy: with the budget that holds now. options: of the cache,
    beside the policy. chunk_size: tokens that were read at a time; None: all. wrapping: of the questions; what it puts
    before the document is in `ids`. steps: what was done after the document was read, in words. method: the
    `METHOD_VERSION` of then.
    """

    ids: Int[Tensor, "1 t"]
    policy: Policy
    options: dict[str, Any]
    chunk_size: int | None
    wrapping: Wrapping
    steps: tuple[str, ...] = ()
    method: int = METHOD_VERSION

    @classmethod
    def of(cls, cache: EvictingCache, ids: Int[Tensor, "1 t"], chunk_size: int | None, wrapping: Wrapping) -> "Recipe":
        """Of a document that a cache is about to read."""
        return cls(ids, cache.policy, cache_options(cache), chunk_size, wrapping)

    @property
    def is_in_turns(self) -> bool:
        """Whether a question was answered already."""
        return any(step.startswith("turn") for step in self.steps)

    def then(self, step: str, ids: Int[Tensor, "1 t"] | None = None, policy: Policy | None = None) -> "Recipe":
        """After one more step, which changed the tokens or the policy to these."""
        return replace(
            self,
            ids=self.ids if ids is None else ids,
            policy=self.policy if policy is None else policy,
            steps=(*self.steps, step),
        )

    def as_values(self) -> dict[str, Any]:
        """What a file says of it, beside the tokens."""
        return {
            "policy": encode(self.policy),
            "options": self.options,
            "chunk_size": self.chunk_size,
            "wrapping": asdict(self.wrapping),
            "steps": list(self.steps),
            "method_version": self.method,
        }

    def key(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
        """Hash of all of it, with model and tokenizer: 64 hexadecimal digits."""
        return key_of(model_fingerprint(model), tokenizer_fingerprint(tokenizer), self.ids, self.as_values())


def cache_options(cache: EvictingCache) -> dict[str, Any]:
    """The options that make a cache like this one, beside the policy."""
    bound = cache.bound
    return {
        "max_entries": None if bound is None else bound.max_entries,
        "max_batch_bytes": None if bound is None else bound.max_batch_bytes,
        "interval": None if bound is None else bound.given_interval,
        "static_tokens": cache.static_tokens,
        "keep_scores": cache.keeps_scores,
    }


def key_of(model: ModelFingerprint, tokenizer: str, ids: Int[Tensor, "1 t"], values: dict[str, Any]) -> str:
    """The key of a context; values: from `Recipe.as_values`."""
    tokens = hashlib.sha256(ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()
    parts = [FORMAT_VERSION, model.weights, model.modules, model.config, model.dtype, tokenizer, tokens, values]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
