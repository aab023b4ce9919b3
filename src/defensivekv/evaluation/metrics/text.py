"""Scores of free text: F1 over words and ROUGE-L, as LongBench (arXiv 2308.14508) computes them.

Each takes the best over the references. ROUGE is that of the package `rouge` 1.0.1: a longest common subsequence over
*unique* words, sentence by sentence. Other packages of the same name of metric differ by several points.
"""

import re
import string
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType

from defensivekv.errors import InvalidInputError

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def first_line(prediction: str) -> str:
    """What LongBench scores of trec, triviaqa and samsum: the first line after any empty ones."""
    return prediction.lstrip("\n").split("\n")[0]


def f1(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """F1 over words, lower-cased, without ASCII punctuation and articles; a word counts as often as both hold it."""
    return max((_f1(_words(prediction), _words(reference)) for reference in references), default=0.0)


def f1_first_line(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """`f1` of the first line."""
    return f1(first_line(prediction), references)


def rouge_l(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """F-measure of ROUGE-L; 0 where a side holds nothing but full stops. Raises InvalidInputError without `rouge`."""
    return max((_rouge_l(prediction, reference) for reference in references), default=0.0)


def rouge_l_first_line(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """`rouge_l` of the first line."""
    return rouge_l(first_line(prediction), references)


def load_rouge() -> ModuleType:
    """The package `rouge`. Raises InvalidInputError where it is not installed."""
    try:
        return import_module("rouge")
    except ImportError as error:
        raise InvalidInputError(
            "ROUGE-L needs the package 'rouge', which is not installed: pip install defensivekv[eval]"
        ) from error


def _words(text: str) -> list[str]:
    # Punctuation goes before articles: "a.k.a" is the word "aka", not an article.
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(predicted: list[str], expected: list[str]) -> float:
    num_common = (Counter(predicted) & Counter(expected)).total()
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(predicted), num_common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _rouge_l(prediction: str, reference: str) -> float:
    # The package raises for a side without a sentence, which is what splitting at full stops leaves of "" or "...".
    if not prediction.strip(".") or not reference.strip("."):
        return 0.0
    rouge = load_rouge().Rouge(metrics=["rouge-l"], stats=["f"])
    with _recursion_deeper_by(2 * (len(prediction.split()) + len(reference.split()))):
        scores = rouge.get_scores(prediction, reference)
    return float(scores[0]["rouge-l"]["f"])


@contextmanager
def _recursion_deeper_by(num_frames: int) -> Iterator[None]:
    """The package recurses once a word; LongBench's scorer takes the overflow of a long answer for a score of 0."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + num_frames)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
