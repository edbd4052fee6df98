"""Prefill and decode times of models side by side: timed in turn in one process, so that drift hits all alike."""

import statistics
import time

import torch


def synchronize(device) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def prefill_ms(model, ids_BS: torch.Tensor) -> float:
    """Milliseconds of one forward over a batch of prompts."""
    synchronize(model.device)
    start = time.perf_counter()
    model(input_ids=ids_BS, use_cache=True, logits_to_keep=1)
    synchronize(model.device)
    return 1e3 * (time.perf_counter() - start)


@torch.inference_mode()
def decode_ms(model, prompt_1S: torch.Tensor, num_tokens: int) -> float:
    """Milliseconds per token of greedy decoding at batch 1 behind a prompt."""
    out = model(input_ids=prompt_1S, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    synchronize(model.device)
    start = time.perf_counter()
    for _ in range(num_tokens):
        out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
    synchronize(model.device)
    return 1e3 * (time.perf_counter() - start) / num_tokens


def compare(models: dict, time_one, repeats: int, progress) -> dict[str, dict[str, float]]:
    """Each model's median and quartiles of `time_one(model)`, after one warm-up, the models in turn in every round."""
    times = {name: [] for name in models}
    for round_number in range(repeats + 1):
        for name, model in models.items():
            taken = time_one(model)
            if round_number:
                times[name].append(taken)
        progress.update()
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q1": quartiles[0], "q3": quartiles[2], "min": min(values)}


def weight_bytes(model) -> int:
    """Bytes of parameters and buffers as they lie in memory."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
