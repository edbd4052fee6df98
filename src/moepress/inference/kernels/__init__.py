"""Triton kernels for packed modules on a GPU, where they can be used; triton is imported only then.

`device.py`: the kernels. `launch.py`: what calls them. `layout.py`: what both agree on, in plain torch.
"""

import importlib.util
import os
from weakref import WeakKeyDictionary

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from moepress.inference.kernels import layout

NAME = "moepress_triton"
"""For `set_experts_implementation`: packed experts through the kernels, or an error that says why not. "eager" is the plain
loop; with any other name, the default's too, they are used where they can be."""
logger = logging.get_logger(__name__)
_plans: WeakKeyDictionary = WeakKeyDictionary()
_refusals: WeakKeyDictionary = WeakKeyDictionary()


def is_interpreted() -> bool:
    """Whether triton runs kernels in its interpreter, on CPU tensors: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def take(module, x: torch.Tensor, implementation: str | None = None) -> bool:
    """Whether a call of a packed module goes through the kernels. They have no backward, and are for a GPU.

    Raises ValueError where `implementation` demands them and they cannot be used.
    """
    if implementation != NAME and (not x.is_cuda or implementation == "eager"):
        return False
    why = "they have no backward; use torch.no_grad()" if torch.is_grad_enabled() and x.requires_grad else None
    why = why or (None if x.is_cuda or is_interpreted() else "the model is not on a GPU") or refusal(module)
    if why and implementation == NAME:
        raise ValueError(f"experts_implementation={NAME!r}: the kernels cannot be used: {why}")
    if why:
        logger.warning_once(f"packed weights are unpacked by plain torch, which is slower: {why}")
    return why is None


def refusal(module) -> str | None:
    """Why a `PackedExperts` or `PackedLinear` cannot run through the kernels; None if it can. Found out once a device."""
    parts = _parts(module)
    place = [(part.codes.device, part.codes.data_ptr()) for part in parts]
    if _refusals.get(module, (None,))[0] != place:
        _refusals[module] = place, _refusal(module, parts)
    return _refusals[module][1]


def _parts(module) -> list:
    return [module.gate_up, module.down] if hasattr(module, "gate_up") else [module]


def _refusal(module, parts: list) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; torch for CUDA brings it on Linux"
    for part in parts:
        if part.codes.is_cuda and torch.cuda.get_device_capability(part.codes.device) < (8, 0):
            return "the GPU is older than compute capability 8.0"
        if any(start % layout.ALIGN for start in part.code_starts):
            return f"not all matrices of {part.rows} x {part.columns} start at a multiple of {layout.ALIGN} bytes"
        if part.group_size % (2 * layout.CHUNK):
            return f"groups of {part.group_size} weights are no multiple of 16"
        if part.codes.data_ptr() % layout.ALIGN:
            return f"the codes lie at no multiple of {layout.ALIGN} bytes; move the model off the GPU and back"
    if len(parts) == 2 and layout.join_of(module.activate) is None:
        return "its gated activation is neither SiLU's nor gpt_oss's clamped one"
    return None


def plan(module) -> tuple:
    """What `launch` needs beside the weights, made once a device: `Matrices` of each part and, for experts, the join."""
    from moepress.inference.kernels.launch import Matrices

    parts = _parts(module)
    place = [(part.codes.device, part.codes.data_ptr()) for part in parts]
    if _plans.get(module, (None,))[0] != place:
        join = (layout.join_of(module.activate),) if len(parts) == 2 else ()
        _plans[module] = place, (*map(Matrices, parts), *join)
    return _plans[module][1]


def experts_forward(experts, hidden_TH, index_TK, weights_TK) -> torch.Tensor:
    """See `launch.experts_forward`."""
    from moepress.inference.kernels import launch

    with torch.cuda.device_of(hidden_TH):  # triton launches on the current device
        return launch.experts_forward(experts, hidden_TH, index_TK, weights_TK)


def linear_forward(linear, x: torch.Tensor) -> torch.Tensor:
    """See `launch.linear_forward`."""
    from moepress.inference.kernels import launch

    with torch.cuda.device_of(x):
        return launch.linear_forward(linear, x)


def _only_packed(experts, *_):
    raise ValueError(f"experts_implementation={NAME!r} is for packed experts; {type(experts).__name__} has 16-bit ones")


ALL_EXPERTS_FUNCTIONS.register(NAME, _only_packed)
