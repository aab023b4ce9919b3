import json
import re
from pathlib import Path
from typing import Any

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.sample import Sample, Unreadable
from tests.evaluation.tasks.ruler.cases import own_paragraphs, qa, samples, squad, task, tokenizer, write_json

INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)


def documents(sample: Sample) -> list[str]:
    head = f"{INSTRUCTION}\n\nThe following are given documents.\n\n"
    assert sample.context.startswith(head)
    assert sample.context.endswith("\n\n")
    found = re.split(r"(?:^|\n\n)Document (\d+):\n", sample.context.removeprefix(head)[:-2])
    assert [int(number) for number in found[1::2]] == list(range(1, len(found) // 2 + 1))
    return found[2::2]


@pytest.mark.parametrize("kind", ["words", "pieces"])
@pytest.mark.parametrize(("name", "length"), [("qa_1", 512), ("qa_1", 2048), ("qa_2", 512), ("qa_2", 2048)])
def test_a_questions_own_documents_are_there_once_and_hold_the_only_answer(name: str, length: int, kind: str) -> None:
    loaded = own_paragraphs()
    texts = {p["title"]: f"{p['title']}\n{p['text']}" for p in loaded["paragraphs"]}
    records = loaded["paragraphs"] if name == "qa_1" else loaded["bridges"]
    found = samples(name, length, kind, count=100)
    assert len(found) == len(records)
    for sample, record in zip(found, records, strict=True):
        question, listed = sample.questions[0], documents(sample)
        assert question.text == f"{INSTRUCTION}\n\nQuestion: {record['question']}"
        assert question.answer_prefix == " Answer:"
        assert question.references == (record["answer"],)
        own = [texts[title] for title in record.get("titles", [record.get("title")])]
        assert [listed.count(text) for text in own] == [1] * len(own)
        assert set(listed) <= set(texts.values())
        assert sample.context.lower().count(record["answer"].lower()) == 1
        assert sample.metadata["documents"] == len(listed)
    positions = {
        documents(s).index(texts[r.get("title", r.get("titles", [""])[0])]) for s, r in zip(found, records, strict=True)
    }
    assert len(positions) > 1


@pytest.fixture
def squad_folder(tmp_path: Path) -> Path:
    contexts = [f"Paragraph {i} says that the bird of {i} is a finch{i}." for i in range(6)]
    qas = [[qa(f"Which bird is of {i}?", f"finch{i}", f"a finch{i}", f"finch{i}")] for i in range(6)]
    qas[1].append(qa("Which fish?", is_impossible=True))
    near = squad(contexts, qas)
    far = squad([f"Far away, text {i} tells of stone." for i in range(30)], [[qa("Of what?", "stone")]] * 30)
    write_json(tmp_path, "squad.json", {"version": "v2.0", "data": near["data"] + far["data"]})
    return tmp_path


def test_squad_questions_come_in_order_with_their_articles_paragraphs_first(squad_folder: Path) -> None:
    made = task("qa_1", data=squad_folder)
    assert made.not_comparable == ""
    assert "squad.json sha256:" in made.revision
    for i, sample in enumerate(samples("qa_1", 256, "words", count=6, data=squad_folder)):
        assert sample.questions[0].references == (f"finch{i}", f"a finch{i}")
        listed = documents(sample)
        assert len(set(listed)) == len(listed)
        near = [text for text in listed if text.startswith("Paragraph")]
        assert f"Paragraph {i} says that the bird of {i} is a finch{i}." in near
        assert len(near) == min(len(listed), 6)
        assert len(listed) > 6
    everything = samples("qa_1", 4096, "words", count=1, data=squad_folder)[0]
    assert len(documents(everything)) == 36


def test_impossible_questions_are_not_asked(squad_folder: Path) -> None:
    asked = [sample.questions[0].text for sample in samples("qa_1", 4096, count=500, data=squad_folder)]
    assert len(asked) == 36
    assert not any("fish" in text for text in asked)


def hotpot(num: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "_id": str(i),
            "question": f"Where is house {i}?",
            "answer": f"street {i}x",
            "supporting_facts": [],
            "context": [
                [f"Title {i}-{j}", [f"House {i}.{j} is", f" in street {i}x." if j == 1 else " red."]] for j in range(3)
            ],
        }
        for i in range(num)
    ]


def test_hotpot_questions_keep_all_of_their_documents_with_titles(tmp_path: Path) -> None:
    write_json(tmp_path, "hotpotqa.json", hotpot())
    found = samples("qa_2", 512, count=9, data=tmp_path)
    assert [sample.questions[0].references for sample in found] == [(f"street {i}x",) for i in range(4)]
    for i, sample in enumerate(found):
        listed = documents(sample)
        assert len(listed) == len(set(listed)) == 12
        assert f"Title {i}-1\nHouse {i}.1 is in street {i}x." in listed
    few = documents(samples("qa_2", 140, count=4, data=tmp_path)[2])
    assert {f"Title 2-{j}" for j in range(3)} <= {text.split("\n")[0] for text in few}
    assert len(few) < 12


@pytest.mark.parametrize(
    ("broken", "what"),
    [
        ({}, "no 'context'"),
        ({"context": [["T", ["s"]]], "answer": "a"}, "no 'question'"),
        ({"context": [["T", ["s"]]], "question": "q", "answer": None}, "None is no text"),
        ({"context": [], "question": "q", "answer": "a"}, "nothing where a text must be"),
        ({"context": [["T"]], "question": "q", "answer": "a"}, "unpack"),
        (7, "not subscriptable"),
    ],
)
def test_a_broken_hotpot_record_is_unreadable_and_the_others_are_asked(tmp_path: Path, broken: Any, what: str) -> None:
    write_json(tmp_path, "hotpotqa.json", [*hotpot(2), broken, *hotpot(4)[3:]])
    found = list(task("qa_2", data=tmp_path).samples(tokenizer("words")))
    assert [isinstance(one, Unreadable) for one in found] == [False, False, True, False]
    bad = found[2]
    assert isinstance(bad, Unreadable)
    assert bad.id == "qa_2@1024/2"
    assert "hotpotqa.json, record [2]" in bad.reason
    assert what in bad.reason


def test_broken_squad_records_name_their_place(tmp_path: Path) -> None:
    whole = squad(
        ["A fox is red.", "A hen is white."], [[qa("Colour?", "red"), {"question": "x"}], [qa("And?", "white")]]
    )
    data = [*whole["data"], {"title": "no paragraphs"}, {"paragraphs": [{"qas": []}]}, 3]
    data += squad(["Ice is cold."], [[qa("How?"), "text"]])["data"]
    write_json(tmp_path, "squad.json", {"data": data})
    found = list(task("qa_1", data=tmp_path).samples(tokenizer("words")))
    places = [
        one.reason.split(":")[0].removeprefix("squad.json, record ") for one in found if isinstance(one, Unreadable)
    ]
    assert places == [
        "data[0].paragraphs[0].qas[1]",
        "data[1]",
        "data[2].paragraphs[0]",
        "data[3]",
        "data[4].paragraphs[0].qas[0]",
        "data[4].paragraphs[0].qas[1]",
    ]
    assert sum(isinstance(one, Sample) for one in found) == 2
    assert len({one.id for one in found}) == len(found)


@pytest.mark.parametrize(
    ("name", "file", "content"),
    [
        ("qa_1", "squad.json", "{"),
        ("qa_1", "squad.json", "[]"),
        ("qa_1", "squad.json", '{"data": {}}'),
        ("qa_1", "squad.json", '{"data": []}'),
        ("qa_1", "squad.json", '{"data": [1, 2]}'),
        ("qa_2", "hotpotqa.json", '{"data": []}'),
        ("qa_2", "hotpotqa.json", "[]"),
        ("qa_2", "hotpotqa.json", "[{}]"),
        ("qa_2", "hotpotqa.json", "nothing"),
    ],
)
def test_a_file_of_another_schema_is_refused_before_any_work(
    tmp_path: Path, name: str, file: str, content: str
) -> None:
    (tmp_path / file).write_text(content, "utf-8")
    with pytest.raises(InvalidInputError, match=file.replace(".", r"\.")):
        task(name, data=tmp_path)


def test_a_missing_file_is_refused_by_name_and_a_changed_one_is_read_again(tmp_path: Path) -> None:
    for name, file in (("qa_1", "squad"), ("qa_2", "hotpotqa")):
        with pytest.raises(InvalidInputError, match=rf"{file}\.json is missing"):
            task(name, data=tmp_path)
    write_json(tmp_path, "hotpotqa.json", hotpot(3))
    before = task("qa_2", data=tmp_path)
    (tmp_path / "hotpotqa.json").write_text(json.dumps(hotpot(2)) + "\n\n", "utf-8")
    after = task("qa_2", data=tmp_path)
    assert before.revision != after.revision
    assert (before.recipe.num_available, after.recipe.num_available) == (3, 2)


def test_the_longest_question_decides_before_the_first_sample(tmp_path: Path) -> None:
    long = hotpot(5)
    long[4]["context"][0][1] = ["word " * 600]
    write_json(tmp_path, "hotpotqa.json", long)
    with pytest.raises(InvalidInputError, match=r"up to 7\d\d tokens") as caught:
        next(iter(task("qa_2", length=512, data=tmp_path).samples(tokenizer("words"))))
    assert len(samples("qa_2", int(str(caught.value).split()[-1]), count=5, data=tmp_path)) == 5
    assert len(samples("qa_2", 512, count=4, data=tmp_path)) == 4


def test_of_our_own_paragraphs_each_answer_stands_in_one() -> None:
    loaded = own_paragraphs()
    assert len(loaded["paragraphs"]) == 30
    texts = [f"{p['title']}\n{p['text']}".lower() for p in loaded["paragraphs"]]
    for record in loaded["paragraphs"] + loaded["bridges"]:
        answer = record["answer"].lower()
        assert sum(text.count(answer) for text in texts) == 1
        assert answer not in record["question"].lower()
