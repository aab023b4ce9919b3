"""One JSON line for each sample of each cell, with all it takes to believe it.

A record holds nothing that differs between two runs of the same thing: no times. Those are in a `Timing` beside it.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def line(self) -> str:
        """The record as one line of JSON, with its newline."""
        return self.model_dump_json() + "\n"


class Record(_Line):
    """One sample under one policy at one budget.

    model, model_revision: name or folder's last part, and hub revision or fingerprint of the weights. dtype: of the
    weights. policy: its name. policy_parts: its parts in words ("scorer", "aggregation", ...), window_size included.
    budget: as it was asked for, in words. task, suite, domain, metric, metric_version, split, revision,
    not_comparable: of the task. seed: of the draws. sample: its id. query_aware: whether the compression saw the
    question. template: "chat" or "plain".

    status: "ok", or "failed" with `error`, whose outputs and scores are empty and count in no mean.
    context_tokens: tokens of the document as compressed. truncated_tokens: tokens that were cut out of the document
    to fit; 0 where it fits. context_sha256: of the document's text.
    questions, answer_prefixes, references, choices, outputs: of each question, in order. scores: 0 to 1.
    achieved: share of the entries held after compression; lengths: entries held, [evicted layer][kv head].
    cache_bytes: held after compression, by all layers. full_bytes: what the stock cache would hold.
    metadata: of the sample. versions: of packages. device: its name.
    """

    model: str
    model_revision: str
    dtype: str
    policy: str
    policy_parts: dict[str, str]
    budget: str
    task: str
    suite: str
    domain: str
    metric: str
    metric_version: int
    split: str
    revision: str
    not_comparable: str
    seed: int
    sample: str
    query_aware: bool
    template: str
    status: Literal["ok", "failed"]
    error: str
    context_tokens: int
    truncated_tokens: int
    context_sha256: str
    questions: list[str]
    answer_prefixes: list[str]
    references: list[list[str]]
    choices: list[str]
    outputs: list[str]
    scores: list[float]
    achieved: float
    lengths: list[list[int]]
    cache_bytes: int
    full_bytes: int
    metadata: dict[str, str | int | float]
    versions: dict[str, str]
    device: str


class Timing(_Line):
    """The seconds of one sample, by the id it has in its record.

    prefill_seconds: reading the document and compressing it; of a batch, its part. token_seconds: median of the
    decoding steps (of the whole batch's, where samples were batched: `batch_size`); None for answers of one token.
    """

    sample: str
    prefill_seconds: float
    token_seconds: float | None
    new_tokens: int
    batch_size: int
