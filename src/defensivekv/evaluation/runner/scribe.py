"""Records: what a sample's answer, or its failure, is written down as."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.records import Record, Timing
from defensivekv.evaluation.runner.cells import Cell
from defensivekv.evaluation.runner.facts import Facts
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.evaluation.runner.protocol import Prompt
from defensivekv.evaluation.runner.reading import Held
from defensivekv.evaluation.tasks.sample import Sample, Unreadable


@dataclass(frozen=True)
class Answered:
    """What came of a sample. steps: seconds of decoding steps, of its whole batch."""

    truncated: int
    held: Held
    outputs: list[str]
    prefill_seconds: float
    steps: list[float]
    new_tokens: int


class Scribe:
    """Writes the records of one run."""

    def __init__(self, facts: Facts, plan: RunPlan) -> None:
        self._facts, self._plan = facts, plan

    def success(self, cell: Cell, sample: Sample, answered: Answered, *, rows: int) -> tuple[Record, Timing]:
        """The record of an answered sample with its scores, and its times. Raises where the metric does."""
        common, held = self._common(cell, sample), answered.held
        outputs = [clean(text) for text in answered.outputs]
        record = Record(
            **common,
            status="ok",
            error="",
            context_tokens=held.tokens,
            truncated_tokens=answered.truncated,
            outputs=outputs,
            scores=score_outputs(cell.task.metric, outputs, common["references"], common["choices"]),
            achieved=held.achieved,
            lengths=held.lengths,
            cache_bytes=held.cache_bytes,
            full_bytes=held.full_bytes,
        )
        timing = Timing(
            sample=record.sample,
            prefill_seconds=answered.prefill_seconds,
            token_seconds=median_low(answered.steps) if answered.steps else None,
            new_tokens=answered.new_tokens,
            batch_size=rows,
        )
        return record, timing

    def failure(self, cell: Cell, sample: Sample | Unreadable, error: str, prompt: Prompt | None = None) -> Record:
        """The record of a sample that could not be answered. prompt: where it came that far."""
        return Record(
            **self._common(cell, sample),
            status="failed",
            error=clean(error),
            context_tokens=0 if prompt is None else len(prompt.context),
            truncated_tokens=0 if prompt is None else prompt.truncated,
            outputs=[],
            scores=[],
            achieved=0.0,
            lengths=[],
            cache_bytes=0,
            full_bytes=0,
        )

    def _common(self, cell: Cell, sample: Sample | Unreadable) -> dict[str, Any]:
        task, setting, facts = cell.task, cell.setting, self._facts
        is_bare = sample.is_bare if isinstance(sample, Sample) else task.is_bare
        asked = sample.questions if isinstance(sample, Sample) else ()
        context = sample.context.encode("utf-8", "replace") if isinstance(sample, Sample) else b""
        return {
            "model": facts.model,
            "model_revision": facts.model_revision,
            "dtype": facts.dtype,
            "policy": setting.title,
            "policy_parts": setting.parts,
            "budget": setting.budget,
            "task": task.name,
            "suite": task.suite,
            "domain": task.domain,
            "metric": task.metric,
            "metric_version": metric_version(task.metric),
            "split": task.split,
            "revision": task.revision,
            "not_comparable": task.not_comparable,
            "seed": self._plan.seed,
            "sample": clean(sample.id),
            "query_aware": self._plan.query_aware,
            "template": "plain" if is_bare else facts.template,
            "context_sha256": hashlib.sha256(context).hexdigest() if context else "",
            "questions": [clean(question.text) for question in asked],
            "answer_prefixes": [clean(question.answer_prefix) for question in asked],
            "references": [[clean(text) for text in question.references] for question in asked],
            "choices": [clean(text) for text in sample.choices] if isinstance(sample, Sample) else [],
            "metadata": dict(sample.metadata) if isinstance(sample, Sample) else {},
            "versions": facts.versions,
            "device": facts.device,
        }


def metric_version(metric: str) -> int:
    """The present version of that metric. Raises InvalidInputError where there is none of that name."""
    from defensivekv.evaluation.metrics import METRICS

    if metric not in METRICS:
        raise InvalidInputError(f"unknown metric {metric!r}: known are {', '.join(METRICS)}")
    return METRICS[metric].version


def score_outputs(
    metric: str, outputs: Sequence[str], references: Sequence[list[str]], choices: list[str]
) -> list[float]:
    """The scores of answers, 0 to 1. Raises what the metric raises, and InvalidInputError for other scores."""
    from defensivekv.evaluation.metrics import METRICS

    function = METRICS[metric].function
    scores = [float(function(text, right, choices)) for text, right in zip(outputs, references, strict=True)]
    for score in scores:
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise InvalidInputError(f"metric {metric!r} gave {score}: a score lies between 0 and 1")
    return scores


def clean(text: str) -> str:
    """The text without what UTF-8 cannot hold, as single surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
