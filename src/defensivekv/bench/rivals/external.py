"""Rivals that live in a Python of their own, and what each of them is."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defensivekv.bench.rivals.installing import install_advice
from defensivekv.bench.rivals.rival import Filling, Prompt, Rival
from defensivekv.bench.rivals.worker_process import WorkerProcess
from defensivekv.bench.subject import ModelFacts, Subject
from defensivekv.errors import RivalError

_FILES = "models"
_WORKERS = {"kvpress": "kvpress", "llama.cpp": "llamacpp", "openvino": "openvino"}


@dataclass(frozen=True)
class Kind:
    """What is known of a rival before it runs.

    rival: as the plan names it. variant: of its worker. weight_copies: times the weights that its process takes, while
    it loads or converts them too. has_random_weights: whether a model's own weights are replaced by random ones.
    on_gpu, takes_batches: whether it is measured there, and with several sequences.
    """

    name: str
    rival: str
    takes_budget: bool
    variant: str = ""
    weight_copies: float = 1.0
    has_random_weights: bool = False
    on_gpu: bool = False
    takes_batches: bool = False
    is_whole: bool = True
    """Whether the full cache is held, whatever the budget."""


KINDS = (
    Kind("kvpress", "kvpress", takes_budget=True, on_gpu=True, takes_batches=True),
    Kind("llama.cpp", "llama.cpp", takes_budget=False, has_random_weights=True),
    Kind("llama.cpp flash", "llama.cpp", takes_budget=False, variant="flash", has_random_weights=True),
    Kind("openvino", "openvino", takes_budget=True, weight_copies=2.5, is_whole=False),
)


class Workers:
    """One process for each rival, started when it is first asked, and kept: its variants share it.

    folder: of the run, for converted models and logs. pythons: of the rivals that are there.
    """

    def __init__(self, subject: Subject, folder: Path, pythons: dict[str, str], threads: int) -> None:
        self._subject, self._folder, self._threads = subject, folder, threads
        self.pythons = pythons
        self._running: dict[str, tuple[WorkerProcess, dict[str, Any]]] = {}
        self._failed: dict[str, str] = {}

    def started(self, rival: str, facts: ModelFacts) -> tuple[WorkerProcess, dict[str, Any]]:
        """Its process, and what it said when it had loaded. Raises RivalError, again where it failed before."""
        if rival in self._failed:
            raise RivalError(self._failed[rival])
        if rival not in self._running:
            log = self._folder / "logs" / f"{rival}.log"
            process = WorkerProcess.of_rival(_WORKERS[rival], self.pythons[rival], self._threads, log)
            try:
                answer = process.ask("load", **self._request(facts))
            except RivalError as error:
                process.close()
                self._failed[rival] = str(error)
                raise
            self._running[rival] = process, answer
        return self._running[rival]

    def _request(self, facts: ModelFacts) -> dict[str, Any]:
        files = self._folder / _FILES
        source = self._subject.source
        # A model that is shortened is its shape alone to others.
        is_whole = source is not None and Path(source).is_dir() and facts.layers == facts.of_layers
        return {
            "config": str(self._subject.save_config(files)),
            "model": source if is_whole else None,
            "dtype": facts.dtype,
            "device": self._subject.device,
            "folder": str(files),
            "threads": self._threads,
            "seed": self._subject.seed,
        }

    def is_running(self, rival: str) -> bool:
        """Whether its process holds the model already."""
        return rival in self._running

    def stop_all_but(self, rivals: Collection[str]) -> None:
        """Ends the other processes; the next question starts them again."""
        for rival in [rival for rival in self._running if rival not in rivals]:
            self._running.pop(rival)[0].close()

    def close(self) -> None:
        """Ends all processes."""
        self.stop_all_but(())


class _ExternalStepper:
    """A cache in a worker."""

    def __init__(self, process: WorkerProcess, answer: dict[str, Any]) -> None:
        self._process, self._handle = process, answer["handle"]
        self.held_bytes = int(answer["held_bytes"])
        self.note = str(answer.get("note", ""))

    def step(self) -> float:
        """One token of each sequence, by the worker's clock."""
        return float(self._process.ask("step", handle=self._handle)["seconds"])

    def close(self) -> None:
        """Frees the cache."""
        self._process.ask("drop", handle=self._handle)


class External(Rival):
    """A rival of that kind; facts: of the model, as it is in this process."""

    fills, reads = True, True

    def __init__(self, kind: Kind, workers: Workers, facts: Callable[[], ModelFacts], *, on_gpu: bool) -> None:
        self._kind, self._workers, self._facts = kind, workers, facts
        self._on_gpu = on_gpu
        self.family, self.name, self.takes_budget = kind.rival, kind.name, kind.takes_budget
        self._answer: dict[str, Any] = {}

    def missing(self, batch: int = 1) -> str | None:
        """Not installed, not for this device, or not for batches."""
        if self._on_gpu and not self._kind.on_gpu:
            return "not measured: it is run on CPUs alone here"
        if self._kind.rival not in self._workers.pythons:
            return f"not installed: {install_advice(self._kind.rival)}"
        if batch > 1 and not self._kind.takes_batches:
            return "not measured: of one sequence alone here"
        return None

    def start(self) -> None:
        """Starts its process, which loads or converts the model."""
        _, self._answer = self._workers.started(self._kind.rival, self._facts())

    def needs(self, filling: Filling) -> int:
        """Weights and cache, and of one layer a copy."""
        facts = self._facts()
        tokens = filling.tokens if self._kind.is_whole else filling.kept
        cache = filling.batch * tokens * facts.token_bytes * (facts.layers + 1) // facts.layers
        weights = (
            0 if self._workers.is_running(self._kind.rival) else int(self._kind.weight_copies * facts.weight_bytes)
        )
        return weights + cache

    def read_bytes(self, held: int) -> int | None:
        """As of the model here, its own precision counted."""
        facts = self._facts()
        if facts.read_bytes is None:
            return None
        stored = int(self._answer.get("weight_bytes", facts.weight_bytes))
        return round(facts.read_bytes * stored / facts.weight_bytes) + held

    def fill(self, filling: Filling) -> _ExternalStepper:
        """As its worker fills it."""
        process, self._answer = self._workers.started(self._kind.rival, self._facts())
        kept = None if filling.share is None else filling.kept
        answer = process.ask(
            "fill",
            variant=self._kind.variant,
            tokens=filling.tokens,
            kept=kept,
            batch=filling.batch,
            room=filling.room,
            seed=filling.seed,
        )
        return _ExternalStepper(process, answer)

    def read(self, prompt: Prompt) -> float:
        """As its worker reads it."""
        process, self._answer = self._workers.started(self._kind.rival, self._facts())
        kept = None if prompt.share is None else int(prompt.tokens * prompt.share)
        answer = process.ask("prefill", variant=self._kind.variant, tokens=prompt.tokens, kept=kept, seed=prompt.seed)
        return float(answer["seconds"])

    def describe(self) -> dict[str, object]:
        """What its process said when it had loaded."""
        said: dict[str, object] = {name: self._answer[name] for name in ("versions", "note") if name in self._answer}
        if said and self._kind.has_random_weights:
            said["weights"] = "random weights of the same shape"
        return said
