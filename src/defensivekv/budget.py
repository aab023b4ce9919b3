"""What a budget means: one accounting for shares, counts and bytes.

Every form comes down to a share of the prompt's entries, an exact fraction, so that `0.29` of 100
tokens is 29 entries and not the 28 of binary rounding. Knows no tensor and no model.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, Self

from defensivekv.errors import BudgetError

POSITION_BYTES = 4
"""Bytes that a stored entry takes beside its key and value: its position, an int32."""

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_FORMS = 'a share in (0, 1] such as 0.2, entries per head such as 1024, bytes such as "64MiB", or "auto:0.99"'
_ADAPTIVE_FORM = '"auto:MASS" or "auto:MASS,min=SHARE,max=SHARE", as in "auto:0.99,min=0.05,max=0.5"'


@dataclass(frozen=True)
class Budget:
    """What one sequence may keep of its prompt, over all evicted layers and heads.

    kind: "share" of the prompt's entries; "entries" per head on average; "bytes" per sequence, keys, values and
        positions counted; or "adaptive": as many entries as hold a share of the importance.
    amount: the share, the count, the bytes, or the share of the importance.
    least, most: between which shares of the prompt's entries an adaptive budget stays.
    """

    kind: Literal["share", "entries", "bytes", "adaptive"]
    amount: Fraction
    least: Fraction = Fraction(0)
    most: Fraction = Fraction(1)

    @classmethod
    def parse(cls, value: "float | int | str | Fraction | Budget") -> Self:
        """Reads a budget: `0.2`, `"20%"`, `1024`, `"64MiB"`, `"auto:0.99,max=0.5"`. The integer 1 is the share 1.0.

        Raises BudgetError for zero, negative, infinite or non-numeric budgets, and shares above one.
        """
        if isinstance(value, Budget):
            return cls(value.kind, value.amount, value.least, value.most)
        if isinstance(value, str):
            return cls._parse_text(value)
        if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
            raise BudgetError(f"budget {value!r} is not a number: give {_FORMS}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BudgetError(f"budget {value!r} is not finite: give {_FORMS}")
        if value <= 0:
            raise BudgetError(f"budget {value} keeps nothing: give {_FORMS}")
        if isinstance(value, int) and value > 1:
            return cls("entries", Fraction(value))
        share = Fraction(value).limit_denominator(10**9)
        if share > 1:
            raise BudgetError(
                f"budget {value} is above one: a share is at most 1.0; "
                f"for {float(value):g} entries per head give the integer {round(value)}"
            )
        if share == 0:
            raise BudgetError(f"budget {value} keeps nothing: give {_FORMS}")
        return cls("share", share)

    @classmethod
    def _parse_text(cls, text: str) -> Self:
        if text.strip().lower().startswith("auto"):
            return cls._parse_adaptive(text)
        if ratio := re.fullmatch(r"\s*([0-9]+)/0*([1-9][0-9]*)\s*", text):
            return cls.parse(Fraction(int(ratio[1]), int(ratio[2])))
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]{1,2})?)\s*(%|entries per head|[A-Za-z]*)\s*", text)
        if match is None:
            raise BudgetError(f"budget {text!r} is not understood: give {_FORMS}")
        number, unit = match.groups()
        if unit == "entries per head":
            if not number.isdigit() or int(number) < 1:
                raise BudgetError(f"budget {text!r} is not a whole number of entries: give {_FORMS}")
            return cls("entries", Fraction(number))
        if unit == "%":
            return cls.parse(Fraction(number) / 100)
        if not unit:
            return cls.parse(int(number) if number.isdigit() else float(number))
        if unit.upper() not in _UNITS:
            raise BudgetError(f"budget {text!r} has an unknown unit {unit!r}: use one of B, KB, MB, GB, KiB, MiB, GiB")
        amount = math.floor(Fraction(number) * _UNITS[unit.upper()])
        if amount <= 0:
            raise BudgetError(f"budget {text!r} keeps nothing: give {_FORMS}")
        return cls("bytes", Fraction(amount))

    @classmethod
    def _parse_adaptive(cls, text: str) -> Self:
        match = re.fullmatch(r"\s*auto:\s*([^,\s]+)\s*((?:,\s*(?:min|max)=[^,\s]+\s*)*)", text, flags=re.IGNORECASE)
        limits = [] if match is None else re.findall(r"(min|max)=([^,\s]+)", match[2].lower())
        if match is None or len(dict(limits)) < len(limits):
            raise BudgetError(f"budget {text!r} is not understood: give {_ADAPTIVE_FORM}")
        given = {name: cls.parse(part) for name, part in (("mass", match[1]), *limits) if (name, part) != ("min", "0")}
        if any(part.kind != "share" for part in given.values()):
            raise BudgetError(f"budget {text!r} must have shares in (0, 1]: give {_ADAPTIVE_FORM}")
        mass, most = given["mass"].amount, given["max"].amount if "max" in given else Fraction(1)
        least = given["min"].amount if "min" in given else Fraction(0)
        if least > most:
            raise BudgetError(f"budget {text!r} has a min above its max: give {_ADAPTIVE_FORM}")
        return cls("adaptive", mass, least, most)

    @property
    def is_adaptive(self) -> bool:
        """Whether the prompt itself decides how much is kept of it."""
        return self.kind == "adaptive"

    @property
    def is_full(self) -> bool:
        """Whether everything is kept, whatever the prompt."""
        return self.kind == "share" and self.amount == 1

    def share(self, num_tokens: int, bytes_per_token: int) -> Fraction:
        """The share of the prompt's entries to keep, at most 1; of an adaptive budget, the most that it may come to.

        num_tokens: tokens of the prompt. bytes_per_token: what one token's entries take, over all heads
        of all layers that share this budget (see `entry_bytes`).
        """
        if self.kind == "share":
            return self.amount
        if self.kind == "adaptive":
            return self.most
        unit = 1 if self.kind == "entries" else bytes_per_token
        return min(Fraction(1), self.amount / (num_tokens * unit))

    def __str__(self) -> str:
        """As `parse` reads it back; no two budgets look the same."""
        if self.kind == "share":
            return _share_text(self.amount)
        if self.kind == "adaptive":
            least = f",min={_share_text(self.least)}" if self.least else ""
            most = f",max={_share_text(self.most)}" if self.most < 1 else ""
            return f"auto:{_share_text(self.amount)}{least}{most}"
        if self.kind == "entries":
            return f"{int(self.amount)} entries per head"
        for_people = format_bytes(int(self.amount))
        return for_people if Budget.parse(for_people) == self else f"{int(self.amount)} B"


def _share_text(share: Fraction) -> str:
    text = "1" if share == 1 else repr(float(share))
    exact = Fraction(float(text)).limit_denominator(10**9) == share
    return text if exact else f"{share.numerator}/{share.denominator}"


def entry_bytes(key_size: int, value_size: int, itemsize: int) -> int:
    """Bytes of one stored entry: its key, its value and its position.

    key_size, value_size: elements of a head. itemsize: bytes of an element.
    """
    return (key_size + value_size) * itemsize + POSITION_BYTES


def format_bytes(count: int) -> str:
    """`count` bytes for people, in binary units."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
