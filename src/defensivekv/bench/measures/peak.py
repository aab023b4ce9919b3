"""What a process takes at most while it reads a prompt and goes on from it, over what it takes before.

`python -m defensivekv.bench.measures.peak JSON` measures one way of reading in a process of its own.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from defensivekv.bench.peak_memory import ALLOCATOR, PeakMemory
from defensivekv.bench.rivals.host import Host
from defensivekv.bench.rivals.local import Evicting, Stock
from defensivekv.bench.rivals.rival import Filling
from defensivekv.bench.subject import Subject
from defensivekv.budget import Budget
from defensivekv.errors import RivalError
from defensivekv.integrations.transformers import EvictingCache, enable, prefill
from defensivekv.integrations.transformers.model import text_config

_NEW_TOKENS = 8
_CHUNK_SIZE = 512
_WARMUP_TOKENS = 256


def peak_of(
    subject: Subject, threads: int, way: str, tokens: int, *, policy: str = "", share: str | None = None, fills: int = 0
) -> int:
    """Bytes, measured in a process of its own. Raises RivalError where that fails, as for want of memory.

    way: "stock", "whole" or "chunked". policy, share: of the cache, but for "stock". fills: sequences that are filled
    by hand and generate one token; none: a prompt is read, and a few tokens are generated.
    """
    how = {"way": way, "tokens": tokens, "policy": policy, "share": share, "fills": fills}
    request = json.dumps({"subject": asdict(subject), "threads": threads, "how": how})
    command = [sys.executable, "-m", "defensivekv.bench.measures.peak", request]
    ran = subprocess.run(command, env=os.environ | ALLOCATOR, capture_output=True, text=True, check=False)
    if ran.returncode < 0:
        raise RivalError(f"the process was ended by signal {-ran.returncode}, as the system does for want of memory")
    if ran.returncode:
        said = [line for line in ran.stderr.splitlines() if line.strip()]
        raise RivalError(f"the process ended with status {ran.returncode}: {said[-1] if said else 'it said nothing'}")
    return int(ran.stdout.splitlines()[-1])


@torch.inference_mode()
def _measure(host: Host, way: str, tokens: int, policy: str, share: str | None, fills: int) -> int:
    if fills:
        kept = None if share is None else Budget.parse(share).share(tokens, 1)
        counted = PeakMemory(host.device)
        rival = Stock(host) if way == "stock" else Evicting(host)
        rival.fill(Filling(tokens, fills, kept, 1, 0)).step()
        return counted.bytes
    _read(host, way, min(tokens, _WARMUP_TOKENS), policy, share)
    counted = PeakMemory(host.device)
    _read(host, way, tokens, policy, share)
    return counted.bytes


def _read(host: Host, way: str, tokens: int, policy: str, share: str | None) -> None:
    cache: Any
    if way == "stock":
        cache = DynamicCache(config=host.model.config)
        host.read(cache, tokens, 0)
    else:
        enable(host.model)
        cache = EvictingCache(host.model, policy, share)
        words = text_config(host.model).vocab_size
        ids = torch.randint(words, (1, tokens), generator=host.generator(0)).to(host.device)
        prefill(host.model, cache, ids, chunk_size=_CHUNK_SIZE if way == "chunked" else None)
    for _ in range(_NEW_TOKENS):
        host.step(cache, 1)


def _main(request: str) -> None:
    asked = json.loads(request)
    with suppress(OSError):  # where memory runs out, this process is to end, and no other
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    torch.set_num_threads(asked["threads"])
    host = Host(Subject(**asked["subject"]))
    _ = host.model  # weights that are made in inference mode are kept twice by some products
    print(_measure(host, **asked["how"]))


if __name__ == "__main__":
    _main(sys.argv[1])
