"""Tuning against slow, obvious versions: one gradient by hand, one layer that can be repaired exactly, stop and resume."""

import pytest
import torch
from torch import nn

from moepress.inference.packed import PackedLinear, PackedMatrices
from moepress.models.streaming import ModelStream
from moepress.quantization import grid
from moepress.quantization.experts import Recipe
from moepress.quantization.qesc import quantize_model
from moepress.quantization.tuning import Tuned, token_weights

COMMON = {"group_size": 32, "clip_min": 0.25, "clip_steps": 4, "fit_rounds": 1, "attention_bits": 4}
COMMON |= {"damping": 0.01, "block_size": 32, "router_ridge": 0.01}
TUNING = {"tune_steps": 6, "tune_tokens": 96, "tune_rate": 0.01}
TOKENS = torch.randint(1, 250, (6, 48), generator=torch.Generator().manual_seed(0))
BITS = [[2] * 4] * 2


def packed_linear(seed=0, bits=2):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(32, 8, bias=False)
    linear.weight.data = torch.randn(8, 32, generator=generator)
    quantized = grid.rtn(linear.weight.data[None], [bits], 16, grid.Search(0.25, 4, 1))
    packed = PackedLinear(linear, bits, 16)
    for part, tensor in quantized.pack().items():
        packed.get_buffer(part).copy_(tensor)
    return packed, quantized, torch.randn(20, 32, generator=generator), linear.weight.data


def test_token_weights_hold_back_the_huge_ones():
    y = torch.ones(1, 5, 4)
    y[0, 4] *= 100
    assert torch.allclose(token_weights(y), torch.tensor([[1, 1, 1, 1, 1e-4]]))


def test_gradient_of_the_multipliers_by_hand():
    """d loss / d factor = sum over the group of dL/dW * W."""
    packed, quantized, x, w = packed_linear()
    tuned = Tuned(packed, {})
    tuned.groups(0.01)
    tuned.apply()
    ((packed(x) - x @ w.T) ** 2).sum().backward()
    q = quantized.dequantize()[0]
    by_hand = ((2 * (x @ (q - w).T).T @ x) * q).unflatten(1, (2, 16)).sum(-1)
    (factor,) = tuned.factors.values()
    assert torch.allclose(factor.grad[0], by_hand, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rest", [False, True])
def test_tuning_lowers_each_layers_error(model_folder, rest):
    tuned = Recipe("gptq", **COMMON, **TUNING | {"tune_steps": 16}, tune_rest=rest)
    plain = list(quantize_model(ModelStream(model_folder), TOKENS, BITS, Recipe("gptq", **COMMON)))
    found = list(quantize_model(ModelStream(model_folder), TOKENS, BITS, tuned))
    for before, after in zip(plain, found, strict=True):
        assert after.diagnostics["output_error"] < before.diagnostics["output_error"]
        assert after.diagnostics["tuning_error"][1] < after.diagnostics["tuning_error"][0]
        assert before.tensors.keys() == after.tensors.keys()
        assert all(before.tensors[n].dtype == t.dtype and before.tensors[n].shape == t.shape for n, t in after.tensors.items())
        changed = {name for name in before.tensors if not torch.equal(before.tensors[name], after.tensors[name])}
        assert changed >= {name for name in before.tensors if name.endswith(".scales")}
        if after.index == 0:  # what enters the first layer is the same, and so is what tuning began with
            assert not any(name.endswith(".codes") for name in changed)
            assert any(name.endswith("norm.weight") for name in changed) == rest


def test_goes_on_from_any_layer_with_the_same_bytes(model_folder, tmp_path):
    recipe = Recipe("qesc", **COMMON, **TUNING, tune_rest=True, tune_asymmetry=0.5, refine_rounds=1)
    whole = list(quantize_model(ModelStream(model_folder), TOKENS, BITS, recipe))
    stopped = quantize_model(ModelStream(model_folder), TOKENS, BITS, recipe, tmp_path)
    next(stopped), next(stopped)
    stopped.close()
    (rest,) = quantize_model(ModelStream(model_folder), TOKENS, BITS, recipe, tmp_path)
    assert all(torch.equal(rest.tensors[name], tensor) for name, tensor in whole[1].tensors.items())
    assert rest.diagnostics == whole[1].diagnostics


def test_only_scales_are_held_beside_the_packed_weights():
    """Codes stay packed: what Tuned adds is a scale and a factor for every group."""
    packed = packed_linear()[0]
    tuned = Tuned(packed, {})
    assert isinstance(packed, PackedMatrices) and packed.codes.dtype == torch.uint8
    assert sum(t.numel() for part in (tuned.scales, tuned.factors) for t in part.values()) == 2 * packed.scales.numel()
