"""Decoding steps of rivals with filled caches, taken in turns."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

from defensivekv.bench.contenders import Contender, fillers, in_groups
from defensivekv.bench.plan import MOST_STEPS, WARMUP, BenchPlan
from defensivekv.bench.records import CellRecord, Outcome
from defensivekv.bench.rivals.registry import Field
from defensivekv.bench.rivals.rival import Stepper
from defensivekv.bench.roofline import ReadProbe, floor_seconds
from defensivekv.budget import format_bytes
from defensivekv.errors import DefensiveKVError

_TURN_S = 0.2
"""A turn is as many steps as take so long; of several, the first wakes the rival up and is not counted."""

_PAUSE_S = 0.02
"""Between turns, so that the threads of the last rival have gone to sleep."""

Say = Callable[[str], None]


def measure_steps(
    field: Field, plan: BenchPlan, length: int, filled: int, batch: int, room: int, say: Say
) -> CellRecord:
    """All rivals with `filled` tokens of each of `batch` sequences, within `room` bytes beside the model."""
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    able: list[Contender] = []
    for contender in fillers(field.rivals, plan):
        reason = contender.rival.missing(batch)
        if reason is None:
            able.append(contender)
        else:
            outcomes.append(contender.outcome("missing", reason=reason))
    needs = [contender.rival.needs(contender.filling(filled, batch, plan)) for contender in able]
    groups, unfit = in_groups(needs, room)
    for number in unfit:
        reason = f"needs about {format_bytes(needs[number])}, and {format_bytes(room)} are there beside the model"
        outcomes.append(able[number].outcome("no room", reason=reason))
    speeds: list[float] = []
    probe = ReadProbe(field.host.device)
    for turns, members in enumerate(groups, start=1):
        if len(groups) > 1:
            field.workers.stop_all_but({able[member].rival.family for member in members})
        group = _Group([able[member] for member in members], plan, filled, batch, probe)
        try:
            group.fill(say)
            group.take_turns(say)
        finally:
            group.close()
        outcomes += group.outcomes(turns)
        speeds += group.speeds
    wall = round(time.perf_counter() - started, 1)
    ordered = sorted(outcomes, key=lambda each: [rival.name for rival in field.rivals].index(each.rival))
    return CellRecord(
        kind="steps",
        length=length,
        batch=batch,
        filled=filled,
        wall_s=wall,
        read_speeds=tuple(speeds),
        outcomes=tuple(ordered),
    )


class _Group:
    """Rivals that take turns with each other. What fails is out, and says why."""

    def __init__(
        self, contenders: Sequence[Contender], plan: BenchPlan, tokens: int, batch: int, probe: ReadProbe
    ) -> None:
        self._contenders, self._plan = contenders, plan
        self._tokens, self._batch = tokens, batch
        self._probe = probe
        self._steppers: dict[int, Stepper] = {}
        self._failures: dict[int, str] = {}
        self._held: dict[int, int] = {}
        self._samples: dict[int, list[float]] = {number: [] for number in range(len(contenders))}
        self.speeds: list[float] = []

    def fill(self, say: Say) -> None:
        """Every cache."""
        for number, contender in enumerate(self._contenders):
            say(f"filling {contender.label}")
            try:
                contender.rival.start()
                stepper = contender.rival.fill(contender.filling(self._tokens, self._batch, self._plan))
            except Exception as error:  # whatever goes wrong with a rival is a result
                self._failures[number] = _said(error)
                continue
            self._steppers[number] = stepper
            self._held[number] = stepper.held_bytes

    def take_turns(self, say: Say) -> None:
        """A B C A B C ..., the memory's speed in each round."""
        counts: dict[int, int] = {}
        for turn in range(-WARMUP, self._plan.repeats):
            say(f"turn {turn + 1} of {self._plan.repeats}" if turn >= 0 else "warming up")
            if turn >= 0:
                time.sleep(_PAUSE_S)
                self.speeds.append(self._probe.speed())
            for number, stepper in list(self._steppers.items()):
                time.sleep(_PAUSE_S)
                try:
                    taken = [stepper.step() for _ in range(counts.get(number, 1))]
                except Exception as error:  # as above
                    self._failures[number] = _said(error)
                    self._close(number)
                    continue
                if turn >= 0:
                    self._samples[number] += taken[1:] or taken
                else:
                    counts[number] = min(MOST_STEPS, max(1, math.ceil(_TURN_S / max(taken[-1], 1e-6))))

    def outcomes(self, turns: int) -> list[Outcome]:
        """What each came to."""
        found = []
        for number, contender in enumerate(self._contenders):
            if number in self._failures:
                found.append(contender.outcome("failed", reason=self._failures[number], turns=turns))
                continue
            held = self._held[number]
            read = contender.rival.read_bytes(held)
            found.append(
                contender.outcome(
                    samples_s=tuple(self._samples[number]),
                    held_bytes=held,
                    read_bytes=read,
                    floor_s=floor_seconds(read, median(self.speeds)),
                    turns=turns,
                    note=self._steppers[number].note,
                )
            )
        return found

    def close(self) -> None:
        """Frees every cache."""
        for number in list(self._steppers):
            if number not in self._failures:
                self._close(number)

    def _close(self, number: int) -> None:
        stepper = self._steppers[number]
        if number in self._failures:
            del self._steppers[number]
        try:
            stepper.close()
        except DefensiveKVError as error:
            self._failures.setdefault(number, _said(error))


def _said(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text if isinstance(error, DefensiveKVError) else f"{type(error).__name__}: {text}"
