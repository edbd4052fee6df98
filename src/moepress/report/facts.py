"""How the numbers were made, as far as the artefacts say it: model, text, methods, machine."""

import csv
from collections.abc import Iterable

import numpy as np
import yaml

from moepress.artefacts import read_config, read_json
from moepress.dag import distill_sequences
from moepress.integrity import PROVENANCE, is_whole
from moepress.models.specialisation import mutual_information
from moepress.report.run import Run

SIZES = ("folder_bytes", "loaded_bytes")
SPLITS = ("train", "calibration", "test")


def all_facts(runs: list[Run]) -> dict[str, dict[str, str]]:
    """Heading -> what there is to say under it, term -> text."""
    return {"Model": model(runs), "Text": text(runs), "Methods": methods(runs), "Machine": machine(runs)}


def model(runs: list[Run]) -> dict[str, str]:
    run = next((run for run in runs if run.is_reference), runs[0])
    shape = run.shape
    facts = {
        "architecture": f"{shape.family}, {shape.num_layers} layers, hidden size {shape.hidden_size}",
        "experts": f"{shape.num_experts} in a layer, of width {shape.intermediate_size}; {shape.top_k} for each token",
        "weights": f"{run.num_weights:,}",
    }
    log = run.model / "training.csv"
    if log.is_file():
        with log.open(newline="") as file:
            losses = [float(row["loss"]) for row in csv.DictReader(file)]
        facts["training"] = f"{len(losses)} steps, to a loss of {np.mean(losses[-50:]):.3f} nats per token"
    use_DLE = np.array([run.metrics["domains"][domain]["expert_use"] for domain in run.domains[0]])
    share_LE = use_DLE.mean(0)
    layer, expert = np.unravel_index(share_LE.argmin(), share_LE.shape)
    facts["least used expert"] = (
        f"{100 * share_LE.min():.1f} % of its layer's selections (layer {shape.moe_layers[layer]}, expert {expert}; an even "
        f"share is {100 / shape.num_experts:.3g} %), at 16 bits on the test text of the corpus's domains"
    )
    if len(use_DLE) > 1:
        by_layer = ", ".join(f"{mutual_information(use_DLE[:, layer]):.2f}" for layer in range(use_DLE.shape[1]))
        facts["mutual information of domain and expert"] = f"{by_layer} bit, by layer, on the same text"
    return facts


def text(runs: list[Run]) -> dict[str, str]:
    domains = runs[0].metrics["domains"]
    tokens, blocks = (sum(domain[name] for domain in domains.values()) for name in ("num_tokens", "num_blocks"))
    by_domain = ", ".join(f"{name} {domain['num_blocks']}" for name, domain in domains.items())
    each = tokens // max(blocks, 1)
    facts = {"test text": f"{tokens:,} tokens in {blocks} blocks of {each} ({by_domain}), the same for every run"}
    calibrated = dict.fromkeys(found for run in runs if (found := calibration(run)))
    if calibrated:
        facts["calibration text"] = "; ".join(calibrated)
    overlap = runs[0].corpus.get("overlap", {})
    if "words" in overlap:
        held_out = [one for split in SPLITS[1:] for one in overlap.get(split, {}).values()]
        shares = [one["mean_share_kept"] for one in held_out if not np.isnan(one["mean_share_kept"])]
        facts["overlap"] = (
            f"{sum(one['dropped'] for one in held_out)} held-out documents left out, which repeat runs of "
            f"{overlap['words']} words of earlier text; of what is left at most {100 * max(shares, default=0):.1f} % "
            "repeats such a run, on average over a domain"
        )
    return facts


