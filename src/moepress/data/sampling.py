"""From documents to token windows: the calibration sample and the blocks that perplexity is measured on."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd

from moepress.data import corpus


def load_tokenizer(folder: Path):
    """The fast tokenizer of a model folder; ValueError where there is none."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder}: no tokenizer.json in it; save the model's fast tokenizer there")
    return Tokenizer.from_file(str(path))


def end_of_document(folder: Path, tokenizer) -> int:
    """The token that is put between documents: the model's eos, as its configuration, else its tokenizer, names it."""
    for name in ("config.json", "generation_config.json"):
        eos = _read(folder / name).get("eos_token_id")
        eos = eos[0] if isinstance(eos, list) and eos else eos
        if eos is not None:
            break
    else:
        token = _read(folder / "tokenizer_config.json").get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        name, eos = "config.json", token and tokenizer.token_to_id(token)
    if not isinstance(eos, int) or tokenizer.id_to_token(eos) is None:
        raise ValueError(f"{folder / name}: eos_token_id={eos!r} is no token of tokenizer.json; give this model's tokenizer")
    return eos


def check_tokenizer(folder: Path, tokenizer) -> None:
    """ValueError for a tokenizer whose tokens the model has no embedding for."""
    rows = _read(folder / "config.json").get("vocab_size")
    last = max(tokenizer.get_vocab().values())
    if rows is not None and last >= rows:
        raise ValueError(
            f"{folder}: tokenizer.json has the token {last} ({tokenizer.id_to_token(last)!r}), config.json says "
            f"vocab_size={rows}: it is another model's tokenizer"
        )


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def token_blocks(
    tokenizer, separator: int | str, texts: list[str], seq_len: int, stride: int | None = None
) -> tuple[np.ndarray, float]:
    """Windows `[blocks, seq_len]` of the texts joined by the separator, each beginning `stride` tokens (None: `seq_len`) behind
    the one before it; and the bytes of UTF-8 that a token stands for, on average.

    separator: a token, or text: then all is encoded as one text, with what the tokenizer puts around it, as the GPTQ papers do.
    """
    num_bytes = sum(len(text.encode()) for text in texts)
    if isinstance(separator, str):
        parts = [tokenizer.encode(separator.join(texts)).ids]
        num_bytes += len(separator.encode()) * (len(texts) - 1)
    else:
        parts = [(*encoded.ids, separator) for encoded in tokenizer.encode_batch(texts, add_special_tokens=False)]
    stream = np.concatenate([np.asarray(part, np.int64) for part in parts] or [np.empty(0, np.int64)])
    if len(stream) < seq_len:
        return np.empty((0, seq_len), np.int64), num_bytes / max(1, len(stream))
    windows = np.lib.stride_tricks.sliding_window_view(stream, seq_len)[:: stride or seq_len]
    return np.ascontiguousarray(windows), num_bytes / len(stream)


def domain_blocks(
    folder: Path,
    model: Path,
    split: str,
    seq_len: int,
    domains: list[str] | None,
    key: str,
    separator: str | None = None,
    stride: int | None = None,
) -> dict[str, tuple[np.ndarray, float]]:
    """Domain -> `token_blocks` of a corpus folder's split in the model's tokens.

    domains: None for all that have text in the split. key: the configuration group to name in errors. separator: None for the
    model's end of document.
    """
    tokenizer = load_tokenizer(model)
    check_tokenizer(model, tokenizer)
    between = end_of_document(model, tokenizer) if separator is None else separator
    documents = corpus.read(folder, split)
    domains = known_domains(documents, split, domains, key)
    texts = documents.groupby("domain")["text"]
    return {domain: token_blocks(tokenizer, between, texts.get_group(domain).tolist(), seq_len, stride) for domain in domains}


def known_domains(documents: pd.DataFrame, split: str, domains: list[str] | None, key: str) -> list[str]:
    """The given domains, or all that a split's documents have; ValueError for one that they have not."""
    present = list(dict.fromkeys(documents["domain"]))
    unknown = sorted(set(domains or ()) - set(present))
    if unknown:
        raise ValueError(f"{key}.domains={domains}: the corpus has no {split} text of {unknown}; it has {present}")
    return domains or present


def even_shares(total: int, parts: int) -> list[int]:
    """`total` in whole parts that differ by one at the most."""
    return [total * (index + 1) // parts - total * index // parts for index in range(parts)]


def spread(count: int, wanted: int) -> np.ndarray:
    """`wanted` indices spread evenly over `range(count)`, all of it where that is fewer."""
    wanted = min(wanted, count)
    return (np.arange(wanted) * count) // wanted


def available(blocks_by_domain: dict[str, np.ndarray], num_sequences: int) -> int:
    """The most sequences, up to `num_sequences`, that can be drawn in equal parts of every domain."""
    counts = [len(blocks) for blocks in blocks_by_domain.values()]
    while any(share > count for share, count in zip(even_shares(num_sequences, len(counts)), counts, strict=True)):
        num_sequences -= 1
    return num_sequences


def sample_calibration(blocks_by_domain: dict[str, np.ndarray], num_sequences: int, seed: int) -> tuple[np.ndarray, list]:
    """`(token_ids [num_sequences, seq_len], [(domain, block), ...])`: equal parts of every domain, drawn without repetition.

    Raises ValueError saying how much there is where the text does not suffice.
    """
    drawn, origin = [], []
    shares = even_shares(num_sequences, len(blocks_by_domain))
    for (domain, blocks), wanted in zip(blocks_by_domain.items(), shares, strict=True):
        if len(blocks) < wanted:
            windows = ", ".join(f"{name}: {len(b)}" for name, b in blocks_by_domain.items())
            seq_len = blocks.shape[1]
            raise ValueError(
                f"calibration.num_sequences={num_sequences} with calibration.seq_len={seq_len} needs {wanted} windows of "
                f"{domain!r}, the calibration split has {len(blocks)} (windows by domain: {windows}); "
                "ask for fewer or shorter sequences, choose calibration.domains, or give more text"
            )
        name_seed = int.from_bytes(hashlib.sha256(domain.encode()).digest()[:4], "little")
        order = np.random.default_rng([seed, name_seed]).permutation(len(blocks))[:wanted]
        drawn.append(blocks[order])
        origin += [(domain, int(block)) for block in order]
    return np.concatenate(drawn), origin
