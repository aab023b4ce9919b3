"""Blocks for what stays: vLLM's cache specification and manager, in the scheduler's process.

    tokens    0 ............................. prompt | generated ....
    slots     0 ... kept(prompt) | generated ........
    blocks    [ 0 ][ 1 ][ 2 ]..                          a prompt that is read in one pass
    blocks    [ 0 ][ 1 ][ 2 ][ given back ][ 3 ]..       a prompt in chunks, whose entries all stay until its last one

A request takes `kept(prompt) + generated` slots. Entries of a prompt that is read in one pass are never stored, but for
those that stay. One in chunks has a slot for each token read so far; when its last chunk has been given to the
workers, the next step gives the blocks back that hold more than what stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from vllm.logger import init_logger
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from defensivekv.integrations.vllm.plan import EvictionPlan

logger = init_logger("vllm.plugins.defensivekv")


@dataclass(frozen=True, kw_only=True)
class EvictingSpec(FullAttentionSpec):
    """Full attention whose prompts are evicted from."""

    plan: EvictionPlan

    @classmethod
    def of(cls, spec: FullAttentionSpec, plan: EvictionPlan) -> Self:
        """The same pages, for what stays."""
        given = {field.name: getattr(spec, field.name) for field in fields(spec) if field.init}
        return cls(**given, plan=plan)

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One specification for the layers of a group."""
        assert all(type(spec) is cls and spec.plan == specs[0].plan for spec in specs), (
            "All attention layers in the same KV cache group must be evicted by the same plan."
        )
        plain = [FullAttentionSpec(**_plain(spec)) for spec in specs]
        return cls.of(FullAttentionSpec.merge(plain), specs[0].plan)

    @property
    def prefix_cacheable(self) -> bool:
        """What stayed of a prompt depends on all of it: no block can be reused for another."""
        return False

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Two more than the tokens' own: one for a last block of each part that is not full."""
        return int(super().max_num_blocks_per_req(vllm_config, max_len)) + 2


def _plain(spec: EvictingSpec) -> dict[str, Any]:
    return {field.name: getattr(spec, field.name) for field in fields(FullAttentionSpec) if field.init}


@dataclass
class _Request:
    """What the manager knows of a request that holds blocks.

    prompt: its tokens. chunked: blocks that it held before its last chunk; 0: it is read in one pass, or not yet.
    is_read: whether its last chunk was given to the workers.
    """

    prompt: int
    chunked: int = 0
    is_read: bool = False


class EvictingManager(FullAttentionManager):
    """Gives out, and takes back, blocks for what stays of prompts and for what is generated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert isinstance(self.kv_cache_spec, EvictingSpec)
        self.plan = self.kv_cache_spec.plan
        self._requests: dict[str, _Request] = {}
        self._to_trim: list[str] = []
        self._log_capacity()

    def _log_capacity(self) -> None:
        blocks = self.block_pool.num_gpu_blocks - 1
        told = []
        for tokens in (2048, 8192, 32768, 131072):
            needed = cdiv(self.plan.slots(tokens) + 1, self.block_size)
            told.append(f"{tokens:,}: {blocks // needed} ({blocks // cdiv(tokens + 1, self.block_size)})")
        logger.info(
            "DefensiveKV: %s at %s; %s blocks of %s tokens hold, at once, prompts of %s (without eviction)",
            self.plan.policy.name,
            self.plan.policy.budget,
            f"{blocks:,}",
            self.block_size,
            ", ".join(told),
        )

    def _length(self, request: _Request, num_tokens: int, num_read: int, held: int) -> int:
        """Blocks in the request's list, given back ones counted, so that it has room for `num_tokens` tokens.

        num_read: tokens that the workers will have read; drafts that may follow are among the others.
        """
        if num_read < request.prompt:
            return int(cdiv(num_tokens, self.block_size))
        kept = self.plan.slots(request.prompt)
        needed = int(cdiv(kept + num_tokens - request.prompt, self.block_size))
        chunked = request.chunked if request.is_read else held
        return needed + max(0, chunked - int(cdiv(kept, self.block_size)))

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Learns how long a request's prompt is, before it is given blocks."""
        if request_id not in self._requests:
            assert num_prompt_tokens is not None
            self._requests[request_id] = _Request(num_prompt_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that a request still needs; see the base class."""
        assert not new_computed_blocks
        # Admission is asked before the prompt is known; all that there is is no shorter.
        request = self._requests.get(request_id) or _Request(num_tokens)
        held = len(self.req_to_blocks.get(request_id, ()))
        is_whole = self.plan.reads_whole(request.prompt)
        if apply_admission_cap and not held and not is_whole:
            return int(cdiv(num_tokens, self.block_size))
        if is_whole and not held and num_tokens_main_model < request.prompt:
            # Not enough of this step's tokens are left: it waits for a step that reads it whole.
            return int(self.block_pool.num_gpu_blocks) + 1
        return max(0, self._length(request, num_tokens, num_tokens_main_model, held) - held)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Gives a request its blocks; see the base class."""
        request = self._requests[request_id]
        blocks = self.req_to_blocks[request_id]
        if num_tokens_main_model >= request.prompt and not request.is_read:
            request.is_read, request.chunked = True, len(blocks)
            if request.chunked:
                self._to_trim.append(request_id)
        missing = self._length(request, num_tokens, num_tokens_main_model, len(blocks)) - len(blocks)
        if missing <= 0:
            return []
        new: list[KVCacheBlock] = self.block_pool.get_new_blocks(missing)
        blocks.extend(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return new

    def new_step_starts(self) -> None:
        """Gives back what held the evicted entries of prompts whose last chunk is with the workers.

        Workers take steps in order, so whoever is given these blocks next writes them after that chunk was read.
        """
        for request_id in self._to_trim:
            request = self._requests.get(request_id)
            if request is not None:
                first = int(cdiv(self.plan.slots(request.prompt), self.block_size))
                self._remove_blocks_in_range(request_id, first, request.chunked)
        self._to_trim.clear()

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forgets a request, however it ended."""
        self._requests.pop(request_id, None)
        blocks: list[KVCacheBlock] = super().pop_blocks_for_free(request_id)
        return blocks

    def cache_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is reused."""


# The built-in specifications come first: the registry does not add them once it holds any.
KVCacheSpecRegistry._ensure_registered()
KVCacheSpecRegistry.register(EvictingSpec, EvictingManager, FullAttentionSpec)
