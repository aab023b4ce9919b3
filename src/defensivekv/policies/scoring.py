"""Importance: what one observed query says of one entry, where queries are looked at."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from defensivekv.errors import InvalidInputError
from defensivekv.policies.observation import Observation
from defensivekv.types import Importance

_ALL = slice(None)
_PART_ELEMENTS = 2**19
"""Importances that a scorer of many queries gives at a time, so that they stay in a CPU's cache."""

_SIGNS = 16
"""Channels of a key that its random score hangs on."""


@dataclass(frozen=True)
class Part:
    """What some queries say of some entries.

    importance: (h, g, w, m) float32, of the entries from `start` on.
    """

    importance: Importance
    start: int = 0


@runtime_checkable
class Scorer(Protocol):
    """Importances of one row's entries.

    Takes an observation of one row (batch size 1, no pads) and the window's size; gives them in parts, which have
    different queries or different entries.
    """

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]: ...

    @property
    def description(self) -> str:
        """A few words for `defensivekv policies`."""
        ...

    @property
    def sees(self) -> str:
        """Which queries it wants: "nothing", the last "window", the whole "prompt", or those of a "reconstruction"."""
        ...

    @property
    def has_window(self) -> bool:
        """Whether the last tokens are left unscored, because they stay."""
        ...

    @property
    def gives(self) -> frozenset[str]:
        """What other parts may build on.

        "queries": several importances of an entry, one for each query or query head. "masses": they are attention
        weights or as these, not negative. "one part": all queries come together. "levels": they tell one head from
        another, so that heads can compete. "steps": it can be asked again as the text grows, of what is left.
        "memory": what it said before counts on, beside what it says of later queries; without, the latest counts alone.
        """
        ...


@dataclass(frozen=True)
class WindowAttention:
    """Attention weights of the observation window (SnapKV, arXiv 2404.14469, section 4).

    `A = softmax(q·kᵀ·scaling)` for the last `window_size` queries under the causal mask, the softmax in
    float32, rounded to the model's dtype as the model's own attention would be; the window's own columns
    are cut off. Raises InvalidInputError for fewer queries than the window has.

    remembers: whether earlier windows count on as the text grows.
    """

    remembers: bool = True
    description = "attention of the last prompt tokens"
    sees = "window"
    has_window = True

    @property
    def gives(self) -> frozenset[str]:
        """See `Scorer`."""
        given = frozenset({"queries", "masses", "one part", "levels", "steps"})
        return given | {"memory"} if self.remembers else given

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        t, w = row.num_tokens, min(window_size, row.queries.shape[2])
        scored = t - min(window_size, t)
        if t - w > scored and row.layout is None:
            raise InvalidInputError(f"{w} queries do not fill the observation window of {window_size}: pass as many")
        yield Part(attention_weights(row, row.queries[0, :, -w:], row.keys[0], first=t - w, of=slice(scored)))


