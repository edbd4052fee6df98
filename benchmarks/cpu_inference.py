"""Packed weights on a CPU beside the 16-bit ones, in turn in one process: decoding a token, and a prefill of 4 x 512.

python benchmarks/cpu_inference.py [MODEL] [--threads 1] [--rounds 15] [--prefill-rounds 5] [--only WORD] [--slots]

Two blocks of random experts, beyond the processor's caches, and, if its folder is given, a whole model whose experts are
rounded in place (attention to 4 bits). Prints each variant's median milliseconds, and its time over that of each packed one:
the median over the rounds, with quartiles. Above 1 the packed one is faster. With one thread times are the process's seconds
on the processor, which other processes on the machine disturb least; with more they are wall clock.
"""

import argparse
import copy
import os
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moepress.inference.checkpoint import load_model
from moepress.inference.packed import PackedExperts, PackedLinear, PackedMatrices
from moepress.models.experts import ON_CPU
from moepress.models.families import ATTENTION
from moepress.pruning.policy import experts_of
from moepress.quantization import grid

GROUP_SIZE, BATCH, LENGTH, DECODED = 128, 4, 512, 16
MIXED = [1, 2, 2, 2, 3, 3, 3, 4]  # 2.5 bits
BFLOAT16, BY_TORCH = ", bfloat16", ", by torch"
WIDTHS = {"2 bits": [2], "4 bits": [4], "1 to 4 bits": MIXED}
SHAPES = {  # hidden, FFN, experts, top-k, layers: so many that not even 2 bits fit in a cache of 32 MiB
    "Mixtral-like: hidden 1024, FFN 3584, 8 experts, top-2": (1024, 3584, 8, 2, 4),
    "fine-grained: hidden 2048, FFN 768, 64 experts, top-8": (2048, 768, 64, 8, 1),
}


@contextmanager
def unaided(is_so: bool):
    """Without the compiled products, as everywhere else than on a CPU."""
    compiled = PackedMatrices.is_compiled
    if is_so:
        PackedMatrices.is_compiled = False
    try:
        yield
    finally:
        PackedMatrices.is_compiled = compiled


def random_packed(original: nn.Module, widths: list[int]) -> PackedExperts:
    E = original.num_experts
    packed = PackedExperts(original, (widths * E)[:E], GROUP_SIZE)
    randomize(packed.gate_up), randomize(packed.down)
    return packed


def randomize(matrices: PackedMatrices) -> None:
    matrices.codes.random_(0, 256), matrices.zeros.random_(0, 256)
    matrices.scales.uniform_(0.005, 0.01)


def implemented(original: nn.Module, implementation: str, dtype: torch.dtype) -> nn.Module:
    """The same weights through one of transformers' implementations."""
    module = copy.copy(original)
    module._parameters = {name: nn.Parameter(p.to(dtype), requires_grad=False) for name, p in original._parameters.items()}
    module.config = copy.copy(original.config)
    module.config._experts_implementation = implementation
    return module


def blocks(H: int, I: int, E: int, K: int, layers: int) -> dict[str, list[nn.Module]]:
    """Variant -> its layers."""
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E, num_experts_per_tok=K)
    originals = [MixtralExperts(config).requires_grad_(False) for _ in range(layers)]
    for original in originals:
        original.gate_up_proj.normal_(0, 0.02), original.down_proj.normal_(0, 0.02)
    found = {}
    for dtype, said in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        shared = [implemented(original, "eager", dtype) for original in originals]
        for name in ("eager", "grouped_mm", ON_CPU):
            found[f"{said} {name}"] = layer = [copy.copy(module) for module in shared]
            for module in layer:
                module.config = copy.copy(module.config)
                module.config._experts_implementation = name
    for name, widths in WIDTHS.items():
        found[name] = [random_packed(original, widths) for original in originals]
    return found | {f"2 bits{how}": found["2 bits"] for how in (BFLOAT16, BY_TORCH)}


