"""How much a sequence, and a whole batch, may hold at any moment."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor

from defensivekv.budget import POSITION_BYTES, Budget
from defensivekv.errors import BudgetError, InvalidInputError
from defensivekv.integrations.transformers.checks import check_positive
from defensivekv.policies import Policy
from defensivekv.policies.steps import NUM_SINKS, Stepper, check_evicts_in_steps

FACT_BYTES = 4
_MOST_INTERVAL = 128
_INTERVALS = 8
"""A bound is at least this many intervals, unless the interval is given: what is not yet evicted stays a small part."""


@dataclass(frozen=True)
class LayerSizes:
    """Of the evicted layers, which are alike.

    num_layers, num_heads: evicted layers and the key-value heads of one. token_bytes: of one token's key and value in
    one head. query_bytes: of one token's query in all heads of one layer.
    """

    num_layers: int
    num_heads: int
    token_bytes: int
    query_bytes: int

    @property
    def entries_bytes(self) -> int:
        """Of one token's entries, with their positions."""
        return self.num_layers * self.num_heads * (self.token_bytes + POSITION_BYTES)


@dataclass(frozen=True)
class Bound:
    """What may be held, of prompt and generated tokens, between any two forward passes.

    max_entries: of each sequence, per head on average; None: no such bound. max_bytes: of each sequence's evicted
    layers: keys, values, positions, facts, the room for recent tokens and the queries that are kept for the next step.
    max_batch_bytes: the same of all rows together. interval: tokens between two steps of eviction; None: 128, or an
    eighth of the bound where that is less.
    """

    stepper: Stepper
    max_entries: int | None = None
    max_bytes: int | None = None
    max_batch_bytes: int | None = None
    given_interval: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_entries", "given_interval"):
            value = getattr(self, name)
            if value is not None:
                check_positive(name.removeprefix("given_"), value)
        if self.max_entries is not None:
            self._check(self.max_entries - self.interval_for(self.max_entries), f"max_entries={self.max_entries}")

    @property
    def _staying(self) -> int:
        policy = self.stepper.policy
        return policy.num_sinks + self.stepper.num_protected

    def interval_for(self, entries: int) -> int:
        """Tokens between two steps, of a sequence that may hold so many entries per head."""
        if self.given_interval is not None:
            return self.given_interval
        return max(1, min(_MOST_INTERVAL, entries // _INTERVALS))

    def limits(self, sizes: LayerSizes, num_rows: int) -> "Limits":
        """What the bound comes to. Raises BudgetError where it is below what always stays."""
        entry = sizes.token_bytes + POSITION_BYTES + FACT_BYTES * self.stepper.num_facts
        most = [] if self.max_entries is None else [self.max_entries]
        of_row = [] if self.max_bytes is None else [self.max_bytes]
        if self.max_batch_bytes is not None:
            of_row.append(self.max_batch_bytes // num_rows)
        most += [size // (sizes.num_layers * sizes.num_heads * entry) for size in of_row]
        interval = self.interval_for(min(most))
        queries = self.stepper.num_queries(interval) * sizes.query_bytes
        fixed = sizes.num_layers * (interval * sizes.num_heads * sizes.token_bytes + queries)

        def prefix(size: int) -> int:
            return (size - fixed) // (sizes.num_layers * sizes.num_heads * entry)

        each = [] if self.max_entries is None else [self.max_entries - interval]
        if self.max_bytes is not None:
            each.append(prefix(self.max_bytes))
            self._check(each[-1], f"a bound of {self.max_bytes} bytes for each sequence")
        together = None
        if self.max_batch_bytes is not None:
            even = prefix(self.max_batch_bytes // num_rows)
            self._check(even, f"a bound of {self.max_batch_bytes} bytes for {num_rows} sequences")
            together = even * num_rows
        return Limits(min(each) if each else None, together, interval)

    def check_stored(self, lengths: list[list[list[int]]], tail: int, *, is_pinned: bool) -> None:
        """Raises BudgetError where what is held already is more than the bound on entries allows.

        lengths: of the prefix, [layer][row][head]. tail: tokens after it. is_pinned: whether the prefix stays.
        """
        allocation, entries = self.stepper.policy.allocation, self.max_entries
        if entries is None or not lengths:
            return
        rows = [[layer[row] for layer in lengths] for row in range(len(lengths[0]))]
        if allocation.spans_layers:
            most = max(sum(map(sum, row)) / sum(map(len, row)) for row in rows)
        elif "levels" in allocation.needs:
            most = max(sum(heads) / len(heads) for row in rows for heads in row)
        else:
            most = max(length for row in rows for heads in row for length in heads)
        room = entries - self.interval_for(entries) - (self.stepper.num_protected if is_pinned else 0)
        if most > room or tail > entries - most:
            raise BudgetError(
                f"the cache holds {ceil(most)} entries per head of its prompt and {tail} tokens after it, and a bound "
                f"of {entries} has room for {max(0, room)} beside the latest tokens: give a larger bound, or compress "
                "the prompt further"
            )

    def _check(self, prefix: int, named: str) -> None:
        if prefix < self._staying:
            window = self.stepper.num_protected
            smaller = "window_size or interval" if self.stepper.policy.num_window else "interval"
            raise BudgetError(
                f"{named} leaves {max(0, prefix)} entries per head beside the tokens since the last eviction, fewer "
                f"than the {self.stepper.policy.num_sinks} first tokens and the {window} latest that stay: give a "
                f"larger bound, or a smaller {smaller}"
            )

    def __str__(self) -> str:
        parts = []
        if self.max_entries is not None:
            parts.append(f"{self.max_entries} entries per head")
        if self.max_bytes is not None:
            parts.append(f"{Budget.parse(f'{self.max_bytes}B')} a sequence")
        if self.max_batch_bytes is not None:
            parts.append(f"{Budget.parse(f'{self.max_batch_bytes}B')} a batch")
        return ", ".join(parts)


@dataclass(frozen=True)
class Limits:
    """A bound, for layers and a batch of certain sizes.

    each: entries per head that a row's prefix may hold on average; None: no such limit. together: of all rows.
    interval: tokens that come before the next step.
    """

    each: int | None
    together: int | None
    interval: int

    def of_rows(self, num_tokens: Sequence[int]) -> list[Fraction]:
        """What each row's prefix may hold, entries per head. num_tokens: of the rows' texts; 0: it holds nothing.

        What a batch may hold is shared out evenly; what a short row does not need, the others get.
        """
        wanted = [tokens if self.each is None else min(self.each, tokens) for tokens in num_tokens]
        if self.together is None or sum(wanted) <= self.together:
            return [Fraction(count) for count in wanted]
        left, rows = self.together, sorted(range(len(wanted)), key=wanted.__getitem__)
        given = [Fraction(0)] * len(wanted)
        for number, row in enumerate(rows):
            given[row] = Fraction(min(wanted[row], floor(Fraction(left, len(rows) - number))))
            left -= int(given[row])
        return given


def parse_bytes(name: str, value: int | str | Budget | None) -> int | None:
    """A number of bytes, from an integer or a text such as "256MiB"."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    budget = Budget.parse(value) if isinstance(value, str | Budget) else None
    if budget is None or budget.kind != "bytes":
        raise BudgetError(f'{name} {value!r} is no number of bytes: give for example "256MiB"')
    return int(budget.amount)


def bound_of(
    policy: Policy, max_entries: int | None, max_batch_bytes: int | None, interval: int | None
) -> Bound | None:
    """The bound on a cache; None where there is none. Raises BudgetError or InvalidInputError for one that cannot be
    kept.
    """
    budget = policy.budget
    max_bytes = int(budget.amount) if budget.kind == "bytes" else None
    if max_entries is None and max_bytes is None and max_batch_bytes is None:
        if interval is not None:
            raise InvalidInputError("interval is for caches with a bound: give max_entries, max_batch_bytes, or bytes")
        return None
    if policy.name == "full":
        raise InvalidInputError("policy 'full' keeps everything, and a bound does not: name the policy that evicts")
    check_evicts_in_steps(policy)
    _check_within(policy, max_entries)
    # A budget in bytes is the bound itself.
    of_prompt = Budget.parse(1.0) if budget.kind == "bytes" else budget
    bounded = replace(policy, num_sinks=max(policy.num_sinks, NUM_SINKS), budget=of_prompt)
    return Bound(Stepper(bounded), max_entries, max_bytes, max_batch_bytes, interval)


def _check_within(policy: Policy, max_entries: int | None) -> None:
    """Raises BudgetError where the prompt alone would be given more than the sequence may ever hold."""
    budget = policy.budget
    if max_entries is not None and budget.kind == "entries" and budget.amount > max_entries:
        raise BudgetError(
            f"budget {budget} is more than max_entries={max_entries}, which bounds the prompt too: lower the budget, "
            "or leave it out"
        )
