"""The latest queries of a layer, kept between one step of eviction and the next."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.integrations.transformers.pending import MAX_DRAFTS, window_queries
from defensivekv.types import Queries


class QueryLog:
    """The latest queries of a layer, for a step that comes later. Each row's, without its pads.

    wanted: queries of each row that are held, more only where the last ones may be taken back; None: all, until they
    are forgotten.
    """

    def __init__(self, wanted: int | None) -> None:
        self.wanted = wanted
        self._parts: list[tuple[Queries, Bool[Tensor, "b x"] | None]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(queries.nbytes for queries, _ in self._parts)

    def add(self, queries: Queries, valid: Bool[Tensor, "b x"] | None, *, revocable: bool = False) -> None:
        """Takes the queries (b, q, x, d) of new tokens. valid: False at pads. revocable: `drop_last` may follow."""
        if valid is not None and bool(valid.all()):
            valid = None
        if self.wanted is None:
            self._parts.append((queries.detach().clone(), valid))
            return
        wanted = self.wanted + (MAX_DRAFTS if revocable else 0)
        if queries.shape[2] > wanted and not revocable:
            counts = None if valid is None else valid.sum(-1)
            queries = window_queries(queries, valid, wanted)
            # Of a row with fewer, the first ones are pads.
            places = torch.arange(wanted, device=queries.device)
            valid = None if counts is None else places >= wanted - counts[:, None]
        elif valid is None or bool(valid[:, -wanted:].all()):
            queries, valid = queries[:, :, -wanted:], None
        # One by one, so that each can go; copies, since queries are often a view of what holds keys and values too.
        masks = [None] * queries.shape[2] if valid is None else list(valid.split(1, dim=1))
        for query, mask in zip(queries.detach().split(1, dim=2), masks, strict=True):
            self._parts.append((query.clone(), mask))
        while len(self._parts) > wanted and self._fewest(self._parts[1:]) >= wanted:
            del self._parts[0]

    @staticmethod
    def _fewest(parts: list[tuple[Queries, Bool[Tensor, "b x"] | None]]) -> int:
        """Queries of the row with the fewest."""
        whole = sum(queries.shape[2] for queries, valid in parts if valid is None)
        masks = [valid.sum(-1) for _, valid in parts if valid is not None]
        return whole + (int(torch.stack(masks).sum(0).min()) if masks else 0)

    def of_row(self, row: int, most: int) -> Float[Tensor, "q x d"]:
        """The row's latest queries, at most `most` of them."""
        parts = [
            queries[row] if valid is None else queries[row][:, valid[row].to(queries.device)]
            for queries, valid in self._parts
        ]
        together = torch.cat(parts, dim=1)
        return together[:, max(0, together.shape[1] - most) :]

    @property
    def available(self) -> int:
        """Queries of the row with the fewest."""
        return self._fewest(self._parts)

    def drop_last(self, count: int) -> None:
        """Forgets the queries of the last `count` tokens of the batch."""
        while count:
            queries, valid = self._parts.pop()
            left = queries.shape[2] - count
            if left > 0:
                self._parts.append((queries[:, :, :left], None if valid is None else valid[:, :left]))
            count = max(0, -left)

    def clear(self) -> None:
        """Forgets all."""
        self._parts = []

    def select_rows(self, index: Tensor) -> "QueryLog":
        """That of the batch of these rows."""
        chosen = QueryLog(self.wanted)
        for queries, valid in self._parts:
            rows = index.to(queries.device)
            chosen._parts.append((queries[rows], None if valid is None else valid[rows.to(valid.device)]))
        return chosen

    def fork(self) -> "QueryLog":
        """One that goes on by itself; what is held is shared, and never written to."""
        twin = QueryLog(self.wanted)
        twin._parts = list(self._parts)
        return twin
