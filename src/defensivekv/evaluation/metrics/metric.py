"""What every metric tells of itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A scorer of one answer.

    name: as in `METRICS`. version: raised whenever a score changes. function: of the prediction, the references and
    the choices (every class an answer may name; empty but for `classification`); gives 0 to 1. It never raises for
    what a model may say, and an empty prediction scores 0. description: one line. source: the published scorer that
    it agrees with.
    """

    name: str
    version: int
    function: Callable[[str, Sequence[str], Sequence[str]], float]
    description: str
    source: str
