"""A policy: the frozen composition of scoring, aggregation, weighting, allocation and a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil, floor

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from defensivekv.budget import Budget, entry_bytes
from defensivekv.errors import BudgetError, InvalidInputError
from defensivekv.policies.aggregation import Aggregation, Mean
from defensivekv.policies.allocation import Allocation, Contender
from defensivekv.policies.evidence import Evidence, observe
from defensivekv.policies.layout import Layout
from defensivekv.policies.observation import Observation
from defensivekv.policies.scored import LayerKept, ScoredLayer, ScoredRow, entries_of_mass, place_rows
from defensivekv.policies.scoring import Scorer
from defensivekv.policies.standing import Staged, Standing
from defensivekv.policies.weighting import StagedWeighting, Weighting
from defensivekv.types import Kept, SlotScores

SHORT_PROMPT_WINDOWS = 8
"""A prompt shorter than this many times what always stays is kept whole where its budget is below that."""

_REASONS = {
    "queries": "sets one query against another, and {scorer} gives one importance for each entry",
    "masses": "takes scores for attention, and those of {scorer} are none",
    "one part": "needs all queries at once, and {scorer} gives them in parts",
    "levels": "lets heads compete, and {scorer} scores every head alike",
}


@dataclass(frozen=True)
class Policy:
    """What to keep of a prompt. Immutable: a policy can be shared by any number of caches and threads.

    name: the preset's name, or one of your own. budget: see `Budget`.
    scorer, aggregation, weighting, allocation: the parts; each has its own module.
    window_size: the observation window, the last tokens of the prompt, where the scorer has one.
    num_sinks: first tokens that always stay.
    protect_window: what always stays has an infinite score (True), or competes with the layer's maximum score as in
        the authors' code (False: parity mode), where a tight budget can take a whole layer's window.
    paper: address of the paper.

    Raises InvalidInputError for parts that cannot go together, with the reason.
    """

    name: str
    budget: Budget
    scorer: Scorer
    allocation: Allocation
    aggregation: Aggregation = field(default_factory=Mean)
    weighting: Weighting | None = None
    window_size: int = 32
    num_sinks: int = 0
    protect_window: bool = True
    paper: str = ""

    def __post_init__(self) -> None:
        if self.window_size < 1:
            raise InvalidInputError(f"window_size {self.window_size} must be at least 1")
        for part in (self.aggregation, self.weighting, self.allocation):
            if part is not None:
                self._check_together(part)
        if self.budget.is_adaptive and "masses" not in self.scorer.gives:
            raise InvalidInputError(
                f"budget {self.budget} asks for a share of the importance's mass, and {type(self.scorer).__name__} "
                f"({self.scorer.description}) gives none: choose a fixed budget, or another policy"
            )
        if self.budget.kind == "entries" and self.budget.amount < self.num_staying:
            raise BudgetError(
                f"budget {self.budget} is below {self._staying}: give at least {self.num_staying}{self._smaller_window}"
            )

    def _check_together(self, part: Aggregation | Weighting | Allocation) -> None:
        missing = part.needs - self.scorer.gives
        reason = next((_REASONS[need] for need in _REASONS if need in missing), None)
        if reason is not None:
            scorer = f"{type(self.scorer).__name__} ({self.scorer.description})"
            raise InvalidInputError(
                f"{type(part).__name__} ({part.description}) {reason.format(scorer=scorer)}: choose another of either"
            )

    @property
    def reads_twice(self) -> bool:
        """Whether the prompt must be read a second time, to hear it repeated, before anything can be decided."""
        return self.scorer.sees == "reconstruction" and not self.budget.is_full

    @property
    def spans_layers(self) -> bool:
        """Whether the decision on one layer waits for what all layers show."""
        return self.allocation.spans_layers or self.budget.is_adaptive

    @property
    def num_staying(self) -> int:
        """Entries of a head that always stay: its window and its first tokens; 1 where nothing does."""
        return max(1, self.num_sinks + (self.window_size if self.scorer.has_window else 0))

    @property
    def _staying(self) -> str:
        if self.scorer.has_window:
            sinks = f" and {self.num_sinks} first tokens" if self.num_sinks else ""
            return f"the observation window of {self.window_size}{sinks}"
        return f"the {self.num_staying} first tokens" if self.num_sinks else "one entry"

    @property
    def _smaller_window(self) -> str:
        return ", or a smaller window_size" if self.scorer.has_window and self.window_size > 1 else ""

    def row_share(self, num_tokens: int, bytes_per_token: int) -> Fraction:
        """The share of its entries that a prompt of `num_tokens` keeps; 1 where it is kept whole.

        bytes_per_token: what a token's entries take over all evicted layers. A prompt shorter than
        `SHORT_PROMPT_WINDOWS` times what always stays, whose budget is below that, is not worth compressing: kept
        whole. Raises BudgetError for longer ones, InvalidInputError for a prompt of no tokens.
        """
        if num_tokens < 1:
            raise InvalidInputError("the prompt has no tokens: pass at least one")
        share, staying = self.budget.share(num_tokens, bytes_per_token), self.num_staying
        if share >= 1 or num_tokens <= staying:
            return Fraction(1)
        if floor(num_tokens * share) >= staying:
            return share
        if num_tokens < SHORT_PROMPT_WINDOWS * staying:
            return Fraction(1)
        raise BudgetError(
            f"budget {self.budget} of a prompt of {num_tokens} tokens is {floor(num_tokens * share)} entries per "
            f"head, below {self._staying}: give at least "
            f"{ceil(10**4 * staying / num_tokens) / 10**4}{self._smaller_window}"
        )

    def observe(self, observation: Observation) -> list[Evidence]:
        """What the observation's queries say of each row, to be merged with that of others of the same prompt."""
        return [self._observe(row) for row in observation.rows()]

    @torch.no_grad()
    def score(
        self,
        observation: Observation,
        *,
        index: int = 0,
        num_layers: int = 1,
        evidence: Sequence[Evidence] | None = None,
        shares: Sequence[Fraction] | None = None,
        with_standing: bool = False,
    ) -> ScoredLayer:
        """Scores of one layer's entries. Every row is scored alone.

        index: of the layer among the `num_layers` evicted ones, which a budget in bytes is shared among (each layer
        getting an even part). evidence: of each row, where it was observed before; None: of this observation's queries.
        shares: what each row keeps; None: what the budget says. with_standing: whether the `Standing` of entries is
        wanted too, of rows that are kept whole as well.
        Raises InvalidInputError where keys, values, queries or scores hold NaN.
        """
        if shares is None:
            shares = self._shares(observation, bytes_per_token(observation) * num_layers)
        given = [None] * len(shares) if evidence is None else evidence
        rows = list(observation.rows())
        scored = [
            self._score_row(row, share, seen, with_standing)
            for row, share, seen in zip(rows, shares, given, strict=True)
        ]
        return ScoredLayer(
            place_rows([row.scores for row in scored], observation.valid),
            tuple(row.num_prompt_tokens for row in rows),
            tuple(row.preference for row in scored),
            index,
            num_layers,
            tuple(scored) if self.budget.is_adaptive or with_standing else (),
        )

    def keep(self, layers: Sequence[ScoredLayer], shares: Sequence[Fraction]) -> list[LayerKept]:
        """The kept sets, (b, h, t) for each layer; of layers that were evicted from before, in their own slots.

        layers: every layer that competes, from `score`: one layer, or all of them where the policy `spans_layers`; of
        fewer, whatever may stay in the end. shares: for each row, from `row_share` or `settle`.
        """
        kept = [torch.zeros_like(layer.scores, dtype=torch.bool) for layer in layers]
        for row, share in enumerate(shares):
            held = [(layer.scores[row] > float("-inf")).any(0) for layer in layers]
            if not any(bool(slots.any()) for slots in held):
                continue
            rows = [
                layer.scores[row] if bool(slots.all()) else layer.scores[row][:, slots]
                for layer, slots in zip(layers, held, strict=True)
            ]
            if share >= 1:
                row_kept = [scores > float("-inf") for scores in rows]
            else:
                row_kept = self.allocation(
                    [self._contender(*pair, row) for pair in zip(rows, layers, strict=True)], share
                )
            for layer_kept, slots, mask in zip(kept, held, row_kept, strict=True):
                layer_kept[row][:, slots] = mask
        return kept

    def _contender(self, scores: Float[Tensor, "h t"], layer: ScoredLayer, row: int) -> Contender:
        tokens, preference = layer.num_tokens[row], layer.preferences[row]
        return Contender(scores, layer.index, layer.num_layers, preference, self.num_window, tokens)

    def settle(
        self, layers: Sequence[ScoredLayer], shares: Sequence[Fraction]
    ) -> tuple[list[ScoredLayer], list[Fraction]]:
        """Once all layers are scored: their scores and what each row keeps.

        An adaptive budget is known only then. The scores are made again with it, as with a fixed one of that size.
        """
        if not self.budget.is_adaptive:
            return list(layers), list(shares)
        heads = sum(layer.scores.shape[1] for layer in layers)
        final = []
        for row, most in enumerate(shares):
            tokens = layers[0].num_tokens[row]
            needed = Fraction(sum(layer.rows[row].needed for layer in layers), heads * tokens)
            final.append(min(most, max(needed, self.budget.least, Fraction(self.num_staying, tokens))))
        return [self._rescored(layer, final) for layer in layers], final

    def _rescored(self, layer: ScoredLayer, shares: Sequence[Fraction]) -> ScoredLayer:
        scores = layer.scores.clone()
        for number, (row, share) in enumerate(zip(layer.rows, shares, strict=True)):
            assert row.evidence is not None
            layout = Layout(row.scores.shape[-1], layer.num_tokens[number])
            there = layer.scores[number, 0] > float("-inf")
            scores[number][:, there] = self.rate(row.evidence, row.measured, layout, share)
        return replace(layer, scores=scores)

    def select(self, observations: list[Observation]) -> list[Kept]:
        """What to keep of a prompt: a bool tensor (b, h, t) for each layer's observation.

        All evicted layers of the model, in order: a budget in bytes or across layers counts over them.
        """
        if not observations:
            raise InvalidInputError("no observation to select from: pass one for each layer")
        if len({(observation.keys.shape[0], observation.num_tokens) for observation in observations}) > 1:
            raise InvalidInputError("the layers' observations differ in batch or tokens: pass those of one prompt")
        shares = self._shares(observations[0], sum(bytes_per_token(observation) for observation in observations))
        count = len(observations)
        scored = [
            self.score(observation, index=index, num_layers=count, shares=shares)
            for index, observation in enumerate(observations)
        ]
        if self.spans_layers:
            return self.keep(*self.settle(scored, shares))
        return [self.keep([layer], shares)[0] for layer in scored]

    @property
    def num_window(self) -> int:
        """Tokens at the end that are left unscored."""
        return self.window_size if self.scorer.has_window else 0

    def _shares(self, observation: Observation, size: int) -> list[Fraction]:
        return [self.row_share(row.num_prompt_tokens, size) for row in observation.rows()]

    def _observe(self, row: Observation) -> Evidence:
        row.check_finite()
        return observe(
            row,
            self.window_size,
            scorer=self.scorer,
            aggregation=self.aggregation,
            preference=self.allocation.preference,
            with_means=self.weighting is not None,
        )

    def _score_row(
        self, row: Observation, share: Fraction, evidence: Evidence | None, with_standing: bool
    ) -> ScoredRow:
        whole = None
        if share >= 1 and not self.budget.is_adaptive:
            row.check_finite()
            whole = torch.full((row.num_heads, row.num_tokens), float("inf"), device=row.keys.device)
            if not with_standing:
                return ScoredRow(whole)
        seen = self._observe(row) if evidence is None else evidence
        measured = None if self.weighting is None else self.weighting.measure(row)
        preference = self.allocation.preference
        asked = 1.0 if preference is None or seen.measured is None else preference.finish(seen.measured)
        layout = row.row_layout
        staged = self._staged(seen, measured, layout, share) if with_standing or not self.budget.is_adaptive else None
        standing = self._standing(staged, layout, share) if with_standing and staged is not None else None
        if whole is not None:
            return ScoredRow(whole, asked, standing)
        if staged is None or self.budget.is_adaptive:
            unrated = torch.zeros(row.num_heads, row.num_prompt_tokens, device=row.keys.device)
            staying = row.num_heads * (row.num_prompt_tokens - seen.num_scored)
            needed = staying + entries_of_mass(seen.reduced, self.budget.amount)
            return ScoredRow(unrated, asked, standing, seen, measured, needed)
        return ScoredRow(self._in_slots(staged, layout, share), asked, standing)

    def rate(self, evidence: Evidence, measured: SlotScores | None, layout: Layout, share: Fraction) -> SlotScores:
        """Scores of one row's slots, from what was seen of them: (h, m), -inf where a slot is empty.

        measured: (h, m) what the weighting measured of every entry. share: of the text's entries to keep.
        """
        return self._in_slots(self._staged(evidence, measured, layout, share), layout, share)

    def stand(self, evidence: Evidence, measured: SlotScores | None, layout: Layout, share: Fraction) -> Standing:
        """Where each slot stands, for this share and all below it; arguments as of `rate`.

        Of a policy that `check_shrinks` does not refuse.
        """
        return self._standing(self._staged(evidence, measured, layout, share), layout, share)

    def _standing(self, staged: Staged, layout: Layout, share: Fraction) -> Standing:
        scores, ranks = self._in_slots(replace(staged, ranks=None), layout, share), staged.ranks
        if ranks is not None:
            padding = (0, layout.num_slots - ranks.shape[-1])
            ranks = torch.nn.functional.pad(ranks, padding, value=float("inf"))
            ranks = ranks.masked_fill(self._is_sink(layout, ranks.device), float("inf"))
        return Standing(scores, ranks, float(staged.top))

    def num_first(self, num_tokens: int, share: Fraction) -> int:
        """Of each head's entries, those that the weighting lets come first."""
        if not isinstance(self.weighting, StagedWeighting):
            return 0
        return self.weighting.num_first(num_tokens, min(self.num_window, num_tokens), share) or 0

    def check_shrinks(self) -> None:
        """Raises InvalidInputError where a smaller budget's part cannot be told from what a larger one kept."""
        weighting = self.weighting
        if weighting is None or (
            isinstance(weighting, StagedWeighting) and weighting.num_first(1, 0, Fraction(1)) is not None
        ):
            return
        raise InvalidInputError(
            f"policy {self.name!r} cannot evict further without the prompt: {type(weighting).__name__} "
            f"({weighting.description}) weighs by the budget itself; compress the document again"
        )

    def _staged(self, evidence: Evidence, measured: SlotScores | None, layout: Layout, share: Fraction) -> Staged:
        """The scores of slots that queries were asked about."""
        if not evidence.num_scored:
            return Staged(evidence.reduced)
        scores = self.aggregation.finish(evidence.reduced, evidence.counts, layout.first_positions(evidence.num_scored))
        if self.weighting is None or evidence.means is None:
            return Staged(scores)
        given = (scores, evidence.means, measured, layout, share)
        if isinstance(self.weighting, StagedWeighting):
            count = self.weighting.num_first(layout.num_tokens, layout.num_slots - evidence.num_scored, share)
            if count is not None:
                return self.weighting.stage(*given)
        return Staged(self.weighting(*given))

    def _in_slots(self, staged: Staged, layout: Layout, share: Fraction) -> SlotScores:
        """The scores of all slots; what always stays scores the most."""
        window = layout.num_slots - staged.scores.shape[-1]
        count = 0
        if staged.ranks is not None:
            assert isinstance(self.weighting, StagedWeighting)
            count = self.weighting.num_first(layout.num_tokens, window, share) or 0
        scores = staged.with_first(count)
        if bool(torch.isnan(scores.sum())):
            raise InvalidInputError("scores hold NaN: the window's attention or the value norms overflowed")
        # -inf is kept for slots without an entry.
        scores = scores.clamp_min(torch.finfo(scores.dtype).min)
        top = float("inf") if self.protect_window else float(scores.max())
        scores = torch.nn.functional.pad(scores, (0, window), value=top)
        scores = scores.masked_fill(self._is_sink(layout, scores.device), top)
        return scores if layout.absent is None else scores.masked_fill(layout.absent, float("-inf"))

    def _is_sink(self, layout: Layout, device: torch.device) -> Bool[Tensor, "*h m"]:
        """Slots of the text's first tokens, which stay."""
        if layout.positions is None:
            return torch.arange(layout.num_slots, device=device) < self.num_sinks
        return layout.positions < self.num_sinks


def bytes_per_token(observation: Observation) -> int:
    """Bytes that one token's entries take in this layer, over its heads."""
    key_size, value_size = observation.keys.shape[-1], observation.values.shape[-1]
    return observation.num_heads * entry_bytes(key_size, value_size, observation.keys.element_size())
