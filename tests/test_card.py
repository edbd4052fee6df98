"""The model card, and the folder for the hub."""

import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from moepress import composing, dag, studies
from moepress.export import export
from moepress.report import card
from moepress.report import made as made_from
from moepress.report.run import label
from test_format import FIRST, change_json, flip, loaded, logits


def front_matter(text):
    _, matter, body = text.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_the_card_says_what_the_folder_is(checkpoint, model_folder):
    facts = json.loads((checkpoint / "card.json").read_text())
    front, body = front_matter((checkpoint / "README.md").read_text())
    assert front["base_model"] == model_folder.name and front["library_name"] == "transformers" and "license" not in front
    assert front["tags"] == ["moepress", "mixture-of-experts", "quantized"] and front["pipeline_tag"] == "text-generation"
    assert "QESC + PMQ" in body and "Not measured yet" in body and facts["key"] in body
    size = json.loads((checkpoint / "size.json").read_text())
    assert f"{size['bits_effective']:.3f}" in body and "512 tokens (8 sequences of 64)" in body
    widths = sorted({width for layer in facts["bits"] for width in layer})
    assert card.bit_rows([[2, 3], [3, 2], [2, 2]], [2, 3], (1, 2, 3)) == [("1-2", [1, 1]), ("3", [2, 0])]
    assert facts["layers"] == [0, 1]
    for layers, counts in card.bit_rows(facts["bits"], widths, facts["layers"]):
        assert f"| {layers} | {' | '.join(map(str, counts))} |" in body
    assert str(model_folder.parent) not in body + json.dumps(facts), "no path of this machine"


def test_the_card_says_how_many_weights_share_a_scale_where_rows_are_odd():
    assert card.groups({"hidden_size": 256, "intermediate_size": 128}, 128) == "128 weights share a scale and a zero point"
    gpt_oss = {"hidden_size": 2880, "intermediate_size": 2880}
    assert card.groups(gpt_oss, 128) == "64 weights share a scale and a zero point: 128 does not divide all rows"
    assert card.groups({"hidden_size": 96, "intermediate_size": 80}, 128).startswith(
        "32 weights, of an expert's down projection 16, share"
    )


def test_the_cards_command_makes_the_same_checkpoint(made):
    overrides, _, checkpoint = made
    command = shlex.split(json.loads((checkpoint / "card.json").read_text())["command"])
    assert command[0] == "moepress" and "quantization=qesc" in command and "seed=0" not in command
    paths = [word for word in overrides if word.startswith(("model.path", "corpus.path"))]
    again = studies.experiment([*command[1:], *paths])
    assert again.artefacts["quantization"].key == checkpoint.name[-12:]


@pytest.mark.parametrize("name", ["best", "fast", "gptq_minmax", "qesc"])
def test_the_card_calls_a_method_by_its_name_and_tells_all_that_it_read(checkpoint, name):
    config = studies.experiment([f"quantization={name}"]).config
    own = {key: value for key, value in config["quantization"].items() if key != "name"}  # as the key has it
    preset, changed = made_from.closest("quantization", own, {"quantization": own, "allocation": config["allocation"]})
    assert preset == name and not changed
    facts = json.loads((checkpoint / "card.json").read_text())
    assert facts["preset"] == "qesc"
    text = card.render(facts | {"preset": preset, "quantization": own, "calibration": config["calibration"]})
    assert f": {label(name)} + PMQ." in text
    assert ("then tuned as a whole on up to 1000 such sequences. The command" in text) == (name == "best")


def test_what_upstream_does_not_tell_is_said(checkpoint):
    facts = json.loads((checkpoint / "card.json").read_text())
    assert facts["not_told"] == [] and "is not recorded" not in card.render(facts)
    assert "chosen for corpus is not recorded" in card.render(facts | {"not_told": ["corpus"]})


@pytest.mark.parametrize("value", ["12GiB", "two words", "café", r"^\d+ = ", ["bible", "a b"]])
def test_the_cards_command_quotes_what_hydra_would_read_otherwise(value):
    """A corpus's domains are names of folders, its heading a regular expression."""
    key = "calibration.domains" if isinstance(value, list) else "model.path"
    config = composing.composed(["model=local", f"{key}={made_from._value(value)}"])
    assert OmegaConf.select(config, key) == value


@pytest.mark.parametrize(
    "line",
    [
        "",
        "seed=3 quantization=rtn quantization.attention_bits=null allocation=uniform allocation.budget=2MiB",
        "model.training.steps=9 model.seed=4 allocation.widths=[1,2,3] calibration.domains=[wiki_en,python] seed=1",
        "quantization=gptq statistics.quantizer=rtn corpus.seed=2 corpus.domains=[bible] corpus.test_domains=[]",
        "quantization=rtn allocation=random seed=2",
        "quantization=gptq allocation=random seed=3 allocation.seed=1",
        "quantization=gptq allocation=pmq_code allocation.keep=[]",
        "allocation=global allocation.bits=2.25 gradients.num_sequences=4 allocation.keep=[3,4]",
        "allocation=bsp allocation.widths=[2,3]",
    ],
)
def test_any_command_is_found_again(line):
    wanted = studies.experiment(shlex.split(line)).artefacts["quantization"]
    groups = {}
    told = [item for role, item in wanted.inputs.items() if role != "distillation"]  # as made.settings has it
    for item in [wanted, *dag.everything(told).values()]:
        for group, values in item.config.items():
            groups[group] = values | groups.get(group, {})
    command = shlex.split(made_from.command(groups, "tiny"))
    assert studies.experiment(command[1:]).artefacts["quantization"].key == wanted.key, command


