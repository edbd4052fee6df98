"""resolve(): one way to a configuration, checked; keys that depend on what matters and on nothing else."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moepress import config, dag, machine, studies
from moepress.composing import ROOT
from moepress.data import corpus
from moepress.schema.values import parse_bytes


def key(stage, *overrides):
    return dag.artefact(stage, config.resolve(overrides)).key


def test_values_are_plain_and_resolved():
    found = config.resolve(["allocation.bits=3"])
    assert found["allocation"]["bits"] == 3.0 and isinstance(found["allocation"]["bits"], float)
    assert json.loads(json.dumps(found)) == found
    assert "${" not in json.dumps(found) and "???" not in json.dumps(found)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["allocation.bitz=3"], r"bitz.*keys of allocation: .*bits"),
        (["allocation.bits.x=3"], r"allocation\.bits is one value and has no keys"),
        (["model.architecture.hiden_size=8"], r"has no key 'hiden_size' \(did you mean hidden_size\?\); keys of model\.arch"),
        (["paths.result=x"], r"paths\.result=x: no such key \(did you mean results\?\); keys of paths: results, cache"),
        (["pruning.alpha=0.3"], r"^pruning\.alpha=0\.3: pruning=none has no key 'alpha', which belongs to pruning=pesf$"),
        (
            ["quantization=gptq", "quantization.router_loss=kl"],
            r"quantization=gptq has no key .* of quantization=best, fast, qesc",
        ),
        (["experiment=fast", "quantization.clip=2"], r"quantization=fast has no key 'clip'"),
        (["experiment=fast", "quantization=gptq"], r"stands for allocation=global quantization=fast, which quantization=gptq"),
        (["allocation=uniform", "experiment=best"], r"or write allocation=uniform quantization=best in their place"),
        (["experiment=null"], r"experiment=null: give one name; experiment is one of best, fast"),
        (["plann"], r"'plann' is no KEY=VALUE"),
        (["quantization"], r"'quantization': a group needs a value, quantization=best\|fast"),
        (["model.path"], r"'model\.path': a key needs a value, model\.path=VALUE"),
        (["pruning.method=pesf"], r"pruning\.alpha is missing, which pruning\.method=pesf needs; choose pruning=NAME"),
        (["latency/models=mixtral-8x7b"], r"'latency/models' \(did you mean latency\?\) is none of"),
        (["quantization=gptk"], r"^quantization=gptk: no such choice \(did you mean gptq\?\); quantization is one of best"),
        (
            ["calibration.domains=[bibel]"],
            r"calibration\.domains=\['bibel'\]: the corpus has no 'bibel' \(did you mean bible\?\)",
        ),
        (["calibration.domains=[owt_5]"], r"'owt_5' has test text only; it has wiki_en"),
        (["evaluation.domains=[foo]"], r"evaluation\.domains=\['foo'\]: the corpus has no 'foo'; it has .*owt_5"),
        (["quantisation=gptq"], r"'quantisation' \(did you mean quantization\?\) is none of .*quantization"),
        (["quantization=awq"], r"quantization is one of best, fast, gptq, gptq_clip, gptq_mc, gptq_minmax, none, qesc, rtn"),
        (["+allocation.extra=3"], r"allocation.*extra"),
        (["allocation.bits=many"], r"allocation\.bits.*many"),
        (["allocation.bits=9"], r"allocation\.bits=9.*between 1 and 4"),
        (["allocation.bits=0.5"], r"allocation\.bits=0\.5.*between 1 and 4"),
        (["allocation=uniform", "allocation.bits=2.5"], r"allocation\.bits=2\.5.*allocation=pmq"),
        (["allocation.widths=[2,5]"], r"allocation\.widths=\[2, 5\].*\[1, 2, 3, 4, 8\]"),
        (["allocation.widths=[2,2]"], r"allocation\.widths=\[2, 2\]: a list of widths"),
        (["allocation=half", "allocation.bits=9"], r"allocation\.bits=9.*between 1 and 8"),
        (["allocation=hessian", "allocation.keep=[8]"], r"allocation\.keep=\[8\]: a part of widths"),
        (["allocation=random", "allocation.seed=-1"], r"allocation\.seed=-1"),
        (["allocation=global", "allocation.gap=1"], r"allocation\.gap=1.*below 1"),
        (["allocation=pmq", "allocation.errors=none"], r"allocation\.errors='none': one of quantizer, minmax, nominal"),
        (["gradients.num_sequences=0"], r"gradients\.num_sequences=0: at least 1"),
        (["statistics.quantizer=awq"], r"statistics\.quantizer='awq': one of auto, rtn, gptq, minmax"),
        (["allocation.budget=lots"], r"allocation\.budget='lots'.*12GiB"),
        (
            ["allocation=pmq", "allocation.bits=1"],
            r"allocation\.bits=1: .*keep=\[2, 3\]; averages from 1\.375 to 3\.625 can be met",
        ),
        (["quantization.group_size=100"], r"quantization\.group_size=100: a multiple of 8"),
        (["quantization=rtn", "statistics.quantizer=gptq"], r"statistics\.quantizer='gptq': quantization=rtn has no error"),
        (["quantization.damping=-1"], r"quantization\.damping=-1"),
        (["quantization.block_size=0"], r"quantization\.block_size=0: at least 1"),
        (["pruning=pesf", "pruning.alpha=-1"], r"pruning\.alpha=-1"),
        (["pruning=odp", "pruning.quantile=2"], r"pruning\.quantile=2"),
        (["pruning=odp", "pruning.protect=2"], r"pruning\.protect=2.*0\.02"),
        (["pruning=ees", "pruning.threshold=-1"], r"pruning\.threshold=-1.*ratio between 0 and 1"),
        (["pruning=static", "pruning.criterion=loss"], r"pruning\.criterion='loss': one of reap, frequency"),
        (["pruning=static", "pruning.ratio=0.9"], r"pruning\.ratio=0\.9: .*at most 0\.75"),
        (["calibration.seq_len=1"], r"calibration\.seq_len=1: at least 8"),
        (["calibration.seq_len=4096"], r"calibration\.seq_len=4096: the model has 2048 positions .*ask for shorter sequences"),
        (["evaluation.seq_len=4096"], r"evaluation\.seq_len=4096: the model has 2048 positions"),
        (["calibration.num_sequences=0"], r"calibration\.num_sequences=0: at least 1"),
        (["model=local"], r"model\.path is not set: give it as model\.path="),
        (["model=local", "model.path=/nowhere"], r"model\.path='/nowhere': no such folder"),
        (["model=hub"], r"model\.id is not set"),
        (["device=tpu"], r"device='tpu'"),
        (["seed=x"], r"seed='x'"),
        (["tracking=loud"], r"tracking is one of disabled, offline, online"),
    ],
)
def test_bad_values_are_named_with_a_way_out(overrides, message):
    with pytest.raises(ValueError, match=message):
        config.resolve(overrides)


def test_calibration_that_nobody_reads_may_have_any_length():
    config.resolve(["calibration.seq_len=4096", "quantization=none"])


def test_an_experiment_that_nothing_contradicts_is_taken():
    fast = config.values(["experiment=fast"])
    assert fast["quantization"]["name"] == "fast" and fast == config.values(["experiment=fast", "quantization=fast"])


def test_widths_without_measured_errors_are_refused_before_anything_is_measured():
    """By the rules that read such errors, and by no other."""
    wide = "allocation.widths=[2,3,8]"
    for rule in ("pmq", "pmq_code", "hessian", "bsp", "global"):
        lines = [f"allocation={rule}", wide]
        with pytest.raises(
            ValueError, match=r"allocation\.widths=\[2, 3, 8\]: no errors were measured at \[8\]; add them to stat"
        ):
            config.values(lines)
        config.values([*lines, "statistics.widths=[2,3,8]"])
        config.values([*lines, "quantization=none"])
    for rule in ("frequency", "weight", "random", "half"):
        config.values([f"allocation={rule}", wide])


def test_hydras_advice_is_left_out():
    for line in ("allocation.bitz=3", "quantization=awq", "hydra.launcher.jbs=3", "hydra/launcher=basik"):
        with pytest.raises(ValueError) as error:
            config.resolve([line])
        assert not re.search(r"append to|Search path|\n|\.;", str(error.value), re.IGNORECASE), line


def test_local_texts_are_looked_at_at_once(text_folder):
    own = ["corpus=local", f"corpus.path={text_folder}", "quantization=gptq", "allocation=uniform"]
    small = [*own, "calibration.num_sequences=4", "calibration.seq_len=64"]
    config.resolve(small)
    with pytest.raises(ValueError, match=r"evaluation\.domains=\['odds'\].*did you mean odd\?.* it has even, odd"):
        config.resolve([*small, "evaluation.domains=[odds]"])
    too_many = [*own, "calibration.num_sequences=64", "calibration.seq_len=512"]
    with pytest.raises(ValueError, match=r"needs 32 windows of 'even', whose calibration split is at most \d+ characters"):
        config.resolve(too_many)
    config.resolve([*too_many, "quantization=none"])  # reads none of it
    with pytest.raises(ValueError, match=r"needs 64 windows of 'odd'"):
        config.resolve([*too_many, "calibration.domains=[odd]"])


@given(st.lists(st.text("ab é漢\n", max_size=300), min_size=3, max_size=40), st.sampled_from([0.05, 0.2, 0.6]))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_calibration_text_exceeds_its_bound(tmp_path_factory, texts, share):
    """Against the corpus as it is built, with a token for each byte."""
    place = tmp_path_factory.mktemp("bound")
    (place / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    group = yaml.safe_load((ROOT / "conf" / "corpus" / "local.yaml").read_text())
    group |= {"path": str(place / "d.jsonl"), "fractions": {"train": 0.95 - share, "calibration": share, "test": 0.05}}
    try:
        corpus.build(group, place, place)
    except ValueError:  # too little text
        return
    tokens = sum(len(text.encode()) + 1 for text in corpus.read(place, "calibration")["text"])
    found = config._most_tokens(group["path"], "text", tuple(group[name] for name in config._CUTS), share, ())
    assert tokens <= found["d"]


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.os.path, "exists", lambda path: False)
    with pytest.raises(ValueError, match=r"device='cuda:1': this machine has no GPU .*device=cpu or auto.*profile=slurm"):
        machine.check_gpu("cuda:1")
    machine.check_gpu("auto")
    assert config.values(["device=cuda"])["device"] == "cuda", "a cluster's machines may have one"


def test_models_that_cannot_be_used(tmp_path, model_folder):
    def refused(match):
        with pytest.raises(ValueError, match=match):
            config.resolve(["model=local", f"model.path={tmp_path}"])

    refused("no config.json")
    (tmp_path / "config.json").write_text("{")
    refused("not valid JSON")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    refused(r"model\.path: model type 'llama' is not a Mixture-of-Experts family that is handled \(.*deepseek, .*mixtral")
    (tmp_path / "config.json").write_text((model_folder / "config.json").read_text())
    refused("no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    refused(r"only pickles \(pytorch_model\.bin\), which are never loaded")


def test_budgets_in_bytes_say_what_can_be_met(model_folder):
    local = ["model=local", f"model.path={model_folder}", "quantization.group_size=32"]
    with pytest.raises(ValueError, match=r"allocation\.budget=1KiB: no allocation fits; this model takes from 0\.\d+MiB"):
        config.resolve([*local, "allocation.budget=1KiB"])
    assert config.resolve([*local, "allocation.budget=1MiB"])["allocation"]["budget"] == "1MiB"
    assert config.resolve([*local, "allocation.budget=1 MiB"])["allocation"]["budget"] == "1MiB"


def test_keys_follow_what_a_stage_reads():
    plain = key("quantization")
    assert key("quantization", "allocation.bits=2.5") == plain, "a default given is the default"
    for override in ("device=cpu", "cores=1", "tracking=offline", "paths.results=elsewhere", "paths.cache=/tmp/x"):
        assert key("quantization", override) == plain, override
    for override in ("evaluation.num_blocks=3", "pruning=pesf", "latency.repeats=3"):
        assert key("quantization", override) == plain, override
    for override in ("seed=1", "calibration.seq_len=256", "quantization.group_size=64", "allocation.bits=2"):
        assert key("quantization", override) != plain, override
    assert key("model", "seed=1") == key("model"), "the seed of the sample does not train another model"
    assert key("statistics", "quantization=gptq") == key("statistics", "quantization=qesc"), (
        "GPTQ and QESC share their experts' statistics"
    )
    assert key("evaluation", "quantization=none", "allocation.bits=3") == key("evaluation", "quantization=none")


def test_nothing_is_timed_with_no_repeats():
    assert "latency" in studies.experiment(["quantization=none"]).artefacts
    assert "latency" not in studies.experiment(["quantization=none", "latency.repeats=0"]).artefacts


def test_only_the_rules_that_read_something_wait_for_it():
    def stages(*overrides):
        found = dag.everything([studies.report_artefact("one", "", [studies.experiment(overrides)])])
        return {folder.split("/")[0] for folder in found}

    for method in ("uniform", "half", "random"):
        assert not {"statistics", "gradients"} & stages(f"allocation={method}")
    for method in ("pmq", "pmq_code", "frequency", "weight", "hessian", "bsp"):
        assert "statistics" in stages(f"allocation={method}") and "gradients" not in stages(f"allocation={method}")
    assert {"statistics", "gradients"} <= stages("allocation=global")
    assert "statistics_block" not in stages("allocation=pmq"), "one job"
    assert "statistics_block" in stages("allocation=pmq", "statistics.blocks=2")
    shared = {
        key("statistics", f"allocation={method}") for method in ("pmq", "frequency", "weight", "hessian", "bsp", "random")
    }
    assert shared == {key("statistics", "allocation=pmq", "gradients.num_sequences=1")} != {key("statistics")}
    assert config.resolve(["allocation=pmq_code"])["statistics"]["quantizer"] == "minmax"
    assert config.resolve(["allocation=pmq_code", "statistics.quantizer=rtn"])["statistics"]["quantizer"] == "rtn"


def test_keys_are_the_same_in_another_process():
    code = "from moepress import config, dag; print(dag.artefact('latency', config.resolve([])).key)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert other == key("latency")


def test_local_folders_are_known_by_content(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text("same words")
    local = ["corpus=local", "calibration.num_sequences=1", "calibration.seq_len=8"]
    keys = [key("corpus", *local, f"corpus.path={tmp_path / name}") for name in ("a", "b")]
    (tmp_path / "b" / "text.txt").write_text("other words")
    assert keys[0] == keys[1] != key("corpus", *local, f"corpus.path={tmp_path / 'b'}")


def test_a_model_is_known_by_content_wherever_it_lies(model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "renamed")
    small = ["model=local", "quantization.group_size=32"]
    assert key("quantization", *small, f"model.path={model_folder}") == key(
        "quantization", *small, f"model.path={tmp_path / 'renamed'}"
    )


def test_the_default_study():
    members = studies.study_experiments(studies.load_study("default"))
    names = studies.run_names(members)
    assert len(set(names)) == len(names) == 17 and names[0] == "16bit"
    everything = dag.everything([a for m in members for a in m.artefacts.values()])
    assert sum(folder.startswith("statistics/") for folder in everything) == 1
    assert sum(folder.startswith("quantization/") for folder in everything) == 14
    with pytest.raises(ValueError, match=r"study=nothing: .*default"):
        studies.load_study("nothing")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "conf" / "study").glob("*.yaml")))
def test_each_study_is_one_table_of_distinct_runs(name):
    study = studies.load_study(name)
    members = studies.study_experiments(study)
    names = studies.run_names(members)
    assert study["name"] == name and study["caption"].endswith(".") and any(dag.is_reference(m.config) for m in members)
    assert len(set(names)) == len(names) and len({m.artefacts["evaluation"].key for m in members}) == len(members)


def test_a_study_without_the_16_bit_model_gets_it():
    study = {"base": ["calibration.seq_len=64"], "experiments": ["quantization=gptq", "quantization=rtn seed=1"]}
    members = studies.study_experiments(study)
    assert [dag.is_reference(m.config) for m in members] == [True, False, False]
    assert studies.run_names(members) == ["16bit", "gptq-global-2.5", "rtn-global-2.5 seed=1"]


def names_of(*lines):
    return studies.run_names(studies.compared([studies.experiment(line.split()) for line in lines]))


def test_a_name_says_which_model_and_corpus():
    own = ["gptq-global-2.5 model.seed=1", "gptq-global-2.5 model.seed=2"]
    found = names_of("quantization=gptq model.seed=1", "quantization=gptq model.seed=2")
    assert sorted(found) == ["16bit model.seed=1", "16bit model.seed=2", *own]
    assert names_of("model.seed=1 quantization=gptq", "model.seed=1 quantization=rtn")[0] == "16bit", "what all share"
    assert names_of("quantization=none model.seed=1 seed=3") == ["16bit"]
    assert names_of("quantization=none corpus.seed=1", "quantization=none") == ["16bit corpus.seed=1", "16bit"]


def test_the_16_bit_model_has_no_override_in_its_name_that_it_does_not_depend_on():
    found = names_of("quantization=gptq calibration.num_sequences=32", "quantization=gptq calibration.num_sequences=64")
    assert found == ["16bit", *(f"gptq-global-2.5 calibration.num_sequences={count}" for count in (32, 64))]
    assert names_of("quantization=none seed=1 calibration.num_sequences=32", "quantization=none model.seed=1")[0] == "16bit"


def test_what_a_label_leaves_out_tells_two_of_one_name_apart():
    """A fixed threshold stands in the label, the quantile that it replaces does not, but is part of the key."""
    lines = [f"quantization=none pruning=ees pruning.threshold=0.4 pruning.quantile={quantile}" for quantile in (0.3, 0.5)]
    assert names_of(*lines) == ["16bit", *(f"16bit-ees-0.4 pruning.quantile={quantile}" for quantile in (0.3, 0.5))]


def test_two_runs_of_one_name_are_refused():
    given = ["quantization=gptq", "calibration.num_sequences=32", "calibration.num_sequences=64"]
    members = studies.compared([studies.experiment(given), studies.experiment([given[0], *given[:0:-1]])])
    with pytest.raises(ValueError, match=r"report mine: several runs that differ would be called 'gptq-global-2\.5'"):
        studies.report_artefact("mine", "", members)


def test_a_study_under_several_seeds():
    """What draws nothing is there once; a caller's seed wins."""
    lines = ["quantization=none", "quantization=rtn allocation=uniform", "quantization=gptq allocation=uniform"]
    study = {"base": ["allocation.bits=2"], "seeds": [0, 1, 2], "experiments": lines}
    members = studies.study_experiments(study)
    assert studies.run_names(members) == ["16bit", "rtn-2", *(f"gptq-2 seed={seed}" for seed in (0, 1, 2))]
    assert len({member.artefacts["quantization"].key for member in members[1:]}) == 4
    assert len(studies.study_experiments(study, ["seed=5"])) == 3


def test_no_stage_but_those_that_need_it_imports_torch():
    code = (
        "import sys, moepress.stages.allocation, moepress.stages.report, moepress.stages.pruning, moepress.plan, moepress.cli;"
        "print(sorted({'torch', 'transformers', 'wandb', 'datasets'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "size"), [("12GiB", 12 * 2**30), ("800MB", 8e8), ("1e9", 1e9), (5, 5), ("1.5 KiB", 1536), ("2T", 2e12)]
)
def test_sizes(text, size):
    assert parse_bytes(text) == size
