"""Where a rendered prompt stops being the context, which is compressed, and starts being the question, which is not.

    description, examples, ... <the document's context field> ... question, answer prefix, end of a chat template
    '------------------------ context ----------------------' '------------------- question -----------------'

Knows no harness and no model: texts only. What cannot be divided for certain is refused, because a wrong division
gives numbers that look like any others.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from defensivekv.errors import InvalidInputError

CONTEXT_FIELDS = ("context", "passage", "document", "story", "article")
"""Fields of a document that may hold its context; the first that holds text is taken."""

_QUESTION_FIELDS = ("question", "query", "input")


@dataclass(frozen=True)
class SplitPrompt:
    """context: the prompt up to and including the context field. question: all the rest, never blank."""

    context: str
    question: str


def split_prompt(
    prompt: str, doc: Mapping[str, Any], *, field: str | None = None, query_aware: bool = False
) -> SplitPrompt:
    """Divides a prompt after the document's context, which must stand in it exactly once.

    doc: the document that the prompt was made of. field: its field with the context; None: the first of
    `CONTEXT_FIELDS` that holds text. All of its text is context, a question inside it too. White space around it may be
    missing in the prompt. query_aware: the question may stand before the context, since it is compressed with it.

    Raises InvalidInputError where there is no such field, where its text stands in the prompt never or more than
    once, where nothing follows it, and where the document's question stands before its end only: unless `query_aware`,
    what is compressed must not have seen the question.
    """
    name = _context_field(doc, field)
    text: str = doc[name]
    places = _places(prompt, text)
    if not places:
        text = text.strip()
        places = _places(prompt, text)
    if len(places) != 1:
        often = f"{len(places)} times" if places else "nowhere"
        raise InvalidInputError(
            f"the text of field {name!r} stands in the prompt {often}, so what is context and what is question cannot "
            "be told: name another field with context_field (--context-field), or leave the task out"
        )
    end = places[0] + len(text)
    split = SplitPrompt(prompt[:end], prompt[end:])
    if not split.question.strip():
        raise InvalidInputError(
            f"nothing follows the text of field {name!r} in the prompt, so there is no question: name another field "
            "with context_field (--context-field), or leave the task out"
        )
    for other in () if query_aware else _QUESTION_FIELDS:
        asked = doc.get(other)
        if other == name or not isinstance(asked, str) or not asked.strip():
            continue
        if asked.strip() in split.context and asked.strip() not in split.question:
            raise InvalidInputError(
                f"the text of field {other!r} stands before the end of field {name!r}, so the context would be "
                "compressed with its question in sight: use a task that asks after the context"
            )
    return split


def _context_field(doc: Mapping[str, Any], field: str | None) -> str:
    """The name of the field. Raises InvalidInputError where the document has none that holds text."""
    names = CONTEXT_FIELDS if field is None else (field,)
    found = next((name for name in names if isinstance(doc.get(name), str) and doc[name].strip()), None)
    if found is None:
        raise InvalidInputError(
            f"no field {' or '.join(map(repr, names))} with text in the document, so what is context and what is "
            f"question cannot be told: name one with context_field (--context-field); it has "
            f"{', '.join(map(str, doc)) or 'none'}"
        )
    return found


def _places(prompt: str, text: str) -> list[int]:
    """Where `text` starts in the prompt; overlapping places count, unlike with `str.count`."""
    places = []
    place = prompt.find(text)
    while place >= 0:
        places.append(place)
        place = prompt.find(text, place + 1)
    return places
