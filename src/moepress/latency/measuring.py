"""Times of models side by side: in turn in every round of one process, so that drift hits all alike; and beside each the time
that the device would need for what must be moved and computed.

Legend: B sequences, S positions.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from moepress.latency import traffic
from moepress.latency.device import seconds
from moepress.latency.graphs import StaticDecoding, rolls_on
from moepress.latency.traffic import Parts, Traffic, cache_bytes, weight_bytes
from moepress.models.experts import ON_CPU
from moepress.pruning.policy import attach

BEST_EXPERTS = {"cpu": ON_CPU, "cuda": "grouped_mm"}
"""How the experts of a 16-bit model run fastest, by device."""


@dataclass(frozen=True)
class Variant:
    """A loaded model as it is timed; several may share it. experts: transformers' name of the experts' implementation, None
    for the model's own. policy: of pruning. is_costly: timed at each phase's first setting only."""

    name: str
    model: PreTrainedModel
    experts: str | None = None
    policy: dict | None = None
    is_costly: bool = False

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model runs as this variant: with its experts' implementation and under its policy."""
        if self.experts:
            self.model.set_experts_implementation(self.experts)
        attached = attach(self.model, self.policy) if self.policy else None
        try:
            yield
        finally:
            if attached:
                attached.remove()


def variants(original, compressed, policy: dict | None, device: str) -> list[Variant]:
    """What is timed: the 16-bit model with its best experts and with transformers' plain ones, the compressed model, and this
    without its pruning policy. original, compressed: None where there is none; the same model where only a policy was added."""
    found = []
    if original is not None:
        best = BEST_EXPERTS[torch.device(device).type]
        found += [Variant("16bit", original, best), Variant("16bit-eager", original, "eager", is_costly=True)]
    if compressed is not None:
        experts = found[0].experts if compressed is original else None
        found.append(Variant("compressed", compressed, experts, policy))
        if policy and compressed is not original:
            found.append(Variant("compressed-unpruned", compressed))
    return found


class Prefill:
    """One forward over prompts `[B, S]`."""

    def __init__(self, variant: Variant, ids_BS: torch.Tensor):
        self.variant, self.ids_BS = variant, ids_BS

    def forward(self):
        return self.variant.model(input_ids=self.ids_BS, use_cache=True, logits_to_keep=1)

    def look(self) -> tuple[Traffic, int]:
        """What it must do, and the bytes of its cache."""
        with traffic.selections(self.variant.model) as counts:
            cache = self.forward().past_key_values
        found = Parts(self.variant.model).of_forward(counts, self.ids_BS.shape, 0, cache)
        return found, cache_bytes(cache)

    def time(self) -> float:
        """Milliseconds."""
        return 1e3 * seconds(self.forward, self.variant.model.device)


class Decode:
    """The tokens `ids[:, num_prompt:]` behind the prompts before them, one position at a time. The text is given, so that all
    models read the same."""

    def __init__(self, variant: Variant, ids_BS: torch.Tensor, num_prompt: int):
        self.variant, self.ids_BS, self.num_prompt, self.cache = variant, ids_BS, num_prompt, None

    @property
    def steps(self) -> int:
        return self.ids_BS.shape[1] - self.num_prompt

    def restart(self) -> None:
        """The cache as the prompt leaves it: cut back, or where it rolls on, computed again."""
        if self.cache is None or rolls_on(self.cache):
            prompt_BS = self.ids_BS[:, : self.num_prompt]
            out = self.variant.model(input_ids=prompt_BS, use_cache=True, logits_to_keep=1)
            self.cache = out.past_key_values
        else:
            self.cache.crop(self.num_prompt - self.cache.get_seq_length())

    def step(self, place: int):
        token_B1 = self.ids_BS[:, place : place + 1]
        return self.variant.model(input_ids=token_B1, past_key_values=self.cache, use_cache=True)

    def run(self) -> None:
        for place in range(self.num_prompt, self.ids_BS.shape[1]):
            self.step(place)

    def look(self) -> tuple[Traffic, int]:
        """What a step must do on average, and the bytes of the cache at the end."""
        parts, found = Parts(self.variant.model), []
        self.restart()
        for place in range(self.num_prompt, self.ids_BS.shape[1]):
            with traffic.selections(self.variant.model) as counts:
                self.step(place)
            found.append(parts.of_forward(counts, (len(self.ids_BS), 1), place, self.cache))
        return traffic.mean(found), cache_bytes(self.cache)

    def time(self) -> float:
        """Milliseconds of a step."""
        self.restart()
        return 1e3 * seconds(self.run, self.variant.model.device) / self.steps

    def captured(self) -> StaticDecoding:
        """The same as a CUDA graph; raises RuntimeError or ValueError where that cannot be."""
        static = StaticDecoding(self.variant.model, self.ids_BS, self.num_prompt)
        static.capture()
        return static


def in_turn(timers: Mapping[str, tuple[Variant, Callable[[], float]]], repeats: int, progress) -> dict[str, dict[str, float]]:
    """Each one's median and quartiles, after one warm-up, all in turn in every round."""
    times: dict[str, list[float]] = {name: [] for name in timers}
    for round_number in range(repeats + 1):
        for name, (variant, timer) in timers.items():
            with variant.ready():
                taken = timer()
            if round_number:
                times[name].append(taken)
        progress.update()
    return {name: spread(values) for name, values in times.items()}


def spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "q1": quartiles[0], "q3": quartiles[2], "min": min(values)}


def settings(config: dict) -> list[tuple[str, int, int]]:
    """`(phase, batch, length)` of everything that is timed, the first of each phase first. config: the group `latency`."""
    return [
        (phase, batch, length)
        for phase in ("prefill", "decode")
        for batch, length in itertools.product(config[f"{phase}_batch"], config[f"{phase}_len"])
    ]


def rounds(config: dict) -> int:
    """How often everything is timed in turn, over all settings, warm-ups included."""
    return len(settings(config)) * (config["repeats"] + 1)


@torch.inference_mode()
def measure(models: list[Variant], texts: dict[str, torch.Tensor], config: dict, progress) -> list[dict]:
    """A row for each model and setting, without the device's limit; see `with_limits`.

    texts: `prefill` and `decode` -> token ids, as many rows and columns as the largest setting needs.
    """
    rows, seen = [], set()
    for phase, batch, length in settings(config):
        is_first, end = phase not in seen, length + (config["decode_tokens"] if phase == "decode" else 0)
        seen.add(phase)
        ids_BS = texts[phase][:batch, :end]
        timed = {}
        for variant in models if is_first else [variant for variant in models if not variant.is_costly]:
            ids_BS = ids_BS.to(variant.model.device)
            timed[variant.name] = Prefill(variant, ids_BS) if phase == "prefill" else Decode(variant, ids_BS, length)
        looked = {name: look(one) for name, one in timed.items()}
        times = in_turn({name: (one.variant, one.time) for name, one in timed.items()}, config["repeats"], progress)
        graphs = graph_times({name: one for name, one in timed.items() if isinstance(one, Decode)}, config)
        for name, one in timed.items():
            row = {"model": name, "phase": phase, "batch": batch, "length": length, "ms": times[name], "graph_ms": None}
            row["experts"] = one.variant.experts or "packed"
            rows.append(row | looked[name] | graphs.get(name, {}))
    return rows


def look(one: Prefill | Decode) -> dict:
    """What it must do, and its memory: on a GPU the most that is allocated while it runs, of its own weights and what comes on
    top; on a CPU, where a process has one peak for all its models, weights and cache."""
    model, device = one.variant.model, one.variant.model.device
    is_cuda, before = device.type == "cuda", 0
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with one.variant.ready():
        found, cached = one.look()
    above = torch.cuda.max_memory_allocated(device) - before if is_cuda else cached
    kind = "peak" if is_cuda else "weights and cache"
    return {"must": asdict(found), "memory_bytes": weight_bytes(model) + above, "memory_is": kind}


def graph_times(timed: dict[str, Decode], config: dict) -> dict[str, dict]:
    """On a GPU: the times of decoding as a CUDA graph, of each model that can be captured; why not, of the others."""
    found, timers = {}, {}
    for name, one in timed.items():
        if one.variant.model.device.type != "cuda" or not config["cuda_graphs"]:
            continue
        if one.variant.experts == "eager":  # a capture that fails is better not begun
            found[name] = {"no_graph": "transformers' plain experts are chosen by value"}
            continue
        try:
            with one.variant.ready():
                static = one.captured()
        except (RuntimeError, ValueError) as error:
            torch.cuda.synchronize()
            found[name] = {"no_graph": str(error).splitlines()[0]}
            print(f"{name} is decoded without a CUDA graph: {found[name]['no_graph']}")
            continue
        timers[name] = (one.variant, partial(graph_ms, one, static))
    times = in_turn(timers, config["repeats"], Silent()) if timers else {}
    return found | {name: {"graph_ms": spread} for name, spread in times.items()}


def graph_ms(one: Decode, static: StaticDecoding) -> float:
    return 1e3 * seconds(static.run, one.variant.model.device) / one.steps


class Silent:
    def update(self) -> None:
        pass


def with_limits(rows: list[dict], bandwidth: float, flop_rate: float) -> list[dict]:
    """The rows with what the device would need at these rates, and the share of it in the time that was taken: 1 is the
    limit."""
    found = []
    for row in rows:
        must = Traffic(**row["must"])
        limit = must.limit_ms(bandwidth, flop_rate)
        by = "memory" if must.bytes / bandwidth >= must.flops / flop_rate else "arithmetic"
        taken = best_ms(row)["median"]
        found.append(
            row | {"must": row["must"] | {"bytes": must.bytes}, "limit_ms": limit, "limited_by": by, "share": limit / taken}
        )
    return found


def best_ms(row: dict) -> dict[str, float]:
    """A row's times: as a CUDA graph where there is one."""
    return row["graph_ms"] or row["ms"]


def headline(rows: list[dict], phase: str, names: tuple[str, str]) -> tuple[dict | None, dict | None]:
    """The rows of two models at a phase's first setting, their times under `ms`; as CUDA graphs only where both have one. None
    where a model was not timed."""
    first = next((row for row in rows if row["phase"] == phase), None)
    place = first and (first["batch"], first["length"])
    found = {row["model"]: row for row in rows if row["phase"] == phase and (row["batch"], row["length"]) == place}
    both = [found.get(name) for name in names]
    if all(row and row["graph_ms"] for row in both):
        both = [row | {"ms": row["graph_ms"]} for row in both if row]
    return both[0], both[1]
