"""The layer loop and the packed checkpoint: what was measured is what loads."""

from dataclasses import replace
from itertools import accumulate

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import bytes_outside_experts, write_model
from moepress import config
from moepress.inference.checkpoint import load
from moepress.models import folders, streaming
from moepress.models.limits import DIAGNOSED
from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams
from moepress.quantization import size, writer
from moepress.quantization.experts import ExpertInputs, Recipe
from moepress.quantization.layers import STREAMS, LayerQuantizer, quantize_model
from moepress.quantization.packing import unpack
from zoo import write_zoo_model

COMMON = {"group_size": 32, "clip_min": 0.25, "clip_steps": 8, "fit_rounds": 2, "attention_bits": 4}
FEEDBACK = {"damping": 0.01, "block_size": 16}
RECIPES = {
    "rtn": Recipe("rtn", **COMMON),
    "gptq": Recipe("gptq", **COMMON, **FEEDBACK),
    "qesc": Recipe("qesc", **COMMON, **FEEDBACK, router_ridge=0.01),
}
TOKENS = torch.randint(1, 250, (6, 48), generator=torch.Generator().manual_seed(0))


def compress(folder, out, recipe, bits):
    stream = ModelStream(folder)
    modules, tokens = {}, None if recipe.method == "rtn" else TOKENS
    for result in quantize_model(stream, tokens, bits, recipe, out / "streams"):
        writer.write_shard(out, result.index, stream.shape.num_layers, result.tensors)
        modules.update(result.modules)
    writer.finish(out, stream, recipe.group_size, modules)
    return Streams(out / "streams", STREAMS, (*TOKENS.shape, stream.shape.hidden_size)) if tokens is not None else None


@pytest.mark.parametrize("method, step", [("gptq", DIAGNOSED), ("qesc", 1)])
def test_diagnostics_are_what_the_two_models_show(model_folder, tmp_path, method, step):
    """The last layer's error and changed selections, from forward passes of the two models on the followed sequences."""
    stream, modules = ModelStream(model_folder), {}
    for result in quantize_model(stream, TOKENS, [[2, 2, 3, 3]] * 2, RECIPES[method]):
        writer.write_shard(tmp_path, result.index, stream.shape.num_layers, result.tensors)
        modules.update(result.modules)
    writer.finish(tmp_path, stream, RECIPES[method].group_size, modules)
    outputs, chosen = [], []
    for folder in (model_folder, tmp_path):
        model, _ = load(folder, "cpu")
        last = model.model.layers[-1]
        last.register_forward_hook(lambda _, __, output: outputs.append(output))
        last.mlp.gate.register_forward_hook(lambda _, __, output: chosen.append(output[0].topk(2).indices))
        with torch.inference_mode():
            model(TOKENS[::step])
    (x, x_hat), (before, after) = outputs, chosen
    error = (x_hat - x).square().sum() / x.square().sum()
    changed = sum(len(set(a.tolist()) - set(b.tolist())) for a, b in zip(after, before, strict=True)) / after.numel()
    assert result.diagnostics["output_error"] == pytest.approx(error.item(), rel=1e-3)
    assert result.diagnostics["selection_shift"] == pytest.approx(changed, abs=1e-6) and changed > 0


@pytest.mark.parametrize("method", RECIPES)
def test_what_was_measured_is_what_loads(model_folder, tmp_path, method):
    bits = [[1, 2, 3, 4], [8, 3, 3, 2]]
    last = compress(model_folder, tmp_path, RECIPES[method], bits)
    model, _ = load(tmp_path, "cpu")
    with torch.inference_mode():
        hidden = model.model(TOKENS).last_hidden_state
        if last:
            assert torch.equal(hidden, model.model.norm(last["x_hat"]))
    original, _ = load(model_folder, "cpu")
    with torch.inference_mode():
        if last:
            followed = slice(None, None, 1 if method == "qesc" else DIAGNOSED)
            hidden = original.model(TOKENS[followed]).last_hidden_state
            assert torch.allclose(hidden, original.model.norm(last["x"][followed]), atol=1e-4)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert experts.gate_up.bits == bits[1] and experts.gate_up.codes.dtype == torch.uint8
    assert experts.gate_up.scales.dtype == torch.float16


