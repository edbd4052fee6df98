"""Recovery: by distillation a carved model learns to give the dense one's logits again (Hinton et al. 2015; temperature 1).

Routers stay as they were fitted: their logits are nearly equal by design, and a step of Adam would be larger than they are.
AdamW under a cosine; a killed run goes on from its last saved state.
"""

import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

STATE = "recovery_state.safetensors"
FIXED = (".mlp.gate.", ".shared_expert_gate.")


def recover(model, teacher, ids_NS, settings: dict, seed: int, out: Path, device: str) -> list[float]:
    """Train the model in place for `settings["steps"]` batches of `ids [N, S]`; returns each step's loss, in nats a token."""
    teacher.to(device)
    model.to(device).train()
    trained = {name: p for name, p in model.named_parameters() if not any(part in name for part in FIXED)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW(
        trained.values(), settings["learning_rate"], (0.9, 0.95), weight_decay=settings["weight_decay"]
    )
    losses = resume(out, trained, optimizer)
    steps, saved = settings["steps"], time.perf_counter()
    bar = tqdm(range(len(losses), steps), initial=len(losses), total=steps, desc="recover", unit="step")
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * rate(step, steps, settings["warmup"])
        ids = batch(ids_NS, settings["batch_size"], step, seed).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=torch.device(device).type == "cuda"):
            with torch.no_grad():
                expected = teacher(ids, use_cache=False).logits
            loss = divergence(expected, model(ids, use_cache=False).logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.4f}")
        if time.perf_counter() - saved > settings["save_seconds"]:
            save(out, trained, optimizer, losses)
            saved = time.perf_counter()
    teacher.to("cpu")
    model.to("cpu").eval().requires_grad_(False)
    return losses


def divergence(expected_NSV: torch.Tensor, found_NSV: torch.Tensor) -> torch.Tensor:
    """KL divergence of what is found from what is expected, in nats, mean over tokens."""
    expected, found = expected_NSV.float().log_softmax(-1), found_NSV.float().log_softmax(-1)
    return F.kl_div(found.flatten(0, 1), expected.flatten(0, 1), log_target=True, reduction="batchmean")


def rate(step: int, steps: int, warmup: float) -> float:
    """The learning rate's share: a rise over the first steps, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def batch(ids_NS: torch.Tensor, size: int, step: int, seed: int) -> torch.Tensor:
    """Batch `step` of passes over all sequences, each in a new order."""
    epoch, place = divmod(step, len(ids_NS) // size)
    order = torch.randperm(len(ids_NS), generator=torch.Generator().manual_seed(1000 * seed + epoch))
    return ids_NS[order[place * size : (place + 1) * size]]


def save(out: Path, trained: dict, optimizer, losses: list[float]) -> None:
    tensors = {f"weight.{name}": p.detach() for name, p in trained.items()}
    for name, parameter in trained.items():
        tensors |= {f"{moment}.{name}": optimizer.state[parameter][moment] for moment in ("exp_avg", "exp_avg_sq")}
    beside = out / f"{STATE}.partial"
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, beside, {"losses": json.dumps(losses)})
    os.replace(beside, out / STATE)


def resume(out: Path, trained: dict, optimizer) -> list[float]:
    """Put a saved state into model and optimizer; returns the losses so far."""
    if not (out / STATE).is_file():
        return []
    with safe_open(out / STATE, "pt") as state, torch.no_grad():
        losses = json.loads(state.metadata()["losses"])
        for name, parameter in trained.items():
            parameter.copy_(state.get_tensor(f"weight.{name}"))
            moments = {m: state.get_tensor(f"{m}.{name}").to(parameter.device) for m in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(float(len(losses))), **moments}
    return losses
