"""The suite `quick`: tasks on which small models show a signal, made from the corpus's own test text. Imports no torch.

Each item continues a context: `{domain, context, choices, label}`. The wordings lie in tasks/*.yaml with their versions; what
is drawn depends on the text and on nothing else, so all variants of a model answer the same items.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np

from moepress.data import corpus
from moepress.evaluation.suites import NUM_CHOICES, definition

Window = tuple[str, str, str]
"""A document, a context in it, and how the document goes on."""


def build(folder: Path, names: list[str], domains: list[str] | None) -> tuple[dict[str, list[dict]], list[str]]:
    """The items of tasks from a corpus folder's test split, and the tasks that it has too little text for.

    domains: None for all that have test text. Raises ValueError where no task can be made.
    """
    documents = corpus.read(folder, "test", domains)
    texts = {domain: group["text"].tolist() for domain, group in documents.groupby("domain")}
    items = {name: _items(name, texts) for name in names}
    if not any(items.values()):
        raise ValueError(
            f"evaluation.tasks={names}: the test text of {sorted(texts)} is too short for a single item; give more text, or "
            "evaluation.tasks=none"
        )
    return {name: found for name, found in items.items() if found}, [name for name, found in items.items() if not found]


def use(manager, items: dict[str, list[dict]]) -> None:
    """Let a lm-eval `TaskManager` that has read `suites.DEFINITIONS` take these items."""
    import datasets

    for name, found in items.items():
        manager.task_index[name].cfg["custom_dataset"] = lambda found=found, **_: {"test": datasets.Dataset.from_list(found)}
        manager.task_index[name].yaml_path = None


def write(items: dict[str, list[dict]], path: Path) -> None:
    """One JSON line an item."""
    lines = [json.dumps({"task": name, **item}, ensure_ascii=False) for name, found in items.items() for item in found]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _items(name: str, texts: dict[str, list[str]]) -> list[dict]:
    """At most as many as the task's YAML says, evenly over the domains, in an order that mixes them."""
    sizes = definition(name)["metadata"]
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    windows = {domain: found for domain in sorted(texts) if (found := _windows(texts[domain], sizes, rng))}
    make: Callable = {"word_swap": _swap, "continuation_across": _across, "continuation_within": _within}[name]
    found = {
        domain: [item for number in range(len(own)) if (item := make(domain, number, windows, rng))]
        for domain, own in windows.items()
    }
    ranks = sorted((rank, domain) for domain, own in found.items() for rank in range(len(own)))
    drawn = [found[domain][rank] for rank, domain in ranks[: sizes["num_items"]]]
    return [drawn[place] for place in rng.permutation(len(drawn))]


def _windows(texts: list[str], sizes: dict, rng: np.random.Generator) -> list[Window]:
    """Places of the documents, or of all of them joined where each is too short, in random order, no two overlapping."""
    for documents in (texts, ["\n\n".join(texts)]):
        found = [window for number, text in enumerate(documents) for window in _cut(str(number), text, sizes)]
        if len(found) >= NUM_CHOICES:
            break
    return [found[place] for place in rng.permutation(len(found))[: sizes["num_items"]]]


def _cut(document: str, text: str, sizes: dict) -> list[Window]:
    length = sizes["context"] + sizes["continuation"]
    found = []
    for start in range(0, len(text) - length + 1, length):
        start = _word_end(text, start) if start else 0
        middle = _word_end(text, start + sizes["context"])
        context, continuation = text[start:middle].lstrip(), text[middle : _word_end(text, start + length)]
        if context and continuation.strip():
            found.append((document, context, continuation))
    return found


def _word_end(text: str, place: int) -> int:
    """The last end of a word at or before `place`; `place` itself in a script without spaces."""
    ends = [found.end() for found in re.finditer(r"\S(?=\s)", text[max(0, place - 40) : place + 1])]
    return max(0, place - 40) + ends[-1] if ends else place


def _item(domain: str, context: str, right: str, wrong: list[str], rng: np.random.Generator) -> dict:
    label = int(rng.integers(len(wrong) + 1))
    return {"domain": domain, "context": context, "choices": [*wrong[:label], right, *wrong[label:]], "label": label}


def _swap(domain: str, number: int, windows: dict[str, list[Window]], rng: np.random.Generator) -> dict | None:
    """The continuation, and it with two adjacent words that differ changed for one another."""
    _, context, right = windows[domain][number]
    parts = re.split(r"(\s+)", right)  # words at even places, but for an empty first one, with the spaces between them
    places = [i for i in range(0, len(parts) - 2, 2) if parts[i] and parts[i + 2] and parts[i] != parts[i + 2]]
    if not places:
        return None
    place = places[int(rng.integers(len(places)))]
    parts[place], parts[place + 2] = parts[place + 2], parts[place]
    return _item(domain, context, right, ["".join(parts)], rng)


def _across(domain: str, number: int, windows: dict[str, list[Window]], rng: np.random.Generator) -> dict | None:
    """The continuation among those of other domains, as many different ones as there are."""
    others = [other for other in windows if other != domain]
    if not others:
        return None
    order = [others[place] for place in rng.permutation(len(others))]
    drawn = [order[place % len(order)] for place in range(NUM_CHOICES - 1)]
    _, context, right = windows[domain][number]
    return _different(domain, context, right, [windows[other] for other in drawn], rng)


def _within(domain: str, number: int, windows: dict[str, list[Window]], rng: np.random.Generator) -> dict | None:
    """The continuation among those from other documents of the domain, or from elsewhere in its only one."""
    document, context, right = windows[domain][number]
    elsewhere = [window for window in windows[domain] if window[0] != document]
    if len(elsewhere) < NUM_CHOICES - 1:
        elsewhere = [window for place, window in enumerate(windows[domain]) if place != number]
    return _different(domain, context, right, [elsewhere] * (NUM_CHOICES - 1), rng)


def _different(domain: str, context: str, right: str, sources: list[list[Window]], rng: np.random.Generator) -> dict | None:
    """An item with a wrong continuation out of each source, all of them different; None where there are too few."""
    wrong: list[str] = []
    for source in sources:
        left = [text for _, _, text in source if text != right and text not in wrong]
        if not left:
            return None
        wrong.append(left[int(rng.integers(len(left)))])
    return _item(domain, context, right, wrong, rng)
