"""The small default model: a Mixtral with 8 experts that is trained here, in minutes, on the corpus.

    moepress model=tiny                       # the recipe is conf/model/tiny.yaml
    moepress model=tiny model.training.steps=200

`train` leaves an ordinary Hugging Face folder (bf16 safetensors, tokenizer), `training.csv` with the loss by step and
`specialisation.json` with what the experts do on held-out text. Hidden matrices are trained by Muon (Jordan et al.
2024), 3-D experts as batches of matrices; embeddings, router and norms by Adam. Same seed, same machine: same bytes,
also after a kill, for the state of the training lies beside the output; the stage removes it when it is through.

Shape suffixes: B sequences, S positions, T = B*S tokens, H hidden, V vocabulary, E experts, K experts per token.
"""

import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, MixtralForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moepress.data import corpus
from moepress.models.muon import Optimizer
from moepress.models.recovering import batch
from moepress.models.specialisation import mutual_information

STATE = "training_state.safetensors"
END = "<|endoftext|>"
NUM_PIECES = 2
"""Of a batch that are computed side by side. It decides the order of sums, so it is not the number of cores at hand."""


def train(config: dict, documents: Path, out: Path) -> dict:
    """Train the model of `config` (the resolved group `model`) on the train split of `documents` into the folder `out`.

    documents: a built corpus' documents.parquet. A state that a killed training left in `out` is taken up again.
    Returns `specialisation.json`'s content.
    Raises ValueError if the corpus has too little text.
    """
    training, folder = config["training"], Path(documents).parent
    text = corpus.read(folder, "train")
    tokenizer = train_tokenizer(text, config["tokenizer"])
    data = [tokenize(tokenizer, group["text"], training["seq_len"]) for _, group in text.groupby("domain")]
    batches = Batches(torch.cat(data), training["batch_size"], config["seed"])
    torch.manual_seed(config["seed"])
    model = build(config["architecture"], tokenizer)
    optimizer = Optimizer(model, training)
    rows = resume(out, config, model, optimizer)
    steps, saved = training["steps"], time.perf_counter()
    bar = tqdm(range(len(rows), steps), initial=len(rows), total=steps, desc="train", unit="step")
    with pieces_pool() as pool:
        for step in bar:
            loss, balance = backward(model, batches[step], training, pool)
            scale = optimizer.step(step, pool)
            rows.append({"step": step, "loss": round(loss, 5), "balance": round(balance, 5), "lr": scale * training["muon_lr"]})
            bar.set_postfix(loss=f"{np.mean([row['loss'] for row in rows[-20:]]):.3f}", balance=f"{balance:.3f}")
            if time.perf_counter() - saved > training["save_seconds"]:
                save_state(out, config, model, optimizer, rows)
                saved = time.perf_counter()
    pd.DataFrame(rows).to_csv(out / "training.csv", index=False)
    model = model.to(torch.bfloat16).eval()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    found = specialisation(model, tokenizer, folder, config["held_out"])
    (out / "specialisation.json").write_text(json.dumps(found, indent=2) + "\n")
    return found


# --- text ------------------------------------------------------------------------------------------------------------


def train_tokenizer(text: pd.DataFrame, config: dict) -> PreTrainedTokenizerFast:
    """A byte-level BPE from the first `characters` of each domain; END is its bos, eos, pad and unk token."""
    sample = [
        document
        for _, group in text.groupby("domain")
        for document in group["text"][group["text"].str.len().cumsum() <= max(config["characters"], len(group["text"].iloc[0]))]
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config["vocab_size"],
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, unk_token=END,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def tokenize(tokenizer, texts, seq_len: int) -> torch.Tensor:
    """Documents one after the other, each ended by eos, as `int64 [num_sequences, seq_len + 1]`; the rest is left out."""
    end = tokenizer.eos_token_id
    texts = list(texts)
    encoded = [
        np.array([*encoding.ids, end], np.int64)
        for start in range(0, len(texts), 64)  # an encoding takes 100 times the room of its ids
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts[start : start + 64], add_special_tokens=False)
    ]
    stream = torch.from_numpy(np.concatenate(encoded))
    num_sequences = (len(stream) - 1) // seq_len
    return (
        stream[: num_sequences * seq_len + 1].unfold(0, seq_len + 1, seq_len)
        if num_sequences
        else stream.new_empty(0, seq_len + 1)
    )


