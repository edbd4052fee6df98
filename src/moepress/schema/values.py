"""Checks that values of all groups pass, and the texts of their errors."""

import math
import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

from moepress import secrets

WIDTHS = (1, 2, 3, 4, 8)
"""Bit widths that the packed format knows."""
MOST_LAYERS, MOST_EXPERTS = 1000, 10_000
"""Beyond any model there is: a number above them is a mistake, and counting up to it would take for ever."""
LONGEST = 4096
"""Characters of a text value: what a path may have."""
FREE_TEXT = ("evaluation.separator", "corpus.heading")
"""Where a line end is a value."""


def check(ok: bool, key: str, value, expected: str) -> None:
    """Raise a ValueError that names the key, its value and what would do."""
    if not ok:
        raise ValueError(f"{key}={value!r}: {expected}")


def check_value(key: str, value) -> None:
    """Raise a ValueError that names the key for what no key takes: NaN, endless or endlessly large numbers, text that no file
    system or terminal takes, and secrets, for a configuration is written into results that people publish."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            check_value(f"{key}.{name}" if isinstance(value, dict) else key, inner)
    elif isinstance(value, float):
        check(math.isfinite(value), key, value, "a finite number")
    elif isinstance(value, int):
        check(abs(value) < 2**63, key, value, "a number of at most 63 bits")
    elif isinstance(value, str):
        if secret := secrets.found_in(value):
            raise ValueError(f"{key} holds {secret}, which would be written into the results; leave it in the environment")
        check(len(value) <= LONGEST, key, f"{value[:40]}…", f"at most {LONGEST} characters")
        allowed = "\n\t\r" if key in FREE_TEXT else ""
        odd = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs") and c not in allowed), None)
        check(odd is None, key, value, f"text without the character {odd!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean NAME?)` for what a message says is not there, or nothing."""
    found = get_close_matches(word[:100], [str(name) for name in known], n=1)
    return f" (did you mean {found[0]}?)" if found and found[0] != word else ""


def check_seed(key: str, value) -> None:
    ok = type(value) is int and 0 <= value < 2**32
    check(ok, key, value, "a whole number, not negative and below 2^32")


def parse_bytes(text: str | int, key: str = "allocation.budget") -> int:
    """Bytes in `'12GiB'`, `'800MB'`, `'1e9'` or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?(?:e\d\d?)?)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE | re.ASCII)
    if not match or len(str(text)) > 40:
        raise ValueError(f"{key}={text!r}: give a size as 12GiB, 800MB or a number of bytes")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0))
