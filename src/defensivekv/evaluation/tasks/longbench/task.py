"""LongBench's datasets as tasks."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import load_rouge
from defensivekv.evaluation.tasks.longbench.datasets import DATASETS
from defensivekv.evaluation.tasks.longbench.prompts import PROMPTS, SPLITS
from defensivekv.evaluation.tasks.longbench.records import Record, read_records
from defensivekv.evaluation.tasks.sample import Question, Sample, Unreadable
from defensivekv.evaluation.tasks.task import TaskOptions

TASKS = tuple(DATASETS)
"""The 16 English datasets, in the order of the paper's table."""

_KVPRESS_MORE_TOKENS = 20
"""kvpress's data allows every answer so many more than LongBench."""


@dataclass(frozen=True)
class LongBenchTask:
    """One dataset under one split; see `Task`. Made by `make_task`."""

    dataset: str
    split: str
    revision: str
    rows: tuple[Record | Unreadable, ...]
    suite: str = "longbench"
    not_comparable: str = ""
    length: int | None = None

    @property
    def name(self) -> str:
        """As "longbench/trec"."""
        return f"{self.suite}/{self.dataset}"

    @property
    def domain(self) -> str:
        """The paper's group of datasets."""
        return DATASETS[self.dataset].domain

    @property
    def metric(self) -> str:
        """LongBench's own for this dataset."""
        return DATASETS[self.dataset].metric

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample | Unreadable]:
        """The rows in the file's order; the tokenizer plays no part."""
        for row in self.rows:
            yield self._sample(row) if isinstance(row, Record) else row

    def _sample(self, record: Record) -> Sample:
        known, is_kvpress = DATASETS[self.dataset], self.split == "kvpress"
        context, question, prefix = PROMPTS[self.dataset].divide(self.split, record.passage, record.asked)
        return Sample(
            id=record.id,
            context=context,
            questions=(Question(question, record.answers, prefix),),
            max_new_tokens=known.max_new_tokens + (_KVPRESS_MORE_TOKENS if is_kvpress else 0),
            choices=record.choices,
            stop=() if is_kvpress else known.stop,
            is_bare=known.is_bare and not is_kvpress,
            metadata={"words": record.words} if record.words else {},
        )


def make_task(name: str, options: TaskOptions) -> LongBenchTask:
    """The task of that dataset, its file read and checked.

    options.data: folder with `<dataset>.jsonl` or `<dataset>.parquet`; None: the hub's archive. options.split:
    "authors", the default, or "kvpress", which also takes over kvpress's own: a chat template for every dataset, 20
    more new tokens, no stop. options.num_samples: the first so many rows, unreadable ones counted.
    Raises InvalidInputError for an unknown dataset or split, for files that can't be used (see `read_records`), and
    where ROUGE is needed and not installed.
    """
    if name not in DATASETS:
        raise InvalidInputError(f"LongBench has no English dataset {name!r}: known are {', '.join(TASKS)}")
    split = options.split or "authors"
    if split not in SPLITS:
        raise InvalidInputError(f"LongBench is not split as {split!r}: known are {', '.join(SPLITS)}")
    if DATASETS[name].metric.startswith("rouge"):
        load_rouge()
    records = read_records(name, options.data)
    return LongBenchTask(name, split, records.revision, records.rows[: options.num_samples])
