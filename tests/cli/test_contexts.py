"""`compress`, `ask` from what it kept, and `contexts`."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app
from defensivekv.integrations.transformers.contexts.files import file_facts
from defensivekv.needleworld import demo_model, make_sample

runner = CliRunner()
SAMPLE = make_sample("multi_key", num_tokens=512, seed=11)
QUESTION = ["--question", SAMPLE.questions[0].text]


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(SAMPLE.document)
    return str(path)


def run(*arguments: str) -> str:
    """What a command prints, on one line."""
    result = runner.invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: str) -> str:
    """What is said of a command that is refused."""
    result = runner.invoke(app, list(arguments))
    assert isinstance(result.exception, dkv.DefensiveKVError), result.output
    return str(result.exception)


def test_a_document_is_compressed_to_a_file_and_asked_from_it(document: str, tmp_path: Path) -> None:
    book = str(tmp_path / "book.kv")
    said = run("compress", "--context", document, "--budget", "0.5", "-o", book)
    assert "512 tokens read in" in said
    assert f"file {book}," in said.replace(" /", " /")
    asked = run("ask", "--context", book, *QUESTION)
    assert "512 tokens, read before in" in asked
    assert "50.0% of the entries kept by layer-defensivekv, budget 0.5" in asked
    assert SAMPLE.questions[0].answer[0] in asked
    shrunk = run("ask", "--context", book, "--budget", "0.2", *QUESTION)
    assert "512 tokens, read before in" in shrunk
    assert "20.0% of the entries" in shrunk
    shown = run("contexts", "show", book)
    for words in ("model the packaged model, float32", "budget 0.5", "tokens 512", "held 50.", "steps none"):
        assert words in shown


def test_a_store_finds_the_document_again(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ["--store", str(tmp_path / "store")]
    first = run("ask", "--context", document, "--budget", "0.5", *store, *QUESTION)
    assert "512 tokens read in" in first
    again = run("ask", "--context", document, "--budget", "0.5", *store, *QUESTION)
    assert "512 tokens, read before in" in again
    assert SAMPLE.questions[0].answer[0] in again
    assert "read before in" in run("compress", "--context", document, "--budget", "0.5", *store)
    assert "512 tokens read in" in run("compress", "--context", document, "--budget", "0.4", *store)
    monkeypatch.setenv("DEFENSIVEKV_STORE", store[1])
    listed = run("contexts", "list")
    assert "2 contexts" in listed
    assert listed.index("0.4") < listed.index("0.5"), "the most recently used first"
    keys = [entry.key for entry in dkv.ContextStore(store[1]).list()]
    assert keys[1] in run("contexts", "show", keys[1][:12])
    assert run("contexts", "remove", keys[0][:12]) == f"removed {keys[0]}"
    assert "removed 0 contexts" in run("contexts", "prune")
    assert "removed 1 context" in run("contexts", "prune", "--store-max-bytes", "1KiB")
    assert "0 contexts, 0 B" in run("contexts", "list")


def test_a_damaged_file_is_shown_as_such_and_refused(document: str, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    run("compress", "--context", document, "--budget", "0.5", *store)
    (path,) = (tmp_path / "store").glob("*.kv")
    content = bytearray(path.read_bytes())
    content[20] ^= 1
    path.write_bytes(content)
    assert "unreadable" in run("contexts", "list", *store)
    assert "is damaged, or cannot be read: remove it" in refused("contexts", "show", path.stem[:12], *store)
    run("contexts", "remove", path.stem[:12], *store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--context", "FILE"], "nowhere to keep it: give -o book.kv, or --store FOLDER"),
        (["compress", "--context", "FILE", "-o", "book.txt"], "must end in .kv"),
        (["compress", "--context", "FILE", "-o", "no/such/folder/book.kv"], "no folder"),
        (["compress", "-o", "book.kv"], "no document"),
        (["compress", "--context", "FILE", "-o", "book.kv", "--budget", "0"], "keeps nothing"),
        (["ask", "--context", "none.kv", *QUESTION], "cannot open"),
        (["ask", "--context", "BOOK", *QUESTION, "--policy", "snapkv"], "is compressed already: leave --policy out"),
        (["ask", "--context", "BOOK", *QUESTION, "--template", "chat"], "leave --template out"),
        (["ask", "--context", "BOOK", *QUESTION, "--budget", "0.9"], "what was evicted is gone"),
        (["ask", "--context", "BOOK", *QUESTION, "--dtype", "bfloat16"], "was made by another model"),
        (["contexts", "list"], "no store: give --store FOLDER"),
        (["contexts", "list", "--store", "no/such/store"], "no store at"),
        (["contexts", "show", "abc", "--store", "HERE"], "0 contexts of"),
        (["contexts", "remove", "abc", "--store", "HERE"], "0 contexts of"),
        (["contexts", "prune", "--store", "HERE", "--store-max-bytes", "much"], "not understood"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(
    document: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    book = tmp_path / "book.kv"
    if "BOOK" in arguments:
        run("compress", "--context", document, "--budget", "0.5", "-o", str(book))
    places = {"FILE": document, "BOOK": str(book), "HERE": str(tmp_path)}
    assert message in refused(*(places.get(argument, argument) for argument in arguments))


def test_a_byte_order_mark_is_no_part_of_a_document(tmp_path: Path) -> None:
    keys = set()
    for name, start in (("plain", ""), ("marked", "\ufeff")):
        (tmp_path / f"{name}.txt").write_text(start + SAMPLE.document, encoding="utf-8")
        run("compress", "--context", str(tmp_path / f"{name}.txt"), "-o", str(tmp_path / f"{name}.kv"))
        keys.add(file_facts(tmp_path / f"{name}.kv").key)
    assert len(keys) == 1


def test_a_context_that_a_store_has_no_room_for_is_a_failure(document: str, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store"), "--store-max-bytes", "10KiB"]
    with pytest.warns(dkv.DefensiveKVWarning, match="not put into"):
        assert "the context is not in" in refused("compress", "--context", document, *store)
    with pytest.warns(dkv.DefensiveKVWarning, match="not put into"):
        assert SAMPLE.questions[0].answer[0] in run("ask", "--context", document, "--budget", "0.5", *store, *QUESTION)


def test_a_store_that_cannot_be_what_is_asked_is_refused(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing"
    assert "no store at" in refused("contexts", "list", "--store", f"file://{missing}")
    assert not missing.exists()
    assert "--store-max-bytes is for a store" in refused(
        "ask", "--context", document, "--store-max-bytes", "1GiB", *QUESTION
    )
    store = ["--store", str(tmp_path / "store")]
    run("compress", "--context", document, *store)
    (tmp_path / "store" / f"{'a' * 64}.kv").mkdir()
    assert "1 context," in run("contexts", "list", *store)
    (path,) = (path for path in (tmp_path / "store").glob("*.kv") if path.is_file())

    def refuse(*_: object) -> None:
        raise PermissionError(13, "for reading alone")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert "for reading alone" in refused("contexts", "remove", path.stem[:8], *store)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        assert "unreadable" in run("contexts", "list", *store)
    with monkeypatch.context() as patch:
        patch.setattr("os.listdir", refuse)
        assert "cannot read" in refused("contexts", "list", *store)


def test_what_cannot_be_written_is_refused_before_the_document_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.kv").mkdir()
    unread = ["compress", "--context", str(tmp_path / "none.txt"), "-o"]
    assert "cannot write" in refused(*unread, str(tmp_path / "folder.kv"))
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "for reading alone" in refused(*unread, str(tmp_path / "book.kv"))


def test_a_models_folder_is_found_from_any_other(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    shutil.copytree(demo_model(), tmp_path / "here" / "m")
    monkeypatch.chdir(tmp_path / "here")
    run("compress", "m", "--context", document, "--budget", "0.5", "-o", str(tmp_path / "book.kv"))
    monkeypatch.chdir(tmp_path)
    asked = ["ask", "--context", "book.kv", *QUESTION]
    assert SAMPLE.questions[0].answer[0] in run(*asked)
    assert "name the model whose code is to be trusted" in refused(*asked, "--trust-remote-code")
    (tmp_path / "here" / "m").rename(tmp_path / "moved")
    assert "is not there any more: name the model" in refused(*asked)
    assert SAMPLE.questions[0].answer[0] in run("ask", "moved", *asked[1:])
