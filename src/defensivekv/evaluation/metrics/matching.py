"""Scores by what an answer names: classes, numbers, substrings, words."""

import re
import string
from collections.abc import Sequence

from defensivekv import needleworld
from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics.text import first_line

_NUMBER = re.compile(r"\d+")
_PARAGRAPH = re.compile(r"Paragraph (\d+)")
_CONTROL = re.compile(r"[\x00-\x1f]")


def classification(prediction: str, references: Sequence[str], choices: Sequence[str]) -> float:
    """Whether the first line names the class, divided by the number of classes that it names (LongBench's trec).

    A named class that is a part of the true class's name is left out, by LongBench's own loop: it skips the class
    after each one that it takes out, so that the order of `choices` can matter.
    """
    line = first_line(prediction)
    return max((_classification(line, reference, choices) for reference in references), default=0.0)


def count(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of the numbers in the answer that are the reference (LongBench's passage_count)."""
    numbers = _NUMBER.findall(prediction)
    return max((numbers.count(reference) / len(numbers) for reference in references), default=0.0) if numbers else 0.0


def retrieval(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of the numbers in the answer that are the paragraph's (LongBench's passage_retrieval_en).

    references: such as "Paragraph 12"; others raise InvalidInputError.
    """
    return count(prediction, [paragraph_number(reference) for reference in references])


def paragraph_number(reference: str) -> str:
    """The number in "Paragraph 12". Raises InvalidInputError where there is none."""
    match = _PARAGRAPH.search(reference)
    if match is None:
        raise InvalidInputError(
            f"reference {reference!r} names no paragraph: it has to hold one such as 'Paragraph 12'"
        )
    return match[1]


def string_match_all(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of references that the answer holds as substrings, whatever their case (RULER)."""
    found = _found(prediction, references)
    return sum(found) / len(found) if found else 0.0


def string_match_any(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Whether the answer holds any reference as a substring, whatever its case (RULER's qa)."""
    return float(any(_found(prediction, references)))


def needle_recall(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of the reference's different words that the answer holds, without case and punctuation; best one.

    After Fu et al. (arXiv 2402.10171), whose sets of words keep punctuation and are divided by the number of words:
    the sandwich, which says "a" twice, scores 11/12 there at best and 1 here. An answer that has lost the needle
    still earns the "a", "and", "in" and "on" that it may hold, here as there.
    """
    said = _bare_words(prediction)
    shares = [len(said & wanted) / len(wanted) for wanted in map(_bare_words, references) if wanted]
    return max(shares, default=0.0)


def word_recall(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """The share of references that appear as whole words in a row: `defensivekv.needleworld.score`."""
    return needleworld.score(prediction, references) if prediction and references else 0.0


def _classification(line: str, truth: str, choices: Sequence[str]) -> float:
    named = [choice for choice in choices if choice in line]
    index = 0
    while index < len(named):
        if named[index] in truth and named[index] != truth:
            named.remove(named[index])
        index += 1
    return 1.0 / len(named) if truth in named else 0.0


def _found(prediction: str, references: Sequence[str]) -> list[bool]:
    if not prediction:
        return []
    text = _CONTROL.sub("\n", prediction.strip()).strip().lower()
    return [reference.lower() in text for reference in references]


def _bare_words(text: str) -> set[str]:
    words = (word.strip(string.punctuation) for word in text.lower().split())
    return {word for word in words if word}
