"""A cell: one policy at one budget on one task."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from defensivekv.evaluation.tasks.sample import Sample, Unreadable
from defensivekv.evaluation.tasks.task import Task
from defensivekv.policies import Policy


@dataclass(frozen=True)
class Setting:
    """A policy at a budget.

    title: what records call it. name: of the preset. options: what was asked for beside the preset. chunk_size: tokens
    of a prompt that are read at a time; None: all.
    """

    title: str
    name: str
    policy: Policy
    options: Mapping[str, bool | int | str] = field(default_factory=dict)
    chunk_size: int | None = None

    @property
    def budget(self) -> str:
        """As it was asked for, in words."""
        return str(self.policy.budget)

    @property
    def is_stock(self) -> bool:
        """Whether the stock model answers from its stock cache."""
        return self.name == "full"

    @property
    def parts(self) -> dict[str, str]:
        """The policy's parts in words."""
        policy = self.policy
        parts = {"preset": self.name}
        for name in ("scorer", "aggregation", "weighting", "allocation"):
            part = getattr(policy, name)
            parts[name] = "none" if part is None else str(getattr(part, "description", part))
        parts |= {"window_size": str(policy.window_size), "protect_window": str(policy.protect_window)}
        return parts | {f"asked {key}": str(value) for key, value in self.options.items()}


@dataclass(frozen=True)
class TaskFacts:
    """What a record tells of its task; fields as of `Task`.

    is_bare: whether its samples are, which one that cannot be read does not tell.
    """

    name: str
    suite: str
    domain: str
    metric: str
    split: str
    revision: str
    not_comparable: str
    is_bare: bool

    @classmethod
    def of(cls, task: Task, samples: Sequence[Sample | Unreadable]) -> "TaskFacts":
        """Those of `task` and its samples."""
        return cls(
            name=task.name,
            suite=task.suite,
            domain=task.domain,
            metric=task.metric,
            split=task.split,
            revision=task.revision,
            not_comparable=task.not_comparable,
            is_bare=any(isinstance(sample, Sample) and sample.is_bare for sample in samples),
        )


@dataclass(frozen=True)
class Cell:
    """One policy at one budget on one task; can be sent to another machine."""

    task: TaskFacts
    setting: Setting

    @property
    def slug(self) -> str:
        """The name of the cell's files, different for different cells."""
        parts = (self.task.name, self.setting.title, self.setting.budget)
        plain = "--".join(re.sub(r"[^A-Za-z0-9._@+=-]+", "_", part.replace("/", ".", 1)) for part in parts)
        exact = "--".join(part.replace("/", ".", 1) for part in parts)
        # What was replaced may have been all that told two names apart.
        return plain if plain == exact else f"{plain}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"
