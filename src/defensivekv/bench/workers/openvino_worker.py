"""OpenVINO GenAI with its own cache eviction, one step of its continuous batching at a time."""

import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

from .protocol import Answer, Filling, Loading, Reading, serve

_BLOCK = 32
"""Tokens of a block of its cache on a CPU: what is kept is a multiple of it."""

_START, _RECENT = 32, 64
_LEAST = _START + _RECENT + _BLOCK
_BEYOND = 512
"""Tokens of the prompt beyond those that are kept, so that there is something to evict."""

_CHUNK = 512
_LIMIT_S = 240
_PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class OpenVINO:
    """One model as OpenVINO's own files, and a pipeline for each cache."""

    def __init__(self) -> None:
        self._folder = Path()
        self._properties: dict[str, Any] = {}
        self._vocabulary = 1
        self._running: dict[int, tuple[genai.ContinuousBatchingPipeline, Any]] = {}
        self._made = 0

    def load(self, asked: Loading) -> Answer:
        """Converts the model where the folder does not have it yet."""
        self._folder = Path(asked.folder) / "openvino-f16"
        if not (self._folder / "done").exists():
            from .openvino_files import convert

            convert(asked.config, asked.model, self._folder, asked.seed)
        precision = _PRECISIONS[asked.dtype]
        self._properties = {
            "INFERENCE_NUM_THREADS": asked.threads,
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._vocabulary = int((self._folder / "done").read_text(encoding="ascii"))
        return {
            "versions": {"openvino-genai": version("openvino-genai")},
            "weight_bytes": (self._folder / "openvino_model.bin").stat().st_size,
            "note": f"{precision} inference on float16 weights, {precision} cache, unquantised",
        }

    def fill(self, asked: Filling) -> Answer:
        """Reads a prompt of little more than is kept: what was evicted costs nothing afterwards."""
        if asked.batch != 1 or asked.kept is None:
            raise ValueError("one sequence, and a cache that is evicted from, is measured here")
        kept = max(_LEAST, round(asked.kept / _BLOCK) * _BLOCK)
        prompt = min(asked.tokens, kept + _BEYOND)
        pipeline = self._pipeline(prompt + asked.room, kept)
        handle = _read(pipeline, prompt, asked.room, asked.seed, self._vocabulary)
        for _ in range(2):
            pipeline.step()
        metrics = pipeline.get_metrics()
        held = metrics.kv_cache_size_in_bytes * metrics.cache_usage / 100
        # A request whose handle is gone is dropped.
        self._running[self._made] = pipeline, handle
        self._made += 1
        return {
            "handle": self._made - 1,
            "held_bytes": round(held),
            "note": f"cannot be filled: a prompt of {prompt} tokens was read, of which at most {kept} are kept in "
            f"every layer; then {held / 2**20:.1f} MiB of the cache were in use",
        }

    def step(self, handle: int) -> Answer:
        """One token; evictions included as they come."""
        pipeline, _ = self._running[handle]
        start = time.perf_counter()
        pipeline.step()
        elapsed = time.perf_counter() - start
        if not pipeline.has_non_finished_requests():
            raise RuntimeError("the sequence ended")
        return {"seconds": elapsed}

    def prefill(self, asked: Reading) -> Answer:
        """Reads a prompt in its own chunks."""
        kept = None if asked.kept is None else max(_LEAST, asked.kept // _BLOCK * _BLOCK)
        pipeline = self._pipeline(asked.tokens + _BLOCK, kept)
        start = time.perf_counter()
        _read(pipeline, asked.tokens, 1, asked.seed, self._vocabulary)
        return {"seconds": time.perf_counter() - start}

    def drop(self, handle: int) -> Answer:
        """Frees the pipeline."""
        del self._running[handle]
        return {}

    def _pipeline(self, tokens: int, kept: int | None) -> genai.ContinuousBatchingPipeline:
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = -(-tokens // _BLOCK) + 8
        scheduler.max_num_batched_tokens = _CHUNK
        scheduler.enable_prefix_caching = False
        if kept is not None:
            scheduler.use_cache_eviction = True
            scheduler.cache_eviction_config = genai.CacheEvictionConfig(
                _START, _RECENT, kept, genai.AggregationMode.NORM_SUM
            )
        return genai.ContinuousBatchingPipeline(str(self._folder), scheduler, "CPU", self._properties)


def _read(pipeline: genai.ContinuousBatchingPipeline, tokens: int, new: int, seed: int, vocabulary: int) -> Any:
    """Steps until the prompt is read. Raises RuntimeError where that would take minutes."""
    settings = genai.GenerationConfig()
    settings.max_new_tokens, settings.ignore_eos = new + 8, True
    settings.set_eos_token_id(0)
    ids = np.random.default_rng(seed).integers(1, vocabulary, (1, tokens), dtype=np.int64)
    handle = pipeline.add_request(0, openvino.Tensor(ids), settings)
    start, chunks = time.perf_counter(), 0
    while not handle.can_read():
        pipeline.step()
        chunks += 1
        expected = (time.perf_counter() - start) / chunks * -(-tokens // _CHUNK)
        if chunks == 2 and expected > _LIMIT_S:
            raise RuntimeError(
                f"reading the prompt of {tokens} tokens would take {expected:.0f} s, above {_LIMIT_S}: give shorter "
                "--lengths, smaller --budgets or fewer --layers"
            )
    return handle


def main() -> None:
    """Serves until the input ends."""
    serve(OpenVINO())
