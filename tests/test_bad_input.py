"""Bad input: configurations, texts and checkpoints are taken, or refused at once by name with nothing written.

pytest tests/test_bad_input.py -s                                 # prints how many were tried and refused
CONFIGURATIONS=2000 pytest tests/test_bad_input.py -s -k any_configuration_is
HYPOTHESIS_PROFILE=soak pytest tests/test_bad_input.py -s         # many more of everything
"""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from conftest import small_experiment, write_model
from moepress import artefacts, composing, config, dag, plan, studies
from moepress.composing import ROOT, override_value
from moepress.data import corpus
from moepress.models import folders
from moepress.models.streaming import ModelStream
from moepress.stages import model as model_stage

SOAK = os.environ.get("HYPOTHESIS_PROFILE") == "soak"
ANY = {"deadline": None, "database": None, "derandomize": not SOAK, "suppress_health_check": list(HealthCheck)}

# --- configurations --------------------------------------------------------------------------------------------------

GROUPS = ("corpus", "model", "calibration", "gradients", "statistics", "allocation", "quantization", "pruning", "evaluation")
GROUPS += ("latency", "tracking", "experiment")
OPTIONS = {group: sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")) for group in GROUPS}
WIDEST = {"corpus": "hub", "model": "tiny", "allocation": "pmq", "quantization": "qesc", "pruning": "odp"}
HOSTILE_TEXT = ["", " ", "../../x", "/etc/passwd", "a\x00b", "a\nb", "\x1b[2J", "x" * 5000, "<script>alert(1)</script>", "-x"]
HOSTILE_TEXT += ["${seed}", "${oc.env:HOME}", "${oc.env:PATH}", "${nothing}", "$(touch pwned)", "{id}", "nan", "1e400", "12GiB"]
HOSTILE_TEXT += ["9" * 400 + "GiB", "1e99999999TB", "(", "auto", "null", "\ud800", "‮", "a" * 30 + "!", "[" * 500]
numbers = st.one_of(
    st.integers(-5, 70), st.integers(), st.floats(), st.sampled_from([10**30, -1, 0, 1, 2, 3, 2**31, 2**63, 10**400, 0.5])
)
scalars = st.one_of(numbers, numbers, st.booleans(), st.none(), st.one_of(st.text(max_size=20), st.sampled_from(HOSTILE_TEXT)))
values = st.one_of(
    *[scalars] * 4,
    st.lists(scalars, max_size=4),
    st.dictionaries(st.sampled_from(["train", "test", "max_share", "kind", "x"]), scalars, max_size=3),
)


def leaves(value, path=""):
    """Every key of a configuration, groups too."""
    if path:
        yield path, value
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}" if path else name)


@st.composite
def overrides(draw):
    """Up to three choices of groups, and up to three values of the keys that there are then, set, removed or added to."""
    groups = draw(st.lists(st.sampled_from(GROUPS), max_size=3, unique=True))
    lines = [f"{group}={draw(st.sampled_from(OPTIONS[group]))}" for group in groups]
    keys = [key for key, _ in leaves(OmegaConf.to_container(composing.composed(lines))) if not key.startswith("hydra")]
    for key in draw(st.lists(st.sampled_from(keys), max_size=3, unique=True)):
        how = draw(st.sampled_from(["{}={}"] * 12 + ["~{}", "+{}.x={}", "{}x={}", "++{}={}"]))
        lines.append(how.format(key, override_value(draw(values))))
    return lines


def named(lines, message):
    """Whether a message names one of the keys that were set, or a part of one (`corpus.fractions` of `.train`), or the line."""
    keys = [line.lstrip("+~").partition("=")[0] for line in lines]
    parts = {key.rsplit(".", cut)[0] for key in keys for cut in range(max(1, key.count(".")))}
    return any(part in message for part in parts) or any(line[:40] in message for line in lines)


