import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from defensivekv.errors import InvalidInputError
from defensivekv.evaluation.tasks.longbench import hub
from defensivekv.evaluation.tasks.longbench.records import Record, read_records
from defensivekv.evaluation.tasks.sample import Unreadable
from tests.evaluation.tasks.longbench_files import lines, record, write_archive, write_lines


def write_parquet(folder: Path, dataset: str, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{dataset}.parquet")
    return folder


def test_jsonl_and_parquet_hold_the_same(tmp_path: Path) -> None:
    rows = [record(1), record(2, length=0)]
    from_lines = read_records("qasper", write_lines(tmp_path, "qasper", rows))
    from_parquet = read_records("trec", write_parquet(tmp_path, "trec", rows))

    assert from_lines.rows == from_parquet.rows
    first = from_lines.rows[0]
    assert isinstance(first, Record)
    assert first == Record(
        "id1", rows[0]["context"], rows[0]["input"], ("Paragraph 1", "Paragraph 0"), ("Paragraph 1", "Paragraph 2"), 7
    )
    content = (tmp_path / "trec.parquet").read_bytes()
    assert from_parquet.revision == f"local sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize(
    ("dataset", "row", "reason"),
    [
        ("qasper", b'{"input": "Who?", "cont', "not a line of JSON"),
        ("qasper", b'{"input": "\xff"}', "not a line of JSON"),
        ("qasper", b"[" * 100_000, "not a line of JSON"),
        ("qasper", ["input"], "a record is an object, not list"),
        ("qasper", record(context=None, answers=None), "lacks context, answers"),
        ("qasper", record(context=7), "context is text, not int"),
        ("qasper", record(input=["Who?"]), "input is text, not list"),
        ("qasper", record(answers="nobody"), "answers is a list of texts, not str"),
        ("qasper", record(answers=["nobody", 7]), "answers is a list of texts, not list"),
        ("qasper", record(answers=[]), "answers is empty"),
        ("qasper", record(all_classes="City"), "all_classes is a list of texts, not str"),
        ("qasper", b'{"input": "\\ud800", "context": "", "answers": ["a"]}', "surrogates not allowed"),
        ("trec", record(all_classes=None), "lacks all_classes, which trec is scored by"),
        ("passage_retrieval_en", record(answers=["the third"]), "'the third' names no paragraph"),
    ],
)
def test_a_bad_record_is_named_and_the_rest_goes_on(dataset: str, row: Any, reason: str, tmp_path: Path) -> None:
    good = record(answers=["Paragraph 1"])
    found = read_records(dataset, write_lines(tmp_path, dataset, [good, b"", row, {**good, "_id": "last"}])).rows

    assert [getattr(each, "id", None) for each in found] == ["id1", "line 3", "last"]
    assert isinstance(found[1], Unreadable)
    assert found[1].reason.startswith(f"{dataset}.jsonl line 3: ")
    assert reason in found[1].reason


def test_a_null_in_parquet_is_a_bad_row(tmp_path: Path) -> None:
    rows = [record(1), {**record(2), "context": None}]

    found = read_records("qasper", write_parquet(tmp_path, "qasper", rows)).rows
    assert found[1] == Unreadable("row 2", "qasper.parquet row 2: context is text, not NoneType")


def test_lines_end_at_newlines_only(tmp_path: Path) -> None:
    row = json.dumps(record(context="one\u2028two\u0085three"), ensure_ascii=False).encode()

    (found,) = read_records("qasper", write_lines(tmp_path, "qasper", [b"\xef\xbb\xbf" + row + b"\r"])).rows
    assert isinstance(found, Record)
    assert found.passage == "one\u2028two\u0085three"


def test_records_have_ids_of_their_own(tmp_path: Path) -> None:
    rows = [record(1), record(1), record(1, _id=None)]

    found = read_records("qasper", write_lines(tmp_path, "qasper", rows)).rows
    assert [row.id for row in found] == ["id1", "id1@line 2", "line 3"]


def test_a_missing_column_is_an_error_of_the_file(tmp_path: Path) -> None:
    rows = [record(number, answers=None) for number in range(3)]
    with pytest.raises(InvalidInputError, match=r"qasper.jsonl has no record.* out of 3.*line 1: lacks answers"):
        read_records("qasper", write_lines(tmp_path, "qasper", rows))
    with pytest.raises(InvalidInputError, match=r"trec.parquet has no record.* out of 3.*row 1: lacks answers"):
        read_records("trec", write_parquet(tmp_path, "trec", rows))


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "qasper.jsonl").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"qasper.jsonl is empty"):
        read_records("qasper", tmp_path)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"holds neither qasper.jsonl nor qasper.parquet"):
        read_records("qasper", tmp_path)
    with pytest.raises(InvalidInputError, match=r"holds neither"):
        read_records("qasper", tmp_path / "nowhere")
    (tmp_path / "qasper.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(InvalidInputError, match=r"qasper.parquet is no parquet file"):
        read_records("qasper", tmp_path)
    (tmp_path / "trec.jsonl").mkdir()
    with pytest.raises(InvalidInputError, match=r"trec.jsonl can't be read"):
        read_records("trec", tmp_path)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qasper.parquet").write_bytes(b"anything")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(InvalidInputError, match=r"pip install defensivekv\[eval\]"):
        read_records("qasper", tmp_path)


def test_the_hubs_archive_is_read_by_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = write_archive(tmp_path, "qasper", [record()])
    monkeypatch.setattr(hub, "fetch_archive", lambda: archive)

    found = read_records("qasper", None)
    assert [row.id for row in found.rows] == ["id1"]
    content = hashlib.sha256(lines([record()])).hexdigest()
    assert found.revision == f"hub@{hub.REVISION} sha256:{content}"
    with pytest.raises(InvalidInputError, match=r"no readable data/trec.jsonl"):
        read_records("trec", None)


def test_another_archive_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    archive = write_archive(tmp_path, "qasper", [record()])
    asked: list[Any] = []

    def download(*args: Any, **options: Any) -> str:
        asked.append((args, options))
        return str(archive)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    hub.fetch_archive.cache_clear()
    with pytest.raises(InvalidInputError, match=r"data.zip is not LongBench's data.zip"):
        read_records("qasper", None)
    assert asked == [(("zai-org/LongBench", "data.zip"), {"repo_type": "dataset", "revision": hub.REVISION})]

    monkeypatch.setattr(hub, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    assert [row.id for row in read_records("qasper", None).rows] == ["id1"]
    hub.fetch_archive.cache_clear()


def test_no_way_to_the_hub_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args: Any, **options: Any) -> str:
        raise LocalEntryNotFoundError("An error happened\nand more")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    hub.fetch_archive.cache_clear()
    with pytest.raises(InvalidInputError, match=r"\(An error happened\): go online, or unpack data.zip yourself"):
        read_records("qasper", None)
