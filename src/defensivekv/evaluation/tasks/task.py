"""What every task tells of itself."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from defensivekv.evaluation.tasks.sample import Sample, Unreadable


@dataclass(frozen=True)
class TaskOptions:
    """What a user may choose of a task; None: the task's own default.

    num_samples: samples of a task at most. lengths: tokens of a context, one task for each, where the task makes its
    own contexts. seed: of all draws. data: folder of local data files (see each suite); None: the hub, or what the
    package ships. split: how context and question are divided where there is more than one way.
    """

    num_samples: int | None = None
    lengths: tuple[int, ...] | None = None
    seed: int = 42
    data: Path | None = None
    split: str | None = None


class Task(Protocol):
    """One dataset or generator at one setting.

    name: "suite/task" or "suite/task@length", unique. suite: its first part. domain: axis of the radar, such as
    "retrieval" or "single-document QA". metric: a name in `defensivekv.evaluation.metrics.METRICS`. split: how context
    and question are divided ("authors", "kvpress", "own"). revision: of the data: hub revision and content hash, or
    the generator's version and seed. not_comparable: why figures may not be held against published ones; empty where
    they may. length: tokens of a context where the task fixes them, or None.
    """

    @property
    def name(self) -> str: ...
    @property
    def suite(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def not_comparable(self) -> str: ...
    @property
    def length(self) -> int | None: ...

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterable[Sample | Unreadable]:
        """The samples, always the same ones in the same order for the same options and tokenizer."""
        ...
