import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from defensivekv import InvalidInputError
from defensivekv.evaluation.report import Results, print_report, write_report
from tests.evaluation.report.cases import HAYSTACK, LONGBENCH_ALL, NEEDLEWORLD, Made, failed, grid, record, split

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7*7 }}[red]\x1b]0;t\x07\x00\u202e\ud800&amp;"


class Reader(HTMLParser):
    """What a browser would make of it: tags with their attributes, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, *runs: list[Made], against_paper: bool = False) -> Reader:
    path = write_report(*split(pair for run in runs for pair in run), folder, against_paper=against_paper)
    assert path == folder / "report.html"
    reader = Reader(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_the_page_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    run = grid(("full", "snapkv", "defensivekv"), ("0.2", "0.4"), NEEDLEWORLD, samples=2, not_comparable="own words")
    page = page_of(tmp_path / "new" / "folder", run, against_paper=True)
    sources = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert len(sources) == 3
    assert all(source is not None and source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "form"}
    for shown in (
        "Llama-3.1-8B-Instruct",
        "0e9e39f249a1",
        "bfloat16",
        "NVIDIA H100",
        "torch 2.13.0",
        "chat",
        "authors",
    ):
        assert shown in page.text
    for shown in ("42", "own words", "recall 1", "window_size: 32", "published figures beside ours", "not seen"):
        assert shown in page.text
    names = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    stem = "1-llama-3.1-8b-instruct"
    assert names == {"report.html", "scores.csv", f"{stem}-budgets.png", f"{stem}-bytes.png", f"{stem}-radar.png"}


def test_text_of_models_and_datasets_is_only_shown(tmp_path: Path) -> None:
    fields = ("model", "policy", "task", "domain", "suite", "sample", "device", "split", "revision", "not_comparable")
    changes: dict[str, object] = dict.fromkeys(
        (*fields, "metric", "dtype", "template", "budget", "model_revision"), EVIL
    )
    changes |= {"policy_parts": {EVIL: EVIL}, "versions": {EVIL: EVIL}, "questions": [EVIL], "answer_prefixes": [EVIL]}
    answered = record().model_copy(update=changes | {"references": [[EVIL]], "outputs": [EVIL]})
    broken = failed().model_copy(update=changes | {"sample": EVIL + "2", "error": EVIL, "truncated_tokens": 3})
    path = write_report([answered, broken], [], tmp_path, against_paper=True)
    page = Reader(path.read_text(encoding="utf-8"))
    assert not {tag for tag, _ in page.tags} & {"script"}
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert {attributes.get("src", "data:")[:5] for tag, attributes in page.tags if tag == "img"} == {"data:"}  # type: ignore[index]
    assert page.text.count("<script>alert(1)</script>") > 15
    assert "{{ 7*7 }}" in page.text
    assert "\\ud800&amp;" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", page.text)
    sheet = (tmp_path / "scores.csv").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", sheet)
    out = StringIO()
    print_report(Results.from_records([answered, broken], []), Console(file=out, width=100), against_paper=True)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f]", out.getvalue())
    out.getvalue().encode("utf-8")


def test_the_same_input_in_another_order_gives_the_same_files(tmp_path: Path) -> None:
    records, timings = split(grid(("full", "snapkv"), ("0.2",), (*NEEDLEWORLD[:3], HAYSTACK[0]), samples=3, failures=1))
    write_report(records, timings, tmp_path / "one", against_paper=True)
    write_report(records[::-1], timings[::-1], tmp_path / "two", against_paper=True)
    one = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    two = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()}
    assert len(one) == 5
    assert one == two


def test_failures_are_listed_up_to_fifty_with_their_errors(tmp_path: Path) -> None:
    run = grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD[:2], samples=20, failures=15)
    page = page_of(tmp_path, run)
    assert "The first 50 of 60." in page.text
    assert page.text.count("CUDA out of memory at sample") == 50
    assert "60 samples failed" in page.text
    assert "15/20 failed" in page.text


def test_a_run_of_failures_only_has_a_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD[:3], samples=2, failures=2))
    assert "12 samples failed" in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_query_aware_stands_in_bold_and_apart(tmp_path: Path) -> None:
    run = grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD[:2], samples=2)
    page = page_of(tmp_path, run)
    assert "aware" not in page.text.split("</style>")[-1].replace(".aware", "")
    aware = grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD[:2], samples=2, query_aware=True)
    both = page_of(tmp_path, run, aware)
    bold = [attributes for tag, attributes in both.tags if tag == "strong"]
    assert len(bold) >= 4
    assert "never averaged or compared" in both.text
    assert len([tag for tag, _ in both.tags if tag == "h2"]) == 2


def test_cuts_missing_full_caches_and_unlike_sample_counts_are_said(tmp_path: Path) -> None:
    run = grid(("snapkv",), ("0.2",), LONGBENCH_ALL[:2], samples=3)
    more = grid(("adakv",), ("0.2",), LONGBENCH_ALL[:2], samples=2)
    page = page_of(tmp_path, run, more)
    assert "narrativeqa: 1 of 3 samples, at most 1,000 tokens of one" in page.text
    assert "there is no full-cache row, and so no loss" in page.text
    assert "not every policy answered every sample" in page.text


def test_answers_of_one_sample_stand_under_each_other(tmp_path: Path) -> None:
    page = page_of(tmp_path, grid(("full", "snapkv"), ("0.2",), NEEDLEWORLD[:1], samples=2))
    assert "single_key@1024, sample 0000" in page.text
    assert "What is the number of misty harbor?" in page.text
    assert "full cache, score" in page.text
    assert "snapkv, score" in page.text


def test_without_records_there_is_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no records"):
        write_report([], [], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_terminal_is_told_the_same(tmp_path: Path) -> None:
    run = grid(("full", "snapkv"), ("0.2", "0.4"), NEEDLEWORLD, samples=3, failures=1)
    results = Results.from_records(*split(run))
    for width in (70, 200):
        out = StringIO()
        print_report(results, Console(file=out, width=width))
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= width
        for shown in ("snapkv", "1/3 failed", "15 samples failed", "and 10 more", "budget 20 %", "out of memory"):
            assert shown in text, shown
        assert "budget 40 %" not in text
    out = StringIO()
    print_report(results, Console(file=out, width=200), every_budget=True)
    assert "budget 40 %" in out.getvalue()
