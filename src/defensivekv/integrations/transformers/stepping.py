"""Eviction in steps: after each chunk of a prompt, and while tokens are generated, for as long as there is a bound.

One step, layer by layer: the latest queries are heard on what is held, prefix and tail compete by one rule, and what
is kept of both becomes the prefix. Everything is row by row; keys of a ragged prefix are laid out for a few heads at a
time, so that little is copied at once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from defensivekv.cache import PrefixView, RaggedLayer
from defensivekv.errors import InvalidInputError
from defensivekv.integrations.transformers.bound import Bound, LayerSizes, Limits
from defensivekv.integrations.transformers.competition import Competition
from defensivekv.integrations.transformers.decision import check_pads, say_what_is_whole
from defensivekv.integrations.transformers.pending import Pending
from defensivekv.integrations.transformers.query_log import QueryLog
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies import Observation, Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.layout import ABSENT, Layout
from defensivekv.policies.scored import ScoredLayer
from defensivekv.policies.steps import Stepper, check_evicts_in_steps, merged
from defensivekv.types import Kept

_KEY_ELEMENTS = 2**22
"""Of the keys that are laid out at a time, at most, where a head does not have more."""


class Stepping:
    """Eviction in steps, of one cache.

    bound: what may be held at any moment; None: only the prompt's chunks are evicted from. expected: tokens of the
    prompt, pads counted; None: whatever comes first. texts: the rows of the batch, as far as they were decided on.
    pinned: tokens of the batch, of whose entries what is held was decided on before this began, and stays.
    """

    def __init__(self, policy: Policy, layers: tuple[int, ...], bound: Bound | None) -> None:
        check_evicts_in_steps(policy)
        self.policy = policy
        self.stepper = Stepper(policy)
        self.bound = bound
        self.expected: int | None = None
        self.texts = Texts()
        self.pinned = 0
        self.sizes: LayerSizes | None = None
        self._competition = Competition(policy, layers)
        self._grown = Texts()
        self._facts: dict[int, Float[Tensor, "b h m f"]] = {}

    def fork(self) -> "Stepping":
        """The same, to go on by itself."""
        twin = Stepping(self.policy, self._competition.layers, self.bound)
        twin.expected, twin.texts, twin.sizes, twin.pinned = self.expected, self.texts, self.sizes, self.pinned
        return twin

    @property
    def is_underway(self) -> bool:
        """Whether layers wait for others."""
        return self._competition.is_underway

    def new_log(self) -> QueryLog:
        """For the queries of one layer."""
        sees = self.policy.scorer.sees
        return QueryLog(None if sees == "prompt" else self.stepper.num_queries(1))

    def limits(self, num_rows: int) -> Limits | None:
        """What the bound comes to; None without one. Raises BudgetError where that is too little."""
        if self.bound is None:
            return None
        assert self.sizes is not None
        return self.bound.limits(self.sizes, num_rows)

    def listens(self, seen: int) -> bool:
        """Whether the queries of the tokens after `seen` are of interest."""
        return self.bound is not None or self.is_reading(seen)

    def is_reading(self, seen: int) -> bool:
        """Whether the tokens after `seen` are still the prompt's."""
        return seen < self.expected if self.expected is not None else seen == 0

    def is_due(self, seen: int, tail: int, num_rows: int) -> bool:
        """Whether there is a step after tokens that followed `seen`, with `tail` tokens since the last one."""
        if self.is_reading(seen):
            return True
        limits = self.limits(num_rows)
        return limits is not None and tail >= limits.interval

    def check(self, sizes: LayerSizes, seen: int, new: int, num_rows: int) -> None:
        """Raises BudgetError or InvalidInputError where `new` tokens after `seen` cannot be stepped over as asked."""
        self.sizes = sizes
        self.limits(num_rows)
        if not self.is_reading(seen):
            return
        if self._prompt_has_budget:
            self._of_prompt(seen + new, seen + new)
        if self.expected is None:
            return
        if seen + new > self.expected:
            raise InvalidInputError(
                f"{seen + new} tokens of a prompt that expect() said to have {self.expected}: say how long it really is"
            )
        if new < self.policy.num_window and seen + new < self.expected:
            raise InvalidInputError(
                f"a chunk of {new} tokens is less than the window of {self.policy.num_window} that observes: give "
                "chunks of at least as many, or a smaller window_size"
            )

    # ------------------------------------------------------------------ one step

    def step(self, layer: int, store: RaggedLayer, log: QueryLog, pending: Pending) -> dict[int, "Stays"]:
        """Hears the queries of a layer; gives what stays in the layers from which something goes now.

        pending: of the last forward pass; its `valid` is of the tail.
        """
        layers, tail = self._competition.layers, store.tail
        assert tail is not None
        index, b = layers.index(layer), tail.keys.shape[0]
        try:
            if index == 0:
                self._begin(store, pending)
            rows = [self._row(row, store, log, pending) for row in range(b)]
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer}: {error}") from None
        shares = self._shares(store, b)
        scores = tail.keys.new_full((b, *tail.keys.shape[1:2], store.num_slots), float("-inf"), dtype=torch.float32)
        facts = tail.keys.new_zeros(*scores.shape, self.stepper.num_facts, dtype=torch.float32)
        for number, row in enumerate(rows):
            if row is None:
                continue
            rated = self.stepper.rate(row.evidence, row.facts, row.layout, shares[number])
            if row.pinned is not None:
                rated.masked_fill_(row.pinned, float("inf"))
            scores[number][:, row.places], facts[number][:, row.places] = rated, row.facts
        tokens, count = self._grown.tokens, len(layers)
        scored = ScoredLayer(scores, tokens, (1.0,) * b, index, count)
        self._facts[layer] = facts
        # A chunk of more than may stay would be held in every layer otherwise.
        streams = any(tail.used > share * length for share, length in zip(shares, tokens, strict=True))
        kept = self._competition.add(layer, scored, shares, streams=streams)
        if self.policy.scorer.sees == "prompt":
            log.clear()
        stays = {number: Stays(mask, self._facts.pop(number, None)) for number, mask in kept.items()}
        if index == len(layers) - 1:
            self._end(store, shares)
        return stays

    def _begin(self, store: RaggedLayer, pending: Pending) -> None:
        tail = store.tail
        assert tail is not None
        start, valid = store.seen - tail.used, pending.valid
        b = tail.keys.shape[0]
        counts = [tail.used] * b if valid is None else valid.sum(-1).tolist()
        if start == 0:
            check_pads(tail.values, valid)
        self._grown = self.texts.grown(start, valid, counts)

    def _end(self, store: RaggedLayer, shares: Sequence[Fraction]) -> None:
        self.texts = replace(self._grown, shares=tuple(min(Fraction(1), share) for share in shares))
        self._facts = {}
        if self.is_reading(store.seen - store.tail_length) and not self.is_reading(store.seen):
            say_what_is_whole(self.policy, self.texts)

    def _shares(self, store: RaggedLayer, num_rows: int) -> list[Fraction]:
        """Of the tokens that each row has so far, what may stay."""
        tokens = self._grown.tokens
        limits, most = self.limits(num_rows), [Fraction(count) for count in tokens]
        if limits is not None:
            alive = [0 if row in self.texts.released else count for row, count in enumerate(tokens)]
            most = limits.of_rows(alive)
        if self.is_reading(store.seen - store.tail_length) and self._prompt_has_budget:
            most = [min(limit, self._of_prompt(store.seen, count)) for limit, count in zip(most, tokens, strict=True)]
        return [min(Fraction(1), limit / max(1, count)) for limit, count in zip(most, tokens, strict=True)]

    @property
    def _prompt_has_budget(self) -> bool:
        """Whether the policy's budget says something of the prompt that the bound does not."""
        return not self.policy.budget.is_full and self.policy.budget.kind != "bytes"

    def _of_prompt(self, seen: int, tokens: int) -> Fraction:
        """Entries per head that a row of the prompt may keep. tokens: of it that were read, pads left out."""
        assert self.sizes is not None
        whole = tokens + max(0, (self.expected or 0) - seen)
        size = self.sizes.num_layers * self.sizes.num_heads * self.sizes.token_bytes
        return self.policy.row_share(max(1, whole), size) * whole

    # ------------------------------------------------------------------ one row

    def _row(self, row: int, store: RaggedLayer, log: QueryLog, pending: Pending) -> "_Row | None":
        tail = store.tail
        assert tail is not None
        if row in self.texts.released:
            return None
        own = (
            None
            if pending.valid is None or bool(pending.valid[row].all())
            else pending.valid[row].nonzero().squeeze(-1)
        )
        keys, values = tail.keys[row], tail.values[row]
        if own is not None:
            keys, values = keys[:, own], values[:, own]
        before = self.texts.tokens[row] if self.texts.tokens else 0
        held = _held(store.view, row)
        most = keys.shape[1] if self.policy.scorer.sees == "prompt" else self.stepper.num_queries(1)
        queries = log.of_row(row, most)
        if keys.shape[1] == 0 and held.slots.shape[1] == 0:
            return None
        facts = self._facts_of(held, keys, values, queries, before, pending)
        layout = self._layout(row, held, keys.shape[1], before)
        evidence = merged(list(self._hear(held, keys, values, queries, facts, layout, pending)))
        self.stepper.record(evidence, facts)
        width = store.num_slots - tail.used
        prefix = torch.arange(width - held.slots.shape[1], width, device=keys.device)
        tokens = torch.arange(tail.used, device=keys.device) if own is None else own
        return _Row(evidence, facts, layout, torch.cat((prefix, width + tokens)), self._pinned(held, layout))

    def _pinned(self, held: "_Held", layout: Layout) -> Bool[Tensor, "h m"] | None:
        if not self.pinned or held.view is None:
            return None
        positions = held.view.prefix.positions[held.slots.clamp_min(0)]
        pinned = (positions < self.pinned) & (held.slots >= 0)
        return F.pad(pinned, (0, layout.num_slots - pinned.shape[1]))

    def _facts_of(
        self, held: "_Held", keys: Tensor, values: Tensor, queries: Tensor, before: int, pending: Pending
    ) -> Float[Tensor, "h m f"]:
        if keys.shape[1] == 0:
            return held.facts(self.stepper.num_facts)
        arriving = Observation(
            queries=queries[None, :, -1:],
            keys=keys[None],
            values=values[None],
            output_projection=pending.projection(values, self.policy),
        )
        new = self.stepper.arrive(arriving, before)
        return torch.cat((held.facts(self.stepper.num_facts), new), dim=1) if held.slots.shape[1] else new

    def _layout(self, row: int, held: "_Held", new: int, before: int) -> Layout:
        slots = held.slots.shape[1] + new
        if not held.slots.shape[1]:
            return Layout(slots, before + new)
        assert held.view is not None
        positions = self._grown.places(row, held.view.prefix.positions[held.slots.clamp_min(0)])
        positions = positions.masked_fill(held.slots < 0, ABSENT)
        latest = torch.arange(before, before + new, dtype=positions.dtype, device=positions.device)
        return Layout(slots, before + new, torch.cat((positions, latest.expand(len(positions), -1)), dim=1))

    def _hear(
        self,
        held: "_Held",
        keys: Float[Tensor, "h x d"],
        values: Float[Tensor, "h x v"],
        queries: Float[Tensor, "q w d"],
        facts: Float[Tensor, "h m f"],
        layout: Layout,
        pending: Pending,
    ) -> Iterator[Evidence]:
        """What was heard of some heads after the other, in the slots of all."""
        h, m = facts.shape[:2]
        groups = queries.shape[0] // h
        step = h
        if layout.positions is not None:
            # Scorers that look at keys alone take every slot for an entry.
            step = 1 if self.policy.scorer.sees == "nothing" else max(1, _KEY_ELEMENTS // (m * keys.shape[2]))
        for start in range(0, h, step):
            heads = slice(start, min(start + step, h))
            slots = held.slots[heads]
            used = int((slots >= 0).sum(-1).max()) if slots.shape[1] else 0
            slots = slots[:, slots.shape[1] - used :]
            shown = used + keys.shape[1]
            positions = None if layout.positions is None else layout.positions[heads, m - shown :]
            observation = Observation(
                queries=queries[None, heads.start * groups : heads.stop * groups],
                keys=held.joined(slots, keys[heads], "keys")[None],
                values=held.joined(slots, values[heads], "values")[None],
                scaling=pending.scaling,
                softcap=pending.softcap,
                sinks=None if pending.sinks is None else pending.sinks[heads.start * groups : heads.stop * groups],
                layout=Layout(shown, layout.num_tokens, positions),
            )
            yield _widened(self.stepper.hear(observation, facts[heads, m - shown :]), m - shown)


@dataclass(frozen=True)
class Stays:
    """Of one layer, what stays, and what is known of it; None: as before."""

    kept: Kept
    facts: Float[Tensor, "b h m f"] | None


@dataclass(frozen=True)
class _Row:
    """One row of a layer, heard. places: of its slots, in those of the batch. pinned: slots whose entries stay."""

    evidence: Evidence
    facts: Float[Tensor, "h m f"]
    layout: Layout
    places: Int[Tensor, " m"]
    pinned: Bool[Tensor, "h m"] | None


@dataclass(frozen=True)
class _Held:
    """One row of a prefix. slots: (h, p) numbers of its entries, each head's in the last slots; -1 in empty ones."""

    view: PrefixView | None
    slots: Int[Tensor, "h p"]

    def facts(self, count: int) -> Float[Tensor, "h p f"]:
        """Zero in empty slots, and where nothing is known."""
        assert self.view is not None
        known = self.view.prefix.facts
        if known is None:
            return torch.zeros(*self.slots.shape, count, device=self.slots.device)
        return known[self.slots.clamp_min(0)].masked_fill_((self.slots < 0).unsqueeze(-1), 0.0)

    def joined(self, slots: Int[Tensor, "h p"], new: Float[Tensor, "h x d"], name: str) -> Float[Tensor, "h m d"]:
        """Keys or values of these slots, and the new ones; of an empty slot, some entry's."""
        if self.view is None or not slots.shape[1]:
            return new
        stored: Tensor = getattr(self.view.prefix, name)
        return torch.cat((stored[slots.clamp_min(0)], new), dim=1)


def _held(view: PrefixView | None, row: int) -> _Held:
    if view is None:
        return _Held(None, torch.empty(0, 0, dtype=torch.long))
    return _Held(view, view.prefix.slots((view.rows[row],))[0])


def _widened(evidence: Evidence, more: int) -> Evidence:
    """The same with so many empty slots before."""
    if not more:
        return evidence
    sums = None if evidence.sums is None else F.pad(evidence.sums, (more, 0))
    return Evidence(F.pad(evidence.reduced, (more, 0)), F.pad(evidence.counts, (more, 0)), sums, None)