def test_every_quantized_weight_occupies_its_bits(model_folder, tmp_path):
    bits = [[1, 2, 3, 4], [2, 2, 3, 3]]
    compress(model_folder, tmp_path, RECIPES["rtn"], bits)
    shape = ModelStream(model_folder).shape
    outside = bytes_outside_experts(shape, folders.tensors(model_folder), {"attention_bits": 4, "group_size": 32})
    predicted = outside + sum(size.expert_bytes(shape, b, 32) for layer in bits for b in layer)
    tensors = {k: t for path in tmp_path.glob("*.safetensors") for k, t in load_file(path).items()}
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == predicted


def test_packed_experts_are_the_unpacked_ones(model_folder, tmp_path):
    """The packed module against transformers' own on the dequantized weights, with and without "no expert"."""
    compress(model_folder, tmp_path, RECIPES["rtn"], [[1, 2, 3, 4]] * 2)
    packed = load(tmp_path, "cpu")[0].get_submodule("model.layers.0.mlp.experts")
    original = load(model_folder, "cpu")[0]
    original.set_experts_implementation("eager")
    plain = original.get_submodule("model.layers.0.mlp.experts")
    with torch.inference_mode():
        for name in ("gate_up", "down"):
            weights = torch.stack([getattr(packed, name).matrix(e, torch.float32) for e in range(4)])
            getattr(plain, f"{name}_proj").copy_(weights)
        g = torch.Generator().manual_seed(1)
        for tokens in (1, 2, 33):
            x = torch.randn(tokens, 64, generator=g)
            index = torch.stack([torch.randperm(5, generator=g)[:2] for _ in range(tokens)])
            weight = torch.rand(tokens, 2, generator=g) * (index < 4)
            assert torch.allclose(packed(x, index, weight), plain(x, index, weight), atol=1e-4)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_one_expert_at_a_time_is_all_at_once(model_folder, monkeypatch, method):
    """As in a model of which no two experts' curvatures fit in the workspace; every expert has its own width."""
    bits, tokens = [[1, 2, 3, 4], [4, 2, 8, 3]], None if method == "rtn" else TOKENS
    at_once = list(quantize_model(ModelStream(model_folder), tokens, bits, RECIPES[method]))
    monkeypatch.setattr("moepress.models.limits.WORKSPACE", 0)
    one_by_one = list(quantize_model(ModelStream(model_folder), tokens, bits, RECIPES[method]))
    for found, expected in zip(one_by_one, at_once, strict=True):
        assert found.modules == expected.modules and found.tensors.keys() == expected.tensors.keys()
        assert {n: (t.shape, t.dtype) for n, t in found.tensors.items()} == {
            n: (t.shape, t.dtype) for n, t in expected.tensors.items()
        }
        if method == "rtn":
            assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
        else:
            assert found.diagnostics["expert_errors"] == pytest.approx(expected.diagnostics["expert_errors"], rel=0.05)


def test_goes_on_from_any_layer_with_the_same_bytes(model_folder, tmp_path):
    recipe, bits = RECIPES["qesc"], [[2, 2, 3, 3]] * 2
    whole = list(quantize_model(ModelStream(model_folder), TOKENS, bits, recipe))
    stopped = quantize_model(ModelStream(model_folder), TOKENS, bits, recipe, tmp_path)
    next(stopped), next(stopped)  # the second layer is asked for, so the first is whole
    stopped.close()
    (rest,) = quantize_model(ModelStream(model_folder), TOKENS, bits, recipe, tmp_path)
    assert rest.index == 1
    assert all(torch.equal(rest.tensors[name], tensor) for name, tensor in whole[1].tensors.items())


