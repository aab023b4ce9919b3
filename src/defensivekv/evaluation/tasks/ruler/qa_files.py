"""Questions and documents of SQuAD and HotpotQA files, in their original schemas, and of our own few paragraphs.

A data folder holds `squad.json` (SQuAD v2 dev: {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers":
[{"text"}], "is_impossible"}]}]}]}) and `hotpotqa.json` (HotpotQA dev, distractor setting: [{"question", "answer",
"context": [[title, [sentence, ...]], ...]}]), as RULER's downloader names them.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.ruler.corpus import content_hash, parse_json, read_own_text, read_text

_Json = Any


@dataclass(frozen=True)
class Asked:
    """A question. own: numbers of the documents that it needs; near: of those that come first as others."""

    question: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Broken:
    """A record that lacks what its schema asks for. reason: names file and record."""

    reason: str


@dataclass(frozen=True)
class QuestionSet:
    """Documents, each once, and questions in the file's order. source: file and hash. is_own: of this package."""

    documents: tuple[str, ...]
    asked: tuple[Asked | Broken, ...]
    source: str
    is_own: bool = False


@dataclass(frozen=True)
class _Record:
    """A question with its documents as texts."""

    question: str
    answers: tuple[str, ...]
    own: tuple[str, ...]
    near: tuple[str, ...] = ()


def read_questions(task: str, data: Path | None) -> QuestionSet:
    """The questions of `qa_1` (SQuAD) or `qa_2` (HotpotQA); without a folder, our own of the same kind.

    Raises InvalidInputError naming the file where it is missing or of another schema; a record of another schema is
    `Broken` instead.
    """
    if data is None:
        text = read_own_text("paragraphs.json")
        return _collect(list(_own_records(task, text)), f"own paragraphs {content_hash(text)}", is_own=True)
    file = data / ("squad.json" if task == "qa_1" else "hotpotqa.json")
    if not file.is_file():
        raise InvalidInputError(
            f"{file} is missing: put it there, or give no data folder to use our own few paragraphs"
        )
    return _read_file(task, file, file.stat().st_mtime_ns)


@lru_cache(maxsize=2)
def _read_file(task: str, file: Path, changed: int) -> QuestionSet:
    """Once for all lengths, until the file changes: HotpotQA's questions take some hundred megabytes."""
    text = read_text(file)
    records = list(_squad_records(file, text) if task == "qa_1" else _hotpot_records(file, text))
    if not any(isinstance(record, _Record) for record in records):
        raise InvalidInputError(f"{file} holds no question that can be asked: download it again")
    return _collect(records, f"{file.name} {content_hash(text)}")


def _collect(records: list[_Record | Broken], source: str, *, is_own: bool = False) -> QuestionSet:
    whole = [record for record in records if isinstance(record, _Record)]
    documents = sorted({document for record in whole for document in (*record.own, *record.near)})
    numbers = {document: i for i, document in enumerate(documents)}

    def numbered(record: _Record) -> Asked:
        own = tuple(dict.fromkeys(numbers[document] for document in record.own))
        near = tuple(n for n in dict.fromkeys(numbers[document] for document in record.near) if n not in own)
        return Asked(record.question, record.answers, own, near)

    asked = tuple(numbered(record) if isinstance(record, _Record) else record for record in records)
    return QuestionSet(tuple(documents), asked, source, is_own)


def _squad_records(file: Path, text: str) -> Iterator[_Record | Broken]:
    loaded = parse_json(file, text)
    if not isinstance(loaded, dict) or not isinstance(loaded.get("data"), list):
        raise InvalidInputError(f'{file} must be SQuAD v2: {{"data": [...]}}')
    for a, article in enumerate(loaded["data"]):
        try:
            paragraphs = list(article["paragraphs"])
            near = tuple(str(p["context"]) for p in paragraphs if isinstance(p, dict) and "context" in p)
        except (KeyError, TypeError) as error:
            yield _broken(file, f"data[{a}]", error)
            continue
        for p, paragraph in enumerate(paragraphs):
            where = f"data[{a}].paragraphs[{p}]"
            try:
                context, asked = _text(paragraph["context"]), list(paragraph["qas"])
            except (KeyError, TypeError) as error:
                yield _broken(file, where, error)
                continue
            for q, one in enumerate(asked):
                try:
                    if not one.get("is_impossible", False):
                        answers = _texts(answer["text"] for answer in one["answers"])
                        yield _Record(_text(one["question"]), answers, (context,), near)
                except (KeyError, TypeError, AttributeError) as error:
                    yield _broken(file, f"{where}.qas[{q}]", error)


def _hotpot_records(file: Path, text: str) -> Iterator[_Record | Broken]:
    loaded = parse_json(file, text)
    if not isinstance(loaded, list):
        raise InvalidInputError(f"{file} must be HotpotQA dev (distractor): a list of questions")
    for i, one in enumerate(loaded):
        try:
            own = _texts(f"{_text(title)}\n{''.join(sentences)}" for title, sentences in one["context"])
            yield _Record(_text(one["question"]), (_text(one["answer"]),), own)
        except (KeyError, TypeError, ValueError) as error:
            yield _broken(file, f"[{i}]", error)


def _own_records(task: str, text: str) -> Iterator[_Record]:
    loaded = json.loads(text)
    texts = {paragraph["title"]: f"{paragraph['title']}\n{paragraph['text']}" for paragraph in loaded["paragraphs"]}
    everything = tuple(texts.values())
    if task == "qa_1":
        for paragraph in loaded["paragraphs"]:
            yield _Record(paragraph["question"], (paragraph["answer"],), (texts[paragraph["title"]],), everything)
    else:
        for bridge in loaded["bridges"]:
            own = tuple(texts[title] for title in bridge["titles"])
            yield _Record(bridge["question"], (bridge["answer"],), own, everything)


def _broken(file: Path, where: str, error: Exception) -> Broken:
    what = f"no {error}" if isinstance(error, KeyError) else str(error)
    return Broken(f"{file.name}, record {where}: {what}")


def _text(value: _Json) -> str:
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{value!r} is no text")
    return value


def _texts(values: Iterator[_Json]) -> tuple[str, ...]:
    texts = tuple(dict.fromkeys(_text(value) for value in values))
    if not texts:
        raise TypeError("nothing where a text must be")
    return texts
