"""Real models' shapes, for want of their weights: conf/latency/models/NAME.json holds what of config.json the shapes follow
from. Imports no torch."""

from moepress.models import families
from moepress.models.dialects import standard_config
from moepress.quantization.size import expert_bytes, mixed


def layers_only(shape: dict, num_layers: int, vocab_size: int) -> dict:
    """The configuration, in the words of a model type of transformers, of so many of its decoder layers with experts."""
    config = standard_config(shape, "latency.model")
    return config | {"num_hidden_layers": num_layers, "vocab_size": vocab_size, "mlp_only_layers": [], "pad_token_id": None}


def widths(shape: dict, allocation: dict, group_size: int) -> list[int]:
    """A width for each expert of a layer: the same for all, or the two of `allocation.widths` around `allocation.bits` so that
    they come to it on average in bytes, the wider ones for the experts that are selected most, as PMQ has it."""
    found = families.shape_of(shape, "latency.model")
    if not allocation.get("widths"):
        return [int(allocation["bits"])] * found.num_experts
    sizes = {width: expert_bytes(found, width, group_size) for width in allocation["widths"]}
    low = max(width for width in sizes if width <= allocation["bits"])
    high = min((width for width in sizes if width > low), default=low)
    share = (allocation["bits"] - low) / (high - low) if high > low else 0
    total = found.num_experts * (sizes[low] + share * (sizes[high] - sizes[low]))
    return mixed(sizes, total + 0.5, found.num_experts)


def layers_in_all(shape: dict) -> int:
    """Decoder layers with experts of the whole model."""
    return len(families.shape_of(shape, "latency.model").moe_layers)