def sources(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Where the text comes from: headings, and a row for each domain."""
    corpus = runs[0].corpus
    known = corpus.get("sources", {})
    rows = []
    for domain, splits in corpus["domains"].items():
        source = known[domain] if isinstance(known.get(domain), dict) else known
        origin = source.get("package") or source.get("id") or source.get("path") or ""
        version = source.get("version") or source.get("revision") or ""
        characters = [f"{splits[split]['characters']:,}" if split in splits else "" for split in SPLITS]
        rows.append([domain, f"{origin} {version}".strip(), str(source.get("licence") or "not stated"), *characters])
    return ["domain", "source", "licence", *(f"{split} (characters)" for split in SPLITS)], rows


def calibration(run: Run) -> str | None:
    """The calibration sample that a run's quantization read."""
    if not run.is_quantized:
        return None
    described = yaml.safe_load((run.folder("quantization") / "config.yaml").read_text(encoding="utf-8"))
    folder = described.get("inputs", {}).get("calibration")
    if not folder or not (run.results / folder / "config.yaml").is_file():
        return None
    found = read_config(run.results / folder)["calibration"]
    domains = ", ".join(found["domains"]) if found["domains"] else "all domains"
    size = f"{found['num_sequences']} sequences of {found['seq_len']} tokens"
    most = distill_sequences({"calibration": found, "quantization": described["config"]["quantization"]})
    tuned = f" (the packed model tuned as a whole on up to {most})" if most else ""
    return f"{size} from {domains}, drawn with seed {found['seed']}{tuned}"


def methods(runs: list[Run]) -> dict[str, str]:
    facts = {
        "seeds": f"{joined({run.seed for run in runs})}; a row is the mean over a method's seeds, runs.csv has one for each"
    }
    quantized = [run for run in runs if run.is_quantized]
    if quantized:
        groups = joined({run.quantization["group_size"] for run in quantized})
        attention = joined({run.quantization.get("attention_bits") or 16 for run in quantized})
        shared = joined({run.quantization.get("shared_bits") or 16 for run in quantized})
        beside = f", shared experts and dense layers at {shared}" if runs[0].has_shared else ""
        facts["grid"] = (
            f"groups of {groups} weights share a scale and a zero point; attention at {attention} bits{beside}, router at 16"
        )
        off = {name: max(abs(run.sizes[f"predicted_{name}"] / run.sizes[name] - 1) for run in quantized) for name in SIZES}
        facts["predicted sizes"] = (
            f"the folders came within {100 * off['folder_bytes']:.2f} % of what was predicted before the run, the loaded "
            f"models within {100 * off['loaded_bytes']:.2f} %"
        )
        starved = {run.title: sum(len(layer.get("starved", [])) for layer in run.diagnostics) for run in quantized}
        worst = max(starved, key=starved.__getitem__)
        if starved[worst]:
            of = len(runs[0].shape.moe_layers) * runs[0].shape.num_experts
            facts["starved experts"] = (
                f"at most {starved[worst]} of {of} ({worst}) saw fewer calibration tokens than they have inputs; their "
                "curvature is shrunk towards their layer's"
            )
        if changed := [found for run in quantized if (found := last_tuning(run))]:
            facts["last tuning"] = "; ".join(changed)
    return facts


def last_tuning(run: Run) -> str | None:
    """What a run's tuning of the whole model did otherwise than its configuration says."""
    found = run.json("quantization", "diagnostics.json")
    asked = run.quantization.get("distill_rate")
    if "distill_rate" not in found or found["distill_rate"] == asked:
        return None
    if found["distill_rate"] is None:
        return f"{run.name} goes without: it made the model worse at every rate"
    return f"{run.name} had a first rate of {found['distill_rate']:g}, for {asked:g} made it worse"


def machine(runs: list[Run]) -> dict[str, str]:
    folders = dict.fromkeys(run.folder(stage) for run in runs for stage in run.artefacts)
    found = [read_json(folder / PROVENANCE) for folder in folders if is_whole(folder)]
    facts, timed = {}, [run.latency for run in runs if run.latency["device"]]
    if timed:
        device, threads, dtype = (joined({one[name] for one in timed} - {None}) for name in ("device", "threads", "dtype"))
        facts["timed on"] = ", ".join(filter(None, [device, f"{threads} threads", dtype]))
        reads, computes = (max(one[name] for one in timed) / 1e9 for name in ("bandwidth", "flop_rate"))
        facts["the device's limit"] = f"{reads:.3g} GB of memory and {computes:.3g} GFLOP a second, measured beside the times"
    if found:
        names = dict.fromkeys(name for one in found for name in one["versions"])
        each = [f"{name} {joined({one['versions'].get(name) for one in found} - {None})}" for name in names]
        facts["versions"] = ", ".join(each)
        facts["commit"] = joined({one["git_commit"] for one in found} - {None}) or "not from a checkout"
        facts["system"] = joined({one["machine"]["system"] for one in found})
    return facts


def joined(values: Iterable) -> str:
    return ", ".join(sorted(map(str, values), key=lambda value: (len(value), value)))