@dataclass(frozen=True)
class PromptAttention:
    """Attention weights of all of the prompt's queries (H2O, arXiv 2306.14048, section 4). Quadratic in the prompt.

    by_viewers: an entry's weights are divided by the share of the queries that could see it, as in kvpress, which
    takes the advantage away that early entries have.
    """

    by_viewers: bool = False
    description = "attention of all prompt tokens"
    sees = "prompt"
    has_window = False

    @property
    def gives(self) -> frozenset[str]:
        """See `Scorer`."""
        given = frozenset({"queries", "masses", "levels"})
        return given if self.by_viewers else given | {"steps", "memory"}

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        t, x = row.num_tokens, row.queries.shape[2]
        if x < t and row.layout is None:
            raise InvalidInputError(f"{x} queries of {t} tokens: pass those of the whole prompt")
        step = max(1, _PART_ELEMENTS // (row.queries.shape[1] * t))
        for start in range(0, x, step):
            queries = row.queries[0, :, start : start + step]
            weights = attention_weights(row, queries, row.keys[0], first=t - x + start)
            if self.by_viewers:
                weights = weights * (t / torch.arange(t, 0, -1, device=weights.device))
            yield Part(weights)


@dataclass(frozen=True)
class Reconstruction:
    """Attention weights of a second reading, in which the model is made to repeat the prompt (KVzip, arXiv 2505.23416).

    The prompt is repeated chunk by chunk; the queries of the repetition are observed on the chunk's own entries, with
    the first `num_sinks` entries and the repetition itself in the softmax. Reading takes about twice the time. Raises
    InvalidInputError without a repetition: only `compress` and `prefill` make one.

    chunk_size: prompt tokens that are repeated at a time. num_sinks: entries that take part in every softmax.
    """

    chunk_size: int = 2048
    num_sinks: int = 4
    description = "attention while repeating the prompt"
    sees = "reconstruction"
    has_window = False
    gives = frozenset({"queries", "masses", "levels"})

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise InvalidInputError(f"chunk_size {self.chunk_size} must be at least 1")

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        if row.repeats is None:
            raise InvalidInputError("no repetition of the prompt was observed: read it with compress() or prefill()")
        start, stop = row.repeats
        x, q = row.queries.shape[2], row.queries.shape[1]
        sinks = min(self.num_sinks, start)
        keys = torch.cat((row.keys[0, :, :sinks], row.keys[0, :, start:stop], row.keys[0, :, -x:]), dim=1)
        step = max(1, _PART_ELEMENTS // (q * keys.shape[1]))
        for first in range(0, x, step):
            queries = row.queries[0, :, first : first + step]
            of = slice(sinks, sinks + stop - start)
            yield Part(attention_weights(row, queries, keys, first=of.stop + first, of=of), start)


def attention_weights(
    row: Observation, queries: Float[Tensor, "q x d"], keys: Float[Tensor, "h m d"], *, first: int, of: slice = _ALL
) -> Importance:
    """`softmax(q·kᵀ·scaling)` under the causal mask, (h, g, x, m) float32, rounded to the keys' dtype.

    first: place among the keys of the first query's own. of: the keys whose weights are wanted, which all take part.
    Softcap, sinks and scaling are those of `row`.
    """
    q, x, d = queries.shape
    h, m, _ = keys.shape
    # Scaled first: products of large keys can exceed float16 where the model's own logits do not.
    grouped = (queries * row.softmax_scaling).reshape(h, q // h * x, d)
    # Of one head as a plain product: a batched one copies keys that are strided.
    products = (grouped[0] @ keys[0].mT)[None] if h == 1 else grouped @ keys.mT
    logits = products.view(h, q // h, x, m)
    if row.softcap is not None or row.sinks is not None:
        logits = logits.float()
    if row.softcap is not None:
        logits = torch.tanh(logits / row.softcap) * row.softcap
    future = torch.ones(x, m - first, dtype=torch.bool, device=logits.device).triu(1)
    logits[..., first:].masked_fill_(future, float("-inf"))
    if row.layout is not None and row.layout.absent is not None:
        logits.masked_fill_(row.layout.absent[:, None, None], float("-inf"))
    return _softmax(logits, row.sinks)[..., of].to(keys.dtype).float()


def _softmax(logits: Float[Tensor, "h g x m"], sinks: Float[Tensor, " q"] | None) -> Float[Tensor, "h g x m"]:
    """In float32, whatever the dtype, in which the weights come out too."""
    if sinks is None:
        return logits.softmax(-1)
    h, g, x, _ = logits.shape
    sink = sinks.float().view(h, g, 1, 1).expand(h, g, x, 1)
    return torch.cat((logits, sink), dim=-1).softmax(-1)[..., :-1]


@dataclass(frozen=True)
class ExpectedAttention:
    """Attention that future queries can be expected to pay (Expected Attention, arXiv 2510.00636).

    The prompt's queries before rotation are taken as normally distributed, `q ~ N(mu, C)`, and turned by the mean
    rotation of the next `num_future` positions; then `E[exp(q·k·s)] = exp(mu·k·s + k·C·k·s²/2)`, normalised over the
    entries after the first `num_sinks`. Raises InvalidInputError without the model's rotation.
    """

    num_future: int = 512
    num_sinks: int = 4
    description = "attention expected of queries to come"
    sees = "prompt"
    has_window = False
    gives = frozenset({"masses", "levels"})

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        t, h = row.num_tokens, row.num_heads
        if row.rotary is None:
            raise InvalidInputError(
                "expected attention needs the model's rotary embedding, over positions in one dimension: use another "
                "policy for this model, or give Observation(rotary=...)"
            )
        if row.queries.shape[2] < t:
            raise InvalidInputError(f"{row.queries.shape[2]} queries of {t} tokens: pass those of the whole prompt")
        sinks = min(self.num_sinks, t - 1)
        positions = row.rotary.positions
        queries = row.rotary.unrotate(row.queries[0, :, sinks:], positions[sinks:]).float()
        mean = queries.mean(1, keepdim=True)
        centred = queries - mean
        covariance = centred.mT @ centred / centred.shape[1]
        future = positions[-1] + 1 + torch.arange(self.num_future, device=positions.device)
        mean = row.rotary.rotate_mean(mean, future)
        covariance = row.rotary.rotate_mean(row.rotary.rotate_mean(covariance, future).mT, future)
        keys = row.keys[0, :, sinks:].float().repeat_interleave(row.num_groups, dim=0)
        scale = row.softmax_scaling
        logits = (mean @ keys.mT).squeeze(1) * scale + ((keys @ covariance) * keys).sum(-1) * scale**2 / 2
        expected = logits.softmax(-1).view(h, row.num_groups, 1, t - sinks)
        yield Part(torch.nn.functional.pad(expected, (sinks, 0)))


@dataclass(frozen=True)
class Recency:
    """Later tokens score higher (StreamingLLM, arXiv 2309.17453)."""

    description = "last tokens"
    sees = "nothing"
    has_window = False
    gives = frozenset({"steps"})

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        t = row.num_tokens
        # Slots are in the order of the text.
        scores = torch.arange(t, dtype=torch.float32, device=row.keys.device) / t
        yield Part(scores.expand(row.num_heads, 1, 1, t))


@dataclass(frozen=True)
class UniformRandom:
    """Independent random scores: the floor of every comparison.

    An entry's score is drawn by its token's place and its key, so that a run repeats, that layers and prompts differ,
    and that an entry keeps its score while others come and go. Of the key, by its signs, which a padded batch does not
    round otherwise than a row alone.
    """

    seed: int = 0
    description = "chance"
    sees = "nothing"
    has_window = True
    gives = frozenset({"levels", "steps"})

    def __call__(self, row: Observation, window_size: int) -> Iterator[Part]:
        n = row.num_tokens - min(window_size, row.num_tokens)
        h = row.num_heads
        signs = row.keys[0, :, :n, :_SIGNS] > 0
        places = None if row.layout is None else row.layout.first_positions(n)
        if places is None:
            places = torch.arange(n, device=row.keys.device).expand(h, n)
        generator = torch.Generator().manual_seed(self.seed)
        # 64-bit integers wrap around, which is what a hash wants.
        factors = torch.randint(-(2**62), 2**62, (signs.shape[-1],), generator=generator).to(row.keys.device)
        mixed = (signs * factors).sum(-1) + _mix(places.long() + 1)
        uniform = (_mix(mixed) & (2**24 - 1)).float() / 2**24
        yield Part(uniform[:, None, None])


def _mix(bits: Int[Tensor, "h n"]) -> Int[Tensor, "h n"]:
    """The finalizer of splitmix64 (Steele, Lea and Flood, 2014): every bit of the result hangs on every bit."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        bits = (bits ^ ((bits >> shift) & (2 ** (64 - shift) - 1))) * factor
    return bits ^ ((bits >> 31) & (2**33 - 1))
