"""Where cells run: what both places have in common, and the user's own process."""

from collections.abc import Callable, Iterable
from typing import Protocol

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from defensivekv.evaluation.runner.cells import Cell
from defensivekv.evaluation.runner.examiner import Examiner
from defensivekv.evaluation.runner.facts import Facts
from defensivekv.evaluation.runner.plan import RunPlan
from defensivekv.evaluation.runner.store import CellLog

Load = Callable[[RunPlan], tuple[PreTrainedModel, PreTrainedTokenizerBase]]
"""Loads the plan's model and its tokenizer; for Ray a function of a module, which other machines import."""

Tell = Callable[[Cell, int, int], None]
"""Told of a cell how many of its samples are done, and how many there are."""


class Crew(Protocol):
    """Something that answers cells. Only the user's process writes files."""

    @property
    def facts(self) -> Facts:
        """What all its records are made with."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's."""
        ...

    def run(self, logs: Iterable[CellLog], tell: Tell) -> None:
        """Goes on with each cell from where its log is, window by window."""
        ...

    def close(self) -> None:
        """Lets go of the models."""
        ...


class LocalCrew:
    """One model in this process."""

    def __init__(self, load: Load, plan: RunPlan) -> None:
        self._examiner = Examiner(*load(plan), plan)

    @property
    def facts(self) -> Facts:
        """See `Crew`."""
        return self._examiner.facts

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See `Crew`."""
        return self._examiner.tokenizer

    def run(self, logs: Iterable[CellLog], tell: Tell) -> None:
        """See `Crew`."""
        for log in logs:
            while window := log.window:
                log.append(self._examiner.examine(log.cell, window))
                tell(log.cell, log.done, len(log.samples))

    def close(self) -> None:
        """See `Crew`."""
        self._examiner.close()
