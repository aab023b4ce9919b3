"""RULER's variable tracking: a chain of assignments in noise; which variables hold its value?

VAR ABCDE = 12345 / VAR FGHIJ = VAR ABCDE / ... four times, after one solved example with names of three letters.
Prompt, counts and layout are those of NVIDIA/RULER (scripts/data/synthetic/variable_tracking.py and constants.py;
Apache-2.0), arXiv 2404.06654.
"""

from dataclasses import dataclass
from itertools import pairwise
from random import Random
from string import ascii_uppercase

from defensivekv.evaluation.tasks.ruler.fit import Draft, Drawn, TokenCounter, largest_size
from defensivekv.evaluation.tasks.ruler.niah import NOISE

NUM_HOPS = 4
"""Assignments of one variable to the next; one variable more is asked for."""

MAX_NEW_TOKENS = 30

FULL_EXAMPLE_LENGTH = 2000
"""Tokens of a prompt from which on the example has RULER's size; it has a quarter of shorter ones."""

_EXAMPLE_TOKENS = 500
_SMALLEST = NUM_HOPS + 1
_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text."


@dataclass(frozen=True)
class _Chain:
    names: tuple[str, ...]
    value: str

    @property
    def assignments(self) -> list[str]:
        # The blank at a line's end is RULER's.
        return [f"VAR {self.names[0]} = {self.value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(self.names))]

    @property
    def question(self) -> str:
        return f"Question: Find all variables that are assigned the value {self.value} in the text above."

    @property
    def answer_prefix(self) -> str:
        start = " Answer: According to the chain(s) of variable assignment in the text above,"
        return f"{start} {len(self.names)} variables are assigned the value {self.value}, they are: "

    def context(self, size: int, rng: Random) -> str:
        """The chain in order among `size` lines of noise, before different ones."""
        lines = [NOISE] * size
        places = sorted(rng.sample(range(size), len(self.names)))
        for i, line in reversed(list(zip(places, self.assignments, strict=True))):
            lines.insert(i, line)
        return f"{_HEAD}\n\n{chr(10).join(lines)}\n"


@dataclass(frozen=True)
class VariableRecipe:
    """Draws samples of variable tracking. length: tokens of a whole prompt with its answer."""

    length: int
    num_available: int | None = None
    is_uneven: bool = False

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn:
        """Sample `index`; all draws follow from `key`. The haystack's unit is a line of noise."""
        rng = Random(key)
        chain = _draw_chain(rng, 5)
        example = _draw_chain(rng, 3, other_than=chain.value)

        def solved(size: int) -> str:
            text = example.context(size, Random(f"{key}/example/{size}"))
            return f"{text}{example.question}{example.answer_prefix} {' '.join(example.names)}\n\n"

        budget = min(_EXAMPLE_TOKENS, self.length * _EXAMPLE_TOKENS // FULL_EXAMPLE_LENGTH)
        size = largest_size(lambda n: counter.of_text(solved(n)), _SMALLEST, None, budget)
        shown = solved(size or _SMALLEST)

        def write(size: int) -> Draft:
            context = shown + chain.context(size, Random(f"{key}/{size}"))
            return Draft(context, chain.question, chain.answer_prefix, chain.names)

        return Drawn(write, smallest=_SMALLEST)


def _draw_chain(rng: Random, num_letters: int, other_than: str = "") -> _Chain:
    known = f"{NOISE} {_HEAD}".upper()
    names: list[str] = []
    while len(names) <= NUM_HOPS:
        name = "".join(rng.choices(ascii_uppercase, k=num_letters))
        # A reference that is a word of the prompt would be found in an answer that only repeats it.
        if name not in names and name not in known:
            names.append(name)
    while (value := str(rng.randrange(10_000, 99_999))) == other_than:
        pass
    return _Chain(tuple(names), value)
