"""Lengths and pads of the rows of a batch, against lists."""

from fractions import Fraction

import torch
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.integrations.transformers.texts import Texts


@given(
    st.lists(
        st.tuples(st.integers(1, 8), st.lists(st.sampled_from([0, 0, 1, 3, 8]), min_size=2, max_size=2)),
        min_size=1,
        max_size=5,
    )
)
def test_the_place_of_every_token_in_its_row_is_known(passes: list[tuple[int, list[int]]]) -> None:
    texts, seen, rows = Texts(), 0, [[], []]  # type: ignore[var-annotated]
    for size, pads in passes:
        valid = torch.stack([torch.arange(size) >= pad for pad in pads])
        texts = texts.grown(seen, valid if any(pads) else None, valid.sum(-1).tolist())
        for row in range(2):
            rows[row] += (seen + valid[row].nonzero().flatten()).tolist()
        seen += size
    assert texts.tokens == tuple(map(len, rows))
    for row, positions in enumerate(rows):
        found = texts.places(row, torch.tensor(positions, dtype=torch.int32))
        assert found.tolist() == list(range(len(positions)))
        after = texts.places(row, torch.tensor([seen, seen + 5]))
        assert after.tolist() == [len(positions), len(positions) + 5]


def test_rows_are_taken_with_all_that_is_known_of_them() -> None:
    texts = Texts(
        (3, 2), (Fraction(1, 2), Fraction(1)), torch.tensor([[True] * 3, [False, True, True]]), frozenset({1})
    )
    chosen = texts.select_rows([1, 0, 1])
    assert chosen.tokens == (2, 3, 2)
    assert chosen.shares == (Fraction(1), Fraction(1, 2), Fraction(1))
    assert chosen.released == {0, 2}
    assert chosen.places(0, torch.tensor([1, 2])).tolist() == [0, 1]
    assert Texts().select_rows([0, 0]) == Texts()
