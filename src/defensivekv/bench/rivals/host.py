"""The model of this process, which the rivals that live in it share."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from defensivekv.bench.subject import ModelFacts, Subject, model_facts
from defensivekv.bench.timing import seconds
from defensivekv.integrations.transformers import disable
from defensivekv.integrations.transformers.model import text_config
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT


class Host:
    """Loads the model when it is first needed."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.device = torch.device(subject.device)
        self._compiled = 0

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.subject.load()

    @cached_property
    def facts(self) -> ModelFacts:
        """What it takes and reads."""
        return model_facts(self.subject, self.model)

    def generator(self, seed: int) -> torch.Generator:
        """For the entries of a cache."""
        return torch.Generator().manual_seed(seed)

    @contextmanager
    def attention(self, name: str = "sdpa") -> Iterator[None]:
        """Within it, the model's attention is the one of that name in transformers' registry, and not ours."""
        disable(self.model)
        config = text_config(self.model)
        before = config._attn_implementation
        self.model.set_attn_implementation(name)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def compiled_forward(self) -> Callable[..., Any]:
        """The model's forward in one graph: on a CPU with its weights packed, which takes them once more; on CUDA with
        CUDA graphs. To be given back by `release_compiled`.
        """
        self._compiled += 1
        if self.device.type == "cuda":
            return torch.compile(self.model.forward, fullgraph=True, mode="reduce-overhead")
        # As an option of `compile` it would come too late: weights would be arguments of the graph by then.
        packed: Callable[..., Any] = torch._inductor.config.patch(freezing=True)(
            torch.compile(self.model.forward, fullgraph=True)
        )
        return packed

    def release_compiled(self) -> None:
        """Once all are given back, what was compiled is forgotten, packed weights included."""
        self._compiled -= 1
        if self._compiled:
            return
        # Here and not above: it takes long to import, and is there once something was compiled.
        from torch._inductor.codecache import PyCodeCache

        torch.compiler.reset()
        # It leaves the modules that hold packed weights where they are.
        for module in PyCodeCache.modules:
            sys.modules.pop(module.__name__, None)
        PyCodeCache.cache_clear()
        gc.collect()

    @torch.inference_mode()
    def step(self, cache: Any, batch: int, forward: Callable[..., Any] | None = None) -> float:
        """Seconds of one token of each sequence; the cache grows by it. forward: in place of the model's."""
        token = torch.ones(batch, 1, dtype=torch.long, device=self.device)
        return self._timed(token, cache, forward or self.model)

    @torch.inference_mode()
    def read(self, cache: Any, tokens: int, seed: int) -> float:
        """Seconds of a prompt of random tokens."""
        ids = torch.randint(text_config(self.model).vocab_size, (1, tokens), generator=self.generator(seed))
        return self._timed(ids.to(self.device), cache, self.model)

    def _timed(self, ids: torch.Tensor, cache: Any, forward: Callable[..., Any]) -> float:
        options = {CACHE_ARGUMENT: cache}
        return seconds(lambda: forward(ids, use_cache=True, logits_to_keep=1, **options), self.device)
