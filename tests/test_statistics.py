"""Statistics in one pass against running the layer once per expert and width."""

import numpy as np
import pytest
import torch

from moepress import artefacts, plan
from moepress.models import limits
from moepress.models.specialisation import mutual_information
from moepress.models.streaming import ModelStream
from moepress.models.streams import Streams
from moepress.quantization.experts import ExpertInputs, Recipe, quantize_batch
from moepress.quantization.layers import linear_curvatures
from moepress.quantization.sensitivity import Gradient
from moepress.statistics import layer_statistics
from zoo import write_zoo_model

TOKENS = torch.randint(1, 250, (6, 40), generator=torch.Generator().manual_seed(0))
DOMAINS = ["a", "a", "b", "b", "b", "a"]
WIDTHS = [1, 2, 4]
COMMON = {"group_size": 32, "clip_min": 0.25, "clip_steps": 8, "fit_rounds": 2}
RECIPES = {"rtn": Recipe("rtn", **COMMON), "gptq": Recipe("gptq", **COMMON, damping=0.01, block_size=32)}
RECIPES["minmax"] = Recipe("minmax", **COMMON)


@pytest.fixture(scope="module")
def walk(model_folder, tmp_path_factory):
    """The first layer with what enters it, and the block's input."""
    stream = ModelStream(model_folder)
    streams = Streams(tmp_path_factory.mktemp("streams"), ("x",), (*TOKENS.shape, 64))
    stream.embed(TOKENS, streams["x"])
    with torch.inference_mode():
        layer = stream.layer(0)
        _, m = stream.attend(0, layer, streams["x"])
    return stream, layer, streams, m


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("coverage", ["routed", "weighted", "all"])
@pytest.mark.parametrize("method", RECIPES)
def test_errors_against_the_whole_block(walk, method, coverage):
    """eps: quantize one expert alone, run the whole MoE block, take the Frobenius norm of the change."""
    stream, layer, streams, m = walk
    found = layer_statistics(stream, 0, layer, streams, RECIPES[method], WIDTHS, DOMAINS, coverage)
    experts = layer.get_submodule(stream.family.experts)
    original, kept = stream.block(layer, m), list(experts.weights)
    inputs = ExpertInputs(experts, m.flatten(0, 1), stream.route(layer, m), coverage)
    for column, width in enumerate(WIDTHS):
        given = inputs if method == "gptq" else None
        gate_up, down = quantize_batch(RECIPES[method], experts, range(4), [width] * 4, given)
        for e in range(4):
            experts.weights[e] = ([gate_up.dequantize()[e]], down.dequantize()[e])
            change = (stream.block(layer, m) - original).norm().item()
            experts.weights[e] = kept[e]
            assert found["errors"][e][column] == pytest.approx(change, rel=1e-3)
    errors = np.array(found["errors"])
    assert (errors[:, 1] > errors[:, 2]).all(), "wider is better"
    assert (errors[:, 0] > errors[:, 1]).all() or method == "minmax", "where its two bits are poor, as MC's are"


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("coverage", ["routed", "weighted", "all"])
def test_activations_that_are_kept_are_those_computed_anew(walk, monkeypatch, coverage):
    stream, layer, streams, _ = walk
    found = []
    for kept in (limits.KEPT, 0):
        monkeypatch.setattr(limits, "KEPT", kept)
        found.append(layer_statistics(stream, 0, layer, streams, RECIPES["gptq"], WIDTHS, DOMAINS, coverage))
    assert np.allclose(found[0]["errors"], found[1]["errors"], rtol=1e-5)
    assert np.allclose(found[0]["layer_errors"], found[1]["layer_errors"], rtol=1e-5)


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("family", ["mixtral", "granitemoe", "gpt_oss"])
def test_what_the_other_rules_read_against_loops(family, tmp_path, monkeypatch):
    """Squared errors of weights, curvatures' traces, the layer's error with all experts quantized, (g dz)^2 token by token."""
    monkeypatch.setattr("moepress.quantization.sensitivity.LAYER_SAMPLE", 100)
    stream = ModelStream(write_zoo_model(tmp_path / "model", family))
    streams = Streams(tmp_path / "streams", ("x",), (*TOKENS.shape, 64))
    stream.embed(TOKENS, streams["x"])
    layer = stream.layer(0)
    T = TOKENS.numel()
    row_T = torch.full((T,), -1)
    row_T[80:120], row_T[0:40] = torch.arange(40), torch.arange(40, 80)
    gradient = Gradient(row_T, torch.randn(80, 64, generator=torch.Generator().manual_seed(3)).bfloat16())
    found = layer_statistics(stream, 0, layer, streams, RECIPES["rtn"], WIDTHS, DOMAINS, "routed", gradient)
    _, m = stream.attend(0, layer, streams["x"])
    output, m_TH = streams.next("x").flatten(0, 1), m.flatten(0, 1)
    experts, routing = layer.get_submodule(stream.family.experts), stream.route(layer, m)
    originals = [(experts.gate_up_matrix(e, torch.float32), experts.down_matrix(e, torch.float32)) for e in range(4)]
    scale = {"granitemoe": 0.7}.get(family, 1.0)
    traces = torch.zeros(4, 2)
    for t, slot in np.ndindex(routing.indices.shape):
        e = routing.indices[t, slot].item()
        hidden = experts.hidden(e, m_TH[t : t + 1])
        traces[e] += torch.stack([m_TH[t] @ m_TH[t] / 64, hidden[0] @ hidden[0] / 32]) / T
    assert torch.allclose(torch.tensor(found["traces"]), traces, rtol=1e-3)

    original = stream.block(layer, m).flatten(0, 1)
    for column, width in enumerate(WIDTHS):
        quantized = []
        for e in range(4):
            pair = [RECIPES["rtn"].quantize(w[None], None, [width]).dequantize()[0] for w in originals[e]]
            quantized.append(([pair[0]], pair[1]))
            squares = [(q - w).square().sum().item() for q, w in zip(pair, originals[e], strict=True)]
            assert found["weight_errors"][e][column] == pytest.approx(squares, rel=1e-3)
            kept, experts.weights[e] = experts.weights[e], quantized[e]
            dz = scale * (stream.block(layer, m).flatten(0, 1) - original)
            experts.weights[e] = kept
            loss = sum((gradient.g_GH[row_T[t]].float() @ dz[t]).item() ** 2 for t in range(T) if row_T[t] >= 0)
            assert found["loss_errors"][e][column] == pytest.approx(loss, rel=2e-3)
        kept, experts.weights = list(experts.weights), quantized
        change = scale * (stream.block(layer, m).flatten(0, 1) - original)[::3]
        experts.weights = kept
        expected = (change.square().sum() / output[::3].square().sum()).item()
        assert found["layer_errors"][column] == pytest.approx(expected, rel=2e-3)


