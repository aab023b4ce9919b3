from difflib import SequenceMatcher

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.evaluation.metrics.similarity import code_similarity


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("", ["return x"], 0.0),
        ("return x", [], 0.0),
        ("return x", ["return x"], 1.0),
        ("return x\nreturn y", ["return x"], 1.0),
        ("\n\nreturn x", ["return x"], 1.0),  # empty lines before it do not count
        ("```python\n# Doubles it.\n// And more.\nreturn x", ["return x"], 1.0),
        ("# only a comment", ["return x"], 0.0),
        ("return x  # twice", ["return x"], 0.0),  # a comment takes its line with it
        ("    return x", ["return x"], 0.8),
        ("abcd", ["bcde", "abcx"], 0.75),
        ("ab", ["abc"], 0.8),
        ("abc", ["xyz"], 0.0),
        ("abcdefg", ["abc"], 0.6),
        ("a" * 2 + "b", ["a" * 3 + "c"], 0.57),  # whole percents
    ],
)
def test_edit_similarity_of_the_first_line_of_code(prediction: str, references: list[str], expected: float) -> None:
    assert code_similarity(prediction, references, ()) == expected


def test_similarity_is_of_longest_blocks_and_not_of_edits() -> None:
    # "xyz" is the longest block and nothing matches on its sides; the fewest edits would keep "abcde" and give 0.5.
    assert code_similarity("a-b-c-d-exyz", ["xyzabcde"], ()) == 0.3


@given(st.text("abc xyz=()", min_size=1, max_size=30), st.text("abc xyz=()", min_size=1, max_size=30))
def test_a_line_of_plain_code_scores_difflibs_ratio(line: str, reference: str) -> None:
    assert code_similarity(line, [reference], ()) == round(100 * SequenceMatcher(None, line, reference).ratio()) / 100
    assert code_similarity(f"{line}\nmore", [reference], ()) == code_similarity(line, [reference], ())
