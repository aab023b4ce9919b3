import torch
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.kernels.work import Work, chunk_size

CPU = torch.device("cpu")
lengths = st.integers(1, 4).flatmap(
    lambda heads: st.lists(
        st.lists(st.sampled_from([0, 1, 127, 128, 129, 1000]), min_size=heads, max_size=heads), min_size=1, max_size=4
    )
)


@given(lengths, st.data())
def test_every_entry_that_is_read_is_in_one_item_and_every_reader_has_a_split_for_it(
    lengths: list[list[int]], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=5))
    work = Work.of(lengths, rows, CPU, 128)
    heads = len(lengths[0])
    flat = [length for row in lengths for length in row]
    starts = [sum(flat[:segment]) for segment in range(len(flat))]

    read: list[tuple[int, int, int]] = []
    splits: list[int] = []
    for first, count, head, number, first_reader, num_readers in work.items.tolist():
        assert 0 < count <= work.chunk
        readers = work.readers[first_reader : first_reader + num_readers].tolist()
        (source,) = {rows[reader] for reader in readers}
        assert readers == [reader for reader, row in enumerate(rows) if row == source]
        assert first == starts[source * heads + head] + number * work.chunk
        read.append((source, head, count))
        splits += [int(work.first_split[reader * heads + head]) + number for reader in readers]

    for source in range(len(lengths)):
        for head in range(heads):
            expected = lengths[source][head] if source in rows else 0
            assert sum(count for row, of, count in read if (row, of) == (source, head)) == expected
    assert sorted(splits) == list(range(work.num_splits))
    assert int(work.first_split[-1]) == work.num_splits
    assert work.most_readers == max(rows.count(row) for row in rows)


def test_a_giant_head_is_cut_into_items_like_those_of_the_others_and_long_items_come_first() -> None:
    work = Work.of([[100_000, 130, 0, 70]], [0], CPU, 256)
    counts = work.items[:, 1].tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts == [256] * 390 + [160, 130, 70]


def test_all_tables_are_32_bit_and_on_the_device() -> None:
    work = Work.of([[300, 2]], [0, 0], CPU)
    assert {table.dtype for table in (work.items, work.readers, work.first_split)} == {torch.int32}
    assert all(table.is_contiguous() for table in (work.items, work.readers, work.first_split))


def test_chunks_are_powers_of_two_that_grow_with_the_entries() -> None:
    sizes = [chunk_size(entries, CPU) for entries in (0, 1, 1000, 3000, 5000, 10**7)]
    assert sizes == [128, 128, 128, 256, 512, 1024]
