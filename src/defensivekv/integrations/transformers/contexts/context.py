"""A document compressed once and asked many times, each question from the same prefix."""

import time
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.budget import Budget
from defensivekv.errors import ContextError, InvalidInputError
from defensivekv.integrations.transformers.cache import EvictingCache
from defensivekv.integrations.transformers.contexts.fingerprints import model_mark
from defensivekv.integrations.transformers.contexts.recipe import Recipe
from defensivekv.integrations.transformers.model import max_positions
from defensivekv.integrations.transformers.prefill import DEFAULT_CHUNK_SIZE
from defensivekv.integrations.transformers.report import CacheReport
from defensivekv.integrations.transformers.versions import CACHE_ARGUMENT

if TYPE_CHECKING:
    from defensivekv.integrations.transformers.contexts.files import ContextFile


@dataclass(frozen=True)
class Answer:
    """What came of one question.

    text: decoded without special tokens. question_tokens, new_tokens: counts. seconds: from the question's
    tokens to the last new one.
    """

    text: str
    question_tokens: int
    new_tokens: int
    seconds: float


class Context:
    """A compressed document; made by `compress`, or by `load_context` from a file.

    Questions do not see each other: each starts from a fork of the same cache. What goes on from here, `turn`, `append`
    and `shrink`, is a new context, which shares what it did not change.

    prefill_seconds: that it took to read the document. went_on: the context that this one follows.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cache: EvictingCache,
        recipe: Recipe,
        prefill_seconds: float,
        file: "ContextFile | None" = None,
        *,
        went_on: "Context | None" = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.prefill_seconds = prefill_seconds
        self._cache = cache
        self._file = file
        self._mark: str | None = model_mark(model) if went_on is None else went_on._mark

    def __getstate__(self) -> Any:
        raise InvalidInputError(
            "a context belongs to its model and shares memory: save() and load_context() carry it elsewhere, and "
            "turn() and append() leave it as it was"
        )

    @property
    def cache(self) -> EvictingCache:
        """What is held. Of a context from a file, what answering reads is checked when it is first asked for.

        Raises DamagedContextError where the file is not what was written.
        """
        self.verify(scores=False)
        return self._cache

    def verify(self, *, scores: bool = True) -> None:
        """Compares what was loaded from a file with its checksums, once. scores: those for `shrink` too.

        Raises DamagedContextError, which names the tensor.
        """
        if self._file is not None:
            self._file.verify(scores=scores)

    @property
    def was_stored(self) -> bool:
        """Whether its document was loaded from a file, and not read here."""
        return self._file is not None

    @property
    def document_ids(self) -> Int[Tensor, "1 t"]:
        """All tokens of the context: the document's, the template's before it, and those of later steps."""
        return self.recipe.ids

    @property
    def num_tokens(self) -> int:
        """Tokens of the document, the template's before it and those of later steps counted."""
        return int(self.document_ids.shape[1])

    @property
    def key(self) -> str:
        """64 hexadecimal digits, the same for the same tokens, model, tokenizer, policy, budget and later steps.

        The model's weights are read for it, once for each model. Raises UnsupportedModelError where they are not here,
        ContextError where the model was changed after it made the context.
        """
        self.check_model()
        return self.recipe.key(self.model, self.tokenizer)

    def check_model(self) -> None:
        """Raises ContextError where the model is no longer what made the context: other weights, another adapter."""
        if self._mark != model_mark(self.model):
            raise ContextError(
                "the model was changed since it read this document (its weights, or which adapter is active): change it"
                " back, or compress the document again"
            )

    def report(self) -> CacheReport:
        """What was kept of the document, and what it takes."""
        return self._cache.report()

    def save(self, path: str | PathLike[str]) -> None:
        """Writes one file, whole or not at all, for `load_context`; its format is in docs/contexts.md.

        Raises InvalidInputError where it cannot be written, or the policy has parts that cannot;
        UnsupportedModelError where the model's weights are not in this process; ContextError where it was changed.
        """
        from defensivekv.integrations.transformers.contexts.files import save_context

        save_context(self, path)

    def ask(self, question: str, *, max_new_tokens: int = 64, **generate_options: Any) -> str:
        """The answer's text; see `answer`."""
        return self.answer(question, max_new_tokens=max_new_tokens, **generate_options).text

    def answer(
        self, question: str, *, max_new_tokens: int = 64, max_entries: int | None = None, **generate_options: Any
    ) -> Answer:
        """Answers from the document, greedily unless `generate_options` say otherwise.

        max_entries: that may be held meanwhile, per head on average: what was kept of the document, which stays, with
        what is held of question and answer. generate_options: passed on to the model's `generate`.

        Raises InvalidInputError for an empty question, and where document, question and answer exceed the model's
        positions; BudgetError for a bound that has no room beside the document.
        """
        return self._answered(question, max_new_tokens, max_entries, generate_options)[0]

    def turn(self, question: str, *, max_new_tokens: int = 64, **generate_options: Any) -> tuple[Answer, "Context"]:
        """The answer, and a context that goes on after it: its questions see this one and its answer.

        Raises as `answer`, and InvalidInputError for several sequences or beams.
        """
        if _num_rows(self.model, generate_options) > 1:
            raise InvalidInputError("a turn has one answer: leave num_beams and num_return_sequences at 1")
        answer, cache, ids = self._answered(question, max_new_tokens, None, generate_options)
        if not self.recipe.wrapping.keeps_end and int(ids[0, -1]) in _ends(self.model, generate_options):
            # The model has not read it, and the template ends the turn itself.
            ids = ids[:, :-1]
        return answer, self._then(f"turn of {ids.shape[1] - self.num_tokens} tokens", cache, ids)

    @torch.no_grad()
    def append(self, text: str) -> "Context":
        """A context with this text read after what is there. Nothing of it is evicted, unless under a bound.

        Raises InvalidInputError for a text of no tokens, one that exceeds the model's positions, and under a chat
        template after a turn.
        """
        if self.recipe.is_in_turns and self.recipe.wrapping.name == "chat":
            raise InvalidInputError(
                "after an answer, text would be the model's own words to it: append before the first turn, or make the "
                "text part of the next question"
            )
        new = encode(self.model, self.tokenizer, text, special=False, what="text")
        ids = torch.cat((self.document_ids, new), dim=1)
        check_length(self.model, ids.shape[1] + 1, "document and text")
        cache = self.cache.fork()
        start, step = int(cache.get_seq_length()), self.recipe.chunk_size or DEFAULT_CHUNK_SIZE
        while start < ids.shape[1]:
            # As many tokens as are there already would look like the whole text once more.
            stop = min(start + (1 if ids.shape[1] - start in (start, start + 1) else step), ids.shape[1])
            chunk = ids[:, start:stop]
            self.model(input_ids=chunk, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
            start = stop
        return self._then(f"append {new.shape[1]} tokens", cache, ids)

    def shrink(self, budget: float | int | str | Budget) -> "Context":
        """A context that keeps less of the document, decided by the scores that were kept; see `EvictingCache.shrink`.

        Raises BudgetError where less is held already, CacheError where no scores were kept.
        """
        self.verify()
        cache = self._cache.shrink(budget)
        return self._then(f"shrink from {self.recipe.policy.budget}", cache, self.document_ids)

    def _then(self, step: str, cache: EvictingCache, ids: Int[Tensor, "1 t"]) -> "Context":
        recipe = self.recipe.then(step, ids, cache.policy)
        return Context(self.model, self.tokenizer, cache, recipe, self.prefill_seconds, self._file, went_on=self)

    def _answered(
        self, question: str, max_new_tokens: int, max_entries: int | None, generate_options: dict[str, Any]
    ) -> tuple[Answer, EvictingCache, Int[Tensor, "1 t"]]:
        """The answer, the cache after it, and all tokens up to its end."""
        check_text(question, "question")
        wrapping = self.recipe.wrapping
        before = wrapping.between if self.recipe.is_in_turns else ""
        if before is None:
            raise InvalidInputError("the chat template cannot be continued after an answer: use template='plain'")
        asked = before + question + wrapping.after
        question_ids = encode(self.model, self.tokenizer, asked, special=False, what="question")
        ids = torch.cat((self.document_ids, question_ids), dim=1)
        check_length(self.model, ids.shape[1] + max_new_tokens, "document, question and answer")
        if generate_options.get("use_cache") is False:
            raise InvalidInputError("a context is a cache: leave use_cache out")
        # Some models' own generation settings name a kind of cache, or none, which a cache that is passed contradicts.
        defaults = {"do_sample": False, "max_new_tokens": max_new_tokens, "cache_implementation": None}
        options = defaults | generate_options | {"use_cache": True}
        cache = self.cache.fork(max_entries=max_entries)
        rows = _num_rows(self.model, options)
        if rows > 1:
            # generate() makes as many rows of the question, and leaves those of a filled cache to its caller.
            cache.batch_repeat_interleave(rows)
        start = time.perf_counter()
        output = self.model.generate(ids, attention_mask=torch.ones_like(ids), **{CACHE_ARGUMENT: cache}, **options)
        seconds = time.perf_counter() - start
        sequences = output if isinstance(output, Tensor) else output.sequences
        new = sequences[0, ids.shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Answer(text, int(question_ids.shape[1]), len(new), seconds), cache, sequences[:1]


def _num_rows(model: PreTrainedModel, options: dict[str, Any]) -> int:
    """Rows that `generate()` decodes for one prompt: beams, or sequences."""
    settings = options.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(options.get(name) or getattr(settings, name, None) or 1 for name in names)


def _ends(model: PreTrainedModel, options: dict[str, Any]) -> list[int]:
    """Tokens that end an answer."""
    settings = options.get("generation_config") or model.generation_config
    ends = options.get("eos_token_id", settings.eos_token_id)
    return [] if ends is None else [int(end) for end in (ends if isinstance(ends, list | tuple) else [ends])]


def encode(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool, what: str
) -> Int[Tensor, "1 t"]:
    """The text's tokens, on the model's device. Raises InvalidInputError where it has none; `what` names it."""
    check_text(text, what, may_be_blank=True)
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    if not ids:
        raise InvalidInputError(f"the {what} has no tokens: the tokenizer makes nothing of {text[:40]!r}")
    return torch.tensor([ids], device=model.device)


def check_text(text: object, what: str, *, may_be_blank: bool = False) -> None:
    """Raises InvalidInputError for what is no text, or nothing but blanks; `what` names it."""
    if not isinstance(text, str):
        raise InvalidInputError(f"the {what} is a {type(text).__name__}: give it as text")
    if not may_be_blank and not text.strip():
        raise InvalidInputError(f"the {what} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(f"the {what} has half a character at {error.start}: {error.reason}") from None


def check_length(model: PreTrainedModel, num_tokens: int, what: str) -> None:
    """Raises InvalidInputError where `num_tokens` are more than the model has positions for."""
    maximum = max_positions(model)
    if maximum is not None and num_tokens > maximum:
        raise InvalidInputError(f"{what}: {num_tokens} tokens, but the model has {maximum} positions; shorten the text")
