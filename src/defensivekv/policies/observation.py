"""What a layer shows of a prompt. Knows no model: the tensors may come from anywhere."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.layout import Layout
from defensivekv.types import Keys, OutputProjection, Queries, Values


@runtime_checkable
class Rotary(Protocol):
    """The rotation of queries and keys by their positions, as the model makes it.

    positions: (t,) of one row's tokens.
    """

    @property
    def positions(self) -> Int[Tensor, " t"]:
        """See above."""
        ...

    def unrotate(self, vectors: Float[Tensor, "q n d"], positions: Int[Tensor, " n"]) -> Float[Tensor, "q n d"]:
        """The vectors as they were before they were rotated by their positions."""
        ...

    def rotate_mean(self, vectors: Float[Tensor, "q n d"], positions: Int[Tensor, " p"]) -> Float[Tensor, "q n d"]:
        """Every vector under the mean of the rotations by `positions`."""
        ...

    def row(self, row: int, valid: Bool[Tensor, " t"] | None) -> "Rotary":
        """That of one row's valid tokens."""
        ...


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One layer's view of a batch of prompts.

    queries: (b, q, w, d) the last `w` valid queries of each row, after RoPE and normalisation. A policy
        looks at as many of them as its scorer wants: none, the last `window_size`, or those of all tokens.
    keys: (b, h, t, d), after RoPE.  values: (b, h, t, v).
    output_projection: (hidden, q * v), the weight that maps the heads' outputs to the residual stream;
        needed by value weighting only.
    scaling: factor on `q·k` before the softmax; `d**-0.5` unless given.
    valid: (b, t) False at pads; None: no pads.
    softcap: logits become `softcap * tanh(logits / softcap)`; None: they stay.
    sinks: (q,) learned attention-sink logits that take part in the softmax; None: none.
    rotary: for scorers that ask about positions to come; None: not known.
    repeats: (start, stop) where the queries are those of a second reading, which repeats these tokens of the prompt;
        keys and values then hold the `w` tokens of the repetition after those of the prompt. None: a prompt.
    layout: where the entries of the only row stand, if entries were evicted before; the last `w` of them are the
        queries' own. None: keys are those of the prompt's tokens, one after the other.
    """

    queries: Queries
    keys: Keys
    values: Values
    output_projection: OutputProjection | None = None
    scaling: float | None = None
    valid: Bool[Tensor, "b t"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " q"] | None = None
    rotary: Rotary | None = None
    repeats: tuple[int, int] | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        for name in ("queries", "keys", "values"):
            if getattr(self, name).dim() != 4:
                raise InvalidInputError(f"{name} must have 4 dimensions (batch, heads, positions, size)")
        b, q, w, d = self.queries.shape
        if self.keys.shape[0] != b or self.keys.shape[-1] != d:
            raise InvalidInputError(
                f"queries {tuple(self.queries.shape)} and keys {tuple(self.keys.shape)} differ in batch or head size"
            )
        if self.keys.shape[:3] != self.values.shape[:3]:
            raise InvalidInputError(
                f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} differ in batch, heads or tokens"
            )
        if self.num_heads == 0 or q % self.num_heads:
            raise InvalidInputError(f"{q} query heads are not a multiple of {self.num_heads} key-value heads")
        if self.num_tokens == 0:
            raise InvalidInputError("a prompt of no tokens cannot be observed: pass at least one token")
        if not 1 <= w <= self.num_tokens:
            raise InvalidInputError(f"queries of {w} positions: pass those of the last 1 to {self.num_tokens} tokens")
        if self.output_projection is not None and self.output_projection.shape[-1] != q * self.values.shape[-1]:
            raise InvalidInputError(
                f"output_projection {tuple(self.output_projection.shape)} must be "
                f"(hidden, {q * self.values.shape[-1]}): {q} query heads of size {self.values.shape[-1]}"
            )
        if self.valid is not None and self.valid.shape != (b, self.num_tokens):
            raise InvalidInputError(f"valid {tuple(self.valid.shape)} must be (batch, tokens) = {(b, self.num_tokens)}")
        if self.repeats is not None and (
            self.valid is not None or not 0 <= self.repeats[0] < self.repeats[1] <= self.num_tokens - w
        ):
            raise InvalidInputError(f"repeats {self.repeats} must lie in a prompt without pads before {w} queries")
        if self.layout is not None and (b > 1 or self.valid is not None or self.layout.num_slots != self.num_tokens):
            raise InvalidInputError("a layout is that of one row without pads, of as many slots as there are keys")

    @property
    def num_heads(self) -> int:
        """Key-value heads."""
        return int(self.keys.shape[1])

    @property
    def num_groups(self) -> int:
        """Query heads per key-value head."""
        return int(self.queries.shape[1]) // self.num_heads

    @property
    def num_tokens(self) -> int:
        """Tokens of a row, pads included."""
        return int(self.keys.shape[2])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of a row's prompt: all, less those that repeat it."""
        return self.num_tokens - (0 if self.repeats is None else int(self.queries.shape[2]))

    @property
    def softmax_scaling(self) -> float:
        """`scaling`, or its default."""
        return float(self.queries.shape[-1]) ** -0.5 if self.scaling is None else self.scaling

    @property
    def row_layout(self) -> Layout:
        """Where the entries of the only row stand."""
        return Layout(self.num_prompt_tokens, self.num_prompt_tokens) if self.layout is None else self.layout

    def rows(self) -> Iterator["Observation"]:
        """Each row alone, without its pads and their queries. Views, but for rows with pads in their middle."""
        for row in range(self.keys.shape[0]):
            alone = replace(
                self,
                queries=self.queries[row : row + 1],
                keys=self.keys[row : row + 1],
                values=self.values[row : row + 1],
                valid=None,
                rotary=None if self.rotary is None else self.rotary.row(row, self._valid_of(row)),
            )
            if self.valid is None or bool(self.valid[row].all()):
                yield alone
                continue
            index = self.valid[row].nonzero().squeeze(-1)
            if len(index) == 0:
                raise InvalidInputError(f"row {row} of the batch holds pads only: pass at least one token per row")
            start, stop = int(index[0]), int(index[-1]) + 1
            where: slice | Tensor = slice(start, stop) if stop - start == len(index) else index
            yield replace(
                alone,
                queries=alone.queries[:, :, -len(index) :],
                keys=alone.keys[:, :, where],
                values=alone.values[:, :, where],
            )

    def _valid_of(self, row: int) -> Bool[Tensor, " t"] | None:
        return None if self.valid is None else self.valid[row]

    def heads(self, start: int, stop: int) -> "Observation":
        """The key-value heads `start` to `stop` with their query heads, as views. No output projection."""
        g, layout = self.num_groups, self.layout
        if layout is not None and layout.positions is not None:
            layout = replace(layout, positions=layout.positions[start:stop])
        return replace(
            self,
            layout=layout,
            queries=self.queries[:, start * g : stop * g],
            keys=self.keys[:, start:stop],
            values=self.values[:, start:stop],
            output_projection=None,
            sinks=None if self.sinks is None else self.sinks[start * g : stop * g],
        )

    def check_finite(self) -> None:
        """Raises InvalidInputError when keys, values or queries hold NaN or infinity (one pass, no copy)."""
        for name, tensor in (("keys", self.keys), ("values", self.values), ("queries", self.queries)):
            if not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                raise InvalidInputError(
                    f"{name} hold NaN or infinity: the forward pass went wrong before the cache; "
                    "check the weights and the dtype (float16 overflows where bfloat16 does not)"
                )
