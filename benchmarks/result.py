"""What a benchmark found: settings, raw samples, figures, and the targets that they are held against."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from defensivekv.bench.timing import Samples, medians


@dataclass(frozen=True)
class Target:
    """A figure and the bound that it should keep."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None

    @property
    def is_met(self) -> bool:
        """Whether the value keeps its bounds."""
        low = self.at_least is None or self.value >= self.at_least
        return low and (self.at_most is None or self.value <= self.at_most)

    def __str__(self) -> str:
        bound = f"at least {self.at_least:g}" if self.at_least is not None else f"at most {self.at_most:g}"
        return f"{'met   ' if self.is_met else 'MISSED'}  {self.name}: {self.value:.3g} (target: {bound})"


@dataclass(frozen=True)
class Result:
    """One benchmark's outcome.

    settings: what was run. samples: seconds of each repetition, by rival. figures: what follows from the
    medians. targets: empty where the settings are not those that the targets were set for.
    """

    name: str
    settings: dict[str, Any]
    samples: Samples
    figures: dict[str, float] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON: seconds with six significant digits."""
        return {
            "name": self.name,
            "settings": self.settings,
            "medians_s": {name: _rounded(value) for name, value in medians(self.samples).items()},
            "samples_s": {name: [_rounded(value) for value in times] for name, times in self.samples.items()},
            "figures": {name: _rounded(value) for name, value in self.figures.items()},
            "targets": [
                {
                    "name": target.name,
                    "value": _rounded(target.value),
                    "at_least": target.at_least,
                    "at_most": target.at_most,
                    "is_met": target.is_met,
                }
                for target in self.targets
            ],
        }

    def __str__(self) -> str:
        lines = [self.name, "  " + ", ".join(f"{key} {value}" for key, value in self.settings.items())]
        width = max(len(name) for name in (*self.samples, *self.figures))
        for name, value in medians(self.samples).items():
            times = self.samples[name]
            spread = f"{_milliseconds(min(times))} to {_milliseconds(max(times))}"
            lines.append(f"  {name:{width}}  {_milliseconds(value):>10} ms   ({spread}, {len(times)} runs)")
        lines += [f"  {name:{width}}  {value:10.4g}" for name, value in self.figures.items()]
        lines += [f"  {target}" for target in self.targets]
        return "\n".join(lines)


def write(path: Path, header: dict[str, Any], results: Sequence[Result]) -> None:
    """One JSON file: the header's keys, then the results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = header | {"results": [result.as_dict() for result in results]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3f}" if value < 0.1 else f"{value * 1e3:.0f}"
