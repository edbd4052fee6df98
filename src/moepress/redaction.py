"""Secrets kept out of what leaves this machine: values of the environment that are one, and texts that look like one."""

import os
import re
from collections.abc import Mapping

HIDDEN = "[hidden]"
SECRET_NAME = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
SHORTEST = 8
"""Characters of a value that can be a secret: a shorter one (`false`, `1`) occurs in ordinary text."""
SECRET_SHAPE = re.compile(
    r"hf_[A-Za-z0-9]{20,}"
    r"|wandb_v\d_\w{20,}"
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|(?<=://)[^\s/@]+(?=@)"  # user and password of a URL
)


def secrets(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of the variables whose names say that they are secret, the longest first."""
    found = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= SHORTEST}
    return sorted(found, key=len, reverse=True)


def without_secrets(value, found: list[str] | None = None):
    """The same value (text, numbers, lists and dicts of them) with every secret in its texts, keys included, hidden.

    found: `secrets()`, by default this process's.
    """
    found = secrets() if found is None else found
    if isinstance(value, str):
        for secret in found:
            value = value.replace(secret, HIDDEN)
        return SECRET_SHAPE.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {without_secrets(name, found): without_secrets(item, found) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, found) for item in value]
    return value
