"""Loading a packed checkpoint, by transformers' own `from_pretrained` or by `load`, which also checks it.

Importing this module registers the quantization method "moepress" with transformers; without it `from_pretrained` knows
nothing of the packed experts.
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging as hf_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from moepress.inference.packed import PackedExperts, PackedLinear
from moepress.models import families
from moepress.models.streaming import ModelStream

FORMAT_VERSION = 1


@register_quantization_config("moepress")
class MoepressConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint. modules: module name -> its width, or a list with every expert's."""

    def __init__(self, group_size: int, modules: dict, format_version: int = FORMAT_VERSION, quant_method="moepress", **_):
        self.quant_method = quant_method
        self.format_version = format_version
        self.group_size = group_size
        self.modules = modules


@register_quantizer("moepress")
class MoepressQuantizer(HfQuantizer):
    """Swaps the modules named in the configuration for packed ones before the weights are read."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model, **_):
        config = self.quantization_config
        if config.format_version > FORMAT_VERSION:
            raise ValueError(
                f"this checkpoint has format version {config.format_version}, this moepress reads up to {FORMAT_VERSION}: "
                "update moepress"
            )
        for name, bits in config.modules.items():
            module = model.get_submodule(name)
            packed = PackedLinear if isinstance(module, nn.Linear) else PackedExperts
            model.set_submodule(name, packed(module, bits, config.group_size))

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def pick_device(device: str) -> str:
    """`auto` is cuda where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def load(folder, device: str = "auto", dtype: torch.dtype | None = None, pruning: dict | None = None):
    """`(model, tokenizer)` of a folder: packed by moepress, or the 16-bit model of a family that is handled.

    folder: a checkpoint, or a folder of results (of the model or the quantization stage).
    dtype: of the computation; default float32 on CPU, else the checkpoint's own.
    pruning: a policy such as `{"method": "pesf", "alpha": 0.3, "renormalize": True}`, active in the loaded model.
    Raises ValueError for weights that are missing, left over or of the wrong shape: transformers alone would go on with
    random ones.
    """
    folder = families.locate(Path(folder))
    model = load_model(folder, pick_device(device), dtype)
    if pruning:
        from moepress.pruning.policy import attach

        attach(model, pruning)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def load_model(folder: Path, device: str, dtype: torch.dtype | None = None):
    """The model alone; see `load`."""
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a model folder")
    config = json.loads(config_file.read_text())
    families.shape_of(config, str(folder))
    given = {"dtype": dtype or (torch.float32 if device == "cpu" else "auto"), "output_loading_info": True}
    with _quiet():
        if config["model_type"] in families.DIALECTS:
            stream = ModelStream(folder)
            known = MODEL_FOR_CAUSAL_LM_MAPPING[type(stream.config)]
            model, info = known.from_pretrained(
                None, config=stream.config, state_dict=stream.read(list(stream.entries)), **given
            )
        else:
            model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **given)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} {sorted(map(str, info[kind]))[:5]}: not loaded")
    return model.eval().to(device)


@contextmanager
def _quiet():
    """No progress bar and no warnings of transformers while weights load; what is wrong is raised by `load` itself."""
    bars = hf_logging.is_progress_bar_enabled()
    verbosity = hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()