def test_qesc_changes_fewer_selections_than_gptq(tmp_path):
    """On calibration text."""
    folder, moved = write_model(tmp_path / "model", layers=3, hidden=64, intermediate=64, experts=8, seed=1), {}
    for method in ("gptq", "qesc"):
        results = list(quantize_model(ModelStream(folder), TOKENS, [[2] * 8] * 3, RECIPES[method]))
        moved[method] = sum(r.diagnostics["selection_shift"] for r in results)
    assert moved["qesc"] < moved["gptq"]


def test_asymmetric_targets_bring_the_experts_nearer_to_the_original_stream(tmp_path):
    """On calibration text: the layers' outputs end nearer to the 16-bit model's own than with the plain target."""
    folder = write_model(tmp_path / "model", layers=3, hidden=64, intermediate=64, experts=4, seed=4)
    error = {}
    for strength in (0.0, 1.0):
        recipe = Recipe("gptq", **COMMON, **FEEDBACK, asymmetry=strength)
        error[strength] = list(quantize_model(ModelStream(folder), TOKENS, [[2] * 4] * 3, recipe))[-1].diagnostics[
            "output_error"
        ]
    assert error[1.0] < error[0.0]


@pytest.mark.parametrize("preset", ["gptq_minmax", "gptq_clip", "gptq_mc"])
def test_baselines_are_what_their_presets_say(model_folder, preset):
    """Each preset quantizes every width, and what it packs is what its grid allows: whole zero points; of min-max, where no
    feedback has come yet, the scales from end to end; of MC's code 1 bit as a sign, its zero point half a step."""
    values = config.values([f"quantization={preset}", "quantization.group_size=32"])["quantization"]
    recipe = Recipe(**{name: value for name, value in values.items() if name != "name"})
    stream, bits = ModelStream(model_folder), [1, 2, 3, 4]
    experts = stream.layer(0).get_submodule(stream.family.experts)
    (result, *_) = quantize_model(ModelStream(model_folder), TOKENS, [bits] * 2, recipe)
    assert result.diagnostics["output_error"] < 1
    packed = {part: result.tensors[f"model.layers.0.mlp.experts.gate_up.{part}"] for part in ("scales", "zeros")}
    E, O, G = packed["scales"].shape
    starts = [0, *accumulate(size.packed_bytes(O * G, size.zero_width(b)) for b in bits)]
    zeros = [unpack(packed["zeros"][s:], O * G, size.zero_width(b)).view(O, G) for s, b in zip(starts, bits, strict=False)]
    assert (E, O, G) == (4, 64, 2) and starts[-1] == len(packed["zeros"])
    if preset == "gptq_mc":
        assert (zeros[0] == 2).all()
    else:
        assert all((zero % 4 == 0).all() for zero in zeros)
    if preset == "gptq_minmax":
        for e, width in enumerate(bits):
            first = experts.gate_up_matrix(e, torch.float32)[:, :32]
            low, high = first.amin(1).clamp(max=0), first.amax(1).clamp(min=0)
            assert torch.equal(packed["scales"][e, :, 0], ((high - low) / (2**width - 1)).half())


def test_starved_experts_are_named_and_sound(tmp_path):
    """A router that never picks expert 3."""
    folder = write_model(tmp_path / "model", seed=2)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.endswith("gate.weight"):
            tensors[name][3] = 0
            tensors[name][:3] = tensors[name][:3].abs() + 1
            tensors[name.replace("block_sparse_moe.gate", "post_attention_layernorm")] *= 0
            tensors[name.replace("block_sparse_moe.gate", "post_attention_layernorm")] += 1
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].abs() + 1
    save_file(tensors, path, {"format": "pt"})
    results = list(quantize_model(ModelStream(folder), TOKENS, [[3] * 4] * 2, RECIPES["gptq"]))
    first = results[0].diagnostics
    assert first["tokens"][3] == 0 and 3 in first["starved"]
    assert first["expert_errors"][3] < 0.2


