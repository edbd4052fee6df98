"""Sizes before and after: what is predicted of a packed checkpoint is what gets written and what gets loaded."""

import json

import pytest
import torch
import yaml

from conftest import bytes_outside_experts, write_model
from moepress.artefacts import run_stage
from moepress.inference.checkpoint import load_model
from moepress.latency.traffic import weight_bytes
from moepress.models import files, outline
from moepress.models.streaming import ModelStream
from moepress.quantization import writer
from moepress.quantization.budget import Prediction, plan_budget, unpacked_bytes
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import quantize_model
from moepress.quantization.size import expert_bytes
from moepress.schema.values import parse_bytes
from zoo import COMMON, ZOO, write_zoo_model

RTN = {"method": "rtn", "group_size": 32, "clip_min": 1.0, "clip_steps": 1, "fit_rounds": 0}
RTN |= {"attention_bits": 4, "shared_bits": 3}


def written(model_folder, out, quantization, bits=None):
    """A packed folder, what was predicted of it, and its experts' bits: widths 1, 2, 3, 4, 8 in turn."""
    model = outline.read(model_folder, "model")
    stream = ModelStream(model_folder)
    if bits is None:
        widths = [(1, 2, 3, 4, 8)[e % 5] for e in range(model.shape.num_experts)]
        bits = [widths[layer:] + widths[:layer] for layer, _ in enumerate(model.shape.moe_layers)]
    out.mkdir()
    modules = {}
    for result in quantize_model(stream, None, bits, Recipe(**quantization)):
        writer.write_shard(out, result.index, model.shape.num_layers, result.tensors)
        modules |= result.modules
    writer.finish(out, stream, quantization["group_size"], modules)
    return Prediction(model, quantization), bits


