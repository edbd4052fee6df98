"""A person's own text: .txt, .md and .jsonl files of a file or folder.

textfiles.read({"path": "notes/", "field": "text", ...})  ->  [(domain, document, text), ...]
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

SUFFIXES = (".txt", ".md", ".jsonl")


def find(path: str | None) -> list[Path]:
    """The text files of a file or folder, sorted. Raises ValueError if there is none."""
    if not path:
        raise ValueError("corpus.path is not set: give a .txt, .md or .jsonl file, or a folder of them.")
    root = Path(path)
    if not root.exists():
        raise ValueError(f"corpus.path={path} does not exist: give a .txt, .md or .jsonl file, or a folder of them.")
    files = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not files:
        raise ValueError(f"corpus.path={path} holds no text: it takes {', '.join(SUFFIXES)} files.")
    return files


def fingerprint(files: list[Path], root: Path) -> str:
    """sha256 over the names (below `root`) and bytes of files."""
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(root).as_posix() if file != root else file.name
        digest.update(os.fsencode(name) + f"\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read(config: dict) -> list[tuple[str, str, str]]:
    """Documents as `(domain, document, text)`.

    The domain of a file is the folder it lies in below `path`, else its stem; a folder of at least `min_documents` files and
    nothing below it is one domain. A .txt or .md file is a document, a .jsonl line is one. A domain with fewer than
    `min_documents` has its documents cut at blank lines into blocks of about `block_characters`, so that there is something to
    split; within a longer paragraph at line ends, and a line longer than `line_characters` at spaces, into such blocks too.

    Raises ValueError for a missing path, bytes that are not UTF-8, a bad .jsonl line, or no text at all.
    """
    root = Path(config["path"] or "")
    domains: dict[str, list[tuple[str, str]]] = defaultdict(list)
    files = find(config["path"])
    for file, domain in zip(files, domains_of(files, root, config["min_documents"]), strict=True):
        name = _printable(file.relative_to(root).as_posix() if file != root else file.name)
        rows = _rows(file, config["field"]) if file.suffix.lower() == ".jsonl" else [(None, _decode(file))]
        domains[domain] += [(name if row is None else f"{name}:{row}", text) for row, text in rows if text.strip()]
    domains = {domain: documents for domain, documents in domains.items() if documents}
    if not domains:
        raise ValueError(f"corpus.path={config['path']} holds no usable text: all its files are empty.")
    sizes = {"size": config["block_characters"], "longest": config["line_characters"]}
    for domain, documents in domains.items():
        if len(documents) < config["min_documents"]:
            domains[domain] = [block for document in documents for block in _blocks(*document, **sizes)]
    return [(domain, name, text) for domain, documents in domains.items() for name, text in documents]


def domains_of(files: list[Path], root: Path, min_documents: int) -> list[str]:
    """Each file's domain, see `read`."""
    is_one = len(files) >= min_documents and all(file.parent == root for file in files)
    above = [root.resolve().name if is_one else file.stem for file in files]
    is_above = [file == root or file.parent == root for file in files]
    return [_printable(name if alone else file.parent.name) for file, name, alone in zip(files, above, is_above, strict=True)]


def _printable(name: str) -> str:
    """A file's name in characters that every file and page takes, whatever bytes it is made of."""
    text = os.fsencode(name).decode("utf-8", errors="replace")
    return "".join("\N{REPLACEMENT CHARACTER}" if unicodedata.category(c) == "Cc" else c for c in text)


def _decode(file: Path) -> str:
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where, byte = error.start, content[error.start]
    else:
        if "\0" not in text:
            return text
        where, byte = content.index(b"\0"), 0
    raise ValueError(
        f"corpus.path: {file} is not UTF-8 text: byte {byte:#04x} at offset {where}. "
        "Convert it (iconv -t utf-8) or move it away."
    )


def _rows(file: Path, field: str) -> list[tuple[int, str]]:
    rows = []
    for number, line in enumerate(_decode(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # the second: brackets within brackets, thousands of them
            raise ValueError(f"corpus.path: {file} line {number} is not JSON: {error}.") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            has = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"corpus.path: {file} line {number} has no text field {field!r} (it has {has}): set corpus.field.")
        if odd := re.search(r"[\0\ud800-\udfff]", row[field]):
            raise ValueError(f"corpus.path: {file} line {number} holds {odd[0]!r}, which is no text.")
        rows.append((number, row[field]))
    return rows


def _parts(line: str, size: int) -> list[str]:
    """A line in parts of `size` characters, or up to twice as many so that they end at a space."""
    parts, start = [], 0
    while start < len(line):
        end = start + size
        if end < len(line):
            end = line.find(" ", end, end + size) + 1 or end
        parts.append(line[start:end])
        start = end
    return parts


def _blocks(name: str, text: str, size: int, longest: int) -> list[tuple[str, str]]:
    """Cut a text at blank lines, at line ends where a paragraph is longer than a block, and lines above `longest`."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if len(paragraph) <= size:
            paragraphs.append((paragraph, "\n\n"))
            continue
        for line in paragraph.split("\n"):
            *parts, last = [line] if len(line) <= longest else _parts(line, size)
            paragraphs += [*((part, "") for part in parts), (last, "\n")]
    blocks, block = [], ""
    for paragraph, end in paragraphs:
        block += paragraph + end
        if len(block) >= size:
            blocks.append(block)
            block = ""
    blocks = [block for block in [*blocks, block] if block.strip()]
    return [(f"{name}#{number}", block) for number, block in enumerate(blocks)] if len(blocks) > 1 else [(name, text)]
