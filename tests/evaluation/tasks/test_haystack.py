from pathlib import Path

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import METRICS
from defensivekv.evaluation.tasks.haystack import ANSWER, DEPTHS, NEEDLE, HaystackTask, make_task
from defensivekv.evaluation.tasks.sample import Sample
from defensivekv.evaluation.tasks.task import Task, TaskOptions
from tests.evaluation.tasks.small_tokenizers import NAMES, count, small_tokenizer


def make(needle: str = "sandwich", length: int = 600, **options: int) -> HaystackTask:
    return make_task(needle, TaskOptions(**options), length)  # type: ignore[arg-type]


def needle_of(sample: Sample) -> str:
    reference = sample.questions[0].references[0]
    (line,) = [line for line in sample.context.split("\n") if reference in line]
    return line


@pytest.mark.parametrize("needle", ["sandwich", "number"])
@pytest.mark.parametrize("name", NAMES)
def test_every_sample_fills_its_length_and_no_more(name: str, needle: str) -> None:
    tokenizer = small_tokenizer(name)
    longest = max(count(tokenizer, f" {sentence}") for sentence in make().prose.sentences)

    for length in (600, 1500):
        samples = list(make(needle, length).samples(tokenizer))
        assert len(samples) == len(DEPTHS)
        for sample in samples:
            (question,) = sample.questions
            total = count(tokenizer, sample.context, special=True) + count(tokenizer, question.text)
            assert length - longest - 3 <= total + sample.max_new_tokens <= length


@pytest.mark.parametrize("needle", ["sandwich", "number"])
@pytest.mark.parametrize("name", NAMES)
def test_the_needle_stands_once_at_its_depth_between_sentences(name: str, needle: str) -> None:
    tokenizer = small_tokenizer(name)
    prose = make().prose
    longest = max(count(tokenizer, f" {sentence}") for sentence in prose.sentences)

    for sample in make(needle, 1500).samples(tokenizer):
        found = needle_of(sample)
        before, _, after = sample.context.removesuffix(" </book>.").partition(f"\n{found}\n")
        text = before.removeprefix("This is a very long story book: <book> ")
        assert not text or text.endswith(tuple(prose.sentences))
        assert not after or after.startswith(tuple(prose.sentences))
        assert sample.context.count(sample.questions[0].references[0].rstrip(".")) == 1
        num_before, num_after = count(tokenizer, text), count(tokenizer, after)
        target = (num_before + num_after) * float(sample.metadata["depth"]) / 100
        assert target - longest - 5 <= num_before <= target + 5


def test_depths_differ_in_the_needles_place_only() -> None:
    samples = list(make(length=900).samples(small_tokenizer("words")))
    haystacks = [sample.context.replace(f"\n{NEEDLE}\n", " ").split() for sample in samples]

    assert [sample.metadata["depth"] for sample in samples] == list(DEPTHS)
    # At either end the needle's line break has no sentence before or after it.
    assert all(haystack == haystacks[0] for haystack in haystacks)


def test_rounds_have_their_own_start_and_fact() -> None:
    tokenizer = small_tokenizer("words")
    samples = list(make("number", num_samples=2).samples(tokenizer))

    assert len(samples) == 2 * len(DEPTHS)
    assert len({sample.id for sample in samples}) == len(samples)
    assert len({sample.questions[0].references for sample in samples}) == len(samples)
    assert samples[0].context.split("\n")[2:] != samples[len(DEPTHS)].context.split("\n")[2:]


def test_the_same_options_give_the_same_samples() -> None:
    tokenizer = small_tokenizer("pieces")

    assert list(make("number").samples(tokenizer)) == list(make("number").samples(tokenizer))
    assert list(make("number").samples(tokenizer)) != list(make("number", seed=7).samples(tokenizer))


def test_a_task_tells_of_itself(tmp_path: Path) -> None:
    own: Task = make(length=1024)
    assert (own.name, own.metric, own.split) == ("haystack@1024", "needle_recall", "own")
    assert "not Paul Graham's essays" in own.not_comparable
    assert METRICS[own.metric].function(f"You should {ANSWER}", (ANSWER,), ()) == 1.0
    assert make("number").name == "haystack/number@600"
    assert "random number" in make("number").not_comparable

    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "a.txt").write_text("One sentence stands here. Another one follows it.\n")
    theirs = make_task("sandwich", TaskOptions(data=tmp_path), 256)
    assert theirs.not_comparable == ""
    assert theirs.revision != own.revision
    assert all("One sentence stands here." in sample.context for sample in theirs.samples(small_tokenizer("words")))


def test_a_folder_without_essays_leaves_the_own_prose(tmp_path: Path) -> None:
    (tmp_path / "trec.jsonl").touch()

    assert make_task("sandwich", TaskOptions(data=tmp_path), 256).prose.is_own


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no needle 'pin': known are sandwich, number"):
        make("pin")
    with pytest.raises(InvalidInputError, match=r"50 tokens are too few"):
        make(length=50)
    with pytest.raises(InvalidInputError, match=r"leaves .* tokens for facts and prose"):
        next(iter(make(length=110).samples(small_tokenizer("pieces"))))
    (tmp_path / "essays").mkdir()
    with pytest.raises(InvalidInputError, match="essays"):
        make_task("sandwich", TaskOptions(data=tmp_path), 256)
