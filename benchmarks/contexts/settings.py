"""Sizes: those of the published figures, and small ones that only show that it runs."""

from dataclasses import dataclass
from typing import Any

from benchmarks.settings import QUICK as SMALL


@dataclass(frozen=True)
class Settings:
    """lengths: tokens of documents. budgets: of the compressed contexts. rounds: times that every way is run, in turns.
    question: tokens. forks: of one context in one process. sharing: the document's length there. model: changes to the
    configuration of Llama-3.2-1B.
    """

    lengths: tuple[int, ...]
    budgets: tuple[float, ...]
    rounds: int
    question: int
    forks: int
    sharing: int
    dtype: str
    model: tuple[tuple[str, Any], ...]


FULL = Settings(
    lengths=(2048, 8192, 16384, 32768),
    budgets=(0.5, 0.2, 0.1),
    rounds=5,
    question=16,
    forks=64,
    sharing=8192,
    dtype="bfloat16",
    model=(("num_hidden_layers", 4), ("vocab_size", 32_000)),
)

QUICK = Settings(
    lengths=(256, 512),
    budgets=(0.5,),
    rounds=1,
    question=4,
    forks=32,
    sharing=512,
    dtype="float32",
    model=SMALL.model,
)
