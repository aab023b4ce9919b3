import re

import pytest

from defensivekv.evaluation.tasks.ruler.niah import NOISE
from defensivekv.evaluation.tasks.sample import Sample
from tests.evaluation.tasks.ruler.cases import samples, task, tokenizer

HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
CASES = [("words", 512), ("words", 4096), ("pieces", 1024), ("pieces", 4096)]


def split(sample: Sample) -> tuple[str, str]:
    """The solved example, and the context proper."""
    empty, example, own = sample.context.split(HEAD)
    assert empty == ""
    return example, own


def chain(text: str) -> tuple[str, list[str]]:
    """The value, and the variables that hold it, followed in the text from assignment to assignment."""
    lines = [line for line in text.split("\n") if line.startswith("VAR ")]
    start = re.fullmatch(r"VAR ([A-Z]+) = (\d{5})", lines[0])
    assert start is not None
    names = [start[1]]
    for line in lines[1:]:
        copy = re.fullmatch(r"VAR ([A-Z]+) = VAR ([A-Z]+) ", line)
        assert copy is not None
        assert copy[2] == names[-1]
        names.append(copy[1])
    return start[2], names


@pytest.mark.parametrize(("kind", "length"), CASES)
def test_a_chain_of_four_hops_gives_five_variables_their_value(kind: str, length: int) -> None:
    for sample in samples("vt", length, kind, count=4):
        own = split(sample)[1]
        question = sample.questions[0]
        value, names = chain(own)
        assert names == list(question.references)
        assert len(set(names)) == 5
        assert all(re.fullmatch(r"[A-Z]{5}", name) for name in names)
        assert question.text == f"Question: Find all variables that are assigned the value {value} in the text above."
        assert question.answer_prefix == (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"5 variables are assigned the value {value}, they are: "
        )
        assert sample.context.count(value) == 1
        assert [sample.context.count(name) for name in names] == [2, 2, 2, 2, 1]
        others = {line for line in own.split("\n") if not line.startswith("VAR ")}
        assert others == {NOISE, ""}
        assert own.endswith(f"{NOISE}\n")


@pytest.mark.parametrize(("kind", "length"), CASES)
def test_the_example_is_solved_and_has_another_value(kind: str, length: int) -> None:
    for sample in samples("vt", length, kind, count=4):
        example, own = split(sample)
        text, rest = example.split("Question: ")
        value, names = chain(text)
        assert len(set(names)) == 5
        assert all(re.fullmatch(r"[A-Z]{3}", name) for name in names)
        assert rest == (
            f"Find all variables that are assigned the value {value} in the text above. Answer: According to the "
            "chain(s) of variable assignment in the text above, 5 variables are assigned the value "
            f"{value}, they are:  {' '.join(names)}\n\n"
        )
        assert value not in own
        assert text.count(NOISE) >= 5


def test_the_example_has_500_tokens_and_less_of_short_prompts() -> None:
    for length, size in ((4096, 500), (2048, 500), (1024, 256)):
        sample = samples("vt", length, count=1)[0]
        tokens = len(tokenizer("words")(HEAD + split(sample)[0])["input_ids"])
        assert size - 25 < tokens <= size + 1
    assert "example" in task("vt", length=1024).not_comparable
    assert task("vt", length=2048).not_comparable == ""
