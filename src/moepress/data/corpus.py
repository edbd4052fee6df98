"""The corpus: documents by domain, split into train, calibration and test text without overlap.

    moepress corpus=default                                   # five domains from packages
    moepress corpus=local corpus.path=FILE_OR_FOLDER          # your own .txt, .md, .jsonl
    moepress corpus=hub corpus.id=Salesforce/wikitext ...     # a `datasets` id (presets: wikitext2, c4)

A built corpus is a folder with `documents.parquet` (string columns domain, split, document, text) and `summary.json`.
Whole documents go to one split; equal texts are kept once; a calibration or test document that shares more than
`overlap.max_share` of its word n-grams with the text before it (train, then calibration) is dropped and counted.
With `corpus.verbatim=true` a hub's text stays as it is, in its order, for numbers that are to stand beside a paper's.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from moepress.data import packages, settings, textfiles
from moepress.data.settings import SPLITS

COLUMNS = ("domain", "split", "document", "text")


def build(config: dict, out: Path, cache: Path) -> dict:
    """Write `documents.parquet` and `summary.json` into the folder `out`; return the summary.

    `config` is the resolved group `corpus`; `cache` keeps what is downloaded. Raises ValueError, naming the config key
    or file, for text that is missing, damaged, unreadable, or too little to split.
    """
    settings.check(config)
    table, sources = {"packages": _packages, "local": _local, "hub": _hub}[config["kind"]](config, cache)
    num_read, is_verbatim = len(table), config.get("verbatim", False)
    if not is_verbatim:
        table["text"] = [_clean(text) for text in table["text"]]
        table = table[table["text"] != ""]
        keys = [hashlib.sha256(" ".join(text.split()).encode()).digest() for text in table["text"]]
        table = table[~pd.Series(keys, index=table.index).duplicated()]
    num_duplicates = num_read - len(table)
    table = _in_order(table, config["max_characters"]) if is_verbatim else _split(table, config)
    table, overlap = _drop_overlap(table, **config["overlap"])
    for domain, group in table.groupby("domain", sort=False):
        if config["kind"] == "packages" and domain in config["test_domains"]:
            continue
        missing = [split for split in _wanted(config) if split not in set(group["split"])]
        if missing:
            raise ValueError(
                f"The domain {domain!r} of corpus.kind={config['kind']} has too little text: {len(group)} document(s), "
                f"none left for {', '.join(missing)}. Give more text, change corpus.fractions, or raise "
                "corpus.overlap.max_share."
            )
    if table.empty:
        raise ValueError(f"corpus.kind={config['kind']} gave no text at all: {config}")
    table = table.reset_index(drop=True)
    table.to_parquet(out / "documents.parquet", index=False)
    counts: dict = {}
    for (domain, split), group in table.groupby(["domain", "split"], sort=False):
        characters = int(group["text"].str.len().sum())
        counts.setdefault(domain, {})[split] = {"documents": len(group), "characters": characters}
    summary = {"domains": counts, "sources": sources, "duplicates_removed": num_duplicates, "overlap": overlap}
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return summary


def read(folder: Path, split: str, domains: list[str] | None = None) -> pd.DataFrame:
    """Documents of one split of a built corpus, columns `domain, split, document, text`, in the order they were written.

    Raises ValueError for a split or domain that has no text.
    """
    filters = [("split", "==", split)] + ([("domain", "in", list(domains))] if domains else [])
    table = pd.read_parquet(Path(folder) / "documents.parquet", filters=filters)
    missing = sorted(set(domains or []) - set(table["domain"]))
    if table.empty or missing:
        raise ValueError(f"The corpus {folder} has no {split} text" + (f" of {', '.join(missing)}." if missing else "."))
    return table


def fingerprint(config: dict) -> str | None:
    """Content hash of the local files a config reads, or None where it reads none. Raises ValueError if there are none."""
    if config["kind"] == "local":
        return textfiles.fingerprint(textfiles.find(config["path"]), Path(config["path"]))
    if config["kind"] == "hub" and Path(config["id"] or "").is_dir():
        root = Path(config["id"])
        return textfiles.fingerprint(sorted(file for file in root.rglob("*") if file.is_file()), root)
    return None


def _clean(text: str) -> str:
    text = re.sub(r"[ \t]+$", "", text.replace("\r\n", "\n").replace("\xa0", " "), flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _packages(config: dict, cache: Path) -> tuple[pd.DataFrame, dict]:
    rows, sources = [], {}
    for domain in [*config["domains"], *config["test_domains"]]:
        documents, sources[domain] = packages.read(domain, cache)
        allowed = "test" if domain in config["test_domains"] else " ".join(SPLITS)
        rows += [(domain, allowed, name, text) for name, text in documents]
    return pd.DataFrame(rows, columns=COLUMNS), sources


def _local(config: dict, cache: Path) -> tuple[pd.DataFrame, dict]:
    rows = [(domain, " ".join(SPLITS), name, text) for domain, name, text in textfiles.read(config)]
    return pd.DataFrame(rows, columns=COLUMNS), {"path": config["path"], "sha256": fingerprint(config)}


def _hub(config: dict, cache: Path) -> tuple[pd.DataFrame, dict]:
    """Rows of a `datasets` id, or of a local folder in its form. Our splits that share a hub split divide it."""
    import datasets

    domain = Path(config["id"]).name.lower()
    rows = []
    for hub_split in dict.fromkeys(config["splits"][split] for split in _wanted(config)):
        ours = [split for split in _wanted(config) if config["splits"][split] == hub_split]
        try:
            data = datasets.load_dataset(
                config["id"],
                config["name"],
                split=hub_split,
                data_files=config["data_files"],
                revision=config["revision"],
                streaming=config["streaming"],
            )
        except Exception as error:  # datasets raises its own kinds for each of: no network, no such id, no such split
            raise ValueError(
                f"corpus.id={config['id']} (corpus.name={config['name']}, split {hub_split!r}) could not be loaded: "
                f"{type(error).__name__}: {error}. Check the id, corpus.name and corpus.splits, and the connection."
            ) from error
        names = data.column_names or list(next(iter(data), {}))
        if config["field"] not in names:
            raise ValueError(f"corpus.field={config['field']}: {config['id']} has {', '.join(names)}.")
        texts = _joined((row[config["field"]] for row in data), config["heading"])
        for number, text in enumerate(texts):
            if config["max_documents"] and number >= config["max_documents"]:
                break
            rows.append((domain, " ".join(ours), f"{hub_split}:{number}", text))
    source = {key: config[key] for key in ("id", "name", "revision")}
    return pd.DataFrame(rows, columns=COLUMNS), source | {"sha256": fingerprint(config)}


def _joined(texts, heading: str | None):
    """Rows as they are, or joined by blank lines into documents that begin at a row matching `heading`."""
    if heading is None:
        yield from texts
        return
    document: list[str] = []
    for text in texts:
        if re.match(heading, text) and document:
            yield "\n\n".join(document)
            document = []
        document.append(text)
    yield "\n\n".join(document)


def _wanted(config: dict) -> list[str]:
    """The splits a corpus is to have: all three, unless hub splits are left out."""
    return [split for split in SPLITS if config["kind"] != "hub" or config["splits"].get(split)]


def _in_order(table: pd.DataFrame, max_characters: int | None) -> pd.DataFrame:
    """The first `max_characters` of each split's text, whole documents, as they came; each has one split already."""
    size = table["text"].str.len()
    before = size.groupby(table["split"]).cumsum() - size
    return table[before < (max_characters or np.inf)]


