"""The Triton kernels against plain torch: in triton's interpreter on CPU, compiled where there is a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moepress.inference import kernels
from moepress.inference.kernels import layout
from moepress.inference.packed import PackedExperts, PackedLinear

pytest.importorskip("triton", reason="triton is for Linux")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(module, seed=0):
    """Any bytes are codes and zeros; scales that keep outputs near 1."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if hasattr(part, "code_starts"):
            part.codes.random_(0, 256, generator=generator)
            part.zeros.random_(0, 256, generator=generator)
            steps = torch.tensor([float(1 << bits) for bits in part.bits]).view(-1, 1, 1)
            part.scales.copy_((torch.rand(part.scales.shape, generator=generator) + 0.5) / steps / part.columns**0.5)
    return module.to(DEVICE)


def mixtral(bits, hidden, intermediate, group_size, **config):
    config = MixtralConfig(hidden_size=hidden, intermediate_size=intermediate, num_local_experts=len(bits), **config)
    with torch.device("meta"):
        original = MixtralExperts(config)
    return filled(PackedExperts(original, bits, group_size))


def routed(T, K, E, seed=0, dropped=0.0, unused=0):
    """`(index, weights)`: for each token distinct ones of E experts but the last `unused`, a share of the slots dropped."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.rand(T, E - unused, generator=generator).argsort(1)[:, :K]
    drop = torch.rand(T, K, generator=generator) < dropped
    weights = torch.rand(T, K, generator=generator).masked_fill(drop, 0)
    return index.masked_fill(drop, E).to(DEVICE), weights.to(DEVICE)


def check(experts, x, index, weights):
    """Not further from the float32 result than plain torch in the same dtype is, give or take a rounding of the output."""
    exact = super(PackedExperts, experts).forward(x.float(), index, weights)
    plain = super(PackedExperts, experts).forward(x, index, weights.to(x.dtype)).float()
    found = kernels.experts_forward(experts, x, index, weights)
    assert found.dtype == x.dtype and found.shape == x.shape
    size = exact.abs().max().clamp(min=1e-6)
    allowed = 2e-5 if x.dtype == torch.float32 else torch.finfo(x.dtype).eps
    if x.dtype == torch.bfloat16 and kernels.is_interpreted():
        allowed *= 4  # the interpreter cuts numbers off at bfloat16's last bit instead of rounding them
    assert (found.float() - exact).abs().max() <= (plain - exact).abs().max() + allowed * size


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("columns, group_size", [(128, 128), (96, 96), (64, 32), (32, 16)])
def test_weights_are_those_of_the_packed_format_to_the_bit(bits, columns, group_size):
    """Inputs that each pick one column, by both kernels: on the tensor cores, and for a single input."""
    linear = filled(PackedLinear(nn.Linear(columns, 40 if columns > 32 else 64, bias=False), bits, group_size))
    expected = linear.matrix(0, torch.float32).T
    assert kernels.refusal(linear) is None
    assert torch.equal(kernels.linear_forward(linear, torch.eye(columns, device=DEVICE)), expected)
    for column in (0, columns - 3):
        assert torch.equal(kernels.linear_forward(linear, torch.eye(columns, device=DEVICE)[column]), expected[column])


@pytest.mark.parametrize(
    "T, dtype", [*((T, torch.float32) for T in (1, 2, 16, 17, 45)), *((T, dtype) for T in (1, 7, 19) for dtype in DTYPES[1:])]
)
def test_experts_of_mixed_widths(T, dtype):
    """Odd numbers of tokens, slots without an expert, experts without a token, rows that fill no tile."""
    experts = mixtral([1, 2, 3, 4, 8, 2], 64, 96, 32)
    x = torch.randn(T, 64, generator=torch.Generator().manual_seed(T)).to(DEVICE, dtype)
    check(experts, x, *routed(T, 3, 6, seed=T, dropped=0.2 if T > 1 else 0, unused=1))


@pytest.mark.parametrize("hidden, intermediate, group_size", [(256, 128, 128), (384, 64, 64), (192, 160, 96)])
def test_experts_of_other_shapes(hidden, intermediate, group_size):
    experts = mixtral([3, 2], hidden, intermediate, group_size)
    for T in (1, 5):
        x = torch.randn(T, hidden, generator=torch.Generator().manual_seed(T)).to(DEVICE)
        check(experts, x, *routed(T, 1, 2, seed=T))


def test_columns_split_between_programs():
    """At decode a long row is the work of several programs, whose parts are added in order."""
    experts = mixtral([2, 4], 32, 1024, 32)
    from moepress.inference.kernels.launch import FEW, ONE

    down = kernels.plan(experts)[1]
    assert down.splits(ONE, 2) > 1 and down.splits(FEW, 2) > 1
    for T in (1, 3):
        check(experts, torch.randn(T, 32, generator=torch.Generator().manual_seed(T)).to(DEVICE), *routed(T, 1, 2))


@pytest.mark.parametrize("T", [1, 6, 20])
def test_gpt_oss(T):
    """Biases, gate and up rows in turn, the clamped activation."""
    config = GptOssConfig(hidden_size=64, intermediate_size=64, num_local_experts=4, swiglu_limit=0.5)
    with torch.device("meta"):
        original = GptOssExperts(config)
    experts = PackedExperts(original, [4, 3, 2, 4], 32)
    generator = torch.Generator().manual_seed(0)
    experts.gate_up_proj_bias = nn.Parameter(torch.randn(4, 128, generator=generator), requires_grad=False)
    experts.down_proj_bias = nn.Parameter(torch.randn(4, 64, generator=generator), requires_grad=False)
    assert layout.join_of(experts.activate) == layout.Join(layout.CLAMPED, True, 1.702, 0.5)
    check(filled(experts), torch.randn(T, 64, generator=generator).to(DEVICE), *routed(T, 2, 4, dropped=0.2))


def test_what_no_token_wants_is_not_read():
    experts = mixtral([2, 2, 2, 2], 64, 64, 32)
    for part in (experts.gate_up, experts.down):
        part.scales[1:3] = float("nan")
    for T in (1, 4, 40):
        index, weights = routed(T, 1, 1)
        index = torch.cat([index * 3, torch.full_like(index, 4)], 1)  # the first of four experts, and none
        assert kernels.experts_forward(experts, torch.randn(T, 64, device=DEVICE), index, weights.repeat(1, 2)).isfinite().all()
        index.fill_(4)
        assert not kernels.experts_forward(experts, torch.randn(T, 64, device=DEVICE), index, weights.repeat(1, 2)).any()


@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (2, 9, 64), (0, 64)])
def test_linear(shape):
    linear = filled(PackedLinear(nn.Linear(64, 48), 4, 32))
    x = torch.randn(shape, device=DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(kernels.linear_forward(linear, x), linear(x), atol=1e-5, rtol=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 4, 16]), st.integers(0, 99))
def test_blocks_take_every_slot_once(T, K, E, block, seed):
    index = torch.randint(0, E + 1, (T, K), generator=torch.Generator().manual_seed(seed))
    order, blocks = layout.sorted_blocks(index, E, block)
    taken = []
    for e, first, last in blocks.T.tolist():
        slots = order[first : min(first + block, last)].tolist() if e < E else []
        assert all(index.view(-1)[slot] == e for slot in slots)
        taken += slots
    assert sorted(taken) == [slot for slot, e in enumerate(index.view(-1).tolist()) if e < E]


def test_activations_that_are_known_are_recognised():
    for activation, expected in (("silu", layout.Join(layout.SILU)), ("gelu", None)):
        assert layout.join_of(mixtral([2], 64, 64, 32, hidden_act=activation).activate) == expected


def test_the_kernels_are_chosen_for_a_gpu_and_otherwise_say_why_not(monkeypatch):
    experts = mixtral([2, 2], 64, 64, 32)
    x, routing = torch.randn(3, 64, device=DEVICE), routed(3, 1, 2)
    assert kernels.take(experts, x) == x.is_cuda and not kernels.take(experts, x, "eager")
    experts.config._experts_implementation = kernels.NAME
    called = []
    monkeypatch.setattr(kernels, "experts_forward", lambda *args: called.append(args))
    experts(x, *routing)
    assert called
    with pytest.raises(ValueError, match="no backward"):
        experts(x.clone().requires_grad_(), *routing)
    for other, why in ((mixtral([2], 64, 64, 32, hidden_act="gelu"), "activation"), (mixtral([1, 1], 16, 18, 16), "16 bytes")):
        assert why in kernels.refusal(other)
        other.config._experts_implementation = kernels.NAME
        with pytest.raises(ValueError, match=why):
            other(torch.randn(2, other.hidden_size, device=DEVICE), *routed(2, 1, 1))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moepress.inference.kernels import device, layout

def compiled(capability, find, join, widths, slots, at_once):
    pointers = {"x": "fp32" if slots == 1 else "bf16", "y": "bf16" if join else "fp32", "codes": "u8", "zeros": "u8"}
    pointers |= {"scales": "fp16", "table": "i64", "bias": "bf16", "slots": "i64", "blocks": "i32"}
    types = {f"{name}_ptr": f"*{dtype}" for name, dtype in pointers.items()}
    types |= dict.fromkeys(("x_stride", "y_stride", "y_split_stride", "num_slots"), "i32") | {"alpha": "fp32", "limit": "fp32"}
    constants = dict(FIND=find, JOIN=join, WIDTHS=widths, HAS_BIAS=True, INTERLEAVED=False, E=8, ROWS=28672, COLUMNS=4096)
    constants |= dict(GROUP=128, K=2, X_PER_SLOT=not join, PLANE=16, OUT_PLANE=16, R=64, B=slots, SLOTS=2 * slots, CHOICES=2)
    constants |= dict(SPLITS=1 if join else 4, AT_ONCE=at_once, WIDEN=False)
    names = device.multiply.arg_names
    wide = {(names.index(name),): [["tt.divisibility", 16]] for name in types if name.endswith(("_ptr", "stride"))}
    source = ASTSource(device.multiply, {name: types.get(name, "constexpr") for name in names}, constants, wide)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4, "num_stages": 3})

assert "cp.async" in compiled(80, layout.LEADER, layout.SILU, 1 << 2, 16, 1).asm["ptx"]
assert "wgmma" in compiled(90, layout.SORTED, layout.CLAMPED, 1 << 4, 32, 1).asm["ptx"]
compiled(90, layout.DENSE, 0, 1 << 1, 1, 4)
"""


def test_the_kernels_compile_for_an_a100_and_an_h100(tmp_path):
    """Triton brings the compiler and the assembler; no GPU is needed for that, only a process that does not interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_decoding_in_a_cuda_graph():
    experts = mixtral([2, 3, 4, 2], 256, 128, 128)
    for T in (1, 4):
        x, (index, weights) = torch.randn(T, 256, device=DEVICE, dtype=torch.bfloat16), routed(T, 2, 4)
        kernels.experts_forward(experts, x, index, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernels.experts_forward(experts, x, index, weights)
        for seed in (1, 2):
            x.normal_()
            index.copy_(routed(T, 2, 4, seed=seed)[0])
            graph.replay()
            assert torch.equal(captured, kernels.experts_forward(experts, x, index, weights))
