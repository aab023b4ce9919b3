"""RULER's eight needle tasks: sentences "One of the special magic numbers for KEY is: VALUE." in a haystack.

Prompts, haystacks and counts are those of NVIDIA/RULER (scripts/data/synthetic/niah.py and constants.py,
scripts/synthetic.yaml; Apache-2.0), arXiv 2404.06654. Other than there, keys and values are all different, and none
stands in the essays by chance.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal
from uuid import UUID

from defensivekv.evaluation.tasks.ruler.corpus import Essays, Words
from defensivekv.evaluation.tasks.ruler.fit import Draft, Drawn, TokenCounter

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""One line of the haystack of noise."""

DEPTHS = tuple(round(100 * i / 39) for i in range(40))
"""Percent of an essay's sentences before a needle."""

MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Needles:
    """What is hidden where. keys, values, queries: keys in the haystack, values of each, and keys asked for."""

    haystack: Literal["noise", "essay", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


NEEDLES = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", value="uuids"),
    "niah_multikey_1": Needles("essay", keys=4),
    "niah_multikey_2": Needles("needles"),
    "niah_multikey_3": Needles("needles", key="uuids", value="uuids"),
    "niah_multivalue": Needles("essay", values=4),
    "niah_multiquery": Needles("essay", keys=4, queries=4),
}


@dataclass(frozen=True)
class _Needle:
    key: str
    value: str
    kind: str

    @property
    def sentence(self) -> str:
        return f"One of the special magic {self.kind} for {self.key} is: {self.value}."


class _Source:
    """Keys and values, none twice and none that the essays hold."""

    def __init__(self, needles: Needles, words: Words | None, text: str, rng: Random) -> None:
        self._needles, self._words, self._text, self._rng = needles, words, text, rng
        self._taken: set[str] = set()

    def key(self) -> str:
        return self._fresh(self._word if self._needles.key == "words" else self._uuid)

    def needle(self, key: str) -> _Needle:
        value = self._fresh(self._number if self._needles.value == "numbers" else self._uuid)
        return _Needle(key, value, self._needles.value)

    def _fresh(self, draw: Callable[[], str]) -> str:
        while (text := draw()) in self._taken or text in self._text:
            pass
        self._taken.add(text)
        return text

    def _word(self) -> str:
        assert self._words is not None
        return f"{self._rng.choice(self._words.adjectives)}-{self._rng.choice(self._words.nouns)}"

    def _number(self) -> str:
        return str(self._rng.randint(10**6, 10**7 - 1))

    def _uuid(self) -> str:
        return str(UUID(int=self._rng.getrandbits(128), version=4))


@dataclass(frozen=True)
class NeedleRecipe:
    """Draws samples of one needle task. words, essays: None where the task needs none."""

    needles: Needles
    words: Words | None
    essays: Essays | None
    num_available: int | None = None
    is_uneven: bool = False

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn:
        """Sample `index`; all draws follow from `key`. The haystack's unit is a word, a noise line or a needle."""
        needles, rng = self.needles, Random(key)
        source = _Source(needles, self.words, self.essays.text if self.essays else "", rng)
        hidden = [[source.needle(name) for _ in range(needles.values)] for name in _names(source, needles.keys)]
        asked = [hidden[i] for i in rng.sample(range(needles.keys), needles.queries)]
        placed = [needle for group in hidden for needle in group]
        rng.shuffle(placed)
        depths = sorted(rng.sample(DEPTHS, len(placed)))
        distractors: list[str] = []
        references = tuple(needle.value for group in asked for needle in group)

        def units(size: int) -> tuple[list[str], list[int], list[float]]:
            """The haystack, before which of its parts the needles stand, and their depths in percent."""
            if self.essays is not None:
                parts = self.essays.first(size)
                return parts, [len(parts) * depth // 100 for depth in depths], [float(depth) for depth in depths]
            while needles.haystack == "needles" and len(distractors) < size:
                distractors.append(source.needle(source.key()).sentence)
            parts = distractors[:size] if needles.haystack == "needles" else [NOISE] * size
            at = sorted(Random(f"{key}/{size}").sample(range(size), len(placed)))
            return parts, at, [round(100 * i / size, 2) for i in at]

        def write(size: int) -> Draft:
            parts, at, percents = units(size)
            for needle, i in reversed(list(zip(placed, at, strict=True))):
                parts.insert(i, needle.sentence)
            first = next(i for i, needle in enumerate(placed) if needle.value in references)
            haystack = (" " if self.essays is not None else "\n").join(parts)
            return _prompt(needles, haystack, [group[0].key for group in asked], references, percents[first])

        return Drawn(write, smallest=len(placed))


def _names(source: _Source, count: int) -> list[str]:
    return [source.key() for _ in range(count)]


def _prompt(needles: Needles, haystack: str, keys: list[str], references: tuple[str, ...], depth: float) -> Draft:
    asked = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])}, and {keys[-1]}"
    if len(references) == 1:
        kind, be, hidden, what = needles.value.removesuffix("s"), "is", "A special magic", "What is the"
    else:
        kind, be, hidden, what = needles.value, "are", "Some special magic", "What are all the"
    head = f"{hidden} {kind} {be} hidden within the following text. Make sure to memorize it."
    return Draft(
        context=f"{head} I will quiz you about the {kind} afterwards.\n{haystack}\n",
        question=f"{what} special magic {kind} for {asked} mentioned in the provided text?",
        answer_prefix=f" The special magic {kind} for {asked} mentioned in the provided text {be}",
        references=references,
        metadata={"depth": depth},
    )
