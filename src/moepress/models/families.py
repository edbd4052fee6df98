"""What a model's config.json means and where its weights lie on disk: with dialects.py all that knows architectures.

Imports no torch, so that a configuration can be checked before anything heavy starts. To add a family, add an entry to
FAMILIES; `tests/test_families.py` proves it against transformers' own forward.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd, lcm

from moepress.models.dialects import DIALECTS, standard_config
from moepress.schema.values import MOST_EXPERTS, MOST_LAYERS

ATTENTION = "self_attn"


@dataclass(frozen=True)
class Family:
    """How transformers names one architecture's parts, and how its weights lie on disk.

    num_experts, intermediate_size, top_k: their keys in config.json.
    block: the MoE block's path inside a decoder layer (a dense layer has its MLP there). router: within the block.
    router_weight: within the router. correction: a bias within the block that only the selection sees.
    scores: what the correction is added to, softmax or sigmoid of the logits. scores_key: where config.json tells it, its key
    there; another value than `scores` is refused. attention: modules that mix positions, of which
    a layer has one. norm, rotary: the last norm and the positions, beside the layers. unquantized: linears of a layer that stay
    at 16 bits. residual_scale: the layer's attribute that scales what the block adds. returns_tuple: the block's output is one.
    gate, up, down: an expert's matrices on disk; where those named by `fused` are there, `(gate and up, down)` of all experts
    in 3-D tensors, they stand for them.
    disk_block: the block's path on disk where it is another. renames: regex on disk -> name in the module, within a layer.
    """

    num_experts: str = "num_experts"
    intermediate_size: str = "moe_intermediate_size"
    top_k: str = "num_experts_per_tok"
    block: str = "mlp"
    router: str = "gate"
    router_weight: str = "weight"
    correction: str | None = None
    scores: str = "softmax"
    scores_key: str | None = None
    attention: tuple[str, ...] = (ATTENTION,)
    norm: str = "norm"
    rotary: str = "rotary_emb"
    unquantized: tuple[str, ...] = ()
    residual_scale: str | None = None
    returns_tuple: bool = False
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    fused: tuple[str, str] | None = None
    disk_block: str | None = None
    renames: tuple[tuple[str, str], ...] = ()

    @property
    def experts(self) -> str:
        return f"{self.block}.experts"

    @property
    def experts_on_disk(self) -> str:
        return f"{self.disk_block or self.block}.experts"

    @property
    def router_path(self) -> str:
        return f"{self.block}.{self.router}"

    def correction_of(self, layer):
        """The tensor in a decoder layer; None where the family has none."""
        owner, _, name = f"{self.block}.{self.correction}".rpartition(".")
        return getattr(layer.get_submodule(owner), name) if self.correction else None


_W123: dict = {
    "intermediate_size": "intermediate_size",
    "num_experts": "num_local_experts",
    "gate": "w1",
    "up": "w3",
    "down": "w2",
    "disk_block": "block_sparse_moe",
}
_SIGMOID: dict = {"num_experts": "n_routed_experts", "correction": "gate.e_score_correction_bias", "scores": "sigmoid"}

FAMILIES = {
    "mixtral": Family(**_W123, renames=((r"^block_sparse_moe\.", "mlp."),)),
    "phimoe": Family(**_W123, router="router", renames=((r"^block_sparse_moe\.", "mlp."), (r"^mlp\.gate\.", "mlp.router."))),
    "minimax_m2": Family(
        **_W123, correction="e_score_correction_bias", scores="sigmoid", renames=((r"^block_sparse_moe\.", "mlp."),)
    ),
    "qwen2_moe": Family(unquantized=("mlp.shared_expert_gate",)),
    "qwen3_moe": Family(),
    "qwen3_next": Family(
        attention=(ATTENTION, "linear_attn"), unquantized=("mlp.shared_expert_gate", "linear_attn.in_proj_ba")
    ),
    "qwen3_5_moe_text": Family(
        attention=(ATTENTION, "linear_attn"),
        unquantized=("mlp.shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b"),
        fused=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
    "olmoe": Family(intermediate_size="intermediate_size"),
    "deepseek_v2": Family(num_experts="n_routed_experts"),
    "deepseek_v3": Family(**_SIGMOID),
    "glm4_moe": Family(**_SIGMOID),
    "glm4_moe_lite": Family(**_SIGMOID),
    "solar_open": Family(**_SIGMOID),
    "dots1": Family(**_SIGMOID),
    "exaone_moe": Family(
        correction="gate.e_score_correction_bias",
        scores="sigmoid",
        renames=((r"^mlp\.e_score_correction_bias$", "mlp.gate.e_score_correction_bias"),),
    ),
    "hy_v3": Family(
        correction="e_score_correction_bias",
        scores="sigmoid",
        renames=(
            (r"^mlp\.router\.gate\.", "mlp.gate."),
            (r"^mlp\.expert_bias$", "mlp.e_score_correction_bias"),
            (r"^mlp\.shared_mlp\.", "mlp.shared_experts."),
        ),
    ),
    "mellum": Family(),
    "ernie4_5_moe": Family(
        num_experts="moe_num_experts",
        top_k="moe_k",
        correction="gate.moe_statics.e_score_correction_bias",
        renames=((r"^mlp\.moe_statics\.", "mlp.gate.moe_statics."),),
    ),
    "cohere2_moe": Family(intermediate_size="intermediate_size", scores="sigmoid", scores_key="expert_selection_fn"),
    "laguna": Family(
        correction="gate.e_score_correction_bias",
        scores="sigmoid",
        renames=(
            (r"^mlp\.experts\.e_score_correction_bias$", "mlp.gate.e_score_correction_bias"),
            (r"^mlp\.shared_expert\.", "mlp.shared_experts."),
        ),
    ),
    "lfm2_moe": Family(
        block="feed_forward",
        norm="embedding_norm",
        rotary="pos_emb",
        attention=(ATTENTION, "conv"),
        correction="expert_bias",
        scores="sigmoid",
        gate="w1",
        up="w3",
        down="w2",
    ),
    "hunyuan_v1_moe": Family(intermediate_size="intermediate_size", top_k="moe_topk", router_weight="wg.weight"),
    "granitemoe": Family(
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        block="block_sparse_moe",
        router="router",
        residual_scale="residual_multiplier",
        fused=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
        renames=((r"^block_sparse_moe\.router\.layer\.", "block_sparse_moe.router."),),
    ),
    "gpt_oss": Family(
        num_experts="num_local_experts",
        intermediate_size="intermediate_size",
        router="router",
        returns_tuple=True,
        fused=("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ),
}


ALIASES = {
    "num_experts": ("num_local_experts",),
    "num_local_experts": ("num_experts",),
    "n_routed_experts": ("num_local_experts", "num_experts"),
    "moe_num_experts": ("num_experts",),
    "moe_k": ("num_experts_per_tok",),
    "moe_topk": ("num_experts_per_tok",),
}
"""Other names that config.json may use for the same number."""
HANDLED = tuple(sorted([*FAMILIES, *DIALECTS]))


@dataclass(frozen=True)
class Shape:
    """What allocation, size prediction and checks need to know of a model. moe_layers: the indices of those with experts."""

    family: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    moe_layers: tuple[int, ...]
    vocab_size: int = 0


def shape_of(config: dict, key: str, names: Iterable[str] | None = None) -> Shape:
    """The shape in a model's config.json; ValueError for what is not handled, naming `key` and the model type.

    names: of the tensors on disk, which tell the layers with experts from the dense ones; without them `mlp_only_layers` does.
    """
    model_type = config.get("model_type")
    if model_type not in HANDLED:
        known = ", ".join(HANDLED)
        raise ValueError(f"{key}: model type {model_type!r} is not a Mixture-of-Experts family that is handled ({known})")
    config = standard_config(config, key)
    family = FAMILIES[config["model_type"]]
    if family.scores_key and (told := config.get(family.scores_key)) != family.scores:
        raise ValueError(f"{key}: config.json has {family.scores_key}={told!r}; of this type {family.scores!r} is handled")
    sizes = ("num_hidden_layers", "hidden_size", family.intermediate_size, family.num_experts, family.top_k)
    num_layers, hidden_size, intermediate_size, num_experts, top_k = (_size(config, name, key) for name in sizes)
    for name, value, most in (("layers", num_layers, MOST_LAYERS), ("experts", num_experts, MOST_EXPERTS)):
        if value > most:
            raise ValueError(f"{key}: config.json says that there are {value} {name}; at most {most} are handled")
    if top_k > num_experts:
        raise ValueError(f"{key}: config.json has {family.top_k}={top_k}, but {num_experts} experts")
    dense = config.get("mlp_only_layers") or ()
    if not isinstance(dense, list | tuple) or not isinstance(config.get("vocab_size") or 0, int):
        raise ValueError(
            f"{key}: config.json has mlp_only_layers={dense!r}, vocab_size={config.get('vocab_size')!r}; both are "
            "not what a model of its type has"
        )
    moe_layers = [layer for layer in range(num_layers) if layer not in dense]
    if names is not None:
        found = {int(name.split(".")[2]) for name in names if is_expert_matrix(family, name)}
        moe_layers = sorted(layer for layer in found if layer < num_layers)
        if not moe_layers:
            raise ValueError(f"{key}: no expert's weights are among the tensors, though config.json names {model_type!r}")
    return Shape(
        config["model_type"],
        num_layers,
        hidden_size,
        intermediate_size,
        num_experts,
        top_k,
        tuple(moe_layers),
        config.get("vocab_size") or 0,
    )


def _size(config: dict, name: str, key: str) -> int:
    """A number of config.json, under this name or an alias; of a list, one for each layer, the number that all of them have."""
    value = next((config[alias] for alias in (name, *ALIASES.get(name, ())) if alias in config), None)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if isinstance(value, list):
        raise ValueError(f"{key}: config.json has {name}={value}; layers of different sizes are not handled")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key}: config.json lacks {name}, which a model of its type must give")
    return value


def group_of(columns: int, group_size: int) -> int:
    """Weights of a row that share a scale: the group size, or its largest part that divides the row."""
    return gcd(columns, group_size)


SMALLEST_GROUP = 8
"""Weights that share a scale at the least; a linear whose rows share no such divisor with the group size stays at 16 bits."""


def check_group_size(shape: Shape, group_size: int) -> None:
    """ValueError for a group size that the rows of the experts' matrices cannot be divided into, naming one that they can."""
    for name, width in (("hidden_size", shape.hidden_size), ("intermediate_size", shape.intermediate_size)):
        if group_of(width, group_size) < SMALLEST_GROUP:
            raise ValueError(
                f"quantization.group_size={group_size} shares no divisor of {SMALLEST_GROUP} or more with the model's "
                f"{name}={width}; take {lcm(SMALLEST_GROUP, width)}, which makes each of these rows one group and has no "
                "compiled products"
            )


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def in_layer(name: str) -> str | None:
    """A tensor's name within its decoder layer; None outside the layers."""
    parts = name.split(".", 3)
    return parts[3] if parts[:2] == ["model", "layers"] else None


