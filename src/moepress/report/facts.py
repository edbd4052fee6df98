"""How the numbers were made, as far as the artefacts say it: text, model, methods, machine."""

from collections.abc import Iterable

import numpy as np
import yaml

from moepress.artefacts import read_config, read_json
from moepress.report.compare import mebibytes
from moepress.report.heatmaps import mutual_information
from moepress.report.readable import seconds
from moepress.report.reading import Run, label

Facts = list[tuple[str, str]]


def all_facts(runs: list[Run]) -> dict[str, Facts]:
    """Heading -> what there is to say under it, as (term, text)."""
    return {"Model": model(runs), "Text": text(runs), "Methods": methods(runs), "Machine": machine(runs)}


def model(runs: list[Run]) -> Facts:
    run = next((run for run in runs if run.is_reference), runs[0])
    shape = run.shape
    facts = [
        ("architecture", f"{shape.family}, {shape.num_layers} layers, hidden size {shape.hidden_size}"),
        ("experts", f"{shape.num_experts} per layer of width {shape.intermediate_size}, {shape.top_k} for each token"),
        ("weights", f"{run.num_weights:,} in {mebibytes(run.checkpoint_bytes)}"),
    ]
    inside = run.domains[0]
    use_DLE = np.array([run.metrics["domains"][domain]["expert_use"] for domain in inside])
    share_LE = use_DLE.mean(0)
    layer, expert = np.unravel_index(share_LE.argmin(), share_LE.shape)
    facts.append(
        (
            "least used expert",
            f"{100 * share_LE.min():.1f} % of a layer's selections (layer {layer}, expert {expert}; even would be "
            f"{100 / shape.num_experts:.3g} %), on test text of the corpus's domains",
        )
    )
    if len(inside) > 1:
        by_layer = [f"{mutual_information(use_DLE[:, layer]):.2f}" for layer in range(use_DLE.shape[1])]
        facts.append(("mutual information of domain and expert", f"{', '.join(by_layer)} bit, by layer, on test text"))
    return facts


def text(runs: list[Run]) -> Facts:
    run = runs[0]
    domains = run.metrics["domains"]
    tokens, blocks = (sum(domain[name] for domain in domains.values()) for name in ("num_tokens", "num_blocks"))
    by_domain = ", ".join(f"{name} {domain['num_blocks']}" for name, domain in domains.items())
    facts = [
        (
            "test text",
            f"{tokens:,} tokens in {blocks} blocks of {tokens // max(blocks, 1)} ({by_domain}), the same for every run",
        )
    ]
    calibrated = dict.fromkeys(found for run in runs if (found := calibration(run)))
    if calibrated:
        facts.append(("calibration text", "; ".join(calibrated)))
    overlap = run.corpus.get("overlap", {})
    if "words" in overlap:
        kept = [one["mean_share_kept"] for name in ("calibration", "test") for one in overlap.get(name, {}).values()]
        dropped = sum(one["dropped"] for name in ("calibration", "test") for one in overlap.get(name, {}).values())
        worst = f"; of what is left at most {100 * max(kept):.1f} % on average in any domain" if kept else ""
        facts.append(
            (
                "overlap",
                f"held-out documents that share runs of {overlap['words']} words with earlier text: {dropped} left out{worst}",
            )
        )
    return facts


def sources(runs: list[Run]) -> tuple[list[str], list[list[str]]]:
    """Where the text comes from: headings, and a row for each domain."""
    corpus = runs[0].corpus
    known = corpus.get("sources", {})
    rows = []
    for domain, splits in corpus["domains"].items():
        source = known.get(domain) if isinstance(known.get(domain), dict) else known
        origin = source.get("package") or source.get("id") or source.get("path") or ""
        version = source.get("version") or source.get("revision") or ""
        characters = [f"{splits[split]['characters']:,}" if split in splits else "" for split in SPLITS]
        rows.append([domain, f"{origin} {version}".strip(), str(source.get("licence") or "not stated"), *characters])
    return ["domain", "source", "licence", *(f"{split} (characters)" for split in SPLITS)], rows


SPLITS = ("train", "calibration", "test")


def calibration(run: Run) -> str | None:
    """The calibration sample that a run's quantization read."""
    if not run.is_quantized:
        return None
    described = yaml.safe_load((run.folder("quantization") / "config.yaml").read_text(encoding="utf-8"))
    folder = described.get("inputs", {}).get("calibration")
    if not folder or not (run.results / folder / "config.yaml").is_file():
        return None
    config = read_config(run.results / folder)["calibration"]
    domains = ", ".join(config["domains"]) if config["domains"] else "all domains"
    return f"{config['num_sequences']} sequences of {config['seq_len']} tokens from {domains}, drawn with seed {config['seed']}"


def methods(runs: list[Run]) -> Facts:
    quantized = [run for run in runs if run.is_quantized]
    facts = [("seeds", f"{_listed(sorted({run.seed for run in runs}))} (each row is one run under one seed)")]
    if quantized:
        groups = _listed(sorted({run.quantization["group_size"] for run in quantized}))
        attention = _listed({f"{run.quantization.get('attention_bits') or 16} bits" for run in quantized})
        facts.append(
            (
                "grid",
                f"groups of {groups} weights share a scale and a zero point; attention at {attention}; router at 16",
            )
        )
    for run in quantized:
        starved = sum(len(layer.get("starved", [])) for layer in run.diagnostics)
        if starved:
            total = run.shape.num_layers * run.shape.num_experts
            facts.append((f"starved experts, {run.title}", f"{starved} of {total} saw fewer calibration tokens than inputs"))
    return facts


def machine(runs: list[Run]) -> Facts:
    folders = dict.fromkeys(run.folder(stage) for run in runs for stage in run.artefacts)
    found = [read_json(folder / "provenance.json") for folder in folders if (folder / "provenance.json").is_file()]
    latency = [run.latency for run in runs]
    threads = f"{_listed({one['threads'] for one in latency})} threads, {_listed({one['dtype'] for one in latency})}"
    facts = [("timed on", f"{_listed({one['device'] for one in latency})}, {threads}")]
    if found:
        peak = max(found, key=lambda one: one["peak_memory_bytes"])
        total = seconds(sum(one["seconds"] for one in found))
        facts.append(
            (
                "stages",
                f"{len(found)} artefacts, {total} of work; at most {mebibytes(peak['peak_memory_bytes'])} of memory ({peak['stage']})",
            )
        )
        names = dict.fromkeys(name for one in found for name in one["versions"])
        facts.append(
            ("versions", ", ".join(f"{n} {_listed({one['versions'].get(n) for one in found} - {None})}" for n in names))
        )
        facts.append(("commit", _listed({one["git_commit"] for one in found} - {None}) or "not from a checkout"))
        facts.append(("system", _listed({one["machine"]["system"] for one in found})))
    return facts


def _listed(values: Iterable) -> str:
    return ", ".join(sorted(map(str, values), key=lambda value: (len(value), value)))


def used_methods(runs: list[Run]) -> str:
    return _listed({label(run.quantization["method"]) for run in runs})
