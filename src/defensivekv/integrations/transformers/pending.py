"""What the attention shows of a prompt, or of the tokens of a step, until it is decided on."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from defensivekv.errors import CacheError
from defensivekv.integrations.transformers.model import output_projection
from defensivekv.policies import Observation, Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.observation import Rotary
from defensivekv.types import Keys, OutputProjection, Queries, Values

MAX_DRAFTS = 512
"""Drafts that may be taken back at a time."""


@dataclass
class Pending:
    """A prompt that was read and is not decided yet.

    positions: (1 or b, t) as the model counts them; None: from 0. evidence: of each row, where a repetition of the
    prompt was heard.
    queries: (b, q, x, d) of its last tokens, all that the window can need. valid: (b, t), False at pads; None: no
    pads.
    """

    module: nn.Module
    queries: Tensor
    valid: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    positions: Tensor | None = None
    evidence: tuple[Evidence, ...] | None = None
    rotary: Rotary | None = None

    def for_drafts(self, policy: Policy) -> "Pending":
        """The same, to wait for its drafts: without the queries that no window will need, which may be large."""
        needed = policy.window_size + MAX_DRAFTS
        if policy.scorer.sees == "prompt" or self.queries.shape[2] <= needed:
            return self
        if self.valid is not None and not bool(self.valid[:, -needed:].all()):
            return self
        return replace(self, queries=self.queries[:, :, -needed:].clone())

    def without_queries(self) -> "Pending":
        """The same, to wait for something: its own queries will not be looked at."""
        return replace(self, queries=self.queries[:, :, -1:].clone())

    def with_evidence(self, evidence: list[Evidence], policy: Policy) -> "Pending":
        """The same with that of a further repetition; one for each row."""
        before = self.evidence
        merged = (
            evidence
            if before is None
            else [seen.merge(heard, policy.aggregation) for seen, heard in zip(before, evidence, strict=True)]
        )
        return replace(self, evidence=tuple(merged))

    def without_last(self, count: int) -> "Pending":
        """The same without the last `count` tokens, which turned out to be wrong drafts."""
        if count == 0:
            return self
        if count > MAX_DRAFTS:
            raise CacheError(f"{count} drafts cannot be taken back: at most {MAX_DRAFTS} may follow the prompt")
        valid = None if self.valid is None else self.valid[:, :-count]
        return replace(self, queries=self.queries[:, :, :-count], valid=valid)

    def observation(
        self, keys: Keys, values: Values, policy: Policy, *, repeats: tuple[int, int] | None = None
    ) -> Observation:
        """What the policy is shown of the layer. repeats: what part of the prompt these queries repeat."""
        wanted = policy.window_size if policy.scorer.sees in ("window", "nothing") else self.queries.shape[2]
        queries = window_queries(self.queries, self.valid, wanted)
        projection = self.projection(values, policy) if repeats is None else None
        return Observation(
            queries=queries.detach(),
            keys=keys,
            values=values,
            output_projection=projection,
            scaling=self.scaling,
            valid=self.valid if repeats is None else None,
            softcap=self.softcap,
            sinks=None if self.sinks is None else self.sinks.detach(),
            rotary=self.rotary,
            repeats=repeats,
        )

    def projection(self, values: Values, policy: Policy) -> OutputProjection | None:
        """The layer's output projection, where the policy asks for it."""
        if policy.weighting is None or not policy.weighting.needs_projection:
            return None
        return output_projection(self.module, self.queries.shape[1] * values.shape[-1]).to(values.device)


def window_queries(queries: Tensor, valid: Tensor | None, window_size: int) -> Tensor:
    """The last `window_size` valid queries of each row (fewer: the first ones are repeated pads, never read)."""
    if valid is None or bool(valid[:, -window_size:].all()):
        return queries[:, :, -window_size:]
    positions = torch.arange(valid.shape[1], device=valid.device)
    last = positions.masked_fill(~valid, -1).sort(dim=-1).values[:, -window_size:].clamp_min(0)
    index = last[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    return queries.gather(2, index)


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
        return torch.cat(parts, dim=1)[:, -most:]

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
