import sys
from collections.abc import Iterator
from fractions import Fraction
from importlib import import_module
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from defensivekv.bench.rivals.external import KINDS, External, Workers
from defensivekv.bench.rivals.installing import find_pythons, install
from defensivekv.bench.rivals.rival import Filling, Prompt
from defensivekv.bench.rivals.worker_process import WorkerProcess
from defensivekv.bench.shapes import shape_config
from defensivekv.bench.subject import ModelFacts, Subject
from defensivekv.errors import InvalidInputError, RivalError
from tests.bench.fakes import fake_python

FACTS = ModelFacts("tiny", 2, 2, "float32", 500, 2000, 1600, 64, 4096)
SUBJECT = Subject(None, "tiny", None, "float32", "cpu", 0)
KIND = {kind.name: kind for kind in KINDS}


@pytest.mark.parametrize("shape", ["llama-3.2-1b", "llama-3.1-8b", "qwen2.5-7b", "mistral-7b"])
def test_the_file_for_llama_cpp_has_all_of_a_models_weights(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(GGUFWriter=object))
    gguf_file = import_module("defensivekv.bench.workers.gguf_file")
    config = shape_config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = dict(gguf_file.tensors(config.to_dict()))
    assert sum(map(prod, shapes.values())) == sum(parameter.numel() for parameter in model.parameters())
    assert ("output.weight" in shapes) is not config.tie_word_embeddings


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    made = Workers(SUBJECT, tmp_path / "run", {"kvpress": fake_python(tmp_path)}, threads=3)
    yield made
    made.close()


def external(workers: Workers, name: str = "kvpress", *, on_gpu: bool = False) -> External:
    return External(KIND[name], workers, lambda: FACTS, on_gpu=on_gpu)


def test_a_worker_is_filled_and_asked_step_by_step(workers: Workers) -> None:
    rival = external(workers)
    assert rival.missing() is None
    rival.start()
    assert rival.describe() == {"versions": {"fake": "1"}, "note": "float32, 3 threads"}
    stepper = rival.fill(Filling(100, 2, Fraction(1, 4), 8, 0))
    assert (stepper.held_bytes, stepper.note) == (200, "kept 25")
    assert [stepper.step(), stepper.step()] == [0.251, 0.252]
    stepper.close()
    assert rival.read(Prompt(512, None, "", 0)) == 0.512
    # Its weights take half of ours: 1600 of 2000 bytes are read, and so 800 of its 1000.
    assert rival.read_bytes(stepper.held_bytes) == 1000


def test_variants_share_a_process_and_another_starts_after_a_stop(workers: Workers) -> None:
    first, second = external(workers), external(workers)
    before = first.needs(Filling(100, 1, None, 8, 0))
    first.start()
    assert first.needs(Filling(100, 1, None, 8, 0)) == before - FACTS.weight_bytes, "the weights are there already"
    first.fill(Filling(10, 1, None, 8, 0)).step()
    assert second.fill(Filling(10, 1, None, 8, 0)).step() == 0.252
    workers.stop_all_but({"openvino"})
    assert second.fill(Filling(10, 1, None, 8, 0)).step() == 0.251


def test_what_goes_wrong_in_a_worker_is_said_and_it_lives_on(workers: Workers) -> None:
    rival = external(workers)
    with pytest.raises(RivalError, match="MemoryError: too much"):
        rival.fill(Filling(6000, 1, None, 8, 0))
    assert rival.fill(Filling(10, 1, None, 8, 0)).step() == 0.251


def test_a_worker_that_ends_is_an_error_with_its_last_words_every_time(tmp_path: Path) -> None:
    python = fake_python(tmp_path, "sys.exit('no such library')")
    workers = Workers(SUBJECT, tmp_path, {"kvpress": python}, threads=1)
    for _ in range(2):
        with pytest.raises(RivalError, match="ended with status 1: no such library"):
            external(workers).start()


def test_an_answer_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    process = WorkerProcess([sys.executable, "-c", "input(); print('hello')"], tmp_path / "log")
    with pytest.raises(RivalError, match=r"'hello.*no JSON"):
        process.ask("load")
    process.close()


def test_a_rival_that_is_not_there_says_how_to_get_it(workers: Workers) -> None:
    assert "not installed: run `defensivekv bench --install-rivals openvino`" in str(
        external(workers, "openvino").missing()
    )
    workers.pythons["llama.cpp"] = "python"
    assert external(workers, "llama.cpp").missing() is None
    assert "one sequence alone" in str(external(workers, "llama.cpp").missing(batch=2))
    assert "CPUs alone" in str(external(workers, "llama.cpp flash", on_gpu=True).missing())
    assert external(workers, on_gpu=True).missing(batch=4) is None


def test_a_python_that_cannot_be_used_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="cannot be run"):
        find_pythons({"kvpress": str(tmp_path / "none")}, ["kvpress"])
    with pytest.raises(InvalidInputError, match="cannot import llama_cpp, gguf: ModuleNotFoundError"):
        find_pythons({"llama.cpp": sys.executable}, ["llama.cpp"])
    assert find_pythons({"llama.cpp": sys.executable}, ["stock"]) == {}, "it does not take part"
    with pytest.raises(InvalidInputError, match="no environment of its own"):
        install("stock", print)
    monkeypatch.setattr("defensivekv.bench.rivals.installing.HOME", tmp_path)
    (tmp_path / "kvpress" / "bin").mkdir(parents=True)
    (tmp_path / "kvpress" / "bin" / "python").touch()
    assert find_pythons({}, ["kvpress", "openvino"]) == {"kvpress": str(tmp_path / "kvpress" / "bin" / "python")}
