"""Loading a packed checkpoint, or the 16-bit model beside it, with every file and tensor checked.

transformers' own `from_pretrained` checks packed folders in the same way: see `quantizer.py`.
"""

from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging

from moepress.inference import manifest, quantizer
from moepress.models import families, folders, limits
from moepress.models.dialects import is_foreign
from moepress.models.experts import ON_CPU
from moepress.models.streaming import ModelStream
from moepress.pruning.policy import attach


def pick_device(device: str) -> str:
    """`auto` is cuda where there is one; ValueError for one where there is none."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device={device!r}: torch finds no GPU here; take device='cpu' or 'auto'")
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def fits(folder: Path, device: str, dtype: torch.dtype | None = None) -> bool:
    """Whether a 16-bit model folder can be loaded as `load` does it, with a tenth of it to spare for what runs through it."""
    entries = folders.tensors(folders.locate(Path(folder))).values()
    if torch.device(device).type == "cuda":
        free, default = torch.cuda.mem_get_info(device)[0], None
    else:
        free, default = limits.free_memory(), torch.float32
    dtype = dtype or default
    width = dtype.itemsize if dtype else None
    return 1.1 * sum(entry.numel * width if width else entry.nbytes for entry in entries) < free


def load(
    folder,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    pruning: dict | str | Path | None = None,
    verify: bool = True,
):
    """`(model, tokenizer)` of a folder: packed by moepress, or the 16-bit model of a family that is handled.

    folder: a checkpoint, or a folder of results (of the model or the quantization stage).
    dtype: of the computation; default float32 on CPU, else the checkpoint's own.
    pruning: a policy such as `{"method": "pesf", "alpha": 0.3, "renormalize": True}`, active in the loaded model (see
    `pruning.policy.attach`); or the pruning stage's folder, or its policy.json.
    verify: hash every file of a packed folder and compare; False compares only names, sizes and headers.
    Raises ValueError naming a file that is missing, unexpected, truncated, altered or of a newer format, and weights that
    are missing, left over or of the wrong shape: transformers alone would go on with random ones; and a GPU that is not there.
    """
    folder = folders.locate(Path(folder))
    model = load_model(folder, pick_device(device), dtype, verify)
    if pruning:
        attach(model, pruning if isinstance(pruning, dict) else read_policy(Path(pruning)))
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def read_policy(path: Path) -> dict:
    """The policy in a folder of the pruning stage, or in its policy.json. Raises ValueError where there is none."""
    path = path / "policy.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"pruning={str(path)!r}: no such file; give the folder of a pruning stage, its policy.json, or a dict")
    return manifest.read_json(path)


def load_model(folder: Path, device: str = "cpu", dtype: torch.dtype | None = None, verify: bool = True):
    """The model alone; see `load`."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so this is not a model folder")
    is_packed = manifest.is_packed(folder)
    if is_packed:
        manifest.check(folder, verify)
    config = manifest.read_json(folder / "config.json")
    families.shape_of(config, str(folder))
    given = {"dtype": dtype or (torch.float32 if device == "cpu" else "auto"), "output_loading_info": True}
    with _quiet(), _checked(folder if is_packed else None):
        if not is_packed and is_foreign(config):
            stream = ModelStream(folder)
            if given["dtype"] == "auto":
                given["dtype"] = stream.storage_dtype
            known = MODEL_FOR_CAUSAL_LM_MAPPING[type(stream.config)]
            tensors = stream.read_whole()
            model, info = known.from_pretrained(None, config=stream.config, state_dict=tensors, **given)
        else:
            model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, use_safetensors=True, **given)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} {sorted(map(str, info[kind]))[:5]}: not loaded")
    if device == "cpu" and not is_packed:
        model.set_experts_implementation(ON_CPU)
    return model.eval().to(device)


@contextmanager
def _checked(folder: Path | None):
    """transformers loads this folder without comparing the hashes again."""
    token = quantizer.checked.set(folder and folder.resolve())
    try:
        yield
    finally:
        quantizer.checked.reset(token)


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
