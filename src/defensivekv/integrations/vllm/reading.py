"""A prompt, or a chunk of one, in a step: attention over it, and at its end what stays."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from defensivekv.cache import RaggedPrefix, filled_slots
from defensivekv.errors import CacheError
from defensivekv.integrations.competition import Competition
from defensivekv.integrations.vllm.pages import PageStore
from defensivekv.integrations.vllm.plan import EvictionPlan
from defensivekv.integrations.vllm.state import RequestState
from defensivekv.policies import Observation


@dataclass(frozen=True, eq=False)
class LayerTokens:
    """What an attention layer is given of some tokens, and where its output goes.

    number: of the layer. projection: (hidden, q * d), where the policy asks for it.
    """

    number: int
    queries: Float[Tensor, "x q d"]
    keys: Float[Tensor, "x h d"]
    values: Float[Tensor, "x h d"]
    output: Float[Tensor, "x q d"]
    scaling: float
    projection: Float[Tensor, "hidden qd"] | None

    def part(self, tokens: slice) -> "LayerTokens":
        """Of these tokens; the output is written through."""
        return replace(
            self,
            queries=self.queries[tokens],
            keys=self.keys[tokens],
            values=self.values[tokens],
            output=self.output[tokens],
        )


@dataclass(eq=False)
class PromptPart:
    """Tokens of one request's prompt in a step.

    tokens: where they are in the step. start: of the prompt, how many were read before. earlier: (start, h) rows of
    their keys in layer 0. writes: (x, h) rows for these tokens, where more follow; None: they are the last.
    blocks: for what stays.
    """

    plan: EvictionPlan
    store: PageStore
    state: RequestState
    tokens: slice
    start: int
    earlier: Int[Tensor, "t h"]
    writes: Int[Tensor, "x h"] | None
    blocks: Int[Tensor, " n"]
    _competitions: list[Competition] = field(default_factory=list)
    _held: dict[tuple[int, int], RaggedPrefix] = field(default_factory=dict)
    _recalled: list[tuple[int, int, RaggedPrefix, Bool[Tensor, "h t"]]] = field(default_factory=list)

    def read(self, tokens: LayerTokens) -> None:
        """Attends, then stores the tokens, or decides."""
        keys, values = tokens.keys.transpose(0, 1), tokens.values.transpose(0, 1)
        offset = tokens.number * self.store.layout.layer_stride
        if self.start:
            before = self.store.read(self.earlier + offset)
            keys, values = torch.cat((before[0], keys), 1), torch.cat((before[1], values), 1)
        tokens.output.copy_(attend_causally(tokens.queries, keys, values, tokens.scaling))
        window = self._listen(tokens)
        if self.writes is not None:
            self.store.write(self.writes + offset, tokens.keys, tokens.values)
            return
        known = self._known(tokens.number)
        if known is None:
            self._decide(tokens, window, keys, values)
            return
        first, kept = known
        stays = RaggedPrefix.gather(keys[None], values[None], kept[None].to(keys.device))
        self._recalled.append((tokens.number, first, stays, kept))
        # Where layers share pages, those that are still to come have earlier chunks in them.
        if not (self.plan.packs_layers and self.start) or tokens.number == self.plan.layers - 1:
            for recalled in self._recalled:
                self._store(*recalled)
            self._recalled = []

    def _known(self, layer: int) -> tuple[int, Bool[Tensor, "h t"]] | None:
        """Where a layer's kept rows begin and what stays, where nothing needs to be scored for it."""
        heads, prompt = self.plan.heads, self.state.prompt
        kept = self.state.recall(layer)
        if kept is not None:
            return int(self.state.starts[layer, 0]), kept
        if self.plan.share(prompt) < 1:
            return None
        return layer * heads * prompt if self.plan.packs_layers else 0, torch.ones(heads, prompt, dtype=torch.bool)

    def _listen(self, tokens: LayerTokens) -> Float[Tensor, "w q d"]:
        """The latest queries of those that observe, earlier chunks' included; kept while more follow."""
        window, state, read = self.plan.policy.window_size, self.state, len(tokens.queries)
        unread = state.prompt - self.start - read
        observing = tokens.queries[max(0, read - max(0, window - unread)) :]
        heard = torch.cat((*state.queries[tokens.number], observing))
        state.queries[tokens.number] = [heard] if self.writes is not None and len(heard) else []
        return heard

    def _decide(
        self,
        tokens: LayerTokens,
        window: Float[Tensor, "w q d"],
        keys: Float[Tensor, "h t d"],
        values: Float[Tensor, "h t d"],
    ) -> None:
        plan, layer, share = self.plan, tokens.number, self.plan.share(self.state.prompt)
        if layer == 0:
            every = tuple(range(plan.layers))
            self._competitions = [Competition(plan.policy, every) for _ in range(plan.groups)]
        size = plan.heads // plan.groups
        for group, competition in enumerate(self._competitions):
            heads = slice(group * size, (group + 1) * size)
            scored = plan.policy.score(
                observation(tokens, window, keys[heads], values[heads], heads),
                index=layer,
                num_layers=plan.layers,
                shares=[share],
            )
            going = competition.add(layer, scored, [share])
            own = going.pop(layer, None)
            if own is None:
                own = torch.ones_like(scored.scores, dtype=torch.bool)
            self._held[layer, group] = RaggedPrefix.gather(keys[heads][None], values[heads][None], own)
            for number, kept in going.items():
                self._held[number, group] = shrink(self._held[number, group], kept)
        if not plan.packs_layers:
            self._store_layer(layer, 0)
        elif layer == plan.layers - 1:
            first = 0
            for number in range(plan.layers):
                first = self._store_layer(number, first)

    def _store_layer(self, layer: int, first: int) -> int:
        """Stores what is held of a layer; gives where the next one's rows begin."""
        stays = joined([self._held.pop((layer, group)) for group in range(self.plan.groups)])
        kept = torch.zeros(self.plan.heads, self.state.prompt, dtype=torch.bool)
        for head, positions in enumerate(stays.positions.cpu().split(list(stays.lengths[0]))):
            kept[head, positions.long()] = True
        self._store(layer, first, stays, kept)
        return first + len(stays.keys)

    def _store(self, layer: int, first: int, stays: RaggedPrefix, kept: Bool[Tensor, "h t"]) -> None:
        layout, slots = self.store.layout, self.state.slots
        if first + len(stays.keys) > slots * layout.heads * layout.packed_layers:
            raise CacheError(f"layer {layer} keeps more than its request has room for: {len(stays.keys)} entries")
        numbers = torch.arange(first, first + len(stays.keys), device=self.blocks.device)
        rows = layout.rows(self.blocks, layout.kept(numbers, slots), layer)
        self.store.write(rows, stays.keys, stays.values)
        self.state.set_starts(layer, first, stays.lengths[0])
        self.state.remember(layer, kept)


