"""The rivals of a run, by name."""

from pathlib import Path

from defensivekv.bench.plan import BenchPlan
from defensivekv.bench.rivals.external import KINDS, External, Workers
from defensivekv.bench.rivals.host import Host
from defensivekv.bench.rivals.installing import find_pythons
from defensivekv.bench.rivals.local import CompiledEvicting, CompiledStatic, Evicting, FlatCopy, Static, Stock
from defensivekv.bench.rivals.rival import Rival
from defensivekv.bench.subject import Subject


class Field:
    """Everything that takes part: this package first, then the plan's rivals.

    Raises InvalidInputError where a Python that was given for one of them cannot be used.
    """

    def __init__(self, plan: BenchPlan, subject: Subject, folder: Path, threads: int) -> None:
        self.host = Host(subject)
        names = plan.rival_names
        self.workers = Workers(subject, folder, find_pythons(plan.pythons, names), threads)
        self.ours = Evicting(self.host)
        rivals = (kind(self.host) for kind in (CompiledEvicting, Stock, Static, CompiledStatic, FlatCopy))
        local: dict[str, Rival] = {rival.family: rival for rival in rivals}
        on_gpu = self.host.device.type == "cuda"
        self.rivals: list[Rival] = [self.ours]
        for name in names:
            if name in local:
                self.rivals.append(local[name])
            self.rivals += [
                External(kind, self.workers, lambda: self.host.facts, on_gpu=on_gpu)
                for kind in KINDS
                if kind.rival == name
            ]

    def close(self) -> None:
        """Ends the rivals' processes."""
        self.workers.close()
