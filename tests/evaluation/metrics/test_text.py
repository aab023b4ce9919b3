import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import METRICS
from defensivekv.evaluation.metrics.text import f1, f1_first_line, rouge_l, rouge_l_first_line

words = st.lists(st.sampled_from("cat sat mat dog ran far".split()), max_size=12).map(" ".join)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("", ["cat"], 0.0),
        ("cat", [""], 0.0),
        ("cat", [], 0.0),
        ("The cat!", ["a CAT"], 1.0),
        ("the", ["an"], 0.0),  # nothing is left of either
        ("cat sat", ["cat"], 2 / 3),
        ("cat cat", ["cat"], 2 / 3),  # a word counts as often as both hold it
        ("cat cat", ["cat cat cat"], 0.8),
        ("cat", ["dog", "cat sat", "cat"], 1.0),  # best over references
        ("a.k.a the cat", ["aka cat"], 1.0),  # punctuation goes first, so that its "a" is no article
        ("state-of-the-art", ["stateoftheart"], 1.0),
        ("café", ["cafe"], 0.0),
        ("“cat”", ["cat"], 0.0),  # only ASCII punctuation
    ],
)
def test_f1_of_words(prediction: str, references: list[str], expected: float) -> None:
    assert f1(prediction, references) == pytest.approx(expected, abs=1e-12)


def test_first_line_is_the_first_after_empty_ones() -> None:
    assert f1_first_line("\n\ncat\nPassage: dog", ["cat"]) == 1.0
    assert f1_first_line(" \ncat", ["cat"]) == 0.0  # a line of spaces is a line
    assert rouge_l_first_line("\ncat sat\nDialogue: dog", ["cat sat"]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("", ["cat"], 0.0),
        ("...", ["cat"], 0.0),  # the package raises; LongBench scores 0
        ("cat", ["."], 0.0),
        (" ", ["cat"], 0.0),
        ("cat", [], 0.0),
        ("cat sat on mat", ["cat sat on mat"], 1.0),
        ("Cat", ["cat"], 0.0),  # case counts
        ("cat cat cat", ["cat"], 1.0),  # unique words
        ("sat cat", ["cat sat"], 0.5),  # order counts
        ("cat sat", ["cat sat on the mat"], 2 * (2 / 5) / (1 + 2 / 5)),
        ("cat sat. dog ran", ["dog ran. cat sat"], 1.0),  # union over sentences
        ("cat. sat", ["cat sat"], 1.0),
        ("dog", ["cat", "dog"], 1.0),
    ],
)
def test_rouge_l_as_the_package_computes_it(prediction: str, references: list[str], expected: float) -> None:
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-7)


def test_rouge_l_of_an_answer_longer_than_the_recursion_limit() -> None:
    long = " ".join(f"word{i}" for i in range(1100))
    limit = sys.getrecursionlimit()

    assert rouge_l(long, [long]) == pytest.approx(1.0)
    assert sys.getrecursionlimit() == limit


def test_rouge_l_without_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rouge", None)
    with pytest.raises(InvalidInputError, match=r"pip install defensivekv\[eval\]"):
        rouge_l("cat", ["cat"])


@given(words, words)
def test_f1_is_symmetric_and_knows_no_order(prediction: str, reference: str) -> None:
    backwards = " ".join(reversed(prediction.split()))

    assert f1(prediction, [reference]) == pytest.approx(f1(reference, [prediction]))
    assert f1(prediction, [reference]) == f1(backwards, [reference])


@given(words, words)
def test_rouge_l_agrees_with_the_package_where_it_does_not_raise(prediction: str, reference: str) -> None:
    from rouge import Rouge

    if prediction and reference:
        assert (
            rouge_l(prediction, [reference]) == Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
        )


@given(st.sampled_from(sorted(set(METRICS) - {"retrieval"})), st.text(), st.lists(st.text(), max_size=3))
def test_every_score_is_a_share(name: str, prediction: str, references: list[str]) -> None:
    score = METRICS[name].function(prediction, references, references)

    assert 0.0 <= score <= 1.0
    assert METRICS[name].function("", references, references) == 0.0


@given(st.sampled_from(sorted(set(METRICS) - {"classification", "string_match_all", "word_recall"})), st.data())
def test_more_references_score_no_less(name: str, data: st.DataObject) -> None:
    paragraphs = st.integers(1, 9).map("Paragraph {}".format)
    prediction = data.draw(words | paragraphs)
    references = data.draw(st.lists(paragraphs if name == "retrieval" else words, min_size=1, max_size=4))

    scores = [METRICS[name].function(prediction, [reference], ()) for reference in references]
    assert METRICS[name].function(prediction, references, ()) == max(scores)


def test_a_metric_has_its_own_name_and_says_where_it_is_from() -> None:
    assert all(name == metric.name and metric.version >= 1 for name, metric in METRICS.items())
    assert all(metric.description and metric.source for metric in METRICS.values())
