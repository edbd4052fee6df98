"""`moepress plan`: sizes from headers, from an index alone, from a recipe; what the machine lacks; all without torch."""

import json
import shutil
import subprocess
import sys
import types

import pytest
import yaml

import large
from conftest import small_experiment
from moepress import config, dag, estimate, forecast, studies, work
from moepress import plan as planning
from moepress.commands import plan as plan_command
from moepress.models import families, folders, limits, outline
from moepress.models.files import Entry, read_header
from moepress.quantization.budget import Prediction
from moepress.schema import SCHEMA
from moepress.schema.values import parse_bytes
from zoo import write_zoo_model

SMALL = ["allocation=pmq", "quantization=qesc", "quantization.group_size=32", "device=cpu"]


def plan(*overrides):
    return subprocess.run([sys.executable, "-m", "moepress", "plan", *overrides], capture_output=True, text=True, check=False)


def sizes_of(text: str) -> dict[str, int]:
    """Width -> bytes of the folder, from the printed table."""
    lines = [line.split() for line in text.splitlines() if " bit " in line]
    return {words[0]: parse_bytes(words[2]) for words in lines if words[1] == "bit"}


@pytest.fixture(scope="module")
def deepseek_v3(tmp_path_factory):
    return large.write_index(tmp_path_factory.mktemp("v3"))


@pytest.fixture(scope="module")
def exact_v3():
    """The same model as its headers would tell it."""
    entries = {name: Entry(None, name, "BF16", shape) for name, shape in large.shapes().items()}
    tensors = folders.standard_tensors(entries, large.CONFIG)
    return outline.Outline(large.CONFIG, families.shape_of(large.CONFIG, "model", tensors), tensors)


def test_the_numbers_of_a_671b_index(deepseek_v3, exact_v3, tmp_path):
    found = outline.read_any(deepseek_v3, "model.path")
    assert found.is_estimate and found.shape == exact_v3.shape
    assert exact_v3.num_weights == pytest.approx(671.03e9, rel=1e-4), "the public figure, without layer 61"
    assert found.num_weights == pytest.approx(671e9, rel=1e-3)
    assert found.active_weights == pytest.approx(37.5e9, rel=0.01)
    assert (found.shape.num_layers, found.shape.moe_layers) == (61, tuple(range(3, 61)))
    quantization = config.values([])["quantization"]
    for one, exact in zip(*(plan_command.uniform_sizes(Prediction(m, quantization)) for m in (found, exact_v3)), strict=True):
        assert one.folder == pytest.approx(exact.folder, rel=0.01) and one.bits == pytest.approx(exact.bits, rel=0.01)
    float8 = outline.read_any(large.write_index(tmp_path, float8=True), "model.path")
    assert float8.tensors.keys() == found.tensors.keys()
    assert float8.num_weights == pytest.approx(671e9, rel=1e-3), "published in 8 bits, read as 16-bit"


def test_experts_in_four_bits_are_told_by_their_names(tmp_path):
    whole, bare = write_zoo_model(tmp_path / "whole", "gpt_oss"), tmp_path / "bare"
    bare.mkdir()
    exact = outline.read_any(whole, "model.path")
    config_file = json.loads((whole / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config_file | {"quantization_config": {"quant_method": "mxfp4"}}))
    names, total = {}, 0
    for name, entry in exact.tensors.items():
        is_expert = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        names |= dict.fromkeys(
            [f"{name}_blocks", f"{name}_scales"] if is_expert else [name], "model-00001-of-00001.safetensors"
        )
        total += entry.numel * 17 // 32 if is_expert else entry.nbytes
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    found = outline.read_any(bare, "model.path")
    assert found.tensors.keys() == exact.tensors.keys() and found.routed_weights == exact.routed_weights
    assert found.num_weights == pytest.approx(exact.num_weights, rel=0.01)


