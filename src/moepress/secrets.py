"""Secrets of this machine, which must never end in what is written: results are published, logs are sent around.

A configuration that holds one is refused, by a narrow rule (`found_in`), for a refusal in error stops work; what leaves this
machine has hidden in it whatever might be one, by a wide rule (`without_secrets`).
"""

import os
import re
from collections.abc import Iterator, Mapping

SECRET = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|CREDENTIAL|PRIVATE_KEY", re.IGNORECASE)
"""Names of variables whose values are secret."""
PERHAPS = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
"""Names of variables whose values might be."""
SHORTEST = 8
"""Characters of a value that can be a secret: a shorter one (`false`, `1`) occurs in ordinary text."""
LOGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s@]*:[^/\s@]+@", re.IGNORECASE)
SHAPE = re.compile(
    r"hf_[A-Za-z0-9]{20,}"
    r"|wandb_v\d_\w{20,}"
    r"|gh[a-z]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|sk-[\w-]{20,}"
    r"|AKIA[0-9A-Z]{16}"
    r"|(?<=://)[^\s/@]+(?=@)"  # user and password of a URL
)
HIDDEN = "[hidden]"


def named(pattern: re.Pattern, environment: Mapping[str, str] = os.environ) -> Iterator[tuple[str, str]]:
    """The variables of the environment with such a name, and their values, those that are long enough."""
    return ((name, value) for name, value in environment.items() if pattern.search(name) and len(value) >= SHORTEST)


def found_in(text: str) -> str | None:
    """What secret a text holds, in words that do not give it away; None without one."""
    for name, value in named(SECRET):
        if value in text and not os.path.exists(value):
            return f"the value of ${name}"
    return "an address with a password" if LOGIN.search(text) else None


def values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Values of the environment that might be secret, the longest first."""
    return sorted({value for _, value in named(PERHAPS, environment)}, key=len, reverse=True)


def without_secrets(value, found: list[str] | None = None):
    """The same value (text, numbers, lists and dicts of them) with every secret in its texts, keys included, hidden.

    found: `values()`, by default this process's.
    """
    found = values() if found is None else found
    if isinstance(value, str):
        for secret in found:
            value = value.replace(secret, HIDDEN)
        return SHAPE.sub(HIDDEN, value)
    if isinstance(value, Mapping):
        return {without_secrets(name, found): without_secrets(item, found) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item, found) for item in value]
    return value
