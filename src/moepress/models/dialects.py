"""Model types that are read as another one: DeepSeek-MoE-16B as Qwen2-MoE, Qwen3.5 with its pictures as its text model."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Dialect:
    """A model type that is said in the words of a family, with the same logits.

    config: config.json and the configuration's key -> config.json in the family's words. renames: regex -> name, on disk.
    doubled: regex of the tensors that are taken twice. zeros: name within a MoE layer -> config -> shape of a tensor to add.
    """

    family: str
    config: Callable[[dict, str], dict]
    renames: tuple[tuple[str, str], ...]
    doubled: str | None = None
    zeros: dict = field(default_factory=dict)


def deepseek_config(config: dict, key: str) -> dict:
    odd = {
        "attention_bias": config.get("attention_bias", False) is not False,
        "scoring_func": config.get("scoring_func", "softmax") != "softmax",
        "n_shared_experts": not config.get("n_shared_experts"),
        "n_routed_experts": not config.get("n_routed_experts"),
    }
    for name, is_odd in odd.items():
        if is_odd:
            raise ValueError(f"{key}: config.json has {name}={config.get(name)!r}, which is not handled for this model type")
    sparse = range(config.get("first_k_dense_replace", 0), config["num_hidden_layers"])
    sparse = [layer for layer in sparse if layer % config.get("moe_layer_freq", 1) == 0]
    dropped = ("auto_map", "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq", "scoring_func")
    return {name: value for name, value in config.items() if name not in dropped} | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_experts": config["n_routed_experts"],
        "shared_expert_intermediate_size": config["moe_intermediate_size"] * config["n_shared_experts"],
        "mlp_only_layers": [layer for layer in range(config["num_hidden_layers"]) if layer not in sparse],
        "decoder_sparse_step": 1,
        "qkv_bias": False,
        "use_sliding_window": False,
    }


def qwen3_5_config(config: dict, key: str) -> dict:
    text = config.get("text_config")
    if not isinstance(text, dict):
        raise ValueError(f"{key}: config.json lacks text_config, which a qwen3_5_moe model must give")
    tied = config.get("tie_word_embeddings", False)
    named = {"model_type": "qwen3_5_moe_text", "architectures": ["Qwen3_5MoeForCausalLM"], "tie_word_embeddings": tied}
    return text | named


DIALECTS = {
    # DeepSeek-MoE-16B is Qwen2-MoE with an open gate on its shared experts: sigmoid(0) = 1/2 of twice the down projection.
    "deepseek": Dialect(
        "qwen2_moe",
        deepseek_config,
        renames=((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),),
        doubled=r"\.mlp\.shared_experts\.down_proj\.weight$",
        zeros={"mlp.shared_expert_gate.weight": lambda config: (1, config["hidden_size"])},
    ),
    # The text model inside a vision-language one.
    "qwen3_5_moe": Dialect("qwen3_5_moe_text", qwen3_5_config, renames=((r"^model\.language_model\.", "model."),)),
}


def standard_config(config: dict, key: str) -> dict:
    """config.json in the words of a model type of transformers; ValueError where the dialect says what that cannot."""
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    dialect = DIALECTS.get(config.get("model_type", ""))
    return dialect.config(config, key) if dialect else config


def standard_name(model_type: str | None, name: str) -> str:
    """A tensor's name on disk in the words of the family that it is loaded as."""
    for pattern, replacement in DIALECTS[model_type].renames if model_type in DIALECTS else ():
        name = re.sub(pattern, replacement, name)
    return name


def is_foreign(config: dict) -> bool:
    """Whether transformers' own loader does not give the 16-bit model: another model type, or fewer bits."""
    return config.get("model_type") in DIALECTS or "quantization_config" in config


def is_doubled(config: dict, stored_name: str) -> bool:
    """Whether a tensor is taken twice on its way into its family's words."""
    dialect = DIALECTS.get(config.get("model_type", ""))
    return bool(dialect and dialect.doubled and re.search(dialect.doubled, stored_name))
