"""One policy at one budget on one task: what was measured, and under what circumstances."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.report.bootstrap import Floats
from defensivekv.evaluation.report.order import Group, task_length
from defensivekv.evaluation.report.text import one_line
from defensivekv.evaluation.statistics import Interval, mean_interval


class Setting(NamedTuple):
    """What is never averaged over. query_aware: whether the compression saw the question."""

    model: str
    query_aware: bool
    template: str


class CellKey(NamedTuple):
    """What makes a cell; the fields are those of `Record`."""

    model: str
    policy: str
    budget: str
    task: str
    query_aware: bool
    template: str

    @classmethod
    def of(cls, record: Record) -> "CellKey":
        """The cell of that record."""
        return cls(record.model, record.policy, record.budget, record.task, record.query_aware, record.template)

    @property
    def setting(self) -> Setting:
        """The cell's model, template, and whether the question was seen."""
        return Setting(self.model, self.query_aware, self.template)


class Outcome(NamedTuple):
    """One sample. score: the mean over its questions, 0 to 1; None where it failed, with `error`.

    sha256: of the document. depth: of the needle, in percent; length: asked for, in tokens; None where not given.
    """

    sample: str
    sha256: str
    score: float | None
    error: str
    truncated_tokens: int
    achieved: float
    cache_bytes: int
    full_bytes: int
    depth: float | None
    length: float | None

    @classmethod
    def of(cls, record: Record) -> "Outcome":
        """What counts of a record. Raises InvalidInputError for scores that are none."""
        score = None
        if record.status == "ok":
            if not record.scores or not all(0 <= value <= 1 for value in record.scores):
                raise InvalidInputError(
                    f"sample {one_line(record.sample)!r} of task {one_line(record.task)!r} has the scores "
                    f"{record.scores}, which are not numbers from 0 to 1: run the task again"
                )
            score = fmean(record.scores)
        return cls(
            record.sample,
            record.context_sha256,
            score,
            record.error,
            record.truncated_tokens,
            record.achieved,
            record.cache_bytes,
            record.full_bytes,
            _number(record.metadata.get("depth")),
            _number(record.metadata.get("length")),
        )


