"""What the attention shows of a prompt, or of the tokens of a step, until it is decided on."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from defensivekv.errors import CacheError
from defensivekv.integrations.transformers.model import output_projection
from defensivekv.policies import Observation, Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.observation import Rotary
from defensivekv.types import Keys, OutputProjection, Values

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
            sinks=self.sinks,
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
