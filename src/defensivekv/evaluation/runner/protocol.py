"""How a sample becomes tokens: document and question apart, for every policy and the full cache alike.

    chat    [before document] | [question after answer_prefix] answer [between question after answer_prefix] ...
    plain   [<bos> document]  | [question answer_prefix]       answer <end>  [question answer_prefix] ...
    bare    [document]        | [question answer_prefix]       answer

Left of the bar is compressed before anything to its right is seen. `before`, `after` and `between` are what the chat
template writes around the user's text. Nothing is put between document and question: the texts of a task hold that.
"""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.sample import Question, Sample
from defensivekv.integrations.transformers.contexts.wrapping import BARE, Wrapping


@dataclass(frozen=True)
class Prompt:
    """A sample as token ids.

    context: of the document. turns: of each question, up to where the answer begins; of later turns of a conversation
    with what ends the answer before. truncated: tokens cut out of the document.
    """

    context: list[int]
    turns: list[list[int]]
    truncated: int
    wrapping: Wrapping


def make_prompt(
    tokenizer: PreTrainedTokenizerBase,
    sample: Sample,
    wrapping: Wrapping,
    *,
    max_context_tokens: int | None,
    max_positions: int | None,
) -> Prompt:
    """The sample's tokens. `wrapping` is the run's; a bare sample has none.

    Raises InvalidInputError for a document or question of no tokens, and where document, question and answer are
    more than `max_positions`.
    """
    if sample.is_bare:
        wrapping = BARE
    if not sample.questions:
        raise InvalidInputError("the sample asks no question: give it one")
    document, truncated = _cut_middle(tokenizer, sample.context, max_context_tokens)
    context = _encode(tokenizer, wrapping.before + document, wrapping.special)
    if not document.strip() or not context:
        raise InvalidInputError("the document is empty: give the sample a context")
    turns = [
        _encode(tokenizer, _opening(wrapping, sample, number) + _turn(question, wrapping), False)
        for number, question in enumerate(sample.questions)
    ]
    for number, turn in enumerate(turns, start=1):
        if not turn:
            raise InvalidInputError(f"question {number} has no tokens: give the sample a text to ask")
        check_room(len(context) + len(turn) + sample.max_new_tokens, max_positions)
    return Prompt(context, turns, truncated, wrapping)


def check_room(num_tokens: int, max_positions: int | None) -> None:
    """Raises InvalidInputError where document, question and answer do not fit the model."""
    if max_positions is not None and num_tokens > max_positions:
        raise InvalidInputError(
            f"document, question and answer are {num_tokens} tokens, but the model has {max_positions} positions: "
            "cut longer documents with max_context_tokens, or take a model with more"
        )


def _opening(wrapping: Wrapping, sample: Sample, number: int) -> str:
    """What stands before a turn's question."""
    if not sample.in_turns or number == 0:
        return ""
    if wrapping.between is None:
        raise InvalidInputError("the chat template cannot be continued after an answer: use template 'plain'")
    return wrapping.between


def _turn(question: Question, wrapping: Wrapping) -> str:
    return question.text + wrapping.after + question.answer_prefix


def _cut_middle(tokenizer: PreTrainedTokenizerBase, text: str, maximum: int | None) -> tuple[str, int]:
    """The text without its middle where it has more than `maximum` tokens, and the tokens that were cut.

    LongBench's rule: the first and the last half of the tokens, each decoded.
    """
    if maximum is None:
        return text, 0
    ids = _encode(tokenizer, text, False)
    if len(ids) <= maximum:
        return text, 0
    half = maximum // 2
    halves = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return "".join(halves), len(ids) - 2 * half


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return ids
