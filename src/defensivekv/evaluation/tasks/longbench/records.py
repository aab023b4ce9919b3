"""Rows of LongBench's schema, from JSON lines or parquet, each checked for itself."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.metrics import paragraph_number
from defensivekv.evaluation.tasks.longbench import hub
from defensivekv.evaluation.tasks.sample import Unreadable


@dataclass(frozen=True)
class Record:
    """One row. passage: LongBench's context; asked: its input; choices: its all_classes; words: its length, or 0."""

    id: str
    passage: str
    asked: str
    answers: tuple[str, ...]
    choices: tuple[str, ...]
    words: int


@dataclass(frozen=True)
class Records:
    """The rows of a dataset in their order, and where they come from."""

    rows: tuple[Record | Unreadable, ...]
    revision: str


def read_records(dataset: str, folder: Path | None) -> Records:
    """The rows of `<dataset>.jsonl`, or else `<dataset>.parquet`, in folder; None: of the hub's archive.

    A row that can't be used is an Unreadable. Raises InvalidInputError for a file that is missing, empty, unreadable
    as a whole, or without a single row that can be used, as where a column is missing.
    """
    if folder is None:
        name, content = f"{dataset}.jsonl", hub.read_member(dataset)
    else:
        name, content = _read_local(dataset, folder)
    source = f"hub@{hub.REVISION}" if folder is None else "local"
    located = _parquet_rows(name, content) if name.endswith(".parquet") else _json_lines(name, content)
    rows = tuple(_check_all(dataset, located))
    if not rows:
        raise InvalidInputError(f"{name} is empty: it has to hold LongBench's records of {dataset}")
    if not any(isinstance(row, Record) for row in rows):
        first = next(row.reason for row in rows if isinstance(row, Unreadable))
        raise InvalidInputError(f"{name} has no record that can be used, out of {len(rows)}; the first: {first}")
    return Records(rows, f"{source} sha256:{hashlib.sha256(content).hexdigest()}")


def _read_local(dataset: str, folder: Path) -> tuple[str, bytes]:
    for name in (f"{dataset}.jsonl", f"{dataset}.parquet"):
        path = folder / name
        try:
            return name, path.read_bytes()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise InvalidInputError(f"{path} can't be read ({error}): put the file there or choose another") from error
    raise InvalidInputError(
        f"{folder} holds neither {dataset}.jsonl nor {dataset}.parquet: unpack LongBench's data.zip there, or name no "
        "data folder to have it from the hub"
    )


def _json_lines(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row, or a ValueError for a broken one."""
    # Not str.splitlines: JSON strings may hold U+2028, which it takes for the end of a line.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            row = ValueError(f"not a line of JSON ({error})")
        yield f"{name} line {number}", row


def _parquet_rows(name: str, content: bytes) -> Iterator[tuple[str, Any]]:
    try:
        parquet, arrow = import_module("pyarrow.parquet"), import_module("pyarrow")
    except ImportError as error:
        raise InvalidInputError(
            f"{name} needs the package 'pyarrow', which is not installed: pip install defensivekv[eval]"
        ) from error
    try:
        rows = parquet.read_table(BytesIO(content)).to_pylist()
    except arrow.ArrowException as error:
        raise InvalidInputError(f"{name} is no parquet file that can be read ({error}): write it anew") from error
    yield from ((f"{name} row {number}", row) for number, row in enumerate(rows, start=1))


def _check_all(dataset: str, located: Iterator[tuple[str, Any]]) -> Iterator[Record | Unreadable]:
    seen: set[str] = set()
    for place, row in located:
        position = place.split(" ", 1)[1]
        try:
            record = _check(dataset, row, position)
        except ValueError as error:
            yield Unreadable(position, f"{place}: {error}")
            continue
        if record.id in seen:
            record = replace(record, id=f"{record.id}@{position}")
        seen.add(record.id)
        yield record


def _check(dataset: str, row: Any, position: str) -> Record:
    """Raises ValueError with what is wrong."""
    if isinstance(row, ValueError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"a record is an object, not {type(row).__name__}")
    missing = [key for key in ("input", "context", "answers") if key not in row]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)}")
    for key in ("input", "context"):
        if not isinstance(row[key], str):
            raise ValueError(f"{key} is text, not {type(row[key]).__name__}")
        # JSON can spell half a surrogate pair, which no tokenizer takes.
        row[key].encode()
    answers = _texts(row, "answers")
    if not answers:
        raise ValueError("answers is empty")
    choices = _texts(row, "all_classes") if row.get("all_classes") is not None else ()
    if dataset == "trec" and not choices:
        raise ValueError("lacks all_classes, which trec is scored by")
    if dataset == "passage_retrieval_en":
        for answer in answers:
            paragraph_number(answer)
    words = row.get("length")
    return Record(
        id=str(row.get("_id") or position),
        passage=row["context"],
        asked=row["input"],
        answers=answers,
        choices=choices,
        words=words if isinstance(words, int) else 0,
    )


def _texts(row: dict[str, Any], key: str) -> tuple[str, ...]:
    value = row[key]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{key} is a list of texts, not {value if value is None else type(value).__name__}")
    return tuple(value)
