import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics.matching import (
    classification,
    count,
    needle_recall,
    retrieval,
    string_match_all,
    string_match_any,
    word_recall,
)
from defensivekv.needleworld import score

SANDWICH = "eat a sandwich and sit in Dolores Park on a sunny day."


@pytest.mark.parametrize(
    ("prediction", "truth", "choices", "expected"),
    [
        ("", "City", ["City"], 0.0),
        ("City", "City", ["City", "State"], 1.0),
        ("City or State", "City", ["City", "State"], 0.5),
        ("\nCity\nState", "City", ["City", "State"], 1.0),  # the first line only
        ("city", "City", ["City"], 0.0),  # case counts
        ("City", "City", [], 0.0),
        # "Date" is a part of "Date of birth": named with it, it is left out
        ("Date of birth", "Date of birth", ["Date", "Date of birth"], 1.0),
        ("Date of birth", "Date", ["Date", "Date of birth"], 0.5),
        # The published loop takes out while it goes on: "b" follows "a", is skipped and stays.
        ("abc", "abc", ["a", "b", "abc"], 0.5),
        ("abc", "abc", ["a", "abc", "b"], 1.0),
        ("abc", "abc", ["a", "b", "c", "abc"], 0.5),
    ],
)
def test_classification_by_the_published_loop(prediction: str, truth: str, choices: list[str], expected: float) -> None:
    assert classification(prediction, [truth], choices) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [("", 0.0), ("5", 1.0), ("none", 0.0), ("5 of 10", 0.5), ("15", 0.0), ("5, 5 and 6", 2 / 3), ("05", 0.0)],
)
def test_count_is_a_share_of_the_numbers_named(prediction: str, expected: float) -> None:
    assert count(prediction, ["5"], ()) == pytest.approx(expected)
    assert retrieval(prediction, ["Paragraph 5"], ()) == pytest.approx(expected)


def test_retrieval_of_a_reference_without_a_paragraph() -> None:
    with pytest.raises(InvalidInputError, match="'Absatz 5' names no paragraph"):
        retrieval("5", ["Absatz 5"], ())


def test_string_match_is_of_substrings_whatever_their_case() -> None:
    assert string_match_all("It is ABC-1, and xyz.", ["abc-1", "xyz", "no"], ()) == pytest.approx(2 / 3)
    assert string_match_all("123456", ["234"], ()) == 1.0
    assert string_match_any("It is ABC-1", ["no", "abc-1"], ()) == 1.0
    assert string_match_any("It is", ["no", "abc-1"], ()) == 0.0
    # A reference asked for twice counts twice, as there.
    assert string_match_all("one", ["one", "one", "two"], ()) == pytest.approx(2 / 3)


def test_string_match_takes_control_characters_for_newlines() -> None:
    assert string_match_all("12\x0034", ["1234"], ()) == 0.0
    assert string_match_all("\t12\n", ["12"], ()) == 1.0


def test_needle_recall_of_the_sandwich() -> None:
    assert needle_recall(SANDWICH, [SANDWICH], ()) == 1.0
    assert needle_recall("Sit in Dolores Park", [SANDWICH], ()) == pytest.approx(4 / 11)
    assert needle_recall("A walk in the sun, and a rest on a bench.", [SANDWICH], ()) == pytest.approx(4 / 11)
    assert needle_recall("It is **1234567**.", ["1234567"], ()) == 1.0
    assert needle_recall("It is 12345678.", ["1234567"], ()) == 0.0


def test_word_recall_is_the_needle_worlds_own() -> None:
    prediction, references = "one misty harbor 47 83 two", ("47 83", "83 two", "3 two")

    assert word_recall(prediction, references, ()) == score(prediction, references) == pytest.approx(2 / 3)


@given(st.permutations(["12", "34", "56"]), st.text("123456 ", max_size=12))
def test_scores_over_references_know_no_order(references: list[str], prediction: str) -> None:
    for metric in (string_match_all, string_match_any, needle_recall, count):
        assert metric(prediction, references, ()) == pytest.approx(metric(prediction, sorted(references), ()))