@torch.inference_mode()
def test_one_expert_at_a_time_is_all_at_once(walk, monkeypatch):
    stream, layer, streams, _ = walk
    at_once = layer_statistics(stream, 0, layer, streams, RECIPES["gptq"], [2], DOMAINS, "routed")
    monkeypatch.setattr("moepress.models.limits.WORKSPACE", 0)
    one_by_one = layer_statistics(stream, 0, layer, streams, RECIPES["gptq"], [2], DOMAINS, "routed")
    for name in ("errors", "weight_errors", "traces", "layer_errors"):
        assert np.allclose(at_once[name], one_by_one[name], rtol=1e-3), name


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
def test_counts_and_weights_against_loops(walk):
    stream, layer, streams, m = walk
    found = layer_statistics(stream, 0, layer, streams, RECIPES["rtn"], [4], DOMAINS, "routed")
    routing = stream.route(layer, m)
    logits, weights, index = routing.logits, routing.weights, routing.indices
    tokens, weight, softmax, by_domain = [0] * 4, [0.0] * 4, [0.0] * 4, {"a": [0] * 4, "b": [0] * 4}
    for t in range(len(index)):
        for slot, e in enumerate(index[t].tolist()):
            tokens[e] += 1
            weight[e] += weights[t, slot].item()
            softmax[e] += logits[t].softmax(-1)[e].item()
            by_domain[DOMAINS[t // 40]][e] += 1
    assert found["tokens"] == tokens and found["selections_by_domain"] == by_domain
    assert found["frequency"] == pytest.approx([n / len(index) for n in tokens])
    assert found["weight"] == pytest.approx([w / len(index) for w in weight], rel=1e-4)
    assert found["softmax_weight"] == pytest.approx([w / len(index) for w in softmax], rel=1e-4)
    assert sum(found["weight"]) == pytest.approx(1) and sum(found["frequency"]) == pytest.approx(2)
    assert torch.allclose(streams.next("x"), stream.call(0, layer, streams["x"]), atol=1e-5)


def own_tokens(routing, e, coverage):
    """An expert's tokens and how much each of them counts, 1 on average."""
    found = {}
    for t in range(len(routing.indices)):
        hit = (routing.indices[t] == e).nonzero()
        if len(hit):
            found[t] = routing.weights[t, hit[0, 0]].item() ** 2 if coverage == "weighted" else 1.0
    mean = np.mean([*found.values()])
    return {t: weight / mean for t, weight in found.items()}


def swiglu(x, gate_up):
    """The input of the down projection, by a matrix of gate and up."""
    gate, up = gate_up.chunk(2)
    return torch.nn.functional.silu(gate @ x) * (up @ x)


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("coverage", ["routed", "weighted", "all"])
def test_curvatures_against_loops(walk, coverage):
    """Each coverage's curvature, token by token: sum of share x x^T, drawn towards that of all tokens; x of the down projection
    as the quantized gate and up make it, with an even sample for all tokens."""
    stream, layer, _, m = walk
    experts, m_TH, routing = layer.get_submodule(stream.family.experts), m.flatten(0, 1), stream.route(layer, m)
    (T, H), I = m_TH.shape, experts.intermediate_size
    inputs = ExpertInputs(experts, m_TH, routing, coverage)
    quantized = [RECIPES["rtn"].quantize(experts.gate_up_matrix(e, torch.float32)[None], None, [2]) for e in (1, 2)]
    quantized = torch.cat([each.dequantize() for each in quantized])
    gate_up, down = inputs.gate_up_curvature(range(1, 3)), inputs.down_curvature(range(1, 3), quantized)
    for i, e in enumerate((1, 2)):
        hidden = [swiglu(m_TH[t], quantized[i]) for t in range(T)]
        sample = range(0, T, 1 if coverage == "all" else T // I)
        for found, x, width, sampled in ((gate_up[i], m_TH, H, range(T)), (down[i], hidden, I, sample)):
            every = [torch.outer(x[t], x[t]) for t in sampled]
            pooled, own = sum(every) / len(every), own_tokens(routing, e, coverage)
            total = sum(share * torch.outer(x[t], x[t]) for t, share in own.items())
            expected = pooled if coverage == "all" else (total + width * pooled) / (len(own) + width)
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("coverage", ["routed", "weighted"])
def test_drift_against_loops(walk, coverage):
    """`mean (x - x_hat) x_hat^T`; of the down projection x by the 16-bit gate and up, x_hat by the quantized ones."""
    stream, layer, _, m = walk
    experts, m_TH, routing = layer.get_submodule(stream.family.experts), m.flatten(0, 1), stream.route(layer, m)
    noise = torch.randn(m_TH.shape, generator=torch.Generator().manual_seed(5))
    original = m_TH + 0.1 * noise
    inputs = ExpertInputs(experts, m_TH, routing, coverage, original_TH=original)
    whole = [experts.gate_up_matrix(e, torch.float32) for e in (1, 2)]
    quantized = torch.stack([RECIPES["rtn"].quantize(w[None], None, [2]).dequantize()[0] for w in whole])
    before, behind = inputs.drift(range(1, 3)), inputs.drift(range(1, 3), quantized)
    for i, e in enumerate((1, 2)):
        own = own_tokens(routing, e, coverage)
        pairs = {t: (original[t], m_TH[t]) for t in own}
        hidden = {t: (swiglu(x, whole[i]), swiglu(x_hat, quantized[i])) for t, (x, x_hat) in pairs.items()}
        for found, given in ((before[i], pairs), (behind[i], hidden)):
            total = sum(own[t] * torch.outer(x - x_hat, x_hat) for t, (x, x_hat) in given.items())
            expected = total / (len(own) + found.shape[0])
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


@torch.inference_mode()
@pytest.mark.usefixtures("in_parts")
def test_curvatures_of_linears_are_those_of_their_own_inputs(walk):
    stream, layer, streams, _ = walk
    linears, seen = stream.linears(layer, "attention", 32), {}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].flatten(0, -2)))
        for name, linear in linears.items()
    ]
    found = linear_curvatures(linears, lambda: stream.attend(0, layer, streams["x"]))
    for hook in hooks:
        hook.remove()
    assert len(linears) == 4 and all(len(parts) == 6 for parts in seen.values())
    for name, parts in seen.items():
        x = torch.cat(parts)
        assert torch.allclose(found[name][0], x.T @ x / len(x), rtol=1e-3, atol=1e-5), name
    assert not torch.allclose(found["self_attn.o_proj"], found["self_attn.q_proj"], rtol=0.1)


