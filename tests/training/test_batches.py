from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from defensivekv.needleworld.vocabulary import NUMBERS, VARIABLES, VOCABULARY
from training.batches import LINK, VALUE, Batch, document_batch, recall_batch


def _words(batch: Batch, row: int) -> list[str]:
    return [VOCABULARY[number] for number in batch.ids[row].tolist()]


@given(seed=st.integers(0, 10**6), num_tokens=st.integers(64, 600), max_keys=st.integers(5, 40))
def test_what_a_row_is_asked_stands_in_its_document(seed: int, num_tokens: int, max_keys: int) -> None:
    batch = document_batch(Random(seed), 2, num_tokens, max_keys)
    for row in range(2):
        words = _words(batch, row)
        document = " ".join(words[:num_tokens])
        marked = batch.kinds[row].tolist()
        for place in range(num_tokens, len(words)):
            before = " ".join(words[place - 2 : place + 1])
            if marked[place] == VALUE:
                assert words[place] in NUMBERS
                assert before in document
            if marked[place] == LINK:
                assert words[place] in VARIABLES
                assert before in document


@given(seed=st.integers(0, 10**6))
def test_questions_do_not_see_each_other(seed: int) -> None:
    batch = document_batch(Random(seed), 1, 128, 8)
    assert bool(batch.mask[:, :128].all())
    asked = batch.mask[:, 128:]
    starts = (batch.positions[128:] == 128).nonzero().flatten().tolist()
    for start, stop in zip(starts, [*starts[1:], len(asked)], strict=True):
        expected = torch.zeros(stop - start, len(asked), dtype=torch.bool)
        expected[:, start:stop] = torch.ones(stop - start, stop - start).tril().bool()
        assert torch.equal(asked[start:stop], expected)


@given(seed=st.integers(0, 10**6))
def test_recall_marks_only_what_was_seen_before(seed: int) -> None:
    batch = recall_batch(Random(seed), 3)
    for row in range(3):
        words = _words(batch, row)
        for place in (batch.kinds[row] == VALUE).nonzero().flatten().tolist():
            assert words[place] in words[:place]


@pytest.mark.parametrize("num_tokens", [64, 1024, 2048])
def test_the_same_seed_gives_the_same_batch(num_tokens: int) -> None:
    first, second = (document_batch(Random(3), 1, num_tokens, 12) for _ in range(2))
    assert torch.equal(first.ids, second.ids)
