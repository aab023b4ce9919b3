import re
from collections import Counter
from math import pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler import corpus
from defensivekv.evaluation.tasks.ruler.word_extraction import _clear_size, zeta_counts
from defensivekv.evaluation.tasks.sample import Sample
from tests.evaluation.tasks.ruler.cases import samples, task

CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)


def entries(text: str) -> list[str]:
    """The words of a numbered list, whose numbers go from one to the end."""
    numbered = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", text)
    assert [int(number) for number, _ in numbered] == list(range(1, len(numbered) + 1))
    return [word for _, word in numbered]


def lists(sample: Sample) -> tuple[list[str], list[str], list[str]]:
    """The example's list, its answer, and the list asked about."""
    _, example, own = sample.context.split(CWE_HEAD)
    shown, answer = example.split("\nQuestion: What are the 10 most common words in the above list?")
    assert answer.startswith(" Answer: The top 10 words that appear most often in the list are: 1. ")
    prefix = " Answer: The top 10 words that appear most often in the list are: "
    return entries(shown), entries(answer.removeprefix(prefix).removesuffix("\n")), entries(own.removesuffix("\n"))


@pytest.mark.parametrize(
    ("kind", "length", "common", "uncommon", "example"),
    [("words", 1024, 6, 1, (3, 1, 20)), ("pieces", 2048, 6, 1, (3, 1, 20)),
     ("words", 4096, 30, 3, (10, 3, 40)), ("pieces", 8192, 30, 3, (10, 3, 40))],
)  # fmt: skip
def test_ten_words_are_common_and_all_others_equally_rare(
    kind: str, length: int, common: int, uncommon: int, example: tuple[int, int, int]
) -> None:
    for sample in samples("cwe", length, kind, count=2):
        shown, answer, own = lists(sample)
        frequencies = Counter(own)
        assert {word for word, count in frequencies.items() if count == common} == set(sample.questions[0].references)
        assert Counter(frequencies.values()) == {common: 10, uncommon: len(frequencies) - 10}
        assert len(frequencies) == sample.metadata["words"]
        example_frequencies = Counter(shown)
        assert {word for word, count in example_frequencies.items() if count == example[0]} == set(answer)
        assert Counter(example_frequencies.values()) == {example[0]: 10, example[1]: example[2] - 10}
        assert not set(shown) & set(own)
        assert set(own) <= set(corpus.read_words().all)


def test_the_prompts_ask_for_ten_common_and_three_coded_words() -> None:
    cwe, fwe = samples("cwe", 2048, count=1)[0], samples("fwe", 2048, count=1)[0]
    assert cwe.questions[0].text == "Question: What are the 10 most common words in the above list?"
    assert cwe.questions[0].answer_prefix == " Answer: The top 10 words that appear most often in the list are:"
    assert fwe.context.startswith(
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    assert fwe.questions[0].text == (
        "Question: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    assert fwe.questions[0].answer_prefix == (
        " Answer: According to the coded text above, the three most frequently appeared words are:"
    )


@pytest.mark.parametrize(("kind", "length"), [("words", 512), ("words", 4096), ("pieces", 512), ("pieces", 4096)])
def test_coded_words_follow_the_zeta_distribution_and_the_dots_lead(kind: str, length: int) -> None:
    for sample in samples("fwe", length, kind, count=4):
        coded = sample.context.split("coded words. ")[1].split()
        frequencies = Counter(coded)
        (dots, most), *ranked = frequencies.most_common()
        assert dots == "..."
        assert len(sample.questions[0].references) == 3
        assert {word for word, _ in ranked[:3]} == set(sample.questions[0].references)
        assert ranked[2][1] > (ranked[3][1] if len(ranked) > 3 else 0)
        assert all(re.fullmatch(r"[a-z]{6}", word) for word, _ in ranked)
        # The number of words before rounding, from the dots' count and no further from it than one word allows.
        lowest = most * pi**2 / 6
        for k, (_, count) in enumerate(ranked, start=2):
            assert lowest / (k * k * pi**2 / 6) - 1 < count < (lowest + pi**2 / 6) / (k * k * pi**2 / 6) + 1e-9
        assert len(frequencies) <= length // 50
        assert len(coded) == sample.metadata["words"]


@given(st.integers(0, 5000))
def test_no_size_of_a_coded_text_leaves_third_and_fourth_word_equally_frequent(size: int) -> None:
    *_, third, fourth = zeta_counts(_clear_size(size), 5)
    assert third > fourth
    assert _clear_size(size) < _clear_size(size + 1)


def test_without_wonderwords_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wonderwords.assets", None)
    corpus.read_words.cache_clear()
    try:
        for name in ("cwe", "niah_single_1", "niah_multiquery"):
            with pytest.raises(InvalidInputError, match=r"pip install defensivekv\[eval\]"):
                task(name)
        for name in ("fwe", "vt", "niah_multikey_3", "qa_1"):
            task(name)
    finally:
        corpus.read_words.cache_clear()


def test_a_list_ends_with_the_words_that_there_are() -> None:
    sample = samples("cwe", 65_536, count=1)[0]
    assert sample.metadata["words"] == len(corpus.read_words().all) - 40
