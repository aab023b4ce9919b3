"""One document, compressed once, and a conversation about it: what eviction before the question is for.

Each turn asks for a fact of its own, in an order that is not the document's: what was kept for one does not answer the
next. The last turn asks for two of them again, which the document or the conversation answers.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.facts import Fact, draw_facts
from defensivekv.evaluation.tasks.prose import hide, read_prose
from defensivekv.evaluation.tasks.ruler.corpus import Essays
from defensivekv.evaluation.tasks.ruler.fit import TokenCounter
from defensivekv.evaluation.tasks.sample import Question, Sample
from defensivekv.evaluation.tasks.task import TaskOptions

DEFAULT_LENGTHS = (4096,)
"""Tokens of the document and the whole conversation together."""

MAX_NEW_TOKENS = 32
"""Of each answer; two facts in a sentence fit."""

_DEFAULT_NUM_SAMPLES = 4
_NUM_FACTS = 8
_VERSION = 1


@dataclass(frozen=True)
class SharedContextTask:
    """Conversations about documents of one length; see `Task`. Made by `make_task`.

    num_facts: in a document, spread evenly; there is one turn more.
    """

    length: int
    num_samples: int
    seed: int
    prose: Essays
    num_facts: int = _NUM_FACTS
    suite: str = "shared-context"
    domain: str = "shared context"
    metric: str = "string_match_all"
    split: str = "own"
    not_comparable: str = "the package's own task, published nowhere else"

    @property
    def name(self) -> str:
        """As "shared-context@4096"."""
        return f"{self.suite}@{self.length}"

    @property
    def revision(self) -> str:
        """Version of the generator, the seed, and the prose's name and hash."""
        return f"generator {_VERSION} seed {self.seed} {self.prose.source}"

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        """One conversation each. Raises InvalidInputError where the length can't hold document and conversation."""
        for number in range(self.num_samples):
            yield self._sample(tokenizer, number)

    def _sample(self, tokenizer: PreTrainedTokenizerBase, number: int) -> Sample:
        rng = Random(f"shared-context/{self.length}/{self.seed}/{number}")
        facts = draw_facts(rng, self.num_facts, self.prose.text)
        questions = _conversation(rng, facts)
        counter = TokenCounter(tokenizer)
        asked = sum(counter.of_text(question.text) + MAX_NEW_TOKENS for question in questions)
        context = hide(
            self.prose.sentences,
            [(100 * (i + 0.5) / self.num_facts, fact.sentence) for i, fact in enumerate(facts)],
            start=rng.randrange(len(self.prose.sentences)),
            budget=self.length - asked,
            tokenizer=tokenizer,
        )
        return Sample(
            id=str(number),
            context=context,
            questions=questions,
            max_new_tokens=MAX_NEW_TOKENS,
            in_turns=True,
            metadata={"length": self.length},
        )


def make_task(options: TaskOptions, length: int = DEFAULT_LENGTHS[0]) -> SharedContextTask:
    """The task at that length.

    options.num_samples: 4 by default. options.data: essays as for the haystack. Raises InvalidInputError for
    essays that can't be used, or a length that the answers alone fill.
    """
    if length <= MAX_NEW_TOKENS * (_NUM_FACTS + 1):
        raise InvalidInputError(f"{length} tokens are too few for the conversation: ask for at least 1024")
    num_samples = options.num_samples or _DEFAULT_NUM_SAMPLES
    return SharedContextTask(length, num_samples, options.seed, read_prose(options.data))


def _conversation(rng: Random, facts: list[Fact]) -> tuple[Question, ...]:
    order = rng.sample(facts, len(facts))
    turns = [Question(_turn(fact.question), (fact.number,)) for fact in order]
    first, second = rng.sample(order, 2)
    both = f"What are the registry numbers of the cities of {first.city} and {second.city}?"
    return (*turns, Question(_turn(both), (first.number, second.number)))


def _turn(question: str) -> str:
    return f"\n\nQuestion: {question}\nAnswer:"
