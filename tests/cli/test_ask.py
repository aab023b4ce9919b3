from pathlib import Path

import pytest
from typer.testing import CliRunner

import defensivekv as dkv
from defensivekv.cli import app
from defensivekv.needleworld import make_sample

runner = CliRunner()
SAMPLE = make_sample("multi_key", num_tokens=512, seed=11)
QUESTIONS = [argument for question in SAMPLE.questions[:2] for argument in ("--question", question.text)]


@pytest.fixture
def document(tmp_path: Path) -> str:
    path = tmp_path / "document.txt"
    path.write_text(SAMPLE.document)
    return str(path)


def test_each_question_is_answered_from_a_file_compressed_once(document: str) -> None:
    result = runner.invoke(app, ["ask", "--context", document, *QUESTIONS, "--budget", "0.5"])
    assert result.exit_code == 0, result.output
    assert "512 tokens read" in result.output
    assert "50.0% of the entries kept by layer-defensivekv" in " ".join(result.output.split())
    assert result.output.count("answer ") == 2
    for question in SAMPLE.questions[:2]:
        assert question.answer[0] in result.output


def test_a_document_can_be_read_in_chunks_and_answered_within_a_bound(document: str) -> None:
    options = ["--budget", "auto:0.8", "--max-new-tokens", "8"]
    result = runner.invoke(app, ["ask", "--context", document, *QUESTIONS[:2], *options])
    assert result.exit_code == 0, result.output
    assert "budget auto:0.8 (came to" in " ".join(result.output.split())
    options = ["--budget", "0.5", "--max-entries", "200", "--chunk-size", "128", "--max-new-tokens", "8"]
    result = runner.invoke(app, ["ask", "--context", document, *QUESTIONS[:2], *options])
    assert result.exit_code == 0, result.output
    assert "budget 0.5, at most 200 entries per head" in " ".join(result.output.split())


def test_a_dash_reads_standard_input_and_a_model_can_be_named() -> None:
    arguments = ["ask", dkv.demo_model(), "--context", "-", *QUESTIONS[:2], "--policy", "full", "--dtype", "float32"]
    result = runner.invoke(app, arguments, input=SAMPLE.document)
    assert result.exit_code == 0, result.output
    assert SAMPLE.questions[0].answer[0] in result.output
    assert "100.0% of the entries kept by full" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "why"], "no document"),
        (["--context", "FILE"], "no question"),
        (["--context", "missing.txt", "--question", "why"], "cannot read"),
        (["--context", "FILE", "--question", "why", "--budget", "0"], "keeps nothing"),
        (["--context", "FILE", "--question", "why", "--budget", "much"], "not understood"),
        (["--context", "FILE", "--question", "why", "--policy", "snapvk"], "did you mean 'snapkv'"),
        (["--context", "FILE", "--question", "why", "--template", "fancy"], "auto, chat or plain"),
        (["--context", "FILE", "--question", "why", "--dtype", "int3"], "unknown dtype"),
        (["--context", "FILE", "--question", "why", "--chunk-size", "8"], "less than the window"),
        (["--context", "FILE", "--question", "why", "--max-entries", "20"], "give a larger bound"),
        (["no/such/model", "--context", "FILE", "--question", "why"], "cannot load"),
        (["--context", "FILE", "--question", "why", "--device", "abacus"], "device"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(document: str, arguments: list[str], message: str) -> None:
    given = [document if argument == "FILE" else argument for argument in arguments]
    result = runner.invoke(app, ["ask", *given])
    assert isinstance(result.exception, dkv.DefensiveKVError), result.output
    assert message in str(result.exception)


def test_an_empty_document_is_refused() -> None:
    result = runner.invoke(app, ["ask", "--context", "-", "--question", "why"], input="  \n")
    assert isinstance(result.exception, dkv.InvalidInputError)


def test_what_is_not_utf8_is_refused() -> None:
    result = runner.invoke(app, ["ask", "--context", "-", "--question", "why"], input=b"caf\xe9")
    assert isinstance(result.exception, dkv.InvalidInputError)
    result = runner.invoke(app, ["ask", "--context", "-", "--question", "caf\udce9"], input="text")
    assert isinstance(result.exception, dkv.InvalidInputError)


def test_a_model_folder_that_is_broken_is_refused(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    result = runner.invoke(app, ["ask", str(tmp_path), "--context", "-", "--question", "why"], input="text")
    assert isinstance(result.exception, dkv.InvalidInputError)
    assert "cannot load" in str(result.exception)
