"""Decoder layers of a real shape with random weights, 16-bit and packed, and a routing of a given skew. Random codes are as
good as quantized ones: no time depends on their values.

Legend: V vocabulary, K selected experts, E experts, L MoE layers.
"""

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from moepress.inference.packed import PackedExperts, PackedLinear, PackedMatrices
from moepress.models import families, limits
from moepress.pruning.policy import experts_of, routers_of

VOCAB = 4096
"""Tokens of the layers that are built; there is no head, so it costs nothing."""
CHUNK = (1 << 20) + 7
"""Random numbers that the weights repeat; a prime, so that no two rows of a matrix are alike."""
STD = 0.02
"""Standard deviation of the weights: the initializer_range of most families."""


def on_meta(config: dict, dtype: torch.dtype):
    """The model on the meta device. config: see `shapes.layers_only`."""
    with torch.device("meta"):
        known = AutoConfig.for_model(**config)
        known.dtype = dtype
        model = AutoModelForCausalLM.from_config(known, dtype=dtype, trust_remote_code=False)
    model.lm_head = nn.Identity()
    return model.eval()


def build(config: dict, dtype: torch.dtype, device: str, widths: list[int] | None, settings: dict):
    """The layers, at 16 bits without `widths` (of a layer's experts). settings: of the group `quantization`, its sizes."""
    model = on_meta(config, dtype)
    if widths is not None:
        pack(model, widths, settings, device)
    rotary = families.FAMILIES[model.config.model_type].rotary
    model.model.set_submodule(rotary, type(model.model.get_submodule(rotary))(config=model.config).to(device))
    generator = torch.Generator(device).manual_seed(0)
    chunk = torch.randn(CHUNK, generator=generator, device=device) * STD
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and value.is_meta:
                made = torch.empty(value.shape, dtype=value.dtype, device=device)
                is_norm = value.dim() == 1 and name == "weight"
                module._parameters[name] = nn.Parameter(made.fill_(1) if is_norm else tile(made, chunk), requires_grad=False)
        if isinstance(module, PackedMatrices):
            randomize(module, generator, device)
        for name, value in module._buffers.items():
            if value is not None and value.is_meta:
                module._buffers[name] = torch.zeros(value.shape, dtype=value.dtype, device=device)
    return model


def pack(model, widths: list[int], settings: dict, device: str) -> None:
    """Packed modules in the places that the quantization packs: experts, attention, shared experts."""
    family, group_size = families.FAMILIES[model.config.model_type], settings["group_size"]
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if name == family.experts:
                layer.set_submodule(name, PackedExperts(module, widths, group_size, device))
            elif isinstance(module, nn.Linear):
                bits = settings.get(f"{families.linear_kind(family, name, module.in_features, group_size)}_bits")
                if bits:
                    layer.set_submodule(name, PackedLinear(module, bits, group_size))


def randomize(matrices: PackedMatrices, generator: torch.Generator, device: str) -> None:
    """Any bytes are codes and zero points; the scales make weights of about STD."""
    for name in ("codes", "zeros"):
        size = getattr(matrices, name).shape
        matrices._buffers[name] = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator, device=device)
    scales = torch.empty(matrices.scales.shape, dtype=torch.float16, device=device)
    for e, bits in enumerate(matrices.bits):
        scales[e] = STD * 12**0.5 / 2**bits
    matrices._buffers["scales"] = scales


def tile(out: torch.Tensor, chunk: torch.Tensor) -> torch.Tensor:
    """`out` filled with repetitions of a chunk: a hundred times as fast as as many random numbers."""
    flat = out.view(-1)
    done = min(len(flat), len(chunk))
    flat[:done] = chunk[:done]
    while done < len(flat):
        more = min(done, len(flat) - done)
        flat[done : done + more] = flat[:more]
        done += more
    return out


def check_memory(config: dict, dtype: torch.dtype, device: str) -> None:
    """ValueError where the 16-bit layers, and the packed ones beside them, do not fit."""
    needed = 1.4 * sum(p.numel() for p in on_meta(config, dtype).parameters()) * dtype.itemsize
    is_cuda = torch.device(device).type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_cuda else limits.free_memory()
    if needed > free:
        layers = config["num_hidden_layers"]
        hint = "" if dtype.itemsize == 2 else ", or latency.dtype=bfloat16, which is half of it"
        most = int(layers * free / needed)
        raise ValueError(
            f"latency.num_layers={layers}: takes {needed / 2**30:.1f} GiB, there is {free / 2**30:.1f} GiB; "
            f"{f'{most} layers fit' if most else 'not even one layer fits'}{hint}"
        )


class SkewedRouting:
    """Made for a model, it routes each token by its id: in each layer to K experts that were drawn for that id, without
    repetition, expert e with probability proportional to `(e + 1) ** -skew`. The routers still run, and the routing weights
    remain theirs.

    tables: `[L][V, K]`.
    """

    def __init__(self, model, skew: float):
        E, K = experts_of(model)[0].num_experts, model.config.num_experts_per_tok
        log_p_E = -skew * torch.arange(1, E + 1, dtype=torch.float64).log()
        self.num_experts, self.tables = E, []
        for layer, router in enumerate(routers_of(model)):
            uniform_VE = torch.rand(VOCAB, E, dtype=torch.float64, generator=torch.Generator().manual_seed(layer))
            gumbel_VE = -(-uniform_VE.log()).log()  # the largest of log p + Gumbel noise are a draw without repetition
            self.tables.append((log_p_E + gumbel_VE).topk(K).indices.to(model.device))
            router.register_forward_hook(self.router(self.tables[-1]))
        model.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, _, args, kwargs) -> None:
        self.ids_T = kwargs["input_ids"].reshape(-1)

    def router(self, table_VK: torch.Tensor):
        return lambda _, args, out: (*out[:2], table_VK[self.ids_T])

    def counts(self, ids: torch.Tensor) -> torch.Tensor:
        """Slots that each expert gets of these tokens, over all layers, `[E]`."""
        chosen = torch.cat([table_VK[ids.reshape(-1)].flatten().cpu() for table_VK in self.tables])
        return torch.bincount(chosen, minlength=self.num_experts)


def realised(counts_E: np.ndarray) -> dict[str, float]:
    """What a routing turned out to be. counts: slots of each expert. exponent: Zipf's, by least squares of the logarithms of
    frequency and rank; busiest: the most selected expert's slots over an even share; unused: share of the experts."""
    ranked = np.sort(np.asarray(counts_E, float))[::-1]
    used = ranked[ranked > 0]
    exponent = -np.polyfit(np.log(np.arange(1, len(used) + 1)), np.log(used), 1)[0] if len(used) > 1 else np.nan
    return {
        "exponent": float(exponent),
        "busiest": float(ranked[0] / ranked.mean()),
        "unused": float((ranked == 0).mean()),
    }