def test_any_configuration_is_resolved_or_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts, slowest = Counter(), [0.0, 0.0, None]

    @settings(max_examples=int(os.environ.get("CONFIGURATIONS", 20_000 if SOAK else 60)), **ANY)
    @given(overrides())
    def one(lines):
        start = time.process_time(), time.perf_counter()
        try:
            found = studies.experiment(lines)
            report = studies.report_artefact("x", "y", [found])
            text = yaml.safe_dump([item.config for item in dag.everything([report]).values()], allow_unicode=True)
            text.encode()
            counts["resolved"] += 1
        except ValueError as error:
            counts["refused"] += 1
            assert named(lines, str(error)), f"{lines}: {error}"
        took = [time.process_time() - start[0], time.perf_counter() - start[1]]
        slowest[:] = max(slowest, [*took, lines], key=lambda each: each[0])
        assert took[0] < 5, lines

    one()
    assert not list(tmp_path.iterdir()), "composing writes nothing"
    print(f"\n{sum(counts.values())} configurations: {dict(counts)}; slowest {slowest[0]:.2f} CPU s ({slowest[1]:.2f} s)")
    assert min(counts["refused"], counts["resolved"]) >= 5


SOURCES = {"model=local": ["model.path=/x"], "model=hub": ["model.id=a/b"], "corpus=hub": ["corpus.id=a/b"]}
"""What a choice cannot do without."""


def test_no_number_may_be_nonsense():
    """Each number of each group, one at a time: none may be NaN, infinite, far below zero or beyond 63 bits."""
    seen, tried = set(), 0
    for group, options in OPTIONS.items():
        for option in options if group not in ("tracking", "experiment") else []:
            choice = [f"{group}={option}", *SOURCES.get(f"{group}={option}", [])]
            others = [f"{name}=hub" for name in ("corpus", "model") if name != group]
            others += [f"{name.partition('=')[0]}.id=a/b" for name in others]
            for key, value in leaves(config.values([*others, *choice])[group], group):
                if isinstance(value, bool | dict | str | list | None) or (key, option if group == "allocation" else 0) in seen:
                    continue
                seen.add((key, option if group == "allocation" else 0))
                for bad in ("nan", "inf", "-1000000000", str(2**64)):
                    tried += 1
                    with pytest.raises(ValueError, match=re.escape(re.sub(r"(corpus\.(?:fractions|overlap))\..*", r"\1", key))):
                        config.values([*choice, f"{key}={bad}"])
                        pytest.fail(f"{choice} {key}={bad} was taken")
    print(f"\n{tried} values of {len(seen)} keys refused")
    assert len(seen) > 80


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model=hub", "model.id=a/b", "corpus=wikitext2", "corpus.splits.test=null"], r"corpus\.splits\.test is not set"),
        (["model=tiny", "corpus=wikitext2"], r"corpus\.splits\.train is not set, but model=tiny reads"),
        (["model=hub", "model.id=a/b", "corpus=c4", "corpus.splits.calibration=null"], r"corpus\.splits\.calibration"),
        (["corpus=hub"], r"corpus\.id is not set"),
        (["corpus=hub", "corpus.id=a/b", "corpus.heading='('"], r"corpus\.heading='\(': not a regular expression"),
        (["corpus.domains=[]"], r"corpus\.domains=\[\]"),
        (["corpus.domains=[bible,bible]"], r"corpus\.domains.*bible is in them twice"),
        (["model.architecture.num_hidden_layers=1000000000000"], r"num_hidden_layers=1000000000000: at most 1000"),
        (["paths.results='{x}'"], r"paths\.results='\{x\}': a folder without any of"),
        (["paths.results=-rf"], r"paths\.results='-rf'"),
        (["paths.results=''"], r"paths\.results=''"),
        (["cores=0"], r"cores=0: null for all"),
        (["tracking.project='a?b'"], r"tracking\.project='a\?b': a W&B project's name"),
        (["model=[1,2]"], r"model=\[1, 2\]: give one name; model is one of"),
        (["quantization=null"], r"quantization=null: give one name; quantization is one of"),
        (["seed=-1"], r"seed=-1: a whole number"),
        (["allocation.budget=1.2.3GiB"], r"allocation\.budget='1\.2\.3GiB'"),
        (["model=local", "model.path=/data/Modell ü (1)"], r"""'model\.path="/data/Modell ü \(1\)"'$"""),
        (["model=local", 'model.path=/data/a"b('], r"""'model\.path="/data/a\\"b\("'$"""),
        (["model=local", "model.path=~/x"], rf"""token recognition error at: '~'; .*'model\.path="{Path.home()}/x"'$"""),
        (["model=/data/x"], r"model=/data/x: no such choice; .*; a folder of your own is model=local model\.path=/data/x"),
        (["corpus=notes/"], r"a folder of your own is corpus=local corpus\.path=notes/"),
        (["corpus=local", "corpus.fractions=train:1"], r"corpus\.fractions='train:1': Cannot assign str"),
        (["seed=" + "[" * 3000], "nested too deeply|seed="),
        (["out=" + "x" * 30000], "out=x.*at most 20000 characters"),
    ],
)
def test_refusals(lines, message):
    with pytest.raises(ValueError, match=message):
        config.resolve(lines)


