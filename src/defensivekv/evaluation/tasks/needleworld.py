"""The packaged model's own suite as tasks: `defensivekv.needleworld`, RULER in small."""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.sample import Question, Sample
from defensivekv.evaluation.tasks.task import TaskOptions
from defensivekv.needleworld import MAX_NEW_TOKENS, TASKS, make_sample

__all__ = ["DEFAULT_LENGTH", "TASKS", "NeedleWorldTask", "make_task"]

DEFAULT_LENGTH = 1024
"""Tokens of a document: what the packaged model was trained for."""

_DEFAULT_NUM_SAMPLES = 6
_LENGTHS = range(256, 4097)
_VERSION = 1


@dataclass(frozen=True)
class NeedleWorldTask:
    """One task of the needle world at one length; see `Task`. Made by `make_task`.

    length: tokens of the packaged model's tokenizer, whichever tokenizer the samples are asked with.
    """

    task: str
    length: int
    num_samples: int
    seed: int
    suite: str = "needleworld"
    metric: str = "word_recall"
    split: str = "own"
    not_comparable: str = "the packaged model's own words and tasks, after RULER but far easier"

    @property
    def name(self) -> str:
        """As "needleworld/single_key@1024"."""
        return f"{self.suite}/{self.task}@{self.length}"

    @property
    def domain(self) -> str:
        """The task's name in words."""
        return self.task.replace("_", " ")

    @property
    def revision(self) -> str:
        """Version of the generator, and the seed."""
        return f"generator {_VERSION} seed {self.seed}"

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        """Documents with their questions, from `make_sample`; the tokenizer plays no part."""
        for number in range(self.num_samples):
            seed = self.seed * 10**6 + number
            made = make_sample(self.task, num_tokens=self.length, seed=seed)
            yield Sample(
                id=str(seed),
                context=made.document,
                questions=tuple(Question(question.text, question.answer) for question in made.questions),
                max_new_tokens=MAX_NEW_TOKENS,
                metadata={"length": self.length},
            )


def make_task(name: str, options: TaskOptions, length: int = DEFAULT_LENGTH) -> NeedleWorldTask:
    """The task of that name.

    options.num_samples: documents, 6 by default. Raises InvalidInputError for an unknown task, or a length that is
    too small for the facts or beyond what the packaged model reads.
    """
    if name not in TASKS:
        raise InvalidInputError(f"the needle world has no task {name!r}: known are {', '.join(TASKS)}")
    if length not in _LENGTHS:
        raise InvalidInputError(
            f"documents of the needle world have no {length} tokens: ask for {_LENGTHS[0]} to {_LENGTHS[-1]}"
        )
    return NeedleWorldTask(name, length, options.num_samples or _DEFAULT_NUM_SAMPLES, options.seed)
