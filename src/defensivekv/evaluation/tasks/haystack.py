"""Needle-in-a-Haystack: one fact at a depth of a long text, over depths and lengths.

Needle and question are Kamradt's (https://github.com/gkamradt/LLMTest_NeedleInAHaystack, MIT licence), the prompt
around them and the 50 new tokens Fu et al.'s (arXiv 2402.10171). His haystack, Paul Graham's essays, is not shipped:
put the texts into the data folder, as essays/*.txt. Many models have read the sandwich by now; the needle
"number" is a fact that is drawn anew for each sample instead.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.facts import draw_facts
from defensivekv.evaluation.tasks.prose import hide, read_prose
from defensivekv.evaluation.tasks.ruler.corpus import Essays
from defensivekv.evaluation.tasks.ruler.fit import TokenCounter
from defensivekv.evaluation.tasks.sample import Question, Sample
from defensivekv.evaluation.tasks.task import TaskOptions

TASKS = ("sandwich", "number")
"""Needles: the published one, and a random fact."""

DEPTHS = (0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)
"""Percent of the haystack's tokens before the needle."""

DEFAULT_LENGTHS = (1024, 2048, 4096, 8192)
"""Tokens of context, question and answer together."""

MAX_NEW_TOKENS = 50

NEEDLE = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
QUESTION = "What is the best thing to do in San Francisco?"
ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day."

_VERSION = 1


@dataclass(frozen=True)
class HaystackTask:
    """One needle at one length, every depth; see `Task`. Made by `make_task`.

    rounds: samples of each depth; a round has its own start in the haystack, the same for all its depths.
    """

    needle: str
    length: int
    rounds: int
    seed: int
    prose: Essays
    suite: str = "haystack"
    domain: str = "Needle-in-a-Haystack"
    metric: str = "needle_recall"
    split: str = "own"

    @property
    def name(self) -> str:
        """As "haystack@4096" for the published needle, else as "haystack/number@4096"."""
        needle = "" if self.needle == TASKS[0] else f"/{self.needle}"
        return f"{self.suite}{needle}@{self.length}"

    @property
    def revision(self) -> str:
        """Version of the generator, the seed, and the haystack's name and hash."""
        return f"generator {_VERSION} seed {self.seed} {self.prose.source}"

    @property
    def not_comparable(self) -> str:
        """Why these are not the published needle and haystack, if so."""
        reasons = []
        if self.prose.is_own:
            reasons.append("the haystack is the package's own prose, not Paul Graham's essays")
        if self.needle != TASKS[0]:
            reasons.append("the needle is a random number, not the published one")
        return "; ".join(reasons)

    def samples(self, tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
        """Each round's depths from the top down. Raises InvalidInputError where the length can't hold a needle."""
        for number in range(self.rounds):
            for depth in DEPTHS:
                yield self._sample(tokenizer, number, depth)

    def _sample(self, tokenizer: PreTrainedTokenizerBase, number: int, depth: int) -> Sample:
        # The first round begins where the haystack does, as the published one.
        of_round = Random(f"haystack/{self.length}/{self.seed}/{number}")
        start = of_round.randrange(len(self.prose.sentences)) if number else 0
        needle, asked, answer = NEEDLE, QUESTION, ANSWER
        if self.needle != TASKS[0]:
            rng = Random(f"haystack/{self.length}/{self.seed}/{number}/{depth}")
            fact = draw_facts(rng, 1, self.prose.text)[0]
            needle, asked, answer = fact.sentence, fact.question, fact.number
        question = f"\n Based on the content of the book, Question: {asked}\nAnswer:"
        context = hide(
            self.prose.sentences,
            [(depth, needle)],
            start=start,
            budget=self.length - TokenCounter(tokenizer).of_text(question) - MAX_NEW_TOKENS,
            tokenizer=tokenizer,
            wrap=lambda text: f"This is a very long story book: <book> {text} </book>.",
        )
        return Sample(
            id=f"depth {depth} round {number}",
            context=context,
            questions=(Question(question, (answer,)),),
            max_new_tokens=MAX_NEW_TOKENS,
            metadata={"depth": depth, "length": self.length},
        )


def make_task(name: str, options: TaskOptions, length: int) -> HaystackTask:
    """The task with that needle, "sandwich" or "number".

    options.num_samples: samples of *each depth*, one by default. options.data: with a folder essays/ of *.txt or
    RULER's PaulGrahamEssays.json, these are the haystack. Raises InvalidInputError for an unknown needle, essays that
    can't be used, or too small a length.
    """
    if name not in TASKS:
        raise InvalidInputError(f"the haystack has no needle {name!r}: known are {', '.join(TASKS)}")
    if length <= MAX_NEW_TOKENS:
        raise InvalidInputError(f"{length} tokens are too few for a haystack: ask for at least 256")
    return HaystackTask(name, length, options.num_samples or 1, options.seed, read_prose(options.data))
