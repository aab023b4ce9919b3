"""RULER's two aggregation tasks: the ten common words of a numbered list, the three most frequent coded words.

Prompts, frequencies and layout are those of NVIDIA/RULER (scripts/data/synthetic/common_words_extraction.py,
freq_words_extraction.py and constants.py; Apache-2.0), arXiv 2404.06654. Other than there, the example of the common
words and its question share no word, and a frequent word is never as rare as the next one.
"""

from dataclasses import dataclass
from math import pi
from random import Random
from string import ascii_lowercase

from defensivekv.evaluation.tasks.ruler.corpus import Words
from defensivekv.evaluation.tasks.ruler.fit import Draft, Drawn, TokenCounter

CWE_NEW_TOKENS, FWE_NEW_TOKENS = 120, 50

NUM_COMMON = 10
"""Common words of a list."""

ALPHA = 2.0
"""Of the zeta distribution: word k of a text of n comes n / (k**2 zeta(2)) times, rounded down."""

NOISE_WORD = "..."
"""The most frequent one of a coded text; not asked for."""

_ZETA = pi**2 / 6
_WORD_LETTERS = 6
_TOKENS_PER_CODED_WORD = 50
_SHORT = 4096

_CWE_HEAD = (
    "Below is a numbered list of words. In these words, some appear more often than others."
    " Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = "Question: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
_FWE_HEAD = (
    "Read the following coded text and track the frequency of each coded word."
    " Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "Question: Do not provide any explanation. Please ignore the dots '....'."
    " What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


@dataclass(frozen=True)
class _ListShape:
    """common, uncommon: times that words of a list appear. example_words, ...: the same of the solved example."""

    common: int
    uncommon: int
    example_words: int
    example_common: int
    example_uncommon: int


@dataclass(frozen=True)
class CommonWordsRecipe:
    """Draws samples of common-words extraction. length: of a prompt with its answer; below 4096 words are rarer."""

    words: Words
    length: int
    num_available: int | None = None
    is_uneven: bool = False

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn:
        """Sample `index`; all draws follow from `key`. The haystack's unit is a word of the vocabulary."""
        shape = _ListShape(6, 1, 20, 3, 1) if self.length < _SHORT else _ListShape(30, 3, 40, 10, 3)
        order = list(self.words.all)
        Random(key).shuffle(order)
        example, order = order[: shape.example_words], order[shape.example_words :]
        listed = _numbered(example, shape.example_common, shape.example_uncommon, Random(f"{key}/example"))
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(example[:NUM_COMMON], start=1))
        shown = f"{_CWE_HEAD}{listed}\n{_CWE_QUESTION}{_CWE_PREFIX} {answer}\n"

        def write(size: int) -> Draft:
            listed = _numbered(order[:size], shape.common, shape.uncommon, Random(f"{key}/{size}"))
            context = f"{shown}{_CWE_HEAD}{listed}\n"
            return Draft(context, _CWE_QUESTION, _CWE_PREFIX, tuple(order[:NUM_COMMON]), {"words": size})

        return Drawn(write, smallest=NUM_COMMON + 1, largest=len(order))


def _numbered(words: list[str], common: int, uncommon: int, rng: Random) -> str:
    entries = words[:NUM_COMMON] * common + words[NUM_COMMON:] * uncommon
    rng.shuffle(entries)
    return " ".join(f"{i}. {word}" for i, word in enumerate(entries, start=1))


def smallest_fwe_length() -> int:
    """Tokens below which a coded text has no three words besides the dots."""
    return 4 * _TOKENS_PER_CODED_WORD


def zeta_counts(num_words: int, vocabulary: int) -> list[int]:
    """How often each word appears, the most frequent first."""
    return [int(num_words * k**-ALPHA / _ZETA) for k in range(1, vocabulary + 1)]


@dataclass(frozen=True)
class FrequentWordsRecipe:
    """Draws samples of frequent-words extraction. length: of a prompt with its answer; sets the vocabulary."""

    length: int
    num_available: int | None = None
    is_uneven: bool = False

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn:
        """Sample `index`; all draws follow from `key`. The haystack's unit is a word, before rounding down."""
        rng, drawn = Random(key), {NOISE_WORD: None}
        prompt = f"{_FWE_HEAD} {_FWE_QUESTION} {_FWE_PREFIX}".lower()
        while len(drawn) < self.length // _TOKENS_PER_CODED_WORD:
            word = "".join(rng.choices(ascii_lowercase, k=_WORD_LETTERS))
            if word not in prompt:
                drawn[word] = None
        vocabulary = tuple(drawn)

        def write(size: int) -> Draft:
            counts = zeta_counts(_clear_size(size), len(vocabulary))
            coded = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
            Random(f"{key}/{size}").shuffle(coded)
            context = f"{_FWE_HEAD}{' '.join(coded)}\n"
            return Draft(context, _FWE_QUESTION, _FWE_PREFIX, tuple(vocabulary[1:4]), {"words": len(coded)})

        return Drawn(write, smallest=0)


def _is_clear(num_words: int) -> bool:
    """Whether the third word besides the dots is more frequent than the fourth."""
    *_, third, fourth = zeta_counts(num_words, 5)
    return third > fourth


# From 74 words on, the third and the fourth word's frequencies differ by one at least before rounding.
_CLEAR = tuple(n for n in range(74) if _is_clear(n))


def _clear_size(size: int) -> int:
    return _CLEAR[size] if size < len(_CLEAR) else 74 + size - len(_CLEAR)
