"""Cells spread over the machines of a Ray cluster; the process that started them writes all files."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from defensivekv.errors import DefensiveKVError, InvalidInputError
from defensivekv.evaluation.runner.cells import Cell
from defensivekv.evaluation.runner.crew import Load, Tell
from defensivekv.evaluation.runner.examiner import Examiner, Outcome
from defensivekv.evaluation.runner.facts import Facts
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.evaluation.runner.store import CellLog
from defensivekv.evaluation.tasks.sample import Sample, Unreadable


class Worker:
    """What runs on another machine: one model, loaded once, when it is first met."""

    def __init__(self, load: Load, plan: RunPlan, threads: int) -> None:
        self._load, self._plan, self._threads = load, plan, threads
        self._examiner: Examiner | None = None

    def meet(self) -> tuple[Facts, PreTrainedTokenizerBase]:
        """What its records are made with, and its tokenizer."""
        examiner = self._ready()
        return examiner.facts, examiner.tokenizer

    def examine(self, cell: Cell, window: Sequence[Sample | Unreadable]) -> list[Outcome]:
        """As of `Examiner`."""
        return self._ready().examine(cell, window)

    def _ready(self) -> Examiner:
        if self._examiner is None:
            # As many as the process that started the run has: sums depend on it.
            torch.set_num_threads(self._threads)
            self._examiner = Examiner(*self._load(self._plan), self._plan)
        return self._examiner


@dataclass(frozen=True)
class _Underway:
    """A window that a worker is answering."""

    worker: Any
    log: CellLog


class RayCrew:
    """A worker for each GPU of the cluster; without GPUs, for each machine."""

    def __init__(self, load: Load, plan: RunPlan, address: str | None = None) -> None:
        """address: of the cluster; None: the one this process is connected to, or a new one on this machine.

        Raises InvalidInputError where Ray is not installed or there is no such cluster, and what loading raises.
        """
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise InvalidInputError(
                f"running on a Ray cluster needs Ray ({error}): pip install 'defensivekv[ray]'"
            ) from error
        self._ray = ray
        self._is_ours = not ray.is_initialized()
        self._workers: list[Any] = []
        if self._is_ours:
            place = {"address": address} if address else {"include_dashboard": False}
            try:
                ray.init(log_to_driver=False, **place)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise InvalidInputError(f"no Ray cluster at {address!r}: {error}") from error
        try:
            gpus = int(ray.cluster_resources().get("GPU", 0))
            machines = sum(bool(node["Alive"]) for node in ray.nodes())
            hire = ray.remote(Worker).options(num_cpus=1, num_gpus=1 if gpus else 0, scheduling_strategy="SPREAD")
            self._workers = [hire.remote(load, plan, torch.get_num_threads()) for _ in range(gpus or machines)]
            met = [self._get(ref) for ref in [worker.meet.remote() for worker in self._workers]]
        except BaseException:
            self.close()
            raise
        self.facts: Facts = met[0][0]
        self.tokenizer: PreTrainedTokenizerBase = met[0][1]
        odd = next((facts for facts, _ in met if facts.fixed != self.facts.fixed), None)
        if odd is not None:
            self.close()
            raise InvalidInputError(
                f"the cluster's machines load different models: {self.facts.fixed} and {odd.fixed}; give all the same"
            )

    def run(self, logs: Iterable[CellLog], tell: Tell) -> None:
        """See `Crew`. A worker keeps its cell until that is done; where one is lost, the others go on.

        Raises DefensiveKVError where all are lost.
        """
        waiting: Iterator[CellLog] = iter(logs)
        returned: list[CellLog] = []
        idle, underway = list(self._workers), {}
        while True:
            while idle and (log := returned.pop() if returned else next(waiting, None)) is not None:
                if log.window:
                    worker = idle.pop()
                    underway[worker.examine.remote(log.cell, log.window)] = _Underway(worker, log)
            if not underway:
                return
            (ref, *_), _ = self._ray.wait(list(underway), num_returns=1)
            done = underway.pop(ref)
            try:
                outcomes = self._get(ref)
            except self._ray.exceptions.RayActorError as error:
                self._workers.remove(done.worker)
                returned.append(done.log)
                if not self._workers:
                    raise DefensiveKVError(
                        f"all workers of the Ray cluster were lost: {error}; run the same command to go on"
                    ) from error
                continue
            done.log.append(outcomes)
            tell(done.log.cell, done.log.done, len(done.log.samples))
            idle.append(done.worker)
            returned.append(done.log)

    def close(self) -> None:
        """See `Crew`."""
        for worker in self._workers:
            self._ray.kill(worker)
        if self._is_ours:
            self._ray.shutdown()

    def _get(self, ref: Any) -> Any:
        """The result; errors of ours as they were raised there."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DefensiveKVError):
                raise error.cause from None
            raise
