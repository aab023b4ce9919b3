"""One evicted layer, in transformers' cache-layer interface."""

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from defensivekv.attention.static import StaticReads
from defensivekv.cache import PrefixView, RaggedLayer
from defensivekv.errors import CacheError
from defensivekv.integrations.transformers.attention import StaticHandoff, tag
from defensivekv.integrations.transformers.pending import Pending
from defensivekv.integrations.transformers.query_log import QueryLog
from defensivekv.types import Kept, Keys, Values

if TYPE_CHECKING:
    from defensivekv.integrations.transformers.cache import EvictingCache
    from defensivekv.integrations.transformers.stepping import Stepping


class LayerHandoff:
    """Travels with the keys from `update` to the attention function, with the prefix of that moment.

    static: how it is read with a tail whose buffers never move, which are then handed out whole.
    """

    def __init__(self, layer: "EvictedLayer", view: PrefixView | None, static: StaticHandoff | None = None) -> None:
        self.layer = layer
        self.view = view
        self.static = static
        self.is_consumed = False
        self._is_observed = False

    def consume(self, module: nn.Module) -> None:
        """Marks the keys as read. Raises CacheError for an attention module of another model."""
        self.is_consumed = True
        self.layer.owner.check_module(module)

    def check_hidden(self, hidden: Tensor) -> None:
        """Raises InvalidInputError where the mask hides tokens of the prompt that were not its pads."""
        if self.view is not None:
            self.layer.owner.check_hidden(self.layer, hidden)

    def observe(
        self,
        module: nn.Module,
        queries: Tensor,
        visible: Tensor | None,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        positions: Tensor | None,
    ) -> None:
        """Gives the layer its prompt to decide on; layers that share keys with this one come second."""
        if self._is_observed:
            return
        self._is_observed = True
        if self.layer.listens:
            valid = None if visible is None else visible[:, 0, -1].expand(queries.shape[0], -1)
            heard = None if sinks is None else sinks.detach()
            self.layer.observe(Pending(module, queries, valid, scaling, softcap, heard, positions))
        # What was read is not kept alive until the next pass.
        if self.layer.owner.outstanding is self:
            self.layer.owner.outstanding = None


