"""The cache that a user passes to `generate()`: reads the prompt whole, keeps what the policy keeps of it."""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from defensivekv.attention.static import check_served
from defensivekv.budget import Budget, entry_bytes
from defensivekv.errors import CacheError, DefensiveKVError, InvalidInputError
from defensivekv.integrations.transformers.bound import LayerSizes, bound_of, parse_bytes
from defensivekv.integrations.transformers.checks import (
    announced_prompt,
    check_forward,
    check_keeps_scores,
    check_model,
    check_positive,
    check_single_reading,
    check_static,
    check_tokens,
    row_numbers,
)
from defensivekv.integrations.transformers.decision import PromptDecision
from defensivekv.integrations.transformers.forking import forked, put_under
from defensivekv.integrations.transformers.layer import EvictedLayer, LayerHandoff
from defensivekv.integrations.transformers.model import (
    check_supported,
    max_positions,
    num_query_heads,
    plan_layers,
    text_config,
)
from defensivekv.integrations.transformers.pending import Pending
from defensivekv.integrations.transformers.query_log import QueryLog
from defensivekv.integrations.transformers.report import CacheReport, LayerReport
from defensivekv.integrations.transformers.rotary import with_rotary
from defensivekv.integrations.transformers.shrinking import shrunk
from defensivekv.integrations.transformers.stepping import Stepping
from defensivekv.integrations.transformers.stock import has_forgotten, layer_bytes
from defensivekv.integrations.transformers.texts import Texts
from defensivekv.policies import Policy
from defensivekv.policies import policy as make_policy
from defensivekv.policies.standing import LayerStanding

MANY_TOKENS = 2**20
"""Stands for a model's longest text, where its configuration does not say."""