def test_mutual_information():
    assert mutual_information(np.full((4, 8), 3.0)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.eye(8)) == pytest.approx(3)
    assert mutual_information([[1, 0], [5, 0], [0, 2], [0, 9]]) == pytest.approx(1), "domains count alike"


@pytest.mark.parametrize("blocks", [2, 3])
def test_blocks_of_layers_as_jobs_of_their_own(made, tmp_path, blocks):
    """The same key and bytes, also where there are more blocks than layers; each block's job reads no other's result."""
    overrides, report, _ = made
    here = report.parents[1]
    shared = plan.for_overrides([*overrides, f"statistics.blocks={blocks}", f"paths.results={tmp_path}"])
    (whole,) = (folder for folder, item in shared.artefacts.items() if item.stage == "statistics")
    parts = [folder for folder, item in shared.artefacts.items() if item.stage == "statistics_block"]
    assert (here / whole).is_dir() and len(parts) == blocks
    for folder, item in shared.artefacts.items():
        if item.stage in ("corpus", "model", "calibration", "statistics_block", "statistics"):
            artefacts.run_stage(artefacts.task_path(tmp_path, folder), tmp_path / folder)
    assert (tmp_path / whole / "statistics.json").read_bytes() == (here / whole / "statistics.json").read_bytes()
    layers = [
        [layer["layer"] for layer in artefacts.read_json(tmp_path / part / "statistics.json")["layers"]] for part in parts
    ]
    assert sorted(index for part in layers for index in part) == [0, 1]
