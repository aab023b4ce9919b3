"""What stands around the user's words: the pieces of a chat template, or nothing.

chat    [before document] | [question after] answer [between question after] ...
plain   [<bos> document]  | [question]       answer <end>  [question] ...
bare    [document]        | [question]       answer
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal, get_args

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError

Template = Literal["auto", "chat", "plain"]

_DAY = datetime(2024, 7, 26, tzinfo=UTC)
_SAME_DAY = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f".replace('%{code}', '{_DAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
    + " }}{% endmacro %}\n"
)
"""Before a template that writes today's date (Llama 3.2's does, and falls back to this day): a document that is
compressed once is the same one tomorrow."""

_MARKS = ("firstuserturnmark", "firstanswermark", "seconduserturnmark")


@dataclass(frozen=True)
class Wrapping:
    """What stands around the user's text.

    before: up to it. after: from it to where the model's turn begins. between: from an answer to the next user text;
    None: the template cannot be cut there. special: whether the tokenizer adds its special tokens.
    keeps_end: whether the end token that the model generated stays before the next turn; otherwise `between` has it.
    """

    name: Literal["chat", "plain"]
    before: str = ""
    after: str = ""
    between: str | None = ""
    special: bool = False
    keeps_end: bool = True


PLAIN = Wrapping("plain", special=True)
BARE = Wrapping("plain")


def find_wrapping(tokenizer: PreTrainedTokenizerBase, template: Template) -> Wrapping:
    """The wrapping that `template` asks for. Raises InvalidInputError where the tokenizer cannot give it."""
    if template not in get_args(Template):
        raise InvalidInputError(f"unknown template {template!r}: use {', '.join(get_args(Template))}")
    if template == "plain" or (template == "auto" and not tokenizer.chat_template):
        return PLAIN
    if not tokenizer.chat_template:
        raise InvalidInputError("the tokenizer has no chat template: use template='plain'")
    user, answer, second = _MARKS
    try:
        pieces = _render(tokenizer, [("user", user)], [user])
    except (TemplateError, ValueError) as error:  # ValueError: several templates, none of them the default
        raise InvalidInputError(f"the chat template fails: {error}: use template='plain'") from error
    if pieces is None:
        raise InvalidInputError("the chat template does not keep the user's text as it is: use template='plain'")
    try:
        turns = _render(tokenizer, [("user", user), ("assistant", answer), ("user", second)], _MARKS)
    except TemplateError:
        turns = None
    return Wrapping("chat", pieces[0], pieces[1], None if turns is None else turns[2], keeps_end=False)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], marks: Sequence[str]) -> list[str] | None:
    """The template's text cut at the marks; None where it does not hold each of them once, in order."""
    messages = [{"role": role, "content": text} for role, text in turns]
    rest: str = tokenizer.apply_chat_template(
        messages, chat_template=_SAME_DAY + tokenizer.get_chat_template(), tokenize=False, add_generation_prompt=True
    )
    if any(rest.count(mark) != 1 for mark in marks):
        return None
    pieces = []
    for mark in marks:
        piece, found, rest = rest.partition(mark)
        if not found:
            return None
        pieces.append(piece)
    return [*pieces, rest]
