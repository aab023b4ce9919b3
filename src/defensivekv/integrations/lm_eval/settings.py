"""What a task asks of decoding, and what a run is described by."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
)

from defensivekv import __version__
from defensivekv.errors import InvalidInputError
from defensivekv.policies import Policy

_WITHOUT_EFFECT = ("temperature", "top_p", "top_k", "min_p", "typical_p")
"""Settings of sampling, which greedy decoding does not read."""

_PACKAGES = ("lm_eval", "torch", "transformers", "tokenizers", "datasets")


@dataclass(frozen=True)
class GenerationSettings:
    """until: texts that end an answer, none empty. max_new_tokens: tokens of the longest answer."""

    until: list[str]
    max_new_tokens: int


@dataclass(frozen=True)
class Held:
    """One context. tokens: of it. achieved: the share of entries kept. is_whole: nothing was evicted."""

    tokens: int
    achieved: float
    is_whole: bool


def generation_settings(given: Mapping[str, Any], max_new_tokens: int, *, end: str | None) -> GenerationSettings:
    """Reads a task's generation settings under any of the harness's names.

    max_new_tokens: where the task says nothing. end: the text of the token that ends an answer. Raises
    InvalidInputError for sampling, and for settings that would change a greedy answer.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(given), max_new_tokens))
    until, longest = settings.pop("until"), settings.pop("max_gen_toks")
    if settings.pop("do_sample"):
        raise InvalidInputError("the task samples its answers: set do_sample=False in its generation settings")
    unknown = sorted(name for name, value in settings.items() if name not in _WITHOUT_EFFECT and value is not None)
    if unknown:
        raise InvalidInputError(
            f"generation settings {', '.join(unknown)} are not supported: answers are greedy, with until and "
            "max_gen_toks alone"
        )
    if longest < 1:
        raise InvalidInputError(f"max_gen_toks {longest} must be at least 1")
    texts = [text for text in handle_stop_sequences(until, eos=end) if text]
    return GenerationSettings(texts, longest)


def describe(policy: Policy, held: Sequence[Held], *, query_aware: bool, context_field: str | None) -> dict[str, Any]:
    """What makes the results of a run comparable, as JSON can hold it. held: of each context that was read."""
    shares, tokens = [each.achieved for each in held], [each.tokens for each in held]
    is_stock = policy.name == "full"
    return {
        "policy": policy.name,
        "parts": {}
        if is_stock
        else {
            "scoring": repr(policy.scorer),
            "aggregation": repr(policy.aggregation),
            "weighting": repr(policy.weighting),
            "allocation": repr(policy.allocation),
            "window_size": policy.window_size if policy.scorer.has_window else None,
            "num_sinks": policy.num_sinks,
            "protect_window": policy.protect_window,
        },
        "paper": policy.paper,
        "budget": {"asked": str(policy.budget), "achieved": _spread(shares)},
        "contexts": {
            "read": len(held),
            "kept_whole": sum(each.is_whole for each in held),
            "tokens": _spread(tokens),
        },
        "query_aware": query_aware,
        "split": f"after the document's field {context_field!r}" if context_field else "after the document's context",
        "tokenised": "context and question separately",
        "decoding": "greedy",
        "versions": {"defensivekv": __version__, "python": platform.python_version()}
        | {name: version(name) for name in _PACKAGES},
    }


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    """None before anything was read."""
    if not values:
        return None
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}
