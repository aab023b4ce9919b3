"""Published figures, each with the setting it was measured in."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from defensivekv.evaluation.report.order import RULER

AUTHORS_README = "https://github.com/FFY0/DefensiveKV"
PAPER = "https://arxiv.org/abs/2510.13334"


@dataclass(frozen=True)
class Published:
    """A figure and its setting. value: out of 100.

    quantity: "score", or "loss" of the full cache's mean, in percent of it. suite: "ruler", or "seven domains" for
    LongBench's six and Needle-in-a-Haystack, of whose losses the mean is taken. task: without suite and length; "mean"
    for all of the suite's. length: tokens, or None. splits: ways of dividing context and question that are the same
    for this figure. samples: in words.
    """

    source: str
    quantity: Literal["score", "loss"]
    model: str
    policy: str
    suite: str
    task: str
    value: float
    splits: tuple[str, ...]
    samples: str
    length: int | None = None
    budget: float = 0.2
    query_aware: bool = False
    template: str = "chat"


# The authors' table, columns as in RULER; their harness is kvpress's, so both splits are theirs.
_RULER_4K = {
    "snapkv": (72.6, 74, 26, 8, 2, 36.5, 34, 74, 52, 4, 44, 42, 38, 39.0),
    "adakv": (92.4, 87.3, 24, 20, 16, 29.5, 26.5, 88, 56, 4, 46, 42, 65.6, 46.0),
    "ada-criticalkv": (93.8, 93.3, 60, 30, 26, 71, 72, 88, 92, 4, 56, 52, 79.2, 62.9),
    "defensivekv": (95.2, 92, 98, 86, 72, 95.5, 90, 100, 100, 62, 78, 46, 94.4, 85.3),
    "layer-defensivekv": (93.6, 94, 100, 98, 92, 100, 94.5, 98, 96, 92, 78, 56, 96.4, 91.4),
}

# "CriticalKV" in the paper is the one that allocates as AdaKV does, the base of DefensiveKV.
_LOSSES = {
    "Llama-3.1-8B-Instruct": {
        "streaming-llm": 40.7,
        "snapkv": 20.1,
        "adakv": 16.8,
        "cake": 16.2,
        "duo-attention": 27.3,
        "ada-criticalkv": 9.6,
        "defensivekv": 4.6,
        "layer-defensivekv": 2.1,
    },
    "Mistral-7B-Instruct-v0.3": {"ada-criticalkv": 13.4, "defensivekv": 4.4, "layer-defensivekv": 1.4},
    "Qwen2.5-32B-Instruct": {"ada-criticalkv": 8.6, "defensivekv": 2.7, "layer-defensivekv": 1.7},
}


def published_figures() -> Iterator[Published]:
    """The authors' RULER table at 4096 tokens, and the paper's mean losses over seven domains, both at 20 %."""
    llama = "Llama-3.1-8B-Instruct"
    for policy, values in _RULER_4K.items():
        for task, value in zip((*RULER, "mean"), values, strict=True):
            splits, samples = ("authors", "kvpress"), "a tenth, about 50 a task"
            yield Published(AUTHORS_README, "score", llama, policy, "ruler", task, value, splits, samples, 4096)
    for model, losses in _LOSSES.items():
        for policy, value in losses.items():
            yield Published(PAPER, "loss", model, policy, "seven domains", "mean", value, ("authors",), "all")
