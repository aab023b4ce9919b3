"""A run from its plan to its folder, cell by cell."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from defensivekv.bench.machine import describe
from defensivekv.bench.measures.capacity import measure_capacity
from defensivekv.bench.measures.memory import measure_memory
from defensivekv.bench.measures.prefill import measure_prefill
from defensivekv.bench.measures.steps import measure_steps
from defensivekv.bench.plan import OURS, BenchPlan
from defensivekv.bench.records import CellKey, CellRecord, Kind, Results
from defensivekv.bench.rivals.registry import Field
from defensivekv.bench.roofline import Roofline, measure_roofline
from defensivekv.bench.sizes import format_tokens
from defensivekv.bench.store import Store
from defensivekv.bench.subject import Subject
from defensivekv.errors import InvalidInputError
from defensivekv.folders import locked
from defensivekv.integrations.transformers.model import config_positions

_SPARED = 0.1
"""Share of the free memory that is left alone."""

_MADE_OTHERWISE = ("shape", "model", "layers", "dtype", "device", "threads", "seed", "budgets", "policies", "repeats")
"""Fields of the plan that must be the same for a folder's run to go on."""

Say = Callable[[str], None]


def _say_nothing(text: str) -> None:
    """Progress that nobody watches."""


def bench(plan: BenchPlan, folder: Path, progress: Say = _say_nothing) -> Results:
    """Measures every cell of the plan that the folder does not hold yet.

    progress: told what goes on. Raises typed errors for what no rival is to blame for, before anything is measured:
    a plan that cannot be, a model that cannot be loaded, lengths beyond its positions, a Python that cannot be used, a
    folder that is another run's.
    """
    plan.check()
    subject = Subject.of(plan)
    _check_lengths(plan, subject)
    before = torch.get_num_threads()
    threads = plan.threads or before
    torch.set_num_threads(threads)
    try:
        with locked(folder):
            field = Field(plan, subject, folder, threads)
            try:
                return _Run(plan, subject, field, folder, threads, progress).all()
            finally:
                field.close()
    finally:
        torch.set_num_threads(before)


def _check_lengths(plan: BenchPlan, subject: Subject) -> None:
    positions = config_positions(subject.config().get_text_config(decoder=True))
    for tokens in plan.tokens:
        if positions is not None and tokens > positions:
            raise InvalidInputError(
                f"{subject.name} has {format_tokens(positions)} positions: --lengths {format_tokens(tokens)} is more"
            )
        if positions is not None and positions <= plan.room:
            raise InvalidInputError(f"{subject.name} has {positions} positions, and {plan.room} are generated")


class _Run:
    def __init__(
        self, plan: BenchPlan, subject: Subject, field: Field, folder: Path, threads: int, progress: Say
    ) -> None:
        self._plan, self._field, self._threads = plan, field, threads
        self._say = progress
        progress(f"loading {subject.name}")
        self._facts = field.host.facts
        device = field.host.device
        progress("measuring the memory's and the processor's speed")
        self._roofline: Roofline = measure_roofline(device, field.host.model.dtype)
        settings = {name: value for name, value in plan.model_dump(mode="json").items() if name in _MADE_OTHERWISE}
        made_with = {
            "machine": describe(device),
            "model": asdict(self._facts),
            "roofline": asdict(self._roofline),
        }
        self._store = Store(folder, settings | {"threads": threads}, made_with)

    def all(self) -> Results:
        """Measures, and gives what the folder then holds."""
        self._store.write()
        for key in self._keys():
            if not self._store.is_done(key, self._expected(key)):
                self._store.add(self._measured(key), self._about_rivals())
        return self._store.results

    def _expected(self, key: CellKey) -> set[str]:
        """The rivals that the cell can be measured with."""
        kind, _, batch = key
        able = [rival for rival in self._field.rivals if rival.missing(batch) is None]
        if kind == "steps":
            return {rival.name for rival in able if rival.fills}
        if kind == "prefill":
            return {rival.name for rival in able if rival.reads}
        return {rival.name for rival in able if rival.name in (OURS, "stock")}

    def _keys(self) -> Iterator[CellKey]:
        plan, found = self._plan, dict[CellKey, None]()
        kinds: dict[str, Kind] = {"prefill": "prefill", "memory": "memory"}
        for what in plan.what:
            if what == "capacity":
                found["capacity", 0, 0] = None
            batches = plan.batch_sizes if what == "throughput" else (1,)
            for tokens in plan.tokens if what != "capacity" else ():
                found |= {(kinds.get(what, "steps"), tokens, batch): None for batch in batches}
        yield from found

    def _measured(self, key: CellKey) -> CellRecord:
        kind, length, batch = key
        at = f"{kind}, {format_tokens(length)} tokens" + (f", batch {batch}" if batch > 1 else "")

        def say(text: str) -> None:
            self._say(f"{at}: {text}")

        if kind == "capacity":
            memory = self._plan.memory_bytes or self._total_memory()
            return measure_capacity(
                self._field, self._plan, self._threads, memory, lambda text: self._say(f"capacity: {text}")
            )
        # What is generated needs positions too.
        tokens = min(length, (self._facts.positions or length + self._plan.room) - self._plan.room)
        if kind == "prefill":
            return measure_prefill(self._field, self._plan, self._roofline, length, tokens, say)
        if kind == "memory":
            return measure_memory(self._field, self._plan, self._threads, length, tokens, say)
        return measure_steps(self._field, self._plan, length, tokens, batch, self._free_memory(), say)

    def _free_memory(self) -> int:
        device = self._field.host.device
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what torch holds back is free too
            return int(torch.cuda.mem_get_info(device)[0] * (1 - _SPARED))
        return int(psutil.virtual_memory().available * (1 - _SPARED))

    def _total_memory(self) -> int:
        device = self._field.host.device
        if device.type == "cuda":
            return int(torch.cuda.get_device_properties(device).total_memory)
        return int(psutil.virtual_memory().total)

    def _about_rivals(self) -> dict[str, dict[str, Any]]:
        about: dict[str, dict[str, Any]] = {}
        for rival in self._field.rivals:
            reason = rival.missing()
            about[rival.name] = {"missing": reason} if reason is not None else dict(rival.describe())
        return about
