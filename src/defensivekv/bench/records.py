"""What a run found: the lines of `results.json`."""

from statistics import median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from defensivekv.bench.plan import OURS

Status = Literal["ok", "missing", "failed", "no room"]
Kind = Literal["steps", "prefill", "memory", "capacity"]
CellKey = tuple[Kind, int, int]
"""Kind, length and batch: what tells a cell from all others."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Outcome(_Frozen):
    """What one rival did in one cell.

    label: the rival with its budget and policy. status: "missing" where it is not installed, "no room" where it does
    not fit. reason: for every status but "ok". samples_s: seconds of every step or prefill. held_bytes: of its cache
    before the first step. read_bytes: that a step reads at least. floor_s: the time that reading them takes at the
    speed of the same turns, or of a prefill that its operations take. peak_bytes: over the idle model. turns: which
    rivals took turns with each other: those of the same number. note: how it was filled or read. longest,
    largest_batches: of the capacity, the latter by length. verified: what allocating it came to.
    """

    rival: str
    label: str
    budget: str | None = None
    policy: str | None = None
    status: Status = "ok"
    reason: str = ""
    samples_s: tuple[float, ...] = ()
    held_bytes: int | None = None
    read_bytes: int | None = None
    floor_s: float | None = None
    peak_bytes: int | None = None
    turns: int = 1
    note: str = ""
    longest: int | None = None
    largest_batches: dict[int, int] = {}
    verified: str = ""

    @property
    def seconds(self) -> float | None:
        """The median; None: there is none."""
        return median(self.samples_s) if self.samples_s else None

    @property
    def achieved(self) -> float | None:
        """The floor's share of the time."""
        return None if self.seconds is None or self.floor_s is None else self.floor_s / self.seconds


class CellRecord(_Frozen):
    """All rivals at one length and batch.

    filled: tokens that the caches held, or that were read; below the length where the model has no more positions.
    date, commit: of the measurement; a folder's cells may be of several runs.
    read_speeds: bytes/s of the memory in every turn. memory_bytes: of the capacity, what has to be fitted into.
    """

    kind: Kind
    length: int
    batch: int
    filled: int
    date: str = ""
    commit: str = ""
    wall_s: float = 0.0
    read_speeds: tuple[float, ...] = ()
    memory_bytes: int = 0
    outcomes: tuple[Outcome, ...] = ()

    @property
    def key(self) -> CellKey:
        """Of the cell."""
        return self.kind, self.length, self.batch

    @property
    def noise(self) -> float:
        """How many times its fastest step the median takes, of the rival where that is most; 1 without any."""
        sampled = [each for each in self.outcomes if each.samples_s]
        return max(((each.seconds or 0) / min(each.samples_s) for each in sampled), default=1.0)

    def ours(self, turns: int = 1) -> Outcome | None:
        """Of this package the first outcome among those that took turns."""
        return next((each for each in self.outcomes if each.rival == OURS and each.turns == turns), None)


class Results(_Frozen):
    """A run's folder, as JSON.

    settings: what must be equal for a run to go on in it. machine, model, roofline: what was measured on, and of what.
    rivals: versions and precision of each, or why it is missing.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    model: dict[str, Any]
    roofline: dict[str, float]
    rivals: dict[str, dict[str, Any]] = {}
    cells: tuple[CellRecord, ...] = ()

    def cell(self, key: CellKey) -> CellRecord | None:
        """That cell, if it was measured."""
        return next((cell for cell in self.cells if cell.key == key), None)

    def of_kind(self, kind: Kind) -> list[CellRecord]:
        """Cells by length, then batch."""
        return sorted((cell for cell in self.cells if cell.kind == kind), key=lambda cell: (cell.length, cell.batch))
