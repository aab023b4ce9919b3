import re
from pathlib import Path

import pytest

from defensivekv.evaluation.tasks.ruler.niah import DEPTHS, NEEDLES, NOISE, Needles
from defensivekv.evaluation.tasks.sample import Sample
from tests.evaluation.tasks.ruler.cases import own_text, samples, write_json

NUMBER, UUID = r"\d{7}", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (.+?) is: ([\da-f-]+)\.")
# haystack, key, value, needles placed, needles asked for
SHAPES = {
    "niah_single_1": ("noise", r"\D+", NUMBER, 1, 1),
    "niah_single_2": ("essay", r"\D+", NUMBER, 1, 1),
    "niah_single_3": ("essay", r"\D+", UUID, 1, 1),
    "niah_multikey_1": ("essay", r"\D+", NUMBER, 4, 1),
    "niah_multikey_2": ("needles", r"\D+", NUMBER, 1, 1),
    "niah_multikey_3": ("needles", UUID, UUID, 1, 1),
    "niah_multivalue": ("essay", r"\D+", NUMBER, 4, 4),
    "niah_multiquery": ("essay", r"\D+", NUMBER, 4, 4),
}
CASES = [(name, kind, length) for name in SHAPES for kind in ("words", "pieces") for length in (512, 2048)]


def body(sample: Sample) -> str:
    """The haystack with its needles, without the instruction."""
    head, haystack = sample.context.split("\n", 1)
    assert head.endswith("afterwards.")
    assert haystack.endswith("\n")
    return haystack[:-1]


@pytest.mark.parametrize(("name", "kind", "length"), CASES)
def test_keys_values_and_references_are_as_often_there_as_they_should_be(name: str, kind: str, length: int) -> None:
    haystack, key, value, placed, asked = SHAPES[name]
    for sample in samples(name, length, kind, count=4):
        question = sample.questions[0]
        found = NEEDLE.findall(sample.context)
        assert len(found) == placed if haystack != "needles" else len(found) >= 2
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for _, k, v in found)
        assert {what for what, _, _ in found} == {"uuids" if value == UUID else "numbers"}
        keys = [k for _, k, _ in found]
        assert len(set(keys)) == (1 if name == "niah_multivalue" else len(found))
        assert len(question.references) == asked
        for reference in question.references:
            assert sample.context.count(reference) == 1
            assert reference not in question.text + question.answer_prefix
        wanted = [k for k in set(keys) if re.search(rf"(for|,|and) {re.escape(k)}( mentioned|,)", question.text)]
        assert {v for _, k, v in found if k in wanted} == set(question.references)
        assert len(wanted) == (4 if name == "niah_multiquery" else 1)


def test_references_come_in_the_order_of_the_keys_asked_for() -> None:
    for sample in samples("niah_multiquery", 1024, count=8):
        values = {k: v for _, k, v in NEEDLE.findall(sample.context)}
        names = re.search(r"numbers for (.*) mentioned", sample.questions[0].text)
        assert names is not None
        assert [values[k] for k in re.split(r", and |, ", names[1])] == list(sample.questions[0].references)


@pytest.mark.parametrize("name", list(SHAPES))
def test_the_prompt_is_rulers_in_singular_or_plural(name: str) -> None:
    what = "uuid" if SHAPES[name][2] == UUID else "number"
    sample = samples(name, 1024, count=1)[0]
    question = sample.questions[0]
    if SHAPES[name][4] == 1:
        assert sample.context.startswith(
            f"A special magic {what} is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what} afterwards.\n"
        )
        assert question.text.startswith(f"What is the special magic {what} for ")
        assert question.answer_prefix.endswith(" mentioned in the provided text is")
    else:
        assert sample.context.startswith(
            f"Some special magic {what}s are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {what}s afterwards.\n"
        )
        assert question.text.startswith(f"What are all the special magic {what}s for ")
        assert question.answer_prefix.endswith(" mentioned in the provided text are")
    assert question.text.endswith(" mentioned in the provided text?")
    assert question.answer_prefix.startswith(f" The special magic {what}")


def test_the_needle_lies_among_lines_of_noise_at_its_depth() -> None:
    depths = []
    for sample in samples("niah_single_1", 2048, count=12):
        lines = body(sample).split("\n")
        at = next(i for i, line in enumerate(lines) if line != NOISE)
        assert [line for line in lines if line != NOISE] == [lines[at]]
        assert sample.metadata["depth"] == pytest.approx(100 * at / (len(lines) - 1), abs=0.01)
        depths.append(float(sample.metadata["depth"]))
    assert min(depths) < 40
    assert max(depths) > 60
    assert all(0 <= depth <= 100 for depth in depths)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_the_haystack_of_needles_is_made_of_needles_only(name: str) -> None:
    for sample in samples(name, 2048, "pieces", count=4):
        lines = body(sample).split("\n")
        assert all(NEEDLE.fullmatch(line) for line in lines)
        at = next(i for i, line in enumerate(lines) if sample.questions[0].references[0] in line)
        assert sample.metadata["depth"] == pytest.approx(100 * at / (len(lines) - 1), abs=0.01)
        values = [v for _, _, v in NEEDLE.findall(sample.context)]
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape[0] == "essay"])
def test_needles_stand_between_whole_sentences_of_the_essays_at_their_depths(name: str) -> None:
    own = " ".join(own_text().split())
    for sample in samples(name, 4096, "words", count=6):
        text = body(sample)
        rest = " ".join(NEEDLE.sub("", text).split())
        repeated = " ".join([own] * 5)
        assert repeated.startswith(rest)
        for needle in NEEDLE.finditer(text):
            before, after = text[: needle.start()].rstrip(), NEEDLE.sub("", text[needle.end() :]).strip()
            # The last sentence is cut where the length ends, and a needle at 100 percent follows it.
            assert not before or before[-1] in ".?!" or not after
        first = next(m for m in NEEDLE.finditer(text) if m[3] in sample.questions[0].references)
        share = 100 * len(NEEDLE.sub("", text[: first.start()])) / len(rest)
        assert sample.metadata["depth"] in DEPTHS
        assert share == pytest.approx(float(sample.metadata["depth"]), abs=8)


def test_depths_are_rulers_forty_from_start_to_end() -> None:
    assert len(set(DEPTHS)) == 40
    assert DEPTHS[:4] == (0, 3, 5, 8)
    assert DEPTHS[-1] == 100
    assert list(DEPTHS) == sorted(DEPTHS)


def test_a_value_that_the_essays_hold_is_not_drawn(tmp_path: Path) -> None:
    taken = {sample.questions[0].references[0] for sample in samples("niah_single_2", 512, count=30)}
    write_json(tmp_path, "PaulGrahamEssays.json", {"text": " ".join(f"It was {value} then." for value in taken) * 20})
    again = {sample.questions[0].references[0] for sample in samples("niah_single_2", 512, count=30, data=tmp_path)}
    assert len(again) == 30
    assert not taken & again


def test_the_settings_are_those_of_the_paper() -> None:
    counts = {name: (needles.keys, needles.values, needles.queries) for name, needles in NEEDLES.items()}
    assert counts.pop("niah_multikey_1") == (4, 1, 1)
    assert counts.pop("niah_multivalue") == (1, 4, 1)
    assert counts.pop("niah_multiquery") == (4, 1, 4)
    assert set(counts.values()) == {(1, 1, 1)}
    assert NEEDLES["niah_multikey_3"] == Needles("needles", key="uuids", value="uuids")