class Batches:
    """Batch `step` of a training that passes over all sequences in a new order again and again."""

    def __init__(self, sequences: torch.Tensor, batch_size: int, seed: int):
        if len(sequences) < batch_size:
            raise ValueError(
                f"The corpus has text for {len(sequences)} training sequences, model.training.batch_size is {batch_size}: "
                "give more text, or lower model.training.batch_size or model.training.seq_len."
            )
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed

    def __getitem__(self, step: int) -> torch.Tensor:
        return batch(self.sequences, self.batch_size, step, self.seed)


# --- model and its loss ----------------------------------------------------------------------------------------------


def build(architecture: dict, tokenizer) -> MixtralForCausalLM:
    """A fresh fp32 Mixtral; what writes into the residual stream starts at zero."""
    config = AutoConfig.for_model(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        sliding_window=None,
        **architecture,
    )
    model = MixtralForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.experts.down_proj)
    model.set_experts_implementation("moepress_sorted")
    model.set_attn_implementation("eager")  # on CPU and at this length a quarter faster than sdpa
    return model.train()


def sorted_experts(module, hidden_TH, top_k_index_TK, top_k_weights_TK):
    """Each expert on its own tokens in one piece. Indexing a 3-D weight per expert, as `eager` does, makes autograd fill
    a whole 3-D gradient per expert: half of the training time."""
    num_slots = top_k_index_TK.shape[1]
    order = top_k_index_TK.flatten().argsort(stable=True)
    counts = top_k_index_TK.flatten().bincount(minlength=module.num_experts).tolist()
    tokens = order // num_slots
    inputs = hidden_TH.index_select(0, tokens).split(counts)
    outputs = []
    for x, gate_up, down in zip(inputs, module.gate_up_proj.unbind(), module.down_proj.unbind(), strict=True):
        gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
        outputs.append(F.linear(module.act_fn(gate) * up, down))
    weights = top_k_weights_TK.flatten().index_select(0, order).unsqueeze(1)
    weighted = torch.cat(outputs) * weights.to(outputs[0].dtype)
    return torch.zeros_like(hidden_TH).index_add(0, tokens, weighted.to(hidden_TH.dtype))


ALL_EXPERTS_FUNCTIONS.register("moepress_sorted", sorted_experts)


@contextmanager
def pieces_pool(num_pieces: int = NUM_PIECES):
    """A thread for each piece of a batch, with one core each: nearly twice as fast on two cores as two threads within each
    small operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(num_pieces) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def backward(model, sequences: torch.Tensor, training: dict, pool, num_pieces: int = NUM_PIECES) -> tuple[float, float]:
    """Gradients of one batch `[B, S + 1]`, in pieces side by side, summed in their order.

    Returns the cross-entropy in nats and the balance loss (1 is even).
    """
    parameters = list(model.parameters())

    def piece(part: torch.Tensor):
        inputs, targets = part[:, :-1], part[:, 1:]
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            output = model.model(inputs, output_router_logits=True, use_cache=False)
            loss = CrossEntropy.apply(output.last_hidden_state.flatten(0, 1), model.lm_head.weight, targets.flatten())
        routers, top_k = output.router_logits, model.config.num_experts_per_tok
        balance = torch.stack([balance_loss(logits, top_k) for logits in routers]).mean()
        z_loss = torch.stack([logits.float().logsumexp(-1).square().mean() for logits in routers]).mean()
        total = loss + training["balance"] * balance + training["z_loss"] * z_loss
        share = len(part) / len(sequences)
        gradients = torch.autograd.grad(total * share, parameters)
        return loss.item() * share, balance.item() * share, gradients

    losses, balances, gradients = zip(*pool.map(piece, sequences.chunk(num_pieces)), strict=True)
    for parameter, *parts in zip(parameters, *gradients, strict=True):
        parameter.grad = sum(parts[1:], start=parts[0])
    return sum(losses), sum(balances)


def has_bfloat16() -> bool:
    """Whether this processor multiplies bf16 itself: three times faster than fp32; elsewhere it is emulated, and slower."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of `hidden_TH @ weight_VH.T`, in blocks that fit the processor's cache: gradients are made
    on the way forward, so that the logits of a batch, its largest tensor, never exist."""

    BLOCK = 512

    @staticmethod
    def forward(ctx, hidden_TH, weight_VH, targets_T):
        weight, loss = weight_VH.to(hidden_TH.dtype), 0.0
        grad_hidden, grad_weight = torch.empty_like(hidden_TH), torch.zeros_like(weight_VH)
        for hidden, target, grad in zip(
            *(x.split(CrossEntropy.BLOCK) for x in (hidden_TH, targets_T, grad_hidden)), strict=True
        ):
            logits = (hidden @ weight.T).float()
            norm = logits.logsumexp(-1, keepdim=True)
            loss += (norm - logits.gather(1, target[:, None])).sum()
            error = logits.sub_(norm).exp_().scatter_add_(1, target[:, None], norm.new_full(norm.shape, -1.0))
            error = error.to(hidden.dtype)
            grad.copy_(error @ weight)
            grad_weight += error.T @ hidden
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss / len(targets_T)

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad / len(grad_hidden)
        return grad_hidden * scale, grad_weight * scale, None


def balance_loss(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Share of selections times mean probability, summed over experts, times E (Switch Transformer, eq. 4), one layer."""
    probabilities_TE = logits_TE.float().softmax(-1)
    num_experts = logits_TE.shape[1]
    counts_E = probabilities_TE.topk(top_k).indices.flatten().bincount(minlength=num_experts)
    return num_experts * (counts_E / counts_E.sum() * probabilities_TE.mean(0)).sum()