def _split(table: pd.DataFrame, config: dict) -> pd.DataFrame:
    """Give each document one split of those that `split` lists.

    In an order drawn by hash of seed, domain and document, a document goes to test if it still fits into test's share
    of the characters, else to calibration if it fits there, else to train. A domain stops at `max_characters`.
    """
    order = [
        hashlib.sha256(f"{config['seed']}\0{domain}\0{document}".encode()).hexdigest()
        for domain, document in zip(table["domain"], table["document"], strict=True)
    ]
    table = table.assign(order=order, size=table["text"].str.len()).sort_values(["domain", "order"])
    if config["max_characters"]:
        before = table.groupby("domain")["size"].cumsum() - table["size"]
        table = table[before < config["max_characters"]]
    parts = []
    for (_, allowed), group in table.groupby(["domain", "split"], sort=False):
        splits = allowed.split()
        total = sum(config["fractions"][split] for split in splits)
        room = {split: group["size"].sum() * config["fractions"][split] / total for split in reversed(splits[1:])}
        chosen = []
        for size in group["size"]:
            split = next((split for split in room if size <= room[split]), splits[0])
            if split in room:
                room[split] -= size
            chosen.append(split)
        group = group.assign(split=chosen)
        for split in splits[1:]:  # every document larger than a split's share: it gets the smallest one
            if split not in chosen and (rest := group[group["split"] == splits[0]]).shape[0] > 1:
                group.loc[rest["size"].idxmin(), "split"] = split
        parts.append(group)
    return pd.concat(parts)[list(COLUMNS)]


def _drop_overlap(table: pd.DataFrame, words: int, max_share: float | None) -> tuple[pd.DataFrame, dict]:
    """Drop held-out documents that repeat other text; `max_share` None only counts. Returns the table and the counts."""
    vocabulary: dict[str, int] = {}
    grams = {index: _grams(text, words, vocabulary) for index, text in table["text"].items()}
    seen, dropped, result = np.empty(0, np.uint64), [], {}
    for split in SPLITS:
        group = table[table["split"] == split]
        if split != "train":
            shares = pd.Series({index: _share(grams[index], seen) for index in group.index}, dtype=float)
            over = shares.index[shares > max_share] if max_share is not None else shares.index[:0]
            dropped += list(over)
            kept = shares.drop(over)
            per_domain = Counter(group.loc[over, "domain"])
            result[split] = {
                domain: {
                    "dropped": per_domain[domain],
                    "mean_share_kept": float(kept[names.intersection(kept.index)].mean()),
                }
                for domain, names in group.groupby("domain", sort=False).groups.items()
            }
            group = group.drop(over)
        seen = np.sort(np.concatenate([seen, *(grams[index] for index in group.index)]))
    return table.drop(dropped), {"words": words, "max_share": max_share} | result


def _grams(text: str, words: int, vocabulary: dict[str, int]) -> np.ndarray:
    """Hashes of all runs of `words` words of a text, case and punctuation aside, `uint64 [num_grams]`, never empty."""
    ids = [vocabulary.setdefault(word, len(vocabulary) + 1) for word in re.findall(r"\w+", text.lower())]
    ids = np.array(ids or [0], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    ids ^= ids >> np.uint64(29)
    length = min(words, len(ids))
    hashes = np.zeros(len(ids) - length + 1, np.uint64)
    for start in range(length):
        hashes = hashes * np.uint64(0xBF58476D1CE4E5B9) + ids[start : start + len(hashes)]
    return hashes


def _share(grams: np.ndarray, seen: np.ndarray) -> float:
    """The share of `grams` that are in `seen`, which is sorted."""
    if not len(seen):
        return 0.0
    places = np.searchsorted(seen, grams).clip(max=len(seen) - 1)
    return float((seen[places] == grams).mean())
