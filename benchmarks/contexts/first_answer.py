"""Seconds from nothing but a file, or the text, to the first token of the first answer."""

import gc
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

import defensivekv as dkv
from benchmarks.contexts.settings import Settings
from benchmarks.contexts.subject import text
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

POLICY = "layer-defensivekv"
TEXT = "text, stock"
STOCK = "full cache, torch.save"


def forget(path: Path) -> None:
    """Drops a file from the system's page cache, so that it comes from the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class Document:
    """One document in all its forms: as text, and in files."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        length: int,
        settings: Settings,
        folder: Path,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.text = text(length, settings)
        self.question = text(settings.question, settings, seed=1)
        self.files = {STOCK: folder / f"{length}.pt"}
        self.read_seconds = self._save_stock(self.files[STOCK])
        # All budgets from one reading: what stays is what each of them keeps of the document.
        whole = dkv.compress(model, tokenizer, self.text, POLICY, 1.0)
        self.compress_seconds = whole.prefill_seconds
        for budget in (1.0, *settings.budgets):
            path = folder / f"{length}-{budget}.kv"
            whole.shrink(budget).save(path)
            self.files[f"{budget:.0%}"] = path

    @property
    def ways(self) -> dict[str, Callable[[], Any]]:
        """To the first token of the answer, by name."""
        ways: dict[str, Callable[[], Any]] = {TEXT: self._from_text, STOCK: self._from_stock}
        return ways | {name: partial(self._from_context, path) for name, path in self.files.items() if name != STOCK}

    def _ids(self, *texts: str) -> torch.Tensor:
        return torch.tensor([self.tokenizer(" ".join(texts))["input_ids"]])

    def _save_stock(self, path: Path) -> float:
        dkv.disable(self.model)
        cache, start = DynamicCache(config=self.model.config), time.perf_counter()
        with torch.no_grad():
            self.model(self._ids(self.text), use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        seconds = time.perf_counter() - start
        torch.save([(layer.keys, layer.values) for layer in cache.layers], path)
        return seconds

    def _from_text(self) -> Any:
        dkv.disable(self.model)
        ids = self._ids(self.text, self.question)
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)

    def _from_stock(self) -> Any:
        dkv.disable(self.model)
        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(torch.load(self.files[STOCK], mmap=True)):
            cache.update(keys, values, index)
        ids = self._ids(self.text, self.question)
        options = {"max_new_tokens": 1, "do_sample": False, CACHE_ARGUMENT: cache}
        return self.model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    def _from_context(self, path: Path) -> Any:
        return dkv.load_context(path, self.model, self.tokenizer).ask(self.question, max_new_tokens=1)


def measure(document: Document, way: str, *, from_disk: bool) -> float:
    """Seconds of one way. from_disk: its file is not in memory before."""
    path = document.files.get(way)
    if path is not None:
        if from_disk:
            forget(path)
        else:
            path.read_bytes()
    run = document.ways[way]
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