# --- state -----------------------------------------------------------------------------------------------------------


def save_state(out: Path, config: dict, model, optimizer: Optimizer, rows: list[dict]) -> None:
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"optimizer.{name}": value for name, value in optimizer.state.items()}
    temporary = out / f"{STATE}.partial"
    save_file(tensors, temporary, metadata={"config": json.dumps(config, sort_keys=True), "rows": json.dumps(rows)})
    os.replace(temporary, out / STATE)


def resume(out: Path, config: dict, model, optimizer: Optimizer) -> list[dict]:
    """Put a saved state of the same config into model and optimizer. Returns its rows: one per step done."""
    if not (out / STATE).exists():
        return []
    with safe_open(out / STATE, "pt") as state:
        if state.metadata()["config"] != json.dumps(config, sort_keys=True):
            return []
        for name, p in model.named_parameters():
            p.data.copy_(state.get_tensor(f"model.{name}"))
        for name, value in optimizer.state.items():
            value.copy_(state.get_tensor(f"optimizer.{name}"))
        return json.loads(state.metadata()["rows"])


# --- what came of it -------------------------------------------------------------------------------------------------


@torch.no_grad()
def specialisation(model, tokenizer, folder: Path, held_out: dict) -> dict:
    """Perplexity by domain of the test split, and which expert takes which domain, by layer.

    Shares and mutual information are over the domains that were trained on, weighted alike. A domain whose test text is shorter
    than a sequence is left out; where that leaves none of those, there are no layers.
    """
    trained = set(
        pd.read_parquet(folder / "documents.parquet", columns=["domain"], filters=[("split", "==", "train")])["domain"]
    )
    counts: dict = {}
    quality = {}
    for domain, group in corpus.read(folder, "test").groupby("domain"):
        sequences = tokenize(tokenizer, group["text"], held_out["seq_len"])[: held_out["num_sequences"]]
        if not len(sequences):
            continue
        nats, num_tokens, num_bytes, counts[domain] = 0.0, 0, 0, 0
        for part in sequences.split(8):
            output = model(part[:, :-1], output_router_logits=True, use_cache=False)
            nats += F.cross_entropy(output.logits.float().flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
            num_tokens += part[:, 1:].numel()
            num_bytes += len("".join(tokenizer.batch_decode(part[:, 1:])).encode())
            top = torch.stack(output.router_logits).topk(model.config.num_experts_per_tok).indices.flatten(1)
            counts[domain] = counts[domain] + F.one_hot(top, model.config.num_local_experts).sum(1).numpy()
        loss = nats / num_tokens
        quality[domain] = {
            "tokens": num_tokens,
            "loss": loss,
            "perplexity": math.exp(loss),
            "bits_per_byte": nats / math.log(2) / num_bytes,
        }
    layers, seen = [], sorted(trained & set(counts))
    for layer in range(model.config.num_hidden_layers) if seen else ():
        joint = np.stack([counts[domain][layer] / counts[domain][layer].sum() for domain in seen])
        joint = joint / joint.sum()
        share = joint.sum(0)
        layers.append(
            {
                "share": share.tolist(),
                "min_share": float(share.min()),
                "mutual_information_bits": mutual_information(joint),
                "counts": {domain: counts[domain][layer].tolist() for domain in counts},
            }
        )
    return {"held_out": quality, "layers": layers}