def module_name(family: Family, name: str) -> str:
    """A tensor's name within its decoder layer, as the module has it."""
    for pattern, replacement in family.renames:
        name = re.sub(pattern, replacement, name)
    return name


def is_expert_matrix(family: Family, name: str) -> bool:
    """Whether an on-disk name is one of a routed expert's matrices (or that of all experts together)."""
    return is_fused(family, name) or re.search(r"\.experts\.\d+\.", in_layer(name) or "") is not None


def is_fused(family: Family, name: str) -> bool:
    """Whether an on-disk name is that of all experts' matrices together."""
    return family.fused is not None and in_layer(name) in family.fused


def known_shape(shape: Shape, name: str) -> tuple[int, ...] | None:
    """The shape that config.json alone gives a tensor (by its family's name on disk): an expert's, a router's, the
    embedding's, a vector's; None for the other linears."""
    family, H, I = FAMILIES[shape.family], shape.hidden_size, shape.intermediate_size
    if is_expert_matrix(family, name):
        fused = family.fused if is_fused(family, name) else None
        is_down = name.endswith(fused[1] if fused else f".{family.down}.weight")
        one = (H, I) if is_down else (2 * I, H) if fused else (I, H)
        return (shape.num_experts, *one) if fused else one
    if name.endswith(("embed_tokens.weight", "head.weight")):
        return (shape.vocab_size, H)
    module = module_name(family, in_layer(name) or name)
    if module == f"{family.router_path}.{family.router_weight}":
        return (shape.num_experts, H)
    if module.removesuffix(".weight") in family.unquantized:  # a gate: few rows
        return (1, H)
    return (H,) if "norm" in module or not module.endswith(".weight") else None


def kind_of(family: Family, name: str, shape: tuple[int, ...] | list[int], group_size: int) -> str:
    """What becomes of a tensor, by its name on disk: `expert`, `attention` and `shared` (linears of shared experts and
    dense layers) are quantized, `rest` stays at 16 bits."""
    if is_expert_matrix(family, name):
        return "expert"
    inside = in_layer(name)
    if inside is None or len(shape) != 2 or not name.endswith(".weight"):
        return "rest"
    return linear_kind(family, module_name(family, inside).removesuffix(".weight"), shape[1], group_size)


def linear_kind(family: Family, module: str, columns: int, group_size: int) -> str:
    """The same for a linear module of a decoder layer with `columns` inputs: `attention`, `shared` or `rest`."""
    kept = (family.router_path, *family.unquantized)
    if group_of(columns, group_size) < SMALLEST_GROUP or any(module == k or module.startswith(k + ".") for k in kept):
        return "rest"
    if module.startswith(tuple(f"{name}." for name in family.attention)):
        return "attention"
    return "shared" if module.startswith(family.block + ".") else "rest"
