"""Sizes as people write them, read and written."""

import re

from defensivekv.budget import Budget
from defensivekv.errors import BudgetError, InvalidInputError


def parse_tokens(text: str) -> int:
    """Tokens: "4096", "4k" or "0.5k". Raises InvalidInputError."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kK]?)\s*", text)
    count = 0 if match is None else round(float(match[1]) * (1024 if match[2] else 1))
    if count < 1:
        raise InvalidInputError(f"length {text!r} is no number of tokens: give for example 4096 or 32k")
    return count


def format_tokens(count: int) -> str:
    """Tokens for people: "32k" where it is that exactly."""
    return f"{count // 1024}k" if count % 1024 == 0 else f"{count:,}"


def parse_memory(text: str) -> int:
    """Bytes: "16GiB". Raises InvalidInputError."""
    try:
        budget = Budget.parse(text)
    except BudgetError:
        budget = None
    if budget is None or budget.kind != "bytes":
        raise InvalidInputError(f"memory {text!r} is not understood: give for example 16GiB or 900MB")
    return int(budget.amount)


def parse_share(text: str) -> Budget:
    """A budget that does not depend on the prompt's text. Raises InvalidInputError or BudgetError."""
    budget = Budget.parse(text)
    if budget.kind not in ("share", "entries"):
        raise InvalidInputError(
            f"budget {text!r} cannot be compared here: give shares (0.2) or entries per head (1024)"
        )
    return budget
