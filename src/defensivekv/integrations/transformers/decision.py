"""What is decided of one prompt: its scores, layer by layer, and what stays."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from torch import Tensor, nn

from defensivekv.errors import CacheError, DefensiveKVWarning, InvalidInputError
from defensivekv.integrations.transformers.model import output_projection
from defensivekv.policies import Observation, Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.observation import Rotary
from defensivekv.policies.policy import ScoredLayer, bytes_per_token
from defensivekv.types import Kept, Keys, Values

_PAD_RUN = 4
_MAX_DRAFTS = 512


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
        needed = policy.window_size + _MAX_DRAFTS
        if policy.scorer.sees == "prompt" or self.queries.shape[2] <= needed:
            return self
        if self.valid is not None and not bool(self.valid[:, -needed:].all()):
            return self
        return replace(self, queries=self.queries[:, :, -needed:].clone())

    def without_queries(self) -> "Pending":
        """The same, to wait for a repetition: its own queries will not be looked at."""
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
        if count > _MAX_DRAFTS:
            raise CacheError(f"{count} drafts cannot be taken back: at most {_MAX_DRAFTS} may follow the prompt")
        valid = None if self.valid is None else self.valid[:, :-count]
        return replace(self, queries=self.queries[:, :, :-count], valid=valid)

    def observation(
        self, keys: Keys, values: Values, policy: Policy, *, repeats: tuple[int, int] | None = None
    ) -> Observation:
        """What the policy is shown of the layer. repeats: what part of the prompt these queries repeat."""
        wanted = policy.window_size if policy.scorer.sees in ("window", "nothing") else self.queries.shape[2]
        queries = _window_queries(self.queries, self.valid, wanted)
        projection = None
        if policy.weighting is not None and policy.weighting.needs_projection and repeats is None:
            projection = output_projection(self.module, queries.shape[1] * values.shape[-1]).to(values.device)
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


class PromptDecision:
    """The decision on one prompt.

    layers: numbers of the evicted layers, in order. rows: tokens of each row, pads left out; empty before the
    prompt. shares: what each row keeps. valid: (b, t), False at pads; None: no pads. bytes_per_token: of all evicted
    layers together.
    """

    def __init__(self, policy: Policy, layers: tuple[int, ...]) -> None:
        self.policy = policy
        self.layers = layers
        self.rows: tuple[int, ...] = ()
        self.shares: tuple[Fraction, ...] = ()
        self.valid: Tensor | None = None
        self.bytes_per_token = 0
        self._scored: dict[int, ScoredLayer] = {}

    @property
    def is_underway(self) -> bool:
        """Whether scores wait for those of further layers."""
        return bool(self._scored)

    def add(self, layer: int, observation: Observation, evidence: Sequence[Evidence] | None = None) -> dict[int, Kept]:
        """Scores a layer; gives what stays in the layers that this decides: this one, or at last all, or none.

        evidence: of each row, where it was gathered before.
        """
        if layer == self.layers[0]:
            _check_pads(observation)
        size = bytes_per_token(observation) * len(self.layers)
        self.rows, self.bytes_per_token = _row_lengths(observation), size
        self.valid = observation.valid
        self.shares = tuple(self.policy.row_share(tokens, size) for tokens in self.rows)
        try:
            scored = self.policy.score(
                observation, index=self.layers.index(layer), num_layers=len(self.layers), evidence=evidence
            )
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer}: {error}") from None
        if layer == self.layers[-1]:
            self._say_what_is_whole()
        if not self.policy.allocation.spans_layers:
            return {layer: self.policy.keep([scored], list(self.shares))[0]}
        self._scored[layer] = scored
        if len(self._scored) < len(self.layers):
            return {}
        competing, self._scored = self._scored, {}
        return dict(zip(competing, self.policy.keep(list(competing.values()), list(self.shares)), strict=True))

    def fork(self) -> "PromptDecision":
        """The same decision, to go on by itself."""
        twin = PromptDecision(self.policy, self.layers)
        twin.rows, twin.shares, twin.bytes_per_token = self.rows, self.shares, self.bytes_per_token
        twin.valid = self.valid
        return twin

    def _say_what_is_whole(self) -> None:
        whole = [tokens for tokens, share in zip(self.rows, self.shares, strict=True) if share >= 1]
        if whole and not self.policy.budget.is_full:
            lengths = ", ".join(str(tokens) for tokens in sorted(set(whole)))
            warnings.warn(
                f"{len(whole)} of {len(self.rows)} prompts ({lengths} tokens) are kept whole: "
                f"too short for budget {self.policy.budget}",
                DefensiveKVWarning,
                stacklevel=7,
            )


def _row_lengths(observation: Observation) -> tuple[int, ...]:
    if observation.valid is None:
        return (observation.num_tokens,) * observation.keys.shape[0]
    return tuple(observation.valid.sum(-1).tolist())


def _window_queries(queries: Tensor, valid: Tensor | None, window_size: int) -> Tensor:
    """The last `window_size` valid queries of each row (fewer: the first ones are repeated pads, never read)."""
    if valid is None or bool(valid[:, -window_size:].all()):
        return queries[:, :, -window_size:]
    positions = torch.arange(valid.shape[1], device=valid.device)
    last = positions.masked_fill(~valid, -1).sort(dim=-1).values[:, -window_size:].clamp_min(0)
    index = last[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    return queries.gather(2, index)


def _check_pads(observation: Observation) -> None:
    """Raises where some rows of an unmasked batch begin with one token repeated: pads that nobody named.

    A cache is not told the tokens. Causal attention over equal tokens gives equal outputs, so that equal tokens at
    the start show as equal values. Padding leaves its longest row as it is and fills the others with one token; text
    that begins with the same token `_PAD_RUN` times in some rows only is rare, and does so with a token of its own.
    """
    b, t = observation.keys.shape[0], observation.num_tokens
    if observation.valid is not None or b == 1 or t < _PAD_RUN:
        return
    start = observation.values[:, :, :_PAD_RUN].float()
    first = start[:, :, :1]
    repeated = torch.isclose(start, first, rtol=1e-4, atol=1e-6).flatten(1).all(-1)
    if not bool(repeated.any()) or bool(repeated.all()):
        return
    fillers = first[repeated]
    if bool(torch.isclose(fillers, fillers[:1], rtol=1e-4, atol=1e-6).all()):
        rows = ", ".join(str(row) for row in repeated.nonzero().flatten().tolist())
        raise InvalidInputError(
            f"rows {rows} of the batch begin with one token repeated, which looks like padding, and the attention mask "
            "hides none of it: pass the tokenizer's attention_mask to generate() or to the model, or, where a prompt "
            "really begins so, pass it in a batch of its own"
        )
