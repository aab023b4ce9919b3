"""How often the pages of a context are held: `python -m benchmarks.contexts.sharing JOB`.

Two processes answer from one file; one process forks one context many times. Memory is what the kernel counts: of a
mapping, PSS is each page's size divided by the processes that have it.
"""

import gc
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

import defensivekv as dkv
from benchmarks.contexts.settings import Settings
from benchmarks.contexts.subject import make_model, make_tokenizer, text


def of_file(path: Path) -> dict[str, int]:
    """Bytes of this process's mappings of a file: resident, and its part of what is shared."""
    found, inside = {"Rss": 0, "Pss": 0}, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, rest = line.partition(":")
        if " " in name or not rest.strip().endswith("kB"):
            inside = line.endswith(str(path))
        elif inside and name in found:
            found[name] += 1024 * int(rest.split()[0])
    return found


def two_processes(path: Path, settings: Settings) -> dict[str, Any]:
    """Bytes of the file that each of two processes holds once both have answered from it."""
    processes = [_process("answer", path, settings) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            process.stdout.readline()
        # Both have answered, and none has ended.
        held = []
        for process in processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            held.append(json.loads(process.stdout.readline()))
    finally:
        for process in processes:
            process.communicate()
    return {"file": path.stat().st_size, "rss": [one["Rss"] for one in held], "pss": [one["Pss"] for one in held]}


def _process(what: str, path: Path, settings: Settings) -> "subprocess.Popen[str]":
    job = json.dumps({"what": what, "path": str(path), "settings": asdict(settings)})
    command = [sys.executable, "-m", "benchmarks.contexts.sharing", job]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def many_forks(path: Path, settings: Settings) -> dict[str, Any]:
    """How much a new process grows by as many forks, each of which has answered a question and is kept."""
    told, _ = _process("fork", path, settings).communicate()
    found: dict[str, Any] = json.loads(told)
    return found


def _fork(path: Path, settings: Settings) -> dict[str, Any]:
    model, tokenizer = make_model(settings), make_tokenizer(settings)
    context = dkv.load_context(path, model, tokenizer)
    question = text(settings.question, settings, seed=1)
    _, first = context.turn(question, max_new_tokens=2)
    own = first.cache.nbytes - context.cache.nbytes
    gc.collect()
    process, kept = psutil.Process(), [first]
    before = process.memory_info().rss
    kept += [context.turn(question, max_new_tokens=2)[1] for _ in range(settings.forks - 1)]
    gc.collect()
    grown = process.memory_info().rss - before
    storages = {
        layer.store.view.prefix.keys.data_ptr() for one in kept for layer in one.cache.layers if layer.store.view
    }
    return {
        "forks": settings.forks,
        "prefix": context.cache.nbytes,
        "grown": grown,
        "of their own": own * settings.forks,
        "prefixes per layer": len(storages) / len(context.cache.layers),
    }


def main(job: str) -> None:
    """Does what the job says: tells what forks take, or answers, says so, and tells what it holds once it is asked."""
    asked = json.loads(job)
    fields, path = asked["settings"], Path(asked["path"])
    read: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    settings = Settings(**read)
    torch.set_num_threads(1)
    if asked["what"] == "fork":
        print(json.dumps(_fork(path, settings)))
        return
    model, tokenizer = make_model(settings), make_tokenizer(settings)
    context = dkv.load_context(path, model, tokenizer)
    context.ask(text(settings.question, settings, seed=1), max_new_tokens=2)
    print("answered", flush=True)
    sys.stdin.readline()
    print(json.dumps(of_file(path)), flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1])
