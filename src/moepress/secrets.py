"""Secrets of this machine, which must never end in what is written: results are published, logs are sent around."""

import os
import re

NAMES = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
SHORTEST = 8
"""Characters of a value that is a secret: `TOKENIZERS_PARALLELISM=false` is none."""
LOGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]+@", re.IGNORECASE)


def found_in(text: str) -> str | None:
    """What secret a text holds, in words that do not give it away; None without one."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= SHORTEST and value in text and not os.path.exists(value):
            return f"the value of ${name}"
    return "an address with a password" if LOGIN.search(text) else None
