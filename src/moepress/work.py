"""The arithmetic of each stage, counted from an outline and a configuration. Imports no torch.

FLOPs are those of a matrix product that would take as long as the work; a step is one column of GPTQ's loop, whose calls take
time beside its arithmetic. A function `*_flops` gives FLOPs, one called `*_work` both.

Legend: T calibration tokens, H hidden size, I intermediate size, E experts, K selected experts, V vocabulary.
"""

import math
from pathlib import Path

from moepress.data import textfiles
from moepress.evaluation import benchmarks, suites
from moepress.models.families import FAMILIES, group_of, kind_of
from moepress.models.limits import TOKENS_AT_ONCE, TRIED, WORKSPACE, experts_at_once, followed, kept_bytes, num_candidates
from moepress.models.outline import Outline

TRIAL_FLOPS, TRIAL_FLOPS_BY_TORCH = 90, 250
"""Of one trial of the grid search, for each weight: compiled (measured on seven stacks of matrices, 86 to 116), and where torch
does the search in some ten passes over memory."""
WEIGHT_FLOPS = 1500
"""For each weight each time that it is quantized, beside trials and products: widened, turned, rounded, packed and unpacked."""
UPDATE_FLOPS = 6.5
"""Of one operation of GPTQ's updates inside a block: they are of rank one and go at memory's pace. Measured on 32 to 128
columns."""
FACTOR_FLOPS = 1500
"""For each entry of a curvature on its way to its factor, beside `1.6 I^3`: Cholesky and substitution on some hundred
columns reach a tenth of a product's speed, on thousands of columns most of it. Measured from 192 to 2048."""
UNPACK_FLOPS, UNPACK_FLOPS_BY_TORCH = 80, 400
"""To unpack one weight: compiled, and by torch, which is differentiable."""
ELEMENT_FLOPS = 160
"""For each activation on its way into and out of a product (gathered, normed, gated, summed up). A small model spends half of
its time on it, one with a hidden size of 4096 a few percent."""
REFINE_UPDATES = 22
"""One round of refinement in GPTQ's own updates: eleven products of the error with the curvature, each of two."""
REFINE_STEPS = 1.5
"""And for each column of each matrix, in steps."""
TUNE_STEPS = 110
"""Of a step of tuning, for each expert, beside its arithmetic, in steps: forward, again, and backward. Measured on the small
default model alone."""
CHARACTERS_PER_TOKEN = 3.5
TASK_LENGTH = 100
"""Tokens of a task's request, about."""
UNKNOWN_BLOCKS = 256
"""Of each domain, where evaluation.num_blocks asks for all: before the text is read nobody knows."""
EXPERT_STEPS = 2.5
"""Of an expert's turn in a forward, beside its arithmetic, in steps; seen where a batch has few tokens for each."""


def forward_flops(model: Outline, tokens: int, length: int) -> float:
    """Two for every weight that a token meets, attention's scores and values, and what activations cost besides."""
    shape = model.shape
    around = shape.num_layers * 4 * shape.hidden_size + len(shape.moe_layers) * expert_elements(model, shape.top_k)
    products = 2 * tokens * model.active_weights + 4 * tokens * length * shape.hidden_size * shape.num_layers
    return products + ELEMENT_FLOPS * tokens * around


def expert_elements(model: Outline, slots: float) -> float:
    """Activations of experts in so many slots (a slot: one token's run through one expert)."""
    return slots * 2 * (model.shape.intermediate_size + model.shape.hidden_size)


def trials(settings: dict) -> int:
    """Grids that are tried for each group: with both ends together, then perhaps with each end alone, then by the fits."""
    return (3 if settings["clip_ends"] == "apart" else 1) * settings["clip_steps"] + 2 * settings["fit_rounds"]


def search_flops(settings: dict) -> float:
    """FLOPs of the grid search for each weight."""
    is_compiled = settings["clip_norm"] == 2 and settings["one_bit"] == "grid"
    return trials(settings) * (TRIAL_FLOPS if is_compiled else TRIAL_FLOPS_BY_TORCH)


def factor_flops(columns: int) -> float:
    """FLOPs of one curvature's factor."""
    return 1.6 * columns**3 + FACTOR_FLOPS * columns**2


def curvature_flops(tokens: int, width: int) -> float:
    """FLOPs of `sum x x^T`: ten of its sixteen tiles are computed, measured at .7 to .85 of the whole product."""
    return 0.75 * 2 * tokens * width**2