@pytest.mark.parametrize(
    "family",
    ["mixtral", "qwen2_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v3", "hunyuan_v1_moe", "granitemoe", "deepseek"],
)
def test_the_index_alone_comes_close_to_the_headers(family, tmp_path):
    whole, bare = write_zoo_model(tmp_path / "whole", family), tmp_path / "bare"
    bare.mkdir()
    shutil.copy(whole / "config.json", bare)
    exact = outline.read_any(whole, "model.path")
    stored = {entry.name: entry for entry in exact.tensors.values() if entry.path}
    if family == "qwen3_next":  # a layer that predicts more tokens is in the index, and no part of the model
        stored |= {name.replace("model.", "mtp.", 1): e for name, e in stored.items() if name.startswith("model.layers.0.mlp")}
    weight_map = {name: "model-00001-of-00001.safetensors" for name in stored}
    index = {"metadata": {"total_size": sum(entry.nbytes for entry in stored.values())}, "weight_map": weight_map}
    (bare / "model.safetensors.index.json").write_text(json.dumps(index))
    found = outline.read_any(bare, "model.path")
    assert (found.is_estimate, exact.is_estimate) == (True, False)
    assert found.shape == exact.shape and found.tensors.keys() == exact.tensors.keys()
    assert found.num_weights == pytest.approx(exact.num_weights, rel=0.01)
    quantization = config.values(["quantization.group_size=32"])["quantization"]
    bits = [[2] * exact.shape.num_experts] * len(exact.shape.moe_layers)
    each = [Prediction(model, quantization).weight_bytes(bits) for model in (found, exact)]
    assert each[0] == pytest.approx(each[1], rel=0.05)


def test_what_an_index_must_say(deepseek_v3, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(large.CONFIG))
    index = json.loads((deepseek_v3 / "model.safetensors.index.json").read_text())

    def refused(index, match):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=match):
            outline.read_any(tmp_path, "model.path")

    refused(index | {"metadata": {}}, r"no metadata\.total_size")
    refused(index | {"metadata": {"total_size": 10**9}}, "total_size=1000000000 is less than the experts")
    del index["weight_map"]["model.layers.7.mlp.experts.9.up_proj.weight"]
    del index["weight_map"]["model.layers.7.mlp.experts.9.gate_proj.weight"]
    del index["weight_map"]["model.layers.7.mlp.experts.9.down_proj.weight"]
    refused(index, "layer 7 lacks expert 9")


def test_a_carving_is_planned_before_its_dense_model_is_there(tmp_path):
    found = outline.from_carving(config.values(["model=carved"])["model"])
    assert found.num_weights == pytest.approx(134.5e6 + 20 * 65 * 576, rel=1e-3), "the dense model's, routers and gates"
    assert found.shape.num_experts == 64 and found.shape.moe_layers == tuple(range(10, 30))
    text, _ = plan_command.forecast(["model=carved", f"paths.cache={tmp_path}", f"paths.results={tmp_path}", "device=cpu"])
    assert "30: 10 dense, 20 with 64 experts, 40 a token" in text and not list(tmp_path.iterdir())
    longer = config.values(["model=carved", "model.recover.steps=100"])
    once, more = (estimate.model_seconds(found, c, 1e11) for c in (config.values(["model=carved"]), longer))
    assert 0 < once < more


