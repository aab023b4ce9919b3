"""What holds for all thirteen tasks."""

from collections.abc import Iterable
from dataclasses import FrozenInstanceError, dataclass
from itertools import islice

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler import TASKS, RulerTask, make_task
from defensivekv.evaluation.tasks.ruler.fit import Draft, Drawn, TokenCounter
from defensivekv.evaluation.tasks.sample import Sample
from defensivekv.evaluation.tasks.task import Task, TaskOptions
from tests.evaluation.tasks.ruler.cases import SMALLEST, num_tokens, samples, task, tokenizer

KINDS = ["words", "pieces"]
# Tokens of the largest unit of a haystack, which is all that may be missing; counting parts apart costs a few more.
ROOM = {"words": 60, "pieces": 200}
GRAIN = {"niah_single_2": 3, "niah_single_3": 3, "niah_multikey_1": 3, "niah_multivalue": 3, "niah_multiquery": 3}


def lengths(name: str, kind: str) -> Iterable[int]:
    return (length for length in (512, 1024, 2048, 4096, 8192) if length >= SMALLEST[kind].get(name, 512))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_a_prompt_and_its_answer_take_the_length_or_a_little_less(name: str, kind: str) -> None:
    for length in lengths(name, kind):
        if (name, kind, length) == ("cwe", "pieces", 4096):
            continue  # From 4096 on, words are repeated more often, and these small pieces have no room for that.
        for sample in samples(name, length, kind, count=2):
            used = num_tokens(kind, sample)
            assert length - GRAIN.get(name, ROOM[kind]) <= used <= length, sample.id
            assert sample.metadata["length"] == length


@pytest.mark.parametrize("name", TASKS)
def test_samples_are_the_same_under_a_seed_and_differ_between_samples_seeds_and_lengths(name: str) -> None:
    first = samples(name, 1024, seed=7)
    assert first == samples(name, 1024, seed=7)
    assert first == samples(name, 1024, count=5, seed=7)[:3]
    contexts = [s.context for s in first + samples(name, 1024, seed=8) + samples(name, 2048, seed=7)]
    assert len(set(contexts)) == len(contexts)
    assert len({s.id for s in first}) == 3
    if not name.startswith("qa"):
        assert not {s.questions[0].references for s in first} & {
            s.questions[0].references for s in samples(name, 1024, seed=8)
        }


@pytest.mark.parametrize("name", TASKS)
def test_a_task_tells_of_itself(name: str) -> None:
    made: Task = task(name, length=4096)
    family = name.split("_")[0]
    domains = {"niah": "retrieval", "vt": "tracing", "cwe": "aggregation", "fwe": "aggregation"}
    assert made.name == f"ruler/{name}@4096"
    assert made.suite == "ruler"
    assert made.domain == domains.get(family, "question answering")
    assert made.metric == ("string_match_any" if family == "qa" else "string_match_all")
    assert made.split == "authors"
    assert made.length == 4096
    assert "seed 42" in made.revision
    has_corpus = name in {"niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery"}
    assert bool(made.not_comparable) == (has_corpus or family == "qa")
    assert ("sha256" in made.revision) == (has_corpus or family == "qa")
    with pytest.raises(FrozenInstanceError):
        made.name = "other"  # type: ignore[misc]


def test_the_thirteen_tasks_and_their_new_tokens() -> None:
    new_tokens = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
    assert len(TASKS) == len(set(TASKS)) == 13
    for name in TASKS:
        sample = samples(name, 2048, count=1)[0]
        assert sample.max_new_tokens == new_tokens.get(name, 128)
        assert len(sample.questions) == 1
        assert not sample.is_bare
        assert not sample.stop
        assert not sample.choices


def test_500_samples_by_default_drawn_one_by_one() -> None:
    made = task("vt")
    assert made.num_samples == 500
    drawn = list(islice(made.samples(tokenizer("words")), 2))
    assert all(isinstance(sample, Sample) for sample in drawn)
    assert len(list(task("vt", num_samples=3).samples(tokenizer("words")))) == 3


LEAST = {"vt": 31, "cwe": 121, "fwe": 200, "qa_1": 33, "qa_2": 33}


@pytest.mark.parametrize("name", TASKS)
def test_a_length_that_holds_no_answer_is_refused_at_once(name: str) -> None:
    least = LEAST.get(name, 129)
    with pytest.raises(InvalidInputError, match=f"ruler/{name}: {least - 1} tokens .* at least {least}"):
        make_task(name, TaskOptions(), least - 1)
    make_task(name, TaskOptions(), least)


@pytest.mark.parametrize(("name", "kind"), [(n, k) for n in TASKS for k in KINDS if (n, k) != ("fwe", "words")])
def test_a_length_too_short_for_any_sample_is_refused_with_one_that_is_enough(name: str, kind: str) -> None:
    def first(length: int) -> object:
        return next(iter(task(name, length, num_samples=6).samples(tokenizer(kind))))

    with pytest.raises(InvalidInputError, match=r"ask for a length of at least \d+") as caught:
        first(LEAST.get(name, 129))
    enough = int(str(caught.value).split()[-1])
    if name == "vt":  # Its example grows with the length, so that one step may not be enough.
        enough += 150
    assert len(samples(name, enough, kind, count=6)) == 6
    with pytest.raises(InvalidInputError):
        first(enough * 3 // 5 if name != "fwe" else 201)


@dataclass(frozen=True)
class _Growing:
    """Sample i takes at least 80 + i words."""

    num_available: int | None = None
    is_uneven: bool = False

    def draw(self, key: str, index: int, counter: TokenCounter) -> Drawn:
        return Drawn(lambda size: Draft("word " * size, "", "", ("x",)), smallest=80 + index)


def test_a_length_that_only_a_later_sample_does_not_fit_is_refused_before_the_first() -> None:
    def made(num_samples: int) -> RulerTask:
        return RulerTask("vt", "tracing", "string_match_all", 120, 30, num_samples, 42, "", "", _Growing())

    assert len(list(made(9).samples(tokenizer("words")))) == 9
    with pytest.raises(InvalidInputError, match=r"up to 121 tokens of this tokenizer.* at least 136"):
        next(made(11).samples(tokenizer("words")))


def test_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"unknown RULER task 'niah'.*niah_single_1"):
        make_task("niah", TaskOptions(), 4096)
    with pytest.raises(InvalidInputError, match="unknown split 'own'"):
        make_task("vt", TaskOptions(split="own"), 4096)
    with pytest.raises(InvalidInputError, match="0 samples"):
        make_task("vt", TaskOptions(num_samples=0), 4096)
    assert make_task("vt", TaskOptions(split="kvpress"), 4096).split == "authors"
