"""A small random model of every family, in its own form on disk, and plain torch for the one that transformers lacks."""

import json

import torch
from safetensors.torch import load_file, save_file
from torch import nn

COMMON = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MLA = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
MLA |= {"num_key_value_heads": 4, "head_dim": 8}
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 96, "moe_intermediate_size": 32}
SIGMOID = {"n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
GROUPED = {"n_group": 4, "topk_group": 2}

LINEAR = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
CONFIGS = {
    "mixtral": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    "minimax_m2": {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 16},
    "qwen2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "head_dim": 16,
    },
    "qwen3_next": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "olmoe": {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 3},
    "deepseek_v2": {
        **MLA,
        **DENSE_FIRST,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.5,
        "topk_method": "group_limited_greedy",
        **GROUPED,
    },
    "deepseek_v3": {**MLA, **DENSE_FIRST, **SIGMOID, **GROUPED},
    "glm4_moe": {**DENSE_FIRST, **SIGMOID, "head_dim": 16, "use_qk_norm": True},
    "glm4_moe_lite": {**MLA, **DENSE_FIRST, **SIGMOID},
    "solar_open": {**SIGMOID, "moe_intermediate_size": 32, "head_dim": 16},
    "dots1": {**DENSE_FIRST, **SIGMOID, "head_dim": 16},
    "exaone_moe": {
        **DENSE_FIRST,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        **GROUPED,
        "head_dim": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    "hy_v3": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "head_dim": 16,
    },
    "mellum": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["sparse", "dense", "sparse"],
    },
    "ernie4_5_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_num_experts": 6,
        "moe_k": 2,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
    },
    "cohere2_moe": {
        "intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "num_shared_experts": 1,
        "expert_selection_fn": "sigmoid",
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "prefix_dense_intermediate_size": 96,
        "first_k_dense_replace": 1,
        "head_dim": 16,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "tie_word_embeddings": False,
    },
    "laguna": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_routed_scaling_factor": 2.5,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "num_attention_heads_per_layer": [4, 6, 4],
    },
    "lfm2_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe": {"intermediate_size": 32, "num_experts": 4, "moe_topk": 2, "head_dim": 16},
    "granitemoe": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
    "gpt_oss": {
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
ZOO = (*CONFIGS, "deepseek", "qwen3_5_moe")


def write_zoo_model(folder, family: str, seed: int = 0):
    """A random model, its biases and score corrections not zero."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    if family == "deepseek":
        return write_deepseek(folder, seed)
    if family == "qwen3_5_moe":
        return write_qwen3_5(folder, seed)
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**COMMON | CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name or "sinks" in name:
                tensor.copy_(torch.randn(tensor.shape) * 0.1)
            elif "norm" in name:
                tensor.copy_(1 + torch.randn(tensor.shape) * 0.1)
    model.save_pretrained(folder)
    return folder


def write_qwen3_5(folder, seed: int):
    """Qwen3.5 as it is published: the text model a level deeper, its experts fused; beside it what sees pictures and what
    predicts more tokens."""
    write_zoo_model(folder, "qwen3_5_moe_text", seed)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    for at in (f"model.layers.{layer}.mlp.experts" for layer in range(3)):
        gate, up, down = (
            torch.stack([tensors.pop(f"{at}.{expert}.{part}_proj.weight") for expert in range(8)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    tensors = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in tensors.items()}
    tensors |= {
        "model.visual.pos_embed.weight": torch.zeros(4, 8),
        "mtp.layers.0.mlp.experts.gate_up_proj": torch.zeros(8, 64, 64),
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    outer = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe", "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(outer | {"text_config": config, "vision_config": {"depth": 1}}))
    return folder


def write_deepseek(folder, seed: int):
    """DeepSeek-MoE's first generation: the names and the config.json of its public checkpoint, small and random."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM"},
        **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": 6,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator, H = torch.Generator().manual_seed(seed), 64

    def weight(*shape):
        return (torch.randn(*shape, generator=generator) * 0.2).bfloat16()

    def mlp(prefix, width):
        return {
            f"{prefix}.gate_proj.weight": weight(width, H),
            f"{prefix}.up_proj.weight": weight(width, H),
            f"{prefix}.down_proj.weight": weight(H, width),
        }

    tensors = {
        "model.embed_tokens.weight": weight(300, H),
        "lm_head.weight": weight(300, H),
        "model.norm.weight": 1 + weight(H),
    }
    for layer in range(3):
        at = f"model.layers.{layer}"
        tensors |= {f"{at}.self_attn.{name}_proj.weight": weight(H, H) for name in "qkvo"}
        tensors |= {f"{at}.{name}_layernorm.weight": 1 + weight(H) for name in ("input", "post_attention")}
        if layer == 0:
            tensors |= mlp(f"{at}.mlp", 96)
            continue
        tensors[f"{at}.mlp.gate.weight"] = weight(6, H)
        tensors |= mlp(f"{at}.mlp.shared_experts", 64)
        for expert in range(6):
            tensors |= mlp(f"{at}.mlp.experts.{expert}", 32)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


class PlainDeepseekMoE(nn.Module):
    """The block of DeepSeekMoE (arXiv 2401.06066, equations 9 to 11), token by token."""

    def __init__(self, tensors: dict, prefix: str, top_k: int):
        super().__init__()
        self.tensors, self.prefix, self.top_k = tensors, prefix, top_k

    def mlp(self, name: str, x):
        gate, up, down = (self.tensors[f"{self.prefix}.{name}.{part}_proj.weight"].float() for part in ("gate", "up", "down"))
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    def forward(self, x_NSH):
        out = self.mlp("shared_experts", x_NSH)
        probabilities = (x_NSH @ self.tensors[f"{self.prefix}.gate.weight"].float().T).softmax(-1)
        for n, s in torch.cartesian_prod(torch.arange(x_NSH.shape[0]), torch.arange(x_NSH.shape[1])):
            for expert in probabilities[n, s].topk(self.top_k).indices.tolist():
                out[n, s] += probabilities[n, s, expert] * self.mlp(f"experts.{expert}", x_NSH[n, s])
        return out


def plain_deepseek(folder):
    """A reference forward: Llama's decoder of transformers with the plain MoE blocks in it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = json.loads((folder / "config.json").read_text())
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    )
    llama = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in names}, rms_norm_eps=1e-6, rope_theta=10000.0))
    tensors = load_file(folder / "model.safetensors")
    for layer in (1, 2):
        llama.model.layers[layer].mlp = PlainDeepseekMoE(tensors, f"model.layers.{layer}.mlp", config["num_experts_per_tok"])
    kept = {name: tensor.float() for name, tensor in tensors.items() if name in llama.state_dict()}
    assert not llama.load_state_dict(kept, strict=False).missing_keys
    return llama.eval()
