"""A worker's end of the conversation: one JSON object a line in, one a line out.

    {"do": "load", "config": "config.json", ...}            -> {"versions": {...}, "weight_bytes": 123, "note": "..."}
    {"do": "fill", "tokens": 32768, "kept": 6553, ...}      -> {"handle": 0, "held_bytes": 456, "note": "..."}
    {"do": "step", "handle": 0}                             -> {"seconds": 0.123}
    {"do": "prefill", "tokens": 4096, ...}                  -> {"seconds": 1.23}
    {"do": "drop", "handle": 0}                             -> {}

Whatever goes wrong is an answer too: {"error": "..."}.
"""

import json
import os
import sys
from dataclasses import dataclass
from typing import Any, Protocol

Answer = dict[str, Any]


@dataclass(frozen=True)
class Loading:
    """config: the model's `config.json`. model: a folder with its weights; None: random ones. dtype, device: as torch
    names them. folder: for files that are made once. threads: of the CPU.
    """

    config: str
    model: str | None
    dtype: str
    device: str
    folder: str
    threads: int
    seed: int


@dataclass(frozen=True)
class Filling:
    """A cache as after a prompt of `tokens`, of which `kept` a head are read from then on; None: all.

    variant: where a rival has several. batch: sequences. room: for tokens that will be generated.
    """

    variant: str
    tokens: int
    kept: int | None
    batch: int
    room: int
    seed: int


@dataclass(frozen=True)
class Reading:
    """A prompt of `tokens`, of which `kept` a head are to stay; None: all."""

    variant: str
    tokens: int
    kept: int | None
    seed: int


class Worker(Protocol):
    """A rival that can be filled and asked for one step at a time."""

    def load(self, asked: Loading) -> Answer:
        """Makes or loads the model."""

    def fill(self, asked: Filling) -> Answer:
        """Makes a cache."""

    def step(self, handle: int) -> Answer:
        """One token of each sequence, timed."""

    def prefill(self, asked: Reading) -> Answer:
        """Reads a prompt, timed."""

    def drop(self, handle: int) -> Answer:
        """Frees a cache."""


def serve(worker: Worker) -> None:
    """Answers until the input ends."""
    # Libraries print to standard output: the conversation keeps the real one for itself.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer = _answer(worker, json.loads(line))
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(worker: Worker, request: dict[str, Any]) -> Answer:
    what = request.pop("do")
    if what == "load":
        return worker.load(Loading(**request))
    if what == "fill":
        return worker.fill(Filling(**request))
    if what == "step":
        return worker.step(request["handle"])
    if what == "prefill":
        return worker.prefill(Reading(**request))
    if what == "drop":
        return worker.drop(request["handle"])
    raise ValueError(f"nothing is known of {what!r}")
