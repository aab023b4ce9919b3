"""llama.cpp through llama-cpp-python's low-level interface: its full cache, with and without flash attention."""

import ctypes
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp as llama

from .gguf_file import write_gguf
from .protocol import Answer, Filling, Loading, Reading, serve

VARIANTS = {"": 0, "flash": 1}
"""Flash attention off and on, as `llama_flash_attn_type` numbers them."""

_CHUNK = 512
_MICRO_BATCH = 128
"""Tokens computed at a time: without flash attention, each takes a row of scores over the whole cache in every head."""


class LlamaCpp:
    """One model, whose weights all contexts share."""

    def __init__(self) -> None:
        self._model: Any = None
        self._threads = 1
        self._vocabulary = 1
        self._contexts: dict[int, _Context] = {}
        self._made = 0

    def load(self, asked: Loading) -> Answer:
        """Writes the model's shape as GGUF where the folder does not have it yet."""
        path = Path(asked.folder) / "random-f16.gguf"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_gguf(Path(asked.config), path, asked.seed)
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        # A mapped file would be read from the disk again where other rivals need the memory.
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self._model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}: see the worker's log")
        self._threads = asked.threads
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        return {
            "versions": {"llama-cpp-python": version("llama-cpp-python")},
            "weight_bytes": int(llama.llama_model_size(self._model)),
            "note": f"float16 weights and cache; built with {', '.join(_abilities())}",
        }

    def fill(self, asked: Filling) -> Answer:
        """Reads a chunk of a prompt, and repeats what the cache then holds of it until it holds `tokens`."""
        if asked.batch != 1:
            raise ValueError("the cache of one sequence alone is filled here")
        context = _Context(self._model, asked.tokens + asked.room, VARIANTS[asked.variant], self._threads)
        context.fill(asked.tokens)
        self._contexts[self._made] = context
        self._made += 1
        return {
            "handle": self._made - 1,
            "held_bytes": context.held_bytes,
            "note": f"{min(_CHUNK, asked.tokens)} tokens read, and their cells restored {-(-asked.tokens // _CHUNK)} "
            "times as parts of one sequence",
        }

    def step(self, handle: int) -> Answer:
        """One token, its logits read back."""
        return {"seconds": self._contexts[handle].step()}

    def prefill(self, asked: Reading) -> Answer:
        """Reads a prompt in llama.cpp's own batches."""
        context = _Context(self._model, asked.tokens, VARIANTS[asked.variant], self._threads, micro_batch=_CHUNK)
        try:
            start = time.perf_counter()
            context.read([(asked.seed + 7 * number) % self._vocabulary for number in range(asked.tokens)])
            return {"seconds": time.perf_counter() - start}
        finally:
            context.free()

    def drop(self, handle: int) -> Answer:
        """Frees the context."""
        self._contexts.pop(handle).free()
        return {}


class _Context:
    """A context with one sequence, number 0, and a number 1 that parts of it are restored into."""

    def __init__(self, model: Any, tokens: int, flash: int, threads: int, micro_batch: int = _MICRO_BATCH) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = -(-(tokens + 1) // 256) * 256
        params.n_batch, params.n_ubatch = _CHUNK, min(micro_batch, _CHUNK)
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        params.no_perf = True
        self._pointer = llama.llama_init_from_model(model, params)
        if not self._pointer:
            raise RuntimeError(f"llama.cpp makes no context of {tokens} tokens: see the worker's log")
        self._memory = llama.llama_get_memory(self._pointer)
        self._batch = llama.llama_batch_init(_CHUNK, 0, 1)
        self._position = 0
        self.held_bytes = 0

    def fill(self, tokens: int) -> None:
        """Cells of a first chunk again and again, until sequence 0 has `tokens` of them at the chunk's positions."""
        chunk = min(_CHUNK, tokens)
        self.read([1 + number % 97 for number in range(chunk)], sequence=1)
        size = llama.llama_state_seq_get_size(self._pointer, 1)
        state = (ctypes.c_uint8 * size)()
        if llama.llama_state_seq_get_data(self._pointer, state, size, 1) != size:
            raise RuntimeError("llama.cpp did not save the state of a sequence")
        filled = 0
        while filled < tokens:
            if filled and llama.llama_state_seq_set_data(self._pointer, state, size, 1) != size:
                raise RuntimeError(f"llama.cpp did not restore a part of the cache after {filled} tokens")
            last = min(chunk, tokens - filled)
            if last < chunk:
                llama.llama_memory_seq_rm(self._memory, 1, last, -1)
            llama.llama_memory_seq_cp(self._memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(self._memory, 1, -1, -1)
            filled += last
        self._position = llama.llama_memory_seq_pos_max(self._memory, 0) + 1
        self.held_bytes = llama.llama_state_seq_get_size(self._pointer, 0)

    def read(self, tokens: list[int], sequence: int = 0) -> None:
        """Tokens of a prompt; logits of the last."""
        for start in range(0, len(tokens), _CHUNK):
            part = tokens[start : start + _CHUNK]
            is_last = start + len(part) == len(tokens)
            self._decode(part, range(start, start + len(part)), sequence, has_logits=is_last)

    def step(self) -> float:
        """Seconds of one token."""
        start = time.perf_counter()
        self._decode([1], range(self._position, self._position + 1), 0, has_logits=True)
        elapsed = time.perf_counter() - start
        self._position += 1
        return elapsed

    def _decode(self, tokens: list[int], positions: range, sequence: int, *, has_logits: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for number, (token, position) in enumerate(zip(tokens, positions, strict=True)):
            batch.token[number], batch.pos[number] = token, position
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, sequence
            batch.logits[number] = has_logits and number + 1 == len(tokens)
        if (status := llama.llama_decode(self._pointer, batch)) != 0:
            raise RuntimeError(f"llama_decode failed with status {status}: see the worker's log")
        llama.llama_synchronize(self._pointer)
        if has_logits and not llama.llama_get_logits_ith(self._pointer, -1):
            raise RuntimeError("llama.cpp gave no logits")

    def free(self) -> None:
        """Gives the memory back."""
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._pointer)


def _abilities() -> list[str]:
    """What the build makes use of, such as AVX512."""
    parts = llama.llama_print_system_info().decode().replace("CPU :", "").split("|")
    return [name.strip() for name, _, has in (part.partition("=") for part in parts) if has.strip() == "1"]


def main() -> None:
    """Serves until the input ends."""
    serve(LlamaCpp())