def test_the_command_refuses_within_five_seconds_and_writes_nothing(tmp_path, model_folder, text_folder):
    (tmp_path / "truncated").mkdir()
    (tmp_path / "truncated" / "config.json").write_text('{"model_type": "mix')
    here = tmp_path / "here"
    here.mkdir()
    small = small_experiment(model_folder, text_folder)
    for line, message in (
        ("quantization.damping=nan", "quantization.damping=nan"),
        ("corpus.path=/nowhere", "corpus.path"),
        (f"model.path={tmp_path}/truncated", "config.json: not valid JSON"),
        ("paths.results={id}", "paths.results"),
        ("~model", "model"),
    ):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "moepress", *small, line]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr, (line, done.stderr)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5, line
        assert not list(here.iterdir()), line


@contextlib.contextmanager
def errors_for_people():
    """Values that only the stages can judge are refused there in a sentence of the same kind."""
    try:
        yield
    except ValueError as error:
        assert len(str(error)) > 20


def test_what_is_resolved_runs(model_folder, text_folder, tmp_path):
    """Through the real stages: to the end, or to a ValueError that stops the run with its one line."""
    counts, base = Counter(), small_experiment(model_folder, text_folder)
    choices = {
        "allocation": st.sampled_from(["uniform", "half", "random", "pmq", "hessian", "bsp", "frequency"]),
        "quantization": st.sampled_from(["rtn", "gptq", "qesc", "gptq_mc"]),
        "pruning": st.sampled_from(OPTIONS["pruning"]),
        "allocation.bits": st.sampled_from([1, 2, 2.5, 3, 8]),
        "quantization.group_size": st.sampled_from([8, 16, 32, 64, 128, 2**40]),
        "quantization.block_size": st.sampled_from([1, 7, 2**40]),
        "quantization.clip_steps": st.integers(1, 5),
        "calibration.num_sequences": st.sampled_from([1, 3, 8, 10**12]),
        "calibration.seq_len": st.sampled_from([8, 63, 10**12]),
        "calibration.coverage": st.sampled_from(["routed", "weighted", "all"]),
        "evaluation.seq_len": st.sampled_from([8, 64, 2**40]),
        "evaluation.batch_size": st.sampled_from([1, 2**40]),
        "evaluation.num_blocks": st.sampled_from([1, 3, 10**12]),
        "evaluation.separator": st.sampled_from(["null", r"'\n\n'", "'<script>'"]),
        "pruning.alpha": st.sampled_from([0, 0.5, 1e9]),
        "seed": st.integers(0, 2**32 - 1),
    }

    @settings(max_examples=150 if SOAK else 2, **ANY)
    @given(st.lists(st.sampled_from(sorted(choices)), min_size=1, max_size=5, unique=True), st.data())
    def one(keys, data):
        groups = [key for key in choices if key in keys]
        lines = [f"{key}={data.draw(choices[key])}" for key in groups]
        results = tmp_path / str(counts["tried"])
        counts["tried"] += 1
        with errors_for_people():
            planned = plan.for_overrides([*base, "device=cpu", f"paths.results={results}", *lines])
            counts["planned"] += 1
            for folder in planned.artefacts:
                artefacts.run_stage(artefacts.task_path(results, folder), results / folder)
            counts["ran"] += 1
        shutil.rmtree(results, ignore_errors=True)

    one()
    print(f"\n{dict(counts)}")


