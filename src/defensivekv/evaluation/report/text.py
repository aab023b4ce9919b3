"""Text of models and datasets, made fit to be shown: nothing in it moves a cursor, a sheet or a page."""

import re
import unicodedata

_KEPT = "\n\t"
_DIRECTIONS = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def plain(text: str) -> str:
    r"""`text` with control characters, marks of writing direction and lone surrogates spelt out, such as `\x1b`.

    Newlines and tabs stay. The result can be encoded as UTF-8.
    """
    return "".join(map(_spelt, text)) if not text.isascii() or not text.isprintable() else text


def _spelt(character: str) -> str:
    is_plain = character in _KEPT or unicodedata.category(character) not in ("Cc", "Cs")
    if is_plain and character not in _DIRECTIONS:
        return character
    return f"\\x{ord(character):02x}" if ord(character) < 256 else f"\\u{ord(character):04x}"


def one_line(text: str, limit: int = 80) -> str:
    """`text` fit to be shown, on one line of at most `limit` characters."""
    line = " ".join(plain(text[: 4 * limit + 64]).split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shortened(text: str, limit: int) -> str:
    """`text` fit to be shown, lines kept; says how many characters were left out beyond `limit`."""
    if len(text) <= limit:
        return plain(text)
    return f"{plain(text[:limit])} … ({len(text) - limit} more characters)"


def slug(text: str) -> str:
    """A part of a file name: lower-case ASCII letters, digits, dots between them, and dashes."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:40] or "x"


def sheet_text(text: str) -> str:
    """`text` for a field of a CSV file, which no spreadsheet takes for a formula."""
    line = one_line(text, 500)
    return f"'{line}" if line.startswith(_FORMULA) else line


def markdown_text(text: str) -> str:
    """`text` for a field of a markdown table."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&])", r"\\\1", one_line(text, 500))
