"""What a step reads and writes, found once for all layers: which tokens are of prompts, and which follow them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionMetadataBuilder

from defensivekv.cache import PageTable
from defensivekv.integrations.vllm.pages import PageStore
from defensivekv.integrations.vllm.plan import EvictionPlan
from defensivekv.integrations.vllm.reading import PromptPart
from defensivekv.integrations.vllm.state import RequestState


@dataclass(frozen=True, eq=False)
class PagedQueries:
    """Tokens after the prompts of their requests.

    tokens: where they are in the step. writes: (x, h) rows for their keys in layer 0. states: of the sequences.
    starts: (l, r, h + 1).
    """

    tokens: slice | Int[Tensor, " x"]
    writes: Int[Tensor, "x h"]
    table: PageTable
    states: tuple[RequestState, ...]
    starts: Int[Tensor, "l r h1"]


@dataclass(frozen=True, eq=False)
class StepMetadata:
    """One step, for all layers. prompts: in the order of the step. paged: None where there are prompts alone."""

    store: PageStore
    prompts: list[PromptPart]
    paged: PagedQueries | None


@dataclass(frozen=True)
class _Sequence:
    """A request with tokens after its prompt. row: of vLLM's batch; first, count: its tokens in the step."""

    state: RequestState
    row: int
    first: int
    count: int
    tokens: int


class EvictingMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Sorts a step's tokens into prompts and what follows them."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.plan: EvictionPlan = kv_cache_spec.plan
        self.block_size: int = kv_cache_spec.block_size
        self._runner: Any = None
        self._store: PageStore | None = None
        self._starts: tuple[tuple[RequestState, ...], Tensor] | None = None

    def bind(self, runner: Any) -> None:
        """Once the cache is allocated. runner: whose batch is looked at."""
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, self.layer_names)
        caches = [layers[name].kv_cache for name in self.layer_names]
        self._runner, self._store = runner, PageStore.of(caches, packs_layers=self.plan.packs_layers)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StepMetadata:
        """The step that vLLM is about to take."""
        runner, store = self._runner, self._store
        assert runner is not None
        assert store is not None
        batch = runner.input_batch
        bounds: list[int] = common_attn_metadata.query_start_loc_cpu.tolist()
        table: NDArray[np.int32] = batch.block_table[0].get_numpy_array()
        prompts: list[PromptPart] = []
        sequences: list[_Sequence] = []
        for row, (name, first, last) in enumerate(zip(batch.req_ids, bounds, bounds[1:], strict=False)):
            if first == last:
                continue
            start = int(batch.num_computed_tokens_cpu[row])
            state = RequestState.of(runner.requests[name], self.plan)
            if start == 0:
                state.begin()
            unread = max(0, state.prompt - start)
            read = min(unread, last - first)
            if read:
                prompts.append(self._part(store, state, slice(first, first + read), start, table[row]))
            after = last - first - read
            if after:
                sequences.append(_Sequence(state, row, first + read, after, start + last - first - state.prompt))
        paged = self._paged(store, sequences, table, bounds[-1]) if sequences else None
        return StepMetadata(store, prompts, paged)

    def _part(
        self, store: PageStore, state: RequestState, tokens: slice, start: int, row: NDArray[np.int32]
    ) -> PromptPart:
        stop = start + tokens.stop - tokens.start
        is_last = stop == state.prompt
        if is_last:
            state.hole = max(0, self._blocks(start) - self._blocks(state.slots)) if start else 0
        listed = torch.from_numpy(row[: self._blocks(max(stop, state.slots))].copy())
        stored = store.layout.rows(listed, store.layout.tokens(torch.arange(start), 0), 0)
        writes = None
        if not is_last:
            writes = store.layout.rows(listed, store.layout.tokens(torch.arange(start, stop), 0), 0).to(self.device)
        kept = listed[: self._blocks(state.slots)].to(self.device)
        return PromptPart(self.plan, store, state, tokens, start, stored.to(self.device), writes, kept)

    def _blocks(self, slots: int) -> int:
        return -(-slots // self.block_size)

    def _paged(
        self, store: PageStore, sequences: list[_Sequence], table: NDArray[np.int32], num_tokens: int
    ) -> PagedQueries:
        layout = store.layout
        kept = torch.tensor([sequence.state.slots for sequence in sequences])
        tokens = torch.tensor([sequence.tokens for sequence in sequences])
        counts = torch.tensor([sequence.count for sequence in sequences])
        blocks = self._listed(sequences, table)
        first_query = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        number = torch.arange(len(sequences)).repeat_interleave(counts)
        place = torch.arange(int(counts.sum())) - first_query[number]
        places = layout.tokens(tokens[number] - counts[number] + place, kept[number])
        writes = layout.rows_in(blocks[number[:, None], places.blocks], places, 0)
        firsts = torch.tensor([sequence.first for sequence in sequences])
        found = firsts[number] + place
        where = slice(0, num_tokens) if len(found) == num_tokens else found.to(self.device)
        states = tuple(sequence.state for sequence in sequences)

        def moved(tensor: Tensor) -> Tensor:
            return tensor.to(self.device, non_blocking=True)

        return PagedQueries(
            tokens=where,
            writes=moved(writes),
            table=PageTable(
                moved(blocks),
                moved(kept.int()),
                moved(tokens.int()),
                moved(first_query.int()),
                int(counts.max()),
            ),
            states=states,
            starts=self._starts_of(states),
        )

    def _listed(self, sequences: list[_Sequence], table: NDArray[np.int32]) -> Int[Tensor, "r n"]:
        """Blocks of the sequences, without those that were given back."""
        sizes = [self._blocks(sequence.state.slots + sequence.tokens) for sequence in sequences]
        listed = np.zeros((len(sequences), max(sizes)), dtype=np.int32)
        for target, sequence, size in zip(listed, sequences, sizes, strict=True):
            kept, hole = self._blocks(sequence.state.slots), sequence.state.hole
            target[:kept] = table[sequence.row, :kept]
            target[kept:size] = table[sequence.row, kept + hole : size + hole]
        return torch.from_numpy(listed)

    def _starts_of(self, states: tuple[RequestState, ...]) -> Int[Tensor, "l r h1"]:
        """Of states that are decided, the same tensor as long as they are the same."""
        is_known = all(state.is_decided for state in states)
        if is_known and self._starts is not None and self._starts[0] == states:
            return self._starts[1]
        stacked = torch.stack([state.starts for state in states], 1).to(self.device)
        self._starts = (states, stacked) if is_known else None
        return stacked
