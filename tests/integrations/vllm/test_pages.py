import pytest
import torch

import defensivekv as dkv
from defensivekv.integrations.vllm.pages import PageStore

LAYERS, BLOCKS, HEADS, BLOCK_SIZE, SIZE = 3, 5, 2, 4, 16


def caches(offset: int = 0) -> list[torch.Tensor]:
    """As vLLM binds them: views (blocks, heads, block size, key and value) of one allocation."""
    page = HEADS * BLOCK_SIZE * 2 * SIZE
    whole = torch.arange(offset + LAYERS * BLOCKS * page, dtype=torch.float32)
    return [
        whole[offset + layer * BLOCKS * page :][: BLOCKS * page].view(BLOCKS, HEADS, BLOCK_SIZE, 2 * SIZE)
        for layer in range(LAYERS)
    ]


@pytest.mark.parametrize("offset", [0, 7 * SIZE])
@pytest.mark.parametrize("packs", [False, True])
def test_all_layers_pages_are_rows_of_one_tensor(offset: int, packs: bool) -> None:
    given = caches(offset)
    store = PageStore.of(given, packs_layers=packs)
    assert store.layout.packed_layers == (LAYERS if packs else 1)
    blocks = torch.tensor([4, 1, 3])
    for layer in range(LAYERS):
        rows = store.layout.rows(blocks, store.layout.tokens(torch.arange(9), 2), layer)
        keys, values = torch.randn(9, HEADS, SIZE), torch.randn(9, HEADS, SIZE)
        store.write(rows, keys, values)
        read = store.read(rows)
        assert torch.equal(read[0], keys.transpose(0, 1))
        assert torch.equal(read[1], values.transpose(0, 1))
        # Nothing but this layer's pages of these blocks was written.
        assert torch.equal(given[layer][0], caches(offset)[layer][0])
        assert not torch.equal(given[layer][4], caches(offset)[layer][4])


def test_caches_of_another_layout_are_refused() -> None:
    apart = [cache.clone() for cache in caches()]
    with pytest.raises(dkv.UnsupportedModelError, match="one allocation"):
        PageStore.of(apart, packs_layers=False)
    uneven = [caches()[0], *caches()[2:]]
    assert uneven
    with pytest.raises(dkv.UnsupportedModelError, match="one allocation"):
        PageStore.of(uneven, packs_layers=False)
