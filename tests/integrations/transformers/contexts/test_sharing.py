"""What is held once, whoever answers from it."""

from pathlib import Path

import pytest

from benchmarks.contexts.first_answer import Document
from benchmarks.contexts.settings import QUICK
from benchmarks.contexts.sharing import many_forks, two_processes
from benchmarks.contexts.subject import make_model, make_tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contexts")
    document = Document(make_model(QUICK), make_tokenizer(QUICK), 3800, QUICK, folder)
    return document.files["50%"]


def test_two_processes_that_answer_from_one_file_hold_its_pages_once(path: Path) -> None:
    shared = two_processes(path, QUICK)
    # The scores at the end are not read.
    for resident in shared["rss"]:
        assert resident > 0.9 * shared["file"]
    assert sum(shared["pss"]) < 1.1 * shared["file"]


def test_forks_of_one_context_hold_its_prefix_once(path: Path) -> None:
    forks = many_forks(path, QUICK)
    assert forks["prefixes per layer"] == 1
    assert forks["forks"] * forks["prefix"] > 4 * forks["grown"]
