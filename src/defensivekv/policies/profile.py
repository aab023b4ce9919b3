"""Which heads retrieve and which only stream: a file made once for a model (DuoAttention, arXiv 2410.10819)."""

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from defensivekv.errors import InvalidInputError
from defensivekv.policies.allocation import ByProfile

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