@dataclass(frozen=True)
class Facts:
    """What all records of a cell agree in; devices and versions may be several, where a run was resumed."""

    suite: str
    domain: str
    metric: str
    metric_version: int
    split: str
    revision: str
    not_comparable: str
    seed: int
    model_revision: str
    dtype: str
    policy_parts: tuple[tuple[str, str], ...]
    devices: frozenset[str]
    versions: frozenset[tuple[str, str]]

    @classmethod
    def of(cls, record: Record) -> "Facts":
        """The circumstances of one record."""
        return cls(
            suite=record.suite,
            domain=record.domain,
            metric=record.metric,
            metric_version=record.metric_version,
            split=record.split,
            revision=record.revision,
            not_comparable=record.not_comparable,
            seed=record.seed,
            model_revision=record.model_revision,
            dtype=record.dtype,
            policy_parts=tuple(sorted(record.policy_parts.items())),
            devices=frozenset({record.device}),
            versions=frozenset(record.versions.items()),
        )

    def merged(self, record: Record, key: CellKey) -> "Facts":
        """These with another record's devices and versions. Raises InvalidInputError where anything else differs."""
        other = Facts.of(record)
        both = replace(self, devices=self.devices | other.devices, versions=self.versions | other.versions)
        differing = both.differences(replace(other, devices=both.devices, versions=both.versions))
        if self.policy_parts != other.policy_parts:
            differing.append("policy parts")
        if differing:
            raise InvalidInputError(
                f"policy {one_line(key.policy)!r} on task {one_line(key.task)!r} has records of more than one "
                f"{' and '.join(differing)}: report one run at a time"
            )
        return both

    def differences(self, other: "Facts") -> list[str]:
        """What keeps two policies' scores on one task from being compared, in words."""
        names = ("metric", "metric_version", "split", "revision", "seed", "model_revision", "dtype", "not_comparable")
        return [name.replace("_", " ") for name in names if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Cell:
    """One policy at one budget on one task.

    outcomes: of all samples, by id. timings: of the samples that were answered. example: the first sample's record, by
    id, of those that were answered.
    """

    key: CellKey
    facts: Facts
    outcomes: tuple[Outcome, ...]
    timings: tuple[Timing, ...]
    example: Record | None

    @classmethod
    def gathered(
        cls, key: CellKey, facts: Facts, outcomes: Iterable[Outcome], timings: Iterable[Timing], example: Record | None
    ) -> "Cell":
        """The cell of these, whatever their order. Raises InvalidInputError for a sample that is there twice."""
        ordered = sorted(outcomes, key=lambda outcome: outcome.sample)
        for one, other in pairwise(ordered):
            if one.sample == other.sample:
                raise InvalidInputError(
                    f"sample {one_line(one.sample)!r} is twice in policy {one_line(key.policy)!r} on task "
                    f"{one_line(key.task)!r}: report one run at a time"
                )
        answered = {outcome.sample for outcome in ordered if outcome.score is not None}
        used = sorted((t for t in timings if t.sample in answered), key=lambda t: t.sample)
        return cls(key, facts, tuple(ordered), tuple(used), example)

    @cached_property
    def group(self) -> Group:
        """The tasks it may be averaged with."""
        return Group(self.facts.suite, task_length(self.key.task))

    @cached_property
    def answered(self) -> list[Outcome]:
        """The samples that were answered, by id."""
        return [outcome for outcome in self.outcomes if outcome.score is not None]

    @property
    def n(self) -> int:
        """Samples that were answered and scored."""
        return len(self.answered)

    @property
    def failures(self) -> int:
        """Samples that were not."""
        return len(self.outcomes) - self.n

    @property
    def truncations(self) -> int:
        """Samples of whose document something was cut out, failed ones included."""
        return sum(outcome.truncated_tokens > 0 for outcome in self.outcomes)

    @cached_property
    def scores(self) -> Floats:
        """Of the answered samples, by id, 0 to 1."""
        return np.array([outcome.score for outcome in self.answered], dtype=np.float64)

    @cached_property
    def score(self) -> Interval | None:
        """The mean over answered samples with its 95 % interval; None where none was answered."""
        return mean_interval(self.scores.tolist()) if self.n else None

    @property
    def achieved(self) -> float | None:
        """Mean share of the entries held."""
        return mean_or_none([outcome.achieved for outcome in self.answered])

    @property
    def cache_bytes(self) -> float | None:
        """Mean bytes held after compression."""
        return mean_or_none([outcome.cache_bytes for outcome in self.answered])

    @property
    def full_bytes(self) -> float | None:
        """Mean bytes that the stock cache would hold."""
        return mean_or_none([outcome.full_bytes for outcome in self.answered])

    @property
    def token_times(self) -> list[float]:
        """Seconds of a decoding step, of each answered sample that was timed."""
        return [t.token_seconds for t in self.timings if t.token_seconds is not None and math.isfinite(t.token_seconds)]

    @property
    def token_seconds(self) -> float | None:
        """Their median."""
        return median(self.token_times) if self.token_times else None

    @property
    def prefill_seconds(self) -> float | None:
        """Median seconds of reading a document and compressing it."""
        return median(t.prefill_seconds for t in self.timings) if self.timings else None

    @property
    def batch_sizes(self) -> frozenset[int]:
        """Of the timed steps: times of different batches are not to be compared."""
        return frozenset(timing.batch_size for timing in self.timings)

    def paired_with(self, full: "Cell") -> tuple[Floats, Floats] | None:
        """Its scores and the full cache's on the samples that both answered; None without any.

        None as well where metric, split, data, seed, weights or dtype differ. Samples are the same if id and document
        are.
        """
        if self.facts.differences(full.facts):
            return None
        theirs = {(outcome.sample, outcome.sha256): outcome.score for outcome in full.answered}
        both = [(o.score, theirs[o.sample, o.sha256]) for o in self.answered if (o.sample, o.sha256) in theirs]
        if not both:
            return None
        pairs = np.array(both, dtype=np.float64)
        return pairs[:, 0], pairs[:, 1]


def mean_or_none(values: Sequence[float]) -> float | None:
    """The mean, or None of nothing."""
    return fmean(values) if values else None


def _number(value: str | int | float | None) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