def test_the_base_model_and_its_licence(tmp_path):
    cached = tmp_path / "models--org--some-name" / "snapshots" / "0"
    cached.mkdir(parents=True)
    assert made_from.base_model({"kind": "local"}, cached, "some-name") == "org/some-name"
    assert made_from.base_model({"kind": "local"}, tmp_path, "mine") == "mine"
    assert made_from.base_model({"kind": "hub", "id": "a/b"}, cached, "hub") == "a/b"
    assert made_from.licence(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: theirs\ntags: [a]\n---\n# Model\n")
    assert made_from.licence(tmp_path) == {"license": "other", "license_name": "theirs"}
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert made_from.licence(tmp_path) == {}


def test_names_cannot_break_out_of_the_card(checkpoint):
    facts = json.loads((checkpoint / "card.json").read_text())
    evil = "a|b`c`<script>x</script>\n# [y](z)\n```\n---"
    facts |= {"base_model": evil, "command": f"moepress 'model.id={evil}'", "licence": {"license": "mit"}}
    front, body = front_matter(card.render(facts))
    assert front["base_model"] == evil and front["license"] == "mit"
    shown, code = body.split("````bash\n")
    assert "<script>" not in shown and "\n# \\[y" not in body and r"\[y\](z)" in shown and r"a\|b\`c" in shown
    assert "[y]" not in shown
    assert code.split("\n````\n")[0].count("\n") == 0


def test_export_is_complete(made, tmp_path):
    _, report, checkpoint = made
    out = export(checkpoint, tmp_path / "deep" / "out", report)
    assert torch.equal(logits(loaded(out)), logits(loaded(checkpoint)))
    assert {path.name for path in out.iterdir()} == {
        *(path.name for path in checkpoint.glob("model*")),
        "README.md",
        "card.json",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (out / FIRST).stat().st_ino == (checkpoint / FIRST).stat().st_ino
    assert (out / "config.json").stat().st_ino != (checkpoint / "config.json").stat().st_ino
    metrics = {}
    for folder in report.parent.parent.glob("evaluation/*"):
        metrics[folder.name.split("-")[0]] = json.loads((folder / "metrics.json").read_text())
    _, body = front_matter((out / "README.md").read_text())
    for domain in ("even", "odd"):
        (row,) = re.findall(rf"\| {domain} \| ([\d.]+) ± [\d.]+ \| ([\d.]+) ± [\d.]+ \|", body)
        for text, name in zip(row, ("16bit", "qesc"), strict=True):
            assert float(text) == pytest.approx(metrics[name]["domains"][domain]["ppl"], rel=0.05)
    assert "selected experts that changed" in body and "times as fast as at 16 bits" in body and "Not measured" not in body


def test_the_card_tells_the_tasks(made, tmp_path):
    _, report, checkpoint = made
    table = pd.read_csv(report / "runs.csv", keep_default_na=False)
    is_base = table["method"] == "none"
    table["acc_piqa"], table["acc_piqa_stderr"] = np.where(is_base, 0.75, 0.71), 0.02
    table["acc_boolq"], table["acc_boolq_stderr"] = np.where(is_base, "0.6", ""), np.where(is_base, "0.1", "")
    table["acc_mean"], table["acc_mean_stderr"] = 0.7, 0.01
    table["delta_acc"], table["delta_acc_stderr"], table["limit"] = -0.04, 0.006, 200
    table.to_csv(tmp_path / "runs.csv", index=False)
    out = export(checkpoint, tmp_path / "out", tmp_path / "runs.csv")
    _, body = front_matter((out / "README.md").read_text())
    assert "| piqa | 75.0 ± 2.0 | 71.0 ± 2.0 |" in body and "boolq" not in body and "| mean |" not in body
    assert "paired item by item | -4.00 ± 0.60 points" in body and "only the first 200 of each were asked" in body
    table["limit"] = ""
    table.to_csv(tmp_path / "runs.csv", index=False)
    assert "only the first" not in (export(checkpoint, out, tmp_path / "runs.csv") / "README.md").read_text()


def test_export_replaces_only_itself(made, tmp_path):
    _, report, checkpoint = made
    out = tmp_path / "out"
    out.mkdir()
    export(checkpoint, out)
    assert "Not measured yet" in (out / "README.md").read_text()
    export(checkpoint, out, report / "runs.csv")
    assert "Not measured yet" not in (out / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt, which no export wrote"):
        export(checkpoint, out)
    with pytest.raises(ValueError, match="not empty, and no export"):
        export(checkpoint, tmp_path)
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(checkpoint, checkpoint)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    change_json(other / "card.json", lambda facts: facts.update(key="0" * 12))
    with pytest.raises(ValueError, match="no row of the checkpoint 000000000000"):
        export(other, tmp_path / "new", report)
    flip(other / FIRST, -1)
    with pytest.raises(ValueError, match="altered"):
        export(other, tmp_path / "new")
    assert not (tmp_path / "new").exists()
