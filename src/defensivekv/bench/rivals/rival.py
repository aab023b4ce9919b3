"""What every rival can do."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol


@dataclass(frozen=True)
class Filling:
    """What a cache is filled with.

    tokens: of each of `batch` sequences. share: of their entries that is kept; None: all. room: tokens that will be
    generated.
    """

    tokens: int
    batch: int
    share: Fraction | None
    room: int
    seed: int

    @property
    def kept(self) -> int:
        """Entries that are read of each head, on average."""
        return self.tokens if self.share is None else int(self.tokens * self.share)


@dataclass(frozen=True)
class Prompt:
    """A prompt that is read, and what is kept of it. policy: of `defensivekv.policies()`, for ours."""

    tokens: int
    share: Fraction | None
    policy: str
    seed: int


class Stepper(Protocol):
    """A filled cache that tokens are generated from.

    held_bytes: of the cache, after the filling. note: how it was filled; empty where with random entries.
    """

    held_bytes: int
    note: str

    def step(self) -> float:
        """One token of each sequence; the seconds that took."""

    def close(self) -> None:
        """Gives the memory back."""


class Rival(Protocol):
    """A way of keeping a cache.

    family: as the plan has it. name: the same, or that of a variant. takes_budget: whether it evicts. fills, reads:
    whether its cache can be filled, and whether it can read a prompt.
    """

    family: str
    name: str
    takes_budget: bool
    fills: bool
    reads: bool

    def missing(self, batch: int = 1) -> str | None:
        """Why it is not measured here with so many sequences, and what to do about it; None: it is."""

    def start(self) -> None:
        """Loads what is needed, where that has not been done. Raises RivalError."""

    def needs(self, filling: Filling) -> int:
        """Bytes that it takes at most for its cache, and for weights of its own; an estimate."""

    def read_bytes(self, held: int) -> int | None:
        """Bytes that one step reads at least: weights, and `held` bytes of cache. None: unknown."""

    def fill(self, filling: Filling) -> Stepper:
        """A cache filled so. Raises RivalError where that cannot be done."""

    def read(self, prompt: Prompt) -> float:
        """Seconds that it takes to read the prompt, until its last logits are there."""

    def describe(self) -> dict[str, object]:
        """Versions, precision, and whatever else a result should say of it."""
