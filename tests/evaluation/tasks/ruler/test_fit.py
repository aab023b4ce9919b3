from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.evaluation.tasks.ruler.fit import Draft, TokenCounter, largest_size
from tests.evaluation.tasks.ruler.cases import tokenizer


@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    smallest=st.integers(0, 5),
    is_bounded=st.booleans(),
    budget=st.integers(0, 600),
)
def test_the_size_found_fits_and_the_next_does_not(
    steps: list[int], smallest: int, is_bounded: bool, budget: int
) -> None:
    def count(size: int) -> int:
        """A rough staircase that goes on for ever."""
        rounds, rest = divmod(size, len(steps))
        return rounds * (sum(steps) + 1) + sum(steps[:rest])

    largest = smallest + 25 if is_bounded else None
    size = largest_size(count, smallest, largest, budget)
    if size is None:
        assert count(smallest) > budget
    else:
        assert smallest <= size
        assert count(size) <= budget
        assert size == largest or (count(size + 1) > budget and (largest is None or size < largest))


@pytest.mark.parametrize(
    "count",
    [
        lambda n: 60 + 23 * n,
        lambda n: 60 + n,
        lambda n: 60 + 4 * n // 3,
        lambda n: 60 + 30 * n + (n * 7919) % 13,
        lambda n: 60 + n + n // 100 * 40,
    ],
)
def test_a_long_haystack_is_found_in_few_counts(count: Callable[[int], int]) -> None:
    asked: list[int] = []

    def counted(size: int) -> int:
        asked.append(size)
        return count(size)

    size = largest_size(counted, 1, None, 131_072)
    assert size is not None
    assert count(size) <= 131_072 < count(size + 1)
    assert len(asked) <= 8


def test_a_smallest_size_over_the_budget_is_none_and_the_largest_is_never_passed() -> None:
    assert largest_size(lambda n: n, 11, None, 10) is None
    assert largest_size(lambda n: n, 1, 7, 10) == 7
    assert largest_size(lambda n: n, 7, 7, 10) == 7


def test_question_and_prefix_are_counted_as_they_are_tokenised() -> None:
    words = tokenizer("words")
    draft = Draft("one two three", "four five?", " six:", ())
    assert TokenCounter(words).of_draft(draft) == len(words("one two three four five? six:")["input_ids"])
