"""The Triton kernels of packed experts against 16-bit ones, on a GPU; one MoE layer of real shape with random weights:

python benchmarks/gpu_kernels.py [--repeats 30] [--shapes mixtral-8x7b qwen3-30b-a3b] [--tune]

For each shape at 2.5 (half 2, half 3) and 4 bits, groups of 128, and each workload (decode of 1 and 16 tokens, prefill 4 x 512,
the same with what PESF leaves at alpha 0.3) four ways of the same layer run in turn in every round:

kernels   packed, through `moepress.inference.kernels`
grouped   bfloat16, transformers' `grouped_mm` (torch's grouped products)
eager     bfloat16, transformers' loop over experts
unpack    packed, our own loop that unpacks an expert at a time in plain torch

A measurement is eight calls with eight routings, so that the second-level cache holds no call's weights for the next; where a
way can be captured (kernels and grouped, at decode) it is one CUDA graph. Prints the median and quartiles of a call, how
much faster the kernels are, the bytes of weights that must be read (of experts with tokens) and the share of the measured
bandwidth that they are read at. Expert use is skewed: each expert has a popularity, 0.6 normal, in its logits. Before timing,
the kernels' output is compared with plain torch's. --tune times other tiles for decoding too. Exit code 2: there is no GPU.
"""

import argparse
import statistics
import sys
from dataclasses import replace

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moepress.inference import kernels
from moepress.inference.packed import PackedExperts
from moepress.pruning.pesf import pesf
from moepress.quantization.size import matrix_bytes

SHAPES = {"mixtral-8x7b": (4096, 14336, 8, 2), "qwen3-30b-a3b": (2048, 768, 128, 8)}
"""hidden, intermediate, experts, top-k"""
WIDTHS = {"2.5 bits": (2, 3), "4 bits": (4,)}
WORKLOADS = {
    "decode 1": (1, 1, None),
    "decode 16": (16, 1, None),
    "prefill": (4, 512, None),
    "prefill, PESF 0.3": (4, 512, 0.3),
}
"""sequences, tokens of each, PESF's alpha"""
CALLS, GROUP = 8, 128


def routings(shape, workload, device, generator) -> list[tuple]:
    """`CALLS` times `(hidden [T, H], index [T, K], weights [T, K])`."""
    H, _, E, K = shape
    B, S, alpha = workload
    found = []
    for _ in range(CALLS):
        popularity = 0.6 * torch.randn(E, generator=generator, device=device)
        logits = popularity + torch.randn(B, S, E, generator=generator, device=device)
        weights, index = logits.softmax(-1).topk(K)
        weights = weights / weights.sum(-1, keepdim=True)
        if alpha is not None:
            mask = torch.ones(B, S, dtype=torch.bool, device=device)
            index, weights = pesf(index, weights, mask, E, alpha, renormalize=True)
        hidden = torch.randn(B * S, H, generator=generator, device=device, dtype=torch.bfloat16)
        found.append((hidden, index.view(B * S, K), weights.view(B * S, K).bfloat16()))
    return found


def stock_layer(shape, device) -> MixtralExperts:
    H, I, E, _ = shape
    with torch.device(device):
        layer = MixtralExperts(MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)).bfloat16()
    for weight in layer.parameters():
        weight.requires_grad_(False).normal_(0, 0.02)
    layer._is_expert_parallel = True  # slots without an expert are then no one's
    return layer


def packed_layer(shape, widths, device, generator) -> PackedExperts:
    """Random codes and zero points; scales of the same weights' size."""
    H, I, E, _ = shape
    with torch.device("meta"):
        original = MixtralExperts(MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E))
    layer = PackedExperts(original, [widths[e % len(widths)] for e in range(E)], GROUP, device)
    for part in (layer.gate_up, layer.down):
        for stream in (part.codes, part.zeros):
            stream.random_(0, 256, generator=generator)
        steps = torch.tensor([float(1 << bits) for bits in part.bits], device=device).view(-1, 1, 1)
        part.scales.copy_(0.07 * (0.5 + torch.rand(part.scales.shape, generator=generator, device=device)) / steps)
    return layer


def mean_bytes(calls, shape, bits: list[int] | None) -> float:
    """Of the weights that a call must read: those of experts with tokens, in their widths or (None) in 16 bits."""
    H, I, E, _ = shape
    each = [2 * 3 * H * I] * E
    if bits is not None:
        each = [matrix_bytes(2 * I, H, b, GROUP) + matrix_bytes(H, I, b, GROUP) for b in bits]
    return sum(sum(each[e] for e in index.unique().tolist() if e < E) for _, index, _ in calls) / len(calls)


