"""Which heads retrieve and which only stream: a file made once for a model (DuoAttention, arXiv 2410.10819)."""

import csv
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.allocation import ByProfile
from defensivekv.policies.observation import Observation
from defensivekv.policies.scoring import PromptAttention

_TSV = "full_attention_heads.tsv"


@dataclass(frozen=True)
class HeadProfile:
    """heads: heads[evicted layer][kv head], 0 (streams) to 1 (retrieves). num_sinks, num_recent: entries of a
    streaming head. model: that it was made for. method: how.
    """

    heads: tuple[tuple[float, ...], ...]
    num_sinks: int
    num_recent: int
    model: str = ""
    method: str = ""

    def __post_init__(self) -> None:
        if not self.heads or not self.heads[0] or len({len(layer) for layer in self.heads}) != 1:
            raise InvalidInputError("a profile needs as many heads for each layer, and at least one")
        if any(isinstance(count, bool) or not isinstance(count, int) for count in (self.num_sinks, self.num_recent)):
            raise InvalidInputError("a profile's num_sinks and num_recent are whole numbers")
        if not all(math.isfinite(weight) for layer in self.heads for weight in layer):
            raise InvalidInputError("a profile's heads are numbers, and not NaN or infinite")
        if self.num_sinks < 0 or self.num_recent < 1:
            raise InvalidInputError(f"a profile of {self.num_sinks} sinks and {self.num_recent} recent entries is none")

    def allocation(self) -> ByProfile:
        """The split that follows it."""
        return ByProfile(self.heads, self.num_sinks, self.num_recent)

    def save(self, path: str | Path) -> None:
        """Writes JSON."""
        Path(path).write_text(json.dumps({"format": 1, **asdict(self)}, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "HeadProfile":
        """Reads the JSON of `save`, or a folder as DuoAttention publishes them: `full_attention_heads.tsv` and
        `config.json`. Raises InvalidInputError for anything else, naming the file.
        """
        path = Path(path)
        try:
            if path.is_dir():
                return cls._load_published(path)
            fields = json.loads(path.read_text(encoding="utf-8"))
            if fields.pop("format") != 1:
                raise ValueError("its format is not 1")
            heads = tuple(tuple(float(weight) for weight in layer) for layer in fields.pop("heads"))
            return cls(heads=heads, **fields)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInputError(f"{path} is no profile of heads ({error}): see `defensivekv profile`") from error

    @classmethod
    def _load_published(cls, folder: Path) -> "HeadProfile":
        with (folder / _TSV).open(encoding="utf-8", newline="") as file:
            rows = [[min(1.0, max(0.0, float(weight))) for weight in row] for row in csv.reader(file, delimiter="\t")]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return cls(
            tuple(tuple(row) for row in rows if row),
            int(config["sink_size"]),
            int(config["recent_size"]),
            method="DuoAttention's own",
        )


def retrieval_shares(row: Observation, num_sinks: int, num_recent: int) -> Float[Tensor, " h"]:
    """What each head would lose by streaming: the attention that its queries pay, on average, to entries that are
    neither among the first `num_sinks` nor the `num_recent` before them; the most of the group's query heads.

    row: an observation of one row, with the queries of the whole prompt. A measure of this package's own: DuoAttention
    trains a gate for each head instead. Raises InvalidInputError where no query has anything to lose.
    """
    t, span = row.num_tokens, num_sinks + num_recent
    if t <= span:
        raise InvalidInputError(f"a text of {t} tokens shows nothing of heads that hold {span}: give a longer one")
    lost = torch.zeros(row.num_heads, row.num_groups, device=row.keys.device)
    first = 0
    places = torch.arange(t, device=row.keys.device)
    for part in PromptAttention()(row, 1):
        queries = torch.arange(first, first + part.importance.shape[2], device=row.keys.device)
        missed = (places >= num_sinks) & (places <= queries[:, None] - num_recent)
        lost += (part.importance * missed).sum((2, 3))
        first += len(queries)
    return lost.amax(1) / (t - span)
