"""Walking a model one decoder layer at a time, straight from its safetensors: the whole model is never built.

The skeleton lives on the meta device; a layer's weights are read when its turn comes and dropped after it. What is not the
layer's own business (masks, positions, the scale of the embedding) comes from the model's own forward, run over taps in
the layers' places (standins.py).

Legend: N sequences, S positions, H hidden size, T = N * S tokens, E experts, K selected experts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from moepress.models import families, folders
from moepress.models.dialects import is_doubled, standard_config
from moepress.models.experts import StoredExperts
from moepress.models.families import FAMILIES, layer_prefix
from moepress.models.files import Entry
from moepress.models.limits import TOKENS_AT_ONCE
from moepress.models.lowbit import LowBit, Stored
from moepress.models.standins import ArgumentsTap, BlockTap, Embedding, Replay, RoutingTap

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass
class Routing:
    """What a layer's router makes of T tokens: logits `[T, E]`, weights and indices `[T, K]`."""

    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


class ModelStream:
    """A model folder, read layer by layer and computed in float32 on `device`.

    Raises ValueError naming the file and the tensor for what is missing, not whole, NaN or infinite.
    """

    dtype = torch.float32

    def __init__(self, folder: Path, device: str = "cpu"):
        self.folder, self.device = Path(folder), device
        self.source_config, self.shape, self.entries = folders.read_model(self.folder, "model")
        self.family = FAMILIES[self.shape.family]
        quantized = self.source_config.get("quantization_config") or {}
        self._block = tuple(quantized.get("weight_block_size") or (128, 128))
        if "model.embed_tokens.weight" not in self.entries:
            raise ValueError(f"{self.folder}: the checkpoint lacks the tensor model.embed_tokens.weight")
        try:
            self.config = auto_config(self.source_config)
            with torch.device("meta"):
                self.skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, trust_remote_code=False)
        except Exception as error:  # transformers checks little of what it is given: errors of any kind come from deep inside
            raise ValueError(
                f"{self.folder / 'config.json'}: no model can be made of it ({error!r}); fetch it again"
            ) from error
        self.skeleton.eval()
        self.body = self.skeleton.model
        self._arguments: dict[int, list[dict]] = {}

    @property
    def norm(self) -> nn.Module:
        """The last one."""
        return self.body.get_submodule(self.family.norm)

    @property
    def storage_dtype(self) -> torch.dtype:
        """The dtype of the checkpoint: that of its embedding."""
        return DTYPES[self.entries["model.embed_tokens.weight"].dtype]

    def read(self, names: list[str]) -> dict[str, Stored]:
        """Tensors by their names on disk, as stored; on CPU they are views of the mapped files."""
        by_file: dict[Path | None, list[str]] = {}
        for name in names:
            by_file.setdefault(self.entries[name].path, []).append(name)
        found: dict[str, Stored] = {}
        for path, inside in by_file.items():
            if path is None:
                found |= {name: torch.zeros(self.entries[name].shape, dtype=self.storage_dtype) for name in inside}
                continue
            with safe_open(path, framework="pt") as file:
                for name in inside:
                    found[name] = self._checked(file.get_tensor(self.entries[name].name), self.entries[name])
        return found

    def read_dense(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The same, what is stored in 8 or 4 bits in bfloat16."""
        return {n: t.to("cpu", torch.bfloat16) if isinstance(t, LowBit) else t for n, t in self.read(names).items()}

    def read_whole(self) -> dict[str, torch.Tensor]:
        """The whole model, 16-bit, under its family's names on disk."""
        found = self.read_dense(list(self.entries))
        for index in self.shape.moe_layers if self.family.fused else ():
            original = self.body.layers[index].get_submodule(self.family.experts)
            for name in (layer_prefix(index) + inside for inside in self.family.fused or ()):
                if original.is_transposed and self.entries[name].scale:
                    found[name] = found[name].transpose(1, 2).contiguous()
        return found

    def _checked(self, tensor: torch.Tensor, entry: Entry) -> Stored:
        if entry.scale is not None:
            with safe_open(entry.scale.path, framework="pt") as file:
                low = LowBit(tensor, file.get_tensor(entry.scale.name), self._block)
            if not low.is_finite():
                raise ValueError(f"{entry.path}: the tensor {entry.name} holds NaN or infinite values; the file is damaged")
            return low
        if entry.dtype not in DTYPES:
            raise ValueError(f"{entry.path}: {entry.name} is stored as {entry.dtype}; give the model in one of {[*DTYPES]}")
        if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise ValueError(f"{entry.path}: the tensor {entry.name} holds NaN or infinite values; the file is damaged")
        return tensor * 2 if is_doubled(self.source_config, entry.name) else tensor

    def check(self) -> Iterator[None]:
        """Read every tensor once, a layer at a time; ValueError naming one that is missing, unknown, of another shape, NaN or
        infinite. Yields after each layer. The stream is used up."""
        outside = {n: t.shape for n, t in self.skeleton.state_dict().items() if not n.startswith("model.layers.")}
        if self.config.tie_word_embeddings:
            outside.pop("lm_head.weight", None)
        self._compare(outside, {name: self.entries[name].shape for name in self.names_outside_layers()})
        self.read(self.names_outside_layers())
        for _ in self.layers():
            yield

    def _compare(self, expected: dict, found: dict) -> None:
        unknown = sorted(found.keys() - expected.keys() - {"lm_head.weight"})
        for name, shape in expected.items():
            if name not in found:
                instead = f"; it has the unknown tensor {unknown[0]}" if unknown else ""
                raise ValueError(f"{self.folder}: the checkpoint lacks the tensor {name}{instead}")
            if tuple(found[name]) != tuple(shape):
                raise ValueError(f"{self.folder}: the tensor {name} is {[*found[name]]}, config.json makes it {[*shape]}")
        if unknown:
            raise ValueError(f"{self.folder}: the checkpoint has the unknown tensor {unknown[0]}")

    def names_outside_layers(self) -> list[str]:
        """On-disk names of the embedding, the last norm and the head."""
        return sorted(name for name in self.entries if not name.startswith("model.layers."))

    def layer_names(self, index: int) -> dict[str, str]:
        """Name in the layer's module -> on-disk name, of all its tensors but its experts' matrices."""
        prefix = layer_prefix(index)
        names = [n for n in self.entries if n.startswith(prefix) and not families.is_expert_matrix(self.family, n)]
        return {families.module_name(self.family, name.removeprefix(prefix)): name for name in names}

    def layer_tensors(self, index: int) -> dict[str, torch.Tensor]:
        """Layer `index` without its experts' matrices, under its module's names, in the checkpoint's own dtypes."""
        names = self.layer_names(index)
        found = self.read_dense(list(names.values()))
        return {name: found[on_disk] for name, on_disk in names.items()}

    def expert_tensors(self, index: int) -> list[tuple[list[Stored], Stored]]:
        """Each expert's gate-up rows `[2I, H]`, in one part or two, and its down projection `[H, I]`, as stored."""
        prefix, family, E = layer_prefix(index), self.family, self.shape.num_experts
        together = [prefix + name for name in family.fused or ()]
        is_fused = any(name in self.entries for name in together)
        if is_fused:
            names = together
        else:
            each = [
                [f"{prefix}{family.experts_on_disk}.{e}.{m}.weight" for m in (family.gate, family.up, family.down)]
                for e in range(E)
            ]
            names = [name for matrices in each for name in matrices]
        if missing := [name for name in names if name not in self.entries]:
            raise ValueError(f"{self.folder}: the checkpoint lacks the tensor {missing[0]}")
        found = self.read(names)
        if not is_fused:
            return [([found[gate], found[up]], found[down]) for gate, up, down in each]
        gate_up, down = found.values()
        if self.body.layers[index].get_submodule(family.experts).is_transposed:  # mxfp4 has its rows as we have
            gate_up, down = (t if isinstance(t, LowBit) else t.transpose(1, 2) for t in (gate_up, down))
        return [([gate_up[e]], down[e]) for e in range(E)]

    def layer(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, its experts as `StoredExperts`."""
        layer = self.body.layers[index]
        names, prefix = self.layer_names(index), layer_prefix(index)
        matrices = {f"{self.family.experts}.{name}" for name in ("gate_up_proj", "down_proj")}
        kept = matrices if index in self.shape.moe_layers else set()
        expected = {names.get(n, prefix + n): t.shape for n, t in layer.state_dict().items() if n not in kept}
        self._compare(expected, {name: self.entries[name].shape for name in names.values()})
        rest = {name: tensor.to(self.device, self.dtype) for name, tensor in self.layer_tensors(index).items()}
        layer.load_state_dict(rest, strict=False, assign=True)
        if index in self.shape.moe_layers:
            original = layer.get_submodule(self.family.experts)
            stored = StoredExperts(original, self.expert_tensors(index), self.device)
            I, H = stored.intermediate_size, stored.hidden_size
            for e in range(stored.num_experts):
                rows, down = sum(len(part) for part in stored.weights[e][0]), tuple(stored.weights[e][1].shape)
                if rows != 2 * I or down != (H, I):
                    raise ValueError(
                        f"{self.folder}: expert {e} of layer {index} is {rows} x {down}, config.json has {I} x {H}"
                    )
            layer.set_submodule(self.family.experts, stored)
        return layer.requires_grad_(False)

    def layers(self, start: int = 0) -> Iterator[tuple[int, nn.Module]]:
        """Every layer from `start` on in turn; one is in memory at a time: its weights go when the next one is asked for."""
        return self._each(range(start, self.shape.num_layers))

    def layers_back(self, start: int) -> Iterator[tuple[int, nn.Module]]:
        """The same from `start` down to the first one."""
        return self._each(range(start, -1, -1))

    def _each(self, indices: range) -> Iterator[tuple[int, nn.Module]]:
        for index in indices:
            layer = self.layer(index)
            yield index, layer
            self.body.layers[index] = nn.Identity()
            layer.to("meta")
            for module in layer.modules():
                if isinstance(module, StoredExperts):
                    module.weights.clear()

    def embed(self, token_ids_NS: torch.Tensor, out_NSH: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states `[N, S, H]` that enter the first layer, written to `out` where it is given.

        This is the model's own forward with an `ArgumentsTap` in each layer's place: what the taps keep is what `call` hands to
        the layers.
        """
        weight = self.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
        N, S = token_ids_NS.shape
        out = torch.empty(N, S, self.shape.hidden_size) if out_NSH is None else out_NSH
        keep, norm = (self.body.layers, self.body.embed_tokens), self.norm
        taps = [ArgumentsTap() for _ in keep[0]]
        self._place_positions()
        self.body.layers = nn.ModuleList(taps)
        self.body.set_submodule(self.family.norm, nn.Identity())
        self.body.embed_tokens = Embedding(weight, self.device, self.dtype)
        try:
            for part in _parts(N, S):
                ids = token_ids_NS[part].to(self.device)
                out[part] = self.body(input_ids=ids, use_cache=False).last_hidden_state.to(out.device)
            if S not in self._arguments:  # of one sequence: they serve any number
                self.body(input_ids=token_ids_NS[:1].to(self.device), use_cache=False)
                self._arguments[S] = [tap.arguments for tap in taps]
        finally:
            self.body.layers, self.body.embed_tokens = keep
            self.body.set_submodule(self.family.norm, norm)
        return out

    def logits(self, x_NSH: torch.Tensor) -> torch.Tensor:
        """The model's logits `[N, S, V]` for what leaves the last layer: its own last norm, head and scaling."""
        self._load_head()
        self._place_positions()
        keep = (self.body.layers, self.body.embed_tokens)
        self.body.layers = nn.ModuleList([Replay(x_NSH.to(self.device))])
        self.body.embed_tokens = Embedding(torch.zeros(1, self.shape.hidden_size), self.device, self.dtype)
        try:
            nothing = torch.zeros(x_NSH.shape[:2], dtype=torch.long, device=self.device)
            return self.skeleton(input_ids=nothing, use_cache=False).logits
        finally:
            self.body.layers, self.body.embed_tokens = keep

    def _place_positions(self) -> None:
        """The rotary embedding: computed, not stored."""
        rotary = self.body.get_submodule(self.family.rotary)
        if any(buffer.is_meta for buffer in rotary.buffers()):
            self.body.set_submodule(self.family.rotary, type(rotary)(config=self.config).to(self.device))

    def _load_head(self) -> None:
        """The last norm and the head, which may be the embedding's."""
        tied = "lm_head.weight" not in self.entries
        for module, prefix in ((self.norm, f"model.{self.family.norm}."), (self.skeleton.lm_head, "lm_head.")):
            if not any(tensor.is_meta for tensor in module.state_dict().values()):
                continue
            found = self.read([name for name in self.entries if name.startswith(prefix)])
            tensors = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
            if module is self.skeleton.lm_head and tied:
                tensors["weight"] = self.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
            module.load_state_dict({n: t.to(self.device, self.dtype) for n, t in tensors.items()}, assign=True)
            module.requires_grad_(False)

    def call(self, index: int, layer: nn.Module, x_NSH: torch.Tensor) -> torch.Tensor:
        """A layer's own forward, with the arguments that its model gives it."""
        S = x_NSH.shape[1]
        if S not in self._arguments:
            self.embed(torch.zeros(1, S, dtype=torch.long))
        return layer(x_NSH, **self._arguments[S][index])

    def attend(self, index: int, layer: nn.Module, x_NSH: torch.Tensor, residual_NSH=None, block_input_NSH=None):
        """The layer up to its MoE block (or MLP): the residual stream and the block's input, `[N, S, H]` both, written to the
        given tensors where there are some.

        The block is swapped for one that keeps its input and adds nothing, so the layer's own code does the rest.
        """
        residual = torch.empty_like(x_NSH) if residual_NSH is None else residual_NSH
        block_input = torch.empty_like(x_NSH) if block_input_NSH is None else block_input_NSH
        block = layer.get_submodule(self.family.block)
        tap = BlockTap(self.family.returns_tuple and index in self.shape.moe_layers)
        layer.set_submodule(self.family.block, tap)
        try:
            for part in _parts(*x_NSH.shape[:2]):
                residual[part] = self.call(index, layer, self._on_device(x_NSH[part])).to(residual.device)
                block_input[part] = tap.kept.to(residual.device)
        finally:
            layer.set_submodule(self.family.block, block)
        return residual, block_input

    def add_block(self, layer: nn.Module, residual_NSH: torch.Tensor, block_input_NSH: torch.Tensor) -> torch.Tensor:
        """Add what the MoE block (or MLP) makes of its input to the residual stream, in place: the layer's output."""
        scale = self.block_scale(layer)
        for part in _parts(*residual_NSH.shape[:2]):
            residual_NSH[part] += (scale * self.block(layer, self._on_device(block_input_NSH[part]))).to(residual_NSH.device)
        return residual_NSH

    def _on_device(self, part_NSH: torch.Tensor) -> torch.Tensor:
        """Some sequences where the model is, one after the other in memory, as models' own code may expect."""
        return part_NSH.to(self.device).contiguous()

    def block_scale(self, layer: nn.Module) -> float:
        """What the block's output is multiplied with where it joins the residual stream."""
        return getattr(layer, self.family.residual_scale) if self.family.residual_scale else 1.0

    def pull_back(self, index: int, layer: nn.Module, x_NSH: torch.Tensor, g_NSH: torch.Tensor, out_NSH: torch.Tensor) -> None:
        """A layer's vector-Jacobian product: from its input x and the gradient g at its output the one at its input, written
        to `out`. The layer runs again, an expert's weights widened as forward and backward come to them."""
        for part in _parts(*x_NSH.shape[:2]):
            x = x_NSH[part].to(self.device, copy=True).requires_grad_()
            with torch.enable_grad():
                y = self.call(index, layer, x)
            out_NSH[part] = torch.autograd.grad(y, x, g_NSH[part].to(self.device))[0].to(out_NSH.device)

    def block(self, layer: nn.Module, m_NSH: torch.Tensor) -> torch.Tensor:
        """The MoE block's (or MLP's) output for some sequences."""
        output = layer.get_submodule(self.family.block)(m_NSH)
        return output[0] if isinstance(output, tuple) else output

    def run_block(self, layer: nn.Module, m_NSH: torch.Tensor) -> None:
        """The MoE block (or MLP) on its input, some sequences at a time, for what watches its modules; no output is kept."""
        for part in _parts(*m_NSH.shape[:2]):
            self.block(layer, self._on_device(m_NSH[part]))

    def route(self, layer: nn.Module, m_NSH: torch.Tensor) -> Routing:
        """What the router makes of the block's input: its logits, and what reaches the experts, on the CPU.

        The block's own code runs, with a `RoutingTap` in its experts' place.
        """
        experts, seen, logits = layer.get_submodule(self.family.experts), RoutingTap(), []
        router = layer.get_submodule(self.family.router_path)
        hook = router.register_forward_hook(lambda _, __, output: logits.append(output[0].float().cpu()))
        layer.set_submodule(self.family.experts, seen)
        try:
            self.run_block(layer, m_NSH)
        finally:
            hook.remove()
            layer.set_submodule(self.family.experts, experts)
        return Routing(torch.cat(logits), torch.cat(seen.weights), torch.cat(seen.indices))

    def router_weight(self, layer: nn.Module) -> nn.Parameter:
        """`[E, H]`."""
        return layer.get_submodule(self.family.router_path).get_parameter(self.family.router_weight)

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """The routing weights before top-k, `[T, E]`."""
        return logits_TE.sigmoid() if self.family.scores == "sigmoid" else logits_TE.softmax(-1)

    def selection_scores(self, layer: nn.Module, logits_TE: torch.Tensor) -> torch.Tensor:
        """What the router's choice goes by, `[T, E]`: the logits, or their scores with the selection's correction."""
        correction = self.family.correction_of(layer)
        if correction is None:
            return logits_TE
        return self.scores(logits_TE) + correction.flatten().to(logits_TE)

    def linears(self, layer: nn.Module, kind: str, group_size: int) -> dict[str, nn.Linear]:
        """The layer's linears of a kind (`attention` or `shared`) under their names in it."""
        return {
            name: module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and families.linear_kind(self.family, name, module.in_features, group_size) == kind
        }


def auto_config(source_config: dict):
    """transformers' configuration object for a config.json of a family or dialect that is handled."""
    standard = standard_config(source_config, "model")
    return CONFIG_MAPPING[standard["model_type"]].from_dict(standard)


def _parts(num_sequences: int, seq_len: int) -> list[slice]:
    """Slices of as many sequences as go at once."""
    step = max(1, TOKENS_AT_ONCE // seq_len)
    return [slice(start, start + step) for start in range(0, num_sequences, step)]
