"""vLLM's cache as rows: one tensor over the pages of all layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.cache import PageLayout
from defensivekv.errors import UnsupportedModelError


@dataclass(frozen=True, eq=False)
class PageStore:
    """rows: (rows, d), all that vLLM allocated. layout: where the layers' pages lie in it."""

    rows: Float[Tensor, "rows d"]
    layout: PageLayout

    @classmethod
    def of(cls, caches: Sequence[Tensor], *, packs_layers: bool) -> "PageStore":
        """Views the layers' caches, each (blocks, heads, block size, keys and values), as vLLM binds them.

        Raises UnsupportedModelError where they do not lie in one allocation, evenly.
        """
        first, (_, heads, block_size, content) = caches[0], caches[0].shape
        size = content // 2
        offsets = [cache.storage_offset() for cache in caches]
        strides = {later - earlier for earlier, later in pairwise(offsets)}
        is_even = (
            len({cache.untyped_storage().data_ptr() for cache in caches}) == 1
            and len({(cache.shape, cache.stride(), cache.dtype) for cache in caches}) == 1
            and len(strides) <= 1
            and all(count % size == 0 for count in (first.stride(0), offsets[0], *strides))
            # The inner dimensions fill a page without gaps, in whatever order.
            and sorted(zip(first.stride()[1:], first.shape[1:], strict=True))[0][0] == 1
            and first.stride(0) >= heads * block_size * content
        )
        if not is_even:
            raise UnsupportedModelError(
                f"the layers' caches {tuple(first.shape)} with strides {first.stride()} do not lie in one "
                "allocation of pages: this layout of vLLM's cache is not supported"
            )
        count = first.untyped_storage().nbytes() // first.element_size() // size
        rows = torch.empty(0, dtype=first.dtype, device=first.device).set_(
            first.untyped_storage(), 0, (count, size), (size, 1)
        )
        layout = PageLayout(
            heads=heads,
            block_size=block_size,
            block_stride=first.stride(0) // size,
            layer_stride=next(iter(strides), 0) // size,
            first=offsets[0] // size,
            packed_layers=len(caches) if packs_layers else 1,
        )
        return cls(rows, layout)

    def write(self, rows: Int[Tensor, "..."], keys: Tensor, values: Tensor) -> None:
        """Writes keys and values (..., d) into the rows of the keys and those that belong to them."""
        where, size = rows.flatten(), self.rows.shape[1]
        self.rows.index_copy_(0, where, keys.reshape(-1, size))
        self.rows.index_copy_(0, where + self.layout.page_rows, values.reshape(-1, size))

    def read(self, rows: Int[Tensor, "t h"]) -> tuple[Float[Tensor, "h t d"], Float[Tensor, "h t d"]]:
        """Copies of keys and values."""
        across = rows.T
        return self.rows[across], self.rows[across + self.layout.page_rows]