def with_implementation(layer, name: str):
    def call(*args):
        layer.config._experts_implementation = name
        return layer(*args)

    return call


def captured(call, calls):
    """A function that makes all calls, as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiles, and lets allocators settle
        for args in calls:
            call(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for args in calls:
            call(*args)
    return graph.replay


def one_by_one(call, calls):
    def run():
        for args in calls:
            call(*args)

    return run


def milliseconds(run) -> float:
    """Of one of the calls that `run` makes."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def timed(runs: dict, repeats: int) -> dict[str, tuple[float, float, float]]:
    """Each one's `(lower quartile, median, upper quartile)` over rounds in which all run in turn, after three warm-ups."""
    times = {name: [] for name in runs}
    for round_number in range(repeats + 3):
        for name, run in runs.items():
            taken = milliseconds(run)
            if round_number >= 3:
                times[name].append(taken)
    return {name: tuple(statistics.quantiles(taken, n=4)) for name, taken in times.items()}


def bandwidth(device) -> float:
    """Bytes a second of a copy of 2 GiB, read and written."""
    source = torch.empty(2**31, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timed({"copy": lambda: target.copy_(source)}, 10)["copy"][1] * CALLS
    return 2 * source.numel() / copy * 1e3


def compare(shape, widths, workload, peak: float, repeats: int, device) -> None:
    generator = torch.Generator(device).manual_seed(0)
    calls = routings(shape, workload, device, generator)
    stock, packed = stock_layer(shape, device), packed_layer(shape, widths, device, generator)
    ways = {
        "kernels": with_implementation(packed, kernels.NAME),
        "grouped": with_implementation(stock, "grouped_mm"),
        "eager": with_implementation(stock, "eager"),
        "unpack": with_implementation(packed, "eager"),
    }
    found, expected = (ways[name](*calls[0]).float() for name in ("kernels", "unpack"))
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.02, f"the kernels are wrong here: relative error {error:.3f}"
    is_decode = workload[1] == 1
    runs = {
        name: captured(way, calls) if is_decode and name in ("kernels", "grouped") else one_by_one(way, calls)
        for name, way in ways.items()
    }
    times = timed(runs, repeats)
    for name, (low, median, high) in times.items():
        must = mean_bytes(calls, shape, packed.gate_up.bits if name in ("kernels", "unpack") else None)
        ratio = median / times["kernels"][1]
        print(
            f"    {name:8s} {median:9.4f} ms [{low:.4f}, {high:.4f}]  kernels {ratio:6.2f} times as fast  "
            f"{must / 2**20:8.1f} MiB at {must / median * 1e3 / peak:5.1%} of the bandwidth"
        )
    print(f"    output differs from plain torch's by {error:.4f}")


def tune(shape, widths, repeats: int, device) -> None:
    """Other tiles for decoding: the best five by the median."""
    from moepress.inference.kernels import launch

    generator = torch.Generator(device).manual_seed(0)
    packed = packed_layer(shape, widths, device, generator)
    for name, workload in (("ONE", (1, 1, None)), ("FEW", (16, 1, None))):
        calls, usual, runs = routings(shape, workload, device, generator), getattr(launch, name), {}
        rows, others = ((16, 32, 64), "at_once") if name == "ONE" else ((32, 64, 128), "stages")
        for tile in (
            replace(usual, rows=R, warps=W, **{others: n}) for R in rows for W in (1, 2, 4, 8) for n in (1, 2, 4)
        ):  # fmt: skip
            setattr(launch, name, tile)
            try:
                runs[tile] = captured(with_implementation(packed, kernels.NAME), calls)
            except Exception as error:  # too much shared memory, say: not a candidate
                print(f"    {tile}: {type(error).__name__}")
        setattr(launch, name, usual)
        times = timed(runs, repeats)
        for tile in sorted(times, key=lambda tile: times[tile][1])[:5]:
            print(f"    {name} {times[tile][1]:.4f} ms {tile}{' (as it is)' if tile == usual else ''}")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tune", action="store_true")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device here: these kernels are measured on a GPU only, and nothing was measured", file=sys.stderr)
        sys.exit(2)
    import transformers
    import triton

    device = torch.device("cuda")
    peak = bandwidth(device)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}, "
          f"transformers {transformers.__version__}; a copy moves {peak / 1e12:.2f} TB/s")  # fmt: skip
    for name in arguments.shapes:
        for label, widths in WIDTHS.items():
            for workload in WORKLOADS:
                print(f"{name}, {label}, {workload}")
                compare(SHAPES[name], widths, WORKLOADS[workload], peak, arguments.repeats, device)
            if arguments.tune:
                tune(SHAPES[name], widths, arguments.repeats, device)


if __name__ == "__main__":
    main()
