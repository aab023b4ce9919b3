"""What is to be measured, as a user writes it down."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from defensivekv.bench.dtypes import DTYPES
from defensivekv.bench.shapes import TINY, shape_config
from defensivekv.bench.sizes import parse_memory, parse_share, parse_tokens
from defensivekv.budget import Budget
from defensivekv.errors import InvalidInputError
from defensivekv.policies import policy as make_policy

What = Literal["prefill", "decode", "throughput", "memory", "capacity"]
ALL_WHAT: tuple[What, ...] = get_args(What)

OURS = "defensivekv"
RIVALS = ("compiled", "stock", "static", "static-compiled", "flat-copy", "kvpress", "llama.cpp", "openvino")
"""What this package is measured beside, its own compiled steps included; it itself always takes part."""

EXTERNAL = ("kvpress", "llama.cpp", "openvino")
"""Those that run in a Python of their own."""

MOST_STEPS = 4
"""Tokens that a rival generates in one turn at most."""

WARMUP = 2
"""Turns that are not counted."""

QUICK: dict[str, Any] = {
    "shape": TINY,
    "dtype": "float32",
    "threads": 1,
    "lengths": ("512", "1k"),
    "batch_sizes": (1, 2),
    "repeats": 2,
    "memory": "1GiB",
}


class BenchPlan(BaseModel):
    """What is measured, of what, beside what.

    model: folder or hub name; None, without a shape: the packaged model. shape: of `SHAPES`, with random weights.
    layers: that the model is shortened to; None: all. dtype: of `DTYPES`, or "auto", the model's own and bfloat16 for
    shapes. device: as torch names it. threads: of the CPU; None: torch's default. lengths: tokens stored. budgets:
    shares or entries per head. policies: names of `defensivekv.policies()`, measured in prefill and memory. memory:
    bytes, for the capacity; None: what the device has. verify: allocate what the capacity says. pythons: of rivals
    with an environment of their own. repeats: turns; a third of them for prefills.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    shape: str | None = None
    layers: Annotated[int, Field(ge=1)] | None = None
    dtype: str = "auto"
    device: str = "cpu"
    threads: Annotated[int, Field(ge=1)] | None = None
    what: Annotated[tuple[What, ...], Field(min_length=1)] = ALL_WHAT
    lengths: tuple[str, ...] = ("4k", "8k", "32k")
    budgets: Annotated[tuple[str, ...], Field(min_length=1)] = ("0.2",)
    policies: Annotated[tuple[str, ...], Field(min_length=1)] = ("layer-defensivekv",)
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (1, 2, 4)
    rivals: tuple[str, ...] = ("all",)
    memory: str | None = None
    verify: bool = False
    pythons: dict[str, str] = {}
    seed: int = 0
    repeats: Annotated[int, Field(ge=1)] = 9

    @property
    def tokens(self) -> tuple[int, ...]:
        """The lengths, ascending."""
        return tuple(sorted({parse_tokens(text) for text in self.lengths}))

    @property
    def shares(self) -> tuple[Budget, ...]:
        """The budgets, read."""
        return tuple(parse_share(text) for text in self.budgets)

    @property
    def memory_bytes(self) -> int | None:
        """The memory, read."""
        return None if self.memory is None else parse_memory(self.memory)

    @property
    def rival_names(self) -> tuple[str, ...]:
        """The rivals, "all" and "none" spelt out."""
        named = dict.fromkeys(name for given in self.rivals for name in (RIVALS if given == "all" else (given,)))
        return tuple(name for name in named if name != "none")

    @property
    def prefill_repeats(self) -> int:
        """Turns of prefills, which take long."""
        return max(1, self.repeats // 3)

    @property
    def room(self) -> int:
        """Tokens that each rival generates at most in one cell."""
        return (self.repeats + WARMUP) * MOST_STEPS + 4

    def check(self) -> None:
        """Raises a typed error for what cannot be measured, without loading anything."""
        if self.model is not None and self.shape is not None:
            raise InvalidInputError("a model and a shape are named: give one of them")
        if self.shape is not None:
            shape_config(self.shape)
        if self.dtype not in ("auto", *DTYPES):
            raise InvalidInputError(f"unknown dtype {self.dtype!r}: use auto, {', '.join(DTYPES)}")
        for name in self.rival_names:
            if name not in RIVALS:
                raise InvalidInputError(f"unknown rival {name!r}: known are {', '.join(RIVALS)}, all and none")
        for name in self.pythons:
            if name not in EXTERNAL:
                raise InvalidInputError(f"--python {name}=...: only {', '.join(EXTERNAL)} run in a Python of their own")
        _ = self.tokens, self.memory_bytes
        for name in self.policies:
            for share in self.shares:
                make_policy(name, share)


def make_plan(fields: Mapping[str, Any], *, quick: bool = False) -> BenchPlan:
    """The checked plan of these fields; quick: tiny sizes in place of what is not named. Raises typed errors."""
    if quick:
        fields = QUICK | ({"shape": None} if fields.get("model") is not None else {}) | dict(fields)
    try:
        plan = BenchPlan.model_validate(dict(fields))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'plan'}: {each['msg']}" for each in error.errors()]
        raise InvalidInputError(f"the benchmark: {'; '.join(problems)}") from None
    plan.check()
    return plan
