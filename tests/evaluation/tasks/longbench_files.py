"""Small files of LongBench's schema."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import ZipFile


def record(number: int = 1, **changes: Any) -> dict[str, Any]:
    """A record of LongBench's schema; a change to None takes the key away."""
    made = {
        "input": f"Who is number {number}?",
        "context": f"Passage {number}.\nIt has {{braces}} and {{context}}.",
        "answers": [f"Paragraph {number}", "Paragraph 0"],
        "length": 7,
        "dataset": "any",
        "language": "en",
        "all_classes": ["Paragraph 1", "Paragraph 2"],
        "_id": f"id{number}",
        **changes,
    }
    return {key: value for key, value in made.items() if value is not None}


def lines(rows: Sequence[Any]) -> bytes:
    """Rows as JSON lines; bytes stand as they are."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def write_lines(folder: Path, dataset: str, rows: Sequence[Any]) -> Path:
    """`<dataset>.jsonl` in the folder."""
    (folder / f"{dataset}.jsonl").write_bytes(lines(rows))
    return folder


def write_archive(folder: Path, dataset: str, rows: Sequence[Any]) -> Path:
    """A data.zip as the hub's, with one dataset."""
    with ZipFile(folder / "data.zip", "w") as archive:
        archive.writestr(f"data/{dataset}.jsonl", lines(rows))
    return folder / "data.zip"
