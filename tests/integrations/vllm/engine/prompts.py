"""Prompts of random tokens, and how two runs of them are held against each other."""

import random
from collections.abc import Iterable, Sequence
from typing import Any

Prompt = dict[str, Any]
Outputs = list[dict[str, Any]]

VOCABULARY = (5, 560)

TOLERANCE = 1e-3
"""Of log-probabilities."""


def prompt(num_tokens: int, *, seed: int = 0, max_tokens: int = 24, abort_after: int | None = None) -> Prompt:
    draw = random.Random(1000 * seed + num_tokens)
    tokens = [draw.randrange(*VOCABULARY) for _ in range(num_tokens)]
    return {"tokens": tokens, "max_tokens": max_tokens, "abort_after": abort_after}


def prompts(lengths: Iterable[int], **options: Any) -> list[Prompt]:
    return [prompt(length, seed=number, **options) for number, length in enumerate(lengths)]


def differences(given: Outputs, expected: Outputs) -> list[float]:
    """The largest difference of log-probabilities in each output; infinite where the tokens differ.

    Of an aborted request, what there is.
    """
    found = []
    for one, other in zip(given, expected, strict=True):
        count = min(len(one["tokens"]), len(other["tokens"]))
        if one["tokens"][:count] != other["tokens"][:count]:
            found.append(float("inf"))
            continue
        pairs = zip(one["logprobs"][:count], other["logprobs"][:count], strict=True)
        found.append(max((abs(left - right) for left, right in pairs), default=0.0))
    return found


def check_same(given: Outputs, expected: Outputs, *, near_ties: int = 0) -> None:
    """All the same, but for at most so many requests in which a near-tie fell the other way."""
    found = differences(given, expected)
    off: Sequence[float] = [difference for difference in found if difference > TOLERANCE]
    assert len(off) <= near_ties, found
