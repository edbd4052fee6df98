"""The quantization method "moepress" of transformers' `from_pretrained`.

`import moepress` has this module imported as soon as transformers' own quantizers are, so it must need no more of
transformers than they do.
"""

import re
import types
from contextvars import ContextVar
from pathlib import Path

from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from moepress.inference import manifest
from moepress.inference.packed import PackedExperts, PackedLinear, PackedMatrices
from moepress.inference.saving import DTYPES, save_pretrained

checked: ContextVar[Path | None] = ContextVar("checked", default=None)
"""The folder whose files `moepress.load` has compared with their hashes already, as far as it was asked to."""


@register_quantization_config(manifest.METHOD)
class MoepressConfig(QuantizationConfigMixin):
    """`quantization_config` of a packed checkpoint. modules: module name -> its width, or a list with every expert's."""

    def __init__(
        self, group_size=None, modules=None, format_version=manifest.FORMAT_VERSION, quant_method=manifest.METHOD, **_
    ):
        manifest.check_version(format_version, "config.json")
        if group_size is None or modules is None:
            raise ValueError("config.json: quantization_config lacks group_size or modules; fetch the checkpoint again")
        self.quant_method = quant_method
        self.format_version = format_version
        self.group_size = group_size
        self.modules = modules


@register_quantizer(manifest.METHOD)
class MoepressQuantizer(HfQuantizer):
    """Checks the files and swaps the modules named in the configuration for packed ones, before any weight is read.

    layout: shard -> tensor -> its stored dtype. stored_dtype: the one that config.json names.
    """

    requires_calibration = True

    def update_attn_implementation(self, config):
        """The model's configuration without the guard; attention stays as it is. transformers asks here before any file."""
        for name in manifest.GUARD:
            vars(config).pop(name, None)
        return config

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **_):
        config = self.quantization_config
        if not checkpoint_files:
            raise ValueError("a packed model is loaded from its folder: from_pretrained(folder), without state_dict")
        folder = Path(checkpoint_files[0]).parent
        is_checked = checked.get() == folder.resolve()
        is_local = Path(model.config.name_or_path).is_dir()  # else the hub's cache, which has only what was asked for
        headers = manifest.check(folder, verify=not is_checked, complete=is_local)
        for name, bits in config.modules.items():
            module = _submodule(model, name)
            packed = PackedLinear if isinstance(module, nn.Linear) else PackedExperts
            model.set_submodule(name, packed(module, bits, config.group_size))
        check_tensors(model, headers, folder)
        self.layout = {
            shard: {tensor: DTYPES[entry["dtype"]] for tensor, entry in header.items()} for shard, header in headers.items()
        }
        original = manifest.read_json(folder / "config.json")
        self.stored_dtype = original.get("dtype", original.get("torch_dtype"))

    def _process_model_after_weight_loading(self, model, **_):
        model.save_pretrained = types.MethodType(save_pretrained, model)

    def update_weight_conversions(self, weight_conversions, model):
        """None: a packed folder has the names of the modules, and is saved under them."""
        return []

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(
            f"config.json: quantization_config.modules names {name!r}, which {type(model).__name__} has not; "
            "load the folder by AutoModelForCausalLM"
        ) from error


def check_tensors(model, headers: dict[str, dict], folder: Path) -> None:
    """Raise ValueError for tensors that are missing, left over, or of another shape or width than the model's.

    transformers would warn and go on with random weights. headers: as `manifest.check` returns them.
    """
    found = {name: entry for header in headers.values() for name, entry in header.items()}
    expected = model.state_dict()
    optional = re.compile("|".join(model._keys_to_ignore_on_load_missing or ()) or r"\Z.")
    required = {name for name in expected if name not in model.all_tied_weights_keys and not optional.search(name)}
    if missing := sorted(required - found.keys()):
        raise ValueError(f"{folder}: missing tensors {missing[:5]}; fetch or write the checkpoint again")
    if unexpected := sorted(found.keys() - expected.keys()):
        raise ValueError(f"{folder}: unexpected tensors {unexpected[:5]}; fetch or write the checkpoint again")
    packed = {
        f"{name}.{part}" for name, module in model.named_modules() if isinstance(module, PackedMatrices)
        for part in ("codes", "zeros", "scales")
    }  # fmt: skip
    for name, entry in found.items():
        shape, dtype = tuple(expected[name].shape), DTYPES.get(entry["dtype"])
        if tuple(entry["shape"]) != shape:
            raise ValueError(f"{folder}: the tensor {name} is {entry['shape']}, its module takes {list(shape)}")
        if dtype is None or (name in packed and dtype != expected[name].dtype):
            raise ValueError(f"{folder}: the tensor {name} is stored as {entry['dtype']}, which does not fit its module")
