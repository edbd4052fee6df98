"""The compiled products on a CPU against the plain torch twin: matrices, experts of every family, whole models."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moepress.inference import cpu
from moepress.inference.checkpoint import load_model
from moepress.inference.packed import FEW, PackedExperts, PackedLinear, PackedMatrices
from moepress.models.experts import Experts
from moepress.models.families import FAMILIES
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import experts_of, moe_layers
from moepress.quantization.packing import pack
from moepress.quantization.size import zero_width
from zoo import ZOO, write_zoo_model

WIDTHS = [1, 2, 3, 4, 8]


def fill(matrices: PackedMatrices, seed: int, shift: int = 0) -> None:
    """Random codes, zero points and scales, of weights of about 0.2; the codes `shift` bytes beyond an aligned address."""
    g = torch.Generator().manual_seed(seed)
    G = matrices.scales[0].numel()
    codes = [pack(torch.randint(0, 1 << b, (matrices.rows * matrices.columns,), generator=g), b) for b in matrices.bits]
    zeros = [pack(torch.randint(0, 4 * ((1 << b) - 1) + 1, (G,), generator=g), zero_width(b)) for b in matrices.bits]
    matrices.codes = torch.cat([torch.zeros(shift, dtype=torch.uint8), *codes])[shift:]
    matrices.zeros = torch.cat(zeros)
    sizes = torch.tensor([0.4 / (1 << b) for b in matrices.bits])
    matrices.scales.copy_((0.5 + torch.rand(matrices.scales.shape, generator=g)) * sizes[:, None, None])


def by_torch(packed: PackedMatrices, x_TI: torch.Tensor, experts_N: torch.Tensor) -> torch.Tensor:
    """Slot by slot in float64."""
    y_NO, K = torch.zeros(len(experts_N), packed.rows, dtype=torch.float64), len(experts_N) // len(x_TI)
    for n, e in enumerate(experts_N.tolist()):
        if e < len(packed.bits):
            y_NO[n] = packed.matrix_by_torch(e, torch.float32).double() @ x_TI[n // K].double()
    return y_NO


@st.composite
def packed_matrices(draw):
    bits = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6))
    group_size, groups = draw(st.sampled_from([16, 32, 48, 64, 128])), draw(st.integers(1, 3))
    packed = PackedMatrices(bits, draw(st.integers(1, 40)), group_size * groups, group_size)
    fill(packed, draw(st.integers(0, 2**31)), draw(st.integers(0, 3)))
    return packed


@settings(max_examples=60, deadline=None)
@given(packed_matrices(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([1, 2, 3]))
def test_products_are_those_of_the_unpacked_matrices(packed, num_tokens, slots_per_token, seed, threads):
    """Mixed widths, odd numbers of rows and tokens, experts that nobody chose and slots without an expert; the same bits from
    any number of threads."""
    g = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(num_tokens, packed.columns, generator=g)
    experts_N = torch.randint(0, len(packed.bits) + 1, (num_tokens * slots_per_token,), generator=g)
    y_NO = packed.products(x_TI, experts_N)
    expected = by_torch(packed, x_TI, experts_N)
    assert torch.allclose(y_NO.double(), expected, atol=1e-5, rtol=1e-5)
    assert (y_NO[experts_N == len(packed.bits)] == 0).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "ALONE", 0)
        patch.setattr(torch, "get_num_threads", lambda: threads)
        assert torch.equal(packed.products(x_TI, experts_N), y_NO)


@settings(max_examples=40, deadline=None)
@given(packed_matrices(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_unpacking_is_the_twins_to_the_bit(packed, dtype):
    for e in range(len(packed.bits)):
        assert torch.equal(packed.matrix(e, dtype), packed.matrix_by_torch(e, dtype))


def test_scales_of_every_size():
    """All finite float16 that are not negative, subnormal ones too."""
    packed = PackedMatrices([8], 31 * 1024 // 16, 256, 16)
    fill(packed, 0)
    packed.scales.copy_(torch.arange(31 * 1024, dtype=torch.int16).view(torch.float16).view_as(packed.scales))
    assert packed.scales.isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(packed.matrix(0, dtype), packed.matrix_by_torch(0, dtype))


def test_scales_stay_as_they_are_whatever_a_model_is_cast_to():
    packed = PackedLinear(torch.nn.Linear(64, 24), 4, 32)
    fill(packed, 0)
    before = packed.scales.clone()
    packed.to(torch.bfloat16)
    assert packed.bias.dtype == torch.bfloat16 and packed.scales.dtype == torch.float16 and packed.is_compiled
    assert torch.equal(packed.scales, before)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_linear(dtype, with_bias):
    linear = torch.nn.Linear(64, 24, bias=with_bias).to(dtype)
    packed = PackedLinear(linear, 4, 32)
    fill(packed, 0)
    x = torch.randn(2, 1, 64).to(dtype)
    expected = torch.nn.functional.linear(x, packed.matrix_by_torch(0, dtype), linear.bias)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.02}
    y = packed(x)
    assert y.dtype == dtype and y.shape == expected.shape and torch.allclose(y, expected, **tolerance)
    assert packed(x[:0]).shape == (0, 1, 24)


def test_where_there_is_no_kernel_torch_does_it():
    """Groups that are no whole vectors, scales that are tuned, inputs with a gradient, other devices."""
    odd = PackedMatrices([2], 8, 40, 40)
    fill(odd, 0)
    assert not odd.is_compiled and torch.equal(odd.matrix(0, torch.float32), odd.matrix_by_torch(0, torch.float32))
    packed = PackedLinear(torch.nn.Linear(64, 24), 4, 32)
    fill(packed, 0)
    x = torch.randn(2, 64)
    assert packed.multiplies(x, 2) and not packed.multiplies(x, FEW + 1) and not packed.multiplies(x.requires_grad_(), 2)
    packed(x).sum().backward()
    assert torch.allclose(x.grad, packed.matrix(0, torch.float32).sum(0).expand(2, -1), atol=1e-5)
    packed.scales = packed.scales.float().requires_grad_()
    packed(x).sum().backward()
    assert packed.scales.grad.abs().sum() > 0
    assert not PackedMatrices([2], 8, 32, 32, device="meta").is_compiled


def pack_model(model, stream: ModelStream) -> None:
    """Random packed weights in place of the experts' and the linears' of every layer, experts of mixed widths."""
    for index, layer in enumerate(model.model.layers):
        for kind in ("attention", "shared"):
            for number, (name, linear) in enumerate(stream.linears(layer, kind, 32).items()):
                packed = PackedLinear(linear, WIDTHS[(index + number) % 5], 32)
                fill(packed, number)
                layer.set_submodule(name, packed)
    path = FAMILIES[model.config.model_type].experts
    for index, (layer, experts) in enumerate(zip(moe_layers(model), experts_of(model), strict=True)):
        packed = PackedExperts(experts, [WIDTHS[(index + e) % 5] for e in range(experts.num_experts)], 32)
        fill(packed.gate_up, index), fill(packed.down, 100 + index)
        layer.set_submodule(path, packed)


@torch.inference_mode()
@pytest.mark.parametrize("family", ZOO)
def test_every_family_decodes_as_by_torch(family, tmp_path, monkeypatch):
    """Each one's gate, activation and biases; with slots without an expert, and in bfloat16; then the model token by token."""
    folder = write_zoo_model(tmp_path / family, family)
    model = load_model(folder, "cpu", torch.float32)
    pack_model(model, ModelStream(folder))
    g = torch.Generator().manual_seed(0)
    for experts in experts_of(model):
        x_TH, E = torch.randn(3, experts.hidden_size, generator=g), experts.num_experts
        index_TK, weights_TK = torch.randint(0, E + 1, (3, 2), generator=g), torch.rand(3, 2, generator=g)
        index_TK[1] = E
        assert experts.gate_up.multiplies(x_TH, 6)
        expected = Experts.forward(experts, x_TH, index_TK, weights_TK)
        found = experts(x_TH, index_TK, weights_TK)
        assert torch.allclose(found, expected, atol=1e-4, rtol=1e-4) and (found[1] == 0).all()
        low = copy.deepcopy(experts).bfloat16()
        found = low(x_TH.bfloat16(), index_TK, weights_TK.bfloat16())
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.02 * expected.norm()

    def logits():
        out, found = model(TOKENS[:, :12], use_cache=True), []
        for position in range(12, 15):
            found.append(out.logits[:, -1])
            out = model(TOKENS[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True)
        return torch.stack(found)

    compiled = logits()
    monkeypatch.setattr(PackedMatrices, "is_compiled", False)
    expected = logits()
    assert torch.allclose(compiled, expected, atol=1e-3, rtol=1e-3)


TOKENS = torch.randint(1, 300, (2, 15), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def test_a_quantized_model_generates_what_torch_generates(checkpoint, monkeypatch):
    model = load_model(checkpoint, "cpu")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    compiled = model.generate(TOKENS[:1], **options)
    monkeypatch.setattr(PackedMatrices, "is_compiled", False)
    expected = model.generate(TOKENS[:1], **options)
    assert torch.equal(compiled.sequences, expected.sequences)
    assert torch.allclose(torch.stack(compiled.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
