"""Every family: the walk is the model, the chain ends in a checkpoint that loads as what was measured."""

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import bytes_outside_experts
from moepress import allocation
from moepress.composing import ROOT
from moepress.inference.checkpoint import load_model
from moepress.models import families, folders
from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams
from moepress.pruning.policy import attach, experts_of
from moepress.quantization import distilling, size, writer
from moepress.quantization.experts import Recipe
from moepress.quantization.layers import quantize_model
from moepress.statistics import layer_statistics
from zoo import ZOO, plain_deepseek, write_zoo_model

TOKENS = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(0))
GRID = {"group_size": 32, "clip_min": 0.5, "clip_steps": 2, "fit_rounds": 1, "damping": 0.01, "block_size": 32}
QUANTIZATION = {
    "method": "qesc",
    **GRID,
    "attention_bits": 4,
    "shared_bits": 4,
    "router_candidates": None,
    "router_ridge": 0.01,
}
PMQ = {"method": "pmq", "bits": 2.5, "budget": None, "widths": [2, 3, 4], "keep": [2, 3], "weights": "renormalized"}
PMQ |= {"frequency_exponent": 1.0, "weight_exponent": 1.0, "error_exponent": 2.0, "errors": "quantizer"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Family -> its model's folder, written once."""
    written = {}

    def folder(family):
        if family not in written:
            written[family] = write_zoo_model(tmp_path_factory.mktemp(family), family)
        return written[family]

    return folder


def test_the_zoo_and_the_documentation_are_complete():
    assert set(ZOO) == set(families.HANDLED)
    told = (ROOT / "docs" / "families.md").read_text()
    assert not [family for family in families.HANDLED if f"| `{family}` |" not in told], "a row for each"


def test_other_scores_than_the_familys_are_refused_where_config_json_tells_them(zoo):
    config = json.loads((zoo("cohere2_moe") / "config.json").read_text())
    assert families.shape_of(config, "model.path").num_experts == 8
    with pytest.raises(ValueError, match="expert_selection_fn='softmax'; of this type 'sigmoid' is handled"):
        families.shape_of(config | {"expert_selection_fn": "softmax"}, "model.path")


def test_a_name_on_disk_that_no_rename_meets_is_told_beside_the_missing_one(zoo, monkeypatch):
    bare = dataclasses.replace(families.FAMILIES["ernie4_5_moe"], renames=())
    monkeypatch.setitem(families.FAMILIES, "ernie4_5_moe", bare)
    own = r"lacks the tensor .*1\.mlp\.gate\.moe_statics\.e_.*; it has the unknown tensor .*1\.mlp\.moe_statics\.e_"
    with pytest.raises(ValueError, match=own):
        list(ModelStream(zoo("ernie4_5_moe")).check())


@pytest.mark.parametrize("family", ZOO)
def test_names_and_shapes_of_every_tensor_are_what_the_configuration_says(zoo, family):
    assert len(list(ModelStream(zoo(family)).check())) == 3
    experts = ModelStream(zoo(family)).shape.num_experts
    assert experts <= 8, f"{experts} experts are transformers' default: CONFIGS has the number under a key that it passes over"
    stream = ModelStream(zoo(family))
    name = max(name for name, entry in stream.entries.items() if name.startswith("model.layers.1.") and entry.path)
    del stream.entries[name]
    with pytest.raises(ValueError, match="lacks"):
        list(stream.check())


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("family", ZOO)
def test_the_walk_is_the_model(zoo, family):
    """Our residual, block input and (hidden, top_k_index, top_k_weights) reproduce every layer of transformers' own forward."""
    model = load_model(zoo(family), "cpu", torch.float32)
    stream = ModelStream(zoo(family))
    inputs, outputs, triples = [], [], []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        layer.register_forward_hook(lambda _, __, out: outputs.append(out))
    for experts in experts_of(model):
        experts.register_forward_hook(lambda _, args, out: triples.append((*args, out)))
    model(TOKENS)
    x = stream.embed(TOKENS)
    for index, layer in stream.layers():
        assert torch.allclose(x, inputs[index], atol=1e-5, rtol=1e-4)
        residual, m = stream.attend(index, layer, x)
        if index in stream.shape.moe_layers:
            hidden, indices, _, expected = triples.pop(0)
            routing = stream.route(layer, m)
            assert torch.allclose(m.flatten(0, 1), hidden, atol=1e-4, rtol=1e-4)
            assert torch.equal(routing.indices.sort(-1).values, indices.sort(-1).values)
            experts = layer.get_submodule(stream.family.experts)
            ours = experts(m.flatten(0, 1), routing.indices, routing.weights)
            assert torch.allclose(ours, expected, atol=1e-4, rtol=1e-3)
            scores = stream.selection_scores(layer, routing.logits)
            best = (routing.indices == scores.argmax(-1, keepdim=True)).any(-1).float().mean()
            by_group = stream.family.correction and getattr(stream.config, "n_group", 1) > 1
            assert best == 1 or (by_group and best > 0.7), "the choice goes by other scores: see Family.scores and .correction"
        x = stream.add_block(layer, residual, m)
        assert torch.allclose(x, outputs[index], atol=1e-4, rtol=1e-3)
    assert not triples, "no MoE layer is passed over"


def off_by(loaded, measured):
    """About 1e-5 is another order of sums (a layer that adds more than attention and block); more is another model."""
    return f"the packed model is what was measured, to the bit; off by {(loaded - measured).abs().max():.1e}"


@torch.inference_mode()
@pytest.mark.parametrize("family", ZOO)
def test_the_chain(zoo, family, tmp_path):
    """Statistics, allocation, QESC, packing, loading and PESF: what loads is what the quantization went on with."""
    stream = ModelStream(zoo(family))
    recipe = Recipe(**QUANTIZATION)
    streams = Streams(tmp_path / "streams", ("x",), (*TOKENS.shape, stream.shape.hidden_size))
    stream.embed(TOKENS, streams["x"])
    statistics = []
    for index, layer in stream.layers():
        found = layer_statistics(stream, index, layer, streams, recipe, [2, 3, 4], ["a"] * 5, "routed")
        streams.advance()
        statistics += [found] if found else []
    shape = stream.shape
    assert [layer["layer"] for layer in statistics] == list(shape.moe_layers)
    total = 2.5 * shape.num_experts * len(shape.moe_layers)
    sizes, measured = {width: width for width in PMQ["widths"]}, {"widths": [2, 3, 4], "layers": statistics}
    bits, _ = allocation.allocate(PMQ, len(shape.moe_layers), shape.num_experts, sizes, total, measured)

    out = tmp_path / "packed"
    out.mkdir()
    stream, modules = ModelStream(zoo(family)), {}
    for result in quantize_model(stream, TOKENS, bits, recipe, tmp_path / "hidden"):
        writer.write_shard(out, result.index, shape.num_layers, result.tensors)
        modules |= result.modules
    writer.finish(out, stream, recipe.group_size, modules)
    last = Streams(tmp_path / "hidden", ("x", "x_hat"), (*TOKENS.shape, shape.hidden_size))
    model = load_model(out, "cpu", torch.float32)
    seen = []
    model.model.get_submodule(stream.family.norm).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(TOKENS)
    assert torch.equal(seen[0], last["x_hat"]), off_by(seen[0], last["x_hat"])
    original = load_model(zoo(family), "cpu", torch.float32)
    original.model.get_submodule(stream.family.norm).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    original(TOKENS)
    assert torch.allclose(seen[1], last["x"], atol=1e-3, rtol=1e-3)

    tensors = folders.tensors(zoo(family))
    predicted = bytes_outside_experts(shape, tensors, QUANTIZATION)
    predicted += sum(size.expert_bytes(shape, width, 32) for layer in bits for width in layer)
    stored = [tensor for path in out.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(tensor.nbytes for tensor in stored) == predicted
    linears = {n for n, m in original.named_modules() if isinstance(m, torch.nn.Linear) and n.startswith("model.layers.")}
    kept = linears - set(modules)
    assert all(
        name.endswith(("gate", "gate.wg", "router", "shared_expert_gate", "in_proj_ba", "in_proj_a", "in_proj_b"))
        for name in kept
    ), kept

    for checkpoint in (model, original):
        plain = checkpoint(TOKENS).logits
        policy = attach(checkpoint, {"method": "pesf", "alpha": 0.9, "renormalize": True})
        pruned = checkpoint(TOKENS).logits
        assert pruned.isfinite().all() and not torch.allclose(pruned, plain)
        policy.remove()
        assert torch.equal(checkpoint(TOKENS).logits, plain)


@torch.inference_mode()
def test_first_generation_deepseek_against_plain_torch(zoo):
    model = load_model(zoo("deepseek"), "cpu", torch.float32)
    assert torch.allclose(model(TOKENS).logits, plain_deepseek(zoo("deepseek"))(TOKENS).logits, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_text_model_is_read_out_of_a_larger_one(zoo, tmp_path):
    """The same tensors and logits as of the text model alone, whose experts lie one by one; nothing of what sees pictures."""
    models = {family: load_model(zoo(family))(TOKENS).logits for family in ("qwen3_5_moe", "qwen3_5_moe_text")}
    assert torch.equal(*models.values())
    sizes = [folders.num_weights(zoo(family)) for family in models]
    assert sizes[0] == sizes[1]
    config = json.loads((zoo("qwen3_5_moe") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(ValueError, match=r"model\.path: config\.json lacks text_config"):
        folders.read_shape(tmp_path, "model.path")


def test_groups_that_fit_no_row_are_refused():
    shape = families.Shape("mixtral", 2, 192, 100, 4, 2, (0, 1))
    assert families.group_of(192, 128) == 64
    with pytest.raises(ValueError, match=r"group_size=128 shares no divisor of 8 .* intermediate_size=100; take 200, which"):
        families.check_group_size(shape, 128)
    families.check_group_size(shape, 200)


def test_an_unknown_family_is_refused_by_name(zoo, tmp_path):
    config = json.loads((zoo("mixtral") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "jetmoe"}))
    with pytest.raises(ValueError, match=r"model\.path: model type 'jetmoe' is not .*deepseek_v3.*mixtral"):
        folders.read_shape(tmp_path, "model.path")


def write_float8(source, out):
    """DeepSeek-V3's form: linears, here the head too, in float8, a scale for each (small) block; and the 16-bit twin."""
    tensors, stored, dense = load_file(source / "model.safetensors"), {}, {}
    for name, tensor in tensors.items():
        stored[name] = dense[name] = tensor
        if tensor.ndim == 2 and name.startswith(("model.layers.", "lm_head.")) and not name.endswith("mlp.gate.weight"):
            rows, columns = (range(0, size, step) for size, step in zip(tensor.shape, (32, 16), strict=True))
            stored[name] = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"], dense[name] = torch.empty(len(rows), len(columns)), torch.empty_like(tensor)
            for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
                block = slice(row, row + 32), slice(column, column + 16)
                scale = tensor[block].float().abs().amax() / 448
                stored[f"{name}_scale_inv"][i, j], stored[name][block] = scale, (tensor[block].float() / scale).to(stored[name])
                dense[name][block] = (stored[name][block].float() * scale).bfloat16()
    return stored, dense, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16]}


def write_mxfp4(source, out):
    """gpt-oss's form: experts in 4 bits. Returns the 16-bit twin, made by transformers' own conversion."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors, g = load_file(source / "model.safetensors"), torch.Generator().manual_seed(0)
    stored, dense = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj")) and "experts" in name]:
        E, columns, rows = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(0, 256, (E, rows, columns // 32, 16), generator=g, dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(122, 126, (E, rows, columns // 32), generator=g, dtype=torch.uint8)
        dense[name] = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"]).contiguous()
        assert dense[name].shape == (E, columns, rows)
    return stored, dense, {"quant_method": "mxfp4"}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("family", "write", "said"),
    [
        ("deepseek_v3", write_float8, {}),
        ("minimax_m2", write_float8, {"fmt": "float8_e4m3fn"}),
        ("gpt_oss", write_mxfp4, {}),
    ],
)
def test_published_in_fewer_bits(zoo, tmp_path, family, write, said):
    """Read as the 16-bit model it stands for: the same walk, the same logits, the same packed bytes as from the dense twin."""
    config = json.loads((zoo(family) / "config.json").read_text())
    stored, dense, quantization = write(zoo(family), tmp_path)
    places = {}
    for kind, tensors in (("low", stored), ("dense", dense)):
        places[kind] = tmp_path / kind
        places[kind].mkdir()
        save_file(tensors, places[kind] / "model.safetensors", {"format": "pt"})
        extra = {"quantization_config": quantization | said} if kind == "low" else {}
        (places[kind] / "config.json").write_text(json.dumps(config | extra))
    logits = {kind: load_model(folder)(TOKENS).logits for kind, folder in places.items()}
    assert torch.equal(logits["low"], logits["dense"])
    shape = folders.read_shape(places["low"], "model.path")
    bits = [[2] * shape.num_experts for _ in shape.moe_layers]
    packed = {k: list(quantize_model(ModelStream(f), TOKENS, bits, Recipe(**QUANTIZATION))) for k, f in places.items()}
    for low, full in zip(packed["low"], packed["dense"], strict=True):
        assert low.tensors.keys() == full.tensors.keys()
        assert all(torch.equal(low.tensors[name], full.tensors[name]) for name in full.tensors)
    low, full = (writer.outside_layers(ModelStream(folder)) for folder in places.values())
    assert low.keys() == full.keys() and all(torch.equal(low[name], full[name]) for name in full)
    sizes = [folders.num_weights(folder) for folder in places.values()]
    assert sizes[0] == sizes[1]


def test_what_is_read_of_float8(zoo, tmp_path):
    """transformers' own configuration says no `fmt`; other floats, and a scale for a whole matrix, are not read."""
    config = json.loads((zoo("minimax_m2") / "config.json").read_text())
    for said, is_read in (({}, True), ({"fmt": "e5m2"}, False), ({"weight_block_size": None}, False)):
        quantized = {"quant_method": "fp8", "weight_block_size": [128, 128]} | said
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
        if is_read:
            folders.read_config(tmp_path, "model.path")
            continue
        with pytest.raises(ValueError, match=r"already quantized \(quant_method 'fp8'\)"):
            folders.read_config(tmp_path, "model.path")


@pytest.mark.parametrize("family", ZOO)
def test_tuning_knows_every_family(zoo, family, tmp_path):
    """Asymmetric targets, refinement, layers tuned with norms and routers, the packed model tuned as a whole."""
    more = {"asymmetry": 0.5, "refine_rounds": 1, "tune_steps": 2, "tune_tokens": 48, "tune_rate": 0.005, "tune_rest": True}
    stream, out, modules = ModelStream(zoo(family)), tmp_path / "packed", {}
    out.mkdir()
    bits = [[2] * stream.shape.num_experts for _ in stream.shape.moe_layers]
    for result in quantize_model(stream, TOKENS, bits, Recipe(**QUANTIZATION, **more), tmp_path / "hidden"):
        writer.write_shard(out, result.index, stream.shape.num_layers, result.tensors)
        modules |= result.modules
        assert result.diagnostics["output_error"] < 1
    writer.finish(out, stream, QUANTIZATION["group_size"], modules)
    x = Streams(tmp_path / "hidden", ("x",), (*TOKENS.shape, stream.shape.hidden_size))["x"]
    tuned, losses, _ = distilling.distill(out, stream, x, TOKENS, 2, 48, 0.005)
    routers = [name for name in tuned if name.endswith(f".{stream.family.router_path}.{stream.family.router_weight}")]
    assert len(routers) == len(stream.shape.moe_layers) and all(0 <= loss < 5 for loss in losses)
    before = load_model(out, "cpu", torch.float32)(TOKENS).logits
    distilling.replace(out, tuned)
    assert not torch.equal(load_model(out, "cpu", torch.float32)(TOKENS).logits, before)
