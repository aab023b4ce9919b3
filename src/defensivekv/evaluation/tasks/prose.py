"""Prose to hide facts in, cut to a number of tokens at the ends of sentences."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler.corpus import Essays, read_essays
from defensivekv.evaluation.tasks.ruler.fit import TokenCounter, largest_size


def read_prose(folder: Path | None) -> Essays:
    """The essays of a data folder; the package's own where it has none, as a folder of another suite's files.

    Raises InvalidInputError for essays that can't be read or hold no text.
    """
    has_any = folder is not None and ((folder / "PaulGrahamEssays.json").exists() or (folder / "essays").exists())
    return read_essays(folder if has_any else None)


def hide(
    prose: Sequence[str],
    facts: Sequence[tuple[float, str]],
    *,
    start: int,
    budget: int,
    tokenizer: PreTrainedTokenizerBase,
    wrap: Callable[[str], str] = str,
) -> str:
    """As much prose as fits, from sentence `start` on and round again, with each fact at its depth.

    prose: sentences. facts: depth in percent of the prose's tokens, and text; a fact stands on a line of its own, at
    the last end of a sentence that is not past its depth. budget: tokens of the wrapped text at most, special ones
    counted; one more sentence would not fit. wrap: what stands around the text. Raises InvalidInputError where facts
    and one sentence are too much.
    """
    counter = TokenCounter(tokenizer)
    sentences, ends = _enough(prose, start, budget, counter)

    def written(count: int) -> str:
        return wrap(_place(sentences[:count], ends[: count + 1], facts))

    def tokens(count: int) -> int:
        return counter.of_text(written(count), add_special_tokens=True)

    count = largest_size(tokens, 1, len(sentences), budget)
    if count is None:
        raise InvalidInputError(
            f"what was asked for leaves {budget} tokens for facts and prose, which is too few: ask for a longer context"
        )
    return written(count)


def _enough(prose: Sequence[str], start: int, budget: int, counter: TokenCounter) -> tuple[list[str], list[int]]:
    """Sentences that fill the budget and more, and the tokens up to the end of each, 0 first."""
    counts: dict[str, int] = {}
    sentences: list[str] = []
    ends = [0]
    first = start % len(prose)
    for sentence in cycle([*prose[first:], *prose[:first]]):
        if sentence not in counts:
            counts[sentence] = max(1, counter.of_text(f" {sentence}"))
        sentences.append(sentence)
        ends.append(ends[-1] + counts[sentence])
        # Joined, they may be fewer tokens than apart.
        if ends[-1] >= 1.25 * budget:
            break
    return sentences, ends


def _place(sentences: Sequence[str], ends: Sequence[int], facts: Sequence[tuple[float, str]]) -> str:
    parts: list[str] = []
    done = 0
    for depth, fact in sorted(facts, key=lambda placed: placed[0]):
        place = bisect_right(ends, ends[-1] * depth / 100) - 1
        parts += [" ".join(sentences[done:place]), fact]
        done = place
    return "\n".join((*parts, " ".join(sentences[done:])))
