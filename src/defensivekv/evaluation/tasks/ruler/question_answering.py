"""RULER's two question-answering tasks: a question's own documents among others.

qa_1 asks SQuAD's questions, qa_2 HotpotQA's. Prompt and choice of documents are those of NVIDIA/RULER
(scripts/data/synthetic/qa.py and constants.py; Apache-2.0), arXiv 2404.06654: sample i is the file's question i; other
documents of the same article come first, then any. Our own few paragraphs are repeated to fill a length, those that
a question needs are not.
"""

from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from random import Random

from defensivekv.evaluation.tasks.ruler.fit import Draft, Drawn, TokenCounter
from defensivekv.evaluation.tasks.ruler.qa_files import Broken, QuestionSet

MAX_NEW_TOKENS = 32

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_HEAD = f"{_INSTRUCTION}\n\nThe following are given documents.\n\n"


@dataclass(frozen=True)
class QuestionRecipe:
    """Draws samples of one question-answering task."""

    questions: QuestionSet
    is_uneven: bool = True

    @property
    def num_available(self) -> int:
        """Questions that there are, broken records counted."""
        return len(self.questions.asked)

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn | Broken:
        """Sample `index`; all draws follow from `key`. The haystack's unit is a document."""
        asked = self.questions.asked[index]
        if isinstance(asked, Broken):
            return asked
        rng, known = Random(key), {*asked.own, *asked.near}

        @cache
        def others() -> tuple[int, ...]:
            far = [n for n in range(len(self.questions.documents)) if n not in known]
            return (*rng.sample(asked.near, len(asked.near)), *rng.sample(far, len(far)))

        def write(size: int) -> Draft:
            num_others = size - len(asked.own)
            # The smallest prompt of every question is counted first; shuffling all documents for that is slow.
            numbers = [*asked.own, *islice(cycle(others()), num_others)] if num_others else [*asked.own]
            Random(f"{key}/{size}").shuffle(numbers)
            documents = (self.questions.documents[n] for n in numbers)
            haystack = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1))
            question = f"{_INSTRUCTION}\n\nQuestion: {asked.question}"
            return Draft(f"{_HEAD}{haystack}\n\n", question, " Answer:", asked.answers, {"documents": size})

        largest = None if self.questions.is_own else len(self.questions.documents)
        return Drawn(write, smallest=len(asked.own), largest=largest)
