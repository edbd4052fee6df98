"""config.json and index of a model of DeepSeek-V3's size, from its public architecture numbers: no weights."""

import json
from math import prod

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def layer_shapes(index: int) -> dict[str, tuple[int, ...]]:
    """A layer's tensors; layer 61, which predicts a second token, has an embedding and a head of its own."""
    c, H = CONFIG, CONFIG["hidden_size"]
    heads, rope, latent = c["num_attention_heads"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    found = {
        "self_attn.q_a_proj.weight": (c["q_lora_rank"], H),
        "self_attn.q_a_layernorm.weight": (c["q_lora_rank"],),
        "self_attn.q_b_proj.weight": (heads * (c["qk_nope_head_dim"] + rope), c["q_lora_rank"]),
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, H),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * (c["qk_nope_head_dim"] + c["v_head_dim"]), latent),
        "self_attn.o_proj.weight": (H, heads * c["v_head_dim"]),
        "input_layernorm.weight": (H,),
        "post_attention_layernorm.weight": (H,),
    }

    def mlp(name, width):
        return {f"{name}.{part}_proj.weight": (H, width) if part == "down" else (width, H) for part in ("gate", "up", "down")}

    if index < c["first_k_dense_replace"]:
        return found | mlp("mlp", c["intermediate_size"])
    found |= {"mlp.gate.weight": (c["n_routed_experts"], H), "mlp.gate.e_score_correction_bias": (c["n_routed_experts"],)}
    found |= mlp("mlp.shared_experts", c["moe_intermediate_size"] * c["n_shared_experts"])
    for expert in range(c["n_routed_experts"]):
        found |= mlp(f"mlp.experts.{expert}", c["moe_intermediate_size"])
    if index >= c["num_hidden_layers"]:
        found |= {"enorm.weight": (H,), "hnorm.weight": (H,), "eh_proj.weight": (H, 2 * H), "shared_head.norm.weight": (H,)}
        found |= {name: (c["vocab_size"], H) for name in ("embed_tokens.weight", "shared_head.head.weight")}
    return found


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor at 16 bits."""
    c = CONFIG
    found = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (c["vocab_size"], c["hidden_size"]))
    found["model.norm.weight"] = (c["hidden_size"],)
    for layer in range(c["num_hidden_layers"] + c["num_nextn_predict_layers"]):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes(layer).items()}
    return found


def write_index(folder, float8: bool = False):
    """The folder with config.json and the index; float8: as it is published, with the names of the scales 92 thousand."""
    folder.mkdir(parents=True, exist_ok=True)
    found, config = shapes(), dict(CONFIG)
    total = sum(2 * prod(shape) for shape in found.values())
    if float8:
        config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
        linears = {name: shape for name, shape in found.items() if "_proj" in name and "eh_proj" not in name}
        scales = {f"{name}_scale_inv": (-(-rows // 128), -(-columns // 128)) for name, (rows, columns) in linears.items()}
        total += sum(4 * prod(shape) for shape in scales.values()) - sum(map(prod, linears.values()))
        found |= scales
    (folder / "config.json").write_text(json.dumps(config))
    where = {name: f"model-{number % 163 + 1:05d}-of-000163.safetensors" for number, name in enumerate(sorted(found))}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder
