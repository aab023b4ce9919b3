from fractions import Fraction
from math import floor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from defensivekv import Budget, BudgetError, DefensiveKVError
from defensivekv.budget import POSITION_BYTES, entry_bytes, format_bytes


@pytest.mark.parametrize(
    ("value", "kind", "amount"),
    [
        (0.2, "share", Fraction(1, 5)),
        (1.0, "share", Fraction(1)),
        (1, "share", Fraction(1)),
        (Fraction(1, 3), "share", Fraction(1, 3)),
        ("0.2", "share", Fraction(1, 5)),
        ("1", "share", Fraction(1)),
        ("20%", "share", Fraction(1, 5)),
        (" 12.5 % ", "share", Fraction(1, 8)),
        ("2e1%", "share", Fraction(1, 5)),
        ("100%", "share", Fraction(1)),
        (2, "entries", Fraction(2)),
        (1024, "entries", Fraction(1024)),
        ("1024", "entries", Fraction(1024)),
        ("64MiB", "bytes", Fraction(64 * 2**20)),
        ("64 mib", "bytes", Fraction(64 * 2**20)),
        ("1.5KiB", "bytes", Fraction(1536)),
        ("2GB", "bytes", Fraction(2 * 10**9)),
        ("500B", "bytes", Fraction(500)),
        (".5KB", "bytes", Fraction(500)),
        ("1.7B", "bytes", Fraction(1)),
    ],
)
def test_every_form_is_read(value: Any, kind: str, amount: Fraction) -> None:
    budget = Budget.parse(value)
    assert (budget.kind, budget.amount) == (kind, amount)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "keeps nothing"),
        (0.0, "keeps nothing"),
        (-1, "keeps nothing"),
        (-0.2, "keeps nothing"),
        (1e-12, "keeps nothing"),
        ("0", "keeps nothing"),
        ("0%", "keeps nothing"),
        ("0MiB", "keeps nothing"),
        ("0.5B", "keeps nothing"),
        (1.5, "give the integer 2"),
        (1024.0, "give the integer 1024"),
        ("150%", "above one"),
        (Fraction(3, 2), "above one"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (float("-inf"), "not finite"),
        (True, "not a number"),
        (False, "not a number"),
        (None, "not a number"),
        ([0.2], "not a number"),
        (1j, "not a number"),
        ("", "not understood"),
        ("nan", "not understood"),
        ("-20%", "not understood"),
        ("MiB", "not understood"),
        ("1e999%", "not understood"),
        ("1e999999999MiB", "not understood"),
        ("twenty", "not understood"),
        ("64XB", "unknown unit 'XB'"),
        ("64M", "unknown unit 'M'"),
    ],
)
def test_what_means_nothing_is_refused_and_the_message_says_what_to_give(value: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message) as error:
        Budget.parse(value)
    assert isinstance(error.value, DefensiveKVError)
    assert isinstance(error.value, ValueError)


@given(st.text(max_size=12))
def test_any_text_is_read_or_refused_with_the_typed_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except BudgetError:
        return
    assert budget.amount > 0


@given(percent=st.integers(1, 100), tokens=st.integers(1, 10**6))
def test_a_share_in_decimals_is_exact(percent: int, tokens: int) -> None:
    exact = tokens * percent // 100
    for form in (percent / 100, f"{percent}%", str(percent / 100)):
        assert floor(tokens * Budget.parse(form).share(tokens, 1)) == exact


def test_29_hundredths_of_100_are_29() -> None:
    assert floor(100 * 0.29) == 28  # what binary rounding makes of it
    assert floor(100 * Budget.parse(0.29).share(100, 1)) == 29


@given(entries=st.integers(2, 10**6), tokens=st.integers(1, 10**6))
def test_a_count_is_exact_and_never_more_than_the_prompt(entries: int, tokens: int) -> None:
    assert floor(tokens * Budget.parse(entries).share(tokens, 12345)) == min(entries, tokens)


@given(size=st.integers(1, 10**12), tokens=st.integers(1, 10**6), per_token=st.integers(1, 10**6))
def test_bytes_are_filled_and_never_exceeded(size: int, tokens: int, per_token: int) -> None:
    share = Budget.parse(f"{size}B").share(tokens, per_token)
    used = share * tokens * per_token
    assert used <= size
    assert used == size or share == 1


def test_only_the_share_one_is_full() -> None:
    assert Budget.parse("100%").is_full
    assert not Budget.parse(0.999).is_full
    assert not Budget.parse(10**9).is_full


def test_a_budget_is_parsed_to_itself() -> None:
    budget = Budget.parse("64MiB")
    assert Budget.parse(budget) == budget


@pytest.mark.parametrize(
    ("value", "text"), [(0.2, "0.2"), (1024, "1024 entries per head"), ("64MiB", "64.0 MiB"), ("100B", "100 B")]
)
def test_a_budget_is_said_in_its_own_words(value: Any, text: str) -> None:
    assert str(Budget.parse(value)) == text


def test_an_entry_is_its_key_its_value_and_its_position() -> None:
    assert entry_bytes(64, 32, 2) == 64 * 2 + 32 * 2 + POSITION_BYTES


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 * 2**19, "1.5 MiB"),
        (2**31, "2.00 GiB"),
        (2**41, "2048.00 GiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


@given(
    amount=st.integers(1, 10**9).map(lambda billionths: Fraction(billionths, 10**9))
    | st.integers(2, 10**7)
    | st.integers(1, 2**45).map(lambda size: f"{size}B")
    | st.sampled_from(["64MiB", "1.01MiB", "1.04MiB", "2GiB", "500.04KiB", 0.2, 0.20004, 0.99999, "20%"])
)
def test_what_a_budget_is_called_is_read_back_as_the_same_budget(amount: Fraction | int | float | str) -> None:
    budget = Budget.parse(amount)
    assert Budget.parse(str(budget)) == budget