class EvictingCache(Cache):
    """A KV cache that evicts what the policy does not keep of the prompt, and frees it.

    The first forward pass is the prompt. Once a layer's attention over it is computed, the entries that the
    policy keeps are copied into a compact prefix and the rest is freed (after the last layer, where the policy
    lets layers compete). What comes later, further turns and generated tokens, is kept whole.

    A budget in bytes, and the bounds below, hold for the whole life of a sequence: as tokens are generated, blocks of
    entries are evicted, old and new by one rule; see `defensivekv.policies.steps`. Between two forward passes no more
    is held; within one, what its own tokens bring to each layer comes on top until the layers are decided on.

    model: the model that will use the cache, enabled with `enable`. policy: a policy, or a name with
    `budget=...` and the other options of `defensivekv.policy`; under a bound, the budget of the prompt may be left out.
    max_entries: of each sequence, prompt and generated tokens, per head on average.
    max_batch_bytes: of all sequences of the batch together: bytes, or a text such as "1GiB".
    interval: tokens between two steps of eviction under a bound; 128, or an eighth of the bound, where not given.
    static_tokens: room for this many tokens after the prompt, in buffers that never move, so that decoding steps can
        be compiled: see `docs/performance.md`. Not under a bound. None: buffers grow as needed.
    keep_scores: keep one or two numbers of four bytes beside each entry, by which `shrink` evicts further ones later.
        Not under a bound, whose numbers serve its own steps.

    Raises UnsupportedModelError, BudgetError, UnknownPolicyError or InvalidInputError at once; CacheError when
    used with another model, or after `disable`. For inference only: gradients do not flow through it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy | str,
        budget: float | int | str | Budget | None = None,
        *,
        max_entries: int | None = None,
        max_batch_bytes: int | str | None = None,
        interval: int | None = None,
        static_tokens: int | None = None,
        keep_scores: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(policy, Policy):
            if budget is not None or options:
                raise InvalidInputError("the policy has its budget and options already: pass a name to set them here")
            self.policy = policy
        else:
            is_bounded = max_entries is not None or max_batch_bytes is not None
            self.policy = make_policy(policy, 1.0 if budget is None and is_bounded else budget, **options)
        bound = bound_of(self.policy, max_entries, parse_bytes("max_batch_bytes", max_batch_bytes), interval)
        if keep_scores:
            check_keeps_scores(self.policy, is_bounded=bound is not None)
        self.keeps_scores = keep_scores
        check_supported(model)
        self._config = text_config(model)
        self._plans = plan_layers(self._config)
        self.static_tokens = static_tokens
        if static_tokens is not None:
            check_positive("static_tokens", static_tokens)
            check_static(self._plans, is_bounded=bound is not None)
        self._model = weakref.ref(model)
        self._module_ids = frozenset(id(module) for module in model.modules())
        self._max_tokens = max_positions(model)
        self.evicted_layers = tuple(index for index, plan in enumerate(self._plans) if plan.evicted)
        """Numbers of the model's layers that are evicted; the first dimension of `lengths` follows them."""
        self.outstanding: LayerHandoff | None = None
        self.repeats: tuple[int, int] | None = None
        """What part of the prompt is being repeated; None: nothing is."""
        self._is_reconstructing = False
        self._drafting_from = 0
        self.is_broken = False
        """Whether layers of transformers' own have stored tokens of a pass that was refused."""
        self.decision = PromptDecision(self.policy, self.evicted_layers, keeps_scores=keep_scores)
        self.bound = bound
        self.stepping = self._new_stepping()
        """Eviction in steps, where the cache is bounded or its prompt comes in chunks; None: of the prompt, once."""
        super().__init__(layers=self._new_layers())

    def _new_layers(self) -> list[Any]:
        if self.static_tokens is None:
            stock = DynamicCache(config=self._config).layers
        else:
            # Full attention is ours, and what is left holds its window: the length is a formality.
            stock = StaticCache(config=self._config, max_cache_len=self._max_tokens or MANY_TOKENS).layers
        return [EvictedLayer(self, index) if plan.evicted else stock[index] for index, plan in enumerate(self._plans)]

    def _new_stepping(self) -> Stepping | None:
        if self.bound is None:
            return None
        return Stepping(self.bound.stepper.policy, self.evicted_layers, self.bound)

    @property
    def is_bounded(self) -> bool:
        """Whether there is a bound on all that is held, and not only a budget of the prompt."""
        return self.bound is not None

    @property
    def texts(self) -> Texts:
        """What is known of the texts in the batch."""
        return self.decision.texts if self.stepping is None else self.stepping.texts

    @property
    def standings(self) -> dict[int, LayerStanding]:
        """Of each evicted layer, what was kept beside the scores of its entries; empty where none were."""
        return self.decision.standings if self.stepping is None else self.stepping.standings

    @property
    def bytes_per_token(self) -> int:
        """What the entries of one token of the prompt take in all evicted layers; 0 before the prompt."""
        sizes = None if self.stepping is None else self.stepping.sizes
        return self.decision.bytes_per_token if sizes is None else sizes.entries_bytes

    def expect(self, num_tokens: int) -> None:
        """Says how long the prompt will be, pads counted, so that it may come in several forward passes.

        Each of them is then a chunk of it: all chunks' queries observe, and what may stay is the budget of the whole
        prompt. `generate(prefill_chunk_size=...)` need not say so. Raises CacheError for a cache that holds something,
        and InvalidInputError for policies that want the whole prompt at once.
        """
        check_positive("num_tokens", num_tokens)
        if self.get_seq_length():
            raise CacheError("the cache holds a prompt already: make a new one, or call reset()")
        if self.stepping is None and not self.policy.budget.is_full:
            self.stepping = Stepping(self.policy, self.evicted_layers, None, keeps_scores=self.keeps_scores)
        if self.stepping is not None:
            self.stepping.expected = num_tokens

    @property
    def _evicted(self) -> list[EvictedLayer]:
        return [self.layers[index] for index in self.evicted_layers]

    # ------------------------------------------------------------------ what the layers ask for

    def check_update(self, layer: EvictedLayer, keys: Tensor, values: Tensor) -> None:
        """Raises where the tokens about to be stored could not be answered from correctly."""
        check_model(self._model())
        last, self.outstanding = self.outstanding, None
        if last is not None and not last.is_consumed:
            raise CacheError(
                f"the keys of layer {last.layer.index} never arrived at defensivekv's attention: the model that ran is "
                "not the one that the cache was made for, or it changes its keys after the cache and is not supported; "
                "make an EvictingCache for each model, and call defensivekv.enable on it"
            )
        if layer.pending is not None and self.repeats is None:
            raise CacheError("a prompt waits for its drafts to be verified: call crop() before going on")
        if layer.index == self.evicted_layers[0] and self.repeats is None:
            try:
                self._check_pass(layer, keys, values)
            except DefensiveKVError:
                # Layers of transformers' own before this one have stored the tokens.
                self.is_broken = self.is_broken or layer.index > 0
                raise
        if layer.is_compileable and not layer.store.seen:
            check_served(keys, values)
        if self.stepping is not None and self.stepping.limits is not None:
            layer.store.reserve = self.stepping.limits.interval

    def _check_pass(self, layer: EvictedLayer, keys: Tensor, values: Tensor) -> None:
        """What is checked of a forward pass when it arrives at the first of the evicted layers."""
        b, h, x, d = keys.shape
        check_forward(self._evicted, keys, values, self._max_tokens, self._drafting_from)
        self._drafting_from = 0
        seen = layer.store.seen
        if not seen and not self._is_reconstructing:
            check_single_reading(self.policy)
            if (self.stepping is None or self.stepping.expected is None) and not self.policy.budget.is_full:
                whole = announced_prompt(x)
                if whole is not None:
                    self.expect(whole)
        if self.stepping is not None and self.bound is None and not seen and x == self.stepping.expected:
            self.stepping = None
        if self.stepping is None:
            if layer.awaits_prompt and x > 1:
                size = h * entry_bytes(d, values.shape[3], keys.element_size())
                self.policy.row_share(x, size * len(self.evicted_layers))
            return
        queries = num_query_heads(self._config) * d * keys.element_size()
        token = (d + values.shape[3]) * keys.element_size()
        sizes = LayerSizes(len(self.evicted_layers), h, token, queries)
        self.stepping.check(sizes, seen, x, b, revocable=layer.record_past)

    def check_module(self, module: nn.Module) -> None:
        """Raises CacheError where `module` is not a part of the model that this cache was made for."""
        if id(module) not in self._module_ids:
            raise CacheError(
                f"this cache was made for another model than the one whose {type(module).__name__} reads it: "
                "make an EvictingCache for each model"
            )

    def check_hidden(self, layer: EvictedLayer, hidden: Tensor) -> None:
        """Raises InvalidInputError where a later turn's mask hides tokens of the prompt that were not its pads.

        hidden: (b, t) of the tokens before the tail, pads counted.
        """
        if layer.index != self.evicted_layers[0]:
            return
        valid = self.texts.valid
        visible = torch.ones_like(hidden)
        if valid is not None:
            known = min(valid.shape[1], hidden.shape[1])
            visible[:, :known] = valid[:, :known].to(hidden.device)
        if bool((hidden & visible).any()):
            raise InvalidInputError(
                "the attention mask hides tokens of the prompt that it did not hide when the prompt was read, and an "
                "evicted cache cannot leave them out any more: pass the prompt's own mask, with ones for what followed"
            )

    def decide(self, layer: EvictedLayer) -> None:
        """Scores the layer's prompt, and evicts as soon as everything that competes with it has been scored."""
        pending, layer.pending = layer.pending, None
        assert pending is not None
        tail = layer.store.tail
        assert tail is not None
        if self.policy.scorer.sees == "prompt":
            model = self._model()
            assert model is not None
            pending = with_rotary(pending, model, self._plans[layer.index].kind, layer.store.seen)
        observation = pending.observation(tail.keys, tail.values, self.policy)
        for index, stays in self.decision.add(layer.index, observation, pending.evidence).items():
            self.layers[index].compact(stays.kept, stays.facts)

    def step(self, layer: EvictedLayer, pending: Pending, log: QueryLog) -> None:
        """Lets the layer's queries be heard, and evicts where that is decided."""
        stepping = self.stepping
        assert stepping is not None
        for index, stays in stepping.step(layer.index, layer.store, log, pending).items():
            self.layers[index].compact(stays.kept, stays.facts)
        if layer.index == self.evicted_layers[-1] and not stepping.listens(layer.store.seen):
            # The prompt is read, and nothing will be evicted any more, unless somebody asks for it.
            for evicted in self._evicted:
                if not self.keeps_scores:
                    evicted.store.forget_facts()
                evicted.log = None

    @property
    def awaits_repeats(self) -> bool:
        """Whether the policy wants to hear the prompt repeated before it decides."""
        return self._is_reconstructing and self.policy.reads_twice

    @contextmanager
    def reconstructing(self) -> Iterator[None]:
        """Around the reading of a prompt and of what repeats it, after which is decided; see `prefill`."""
        self._is_reconstructing = True
        try:
            yield
            self.repeats = None
            for layer in self._evicted:
                if layer.pending is not None:
                    self.decide(layer)
        finally:
            self._is_reconstructing, self.repeats = False, None

    # ------------------------------------------------------------------ what transformers asks for

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that the layer will return; asked for before any layer runs."""
        check_tokens(query_length)
        for layer in self._evicted if self.stepping is not None else ():
            layer.settle()
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens of every layer. Raises CacheError before touching any of them
        where that reaches into what was evicted, or where a stock layer has forgotten what it would need.
        """
        tokens_to_remove = int(tokens_to_remove)  # some releases count in tensors
        count = abs(tokens_to_remove)
        shortest = min(layer.store.tail_length for layer in self._evicted)
        if tokens_to_remove > 0:
            raise InvalidInputError("crop takes the negative number of tokens to remove")
        if count > shortest:
            raise CacheError(
                f"cannot crop {count} tokens: only the last {shortest} came after the eviction; "
                "make a new cache, or fork this one before going on"
            )
        if self.stepping is not None and count and not all(layer.can_forget(count) for layer in self._evicted):
            raise CacheError(
                f"cannot crop {count} tokens: the queries before them, which the next eviction listens to, are gone; "
                "call activate_past_recording() before the forward pass whose tokens may be taken back, or fork the "
                "cache"
            )
        if any(has_forgotten(layer) for layer in self.layers):
            raise CacheError(
                "cannot crop: sliding-window and linear layers have forgotten what came before; call "
                "activate_past_recording() before the forward pass whose tokens may be taken back, or fork the cache"
            )
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Assisted decoding starts: a prompt is decided on once its first drafts are verified.

        Drafts come in one forward pass with the prompt. Those accepted at once count as a part of it.
        """
        self._drafting_from = self.get_seq_length()
        super().activate_past_recording()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes the batch the rows of `beam_idx`; prefixes are shared, not copied."""
        super().reorder_cache(beam_idx)
        self._select_texts(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of `indices` (numbers or a mask), and frees the memory of the others."""
        numbers = indices.nonzero().squeeze(-1) if indices.dtype == torch.bool else indices
        super().batch_select_indices(numbers)
        self._select_texts(numbers)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; the repeats share its prefix."""
        rows = self._evicted[0].batch_size
        super().batch_repeat_interleave(repeats)
        if rows > 0:
            self._select_texts(torch.arange(rows).repeat_interleave(repeats))

    def _select_texts(self, index: Tensor) -> None:
        if self.stepping is not None:
            self.stepping.select_rows(index.tolist())
        self.decision.select_rows(index.tolist())

    def release(self, rows: Sequence[int] | Tensor) -> None:
        """Frees what is held of rows that are finished. They stay in the batch, whose tokens they still get.

        What they hold of the tokens since the last eviction, all rows have room for together, and goes with the next
        one; without a bound, with the cache. Their further output means nothing. Under `max_batch_bytes`, the other
        rows may hold more from now on.

        rows: their numbers, or a mask of all rows.
        """
        numbers = row_numbers(rows, max(0, self._evicted[0].batch_size))
        for layer in self._evicted:
            layer.release_rows(numbers)
        self.decision.texts = self.decision.texts.without(numbers)
        if self.stepping is not None:
            self.stepping.texts = self.stepping.texts.without(numbers)

    @property
    def released(self) -> frozenset[int]:
        """Rows that were released."""
        return self.texts.released

    def reset(self) -> None:
        """Forgets everything; the cache can take a new prompt."""
        self.outstanding, self.repeats, self._drafting_from, self.is_broken = None, None, 0, False
        self.decision = PromptDecision(self.policy, self.evicted_layers, keeps_scores=self.keeps_scores)
        self.stepping = self._new_stepping()
        # New layers, because what a stock layer's own reset leaves behind differs between releases.
        self.layers = self._new_layers()

    # ------------------------------------------------------------------ forks

    def fork(self, *, max_entries: int | None = None, interval: int | None = None) -> "EvictingCache":
        """A cache that goes on by itself from here. The prefix is shared, what came after it is copied.

        max_entries, interval: a bound of its own for the fork, as for a new cache. What a cache without a bound holds
        of its prompt then stays, and what comes after competes for the rest. Raises BudgetError where the bound has
        no room for that.
        """
        is_underway = self.decision.is_underway or (self.stepping is not None and self.stepping.is_underway)
        if is_underway or any(layer.pending is not None for layer in self._evicted):
            raise CacheError("the cache cannot be forked in the middle of a forward pass")
        twin = forked(self)
        if max_entries is not None or interval is not None:
            put_under(twin, max_entries, interval)
        return twin

    def shrink(self, budget: float | int | str | Budget) -> "EvictingCache":
        """A cache that keeps less of the prompt, decided by the scores that were kept, without the prompt.

        What came after the prompt stays. What is left is what the policy keeps of the whole prompt for that budget,
        where it was read at once (docs/contexts.md tells of the exceptions). Layers of which nothing goes are shared.

        budget: of the prompt, as for a new cache: a share or a count. Raises BudgetError where the cache holds less
        than that already, or below the window; CacheError for a cache that kept no scores.
        """
        return shrunk(self, budget)

    def __deepcopy__(self, memo: dict[int, Any]) -> "EvictingCache":
        return self.fork()

    # ------------------------------------------------------------------ what users ask for

    @property
    def lengths(self) -> Int[Tensor, "l b h"]:
        """Stored entries of the prefix: (evicted layers, batch rows, key-value heads); empty before the prompt."""
        views = [layer.store.view for layer in self._evicted]
        if any(view is None for view in views):
            return torch.empty(0, 0, 0, dtype=torch.long)
        return torch.tensor([[view.prefix.lengths[row] for row in view.rows] for view in views if view is not None])

    def kept_positions(self, layer: int, row: int, head: int) -> Int[Tensor, " n"]:
        """Positions in the prompt (pads counted) of the entries kept, ascending int32.

        layer, row, head: as in `lengths`; `evicted_layers[layer]` is the number of the model's layer.
        """
        view = self._evicted[layer].store.view
        if view is None:
            raise CacheError("nothing has been evicted yet: run the prompt through the model first")
        return view.prefix.kept_positions(view.rows[row], head)

    @property
    def end_tokens(self) -> int | list[int] | None:
        """Tokens that end a text, by the model's generation settings."""
        model = self._model()
        ends: int | list[int] | None = None if model is None else model.generation_config.eos_token_id
        return ends

    @property
    def nbytes(self) -> int:
        """Bytes held: prefixes with their positions, tails with the unused part of their buffers, stock layers."""
        return sum(layer_bytes(layer) for layer in self.layers)

    def report(self) -> CacheReport:
        """What was asked for, what was kept and what it takes, for each layer and in all."""
        rows = zip(self._plans, self.layers, strict=True)
        layers = tuple(LayerReport.of(index, plan, layer) for index, (plan, layer) in enumerate(rows))
        texts = self.texts
        return CacheReport(
            policy=self.policy.name,
            budget=str(self.policy.budget),
            bound="" if self.bound is None else str(self.bound),
            layers=layers,
            prompt_tokens=texts.tokens,
            shares=tuple(float(share) for share in texts.shares),
            full_bytes=sum(texts.tokens) * self.bytes_per_token,
        )
