"""How much haystack fits a length: counting tokens, and the largest size within a budget.

Knows no task; a task says what its text of a given size is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

_MAX_INTERPOLATIONS = 12


@dataclass(frozen=True)
class Draft:
    """A prompt of one haystack size. references: what a good answer holds. metadata: as of `Sample`."""

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    metadata: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A sample whose random choices are made and whose haystack size is not.

    write: the prompt of a haystack of so many units; the same for the same size. smallest, largest: sizes that can be
    written; None: any.
    """

    write: Callable[[int], Draft]
    smallest: int
    largest: int | None = None


@dataclass(frozen=True)
class TokenCounter:
    """Counts as prompts are tokenised: the context with special tokens, question and answer prefix apart."""

    tokenizer: PreTrainedTokenizerBase

    def of_text(self, text: str, *, add_special_tokens: bool = False) -> int:
        """Tokens of a text."""
        encoded = self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)
        return len(encoded["input_ids"])

    def of_draft(self, draft: Draft) -> int:
        """Tokens of a whole prompt; a chat template adds its own."""
        head = self.of_text(draft.context, add_special_tokens=True)
        return head + self.of_text(draft.question) + self.of_text(draft.answer_prefix)


def largest_size(count: Callable[[int], int], smallest: int, largest: int | None, budget: int) -> int | None:
    """The largest size whose count is within the budget while that of the next size is not; None if none fits.

    count: tokens at a size; about linear and growing. It is asked about five times, as each call may tokenise a
    hundred thousand tokens. Sizes are whole numbers from `smallest` to `largest` (None: no end).
    """
    fits, tokens = smallest, count(smallest)
    if tokens > budget:
        return None
    fails = None if largest is None else largest + 1
    per_unit: float | None = None
    num_calls = 0
    while fails is None or fails - fits > 1:
        guess = _next_size(fits, fails, budget - tokens, per_unit, is_bisection=num_calls > _MAX_INTERPOLATIONS)
        counted = count(guess)
        num_calls += 1
        if counted != tokens:
            per_unit = abs(counted - tokens) / (guess - fits)
        if counted <= budget:
            fits, tokens = guess, counted
        else:
            fails = guess
    return fits


def _next_size(fits: int, fails: int | None, room: int, per_unit: float | None, *, is_bisection: bool) -> int:
    """A size above `fits` and below `fails` that is likely the last that fits, or the first that does not."""
    if is_bisection and fails is not None:
        return (fits + fails) // 2
    # Without a rate yet: a unit is taken for sixteen tokens; what this finds gives the rate.
    step = room / 16 if per_unit is None else room / per_unit
    guess = fits + max(1, int(step)) if not is_bisection else 2 * fits + 1
    return guess if fails is None else min(guess, fails - 1)