class EvictedLayer(CacheLayerMixin):
    """Keys and values of a full-attention layer, evicted once the prompt has been read.

    reads: how compiled code reads the prefix, where the cache is static; None: it is not, or has no prefix yet.
    record_past: set by assisted decoding, whose first forward carries drafts after the prompt: the decision
    then waits for `crop`.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: "EvictingCache", index: int) -> None:
        super().__init__()
        self._owner = weakref.ref(owner)
        self.index = index
        self.store = RaggedLayer(static_tokens=owner.static_tokens)
        self.reads: StaticReads | None = None
        self._announced = 0
        self.record_past = False
        self.awaits_prompt = True
        self.pending: Pending | None = None
        self.log: QueryLog | None = None

    @property
    def owner(self) -> "EvictingCache":
        """The cache that this layer belongs to."""
        owner = self._owner()
        if owner is None:
            raise CacheError("this layer's cache is gone: keep a reference to the EvictingCache while it is in use")
        return owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Keys, Values]:
        """Appends keys and values (b, h, x, d); gives the tail's, both tagged for the attention function."""
        if torch.compiler.is_compiling():
            static = self._write_static(key_states, value_states)
            return tag(static.tail.key_buffer, static), tag(static.tail.value_buffer, static)
        self.owner.check_update(self, key_states, value_states)
        self.is_initialized = True
        if self.reads is None:
            # Detached: a prefix that hangs on a graph would keep the evicted entries alive through it.
            keys, values = self.store.append(key_states.detach(), value_states.detach())
            handoff = LayerHandoff(self, self.store.view)
        else:
            self._check_room(key_states.shape[2])
            static = self._write_static(key_states.detach(), value_states.detach())
            keys, values = static.tail.key_buffer, static.tail.value_buffer
            handoff = LayerHandoff(self, self.store.view, static)
        self.owner.outstanding = handoff
        return tag(keys, handoff), tag(values, handoff)

    def _write_static(self, keys: Tensor, values: Tensor) -> StaticHandoff:
        tail, reads = self.store.static_tail, self.reads
        if tail is None or reads is None:
            raise CacheError(
                "compiled steps come after the prompt, and need a cache with room of a fixed size: read the prompt "
                "without torch.compile, into EvictingCache(..., static_tokens=...)"
            )
        tail.write(keys, values)
        return StaticHandoff(reads, tail)

    def _check_room(self, num_tokens: int) -> None:
        """Raises CacheError where a static tail has no room for so many tokens. Waits for the device only when near."""
        tail = self.store.static_tail
        assert tail is not None
        self._announced += num_tokens
        if self._announced > tail.capacity:
            self._announced = tail.used + num_tokens
            tail.check_room(num_tokens)

    def compact(self, kept: Kept, facts: Tensor | None = None) -> None:
        """Makes what is kept the prefix; see `RaggedLayer.compact`."""
        self.store.compact(kept, facts)
        self.refresh_reads()

    def narrow(self, kept: Kept) -> None:
        """Evicts from the prefix; see `RaggedLayer.narrow`."""
        self.store.narrow(kept)
        self.refresh_reads()

    def refresh_reads(self) -> None:
        """After a change of the prefix."""
        tail, view = self.store.static_tail, self.store.view
        self._announced = 0 if tail is None else tail.capacity
        self.reads = None if tail is None or view is None else StaticReads.of(view)

    @property
    def is_compileable(self) -> bool:
        """Whether decoding steps can be compiled."""
        return self.store.static_tokens is not None

    @property
    def listens(self) -> bool:
        """Whether the queries of the forward pass that goes on are of interest."""
        owner = self.owner
        return self.awaits_prompt or owner.repeats is not None or (owner.stepping is not None and self.log is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored, and of the queries that wait for the next step."""
        return self.store.nbytes + (0 if self.log is None else self.log.nbytes)

    def observe(self, pending: Pending) -> None:
        """Takes the queries of a prompt or of a step; decides now, or in `crop` while past states are recorded.

        Of a policy that has the prompt repeated, it decides after the repetition, whose queries come here too.
        """
        if self.owner.repeats is not None:
            self._observe_repeat(pending, self.owner.repeats)
            return
        self.awaits_prompt = False
        if self.owner.stepping is not None:
            self._log(pending, self.owner.stepping)
            return
        if self.owner.awaits_repeats:
            self.pending = pending.without_queries()
            return
        if self.record_past:
            self.pending = pending.for_drafts(self.owner.policy)
            return
        self.pending = pending
        self.owner.decide(self)

    def _log(self, pending: Pending, stepping: "Stepping") -> None:
        if self.log is None:
            self.log = stepping.new_log()
        x = pending.queries.shape[2]
        valid = None if pending.valid is None else pending.valid[:, -x:]
        self.log.add(pending.queries, valid, revocable=self.record_past)
        if self.record_past:
            self.pending = pending.without_queries()
        else:
            self._step(pending, stepping)

    def _step(self, pending: Pending, stepping: "Stepping") -> None:
        tail = self.store.tail_length
        if self.log is not None and stepping.is_due(self.store.seen - tail, tail):
            self.owner.step(self, pending, self.log)

    def _observe_repeat(self, heard: Pending, repeats: tuple[int, int]) -> None:
        pending, tail = self.pending, self.store.tail
        assert pending is not None
        assert tail is not None
        observation = heard.observation(tail.keys, tail.values, self.owner.policy, repeats=repeats)
        self.pending = pending.with_evidence(self.owner.policy.observe(observation), self.owner.policy)
        self.store.crop(int(heard.queries.shape[2]))

    def get_seq_length(self) -> int:
        """Tokens seen, evicted ones and pads counted; a tensor after a static cache's prompt, as transformers' own."""
        tail = self.store.static_tail
        if tail is not None:
            return self.store.before + tail.count  # type: ignore[return-value]
        return self.store.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return: the tail, or its whole buffers where static."""
        static = self.store.static_tail
        if static is not None:
            if not torch.compiler.is_compiling():
                self._check_room(query_length)
            return static.capacity, self.store.before
        tail = self.store.tail_length
        return tail + query_length, self.store.seen - tail

    def get_max_length(self) -> int:
        """No maximum of its own."""
        return -1

    def activate_past_recording(self) -> None:
        """Assisted decoding starts: a prompt is decided on in `crop`."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens, then decides on a prompt that was waiting for this."""
        count, stepping = abs(tokens_to_remove), self.owner.stepping
        pending = None if self.pending is None else self.pending.without_last(count)
        self.store.crop(count)
        if self.log is not None:
            self.log.drop_last(count)
        if pending is None:
            return
        if stepping is not None:
            self.pending = None
            self._step(pending, stepping)
        else:
            self.pending = pending
            self.owner.decide(self)

    def can_forget(self, count: int) -> bool:
        """Whether the queries that are left without those of the last `count` tokens are as many as a step wants."""
        return self.log is None or self.log.can_drop(count, self.store.seen)

    def settle(self) -> None:
        """Takes the tokens of the last pass as verified, and drafting as over, where nobody took any back."""
        pending, stepping = self.pending, self.owner.stepping
        if pending is not None and stepping is not None and self.log is not None:
            self.pending, self.record_past = None, False
            self.log.drop_last(0)
            self._step(pending, stepping)

    def reset(self) -> None:
        """Forgets everything."""
        self.store, self.reads = RaggedLayer(static_tokens=self.store.static_tokens), None
        self.pending, self.awaits_prompt, self.record_past, self.is_initialized = None, True, False, False
        self.log = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Makes the batch the rows of `beam_idx`; prefixes are shared, not copied."""
        self._check_decided("reordered")
        self._select_rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows of these numbers; what no row of them reads is freed."""
        self._check_decided("reordered")
        self._select_rows(indices)
        self.release_rows()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row; the repeats share its prefix."""
        self._check_decided("repeated")
        if self.store.seen:
            self._select_rows(torch.arange(self.batch_size).repeat_interleave(repeats))

    def _select_rows(self, index: Tensor) -> None:
        self.store.select_rows(index)
        self.refresh_reads()
        if self.log is not None:
            self.log = self.log.select_rows(index)

    def release_rows(self, rows: Collection[int] = ()) -> None:
        """Frees what is held of these rows, and of what no row reads; see `RaggedLayer.release_rows`."""
        self.store.release_rows(rows)
        self.refresh_reads()

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first token."""
        if self.store.tail is not None:
            return int(self.store.tail.key_buffer.shape[0])
        return -1 if self.store.view is None else len(self.store.view.rows)

    def _check_decided(self, verb: str) -> None:
        if self.pending is not None:
            raise CacheError(f"the batch cannot be {verb} while a prompt waits for its drafts to be verified")