# --- texts -----------------------------------------------------------------------------------------------------------


def built(path, out, **changes):
    values = yaml.safe_load((ROOT / "conf" / "corpus" / "local.yaml").read_text()) | {"path": str(path)} | changes
    out.mkdir(exist_ok=True)
    corpus.build(values, out, out / "cache")
    return pd.read_parquet(out / "documents.parquet")


WORDS = " ".join(f"word{number}" for number in range(3000))
TEXTS = {
    "nothing": ("x.txt", b"", "no usable text"),
    "only a byte order mark": ("x.txt", b"\xef\xbb\xbf", "no usable text|too little text"),
    "binary": ("x.txt", bytes(range(256)) * 50, r"x\.txt is not UTF-8 text: byte 0x80 at offset 128"),
    "binary below 128": ("x.md", bytes(range(128)) * 50, r"x\.md is not UTF-8 text: byte 0x00 at offset 0"),
    "UTF-16": ("x.txt", WORDS.encode("utf-16"), r"x\.txt is not UTF-8 text: byte 0xff at offset 0.*iconv"),
    "UTF-16 without a mark": ("x.txt", WORDS.encode("utf-16-le"), r"byte 0x00 at offset 1"),
    "Latin-1": ("x.txt", "naïve".encode("latin-1"), r"byte 0xef at offset 2"),
    "lone surrogates": ("x.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', r"line 2 holds '\\ud800', which is no text"),
    "NUL in JSON": ("x.jsonl", b'{"text": "a\\u0000b"}\n', r"line 1 holds '\\x00'"),
    "nested JSON": ("x.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n", r"x\.jsonl line 1 is not JSON"),
    "endless number": ("x.jsonl", b'{"text": ' + b"9" * 10_000 + b"}\n", r"x\.jsonl line 1 (is not JSON|has no text field)"),
    "a number for text": ("x.jsonl", b'{"text": 5}\n', r"line 1 has no text field 'text'"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_none(name, tmp_path):
    file, content, message = TEXTS[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        built(tmp_path / file, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("between", [" ", ""])
def test_one_line_of_many_megabytes(tmp_path, between):
    """As text8 is; with words, or without a space in it. By hand: 100 MB, see docs/reliability.md."""
    words = between.join(f"w{number % 100_003}x{number}" for number in range(20_000_000 // 15))
    (tmp_path / "line.txt").write_text(words)
    before = time.process_time()
    table = built(tmp_path / "line.txt", tmp_path / "out")
    assert time.process_time() - before < 60
    assert set(table["split"]) == {"train", "calibration", "test"} and table["text"].str.len().max() <= 4100
    kept = sum(len(text) for text in table["text"])
    assert kept > 0.98 * len(words), "spaces at the ends of blocks are all that may be lost, and what repeats"


def test_right_to_left_and_other_scripts_stay_as_they_are(tmp_path):
    lines = ["אבגד הוזח \u202eabc\u202c", "مرحبا بالعالم", "日本語の文章です。", "🙂👨‍👩‍👧 e\u0301", "नमस्ते"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"{i} {lines[i % 5]} {i}"}) + "\n" for i in range(200)))
    table = built(tmp_path / "rows.jsonl", tmp_path / "out", overlap={"words": 13, "max_share": None})
    assert sorted(table["text"]) == sorted(f"{i} {lines[i % 5]} {i}" for i in range(200))


def test_file_names_of_any_bytes(tmp_path):
    folder = tmp_path / "texts"
    for number, name in enumerate([b"caf\xe9", b"a\nb", b"<script>alert(1)<", b"-rf", "‮abc".encode(), b"$(touch pwned)"]):
        path = os.path.join(os.fsencode(folder), name)
        os.makedirs(path)
        for part in range(120):
            with open(os.path.join(path, b"%d.txt" % part), "w") as file:
                file.write(" ".join(f"{number}w{part}v{word}" for word in range(30)))
    table = built(folder, tmp_path / "out")
    assert len(set(table["domain"])) == 6 and "caf\N{REPLACEMENT CHARACTER}" in set(table["domain"])
    assert not any("\n" in name for name in table["domain"])
    lines = ["corpus=local", f"corpus.path={folder}", "calibration.num_sequences=6", "calibration.seq_len=64"]
    assert config.resolve(lines)["corpus"]["fingerprint"]


# --- checkpoints -----------------------------------------------------------------------------------------------------


def edit(folder, change):
    """Change a checkpoint's tensors and write them again."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_header(change):
    def damage(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def edit_config(**changes):
    def damage(folder):
        found = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({name: value for name, value in found.items() if value != "gone"}))

    return damage


def with_index(weight_map):
    return lambda folder: (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


Q, ROUTER = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.block_sparse_moe.gate.weight"
W1 = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
DAMAGE = {
    "truncated": (lambda f: os.truncate(f / "model.safetensors", 9000), r"model\.safetensors: "),
    "empty": (lambda f: os.truncate(f / "model.safetensors", 0), r"model\.safetensors: not a whole safetensors file"),
    "no header": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 4000), r"not a whole safetensors file"),
    "nested header": (
        lambda f: (f / "model.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"[" * 10**6),
        "not a whole",
    ),
    "a header of lists": (edit_header(lambda h: h.update({Q: []})), rf"header says nonsense of {Q}"),
    "a header without places": (edit_header(lambda h: h[Q].pop("data_offsets")), rf"header says nonsense of {Q}"),
    "a negative shape": (edit_header(lambda h: h[Q].update(shape=[-64, -64])), rf"header says nonsense of {Q}"),
    "another shape than bytes": (edit_header(lambda h: h[Q].update(shape=[64, 65])), rf"header says nonsense of {Q}"),
    "a layer of no number": (edit_header(lambda h: h.update({"model.layers.x.q": h.pop(Q)})), r"model\.layers\.x\.q"),
    "a tensor too few": (lambda f: edit(f, lambda t: t.pop(Q)), Q),
    "a router too few": (lambda f: edit(f, lambda t: t.pop(ROUTER)), r"block_sparse_moe\.gate|mlp\.gate"),
    "no norm": (lambda f: edit(f, lambda t: t.pop("model.norm.weight")), r"model\.norm\.weight|norm\.weight"),
    "no head": (lambda f: edit(f, lambda t: t.pop("lm_head.weight")), r"lm_head\.weight"),
    "no embedding": (lambda f: edit(f, lambda t: t.pop("model.embed_tokens.weight")), r"lacks the tensor model\.embed_tokens"),
    "a wrong shape": (lambda f: edit(f, lambda t: t.update({Q: t[Q][:-1].clone()})), Q),
    "an expert of a wrong shape": (
        lambda f: edit(f, lambda t: t.update({W1: t[W1][:-1].clone()})),
        r"expert 1 of layer 0 is 63 x",
    ),
    "a router of a wrong shape": (lambda f: edit(f, lambda t: t.update({ROUTER: t[ROUTER][:-1].clone()})), ROUTER),
    "an embedding of a wrong shape": (
        lambda f: edit(f, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1].clone()})),
        r"model\.embed_tokens\.weight",
    ),
    "a tensor too many": (lambda f: edit(f, lambda t: t.update({"model.layers.0.extra.weight": torch.ones(3)})), r"extra"),
    "NaN": (lambda f: edit(f, lambda t: t[W1].view(-1)[5:6].fill_(torch.nan)), rf"{W1} holds NaN"),
    "integers": (lambda f: edit(f, lambda t: t.update({Q: t[Q].to(torch.int8)})), rf"{Q} is stored as I8"),
    "an expert too few": (
        lambda f: edit(f, lambda t: [t.pop(n) for n in list(t) if ".experts.2." in n]),
        r"layer 0 lacks expert 2, config\.json says 4 experts",
    ),
    "an index of a file that is not there": (
        with_index({Q: "b.safetensors"}),
        r"index names b\.safetensors, which is not there",
    ),
    "an index that leads out": (with_index({Q: "../b.safetensors"}), r"says that '\.\./b\.safetensors' holds .*of this folder"),
    "an index of a pickle": (with_index({Q: "pytorch_model.bin"}), r"says that 'pytorch_model\.bin' holds .*no safetensors"),
    "an index of numbers": (with_index({Q: 5}), r"says that 5 holds"),
    "an index that is a list": (with_index([Q]), r"index\.json: not an index"),
    "an index of a tensor too many": (with_index({"nobody": "model.safetensors"}), r"holds nobody, but it does not"),
    "an index that is cut": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map"'), r"not an index"),
    "a configuration that is cut": (lambda f: os.truncate(f / "config.json", 40), r"config\.json: not valid JSON"),
    "a configuration that is a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: not a model's config"),
    "an unknown family": (edit_config(model_type="llama"), r"model type 'llama' is not a Mixture-of-Experts family"),
    "a family that is no text": (edit_config(model_type=["mixtral"]), r"model type \['mixtral'\]"),
    "no number of experts": (edit_config(num_local_experts="gone"), r"config\.json lacks num_local_experts"),
    "experts in words": (edit_config(num_local_experts="many"), r"config\.json lacks num_local_experts"),
    "too many experts for a token": (edit_config(num_experts_per_tok=9), r"num_experts_per_tok=9, but 4 experts"),
    "more experts than there are": (edit_config(num_local_experts=5), r"lacks expert 4"),
    "endless layers": (edit_config(num_hidden_layers=10**15), r"1000000000000000 layers; at most 1000"),
    "a layer more": (edit_config(num_hidden_layers=3), r"layer|layers\.2"),
    "another hidden size": (edit_config(hidden_size=128), r"weight"),
    "quantized already": (edit_config(quantization_config={"quant_method": "awq"}), r"already quantized"),
    "a quantization that is none": (edit_config(quantization_config=5), r"config\.json: not a model's configuration"),
    "only pickles": (
        lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
        r"only pickles \(pytorch_model\.bin\), which are never loaded",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_before_anything_is_made(name, model_folder, tmp_path):
    """By the configuration, or by the stage that looks at each weight once, before any other stage runs."""
    damage, message = DAMAGE[name]
    folder = shutil.copytree(model_folder, tmp_path / "model")
    damage(folder)
    with pytest.raises(ValueError, match=message):
        config.resolve(["model=local", f"model.path={folder}", "quantization.group_size=32"])
        model_stage.refer(folder, tmp_path)
    assert not (tmp_path / "reference.json").exists()


def test_any_configuration_of_a_model_is_read_or_refused(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    plain = json.loads((folder / "config.json").read_text())
    names = [*plain, "mlp_only_layers", "quantization_config", "head_dim", "auto_map", "rope_scaling"]
    counts = Counter()
    junk = st.one_of(
        st.integers(-3, 300), st.integers(), st.floats(allow_nan=False), st.none(), st.text(max_size=8), st.lists(st.integers())
    )

    @settings(max_examples=3000 if SOAK else 150, **ANY)
    @given(st.dictionaries(st.sampled_from(names), junk, min_size=1, max_size=3))
    def one(changes):
        (folder / "config.json").write_text(json.dumps(plain | changes))
        start = time.process_time()
        try:
            folders.read_model(folder, "model.path")
            ModelStream(folder)
            counts["read"] += 1
        except ValueError:
            counts["refused"] += 1
        assert time.process_time() - start < 5, changes

    one()
    print(f"\n{dict(counts)}")
    assert min(counts["read"], counts["refused"]) >= 10


def test_checkpoints_with_bytes_changed_anywhere_in_the_header(tmp_path):
    """Whatever a header says: the tensors are read, or the file is named."""
    folder = write_model(tmp_path / "model", layers=1)
    path = folder / "model.safetensors"
    content, counts = path.read_bytes(), Counter()
    end = 8 + int.from_bytes(content[:8], "little")

    @settings(max_examples=2000 if SOAK else 100, **ANY)
    @given(st.lists(st.tuples(st.integers(0, end - 1), st.integers(0, 255)), min_size=1, max_size=3))
    def one(places):
        changed = bytearray(content)
        for place, byte in places:
            changed[place] = byte
        path.write_bytes(changed)
        try:
            folders.read_model(folder, "model.path")
            counts["read"] += 1
        except ValueError as error:
            assert str(folder) in str(error)
            counts["refused"] += 1

    one()
    assert min(counts["read"], counts["refused"]) >= 1
