"""Statistics in one pass against running the layer once per expert and width."""

import numpy as np
import pytest
import torch

from moepress.models.specialisation import mutual_information
from moepress.models.streaming import ModelStream
from moepress.quantization.qesc import ExpertInputs, Recipe, block_output, quantize_experts, rtn_experts
from moepress.statistics import layer_statistics

TOKENS = torch.randint(1, 250, (6, 40), generator=torch.Generator().manual_seed(0))
DOMAINS = ["a", "a", "b", "b", "b", "a"]
WIDTHS = [1, 2, 4]
COMMON = {"group_size": 32, "clip_min": 0.25, "clip_steps": 8, "fit_rounds": 2}
RECIPES = {"rtn": Recipe("rtn", **COMMON), "gptq": Recipe("gptq", **COMMON, damping=0.01, block_size=32)}


@pytest.fixture(scope="module")
def layer(model_folder):
    stream = ModelStream(model_folder)
    return stream, stream.layer(0), stream.embed(TOKENS), stream.positions(40)


@torch.inference_mode()
@pytest.mark.parametrize("method", RECIPES)
def test_errors_against_the_whole_block(layer, method):
    """eps: quantize one expert alone, run the whole MoE block, take the Frobenius norm of the change."""
    stream, module, x, positions = layer
    found, _ = layer_statistics(stream, module, x, positions, RECIPES[method], WIDTHS, DOMAINS)
    experts, block = stream.module(module, "experts"), stream.module(module, "moe")
    _, m = stream.attend(module, x, positions)
    original = block_output(block, m)
    inputs = ExpertInputs(experts, m.flatten(0, 1), stream.route(module, m.flatten(0, 1))[2])
    for column, width in enumerate(WIDTHS):
        if method == "rtn":
            gate_up, down = rtn_experts(RECIPES[method], experts, [width] * 4)
        else:
            gate_up, down, _ = quantize_experts(RECIPES[method], inputs, [width] * 4)
        for e in range(4):
            kept = experts.gate_up_proj[e].clone(), experts.down_proj[e].clone()
            experts.gate_up_proj[e], experts.down_proj[e] = gate_up.dequantize()[e], down.dequantize()[e]
            change = (block_output(block, m) - original).norm().item()
            experts.gate_up_proj[e], experts.down_proj[e] = kept
            assert found["errors"][e][column] == pytest.approx(change, rel=1e-3)
    errors = np.array(found["errors"])
    assert (errors[:, 0] > errors[:, 1]).all() and (errors[:, 1] > errors[:, 2]).all(), "wider is better"


@torch.inference_mode()
def test_counts_and_weights_against_loops(layer):
    stream, module, x, positions = layer
    found, x_next = layer_statistics(stream, module, x, positions, RECIPES["rtn"], [4], DOMAINS)
    _, m = stream.attend(module, x, positions)
    logits, weights, index = stream.route(module, m.flatten(0, 1))
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
    assert torch.allclose(x_next, module(x, position_embeddings=positions), atol=1e-5)


def test_mutual_information():
    assert mutual_information(np.full((4, 8), 3.0)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(np.eye(8)) == pytest.approx(3)
    assert mutual_information([[1, 0], [5, 0], [0, 2], [0, 9]]) == pytest.approx(1), "domains count alike"
