"""One row of a layer as a step sees it: what is held of it, and the tokens that are new.

slots     . . a b|x y      of each head, the prefix's entries in the last slots before the new tokens
c d e f|x y
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from defensivekv.cache import RaggedLayer, RaggedPrefix
from defensivekv.integrations.transformers.pending import Pending
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies import Observation
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.layout import ABSENT, Layout
from defensivekv.policies.steps import Facts, Stepper

_KEY_ELEMENTS = 2**22
"""Of the keys that are laid out at a time, at most, where a head does not have more."""


@dataclass(frozen=True, eq=False)
class LayerRow:
    """One row of a layer.

    prefix, slots: what is held, (h, p) numbers of entries, -1 in empty slots; no prefix: (h, 0). keys, values: of the
    new tokens, without pads. layout: of all slots. places: where they are among the slots of the batch.
    """

    prefix: RaggedPrefix | None
    slots: Int[Tensor, "h p"]
    keys: Float[Tensor, "h x d"]
    values: Float[Tensor, "h x v"]
    layout: Layout
    places: Int[Tensor, " m"]

    @classmethod
    def of(cls, store: RaggedLayer, row: int, valid: Bool[Tensor, "b x"] | None, texts: Texts) -> "LayerRow | None":
        """That row of a layer with a tail; None where it has no entries yet.

        valid: False at the tail's pads. texts: with the tail's tokens.
        """
        tail, view = store.tail, store.view
        assert tail is not None
        keys, values = tail.keys[row], tail.values[row]
        own = torch.arange(tail.used, device=keys.device)
        if valid is not None and not bool(valid[row].all()):
            own = valid[row].nonzero().squeeze(-1).to(keys.device)
            keys, values = keys[:, own], values[:, own]
        if view is None:
            prefix, slots = None, own.new_empty(len(keys), 0)
        else:
            prefix, slots = view.prefix, view.prefix.slots((view.rows[row],))[0]
        if not slots.shape[1] + len(own):
            return None
        tokens, width = texts.tokens[row], store.num_slots - tail.used
        layout = Layout(slots.shape[1] + len(own), tokens)
        if prefix is not None:
            positions = texts.places(row, prefix.positions[slots.clamp_min(0)]).masked_fill(slots < 0, ABSENT)
            latest = torch.arange(tokens - len(own), tokens, dtype=positions.dtype, device=positions.device)
            layout = Layout(layout.num_slots, tokens, torch.cat((positions, latest.expand(len(positions), -1)), dim=1))
        places = torch.cat((torch.arange(width - slots.shape[1], width, device=keys.device), width + own))
        return cls(prefix, slots, keys, values, layout, places)

    @property
    def num_new(self) -> int:
        """Tokens that are new."""
        return int(self.keys.shape[1])

    def pinned(self, before: int) -> Bool[Tensor, "h m"]:
        """Slots with entries of tokens of the batch before that one."""
        if self.prefix is None:
            return torch.zeros(len(self.keys), self.layout.num_slots, dtype=torch.bool, device=self.keys.device)
        early = (self.prefix.positions[self.slots.clamp_min(0)] < before) & (self.slots >= 0)
        return F.pad(early, (0, self.num_new))

    def facts(self, stepper: Stepper, queries: Float[Tensor, "q w d"], pending: Pending) -> Facts:
        """What is known of all slots before anything new is heard; zero in empty ones, and where nothing is known."""
        known = None if self.prefix is None else self.prefix.facts
        facts = torch.zeros(*self.slots.shape, stepper.num_facts, device=self.keys.device)
        if known is not None:
            facts = known[self.slots.clamp_min(0)].masked_fill_((self.slots < 0).unsqueeze(-1), 0.0)
        if not self.num_new:
            return facts
        arriving = Observation(
            queries=queries[None, :, -1:],
            keys=self.keys[None],
            values=self.values[None],
            output_projection=pending.projection(self.values, stepper.policy),
        )
        new = stepper.arrive(arriving, self.layout.num_tokens - self.num_new)
        return torch.cat((facts, new), dim=1)

    def hear(self, stepper: Stepper, queries: Float[Tensor, "q w d"], facts: Facts, pending: Pending) -> Evidence:
        """What is known of all slots once these queries were heard too."""
        return Evidence.of_heads(list(self._hear(stepper, queries, facts, pending)))

    def _hear(
        self, stepper: Stepper, queries: Float[Tensor, "q w d"], facts: Facts, pending: Pending
    ) -> Iterator[Evidence]:
        """Of some heads after the other, so that little is laid out at a time."""
        (h, m), layout, sinks = facts.shape[:2], self.layout, pending.sinks
        groups, step = queries.shape[0] // h, h
        if layout.positions is not None:
            # Scorers that look at keys alone take every slot for an entry.
            alone = stepper.policy.scorer.sees == "nothing"
            step = 1 if alone else max(1, _KEY_ELEMENTS // (m * self.keys.shape[2]))
        for start in range(0, h, step):
            heads = slice(start, min(start + step, h))
            asking = slice(heads.start * groups, heads.stop * groups)
            slots = self.slots[heads]
            empty = int((slots < 0).sum(-1).min()) if slots.shape[1] else 0
            positions = None if layout.positions is None else layout.positions[heads, empty:]
            observation = Observation(
                queries=queries[None, asking],
                keys=self._laid_out("keys", heads, empty)[None],
                values=self._laid_out("values", heads, empty)[None],
                scaling=pending.scaling,
                softcap=pending.softcap,
                sinks=None if sinks is None else sinks[asking],
                layout=Layout(m - empty, layout.num_tokens, positions),
            )
            yield _widened(stepper.hear(observation, facts[heads, empty:]), empty)

    def _laid_out(self, name: str, heads: slice, empty: int) -> Float[Tensor, "h m d"]:
        """Keys or values in their slots, from slot `empty` on; in an empty one, those of some entry."""
        new: Tensor = getattr(self, name)[heads]
        if self.prefix is None:
            return new
        stored: Tensor = getattr(self.prefix, name)
        return torch.cat((stored[self.slots[heads, empty:].clamp_min(0)], new), dim=1)


def _widened(evidence: Evidence, more: int) -> Evidence:
    """The same with so many empty slots before."""
    if not more:
        return evidence
    sums = None if evidence.sums is None else F.pad(evidence.sums, (more, 0))
    return Evidence(F.pad(evidence.reduced, (more, 0)), F.pad(evidence.counts, (more, 0)), sums, None)
