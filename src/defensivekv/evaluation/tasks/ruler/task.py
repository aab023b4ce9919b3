"""A RULER task at one length: draws samples with its recipe and sizes their haystacks with the tokenizer."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler.fit import Draft, Drawn, TokenCounter, largest_size
from defensivekv.evaluation.tasks.ruler.qa_files import Broken
from defensivekv.evaluation.tasks.sample import Question, Sample, Unreadable

_AMPLE = 0.75
"""Share of a budget below which one sample's smallest prompt shows that those of all fit, as they differ little."""


class Recipe(Protocol):
    """Draws samples of one task."""

    @property
    def num_available(self) -> int | None:
        """Samples that there are; None: any number."""
        ...

    @property
    def is_uneven(self) -> bool:
        """Whether some samples need far more room than others."""
        ...

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn | Broken:
        """Sample `index`; every random choice follows from `key`."""
        ...


@dataclass(frozen=True)
class RulerTask:
    """A `Task` of RULER (arXiv 2404.06654) at one length; see `make_task`.

    length: tokens of context, question, answer prefix and answer together. Context and question are divided as both
    the authors' harness and kvpress do: all before the question is the context.
    """

    task: str
    domain: str
    metric: str
    length: int
    max_new_tokens: int
    num_samples: int
    seed: int
    revision: str
    not_comparable: str
    recipe: Recipe = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """Unique among all suites: ruler/task@length."""
        return f"ruler/{self.task}@{self.length}"

    @property
    def suite(self) -> str:
        """The first part of the name."""
        return "ruler"

    @property
    def split(self) -> str:
        """How context and question are divided."""
        return "authors"

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample | Unreadable]:
        """The samples, drawn one by one; sample i depends on seed, task, length, i and the tokenizer only.

        Raises InvalidInputError with the first sample where the length is too short for what is asked.
        """
        counter = TokenCounter(tokenizer)
        available = self.recipe.num_available
        indices = range(self.num_samples if available is None else min(self.num_samples, available))
        self._check_room(indices, counter)
        for i in indices:
            drawn = self._draw(i, counter)
            if isinstance(drawn, Broken):
                yield Unreadable(self._id(i), drawn.reason)
            else:
                yield self._sample(i, self._fit(drawn, counter))

    def _id(self, index: int) -> str:
        return f"{self.task}@{self.length}/{index}"

    def _draw(self, index: int, counter: TokenCounter) -> Drawn | Broken:
        return self.recipe.draw(f"{self.seed}/{self.task}/{self.length}/{index}", index, counter)

    def _check_room(self, indices: range, counter: TokenCounter) -> None:
        """Refuses a length that one of the samples does not fit, before any of them is asked."""

        def smallest(index: int) -> int:
            drawn = self._draw(index, counter)
            return counter.of_draft(drawn.write(drawn.smallest)) if isinstance(drawn, Drawn) else 0

        needed = smallest(0)
        if self.recipe.is_uneven or needed > _AMPLE * self._budget:
            needed = max(smallest(i) for i in indices)
        if needed > self._budget:
            raise self._too_short(needed)

    def _fit(self, drawn: Drawn, counter: TokenCounter) -> Draft:
        def count(size: int) -> int:
            return counter.of_draft(drawn.write(size))

        size = largest_size(count, drawn.smallest, drawn.largest, self._budget)
        if size is None:
            raise self._too_short(count(drawn.smallest))
        return drawn.write(size)

    @property
    def _budget(self) -> int:
        return self.length - self.max_new_tokens

    def _too_short(self, num_tokens: int) -> InvalidInputError:
        needed = num_tokens + self.max_new_tokens
        what = f"{self.name}: the smallest prompt and its answer take up to {needed} tokens of this tokenizer"
        # Another length draws other keys and words, which may take some tokens more.
        return InvalidInputError(f"{what}: ask for a length of at least {needed + needed // 8}")

    def _sample(self, index: int, draft: Draft) -> Sample:
        return Sample(
            id=self._id(index),
            context=draft.context,
            questions=(Question(draft.question, draft.references, draft.answer_prefix),),
            max_new_tokens=self.max_new_tokens,
            metadata={"length": self.length, **draft.metadata},
        )
