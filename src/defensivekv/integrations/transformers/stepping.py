"""Eviction in steps: after each chunk of a prompt, and while tokens are generated, for as long as there is a bound.

One step, layer by layer and row by row: the latest queries are heard on what is held, prefix and tail compete by one
rule, and what is kept of both becomes the prefix.
"""

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.cache import RaggedLayer
from defensivekv.errors import InvalidInputError
from defensivekv.integrations.competition import Competition
from defensivekv.integrations.transformers.bound import Bound, LayerSizes, Limits
from defensivekv.integrations.transformers.decision import Stays, check_pads, say_what_is_whole
from defensivekv.integrations.transformers.layer_row import LayerRow
from defensivekv.integrations.transformers.pending import Pending
from defensivekv.integrations.transformers.query_log import QueryLog
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies import Policy
from defensivekv.policies.evidence import Evidence
from defensivekv.policies.scored import ScoredLayer
from defensivekv.policies.standing import LayerStanding
from defensivekv.policies.steps import Facts, Stepper, check_evicts_in_steps


class Stepping:
    """Eviction in steps, of one cache.

    bound: what may be held at any moment; None: only the prompt's chunks are evicted from. keeps_scores, standings: as
    of `PromptDecision`; kept at the last chunk. expected: tokens of the
    prompt, pads counted; None: whatever comes first. texts: the rows of the batch, as far as they were decided on.
    pinned: tokens of the batch, of whose entries what is held was decided on before this began, and stays.
    """

    def __init__(
        self, policy: Policy, layers: tuple[int, ...], bound: Bound | None, *, keeps_scores: bool = False
    ) -> None:
        check_evicts_in_steps(policy)
        self.policy = policy
        self.stepper = Stepper(policy)
        self.bound = bound
        self.keeps_scores = keeps_scores
        self.standings: dict[int, LayerStanding] = {}
        self.expected: int | None = None
        self.texts = Texts()
        self.pinned = 0
        self.sizes: LayerSizes | None = None
        self.limits: Limits | None = None
        """What the bound comes to, for the batch of the pass that goes on; None without one."""
        self._competition = Competition(policy, layers)
        self._grown = Texts()
        self._facts: dict[int, Float[Tensor, "b h m f"]] = {}

    def fork(self) -> "Stepping":
        """The same, to go on by itself."""
        twin = Stepping(self.policy, self._competition.layers, self.bound, keeps_scores=self.keeps_scores)
        twin.go_on_from(self, self.texts, 0)
        twin.standings = dict(self.standings)
        return twin

    def select_rows(self, index: Sequence[int]) -> None:
        """Makes the batch the rows of these numbers, which may repeat."""
        self.texts = self.texts.select_rows(index)
        self.standings = {layer: standing.select_rows(index) for layer, standing in self.standings.items()}

    def go_on_from(self, before: "Stepping | None", texts: Texts, pinned: int) -> None:
        """Takes over what is known of the batch. pinned: see above, where it was not evicted from in steps before."""
        self.texts, self.pinned = texts, pinned
        if before is not None:
            self.expected, self.sizes, self.pinned = before.expected, before.sizes, max(pinned, before.pinned)

    @property
    def is_underway(self) -> bool:
        """Whether layers wait for others."""
        return self._competition.is_underway

    def new_log(self) -> QueryLog:
        """For the queries of one layer."""
        sees = self.policy.scorer.sees
        return QueryLog(None if sees == "prompt" else self.stepper.num_queries(1))

    def listens(self, seen: int) -> bool:
        """Whether the queries of the tokens after `seen` are of interest."""
        return self.bound is not None or self.is_reading(seen)

    def is_reading(self, seen: int) -> bool:
        """Whether the tokens after `seen` are still the prompt's."""
        return seen < self.expected if self.expected is not None else seen == 0

    def is_due(self, seen: int, tail: int) -> bool:
        """Whether there is a step after tokens that followed `seen`, with `tail` tokens since the last one."""
        if self.is_reading(seen):
            return True
        return self.limits is not None and tail >= self.limits.interval

    def check(self, sizes: LayerSizes, seen: int, new: int, num_rows: int, *, revocable: bool) -> None:
        """Raises BudgetError or InvalidInputError where `new` tokens after `seen` cannot be stepped over as asked.

        revocable: there may be drafts among them.
        """
        self.sizes = sizes
        if self.bound is not None:
            self.limits = self.bound.limits(sizes, num_rows)
        if not self.is_reading(seen):
            return
        if self._prompt_has_budget:
            self._of_prompt(seen + new, seen + new)
        if self.expected is None:
            return
        if seen + new > self.expected and not revocable:
            raise InvalidInputError(
                f"{seen + new} tokens of a prompt that expect() said to have {self.expected}: say how long it really is"
            )
        if new < self.policy.num_window and seen + new < self.expected:
            raise InvalidInputError(
                f"a chunk of {new} tokens, of a prompt of {self.expected} as expect() or generate() said, is less than "
                f"the window of {self.policy.num_window} that observes: give chunks of at least as many, or a smaller "
                "window_size"
            )

    # ------------------------------------------------------------------ one step

    @torch.no_grad()
    def step(self, layer: int, store: RaggedLayer, log: QueryLog, pending: Pending) -> dict[int, Stays]:
        """Hears the queries of a layer; gives what stays in the layers from which something goes now.

        pending: of the last forward pass; its `valid` is of the tail.
        """
        layers, tail = self._competition.layers, store.tail
        assert tail is not None
        index, b = layers.index(layer), tail.keys.shape[0]
        try:
            if index == 0:
                self._begin(store, pending)
            rows = [self._heard(row, store, log, pending) for row in range(b)]
        except InvalidInputError as error:
            raise InvalidInputError(f"layer {layer}: {error}") from None
        shares = self._shares(store)
        scores = tail.keys.new_full((b, *tail.keys.shape[1:2], store.num_slots), float("-inf"), dtype=torch.float32)
        is_last = self.keeps_scores and self.is_reading(store.seen - tail.used) and not self.is_reading(store.seen)
        facts, tops = tail.keys.new_zeros(*scores.shape, 0, dtype=torch.float32), [0.0] * b
        for number, heard in enumerate(rows):
            if heard is None:
                continue
            row, known, evidence = heard
            rated = self.stepper.rate(evidence, known, row.layout, shares[number])
            if self.pinned:
                rated.masked_fill_(row.pinned(self.pinned), float("inf"))
            if is_last:
                # No step comes after this one: what is known from now on is where entries stand.
                standing = self.stepper.stand(evidence, known, row.layout, shares[number])
                known, tops[number] = standing.facts, standing.top
            if facts.shape[-1] != known.shape[-1]:
                facts = facts.new_zeros(*scores.shape, known.shape[-1])
            scores[number][:, row.places], facts[number][:, row.places] = rated, known
        if is_last:
            self.standings[layer] = LayerStanding(tuple(tops), (1.0,) * b)
        tokens, count = self._grown.tokens, len(layers)
        scored = ScoredLayer(scores, tokens, (1.0,) * b, index, count)
        self._facts[layer] = facts
        # A chunk of more than may stay would be held in every layer otherwise.
        streams = any(0 < share * length < tail.used for share, length in zip(shares, tokens, strict=True))
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
        self.texts = replace(self._grown, shares=tuple(shares))
        self._facts = {}
        if self.is_reading(store.seen - store.tail_length) and not self.is_reading(store.seen):
            empty = [row for row, count in enumerate(self.texts.tokens) if not count]
            if empty:
                raise InvalidInputError(f"row {empty[0]} of the batch holds pads only: pass at least one token per row")
            say_what_is_whole(self.policy, self.texts)

    def _shares(self, store: RaggedLayer) -> list[Fraction]:
        """Of the tokens that each row has so far, what may stay."""
        tokens = self._grown.tokens
        most = [Fraction(count) for count in tokens]
        if self.limits is not None:
            alive = [0 if row in self.texts.released else count for row, count in enumerate(tokens)]
            most = self.limits.of_rows(alive)
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

    def _heard(
        self, row: int, store: RaggedLayer, log: QueryLog, pending: Pending
    ) -> tuple[LayerRow, Facts, Evidence] | None:
        """A row of the layer, what is known of its slots, and the evidence that their scores are made of."""
        one = None
        if row not in self.texts.released:
            one = LayerRow.of(store, row, pending.valid, self._grown)
        if one is None:
            return None
        most = one.num_new if self.policy.scorer.sees == "prompt" else self.stepper.num_queries(1)
        queries = log.of_row(row, most)
        facts = one.facts(self.stepper, queries, pending)
        if queries.shape[1] == 0:
            return one, facts, self.stepper.recall(facts)
        evidence = one.hear(self.stepper, queries, facts, pending)
        self.stepper.record(evidence, facts)
        return one, facts, evidence
