"""How alike two lines of code are, as LongBench's lcc and repobench-p score it."""

from collections.abc import Sequence
from difflib import SequenceMatcher

_NOT_CODE = ("`", "#", "//")


def code_similarity(prediction: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Edit similarity of the first line that holds no "`", "#" or "//" with the best reference, in hundredths.

    difflib's ratio, whole percents: what `fuzzywuzzy` gives without its C helper. rapidfuzz, and fuzzywuzzy with the
    helper, differ by up to ten points. An empty line scores 0.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(mark in line for mark in _NOT_CODE)), "")
    return max((_similarity(line, reference) for reference in references), default=0.0) if line else 0.0


def _similarity(line: str, reference: str) -> float:
    return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100
