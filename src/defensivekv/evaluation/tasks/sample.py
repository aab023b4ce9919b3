"""A document, and what is asked about it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """What follows a document.

    text: up to where the model's turn begins. references: any or all of which a good answer holds; the metric says
    which. answer_prefix: what the model is made to begin its answer with; not a part of the answer.
    """

    text: str
    references: tuple[str, ...]
    answer_prefix: str = ""


@dataclass(frozen=True)
class Sample:
    """A document, compressed once, and questions about it.

    id: unique within its task. context: what is compressed; questions: what is not. max_new_tokens: of an answer.
    choices: every class that an answer may name, where the metric needs them. stop: texts that end an answer.
    is_bare: neither a chat template nor special tokens, as for few-shot and code completion. in_turns: each question
    follows the answer before it, in one conversation; otherwise each starts from the compressed document.
    metadata: what a report may group by, such as a needle's depth in percent ("depth") or the length asked for
    ("length").
    """

    id: str
    context: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    choices: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    is_bare: bool = False
    in_turns: bool = False
    metadata: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unreadable:
    """A sample that the data holds but that cannot be asked; it counts as a failure.

    id: as of `Sample`. reason: names the file and line.
    """

    id: str
    reason: str