def gptq_flops(rows: int, columns: int, settings: dict) -> float:
    """FLOPs of quantizing one matrix, its factor known."""
    block = math.gcd(settings["block_size"], group_of(columns, settings["group_size"]))
    updates = (columns + UPDATE_FLOPS * block) + columns * REFINE_UPDATES * settings["refine_rounds"]
    return rows * columns * (updates + search_flops(settings) + WEIGHT_FLOPS)


def experts_work(model: Outline, tokens: int, settings: dict, method: str) -> tuple[float, float, float]:
    """One layer's experts at one width: FLOPs for gate-up's curvatures and factors, FLOPs for the rest, steps."""
    shape = model.shape
    H, I, E, K = shape.hidden_size, shape.intermediate_size, shape.num_experts, shape.top_k
    if method in ("minmax", "rtn"):
        each = WEIGHT_FLOPS + (TRIAL_FLOPS_BY_TORCH if method == "minmax" else search_flops(settings))
        return 0.0, each * E * model.expert_weights, 0.0
    routed = tokens * K
    gate_up = curvature_flops(tokens + routed, H) + ELEMENT_FLOPS * routed * H + E * factor_flops(H)
    seen = routed + E * min(tokens, I)
    down = seen * 4 * I * H + curvature_flops(seen, I) + ELEMENT_FLOPS * expert_elements(model, seen) + E * factor_flops(I)
    quantized = E * (gptq_flops(2 * I, H, settings) + gptq_flops(H, I, settings))
    steps = -(-E // experts_at_once(H, I, E)) + REFINE_STEPS * settings["refine_rounds"] * E
    return gate_up, down + quantized, steps * (H + I)


def drift_flops(model: Outline, tokens: int) -> float:
    """What one layer's asymmetric targets cost: `D` of both inputs, the second from both streams, and `W D U^T U`."""
    H, I, routed = model.shape.hidden_size, model.shape.intermediate_size, tokens * model.shape.top_k
    seen = 2 * routed * (H**2 + I**2 + 4 * I * H) + 2 * ELEMENT_FLOPS * expert_elements(model, routed)
    return seen + model.shape.num_experts * 3 * 2 * (2 * I * H**2 + H * I**2)


def router_flops(model: Outline, tokens: int, settings: dict) -> float:
    """One layer's router fit, all in float64, which costs twice: each expert's normal equations over the tokens that have it
    among their candidates, or one for all experts; see quantization/router.py."""
    loss, H, E = settings.get("router_loss", "none"), model.shape.hidden_size, model.shape.num_experts
    if loss == "none":
        return 0.0
    found = 0.0
    if loss != "topk_mse_gd":
        count = E if loss == "mse" else num_candidates(E, settings["router_candidates"])
        equations, each = (1, 1) if count == E else (E, count)
        passes = -(-equations // max(1, WORKSPACE // (3 * 8 * H**2)))
        found += 2 * (2 * tokens * each * H**2 + equations * factor_flops(H) / 2)
        found += ELEMENT_FLOPS * tokens * H * (passes + each)
    if loss in ("topk_mse_gd", "kl"):
        found += settings["router_steps"] * min(tokens, settings["router_batch"]) * (2 * 4 * E * H + ELEMENT_FLOPS * H)
    return found * (2 if settings["router_when"] == "both" else 1)


def statistics_work(model: Outline, config: dict) -> tuple[float, float]:
    """`(FLOPs, steps)`: a forward; each expert run as it is, and at every width quantized and run, with one curvature of its
    gate and up."""
    calibration, widths = config["calibration"], len(config["statistics"]["widths"])
    tokens = calibration["num_sequences"] * calibration["seq_len"]
    gate_up, each, steps = experts_work(model, tokens, config["quantization"], config["statistics"]["quantizer"])
    shape, slots = model.shape, tokens * model.shape.top_k
    output = 2 * slots * model.expert_weights + ELEMENT_FLOPS * expert_elements(model, slots)
    at_once = slots * experts_at_once(shape.hidden_size, shape.intermediate_size, shape.num_experts) // shape.num_experts
    keeps = config["statistics"]["quantizer"] == "gptq" and kept_bytes(at_once, shape.intermediate_size, widths)
    again = output / 3 if keeps else output  # the down projection alone
    layers = len(shape.moe_layers)
    flops = forward_flops(model, tokens, calibration["seq_len"]) + layers * (gate_up + output + widths * (each + again))
    return flops, layers * widths * steps


def quantization_work(model: Outline, calibration: dict, settings: dict) -> tuple[float, float]:
    """`(FLOPs, steps)`: two streams of forwards (the 16-bit one perhaps of some sequences alone), attention and shared experts
    run again for their curvature and the router; every expert and linear quantized once; what is tuned.

    calibration: the configuration group; {} where no text is read (RTN). settings: the group quantization.
    """
    method, layers = settings["method"], len(model.shape.moe_layers)
    tokens = 0 if method == "rtn" else calibration["num_sequences"] * calibration["seq_len"]
    gate_up, rest, steps = experts_work(model, tokens, settings, method)
    flops, steps = layers * (gate_up + rest + (router_flops(model, tokens, settings) if tokens else 0)), layers * steps
    parts = [linears_work(model, tokens, settings)]
    if tokens:
        length, shape = calibration["seq_len"], model.shape
        flops += (1 + 1 / followed(settings)) * forward_flops(model, tokens, length)
        if settings["attention_bits"]:  # scores and values of the attention that runs again
            flops += shape.num_layers * tokens * shape.hidden_size * 4 * (length + ELEMENT_FLOPS)
        if settings["asymmetry"]:
            flops += layers * drift_flops(model, tokens)
        parts += [tuning_work(model, tokens, length, settings), distilling_work(model, length, settings)]
    return flops + sum(part for part, _ in parts), steps + sum(part for _, part in parts)


def linears_work(model: Outline, tokens: int, settings: dict) -> tuple[float, float]:
    """`(FLOPs, steps)` of the linears outside the experts: their curvatures, and each quantized once."""
    flops, steps, family = 0.0, 0.0, FAMILIES[model.shape.family]
    for name, entry in model.tensors.items():
        kind = kind_of(family, name, entry.shape, settings["group_size"])
        if kind not in ("attention", "shared") or not settings[f"{kind}_bits"]:
            continue
        if settings["method"] == "rtn":
            flops += (search_flops(settings) + WEIGHT_FLOPS) * entry.numel
            continue
        rows, columns = entry.shape
        flops += 2 * tokens * (1 if kind == "attention" else 4) * entry.numel + curvature_flops(tokens, columns)
        flops += factor_flops(columns) + gptq_flops(rows, columns, settings)
        steps += columns
    return flops, steps


def tuning_work(model: Outline, tokens: int, length: int, settings: dict) -> tuple[float, float]:
    """`(FLOPs, steps)` of tuning every layer: its target, and in each step forward, and back with an expert's forward anew;
    twice it is unpacked."""
    if not settings["tune_steps"]:
        return 0.0, 0.0
    seen = settings["tune_steps"] * max(settings["tune_tokens"], length)
    flops = forward_flops(model, tokens, length) + 4 * forward_flops(model, seen, length)
    flops += settings["tune_steps"] * 2 * UNPACK_FLOPS_BY_TORCH * model.routed_weights
    return flops, settings["tune_steps"] * TUNE_STEPS * len(model.shape.moe_layers) * model.shape.num_experts


def distilling_work(model: Outline, length: int, settings: dict) -> tuple[float, float]:
    """`(FLOPs, steps)` of tuning the packed model as a whole, the trial of its rate included; and a larger sample's way through
    the 16-bit model."""
    if not settings["distill_steps"]:
        return 0.0, 0.0
    descended = settings["distill_steps"] + (TRIED if settings["distill_steps"] > TRIED else 0)
    a_step = max(settings["tune_tokens"], length)
    flops = 4 * forward_flops(model, descended * a_step, length)
    flops += descended * 2 * UNPACK_FLOPS_BY_TORCH * model.routed_weights
    if settings["distill_sequences"] is not None:
        flops += forward_flops(model, settings["distill_steps"] * a_step, length)
    return flops, descended * TUNE_STEPS * len(model.shape.moe_layers) * model.shape.num_experts


def measurement_flops(model: Outline, config: dict, is_packed: bool) -> tuple[float, float]:
    """`(FLOPs of evaluation, FLOPs of latency)`. A packed model's experts are unpacked in every forward that uses them."""
    evaluation, latency, blocks = config["evaluation"], config["latency"], num_blocks(config)
    unpack = UNPACK_FLOPS * model.routed_weights if is_packed else 0
    evaluated = forward_flops(model, blocks * evaluation["seq_len"], evaluation["seq_len"])
    evaluated += -(-blocks // evaluation["batch_size"]) * unpack
    asked = task_tokens(evaluation)
    evaluated += forward_flops(model, asked, TASK_LENGTH) + -(-asked // TOKENS_AT_ONCE) * unpack
    return evaluated, latency_flops(model, latency, is_packed)


def latency_flops(model: Outline, latency: dict, is_packed: bool) -> float:
    """FLOPs of timing one model: at each setting every repeat, one to warm up and one to look at; behind the prompts once. The
    16-bit model's plain experts are timed at the first of each phase."""
    found = 0.0
    unpack = UNPACK_FLOPS * model.routed_weights if is_packed else 0
    few = UNPACK_FLOPS * model.active_weights if is_packed else 0
    for phase in ("prefill", "decode") if latency["repeats"] else ():
        pairs = [(batch, length) for batch in latency[f"{phase}_batch"] for length in latency[f"{phase}_len"]]
        for index, (batch, length) in enumerate(pairs):
            passes = (latency["repeats"] + 2) * (1 if is_packed or index else 2)
            whole = unpack + forward_flops(model, batch * length, length)
            step = min(batch * few, unpack) + 2 * batch * model.active_weights
            found += passes * whole if phase == "prefill" else whole + passes * latency["decode_tokens"] * step
    return found


def unpack_flops(model: Outline, config: dict) -> float:
    """FLOPs that a forward of a packed model costs beside its products; none where nothing is packed."""
    return UNPACK_FLOPS * model.routed_weights if config["quantization"]["method"] != "none" else 0.0


def pruning_flops(model: Outline, config: dict) -> float:
    """FLOPs of the passes over the calibration text that fit a policy, and of the one under it."""
    calibration = config["calibration"]
    tokens = calibration["num_sequences"] * calibration["seq_len"]
    once = forward_flops(model, tokens, calibration["seq_len"]) + -(-tokens // TOKENS_AT_ONCE) * unpack_flops(model, config)
    return once * (1 if config["pruning"].get("threshold") is not None else 2)


def divergence_flops(model: Outline, config: dict) -> float:
    """FLOPs of the test text through the 16-bit model and through the other one."""
    evaluation, blocks = config["evaluation"], num_blocks(config)
    once = forward_flops(model, blocks * evaluation["seq_len"], evaluation["seq_len"])
    return 2 * once + -(-blocks // evaluation["batch_size"]) * unpack_flops(model, config)


def decomposition_work(model: Outline, config: dict) -> tuple[float, float]:
    """`(FLOPs, steps)`: the test text's perplexity three times: the packed model as it is, with other selections, the 16-bit
    one."""
    evaluation, blocks = config["evaluation"], num_blocks(config)
    once, batches = (
        forward_flops(model, blocks * evaluation["seq_len"], evaluation["seq_len"]),
        -(-blocks // evaluation["batch_size"]),
    )
    steps = 3 * batches * EXPERT_STEPS * len(model.shape.moe_layers) * model.shape.num_experts
    return 3 * once + 2 * batches * unpack_flops(model, config), steps


def num_blocks(config: dict) -> int:
    """Blocks of test text, of all domains; of a folder of one's own that is not there yet, as if it were one."""
    evaluation, corpus = config["evaluation"], config["corpus"]
    found = [*corpus.get("domains", ["text"]), *corpus.get("test_domains", [])]
    if corpus.get("kind") == "local" and corpus["path"] and Path(corpus["path"]).exists():
        found = set(textfiles.domains_of(textfiles.find(corpus["path"]), Path(corpus["path"]), corpus["min_documents"]))
    return len(evaluation["domains"] or found) * (evaluation["num_blocks"] or UNKNOWN_BLOCKS)


def task_tokens(evaluation: dict) -> int:
    """About how many tokens the tasks' requests have; tasks that only the hub has are not counted."""
    found = 0
    for task, shots in suites.chosen(evaluation)[0].items():
        if task in suites.QUICK:
            sizes = suites.definition(task)["metadata"]
            choices = 2 if task == "word_swap" else 2 * suites.NUM_CHOICES  # the latter with their context and without
            items, each = sizes["num_items"], choices * (sizes["context"] + sizes["continuation"]) / CHARACTERS_PER_TOKEN
        elif known := benchmarks.find(task):
            items, each = known.num_items, known.tokens * (1 + (shots or 0))
        else:
            continue
        found += int(min(items, evaluation["limit"] or items) * each)
    return found


def carving_flops(model: Outline, settings: dict) -> float:
    """A walk over the calibration tokens with the normal matrices of two fits a layer, and the distillation."""
    calibration, recover, shape = settings["calibration"], settings["recover"], model.shape
    tokens = calibration["num_sequences"] * calibration["seq_len"]
    routed = shape.num_experts * shape.intermediate_size
    fits = 2 * tokens * len(shape.moe_layers) * (routed**2 + (routed + settings["shared_size"]) ** 2)
    distilled = recover["steps"] * recover["batch_size"] * recover["seq_len"]
    return 2 * tokens * model.num_weights + fits + 4 * 2 * distilled * model.num_weights