def routed(T: int, H: int, E: int, K: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(T, H), torch.rand(T, E).topk(K).indices, torch.rand(T, K).softmax(-1)


def through(layers: list[nn.Module], x_TH, index_TK, weights_TK, clock: Callable) -> float:
    start = clock()
    for layer in layers:
        layer(x_TH, index_TK, weights_TK)
    return clock() - start


def models(folder: Path) -> dict[str, nn.Module]:
    """Variant -> the whole model, at 16 bits once for each implementation."""
    found = {}
    for name in ("eager", "grouped_mm", ON_CPU):
        found[f"float32 {name}"] = load_model(folder)
        found[f"float32 {name}"].set_experts_implementation(name)
    for name, widths in WIDTHS.items():
        found[name] = load_model(folder)
        pack_in_place(found[name], widths)
    return found | {f"2 bits{BY_TORCH}": found["2 bits"]}


def pack_in_place(model, widths: list[int]) -> None:
    """Round every layer's attention and experts to their grids."""

    def fill(matrices: PackedMatrices, weight_EOI: torch.Tensor) -> None:
        for part, tensor in grid.minmax(weight_EOI.float(), matrices.bits, matrices.group_size).pack().items():
            matrices.get_buffer(part).copy_(tensor)

    for layer, experts in zip(model.model.layers, experts_of(model), strict=True):
        packed = PackedExperts(experts, (widths * experts.num_experts)[: experts.num_experts], GROUP_SIZE)
        fill(packed.gate_up, experts.gate_up_proj), fill(packed.down, experts.down_proj)
        linears = {name: m for name, m in layer.get_submodule(ATTENTION).named_modules() if isinstance(m, nn.Linear)}
        for name, linear in linears.items():
            small = PackedLinear(linear, 4, GROUP_SIZE)
            fill(small, linear.weight[None])
            layer.set_submodule(f"{ATTENTION}.{name}", small)
        layer.set_submodule("mlp.experts", packed)


def decode(model, prompt_1S: torch.Tensor, clock: Callable) -> float:
    """Seconds of DECODED tokens behind a prompt."""
    out = model(input_ids=prompt_1S, use_cache=True, logits_to_keep=1)
    start = clock()
    for _ in range(DECODED):
        token = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
    return clock() - start


def prefill(model, prompts_BS: torch.Tensor, clock: Callable) -> float:
    start = clock()
    model(input_ids=prompts_BS, use_cache=True, logits_to_keep=1)
    return clock() - start


def measure(variants: dict, timed: Callable, draw: Callable, rounds: int, clock: Callable) -> None:
    """In every round each variant once on the same input, after one round that does not count."""
    taken: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        given = draw()
        for name, variant in variants.items():
            is_narrow = name.startswith("bfloat16") or name.endswith(BFLOAT16)
            own = [tensor.bfloat16() if is_narrow and tensor.is_floating_point() else tensor for tensor in given]
            with unaided(name.endswith(BY_TORCH)):
                seconds = timed(variant, *own, clock)
            if number:
                taken[name].append(1e3 * seconds)
    packed = [name for name in (*WIDTHS, f"2 bits{BFLOAT16}") if name in variants]
    print(f"| | ms | {' | '.join(f'over {name}' for name in packed)} |\n|---|---:|{'---:|' * len(packed)}")
    for name, times in taken.items():
        ratios = [" "] * len(packed)
        if name not in packed:
            ratios = []
            for other in packed:
                low, median, high = statistics.quantiles([a / b for a, b in zip(times, taken[other], strict=True)], n=4)
                ratios.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
        print(f"| {name} | {statistics.median(times):.2f} | {' | '.join(ratios)} |", flush=True)


def crossover(rounds: int, clock: Callable) -> None:
    """For so many slots of a matrix: the time by unpacking over the time from the packed words, the median over the rounds."""
    slots = (1, 2, 3, 4, 6, 8, 12, 16)
    print(f"\n| matrix, bits | {' | '.join(map(str, slots))} |\n|---|{'---:|' * len(slots)}")
    for rows, columns in ((512, 128), (2048, 1024), (7168, 1024)):
        for width in (1, 2, 3, 4, 8):
            packed = PackedMatrices([width], rows, columns, GROUP_SIZE)
            randomize(packed)
            cells, repeats = [], max(1, 2**21 // (rows * columns))
            for num in slots:
                x, first = torch.randn(num, columns), torch.zeros(num, dtype=torch.long)
                ratios = []
                for _ in range(rounds + 1):
                    times = [clock()]
                    for _ in range(repeats):
                        nn.functional.linear(x, packed.matrix(0, torch.float32))
                    times.append(clock())
                    for _ in range(repeats):
                        packed.products(x, first)
                    times.append(clock())
                    ratios.append((times[1] - times[0]) / (times[2] - times[1]))
                cells.append(f"{statistics.median(ratios[1:]):.1f}")
            print(f"| {rows} x {columns}, {width} | {' | '.join(cells)} |", flush=True)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prefill-rounds", type=int, default=5)
    parser.add_argument("--only", default="", metavar="WORD", help="of a block's title, or model")
    parser.add_argument("--slots", action="store_true", help="only the number of slots from which unpacking pays")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    machine = f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"
    print(f"{machine}, {args.threads} thread(s), torch {torch.__version__}")
    if args.slots:
        return crossover(args.rounds, clock)
    for title, (H, I, E, K, layers) in SHAPES.items():
        if args.only not in title:
            continue
        variants = blocks(H, I, E, K, layers)
        print(f"\n{title}, {layers} layer(s); decode, batch 1\n")
        measure(variants, through, lambda: routed(1, H, E, K), args.rounds, clock)  # noqa: B023
        print(f"\n{title}, 1 layer; prefill {BATCH} x {LENGTH}\n")
        first = {name: layer[:1] for name, layer in variants.items()}
        measure(first, through, lambda: routed(BATCH * LENGTH, H, E, K), args.prefill_rounds, clock)  # noqa: B023
    if args.model and args.only in "whole model":
        variants = models(args.model)
        vocabulary = next(iter(variants.values())).config.vocab_size
        prompt, prompts = torch.randint(vocabulary, (1, LENGTH // 4)), torch.randint(vocabulary, (BATCH, LENGTH))
        print(f"\n{args.model.name}; decode of {DECODED} tokens, batch 1, behind {LENGTH // 4}\n")
        measure(variants, decode, lambda: (prompt,), args.rounds, clock)
        print(f"\n{args.model.name}; prefill {BATCH} x {LENGTH}\n")
        measure(variants, prefill, lambda: (prompts,), args.prefill_rounds, clock)


if __name__ == "__main__":
    main()