def check_folder(out, prediction, bits):
    """Every tensor by name, type and shape; every shard to the byte; the other files within a hundredth of the whole."""
    shards = prediction.shards(bits)
    for index, shard in enumerate(shards):
        header = files.read_header(out / writer.shard_name(index, len(shards) - 1))
        found = {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        assert found == {name: (entry.dtype, entry.shape) for name, entry in shard.items()}
    on_disk = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert prediction.weight_bytes(bits) == on_disk
    everything = sum(path.stat().st_size for path in out.iterdir())
    assert prediction.folder_bytes(bits) - prediction.record_bytes() == pytest.approx(everything, rel=0.01)


@pytest.mark.parametrize("family", ZOO)
def test_the_folder_and_the_loaded_model(family, tmp_path):
    quantization = RTN if family != "olmoe" else RTN | {"attention_bits": None, "shared_bits": None}
    folder = write_zoo_model(tmp_path / "model", family)
    prediction, bits = written(folder, tmp_path / "packed", quantization)
    check_folder(tmp_path / "packed", prediction, bits)
    original = outline.read(folder, "model")
    for device, dtype in (("cpu", torch.float32), ("cuda", "auto")):  # as `load` picks them; no GPU is needed to count
        packed = weight_bytes(load_model(tmp_path / "packed", "cpu", dtype))
        assert prediction.loaded_bytes(bits, device) == pytest.approx(packed, rel=0.01), device
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        assert unpacked_bytes(original, device) == pytest.approx(weight_bytes(load_model(folder, "cpu", dtype)), rel=0.01)


def test_tied_embeddings_count_once(tmp_path, monkeypatch):
    monkeypatch.setitem(COMMON, "tie_word_embeddings", True)
    folder = write_zoo_model(tmp_path / "model", "qwen2_moe")
    assert "lm_head.weight" not in files.entries(folder)
    prediction, bits = written(folder, tmp_path / "packed", RTN)
    check_folder(tmp_path / "packed", prediction, bits)
    loaded = weight_bytes(load_model(tmp_path / "packed", "cpu", torch.float32))
    assert prediction.loaded_bytes(bits, "cpu") == pytest.approx(loaded, rel=0.01)
    head = 4 * COMMON["vocab_size"] * COMMON["hidden_size"]
    assert head > 0.1 * loaded, "counted twice it would be seen"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model large enough that the records beside its weights are a hundredth."""
    return write_model(tmp_path_factory.mktemp("wide"), hidden=256, intermediate=256)


def staged(wide, results, allocation, budget=None):
    """The folders of allocation and quantization as the stages leave them."""
    runtime = {"device": "cpu", "cache": str(results), "model_path": str(wide), "corpus_path": None}
    sizes = {name: RTN[name] for name in ("group_size", "attention_bits", "shared_bits")}
    configs = {
        "model": ({"model": {"kind": "local"}}, {}),
        "allocation": ({"allocation": allocation, "quantization": sizes}, {"model": "model/m"}),
        "quantization": ({"quantization": RTN}, {"model": "model/m", "allocation": "allocation/a"}),
    }
    for stage, (config, inputs) in configs.items():
        task = {"stage": stage, "key": "0" * 12, "config": config, "inputs": inputs, "runtime": runtime}
        (results / f"{stage}.yaml").write_text(yaml.safe_dump(task))
        run_stage(results / f"{stage}.yaml", results / stage / stage[0])
    return results / "allocation/a", results / "quantization/q"


def test_the_stages_say_it_before_and_measure_it_after(wide, tmp_path):
    budget = "1.2MiB"
    allocation, out = staged(wide, tmp_path, {"method": "uniform", "bits": 3.0, "budget": budget})
    said = json.loads((allocation / "allocation.json").read_text())
    size = json.loads((out / "size.json").read_text())
    everything = sum(path.stat().st_size for path in out.iterdir())
    assert said["predicted_folder_bytes"] == pytest.approx(everything, rel=0.01)
    assert size["folder_bytes"] == pytest.approx(everything, rel=0.01)
    assert size["checkpoint_bytes"] == said["predicted_bytes"]
    assert everything <= parse_bytes(budget)
    wider = [[{1: 2, 2: 3, 3: 4, 4: 8}[said["bits"][0][0]]] * 4] * 2
    assert Prediction(outline.read(wide, "model"), RTN).folder_bytes(wider) > parse_bytes(budget), "the widest that fits"
    loaded = weight_bytes(load_model(out, "cpu", torch.float32))
    assert said["predicted_loaded_bytes"]["cpu"] == pytest.approx(loaded, rel=0.01)


@pytest.mark.parametrize("method", ["uniform", "pmq"])
def test_a_budget_is_a_bound_on_the_folder_and_says_what_can_be_met(wide, method):
    prediction = Prediction(outline.read(wide, "model"), RTN)
    allocation = {"method": method, "bits": 3.0, "budget": "1KiB"} | (
        {"widths": [1, 2, 3, 4], "keep": [2, 3]} if method == "pmq" else {}
    )
    least = [[1] * 4] * 2 if method == "uniform" else [[1, 1, 2, 3]] * 2
    with pytest.raises(ValueError, match=r"allocation\.budget=1KiB: no allocation fits; .*from [\d.]+MiB") as error:
        plan_budget(allocation, prediction)
    assert ("every expert at 1 bit" if method == "uniform" else "allocation.keep=[2, 3]") in str(error.value)
    smallest = str(error.value).split("from ")[1].split(" ")[0]
    assert 0 <= parse_bytes(smallest) - prediction.folder_bytes(least) < 0.011 * 2**20

    sizes, total = plan_budget(allocation | {"budget": smallest}, prediction)  # the budget that was named can be met
    assert total >= sum(sizes[width] for layer in least for width in layer)
    below = prediction.folder_bytes(least) - 100
    with pytest.raises(ValueError, match=rf"allocation\.budget={below} bytes: no allocation fits"):
        plan_budget(allocation | {"budget": str(below)}, prediction)


def test_the_listing_agrees_with_the_sums(wide):
    model = outline.read(wide, "model")
    bits = [[1, 2, 4, 8], [3, 3, 3, 3]]
    total = sum(entry.nbytes for shard in Prediction(model, RTN).shards(bits) for entry in shard.values())
    experts = sum(expert_bytes(model.shape, width, 32) for layer in bits for width in layer)
    assert total == bytes_outside_experts(model.shape, model.tensors, RTN) + experts
