"""Random reads of a ragged layer, and what dense attention in float32 says of them."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from defensivekv.attention import Backend, attend, causal_mask, masked_attention
from defensivekv.cache import PrefixView, RaggedPrefix

_EVICTED = 1e4
"""Stands where entries were evicted: reading one shows."""


@dataclass(frozen=True, eq=False)
class Case:
    """Arguments of `attend`, and the same entries laid out densely.

    keys, values: (b, h, n + t, d or v) in float32: what the prefix was made of, then the tail. there: (b, h, n).
    """

    queries: Tensor
    view: PrefixView | None
    tail_keys: Tensor
    tail_values: Tensor
    visible: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    keys: Tensor
    values: Tensor
    there: Tensor

    def attend(self, backend: Backend) -> Tensor:
        return attend(
            self.queries,
            self.view,
            self.tail_keys,
            self.tail_values,
            visible=self.visible,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=self.sinks,
            backend=backend,
        )

    def expected(self) -> Tensor:
        """Dense attention in float32, with a mask for every query head."""
        b, q, x, _ = self.queries.shape
        group = q // self.keys.shape[1]
        tail = causal_mask(x, self.tail_keys.shape[2], torch.device("cpu")) if self.visible is None else self.visible
        prefix = self.there.repeat_interleave(group, 1)[:, :, None].expand(-1, -1, x, -1)
        visible = torch.cat((prefix, tail.expand(b, q, -1, -1)), dim=-1)
        keys, values = self.keys.repeat_interleave(group, 1), self.values.repeat_interleave(group, 1)
        return masked_attention(self.queries, keys, values, visible, self.scaling, self.softcap, self.sinks)

    def tolerance(self) -> float:
        """What rounding to the dtype may change: the logits, by which the weights change, and the weighted values."""
        seen = torch.cat((self.there, self.there.new_ones(*self.there.shape[:2], self.tail_keys.shape[2])), dim=-1)
        if not bool(seen.any()):
            return 0.0
        largest_key = self.keys.norm(dim=-1)[seen].max()
        logit = float(self.queries.float().norm(dim=-1).max() * largest_key) * abs(self.scaling)
        value = float(self.values.abs().amax(-1)[seen].max())
        return torch.finfo(self.queries.dtype).eps * (1 + logit) * value


@dataclass(frozen=True)
class Sizes:
    """A case in numbers: hypothesis draws and shrinks these; the tensors follow from the seed.

    lengths: what each head of each prefix row keeps of `prompt` tokens. rows: the prefix row of each batch row.
    mask: whether it differs between batch rows and between query heads; None: causal. hides: whether some
    queries see nothing of the tail.
    """

    seed: int
    groups: int
    key_size: int
    value_size: int
    num_queries: int
    tail: int
    prompt: int
    lengths: list[list[int]]
    rows: list[int]
    mask: tuple[bool, bool] | None
    scaling: float
    softcap: float | None
    with_sinks: bool
    hides: bool = False

    def case(self, dtype: torch.dtype) -> Case:
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        b, h, n, x, t = len(self.rows), len(self.lengths[0]), self.prompt, self.num_queries, self.tail
        q = h * self.groups
        order = torch.rand(len(self.lengths), h, n, generator=generator).argsort(-1)
        kept = order < torch.tensor(self.lengths).unsqueeze(-1)
        dense = [
            normal(*kept.shape, size).masked_fill(~kept.unsqueeze(-1), _EVICTED)
            for size in (self.key_size, self.value_size)
        ]
        view = PrefixView(RaggedPrefix.gather(dense[0], dense[1], kept), tuple(self.rows)) if n else None
        tail_keys, tail_values = normal(b, h, t, self.key_size), normal(b, h, t, self.value_size)
        visible = None
        if self.mask is not None:
            shape = (b if self.mask[0] else 1, q if self.mask[1] else 1, x)
            visible = torch.rand(*shape, t, generator=generator) < 0.6
            visible[..., :1] |= ~visible.any(-1, keepdim=True)
            if self.hides:
                visible &= torch.rand(*shape, 1, generator=generator) < 0.7
        return Case(
            queries=normal(b, q, x, self.key_size),
            view=view,
            tail_keys=tail_keys,
            tail_values=tail_values,
            visible=visible,
            scaling=self.scaling,
            softcap=self.softcap,
            sinks=normal(q) if self.with_sinks else None,
            keys=torch.cat((dense[0][self.rows], tail_keys), dim=2).float(),
            values=torch.cat((dense[1][self.rows], tail_values), dim=2).float(),
            there=kept[self.rows],
        )


@st.composite
def sizes(draw: st.DrawFn, *, flash: bool = False, native: bool = False, hiding: bool = True) -> Sizes:
    """Odd lengths, empty heads, giant heads among tiny ones, rows repeated, reordered and left out.

    flash, native: only what that kernel can serve: no softcap, keys and values of one size; sizes that are multiples
    of 16. hiding: in some cases there are queries that see nothing of the tail.
    """
    d = draw(st.sampled_from([16, 48, 64, 80, 96, 128, 256] if native else [1, 3, 8, 16, 64, 80, 96]))
    x = draw(st.sampled_from([1, 1, 2, 5]))
    heads, sources = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    n = draw(st.sampled_from([0, 1, 9, 130, 300, 700]))
    length = st.sampled_from([0, 1, 2, n // 2, n]).map(lambda count: min(count, n))
    every_row = st.just(list(range(sources)))
    return Sizes(
        seed=draw(st.integers(0, 2**31 - 1)),
        groups=draw(st.integers(1, 8)),
        key_size=d,
        value_size=d if flash else draw(st.sampled_from([d, 16, 112] if native else [d, 1, 5, 24])),
        num_queries=x,
        tail=x + draw(st.sampled_from([0, 1, 7, 40])),
        prompt=n,
        lengths=[[draw(length) for _ in range(heads)] for _ in range(sources)],
        rows=draw(every_row | st.lists(st.integers(0, sources - 1), min_size=1, max_size=4)),
        mask=draw(st.none() | st.tuples(st.booleans(), st.booleans())),
        scaling=draw(st.sampled_from([d**-0.5, 0.2, 1.0])),
        softcap=None if flash else draw(st.sampled_from([None, None, 2.0, 30.0])),
        with_sinks=draw(st.booleans()),
        hides=hiding and draw(st.booleans()),
    )
