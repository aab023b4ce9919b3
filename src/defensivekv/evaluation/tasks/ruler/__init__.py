"""RULER's thirteen tasks (arXiv 2404.06654, github.com/NVIDIA/RULER, Apache-2.0), drawn by generators of our own.

Prompts, haystacks, counts and sizes are RULER's. A data folder (`TaskOptions.data`) may hold `PaulGrahamEssays.json`
or `essays/*.txt`, `squad.json` and `hotpotqa.json`; see `corpus` and `qa_files`. Without one, a few essays and
paragraphs of our own serve, and the tasks that use them say so in `not_comparable`.

Known differences from RULER: draws differ, since each sample has its own random stream; a haystack is filled to the
last word, line or document, where RULER goes in steps; sentences are told apart by a rule, not by NLTK; fwe leaves
room for its answer; vt draws its solved example anew for each sample, a shorter one below 2000 tokens; a list of cwe
ends with wonderwords' 8000 words, where RULER turns to a longer word list, so that it may fall short of lengths
beyond 100,000 tokens. Keys, values and variables never collide.
"""

from pathlib import Path

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler import niah, question_answering, variable_tracking, word_extraction
from defensivekv.evaluation.tasks.ruler.corpus import read_essays, read_words
from defensivekv.evaluation.tasks.ruler.qa_files import read_questions
from defensivekv.evaluation.tasks.ruler.task import Recipe, RulerTask
from defensivekv.evaluation.tasks.task import TaskOptions

__all__ = ["TASKS", "RulerTask", "make_task"]

TASKS = (*niah.NEEDLES, "vt", "cwe", "fwe", "qa_1", "qa_2")
"""RULER's names of its tasks."""

_VERSION = 1
"""Of the generators: raised with every change of what a seed gives."""

_NUM_SAMPLES = 500

_KINDS = {
    "niah": ("retrieval", niah.MAX_NEW_TOKENS),
    "vt": ("tracing", variable_tracking.MAX_NEW_TOKENS),
    "cwe": ("aggregation", word_extraction.CWE_NEW_TOKENS),
    "fwe": ("aggregation", word_extraction.FWE_NEW_TOKENS),
    "qa": ("question answering", question_answering.MAX_NEW_TOKENS),
}


def make_task(name: str, options: TaskOptions, length: int) -> RulerTask:
    """One task at one length in tokens, answer included.

    Raises InvalidInputError for an unknown name, split or number of samples, for a length that leaves no room, where
    a file of the data folder is missing or of another schema, and where the package wonderwords is needed and missing.
    """
    if name not in TASKS:
        raise InvalidInputError(f"unknown RULER task {name!r}: known are {', '.join(TASKS)}")
    if options.split not in (None, "authors", "kvpress"):
        raise InvalidInputError(f"unknown split {options.split!r}: RULER has one way only, leave it out")
    num_samples = _NUM_SAMPLES if options.num_samples is None else options.num_samples
    if num_samples < 1:
        raise InvalidInputError(
            f"{num_samples} samples: ask for at least one, or leave the number out for {_NUM_SAMPLES}"
        )
    domain, max_new_tokens = _KINDS[name.split("_")[0]]
    least = word_extraction.smallest_fwe_length() if name == "fwe" else max_new_tokens + 1
    if length < least:
        message = f"ruler/{name}: {length} tokens cannot hold even the answer: ask for at least {least}, RULER for 4096"
        raise InvalidInputError(message)
    recipe, sources, not_comparable = _recipe(name, options.data, length)
    return RulerTask(
        task=name,
        domain=domain,
        metric="string_match_any" if name.startswith("qa") else "string_match_all",
        length=length,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        seed=options.seed,
        revision=", ".join([f"generator {_VERSION}", f"seed {options.seed}", *sources]),
        not_comparable=not_comparable,
        recipe=recipe,
    )


def _recipe(name: str, data: Path | None, length: int) -> tuple[Recipe, list[str], str]:
    """What draws the samples, what it draws from, and why figures are not comparable."""
    if name in niah.NEEDLES:
        needles = niah.NEEDLES[name]
        words = read_words() if needles.key == "words" else None
        essays = read_essays(data) if needles.haystack == "essay" else None
        sources = [source.source for source in (words, essays) if source is not None]
        is_own = essays is not None and essays.is_own
        return niah.NeedleRecipe(needles, words, essays), sources, _OWN_ESSAYS if is_own else ""
    if name == "vt":
        is_short = length < variable_tracking.FULL_EXAMPLE_LENGTH
        return variable_tracking.VariableRecipe(length), [], _SHORT_EXAMPLE if is_short else ""
    if name == "cwe":
        words = read_words()
        return word_extraction.CommonWordsRecipe(words, length), [words.source], ""
    if name == "fwe":
        return word_extraction.FrequentWordsRecipe(length), [], ""
    questions = read_questions(name, data)
    return question_answering.QuestionRecipe(questions), [questions.source], _OWN_PARAGRAPHS if questions.is_own else ""


_OWN_ESSAYS = "the haystack is a few essays of our own, repeated, not Paul Graham's"
_OWN_PARAGRAPHS = "questions and documents are a few of our own, not SQuAD's or HotpotQA's"
_SHORT_EXAMPLE = "the solved example is shorter than RULER's"
