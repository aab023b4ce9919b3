"""How the reading of ragged segments is cut into pieces of equal work, one for each program of a kernel.

    segments   a a a a a a a a a b c c c c c          lengths 9, 1, 5; chunks of 4 entries
    items     [a a a a|a a a a|a][b][c c c c|c]       sorted, long ones first: a0 a1 c0 b0 a2 c1

A segment is one head of one source row. Batch rows that read the same source row are its readers: an item is read
once for all of them. Each (batch row, head) has as many splits, places for partial results, as its segment has items:

    batch rows 0 and 1 read a: splits  a0 a1 a2 | a0 a1 a2 | ...       first_split = 0, 3, 6, ...

All is known from lengths on the host: nothing waits for the device, now or later.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

_PROGRAMS_PER_PROCESSOR = 8
_MIN_CHUNK, _MAX_CHUNK = 128, 1024


@dataclass(frozen=True, eq=False)
class Work:
    """The items of one prefix, as some batch reads it; int32 tensors on its device.

    items: (n, 6): first entry, entries, head, number of the chunk in its segment, first reader, readers.
    readers: (b,) batch rows, those of one source row one after the other.
    first_split: (b * h + 1,) the first split of each batch row and head, and the number of all.
    chunk: entries of an item at most. num_splits: of all batch rows and heads. most_readers: of one source row.
    """

    items: Int[Tensor, "n 6"]
    readers: Int[Tensor, " b"]
    first_split: Int[Tensor, " pairs"]
    chunk: int
    num_splits: int
    most_readers: int

    @classmethod
    def of(
        cls, lengths: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device, chunk: int | None = None
    ) -> "Work":
        """The work of reading segments of `lengths[source][head]`, stored one after the other.

        rows: the source row of each batch row; they may repeat, and rows may be left out.
        chunk: a power of two, at least 128; None: what suits the device and the entries that are read.
        """
        counts = torch.tensor(lengths, dtype=torch.long).view(len(lengths), -1)
        sources = torch.tensor(rows, dtype=torch.long)
        num_readers = torch.bincount(sources, minlength=len(counts))
        is_read = num_readers > 0
        chunk = chunk or chunk_size(int(counts[is_read].sum()), device)
        chunks = (counts + chunk - 1) // chunk

        starts = counts.flatten().cumsum(0) - counts.flatten()
        read_chunks = (chunks * is_read[:, None]).flatten()
        segments = torch.arange(counts.numel()).repeat_interleave(read_chunks)
        numbers = torch.arange(len(segments)) - (read_chunks.cumsum(0) - read_chunks)[segments]
        remaining = counts.flatten()[segments] - numbers * chunk
        source, head = segments // counts.shape[1], segments % counts.shape[1]
        first_reader = num_readers.cumsum(0) - num_readers
        columns = (
            starts[segments] + numbers * chunk,
            remaining.clamp_max(chunk),
            head,
            numbers,
            first_reader[source],
            num_readers[source],
        )
        items = torch.stack(columns, 1)[remaining.clamp_max(chunk).argsort(descending=True, stable=True)]

        splits = torch.zeros(len(rows) * counts.shape[1] + 1, dtype=torch.long)
        splits[1:] = chunks[sources].flatten().cumsum(0)
        return cls(
            items.to(device, torch.int32),
            sources.argsort(stable=True).to(device, torch.int32),
            splits.to(device, torch.int32),
            chunk,
            int(splits[-1]),
            int(num_readers.max()),
        )


def chunk_size(num_entries: int, device: torch.device) -> int:
    """Entries of one program, a power of two: several programs for each multiprocessor, so that all end together.

    Larger chunks make fewer partial results; smaller ones than 128 are not worth their programs.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    share = max(1, num_entries // (_PROGRAMS_PER_PROCESSOR * processors))
    return min(max(1 << (share.bit_length() - 1), _MIN_CHUNK), _MAX_CHUNK)
