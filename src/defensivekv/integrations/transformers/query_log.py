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
        """Takes the queries (b, q, x, d) of new tokens. valid: False at pads. revocable: `drop_last` follows, after
        which no more is held than is wanted.
        """
        if valid is not None and bool(valid.all()):
            valid = None
        if self.wanted is None:
            self._parts.append((queries.detach().clone(), valid))
            return
        if valid is None:
            queries = queries[:, :, -(self.wanted + (MAX_DRAFTS if revocable else 0)) :]
        # One by one, so that each can go; copies, since queries are often a view of what holds keys and values too.
        masks = [None] * queries.shape[2] if valid is None else list(valid.split(1, dim=1))
        for query, mask in zip(queries.detach().split(1, dim=2), masks, strict=True):
            self._parts.append((query.clone(), mask))
        if not revocable:
            self._trim()

    def _trim(self) -> None:
        """Holds no more than is wanted."""
        wanted, held = self.wanted, self._parts
        if wanted is None or len(held) <= wanted:
            return
        if all(valid is None for _, valid in held[-wanted:]):
            self._parts = held[-wanted:]
            return
        # Of a row with pads, the latest lie further back than those of others: gathered side by side.
        b, device = held[0][0].shape[0], held[0][0].device
        ones = torch.ones(b, 1, dtype=torch.bool, device=device)
        valid = torch.cat([ones if mask is None else mask.to(device) for _, mask in held], dim=1)
        queries = window_queries(torch.cat([query for query, _ in held], dim=2), valid, wanted)
        there = torch.arange(wanted, device=device) >= wanted - valid.sum(-1, keepdim=True)
        self._parts = list(zip((query.clone() for query in queries.split(1, 2)), there.split(1, 1), strict=True))

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

    def can_drop(self, count: int, seen: int) -> bool:
        """Whether without the queries of the last `count` tokens of `seen` there are as many as a step wants."""
        if self.wanted is None:
            return sum(queries.shape[2] for queries, _ in self._parts) >= count
        return self._fewest(self._parts) - count >= min(self.wanted, seen - count)

    def drop_last(self, count: int) -> None:
        """Forgets the queries of the last `count` tokens of the batch."""
        while count:
            queries, valid = self._parts.pop()
            left = queries.shape[2] - count
            if left > 0:
                self._parts.append((queries[:, :, :left], None if valid is None else valid[:, :left]))
            count = max(0, -left)
        self._trim()

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
