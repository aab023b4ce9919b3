"""The latest queries of each row, against lists of numbers."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.integrations.transformers.query_log import QueryLog


@st.composite
def passes(draw: st.DrawFn) -> list[tuple[int, list[int]]]:
    """Forward passes: tokens of the batch, and of each of two rows how many pads come first."""
    found = []
    for _ in range(draw(st.integers(1, 8))):
        size = draw(st.integers(1, 12))
        found.append((size, [draw(st.sampled_from([0, 0, 0, size // 2, size])) for _ in range(2)]))
    return found


def _queries(start: int, size: int) -> torch.Tensor:
    return torch.arange(start, start + size, dtype=torch.float32).expand(2, 3, size)[..., None].clone()


@given(wanted=st.none() | st.integers(1, 6), given_passes=passes(), data=st.data())
def test_each_rows_latest_queries_are_held_without_its_pads(
    wanted: int | None, given_passes: list[tuple[int, list[int]]], data: st.DataObject
) -> None:
    log, seen, expected = QueryLog(wanted), 0, [[], []]  # type: ignore[var-annotated]
    for size, pads in given_passes:
        valid = torch.stack([torch.arange(size) >= pad for pad in pads])
        revocable = data.draw(st.booleans())
        log.add(_queries(seen, size), valid if data.draw(st.booleans()) or any(pads) else None, revocable=revocable)
        for row, pad in enumerate(pads):
            expected[row] += range(seen + pad, seen + size)
        seen += size
        if revocable:
            count = data.draw(st.integers(0, size))
            log.drop_last(count)
            seen -= count
            expected = [[number for number in row if number < seen] for row in expected]
        most = wanted or 1000
        for row in range(2):
            if expected[row]:
                assert log.of_row(row, most)[0, :, 0].tolist() == expected[row][-most:]
        if wanted is not None:
            assert log.nbytes <= 2 * 3 * wanted * 4


def test_no_more_is_held_than_is_wanted() -> None:
    log = QueryLog(4)
    log.add(_queries(0, 100), None)
    for number in range(100, 120):
        log.add(_queries(number, 1), None)
        assert log.nbytes == 2 * 3 * 4 * 4
    assert log.of_row(1, 4)[2, :, 0].tolist() == [116, 117, 118, 119]


def test_forks_and_rows_go_on_by_themselves() -> None:
    log = QueryLog(None)
    log.add(_queries(0, 3) * torch.tensor([1.0, 10.0]).view(2, 1, 1, 1), None)
    fork, swapped = log.fork(), log.select_rows(torch.tensor([1, 0, 1]))
    fork.add(_queries(3, 1), None)
    log.clear()
    assert log.nbytes == 0
    assert fork.of_row(0, 9)[0, :, 0].tolist() == [0, 1, 2, 3]
    assert [swapped.of_row(row, 9)[0, :, 0].tolist() for row in range(3)] == [[0, 10, 20], [0, 1, 2], [0, 10, 20]]