def test_nan_in_the_weights_is_refused(tmp_path):
    folder = write_model(tmp_path / "model", seed=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.safetensors.*k_proj.*NaN"):
        list(quantize_model(ModelStream(folder), None, [[3] * 4] * 2, RECIPES["rtn"]))


@pytest.mark.parametrize("when", ["before", "after", "both"])
def test_tokens_are_routed_again_only_where_a_router_is_fitted(model_folder, monkeypatch, when):
    """For a layer: the original's, then for each fit before and after it, and the shared experts' pass."""
    count, route = [], ModelStream.route
    monkeypatch.setattr(ModelStream, "route", lambda *given: (count.append(1), route(*given))[1])
    recipe = replace(RECIPES["qesc"], router_when=when)
    found = list(quantize_model(ModelStream(model_folder), TOKENS, [[2] * 4] * 2, recipe))
    assert len(count) == 2 * {"before": 3, "after": 4, "both": 5}[when]
    for layer in found:
        assert layer.diagnostics["router_loss"] <= layer.diagnostics["router_loss_before_fit"]
    count.clear()
    plain = list(quantize_model(ModelStream(model_folder), TOKENS, [[2] * 4] * 2, RECIPES["gptq"]))
    assert len(count) == 2 * 2
    assert all(layer.diagnostics["selection_shift"] == layer.diagnostics["selection_shift_before_fit"] for layer in plain)


def test_a_dense_layer_is_seen_without_a_copy_of_all_hidden_states(tmp_path, monkeypatch):
    """Its linears see what they see in a whole forward; nothing as large as the hidden states is made for it."""
    stream = ModelStream(write_zoo_model(tmp_path / "model", "deepseek_v2"))
    layer, seen = stream.layer(0), []
    quantizer = LayerQuantizer(stream, layer, 0, RECIPES["rtn"], None, "routed")
    m = torch.randn(3, 8, stream.shape.hidden_size)
    hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    monkeypatch.setattr(streaming, "TOKENS_AT_ONCE", 8)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "empty_like", None)
        quantizer.see_block(m, None)
    hook.remove()
    whole = layer.mlp.act_fn(layer.mlp.gate_proj(m)) * layer.mlp.up_proj(m)
    assert len(seen) == 3 and torch.allclose(torch.cat(seen), whole, atol=1e-6)


def slow_drift(inputs, experts, e, gate_up=None):
    """Token by token over all of them."""
    total = 0
    for x_hat, x in zip(inputs.m_TH, inputs.original_TH, strict=True):
        if gate_up is not None:
            x_hat, x = experts.hidden(e, x_hat[None], gate_up)[0], experts.hidden(e, x[None])[0]
        total = total + torch.outer(x - x_hat, x_hat)
    return total / len(inputs.m_TH)


def test_drift_with_all_tokens_is_the_mean_over_all_of_them(model_folder, monkeypatch):
    """As the curvature is with coverage "all", and in parts of a few tokens."""
    monkeypatch.setattr("moepress.quantization.experts.TOKENS_AT_ONCE", 13)
    stream, g = ModelStream(model_folder), torch.Generator().manual_seed(21)
    layer = stream.layer(0)
    experts = layer.get_submodule(stream.family.experts)
    m = torch.randn(2, 20, 64, generator=g)
    x = (m + 0.1 * torch.randn(2, 20, 64, generator=g)).flatten(0, 1)
    inputs = ExpertInputs(experts, m.flatten(0, 1), stream.route(layer, m), "all", original_TH=x)
    gate_up = torch.stack([experts.gate_up_matrix(e, torch.float32).bfloat16().float() for e in range(4)]) * 0.9
    for e in range(4):
        assert torch.allclose(inputs.drift(range(4))[e], slow_drift(inputs, experts, e), atol=1e-5)
        assert torch.allclose(inputs.drift(range(4), gate_up)[e], slow_drift(inputs, experts, e, gate_up[e]), atol=1e-5)