def attend_causally(
    queries: Float[Tensor, "x q d"], keys: Float[Tensor, "h t d"], values: Float[Tensor, "h t d"], scaling: float
) -> Float[Tensor, "x q d"]:
    """Attention of the last tokens over all up to their own."""
    x, t = len(queries), keys.shape[1]
    mask = None
    if x < t:
        mask = torch.ones(x, t, dtype=torch.bool, device=queries.device).tril(t - x)
    output = F.scaled_dot_product_attention(
        queries.transpose(0, 1)[None],
        keys[None],
        values[None],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=True,
    )
    return output[0].transpose(0, 1)


def observation(
    tokens: LayerTokens,
    window: Float[Tensor, "w q d"],
    keys: Float[Tensor, "h t d"],
    values: Float[Tensor, "h t d"],
    heads: slice,
) -> Observation:
    """What the policy is shown of some key-value heads."""
    group = tokens.queries.shape[1] // tokens.keys.shape[1]
    first, last = heads.start * group, heads.stop * group
    size, projection = values.shape[-1], tokens.projection
    return Observation(
        queries=window.transpose(0, 1)[None, first:last],
        keys=keys[None],
        values=values[None],
        output_projection=None if projection is None else projection[:, first * size : last * size],
        scaling=tokens.scaling,
    )


def shrink(held: RaggedPrefix, kept: Bool[Tensor, "1 h p"]) -> RaggedPrefix:
    """Less of what is held. kept: in slots, each head's entries in its last ones."""
    slots = filled_slots(torch.tensor(held.lengths, device=kept.device))
    return held.take(kept[slots], (tuple(kept.sum(-1)[0].tolist()),))


def joined(groups: Sequence[RaggedPrefix]) -> RaggedPrefix:
    """The heads of groups, one after the other."""
    if len(groups) == 1:
        return groups[0]
    lengths = tuple(length for group in groups for length in group.lengths[0])
    return RaggedPrefix(
        torch.cat([group.keys for group in groups]),
        torch.cat([group.values for group in groups]),
        torch.cat([group.positions for group in groups]),
        (lengths,),
    )