def test_the_recipe_is_the_model_that_gets_trained(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    recipe = config.values(["model.tokenizer.vocab_size=400"])["model"]
    small = MixtralConfig(**recipe["architecture"], vocab_size=400)
    MixtralForCausalLM(small).bfloat16().save_pretrained(tmp_path)
    expected = {name: (entry.dtype, entry.shape) for name, entry in outline.read(tmp_path, "model").tensors.items()}
    found = outline.from_recipe(recipe).tensors
    assert {name: (entry.dtype, entry.shape) for name, entry in found.items()} == expected


def test_a_local_folder(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, problems = plan_command.forecast(["model=local", f"model.path={model_folder}", "allocation.budget=0.2MiB", *SMALL])
    assert not problems and text.endswith("it fits")
    prediction = Prediction(outline.read(model_folder, "model"), config.values(SMALL)["quantization"])
    table = sizes_of(text)
    assert set(table) == {"1", "2", "3", "4", "8"}
    for width, size in table.items():
        assert size == pytest.approx(prediction.folder_bytes([[int(width)] * 4] * 2), abs=0.006 * 2**20)
    assert "pmq 0.2MiB (asked" in text and "2 with 4 experts, 2 a token" in text and "estimate" not in text
    assert not list(tmp_path.iterdir()), "nothing is written"


def test_what_the_machine_lacks(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast.limits, "memory_limit", lambda: 100 << 20)
    monkeypatch.setattr(estimate, "free_disk", lambda folder: 1 << 20)
    with pytest.raises(SystemExit) as ended:
        plan_command.main(["model=local", f"model.path={model_folder}", *SMALL])
    said = str(ended.value)
    assert said.startswith("moepress: does not fit: statistics needs ") and "this machine has 100.00MiB" in said
    assert "of disk, paths.results=results has 1.00MiB free" in said
    assert "it fits" not in capsys.readouterr().out


def test_a_budget_with_room_for_wider_experts_is_told(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["model=local", f"model.path={model_folder}", *SMALL]
    text, _ = plan_command.forecast([*given, "allocation.budget=1GiB"])
    (note,) = (line for line in text.splitlines() if "has room for experts of more than 4 bits" in line)
    wider = [word.strip("'") for word in note.split(": ")[1].split("' ")]
    text, _ = plan_command.forecast([*given, "allocation.budget=1GiB", *wider])
    assert "(asked, 8.00 bit)" in text and "has room" not in text
    tight = sizes_of(text)["4"] - 2000
    assert "has room" not in plan_command.forecast([*given, f"allocation.budget={tight}"])[0]


def test_a_text_that_the_run_would_refuse_is_refused(model_folder, text_folder):
    given = [*small_experiment(model_folder, text_folder), "calibration.num_sequences=100000"]
    with pytest.raises(ValueError, match=r"calibration\.num_sequences=100000 .* raise corpus\.fractions\.calibration"):
        plan_command.forecast(given)


def test_what_is_there_already_takes_no_time(model_folder, text_folder, tmp_path):
    given = [*small_experiment(model_folder, text_folder), f"paths.results={tmp_path}"]
    for item in dag.everything(list(studies.experiment(given).artefacts.values())).values():
        if item.stage in ("model", "statistics", "evaluation"):
            (tmp_path / item.folder).mkdir(parents=True)
    text, _ = plan_command.forecast(given)
    there = {line.split("  ")[1].strip() for line in text.splitlines() if line.endswith("there already")}
    assert there == {"model", "statistics"}, "the latency is not"


def test_a_gpu_is_what_the_model_must_fit_in(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forecast, "uses_gpu", lambda device: True)
    monkeypatch.setattr(estimate, "gpu_memory", lambda: 1 << 20)
    text, problems = plan_command.forecast(["model=local", f"model.path={model_folder}", *SMALL])
    assert "GPU memory, at the most" in text and "the GPU is faster" in text
    assert problems and all("of GPU memory, this machine has 1.00MiB" in problem for problem in problems)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=local"], r"model\.path is not set"),
        (["model=local", "model.path=/nowhere"], r"model\.path='/nowhere': no such folder"),
        (["allocation.budget=1KiB"], r"allocation\.budget=1KiB: no allocation fits; this model takes from .*MiB"),
        (["allocation=uniform", "allocation.budget=1KiB"], r"allocation\.budget=1KiB.*every expert at 1 bit"),
        (["allocation.bitz=3"], r"keys of allocation"),
        (["study=default"], r"study=default: plan takes the KEY=VALUE of one experiment"),
        (["--cfg"], r"--cfg: plan takes"),
    ],
)
def test_bad_values(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan_command.forecast(overrides)


def test_the_command(model_folder, deepseek_v3):
    small = plan("model=local", f"model.path={model_folder}", *SMALL)
    assert (small.returncode, small.stderr) == (0, "") and "it fits" in small.stdout
    refused = plan("model=local", f"model.path={model_folder}", "allocation.budget=1KiB", *SMALL)
    assert refused.returncode == 1 and refused.stderr.startswith("moepress: allocation.budget=1KiB: no allocation fits")
    assert not refused.stdout
    helped = plan("--help")
    assert helped.returncode == 0 and "moepress plan [KEY=VALUE ...]" in helped.stdout
    code = (
        "import sys; from moepress.commands import plan as plan_command;"
        f"text, _ = plan_command.forecast(['model=local', 'model.path={deepseek_v3}', 'allocation.budget=220GiB']);"
        "print(sorted({'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules))); print(text)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert done.startswith("[]\n") and "671.1B: 97.4% in routed experts" in done
    assert "estimate from the index's total size" in done


def test_a_hub_model_needs_two_files_and_a_connection(deepseek_v3, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(model_id, name, revision, local_files_only):
        asked.append((model_id, name, revision))
        if model_id == "org/missing":
            raise OSError("no route to the hub")
        return str(deepseek_v3 / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    text, problems = plan_command.forecast(["model=hub", "model.id=org/name"])
    assert asked == [("org/name", name, "main") for name in ("config.json", "model.safetensors.index.json")]
    assert text.startswith("model       org/name (deepseek_v3)") and problems
    with pytest.raises(ValueError, match=r"model\.id='org/missing'.*config\.json could not be fetched.*no route to the hub"):
        plan_command.forecast(["model=hub", "model.id=org/missing"])


def test_a_hub_model_of_one_file_is_told_by_its_header(model_folder, tmp_path, monkeypatch):
    """It has no index; the same table as from its folder."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError, RemoteEntryNotFoundError
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    for name in ("config.json", "tokenizer.json"):
        shutil.copy(model_folder / name, tmp_path)

    def download(model_id, name, revision, local_files_only):
        if name == "config.json":
            return str(tmp_path / name)
        raise RemoteEntryNotFoundError("404", response=types.SimpleNamespace(headers={}, request=None))

    def headers(model_id, revision):
        if model_id == "org/pickles":
            raise NotASafetensorsRepoError("'org/pickles' is not a safetensors repo.")
        infos = {n: TensorInfo(**e) for n, e in read_header(model_folder / "model.safetensors").items()}
        return SafetensorsRepoMetadata(None, False, {}, {"model.safetensors": SafetensorsFileMetadata({}, infos)})

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    found = forecast.read_model({"kind": "hub", "id": "org/name", "revision": "main"})
    expected = outline.read(model_folder, "model.path")
    assert {n: t.shape for n, t in found.tensors.items()} == {n: t.shape for n, t in expected.tensors.items()}
    assert (found.shape, found.nbytes, found.is_estimate) == (expected.shape, expected.nbytes, False)
    with pytest.raises(ValueError, match=r"model\.id='org/pickles' .*index\.json could not be fetched.*not a safetensors repo"):
        plan_command.forecast(["model=hub", "model.id=org/pickles"])


def test_a_16_bit_model_beyond_the_memory_is_evaluated_a_layer_at_a_time(exact_v3):
    values = config.values(["allocation.budget=220GiB"])
    large_enough, smaller = (estimate.memory(exact_v3, values, 240 << 30, "cpu", has) for has in (4 << 40, 512 << 30))
    assert large_enough["evaluation at 16 bits"] > 4 * exact_v3.num_weights > 40 * smaller["evaluation at 16 bits"]
    assert large_enough["latency"] - smaller["latency"] == 4 * exact_v3.num_weights
    assert max(smaller.values()) < 512 << 30, "so that the run fits"


def test_activations_of_linear_attention_are_counted(tmp_path):
    found = outline.read(write_zoo_model(tmp_path, "qwen3_next"), "model.path")
    keys, values, heads, H = 2 * 16, 4 * 16, 4, 64
    assert estimate.running(found) == 5 * (2 * keys + 2 * values + 2 * heads + H)
    layers = {name: entry for name, entry in found.tensors.items() if ".linear_attn." not in name}
    assert estimate.running(outline.Outline(found.config, found.shape, layers)) == 0


@pytest.mark.parametrize("method", SCHEMA["allocation"])
def test_every_allocation_is_planned(method, model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [*SMALL, "model=local", f"model.path={model_folder}", f"allocation={method}", "allocation.budget=0.2MiB"]
    text, problems = plan_command.forecast(asked)
    assert not problems and f"{method} 0.2MiB (asked" in text
    for line in ("  gradients ", "  hidden states of the gradients, while it runs "):
        assert (line in text) == (method == "global")


def test_more_work_takes_longer(model_folder):
    model = outline.read(model_folder, "model")

    def spent(*overrides):
        return estimate.seconds(model, config.values([*SMALL, *overrides]), 1e9)

    plain = spent()
    assert spent("calibration.num_sequences=640")["quantization"] > plain["quantization"]
    assert spent("quantization=gptq")["quantization"] < plain["quantization"], "no router is fitted"
    assert spent("quantization.clip_norm=2.4")["quantization"] > plain["quantization"], "torch searches, which takes longer"
    assert spent("quantization.router_when=both")["quantization"] > plain["quantization"]
    assert spent("quantization.router_loss=kl")["quantization"] > plain["quantization"]
    best, own = spent("quantization=best"), spent("quantization=best", "quantization.distill_sequences=null")
    assert best["quantization"] > own["quantization"] > plain["quantization"]
    assert spent("quantization.asymmetry=0.5")["quantization"] > plain["quantization"]
    assert spent("allocation.widths=[2,3]", "statistics.widths=[2,3]")["statistics"] < plain["statistics"]
    assert "statistics" not in spent("allocation=uniform", "allocation.bits=3"), "nothing reads them"
    assert spent("evaluation.tasks=none")["evaluation and latency"] < spent()["evaluation and latency"]
    assert set(spent("quantization=none")) == {"model", "evaluation and latency"}
    given = ["model=local", f"model.path={model_folder}", "quantization=rtn", "allocation=uniform"]
    rtn = estimate.disk(model, config.values([*SMALL, *given]), 10)
    assert rtn == {"hidden states, while it runs": 0, "packed folder": 10}


def test_finished_quantizations_correct_the_estimate(model_folder, tmp_path):
    values = config.values(SMALL)
    folders = {"model/m": None, "calibration/c": {"calibration": values["calibration"]}}
    folders["quantization/q"] = {"quantization": values["quantization"]}
    for name, described in folders.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump({"config": described}))
    (tmp_path / "model/m/reference.json").write_text(json.dumps({"path": str(model_folder)}))
    provenance = {"device": "a machine", "inputs": {"model": "m", "calibration": "c"}}
    (tmp_path / "quantization/q/provenance.json").write_text(json.dumps(provenance))
    found = []
    for seconds in (10, 20):
        (tmp_path / "quantization/q/timing.json").write_text(json.dumps({"quantize_seconds": seconds}))
        found.append(estimate.correction_from(tmp_path, 1e9, "a machine"))
    assert found[1] == pytest.approx(2 * found[0])
    assert estimate.correction_from(tmp_path, 1e9, "another machine") is None


MEASURED = {  # benchmarks/prediction.py, 2026-11-23: GFLOP/s and CPU seconds of each stage
    (1024, 2048, 4, 2, 2): {
        "statistics": (89.3, 61.3),
        "quantization": (88.0, 26.3),
        "decomposition": (89.1, 13.8),
    },
    (384, 768, 8, 2, 3): {
        "statistics": (91.7, 14.5),
        "quantization": (94.4, 7.2),
        "decomposition": (93.7, 4.4),
    },
    (512, 192, 48, 8, 2): {
        "statistics": (92.5, 15.1),
        "quantization": (79.8, 11.9),
        "decomposition": (94.5, 4.6),
    },
    (256, 512, 16, 2, 4): {
        "statistics": (92.7, 13.9),
        "quantization": (88.4, 7.8),
        "decomposition": (88.0, 3.8),
    },
    (256, 128, 64, 4, 2): {
        "statistics": (90.4, 5.7),
        "quantization": (78.6, 5.0),
        "decomposition": (90.2, 2.6),
    },
}


@pytest.mark.parametrize("shape", MEASURED)
def test_what_was_foretold_was_measured(shape):
    """The table of docs/scale.md: who changes the arithmetic measures again."""
    sizes = ("hidden_size", "intermediate_size", "num_local_experts", "num_experts_per_tok", "num_hidden_layers")
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "tie_word_embeddings": False}
    kind = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "torch_dtype": "bfloat16"}
    model = outline.from_config({**dict(zip(sizes, shape, strict=True)), **heads, **kind}, "model")
    text = ["evaluation.domains=[bible, python]", "evaluation.num_blocks=32", "evaluation.seq_len=64", "latency.repeats=0"]
    calibration = ["calibration.num_sequences=16", "calibration.seq_len=256", "quantization.group_size=64"]
    values = config.values([*SMALL, *text, *calibration, "evaluation.decomposition=true", "evaluation.tasks=none"])
    for stage, (speed, measured) in MEASURED[shape].items():
        foretold = estimate.seconds(model, values | {"model": {"kind": "local"}}, speed * 1e9)[stage]
        assert foretold - estimate.STARTUP_SECONDS == pytest.approx(measured, rel=0.25), stage


def test_test_text_is_counted_by_domain(text_folder, tmp_path):
    own = ["corpus=local", f"corpus.path={text_folder}", "evaluation.num_blocks=4"]
    assert work.num_blocks(config.values(own)) == 8, "a folder a domain"
    assert work.num_blocks(config.values([*own, "evaluation.domains=[odd]"])) == 4
    assert work.num_blocks(config.values([*own, f"corpus.path={tmp_path / 'nothing'}"])) == 4, "nobody knows yet"
    assert work.num_blocks(config.values(["evaluation.num_blocks=4", "evaluation.domains=null"])) > 8


def test_task_tokens_follow_tasks_limit_and_examples():
    def tokens(*overrides):
        return work.task_tokens(config.values(list(overrides))["evaluation"])

    assert tokens("evaluation.tasks=none") == 0
    assert tokens("evaluation.tasks=[piqa]") == 1838 * 67 and tokens("evaluation.tasks=[piqa]", "evaluation.limit=100") == 6700
    assert tokens("evaluation.tasks=mmlu") == 6 * 14042 * 122
    assert (
        tokens("evaluation.tasks=[mmlu_anatomy]") == 14042 // 57 * 122 and tokens("evaluation.tasks=[mmlu_stem]") > 4000 * 122
    )
    assert tokens("evaluation.tasks=[gsm8k]", "evaluation.source=hub") == 0, "not known before"
    assert 0 < tokens("evaluation.tasks=quick", "evaluation.limit=50") < tokens() == tokens("evaluation.limit=1000")


def test_fitted_policies_decomposition_and_divergence_are_counted(model_folder):
    model = outline.read(model_folder, "model")

    def planned(*overrides):
        values = config.values([*SMALL, *overrides])
        return estimate.seconds(model, values, 1e9), estimate.memory(model, values, 1 << 20, "cpu", 8 << 30)

    for found in planned():
        assert not {"pruning", "divergence", "decomposition"} & set(found)
    for found in planned("pruning=odp"):
        assert found["pruning"] > 0 and "decomposition" not in found
    for found in planned("evaluation.decomposition=true"):
        assert found["decomposition"] > 0 and "pruning" not in found
    for found in planned("evaluation.divergence=true"):
        assert found["divergence"] > 0 and "decomposition" not in found
    assert all("divergence" not in found for found in planned("quantization=none", "evaluation.divergence=true"))
    assert all("pruning" not in found for found in planned("pruning=pesf")), "nothing is fitted"
    fixed = estimate.STARTUP_SECONDS + estimate.FOLDER_SECONDS
    once = planned("pruning=odp", "pruning.threshold=0.3")[0]["pruning"] - fixed
    twice = planned("pruning=odp")[0]["pruning"] - fixed
    assert twice == pytest.approx(2 * once)


def test_memory_that_jobs_ask_for(model_folder, tmp_path, monkeypatch):
    """The plan's own figure and a half more, again as much at each attempt; never less than torch takes."""
    monkeypatch.chdir(tmp_path)
    given = ["model=local", f"model.path={model_folder}", *SMALL]
    values = config.values([*given, "allocation.budget=0.2MiB"])
    assert planning.memory_mb("statistics", values) == planning.memory_mb("corpus", values) == planning.LEAST_MEMORY_MB
    monkeypatch.setattr(estimate, "LIBRARY_BYTES", 20 << 30)
    assert 30 << 10 <= planning.memory_mb("statistics", values) < 31 << 10
    assert planning.memory_mb("statistics_block", values) == planning.memory_mb("statistics", values)
    absent = config.values([*SMALL]) | {"model": {"kind": "local", "path": str(tmp_path / "nothing")}}
    assert planning.memory_mb("evaluation", absent) == planning.SOME_MEMORY_MB


def test_memory_is_told_once_a_job(model_folder, text_folder, tmp_path, monkeypatch):
    planned = planning.for_overrides([*small_experiment(model_folder, text_folder), f"paths.results={tmp_path}"])
    told = []
    monkeypatch.setattr(planning, "memory_mb", lambda stage, config: told.append(stage) or 100)
    (folder,) = (folder for folder, item in planned.artefacts.items() if item.stage == "statistics")
    job, another = (types.SimpleNamespace(id=name) for name in (folder.split("/")[1], "another-plan's"))
    wanted = planned.memory("statistics")
    assert [wanted(job, 1), wanted(job, 2), wanted(another, 1)] == [100, 200, planning.SOME_MEMORY_MB]
    assert told == ["statistics"]


def test_memory_of_jobs_and_before_a_run_needs_no_network(monkeypatch):
    import huggingface_hub

    def download(model_id, name, revision, local_files_only):
        assert local_files_only
        raise FileNotFoundError(f"no {name} here")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    hub = config.values([*SMALL, "model=hub", "model.id=a/b"])
    assert planning.memory_mb("evaluation", hub) == planning.SOME_MEMORY_MB
    forecast.check_memory(config.values(["model=hub", "model.id=a/b"]))


def test_a_model_that_is_carved_asks_for_the_gpu(tmp_path):
    for model, device, gpus in (("carved", "cuda", 1), ("tiny", "cuda", 0), ("carved", "cpu", 0)):
        overrides = [f"model={model}", f"device={device}", "latency.repeats=0", f"paths.results={tmp_path}"]
        planned = planning.for_overrides(overrides)
        (folder,) = (folder for folder, item in planned.artefacts.items() if item.stage == "model")
        assert planned.gpus_of_model(types.SimpleNamespace(id=folder.split("/")[1])) == gpus
    assert planned.gpus_of_model(types.SimpleNamespace(id="another-plan's")) == 0


def test_all_cores_inside_a_slurm_job(monkeypatch):
    workflow = types.SimpleNamespace(cores=16)
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert planning.all_cores(workflow) == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "4")
    assert planning.all_cores(workflow) == 4


def test_memory_limit_is_the_least_of_all_groups_above(tmp_path):
    own, groups = tmp_path / "cgroup", tmp_path / "groups"
    machine = limits.memory_limit(groups, own)
    own.write_text("0::/job/step\n")
    (groups / "job" / "step").mkdir(parents=True)
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    assert limits.memory_limit(groups, own) == machine
    (groups / "job" / "memory.max").write_text("1000000\n")
    assert limits.memory_limit(groups, own) == 1000000
    own.write_text("4:memory:/job\n0::/\n")  # the older kind
    (groups / "memory" / "job").mkdir(parents=True)
    (groups / "memory" / "job" / "memory.limit_in_bytes").write_text("2000000\n")
    assert limits.memory_limit(groups, own) == 2000000


def test_free_memory_is_what_every_group_has_left(tmp_path):
    """What it uses counts, but for files that were read and can be dropped."""
    own, groups = tmp_path / "cgroup", tmp_path / "groups"

    def write(place, **files):
        place.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (place / f"memory.{name}").write_text(f"{text}\n")

    own.write_text("0::/job/step\n")
    write(groups / "job", max=9000, current=5000, stat="anon 1000\ninactive_file 2000\nactive_file 2000")
    write(groups / "job" / "step", max="max", current=4000)
    assert limits.free_memory(groups, own) == 9000 - (5000 - 2000)
    write(groups / "job" / "step", max=4500)
    assert limits.free_memory(groups, own) == 500
    own.write_text("4:memory:/job\n0::/\n")  # the older kind
    stat = "inactive_file 1\ntotal_inactive_file 300"
    write(groups / "memory" / "job", limit_in_bytes=2000, usage_in_bytes=1000, stat=stat)
    assert limits.free_memory(groups, own) == 1300
    write(groups / "memory" / "job", usage_in_bytes=2400, stat="")
    assert limits.free_memory(groups, own) == 0


def test_each_artefact_is_planned_by_an_experiment_that_needs_it(model_folder, text_folder, tmp_path):
    """Its configuration is that experiment's, not that of the 16-bit model that stands first in the table."""
    given = [
        *small_experiment(model_folder, text_folder),
        f"paths.results={tmp_path}",
        "allocation=pmq",
        "allocation.bits=2.5",
    ]
    planned = planning.for_overrides(given)
    method = {item.stage: planned.configs[folder]["quantization"]["method"] for folder, item in planned.artefacts.items()}
    assert method["statistics"] == method["allocation"] == method["quantization"] == "qesc"
    assert set(planned.configs) == set(planned.artefacts)
    sixteen = studies.experiment([*given, "quantization=none", "pruning=none"])
    late = planning.for_experiments([studies.experiment(given), sixteen])
    assert late.configs[sixteen.artefacts["evaluation"].folder]["quantization"]["method"] == "none", "in whatever order"
